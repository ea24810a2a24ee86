"""A long run of a tiny model with everything on, watched from outside.

    python -m tests.support.soak runs/soak --steps 5000 --resumes 20

It makes the same run twice. The first is left alone, and its processes and files are looked at once
in a while: resident memory, open descriptors, threads, and the bytes on the disk without the lines
that grow by design. The second is killed with SIGKILL `resumes` times, at steps that are not those
of its checkpoints, and resumed each time. Numbers that grow, and records or weights that differ,
are named, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.behaviour import CLOCKED, furnish

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# After the first fifth of a run its memory may still rise by this share, and by the megabytes.
GROWTH, SLACK_MIB = 0.02, 8.0
LOGGER = """
def counts(step, values):
    with open("logged.txt", "w") as file:
        file.write(f"{step} {len(values)}")
"""


def words(directory: Path, name: str, steps: int) -> list[str]:
    """Return the command line of the run, whose directory is `name`."""
    options = {
        "model": "m",
        "data": "prompts.jsonl",
        "reward": "rewards.py:likes_w3",
        "reward_workers": 2,
        "steps": steps,
        "prompts_per_step": 2,
        "samples_per_prompt": 3,
        "lora.rank": 2,
        "replay.capacity": 12,
        "replay.fraction": 0.3,
        "kl.coef": 0.05,
        "ptx.data": "texts.jsonl",
        "ptx.sequences_per_step": 1,
        "evaluation.data": "held_out.jsonl",
        "evaluation.every": 50,
        "evaluation.samples_per_prompt": 1,
        "generation.max_new_tokens": 6,
        "optim.lr": 1e-3,
        "optim.schedule": "constant",
        "device": "cpu",
        "run.dir": name,
        "run.save_every": 20,
        "run.progress": "false",
        "run.log": "logger.py:counts",
    }
    told = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "fusedrl.engine.cli", "train", "grpo", *told]


def started(directory: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a run in `directory`; what it says goes to said.txt there."""
    with open(directory / "said.txt", "ab") as said:
        return subprocess.Popen(
            list(command),
            cwd=directory,
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        )


def children(pid: int) -> Iterator[int]:
    """Yield a process and those that it started, and theirs."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from children(int(child))


def measured(pid: int, run: Path) -> dict[str, float]:
    """Return what the processes of a run hold now, and the MiB of its files."""
    found = {"processes": 0, "memory_mib": 0.0, "descriptors": 0, "threads": 0}
    for one in children(pid):
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines()
        )
        found["processes"] += 1
        found["memory_mib"] += int(status["VmRSS"].split()[0]) / 1024
        found["threads"] += int(status["Threads"])
        found["descriptors"] += len(os.listdir(f"/proc/{one}/fd"))
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return found | {
        "files": len(files),
        "disk_mib": sum(path.stat().st_size for path in files) / MIB,
    }


def step_of(run: Path) -> int:
    """Return the last step whose line is complete; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_bytes()[-20_000:].split(b"\n")
        return int(json.loads(lines[-2])["step"]) if len(lines) > 2 else 0
    except (OSError, ValueError):
        return 0


def watch(directory: Path, name: str, steps: int, every: int) -> list[dict[str, float]]:
    """Make the run, looking at it every `every` steps. Return what was measured.

    Raises:
        SystemExit: the run failed.
    """
    process, found, due = started(directory, words(directory, name, steps)), [], every
    while process.poll() is None:
        step = step_of(directory / name)
        if due <= step < steps:
            try:
                found.append({"step": step} | measured(process.pid, directory / name))
            except OSError:  # a process or a file went between two looks
                pass
            else:
                due = step + every
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}: see {directory / 'said.txt'}")
    return found


def interrupted(directory: Path, name: str, steps: int, resumes: int) -> int:
    """Make the run, killed `resumes` times on its way. Return how often it was.

    Raises:
        SystemExit: the run failed by itself.
    """
    kills, command = 0, words(directory, name, steps)
    while True:
        process = started(directory, command)
        at = (kills + 1) * steps // (resumes + 1) + kills % 7
        while process.poll() is None:
            if kills < resumes and step_of(directory / name) >= at:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
        if process.returncode == 0:
            return kills
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run ended with {process.returncode}: {directory / 'said.txt'}")
        kills += 1
        command = [*words(directory, name, steps), "--run.resume", "true"]


def left_by(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the metrics of a run without clocks, and its samples and weights as bytes."""
    rows = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(CLOCKED)}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    files = [*run.rglob("*.safetensors"), *run.glob("samples*.jsonl")]
    return rows, {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


def growth(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Name what is larger in the last fifth of a run than in its second, beyond the allowance."""
    fifth, told = max(1, len(rows) // 5), []
    for name in ("memory_mib", "descriptors", "threads", "processes", "files", "disk_mib"):
        before = max(row[name] for row in rows[fifth : 2 * fifth] or rows[:1])
        after = max(row[name] for row in rows[-fifth:])
        allowed = before * (1 + GROWTH) + (SLACK_MIB if name == "memory_mib" else 0)
        if after > allowed:
            told.append(f"{name} grew from {before:.6g} to {after:.6g}")
    return told


def differences(one: Path, other: Path) -> list[str]:
    """Name what two runs left that is not the same, bit for bit."""
    (rows, files), (rows2, files2) = left_by(one), left_by(other)
    steps = [a["step"] for a, b in zip(rows, rows2, strict=False) if a != b]
    told = [f"metrics of {len(steps)} rows, first at step {steps[0]}"] if steps else []
    if len(rows) != len(rows2):
        told.append(f"{len(rows)} rows of metrics against {len(rows2)}")
    names = sorted(name for name in files | files2 if files.get(name) != files2.get(name))
    return told + names


def soak(directory: Path, steps: int, resumes: int) -> dict[str, Any]:
    """Run both, and return what was found; "faults" is empty if nothing is wrong."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    furnish(directory)
    (directory / "logger.py").write_text(LOGGER)
    began = time.monotonic()
    rows = watch(directory, "whole", steps, max(1, steps // 50))
    between = time.monotonic()
    kills = interrupted(directory, "parts", steps, resumes)
    return {
        "steps": steps,
        "kills": kills,
        "seconds": [between - began, time.monotonic() - between],
        "looked": len(rows),
        "first": rows[len(rows) // 5],
        "last": rows[-1],
        "faults": growth(rows) + differences(directory / "whole", directory / "parts"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--resumes", type=int, default=20)
    options = parser.parse_args()
    found = soak(options.directory.resolve(), options.steps, options.resumes)
    text = json.dumps(found, indent=1)
    (options.directory / "soak.json").write_text(text + "\n")
    print(text)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
