"""The method behind every figure: contestants run interleaved in one process, after a check that
their answers agree. A figure is a median with p20 and p80, next to the ceiling of the machine.

    make bench                       everything, one thread; writes bench/results/*.json
    python -m pytest bench           checks the answers and times nothing
    python -m pytest bench -k "logprob and 32000" --benchmark-enable -s     some, only printed

The options of pytest-benchmark work, too: --benchmark-save NAME, --benchmark-compare,
--benchmark-json FILE.

A bench file is a pytest module with one test per contest. The fixture `contest` (conftest.py) runs
a contest with the code of this file. A contestant is a function of no arguments that does the whole
piece of work and returns the answer. The first contestant is ours; a ratio is another contestant's
median over ours. `bytes_moved` and `flops` are what the *problem* needs; a comment derives them
where they are computed. `percent_of_ceiling` is the time in which this machine could move the bytes
or do the flops, whichever takes longer, over the measured time. Both ceilings are measured in the
same run. Calls shorter than a millisecond are repeated until they fill one millisecond, and timed
together. `make bench` makes malloc hold on to freed memory for all contestants, as a caching
allocator does. Without this, a contestant that had returned its memory got fresh pages at only 0.5
GB/s on this virtual machine, and the figure measured nothing else.

On a GPU a time is the device time between two events. Before each call 256 MB are overwritten, so
that none of its inputs are left in the L2 cache. The device sleeps while the host enqueues the
call, so that launches cost as much as in a full queue.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.tools import machine as ceilings
from fusedrl.kernels.runtime.dispatch import Implementations, unavailable

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a contest is timed for about so long, in at least and at most so many rounds
SECONDS, FEWEST, MOST = 2.0, 5, 31
_AT_ONCE = 1 << 26  # numbers compared at once: a gradient of logits is large
Times = Mapping[str, Sequence[float]]  # contestant -> milliseconds, a round each


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
    # what else the contest measured, named with its unit; on our row
    extra: dict[str, float] = field(default_factory=dict)


# ---- the clock -----------------------------------------------------------------------------------
_elapsed = 0.0


def clock() -> float:
    """Seconds that contestants have run: pytest-benchmark's timer, so that its statistics of ours
    are those of our row, on a GPU too."""
    return _elapsed


@functools.cache
def _evictor() -> Tensor:
    return torch.empty(64 << 20, dtype=torch.float32, device=DEVICE)


def timed(function: Callable[[], Any], calls: int = 1) -> float:
    """Milliseconds of one call: of the device between two events on a GPU, else of the wall clock,
    the mean of `calls` in a row."""
    global _elapsed
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _evictor().zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host enqueues the call
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        milliseconds = start.elapsed_time(end)
    else:
        before = time.perf_counter()
        for _ in range(calls):
            function()
        milliseconds = (time.perf_counter() - before) * 1e3 / calls
    _elapsed += milliseconds / 1e3
    return milliseconds


def calls_for(function: Callable[[], Any], seconds: float) -> int:
    """Return the number of consecutive calls that fill a millisecond on a CPU. A single short call
    after the turns of other contestants would measure mostly its cold start. `seconds`: duration of
    the first call."""
    long = DEVICE.type == "cuda" or seconds > 0.1
    return 1 if long else max(1, math.ceil(1.0 / timed(function)))


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, bytes read plus bytes written."""
    return ceilings.copy_bandwidth(DEVICE)


def gemm_rate() -> float:
    """Flops per second of a large matrix product, in float32 on a CPU and in bfloat16 on a GPU."""
    return ceilings.gemm_rate(DEVICE)


# ---- what bench files are written with -----------------------------------------------------------
def on(*, cpu: list, cuda: list) -> list:
    """Return the cases for the device of this run."""
    return cuda if DEVICE.type == "cuda" else cpu


class Random:
    """Generator of reproducible inputs on the device of this run."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=DEVICE)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=DEVICE)


def implementations(module: ModuleType, op: str, reference: bool = True) -> dict[str, str]:
    """Contestant -> name of an implementation that can run `op` of `module` on this device, the
    default first; Triton's interpreter is none.

    Without `reference` the torch implementation is left out beside others: where it is what eager
    does, or slower by design.
    """
    table = next(
        value
        for value in vars(module).values()
        if isinstance(value, Implementations) and value.op == op
    )
    default = table.choose(DEVICE)
    others = [
        name
        for name in getattr(table, DEVICE.type)
        if name != default and unavailable(name, DEVICE.type) is None
    ]
    others = [
        name
        for name in others
        if (name != "triton" or DEVICE.type == "cuda") and (name != "torch" or reference)
    ]
    return {"fusedrl": default, **{f"fusedrl, {name}": name for name in others}}


def liger(path: str) -> Any | None:
    """A name of Liger ("ops.swiglu.LigerSiLUMulFunction") where there is a GPU and the package;
    else None."""
    module, name = path.rsplit(".", 1)
    try:
        return (
            getattr(importlib.import_module(f"liger_kernel.{module}"), name)
            if DEVICE.type == "cuda"
            else None
        )
    except (ImportError, AttributeError):
        return None


def compiled(function: Callable) -> Callable:
    """torch.compile for the very shapes of this contest."""
    return torch.compile(function, dynamic=False)


def no_grad(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """The contestant that calls `function` without recording anything for a backward."""

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return call


def gradients(
    function: Callable, leaves: Sequence[Tensor], upstream: Sequence[Tensor], *arguments: Any
) -> Callable[[], Any]:
    """The contestant that calls `function(*leaves, *arguments)` and returns the gradients of its
    outputs in the leaves."""
    return lambda: torch.autograd.grad(function(*leaves, *arguments), leaves, upstream)


def agree(rtol: float, atol: float = 0.0, of_max: float = 0.0) -> Callable[[Any, Any], None]:
    """Compares tuples of tensors; `of_max` adds a tolerance relative to the largest number of
    each."""

    def same(ours: Any, other: Any) -> None:
        for a, b in zip(ours, other, strict=True):
            if a.shape != b.shape:
                raise AssertionError(f"sizes {tuple(a.shape)} and {tuple(b.shape)}")
            tolerance = atol + (of_max * b.abs().max().item() if of_max and b.numel() else 0.0)
            for part, expected in zip(
                a.flatten().split(_AT_ONCE), b.flatten().split(_AT_ONCE), strict=True
            ):
                torch.testing.assert_close(
                    part.float(), expected.float(), rtol=rtol, atol=tolerance
                )

    return same


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- contests ------------------------------------------------------------------------------------
def check_answers(
    what: str,
    contestants: Mapping[str, Callable[[], Any]],
    same: Callable[[Any, Any], None] | None,
    unchecked: Collection[str],
) -> dict[str, float]:
    """Call every contestant once and return the seconds of each. Raise AssertionError if an answer
    differs from ours."""
    names, took = list(contestants), dict[str, float]()

    def answer(name: str) -> Any:
        began = time.perf_counter()
        found = contestants[name]()
        took[name] = time.perf_counter() - began
        return found

    ours = answer(names[0])
    for name in names[1:]:
        other = answer(name)
        if same is not None and name not in unchecked:
            try:
                same(ours, other)
            except AssertionError as error:
                raise AssertionError(
                    f"{what}: expected the answers of {names[0]!r} and {name!r} to agree before "
                    f"they are timed, got {error}"
                ) from error
    return took


def rounds_for(contestants: Mapping[str, Callable[[], Any]]) -> int:
    """Return the number of rounds that fill SECONDS, estimated from one turn of every contestant.
    This turn is also the second warm-up."""
    turn = sum(timed(function) for function in contestants.values()) / 1e3
    return max(FEWEST, min(MOST, int(SECONDS / turn)))


def to_rows(
    what: str,
    shape: str,
    dtype: str,
    times: Times,
    *,
    bytes_moved: int | None = None,
    flops: int | None = None,
    note: str = "",
    extra: Mapping[str, float] | None = None,
) -> list[Row]:
    """Return one row per contestant, ours first."""
    floor_ms = 1e3 * max(
        bytes_moved / copy_bandwidth() if bytes_moved else 0.0,
        flops / gemm_rate() if flops else 0.0,
    )
    quantile = {
        name: torch.tensor(list(values), dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
        for name, values in times.items()
    }
    ours = next(iter(times))
    return [
        Row(
            what,
            shape,
            dtype,
            name,
            *(round(t, 4) for t in (p20, p50, p80)),
            len(times[name]),
            round(p50 / quantile[ours][1], 3),
            bytes_moved,
            flops,
            round(100 * floor_ms / p50, 2) if floor_ms else None,
            note,
            {k: round(v, 4) for k, v in (extra or {}).items()} if name == ours else {},
        )
        for name, (p20, p50, p80) in quantile.items()
    ]


def as_text(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        ceiling = (
            f"  {row.percent_of_ceiling:6.1f}% of ceiling"
            if row.percent_of_ceiling is not None
            else ""
        )
        times = f"{row.p50_ms:10.3f} ms [{row.p20_ms:.3f}, {row.p80_ms:.3f}]"
        extra = "".join(f"  {name} {value:g}" for name, value in row.extra.items())
        lines.append(
            f"{row.what:36} {row.shape:22} {row.dtype:9} {row.contestant:28} {times}  "
            f"x{row.ratio:.2f}{ceiling}  {row.note}{extra}".rstrip()
        )
    return "\n".join(lines)


# ---- memory --------------------------------------------------------------------------------------
def peak_memory(module: str, builder: str, contestant: str) -> int:
    """Bytes by which one call of a contestant raises the peak of memory over what stood there
    before, its answer included.

    `builder` is a function of a bench module that makes the inputs and returns the contestants. On
    a CPU it is called in a fresh process, and what is counted are resident pages (VmHWM, which a
    child does not inherit, as it does ru_maxrss): the buffers of a BLAS and code that is loaded in
    the call count too. The inputs must be made in place, lest their own peak hide that of the call:
    it raises RuntimeError if they are not.
    """
    if DEVICE.type == "cuda":
        call = getattr(importlib.import_module(module), builder)()[contestant]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from bench.harness import _measure_peak; _measure_peak({module!r}, {builder!r}, "
            f"{contestant!r})",
        ],
        capture_output=True,
        text=True,
        cwd=RESULTS.parents[1],
    )
    if done.returncode:
        raise RuntimeError(
            f"{module}.{builder}, {contestant}: expected a peak of memory, got\n{done.stderr}"
        )
    return int(done.stdout.split()[-1])


def _measure_peak(module: str, builder: str, contestant: str) -> None:
    torch.set_num_threads(1)
    call = getattr(importlib.import_module(module), builder)()[contestant]
    now, peak = resident("VmRSS"), resident("VmHWM")
    if peak - now > 8 << 20:
        raise RuntimeError(
            "expected the inputs to be made without a peak of their own, got one of "
            f"{(peak - now) >> 20} MiB above what is left"
        )
    answer = call()
    print(resident("VmHWM") - now)
    del answer


def resident(key: str) -> int:
    return next(
        int(line.split()[1]) << 10
        for line in ceilings.read_text("/proc/self/status").splitlines()
        if line.startswith(key)
    )


# ---- results -------------------------------------------------------------------------------------
@functools.cache
def machine() -> dict[str, Any]:
    """The machine, versions, commit and ceilings of this run."""
    freed = "kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "returned"
    return ceilings.describe_machine(DEVICE) | {
        "freed_memory": freed,
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 2),
        "gemm_gflop_per_s": round(gemm_rate() / 1e9, 1),
    }


Result = tuple[dict[str, Any], dict[str, Any]]  # a row and the run that measured it


def read_results(path: Path) -> list[Result]:
    """Every row of a file with its run. A file whose one run is called "machine" is of the first
    format."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    runs = content["runs"] if "runs" in content else [content["machine"]]
    return [
        ({key: value for key, value in row.items() if key != "run"}, runs[row.get("run", 0)])
        for row in content["rows"]
    ]


def contest_of(result: Result) -> tuple:
    """Return the key of a result's contest. A contest that is run again replaces all its rows,
    since their ratios belong together."""
    row, run = result
    return row["what"], row["shape"], row["dtype"], row["note"], run["gpu"]


def merge_results(path: Path, rows: Sequence[Row], run: Mapping[str, Any]) -> None:
    """Write the rows of one contest to a results file, replacing the contest's earlier rows. The
    rows of other contests stay, with the run that measured them."""
    new: list[Result] = [(asdict(row), dict(run)) for row in rows]
    old = read_results(path)
    place = next(
        (i for i, result in enumerate(old) if contest_of(result) == contest_of(new[0])), len(old)
    )
    kept = [result for result in old if contest_of(result) != contest_of(new[0])]
    results = kept[:place] + new + kept[place:]
    runs: list[dict[str, Any]] = []
    for _, each in results:
        if each not in runs:
            runs.append(each)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        json.dumps(
            {"runs": runs, "rows": [{**row, "run": runs.index(each)} for row, each in results]},
            indent=1,
        )
        + "\n"
    )
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
