"""Checks of one implementation of one op: accuracy and repeatable bits over a sample of the grid,
and the time of one call."""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from fusedrl.engine.tools.machine import seconds_of, wait_for
from fusedrl.engine.tools.verify.grid import (
    Entry,
    Problem,
    Tensors,
    copy_with_storage,
    describe,
    examine,
    finished,
    grid,
    interpreted,
    sample_of_grid,
)
from fusedrl.kernels.runtime.dispatch import CannotServe, unavailable

# Elements of a case: of a sample, and of the whole grid. "interpreted" is Triton on a CPU.
QUICK = {"cpp": 1 << 18, "torch": 1 << 17, "interpreted": 1 << 11, "gpu": 1 << 21}
WHOLE = {"cpp": 1 << 30, "torch": 1 << 23, "interpreted": 1 << 19, "gpu": 1 << 28}
_SECONDS, _CALLS = 0.3, (5, 200)  # one timing takes so long, within so many calls
# Tiles as small as the interpreter likes them (it costs time by lane), which also brings carries
# and running maxima into play.
SMALL_TILES = {"full_kl._triton": {"_BLOCK": 64}, "gae._triton": {"_CHUNK": 16}}


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Make Triton's tiles small enough for the interpreter to run in milliseconds, for the duration
    of the block. Without the interpreter, do nothing."""
    found: list[tuple[Any, str, Any]] = []
    if unavailable("triton", "cpu") is None:
        for module, values in SMALL_TILES.items():
            loaded = importlib.import_module(f"fusedrl.kernels.{module}")
            found += [(loaded, name, getattr(loaded, name)) for name in values]
            for name, value in values.items():
                setattr(loaded, name, value)
    try:
        yield
    finally:
        for loaded, name, value in found:
            setattr(loaded, name, value)


def budget(sizes: dict[str, int], impl: str, device: torch.device) -> int:
    """Return the limit in `sizes` (QUICK or WHOLE) for an implementation on a device."""
    return sizes[
        "gpu" if device.type == "cuda" else "interpreted" if interpreted(impl, device) else impl
    ]


def try_op(
    entry: Entry,
    impl: str,
    device: torch.device,
    *,
    cases: int = 6,
    full: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Check one implementation of an op. Return its row of the report: the number of cases, the
    faults, and the largest error as a multiple of its bound.

    Args:
        cases: number of random cases, besides the plain one; half as many under Triton's
            interpreter.
        full: whether to run the whole grid instead.
        seed: seed of the random cases.
    """
    began = time.perf_counter()
    if full:
        drawn = grid(entry, impl, budget(WHOLE, impl, device), device)
    else:
        count = -(-cases // 2) if interpreted(impl, device) else cases
        drawn = sample_of_grid(entry, impl, count, budget(QUICK, impl, device), device, seed)
    plain = entry.plain(
        **{name: levels[0] for name, levels in entry.levels_of(impl, device).items()}
    )
    worst, why, refused, moved, fatal = 0.0, list[str](), list[str](), 0, False
    # torch's own GPU kernels add by atomics, so their bits may differ between runs
    torchs = impl == "torch" and device.type == "cuda"
    with small_tiles(), warnings.catch_warnings():
        # under the interpreter, numpy warns of NaN and overflow, which the cases contain on purpose
        warnings.simplefilter("ignore", RuntimeWarning)
        for case in (plain, *drawn):
            try:
                verdict = examine(entry, case, impl, device, twice=True)
                wait_for(device)
            except CannotServe as error:
                refused.append(f"{describe(case)}: {error}")
                continue
            except Exception as error:  # any error is a fault to report in this row
                why.append(f"{describe(case)}: {type(error).__name__}: {str(error).strip()[:500]}")
                if fatal := lost(error):
                    break
                continue
            worst = max([worst, *verdict.worst.values()])
            moved += bool(verdict.moved)
            if faults := (replace(verdict, moved=[]) if torchs else verdict).faults():
                why.append(f"{describe(case)}: {'; '.join(faults)}")
    asked = 1 + len(drawn)
    state = "FAIL" if why else "refused" if len(refused) == asked else "ok"
    return {
        "what": entry.op,
        "impl": impl,
        "state": state,
        "cases": asked - len(refused),
        "failed": len(why),
        "error_over_bound": worst if worst < math.inf else "inf",
        "cases_with_moved_bits": moved,
        "seconds": time.perf_counter() - began,
        "why": why or (refused[:1] if state == "refused" else []),
        "fatal": fatal,
    }


def lost(error: Exception) -> bool:
    """Whether a process can no longer use its GPU after this error."""
    return any(
        word in str(error)
        for word in ("CUDA error", "illegal memory access", "HIP error", "device-side assert")
    )


def time_op(
    entry: Entry, impl: str, device: torch.device, bandwidth: float, rate: float
) -> dict[str, Any]:
    """Time one call, forward and backward, from Python until the device is done. Return the median
    in milliseconds, and the percentage of the machine's ceiling that the call reached. Empty if the
    op has no timed case, and under Triton's interpreter.

    bandwidth, rate: the machine's ceilings in bytes and flops per second.
    """
    changes = entry.timed.get(device.type)
    if changes is None or interpreted(impl, device):
        return {}
    case = entry.plain(**changes)
    try:
        problem = entry.problem(case, device=device)
        results = _call(entry, _prepared(entry, problem), problem, impl)  # compiles, warms up
    except (CannotServe, torch.OutOfMemoryError) as error:
        return {"timed": describe(changes), "not_timed": str(error)}
    moved, flops = (
        entry.work(problem.to("cpu"), results) if entry.work else (_traffic(problem, results), 0)
    )
    del results
    taken: list[float] = []
    while len(taken) < _CALLS[0] or (sum(taken) < _SECONDS and len(taken) < _CALLS[1]):
        x = _prepared(entry, problem)
        taken.append(seconds_of(lambda x=x: _call(entry, x, problem, impl), device))  # type: ignore[misc]
    median, floor = statistics.median(taken), max(moved / bandwidth, flops / rate)
    return {
        "timed": describe(changes),
        "ms": 1e3 * median,
        "percent_of_ceiling": 100 * floor / median,
        "bytes": moved,
        "flops": flops,
    }


def _prepared(entry: Entry, problem: Problem) -> dict[str, Any]:
    """Return the arguments of one call; those that the op writes to are copied."""
    x = {
        name: copy_with_storage(t) if name in entry.writes and t is not None else t
        for name, t in problem.x.items()
    }
    wanted = entry.wants if problem.upstream else ()
    return x | {
        name: x[name].detach().requires_grad_() for name in wanted if x.get(name) is not None
    }


def _call(entry: Entry, x: dict[str, Any], problem: Problem, impl: str) -> Tensors:
    leaves = {name: x[name] for name in entry.wants if problem.upstream and x.get(name) is not None}
    return finished(entry.forward(x, problem.settings, impl), leaves, problem)


def _traffic(problem: Problem, results: Tensors) -> int:
    """Count the bytes of reading every input and writing every result once."""
    tensors = (*problem.x.values(), *problem.upstream.values(), *results.values())
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cost_of(entry: Entry) -> int:
    """Return the cost of the op's plain case; expensive ops are started first."""
    return entry.cost(SimpleNamespace(**entry.plain())) * max(1, len(entry.wants))
