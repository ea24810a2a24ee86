"""The cases of behaviour.py by several processes that train together, or by one with as many lanes.

    python -m tests.support.ranks 2 record.json "ppo" "grpo bfloat16"

Each process goes through the same cases one after the other; what the runs left behind is recorded
once. `together` starts the processes and returns that record.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.support.behaviour import cases, command, read_run

from fusedrl.engine.parallel.ranks import Ranks

ROOT = Path(__file__).parents[2]


# more micro-batches than lanes, of several sizes
MANY = {
    "sft": ["--sequences_per_step", "24", "--tokens_per_microbatch", "12"],
    "reward": ["--pairs_per_step", "24", "--tokens_per_microbatch", "20"],
    "dpo": ["--pairs_per_step", "24", "--tokens_per_microbatch", "20"],
    "kto": ["--answers_per_step", "24", "--tokens_per_microbatch", "20"],
    "": ["--prompts_per_step", "12", "--tokens_per_microbatch", "12"],
}


def together(
    size: int, directory: Path, names: Sequence[str], options: Sequence[str] = ()
) -> dict[str, Any]:
    """Run cases by `size` processes in a directory that `furnish` has filled; options are added to
    each."""
    children = start(size, directory, names, options)
    said = [child.communicate(timeout=600)[1] for child in children]
    assert [child.returncode for child in children] == [0] * size, "\n".join(said)[-3000:]
    return json.loads((directory / f"record-{size}.json").read_text(encoding="utf-8"))


def start(
    size: int,
    directory: Path,
    names: Sequence[str],
    options: Sequence[str] = (),
    *,
    kill: tuple[int, int] | None = None,
    fresh: bool = True,
) -> list[subprocess.Popen[str]]:
    """The processes of `together`, started.

    Args:
        kill: (rank, n): that rank is killed as its n-th meeting with the others begins.
        fresh: remove what an earlier case left in `run`.
    """
    out = directory / f"record-{size}.json"
    store = directory / f"store-{size}"
    store.unlink(missing_ok=True)
    told = {"options": list(options), "kill": kill, "fresh": fresh}
    arguments = [str(size), str(out), json.dumps(told), *names]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks", str(rank), str(store), *arguments],
            cwd=directory,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Without what is of the number of ranks: parts of a group are one, and metrics of the division
    and of guessed tokens are left out."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict) and name.endswith(".safetensors"):
            whole = re.sub(r"\.\d{5}-of-\d{5}", "", name)
            found[whole] = found.get(whole, {}) | value
        else:
            found[name] = value
    found["metrics.jsonl"] = [
        {
            key: value
            for key, value in row.items()
            if not key.startswith(("parallel/", "speculation/"))
        }
        for row in record["metrics.jsonl"]
    ]
    return found


def _kill_at(meeting: int) -> None:
    """Kill this process as its so-many-th meeting begins."""
    original, count = Ranks._meet, 0

    def meet(self: Ranks, what: str, failure: str) -> list[str]:
        nonlocal count
        count += 1
        if count == meeting:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, what, failure)

    Ranks._meet = meet  # type: ignore[method-assign]


def _main(
    rank: int, store: str, size: int, out: str, told: dict[str, Any], names: Sequence[str]
) -> None:
    if size > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size
        )
    if told["kill"] and told["kill"][0] == rank:
        _kill_at(told["kill"][1])
    record: dict[str, Any] = {}
    for name in names:
        if rank == 0 and told["fresh"]:
            shutil.rmtree("run", ignore_errors=True)
        if size > 1:
            dist.barrier()
        many = MANY.get(name.split()[0], MANY[""])
        code, said = command([*cases()[name], *many, *told["options"]])
        if code:
            raise RuntimeError(f"{name}: rank {rank} ended with {code}: {said[-2000:]}")
        if rank == 0:
            record[name] = comparable(read_run(Path("run")))
    if rank == 0:
        Path(out).write_text(json.dumps(record), encoding="utf-8")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()  # the backend's threads would end the process otherwise


if __name__ == "__main__":
    number, path, of, result, extra, *wanted = sys.argv[1:]
    _main(int(number), path, int(of), result, json.loads(extra), wanted)
