"""How a figure is obtained: contestants interleaved in one process, one thread, medians with p20 and p80, the ceiling beside them.

    rows = contest("logprob forward", "2048 x 32000", "float32", {"fusedrl": ours, "eager": eager}, bytes_moved=4 * N * V,
                   same=lambda a, b: torch.testing.assert_close(a, b))
    report("logprob", rows)          # prints a table and writes bench/results/logprob.json

A contestant is a function of no arguments that does the whole piece of work and returns the answer. The first one is ours;
ratios are of the others' median to ours. `bytes_moved` and `flops` are what the *problem* needs, derived in a comment where they are computed.
"""
from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One contestant's figure; times in milliseconds."""

    what: str
    shape: str
    dtype: str
    contestant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    ratio: float  # this median / ours: how many times faster ours is
    bytes_moved: int | None = None
    flops: int | None = None
    percent_of_ceiling: float | None = None
    note: str = ""


def machine() -> dict[str, Any]:
    """The machine, versions and commit that every results file carries."""
    cpu = next((line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--", ".", ":!bench/results")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), "gpu": gpu, "threads": torch.get_num_threads(),
            **versions, "commit": commit + ("+changes" if dirty else ""), "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(RESULTS.parents[1]), *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds of one call, the device's queue drained on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second of a copy far larger than the caches, bytes read plus bytes written; the ceiling of memory-bound work."""
    source = torch.rand(32 << 20 if device == "cpu" else 1 << 28, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * source.numel() * 4 / (sorted(times)[3] / 1e3)


def contest(what: str, shape: str, dtype: str, contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2,
            bytes_moved: int | None = None, flops: int | None = None, ceiling: float | None = None, same: Callable[[Any, Any], None] | None = None,
            note: str = "") -> list[Row]:
    """Time the contestants in turn, `rounds` times.

    Args:
        contestants: name -> function; the first is ours.
        bytes_moved, flops: what the problem needs; `percent_of_ceiling` is bytes_moved (else flops) per second over `ceiling`.
        ceiling: bytes (or flops) per second measured in this run; by default `copy_bandwidth()` when `bytes_moved` is given.
        same: called with (ours, another's answer) before anything is timed; raises when they differ.
    """
    names = list(contestants)
    answers = {name: contestants[name]() for name in names}
    if same is not None:
        for name in names[1:]:
            same(answers[names[0]], answers[name])
    del answers
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names:
            elapsed = timed(contestants[name])
            if turn >= 0:
                times[name].append(elapsed)
    if bytes_moved is not None and ceiling is None:
        ceiling = copy_bandwidth()
    work = bytes_moved if bytes_moved is not None else flops
    quantile = {name: torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for name, values in times.items()}
    return [
        Row(what, shape, dtype, name, *(round(t, 4) for t in quantile[name]), rounds, round(quantile[name][1] / quantile[names[0]][1], 3), bytes_moved, flops,
            round(100 * work / (quantile[name][1] / 1e3) / ceiling, 2) if work and ceiling else None, note)
        for name in names
    ]


def report(name: str, rows: list[Row]) -> None:
    """Print the rows and write them with the machine to bench/results/<name>.json."""
    for row in rows:
        ceiling = f"  {row.percent_of_ceiling:6.1f}% of ceiling" if row.percent_of_ceiling is not None else ""
        times = f"{row.p50_ms:10.3f} ms [{row.p20_ms:.3f}, {row.p80_ms:.3f}]"
        print(f"{row.what:32} {row.shape:18} {row.dtype:9} {row.contestant:24} {times}  x{row.ratio:.2f}{ceiling}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def one_thread() -> None:
    """Both contestants on one thread: two shared cores make OpenMP's barriers spin."""
    torch.set_num_threads(1)
