"""Whole runs whose k-th file call goes wrong, for every k; and power that fails at the k-th.

    python -m tests.support.torture --stages sft,grpo                # every k of every way
    python -m tests.support.torture --stages sft --sample 20 --seed 1

A shim in C (torture.c) is loaded before python and counts the calls on a run's directory: open,
write, fsync, rename, mkdir, unlink and their like, of Python, of torch and of libraries in Rust.
For each k a child process makes the run and the k-th call
    eio, enospc     fails with that error
    kill            is not made: the process is killed in its place (SIGKILL)
    short           writes half of what it was given (calls that write)
    late            takes 30 ms longer
    power           is not made: the process is killed, and what no fsync made durable is undone
Afterwards the run is resumed, or begun again where it had no checkpoint, and has to end as the run
that nothing happened to: metrics, samples and weights, to the bit. No checkpoint that was
acknowledged may be lost, and a run that says it succeeded must have.

Power is taken strictly: of a file remains what the last fsync of that file saw, of a directory the
names that the last fsync of that directory saw. Real file systems are kinder.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SHIM = Path(__file__).with_name("torture.c")
LOADED = "FUSEDRL_TORTURE_SHIM"  # the shim that this process was started with
COUNT, FAIL, KILL, SHORT, DELAY = range(5)
WAYS = {
    "eio": (FAIL, errno.EIO),
    "enospc": (FAIL, errno.ENOSPC),
    "kill": (KILL, 0),
    "short": (SHORT, 0),
    "late": (DELAY, 0),
    "power": (KILL, 0),
}
STAGES = ("sft", "reward", "dpo", "rejection", "grpo", "ppo")
STEPS = 2
CLOCKED = ("timing/", "mem/", "tokens_per_s")


# ---- runs ----------------------------------------------------------------------------------------
def config_of(stage: str, files: Path, run: Path) -> Any:
    """Return the options of a short run with a checkpoint at each step."""
    from fusedrl.engine import config as c

    common: dict[str, Any] = {
        "model": str(files / "m"),
        "optim": c.OptimConfig(lr=3e-3),
        "run": c.RunConfig(dir=str(run), save_every=1, keep=1, progress=False),
        "device": "cpu",
    }
    if stage == "sft":
        return c.SFTConfig(data=str(files / "texts.jsonl"), sequences_per_step=12, **common)
    if stage in ("reward", "dpo"):
        kind = c.RewardModelConfig if stage == "reward" else c.DPOConfig
        pairs = str(files / "pairs.jsonl")
        return kind(data=pairs, pairs_per_step=12, eval_fraction=0.0, **common)
    common |= {
        "data": str(files / "prompts.jsonl"),
        "reward": (f"{files / 'rewards.py'}:likes_w3",),
        "steps": STEPS,
        "prompts_per_step": 2,
        "samples_per_prompt": 1 if stage == "ppo" else 2,
        "generation": c.GenerationConfig(max_new_tokens=4),
    }
    if stage == "rejection":
        return c.RejectionConfig(**common)
    held = c.EvaluationConfig(data=str(files / "held_out.jsonl"), every=1, samples_per_prompt=1)
    more = {"critic": c.CriticConfig(model=str(files / "m"))} if stage == "ppo" else {}
    return c.PolicyConfig(algorithm=stage, evaluation=held, **common, **more)


def train(config: Any) -> None:
    """Make the run."""
    from fusedrl.engine import config as c
    from fusedrl.engine.stages import dpo, policy, rejection, reward_model, sft

    {
        c.SFTConfig: sft.train_sft,
        c.RewardModelConfig: reward_model.train_reward_model,
        c.DPOConfig: dpo.train_dpo,
        c.RejectionConfig: rejection.train_rejection,
        c.PolicyConfig: policy.train_policy,
    }[type(config)](config)


def left_by(run: Path) -> dict[str, Any]:
    """Return what a run leaves: metrics without clocks, and as bytes its samples, its models and
    its newest checkpoint."""
    files = [*run.glob("*/*.safetensors"), *run.glob("*/config.json"), *run.glob("samples*.jsonl")]
    newest = max(run.glob("checkpoints/step_*"))
    found = {path for path in (*files, *newest.iterdir()) if not path.name.startswith("MANIFEST")}
    return {"rows": without_clocks((run / "metrics.jsonl").read_bytes())} | {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(found)
        if not path.parent.name.startswith("aside-")
    }


def without_clocks(lines: bytes) -> list[Any]:
    """Return the lines of metrics without what a clock or the memory's size decides. A line that
    was torn stays as it is."""
    rows: list[Any] = []
    for line in lines.splitlines(keepends=True):
        try:
            row = json.loads(line)
            rows.append({key: value for key, value in row.items() if not key.startswith(CLOCKED)})
        except ValueError:
            rows.append(line)
    return rows


def state_of(run: Path) -> str:
    """Return a digest of everything in a run's directory that a later process can tell apart."""
    found = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if path.name in ("lock", "status.json") or path.is_dir():
            found.update(f"{path.relative_to(run)}\n".encode())
            continue
        content = path.read_bytes()
        rows = path.name == "metrics.jsonl"
        text = repr(without_clocks(content)).encode() if rows else content
        found.update(f"{path.relative_to(run)} {len(text)}\n".encode() + text)
    return found.hexdigest()


# ---- one process ---------------------------------------------------------------------------------
class Struck:
    """The shim of this process."""

    def __init__(self) -> None:
        self._shim = ctypes.CDLL(os.environ[LOADED])

    def arm(self, run: Path, k: int, way: str, shadow: Path | None) -> None:
        mode, number = WAYS.get(way, (COUNT, 0))
        durable = b"" if shadow is None else str(shadow).encode()
        self._shim.torture_arm(str(run).encode(), ctypes.c_long(k), mode, number, durable)

    def count(self) -> int:
        self._shim.torture_count.restype = ctypes.c_long
        return int(self._shim.torture_count())

    def writes(self, k: int) -> bool:
        return bool(self._shim.torture_writes(ctypes.c_long(k)))

    def disarm(self) -> None:
        self._shim.torture_disarm()


def in_child(work: Callable[[], Any], out: Path) -> tuple[int, str]:
    """Run `work` in a fork. Return its exit status (negative: a signal) and what it returned or
    raised."""
    out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status, said = 1, ""
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            said, status = str(work()), 0
        except BaseException as error:
            said = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
        out.write_text(said)
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, out.read_text() if out.is_file() else ""


def acknowledged(note: Path) -> None:
    """Have each checkpoint noted once its save has returned."""
    from fusedrl.engine.runs.saving import Saver

    save = Saver.save

    def noted(self: Saver) -> Path:
        path = save(self)
        with open(note, "a") as file:
            file.write(f"{self.step}\n")
        return path

    Saver.save = noted  # type: ignore[method-assign]


def restored(run: Path, shadow: Path, top: int) -> None:
    """Make a run's directory what is durable of it. `top`: the inode of the directory."""

    def fill(directory: Path, inode: int) -> None:
        directory.mkdir()
        listed = shadow / str(inode)
        for line in listed.read_text().splitlines() if listed.is_file() else ():
            name, found, folder = line.rsplit("\t", 2)
            if name in (".", ".."):
                continue
            if folder == "1":
                fill(directory / name, int(found))
            else:
                content = shadow / found
                (directory / name).write_bytes(content.read_bytes() if content.is_file() else b"")

    shutil.rmtree(run)
    fill(run, top)


class Torture:
    """Tries one stage in every way. `place` is on a tmpfs, where no inode is used twice."""

    def __init__(self, stage: str, files: Path, place: Path) -> None:
        self.stage, self.files, self.place, self.struck = stage, files, place, Struck()
        self.run, self.shadow, self.note = place / "run", place / "durable", place / "acknowledged"
        train(config_of(stage, files, place / "first"))  # imports, once for all that are forked
        status, said = in_child(self._count, place / "out")
        if status:
            raise SystemExit(f"{stage}: the run without a fault failed: {said}")
        self._known: dict[tuple[str, int], str | None] = {}
        self.calls, *self.writes = map(int, said.split())
        self.expected = left_by(self.run)

    def _count(self) -> str:
        """Make the run, and return the number of its calls, and those that write."""
        self.struck.arm(self.run, 0, "count", None)
        train(config_of(self.stage, self.files, self.run))
        calls = self.struck.count()
        writes = (k for k in range(1, calls + 1) if self.struck.writes(k))
        return " ".join(map(str, (calls, *writes)))

    def cases(self, ways: Sequence[str]) -> list[tuple[str, int]]:
        """Return every call in every way."""
        every = range(1, self.calls + 1)
        return [(way, k) for way in ways for k in (self.writes if way == "short" else every)]

    def _first(self, way: str, k: int) -> str:
        acknowledged(self.note)
        self.struck.arm(self.run, k, way, self.shadow if way == "power" else None)
        train(config_of(self.stage, self.files, self.run))
        self.struck.disarm()
        return "done"

    def _again(self) -> str:
        """Go on, or begin anew, and return the step gone on from."""
        from fusedrl.engine.runs.checkpoint import latest_checkpoint

        config = config_of(self.stage, self.files, self.run)
        found = latest_checkpoint(self.run)
        told = {"resume": True} if found is not None else {"restart": True}
        train(replace(config, run=replace(config.run, **told)))
        return str(0 if found is None else found.step)

    def attempt(self, way: str, k: int) -> str | None:
        """Try one call. Return what is wrong, or None."""
        for path in (self.run, self.shadow):
            shutil.rmtree(path, ignore_errors=True)
        self.note.unlink(missing_ok=True)
        self.shadow.mkdir()
        self.run.mkdir()
        top = self.run.stat().st_ino
        status, said = in_child(lambda: self._first(way, k), self.place / "out")
        if way in ("short", "late") and status:
            return f"a call that was allowed ended the run: {said}"
        if way in ("eio", "enospc") and status < 0:
            return f"signal {-status}"
        if way in ("eio", "enospc") and status and not told(said):
            return f"ended with {said}"
        if way == "power" and status:
            restored(self.run, self.shadow, top)
        if status == 0:
            return self._differs("the run that said it had succeeded")
        saved = self.note.read_text().split() if self.note.exists() else ["0"]
        # calls that only read leave what the call before left, which was gone on from already
        left = state_of(self.run), int(saved[-1])
        if left not in self._known:
            self._known[left] = self._goes_on(int(saved[-1]))
        return self._known[left]

    def _goes_on(self, saved: int) -> str | None:
        """Go on from what is there. Return what is wrong, or None. `saved`: the newest step whose
        checkpoint was acknowledged."""
        status, said = in_child(self._again, self.place / "out")
        if status:
            return f"could not go on: {said}"
        if int(said) < saved:
            return f"went on from step {said}, and step {saved} had been acknowledged"
        return self._differs(f"the run that went on from step {said}")

    def _differs(self, what: str) -> str | None:
        found = left_by(self.run)
        names = sorted(n for n in found | self.expected if found.get(n) != self.expected.get(n))
        return f"{what} left other {', '.join(names)}" if names else None


def told(said: str) -> bool:
    """Whether an error names what the system said, or is one of those that a user can mend."""
    kinds = ("OSError", "UserError", "CheckpointError", "ConfigError", "SetupError", "DataError")
    kinds += ("PermissionError", "FileNotFoundError", "Stopped")
    words = (os.strerror(errno.EIO), os.strerror(errno.ENOSPC))
    return said.startswith(kinds) or any(word in said.partition("\n")[0] for word in words)


def torture(stages: Sequence[str], ways: Sequence[str], sample: int, seed: int) -> dict[str, Any]:
    """Try every call, or `sample` of them. Return the counts, and the faults by stage, way and
    call."""
    from tests.support.behaviour import furnish

    counts, faults, began = collections.Counter[str](), dict[str, str](), time.monotonic()
    calls = {}
    with tempfile.TemporaryDirectory(prefix="fusedrl-torture-", dir=_memory()) as made:
        files = Path(made) / "files"
        files.mkdir()
        furnish(files)
        for stage in stages:
            place = Path(made) / stage
            place.mkdir()
            one = Torture(stage, files, place)
            calls[stage] = one.calls
            cases = one.cases(ways)
            if sample:
                cases = random.Random(f"{seed} {stage}").sample(cases, min(sample, len(cases)))
            for way, k in cases:
                found = one.attempt(way, k)
                counts[f"{stage} {way}"] += 1
                if found is not None:
                    faults[f"{stage} {way} {k}"] = found
                    print(f"{stage} {way} {k}: {found}", flush=True)
            print(
                f"{stage}: {one.calls} calls, {len(cases)} faults tried",
                file=sys.stderr,
                flush=True,
            )
    tried = counts.total()
    return {
        "calls": calls,
        "tried": tried,
        "survived": tried - len(faults),
        "seconds": round(time.monotonic() - began, 1),
        "by": dict(counts),
        "faults": faults,
    }


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def loaded() -> bool:
    """Start this program again with the shim loaded first, and return False; True where it is."""
    if LOADED in os.environ:
        return True
    with tempfile.TemporaryDirectory() as made:
        shim = Path(made) / "torture.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl"], check=True)
        environment = os.environ | {"LD_PRELOAD": str(shim), LOADED: str(shim)}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.support.torture", *sys.argv[1:]]
        code = subprocess.run(command, env=environment).returncode
    raise SystemExit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--sample", type=int, default=0, help="calls a stage; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loaded()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stages, ways = options.stages.split(","), options.ways.split(",")
    found = torture(stages, ways, options.sample, options.seed)
    print(json.dumps(found, indent=1))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
