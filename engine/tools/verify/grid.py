"""Accuracy grid: makes test cases, runs an op on them and judges the results. The ops are in
catalogue/.

An `Entry` names the factors of one public op, such as sizes, dtypes and settings, and the levels
(values) that each factor takes. The whole grid is a covering: every pair of levels of two factors
occurs in at least one case (`covering`). So a hundred cases, not millions, find every fault that
one or two settings cause. A case becomes a `Problem`. Its outputs and gradients are compared with
those of the `definition`, in float64, of the same rounded inputs, within the entry's `bounds`.

Problems with many rows repeat a few of them: rows n and n + period hold the same bits. The oracle
(the definition in float64) computes one period only, so that 4096 x 256000 is cheap. The results of
all other periods must equal the first bit for bit: a row does not depend on its companions, the
other rows of the call.

Numbers are drawn, and the oracle computed, on the CPU, whatever the device. So the problem is the
same everywhere, and the device has no part in judging its own results.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.runtime.dispatch import Implementations, unavailable

EPS = torch.finfo(torch.float32).eps
Case = dict[str, object]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """Bound on an error: |got - want| <= atol + rtol |want|. If `rounded`, `want` is the oracle's
    result rounded to the dtype of `got`."""

    rtol: float = 0.0
    atol: float | Tensor = 0.0
    rounded: bool = False

    def of_rows(self, count: int) -> Bound:
        """Return the bound for the first `count` rows."""
        return (
            replace(self, atol=self.atol[:count])
            if isinstance(self.atol, Tensor) and self.atol.ndim
            else self
        )


@dataclass(frozen=True)
class Problem:
    """Problem: the arguments of one call of an op, and facts about them."""

    x: dict[str, Any]  # tensors (or None) by argument name
    settings: dict[str, Any] = field(default_factory=dict)  # all other arguments
    upstream: Tensors = field(default_factory=dict)  # gradient of each differentiable output
    # bool, broadcastable to x[name]: slots that may hold anything
    hidden: dict[str, Any] = field(default_factory=dict)
    period: int = 0  # rows n and n + period of x and of the outputs are the same; 0: no repetition

    def rows(self, count: int, names: set[str]) -> Problem:
        """Return the problem with only the first `count` rows of the arguments `names` and of every
        upstream gradient."""
        x = {
            name: t[:count] if t is not None and name in names else t for name, t in self.x.items()
        }
        hidden = {name: t[:count] if name in names else t for name, t in self.hidden.items()}
        return replace(
            self,
            x=x,
            upstream={name: t[:count] for name, t in self.upstream.items()},
            hidden=hidden,
            period=0,
        )

    def wide(self, dtype: torch.dtype = torch.float64) -> Problem:
        """Return the problem in float64, or in another dtype."""

        def widen(tensors: dict) -> dict:
            return {
                name: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
                for name, t in tensors.items()
            }

        return replace(
            self, x=widen(self.x), settings=widen(self.settings), upstream=widen(self.upstream)
        )

    def to(self, device: torch.device | str) -> Problem:
        """Return the problem on `device`; itself if it is there already."""
        x, settings, upstream, hidden = (
            moved(part, torch.device(device))
            for part in (self.x, self.settings, self.upstream, self.hidden)
        )
        if all(
            a is b
            for now, was in ((x, self.x), (upstream, self.upstream))
            for a, b in zip(now.values(), was.values(), strict=True)
        ):
            return self
        return replace(self, x=x, settings=settings, upstream=upstream, hidden=hidden)


def moved(value: Any, device: torch.device) -> Any:
    """Move tensors, and tuples, lists and dicts of them, to `device`, with their strides, their
    offset and the memory around them."""
    if isinstance(value, Tensor):
        if value.device.type == device.type and device.index in (None, value.device.index):
            return value
        storage = bytes_of(value).to(device).untyped_storage()
        return torch.empty(0, dtype=value.dtype, device=device).set_(
            storage, value.storage_offset(), value.shape, value.stride()
        )
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [moved(each, device) for each in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def bytes_of(value: Tensor) -> Tensor:
    """Return the whole storage of a tensor as bytes."""
    storage = value.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )


@dataclass(frozen=True, eq=False)
class Entry:
    """Entry of one public op in the catalogue.

    op: name of the op. table: its `Implementations`. levels: factor -> levels; the first level of
    each factor makes the plain case, which is small and ordinary. make: (case as a namespace,
    generator) -> Problem. forward: (x, settings, impl) -> outputs by name. wants: arguments to
    differentiate by; the gradients are of the outputs named in the problem's `upstream`.
    definition: (x, settings) -> the same outputs, from definitions/, which share no code with the
    op. bounds: (problem, want) -> Bound of every output ("d name" for a gradient). triton: levels
    that replace those in `levels` if Triton is interpreted (on a CPU). fits: whether to run a case.
    cost: number of elements that a case touches. timed: for each kind of device, changes to the
    plain case that make it large enough for timing; empty if the op is not timed. work: (bytes,
    flops) that a timed problem needs at least, from its inputs and results; if None, the bytes of
    every input read and every result written once. writes: arguments that the op may write to.
    rows: arguments with a row for each row of the outputs, if rows are independent.
    """

    op: str
    table: Implementations
    levels: dict[str, tuple]
    make: Callable[[SimpleNamespace, torch.Generator], Problem]
    forward: Callable[[dict[str, Any], dict[str, Any], str | None], Tensors]
    definition: Callable[[dict[str, Any], dict[str, Any]], Tensors]
    bounds: Callable[[Problem, Tensors], dict[str, Bound]]
    wants: tuple[str, ...] = ()
    triton: dict[str, tuple] = field(default_factory=dict)
    fits: Callable[[SimpleNamespace], bool] = lambda case: True
    cost: Callable[[SimpleNamespace], int] = lambda case: 1
    writes: tuple[str, ...] = ()
    rows: frozenset[str] = frozenset()
    timed: dict[str, dict] = field(default_factory=dict)
    work: Callable[[Problem, Tensors], tuple[int, int]] | None = None

    def implementations(self, device: torch.device | str = "cpu") -> list[str]:
        """Return the implementations that can run on `device`."""
        kind = torch.device(device).type
        return [
            name
            for name in (self.table.cuda if kind == "cuda" else self.table.cpu)
            if unavailable(name, kind) is None
        ]

    def levels_of(self, impl: str, device: torch.device | str = "cpu") -> dict[str, tuple]:
        """Return the levels of each factor for testing an implementation on a device: `levels`, or
        those in `triton` instead if Triton is interpreted."""
        return self.levels | (self.triton if interpreted(impl, device) else {})

    def plain(self, **changes: object) -> Case:
        """Return the case of every factor's first level, with these changes."""
        return {name: levels[0] for name, levels in self.levels.items()} | changes

    def problem(self, case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
        """Make the problem of a case on `device`; its numbers are drawn on the CPU from `seed`."""
        return self.make(SimpleNamespace(**case), torch.Generator().manual_seed(seed)).to(device)


def interpreted(impl: str, device: torch.device | str) -> bool:
    """Whether the implementation runs in Triton's interpreter on `device`."""
    return impl == "triton" and torch.device(device).type != "cuda"


# ---- cases ---------------------------------------------------------------------------------------
def covering(
    levels: dict[str, tuple],
    fits: Callable[[SimpleNamespace], bool] = lambda case: True,
    seed: int = 0,
) -> list[Case]:
    """Make cases that together contain every pair of levels of two factors, as far as a case that
    `fits` is found. Each case starts from a missing pair. The other levels are drawn at random a
    dozen times, and the draw that adds most missing pairs is taken."""
    chance, names = random.Random(seed), sorted(levels)
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(levels[a]))
        for j in range(len(levels[b]))
    }
    cases = []
    for pair in sorted(missing):
        if pair not in missing:
            continue
        best: tuple[int, dict[str, int]] = (0, {})
        for _ in range(12):
            chosen = {name: chance.randrange(len(levels[name])) for name in names} | dict(pair)
            if fits(SimpleNamespace(**{name: levels[name][i] for name, i in chosen.items()})):
                best = max(
                    best,
                    (len(missing.intersection(combinations(sorted(chosen.items()), 2))), chosen),
                    key=lambda b: b[0],
                )
        if best[0]:
            missing.difference_update(combinations(sorted(best[1].items()), 2))
            cases.append({name: levels[name][i] for name, i in best[1].items()})
    return cases


@functools.cache
def _grid(entry: Entry, small: bool) -> list[Case]:
    return [
        case
        for seed in range(3)
        for case in covering(entry.levels | (entry.triton if small else {}), entry.fits, seed)
    ]


def grid(entry: Entry, impl: str, most: int, device: torch.device | str = "cpu") -> list[Case]:
    """Return the whole grid of an op: the cases of three different coverings, without those of more
    than `most` elements."""
    return [
        case
        for case in _grid(entry, interpreted(impl, device))
        if entry.cost(SimpleNamespace(**case)) <= most
    ]


def sample_of_grid(
    entry: Entry,
    impl: str,
    count: int,
    most: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Case]:
    """Draw up to `count` random cases from the entry's levels, repeatable by `seed`. Each has at
    most `most` elements; at most one is empty."""
    chance = random.Random(f"{entry.op} {impl} {seed}" if seed else f"{entry.op} {impl}")
    levels, cases, empty = entry.levels_of(impl, device), list[Case](), 0
    for _ in range(2000):
        if len(cases) >= count:
            break
        case = {name: chance.choice(of) for name, of in levels.items()}
        cost = entry.cost(SimpleNamespace(**case))
        if entry.fits(SimpleNamespace(**case)) and cost <= most and (cost or not empty):
            empty += not cost
            cases.append(case)
    return cases


def describe(case: Case) -> str:
    """Describe a case in one line, for messages."""
    return ", ".join(f"{name}={str(level).removeprefix('torch.')}" for name, level in case.items())


# ---- a run ---------------------------------------------------------------------------------------
def run(
    entry: Entry, problem: Problem, impl: str | None, forward: Callable | None = None
) -> Tensors:
    """Run an op; return outputs by name and gradients as "d name". Inputs that the op writes to are
    copied first, with their layout."""
    x = {
        name: copy_with_storage(t) if name in entry.writes and t is not None else t
        for name, t in problem.x.items()
    }
    leaves = {
        name: x[name].detach().requires_grad_()
        for name in entry.wants
        if x.get(name) is not None and problem.upstream
    }
    outputs = (forward or entry.forward)(x | leaves, problem.settings, impl)
    return finished(outputs, leaves, problem, materialize=forward is not None)


def oracle(entry: Entry, problem: Problem, dtype: torch.dtype = torch.float64) -> Tensors:
    """Return the definition's outputs and gradients, in float64 or another dtype, on the CPU. If
    the problem repeats rows, return one period of them."""
    problem = problem.to("cpu")
    if problem.period:
        problem = problem.rows(problem.period, set(entry.rows))
    wide = problem.wide(dtype)
    leaves = {
        name: wide.x[name].detach().requires_grad_()
        for name in entry.wants
        if wide.x.get(name) is not None and problem.upstream
    }
    return finished(entry.definition(wide.x | leaves, wide.settings), leaves, wide)


def finished(
    outputs: Tensors, leaves: Tensors, problem: Problem, materialize: bool = False
) -> Tensors:
    """Collect outputs by name, and gradients by `leaves` as "d name"."""
    got = {name: t.detach() for name, t in outputs.items()}
    if leaves:
        names = [
            name for name in problem.upstream if name in outputs and outputs[name].requires_grad
        ]
        grads = torch.autograd.grad(
            [outputs[name] for name in names],
            list(leaves.values()),
            [problem.upstream[name] for name in names],
            materialize_grads=materialize,
        )
        got |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return got


def copy_with_storage(t: Tensor) -> Tensor:
    """Copy a tensor with its strides, its offset and the memory around it."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride()
    )


# ---- the verdict ---------------------------------------------------------------------------------
def excess(got: Tensor, want: Tensor, bound: Bound) -> float:
    """Return the largest error as a multiple of the bound. It is infinite if NaN or infinities do
    not agree between `got` and `want`."""
    if got.shape != want.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, want.to(got.dtype)) else math.inf
    if bound.rounded:
        want = want.to(got.dtype)
    got, want = got.double(), want.double()
    special = ~want.isfinite()
    if not torch.equal(special, ~got.isfinite()) or not torch.equal(
        got[special].nan_to_num(nan=0.5), want[special].nan_to_num(nan=0.5)
    ):
        return math.inf
    allowed = bound.atol + bound.rtol * want.abs()
    error = (got - want).abs()
    return float(
        torch.where(
            special | (error == 0), 0.0, error / torch.as_tensor(allowed, dtype=torch.float64)
        ).max()
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    return a.shape == b.shape and (
        torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    )


def judge(
    entry: Entry,
    problem: Problem,
    got: Tensors,
    want: Tensors,
    exact: bool = True,
    narrow: bool = False,
) -> dict[str, float]:
    """Return error / bound of every output; the case passes if none is above 1.

    Args:
        exact: if a repeated row differs from the first, its error counts as infinite; without
            `exact`, it counts as any other error.
        narrow: matrix products take their operands in the dtype of the inputs, as Triton's do. The
            gradient of the logits is then rounded before its products (the interpreter truncates
            it to bfloat16), so a gradient in a narrow dtype may be off by eps of its largest value.
    """
    problem, got = problem.to("cpu"), {name: t.cpu() for name, t in got.items()}
    bounds = entry.bounds(problem, want)
    for name, bound in bounds.items() if narrow else ():
        if bound.rounded and name.startswith("d ") and want[name].numel():
            bounds[name] = replace(
                bound, atol=bound.atol + torch.finfo(got[name].dtype).eps * want[name].abs().max()
            )
    if missing := set(want) ^ set(got):
        raise AssertionError(f"{entry.op}: outputs {sorted(missing)} on one side only")
    worst = {}
    for name, expected in want.items():
        ours, period = got[name], problem.period
        repeated = bool(period) and ours.ndim > 0 and ours.shape[0] > period
        worst[name] = excess(ours[:period] if repeated else ours, expected, bounds[name])
        for n in range(period, ours.shape[0], period) if repeated else ():
            again = ours[n : n + period]
            if not same_bits(again, ours[: len(again)]):
                worst[name] = (
                    math.inf
                    if exact
                    else max(
                        worst[name],
                        excess(again, expected[: len(again)], bounds[name].of_rows(len(again))),
                    )
                )
    return worst


def rejected(entry: Entry, problem: Problem, got: Tensors) -> set[str]:
    """Return the names of the outputs that are outside their bounds."""
    return {
        name
        for name, value in judge(entry, problem, got, oracle(entry, problem)).items()
        if not value <= 1
    }


@dataclass(frozen=True)
class Verdict:
    """Judgement of one case.

    Attributes:
        worst: error / bound of every output; infinite for an error without a bound, such as NaN in
            place of a number.
        companions: outputs in which equal rows came out with different bits. Not checked for
            torch's own kernels, which treat the ends of a tensor differently.
        moved: outputs whose bits differed in a second run.
        written: inputs that the op wrote to without permission.
    """

    worst: dict[str, float]
    companions: list[str]
    moved: list[str]
    written: list[str]

    def faults(self) -> list[str]:
        """Describe every fault in words; empty if there is none."""
        found = [
            f"{name}: error / bound = {value:.3g}"
            for name, value in self.worst.items()
            if not value <= 1
        ]
        found += [f"{name}: a row's bits depend on its companions" for name in self.companions]
        return (
            found
            + [f"{name}: a second run gave other bits" for name in self.moved]
            + [f"wrote to its input {name}" for name in self.written]
        )


def examine(
    entry: Entry, case: Case, impl: str, device: torch.device | str = "cpu", twice: bool = False
) -> Verdict:
    """Run one case and compare it with the oracle. With `twice`, run it again and compare the
    bits."""
    problem = entry.problem(case, device=device)
    watched = {
        name: t
        for name, t in problem.x.items()
        if t is not None and name not in entry.writes and t.untyped_storage().nbytes() < 64 << 20
    }
    before = {name: t.untyped_storage().clone() for name, t in watched.items()}
    got = run(entry, problem, impl)
    written = [
        name for name, t in watched.items() if bytes_differ(t.untyped_storage(), before[name])
    ]
    again = run(entry, problem, impl) if twice else got
    moved = [name for name in got if not same_bits(got[name], again[name])]
    worst = judge(
        entry,
        problem,
        got,
        oracle(entry, problem),
        exact=False,
        narrow=narrow_products(entry, impl, device),
    )
    companions = (
        []
        if impl == "torch" or not problem.period
        else [name for name, t in got.items() if not repeats(t, problem.period)]
    )
    return Verdict(worst, companions, moved, written)


def repeats(t: Tensor, period: int) -> bool:
    """Whether rows n and n + period of a result have the same bits."""
    return t.ndim == 0 or all(same_bits(part, t[: len(part)]) for part in t.split(period))


def verify(
    entry: Entry, case: Case, impl: str, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Run one case. Raise AssertionError if an output is outside its bounds, rows depend on their
    companions, or an input was written to. Return error / bound of each output."""
    verdict = examine(entry, case, impl, device)
    if faults := verdict.faults():
        raise AssertionError(f"{entry.op} [{impl}] {describe(case)}: {'; '.join(faults)}")
    return verdict.worst


def narrow_products(entry: Entry, impl: str, device: torch.device | str) -> bool:
    """Whether an implementation's matrix products take their operands in the dtype of the inputs,
    as those of heads do in Triton, and on a GPU in any implementation."""
    return entry.op.startswith("linear_") and (
        impl == "triton" or torch.device(device).type == "cuda"
    )


def bytes_differ(a: torch.UntypedStorage, b: torch.UntypedStorage) -> bool:
    """Whether two storages of the same size hold different bytes."""
    return not torch.equal(
        *(
            torch.empty(0, dtype=torch.uint8, device=s.device).set_(s, 0, (s.nbytes(),), (1,))
            for s in (a, b)
        )
    )
