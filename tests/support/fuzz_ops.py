"""A fuzzer of the C++ kernels: what ops are given is bent in one to three places, and the call has
to return or to raise. It never asks whether a result is right; the grid does.

    python -m tests.support.fuzz_ops --minutes 10 --seed 0      # best under `make sanitize`
    python -m tests.support.fuzz_ops --seed 0 --only 4711       # one call again

Calls start from cases of the catalogue, and from decoding steps of models of several families.
Bent are shapes, strides, offsets, dtypes, token ids and indices, values, settings, and whether an
argument is there. The number of a call is written to the file `--note` before it is made, so that a
process that dies says which call it was: call k of a seed is the same in every process.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.model import step as steps
from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import finished, sample_of_grid

# What a call may raise. Anything else (SystemError, a bare Exception) is told of.
ALLOWED = (ValueError, TypeError, IndexError, RuntimeError, AttributeError, NotImplementedError)
ALLOWED += (OverflowError, KeyError)
MOST = 1 << 14  # elements of a case
BYTES = 1 << 28  # of a result that bent arguments may ask for
NUMBERS = (0, 1, -1, 2, 7, 63, 64, 65, 2**31 - 1, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 1e300)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64)
DTYPES += (torch.bool, torch.uint8, torch.complex64)
NATIVE = sorted(op for op, entry in CATALOGUE.items() if "cpp" in entry.table.cpu)
Call = tuple[str, Callable[[dict[str, Any]], Any], dict[str, Any]]


# ---- what is bent --------------------------------------------------------------------------------
def other_shape(t: Tensor, chance: random.Random) -> Tensor:
    """Return the tensor with another size, order or number of dimensions."""
    if t.ndim == 0:
        return t[None] if chance.random() < 0.5 else t.expand(3)
    dim, way = chance.randrange(t.ndim), chance.randrange(8)
    size = t.shape[dim]
    if way == 0:
        return t.narrow(dim, 0, max(0, size - 1))
    if way == 1:
        return t.narrow(dim, 0, 0)
    if way == 2:
        return torch.cat([t, t.narrow(dim, 0, min(1, size))], dim)
    if way == 3:
        return t.unsqueeze(dim)
    if way == 4:
        return t.transpose(dim, chance.randrange(t.ndim))
    if way == 5:
        return t.flatten()
    if way == 6 and size:
        return t.select(dim, size - 1)
    return t.narrow(dim, size // 2, size - size // 2)


def other_strides(t: Tensor, chance: random.Random) -> Tensor:
    """Return the same values (or some of them, repeated) laid out otherwise."""
    if t.ndim == 0:
        return t
    way = chance.randrange(4)
    if way == 0:  # rows further apart, from an odd offset
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
        place = wide[..., 1 : 1 + t.shape[-1]]
        return place.copy_(t)
    if way == 1:  # columns apart
        return torch.stack([t, t], -1)[..., 0]
    if way == 2 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def other_values(t: Tensor, chance: random.Random) -> Tensor:
    """Return a copy with one, some or all elements set to something odd."""
    t = t.clone(memory_format=torch.contiguous_format)
    if not t.numel() or t.dtype == torch.bool:
        return ~t if t.dtype == torch.bool else t
    if t.is_complex():
        return t
    value: Any = chance.choice(REALS if t.is_floating_point() else NUMBERS)
    if not t.is_floating_point():
        info = torch.iinfo(t.dtype)
        value = min(max(value, info.min), info.max)
        if chance.random() < 0.5:  # beside what is allowed
            value = int(t.max()) + chance.choice((1, 2, -1)) if int(t.max()) < info.max - 2 else 0
    elif t.dtype != torch.float64 and abs(value) > torch.finfo(t.dtype).max:
        value = math.copysign(math.inf, value)
    flat, way = t.view(-1), chance.randrange(3)
    if way == 0:
        flat[chance.randrange(t.numel())] = value
    elif way == 1:
        flat[:: chance.choice((2, 3))] = value
    else:
        flat.fill_(value)
    return t


def bent(value: Any, chance: random.Random) -> Any:
    """Return something else in an argument's place."""
    if isinstance(value, Tensor):
        way = chance.randrange(10)
        if way < 3:
            return other_shape(value, chance)
        if way < 5:
            return other_strides(value, chance)
        if way < 8:
            return other_values(value, chance)
        if way == 8:
            return value.to(chance.choice(DTYPES))
        return None if chance.random() < 0.7 else torch.tensor(0.0)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice(NUMBERS)
    if isinstance(value, float):
        return chance.choice(REALS)
    if isinstance(value, str):
        return chance.choice(("", "sum", "x" * 100))
    if isinstance(value, list) and value:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:at]
        return [bent(one, chance) if k == at else one for k, one in enumerate(value)]
    return chance.choice((None, 0, -1, 1.0, math.nan))


# ---- what is called ------------------------------------------------------------------------------
def catalogue_call(op: str, chance: random.Random) -> Call | None:
    """Return a call of an op in C++, of a small case of the catalogue; None if it has none."""
    entry = CATALOGUE[op]
    drawn = sample_of_grid(entry, "cpp", 1, MOST, seed=chance.randrange(1, 10**9))
    if not drawn:
        return None
    problem = entry.problem(drawn[0], seed=chance.randrange(10**9))
    x = {
        name: t.clone() if name in entry.writes and t is not None else t
        for name, t in problem.x.items()
    }

    def call(given: dict[str, Any]) -> Any:
        x = {name: given[name] for name in problem.x}
        s = {name: given[name] for name in problem.settings}
        floats = {
            name: x[name].detach().requires_grad_()
            for name in entry.wants
            if isinstance(x.get(name), Tensor) and x[name].is_floating_point() and problem.upstream
        }
        outputs = entry.forward(x | floats, s, "cpp")
        if not floats:
            return outputs
        # gradients as the case has them, or of shapes that the bent call has now
        upstream = {
            name: problem.upstream[name]
            if problem.upstream[name].shape == t.shape
            else torch.ones_like(t)
            for name, t in outputs.items()
            if name in problem.upstream
        }
        moved = type(problem)(x, s, upstream)
        return finished(outputs, floats, moved, materialize=True)

    return op, call, x | problem.settings


def recorded_steps() -> list[dict[str, Any]]:
    """Return the arguments of decoding steps of small models, of several kinds and dtypes, with an
    adapter and without."""
    from tests.kernels import test_decode_step as of

    native, found = steps.native_step.decode_step, []
    names = tuple(inspect.signature(native).parameters)

    def note(*given: Any) -> None:
        found.append(dict(zip(names, given, strict=True)))

    steps.native_step.decode_step = note  # type: ignore[assignment]
    try:
        for kind in of.KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                kinds = [of.make("cpu", kind, dtype), of.adapted("cpu", kind, "parts", dtype)]
                for weights in kinds:
                    k, v = steps.allocate_cache(weights, 6, 4)
                    table = torch.tensor([[4, 1, 0], [2, 5, 3]], dtype=torch.int32)
                    ids, at = torch.tensor([3, 36, 0, 7, 1]), torch.tensor([0, 1, 2, 0, 9])
                    rows = torch.tensor([0, 0, 0, 1, 1])
                    out = torch.tensor([2, 4]) if dtype == torch.float32 else None
                    cache = (k.zero_(), v.zero_())
                    steps.decode_step(weights, ids, at, rows, table, *cache, out, impl="cpp")
    finally:
        steps.native_step.decode_step = native
    return found


def step_call(chance: random.Random, recorded: list[dict[str, Any]]) -> Call:
    """Return a call of the decoding step, of one that a model took."""
    given = dict(chance.choice(recorded))
    for cache in ("k_cache", "v_cache"):
        given[cache] = given[cache].clone()
    return "decode_step", lambda x: steps.native_step.decode_step(**x), given


def huge(given: dict[str, Any]) -> bool:
    """Whether the bent arguments ask, by expanded sizes or numbers, for more memory than there
    is: an honest failure that a sanitizer ends the process for."""
    return any(
        isinstance(value, int) and not isinstance(value, bool) and abs(value) > BYTES
        for name, value in given.items()
        if name in ("kept_capacity", "capacity", "chunk_size", "num_samples", "group_size")
    )


def attempt(number: int, seed: int, recorded: list[dict[str, Any]]) -> str:
    """Make one call. Return its op and what came of it."""
    chance = random.Random(f"{seed} {number}")
    torch.manual_seed(number)
    op = chance.choice([*NATIVE, *(["decode_step"] * 3 if recorded else [])])
    made = step_call(chance, recorded) if op == "decode_step" else catalogue_call(op, chance)
    if made is None:
        return f"{op}: no case"
    _, call, given = made
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        name = chance.choice(sorted(given))
        try:
            given[name] = bent(given[name], chance)
        except ALLOWED:  # torch cannot bend it so
            continue
    if huge(given):
        return f"{op}: too much memory"
    try:
        call(given)
    except ALLOWED as error:
        return f"{op}: {type(error).__name__}"
    return f"{op}: returned"


def fuzz(
    seed: int, first: int, calls: int, minutes: float, note: Path | None
) -> collections.Counter:
    """Make calls until `calls` are made or the time is up. Return how often each thing came."""
    recorded, found = recorded_steps(), collections.Counter[str]()
    began = time.monotonic()
    for number in range(first, first + calls):
        if time.monotonic() - began > 60 * minutes:
            break
        if note is not None:
            note.write_text(f"--seed {seed} --only {number}\n")
        found[attempt(number, seed, recorded)] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--calls", type=int, default=10**9)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--note", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    first, calls = (options.first, options.calls) if options.only is None else (options.only, 1)
    found = fuzz(options.seed, first, calls, options.minutes, options.note)
    for what, count in sorted(found.items()):
        print(f"{count:8} {what}")
    print(f"{found.total():8} calls of seed {options.seed}: all returned or raised what is allowed")


if __name__ == "__main__":
    main()
