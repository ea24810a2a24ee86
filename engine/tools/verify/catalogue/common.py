"""Helpers that the catalogue's entries share: numbers, layouts, masks, and bounds made from the
error of rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrl.engine.tools.verify.grid import Bound, Entry, Problem, Tensors, oracle

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOATS = (F32, BF16, F16)
PERIOD = 11  # rows that differ; odd, so that no tile holds whole periods


def floats(generator: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Draw normal numbers in float32 and round them to the dtype."""
    return torch.randn(shape, generator=generator).to(dtype)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers in [0, 1)."""
    return torch.rand(shape, generator=generator)


def repeat(t: Tensor, N: int) -> Tensor:
    """Repeat the rows of t [period, ...] in order until there are N rows."""
    return t[:N].clone() if t.shape[0] >= N else t[torch.arange(N) % t.shape[0]]


# ---- layouts: NaN around what is handed over -----------------------------------------------------
def laid_out(t: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout. The memory around them is NaN, so that
    reading or writing it by mistake is found."""
    if layout == "plain":
        return t
    if layout == "padded":  # of the last dimension
        wide = t.new_full(
            (*t.shape[:-1], t.shape[-1] + 5), math.nan if t.is_floating_point() else True
        )
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if layout == "misaligned":
        flat = t.new_full((t.numel() + 1,), math.nan if t.is_floating_point() else True)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)
    if layout == "transposed":  # of two dimensions
        return t.t().contiguous().t()
    if layout == "expanded":  # one row for all
        return t[:1].expand(t.shape) if t.shape[0] else t
    raise ValueError(layout)


# ---- masks and bounds ----------------------------------------------------------------------------
def token_mask(kind: str, lengths: list[int], generator: torch.Generator) -> Tensor:
    """Make a mask over the tokens of all sequences, one after another."""
    parts = []
    for length in lengths:
        part = torch.zeros(length, dtype=torch.bool)
        part[
            {
                "all": slice(None),
                "none": slice(0),
                "first": slice(1),
                "last": slice(-1, None),
                "random": slice(None),
            }[kind]
        ] = True
        parts.append(part & (uniform(generator, length) < 0.6) if kind == "random" else part)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def no_worse(
    problem: Problem,
    want: Tensors,
    peer: Tensors,
    floor: float = 0.0,
    roundings: float = 1.0,
    factor: float = 1.0,
) -> dict[str, Bound]:
    """Make bounds from the error of rounding: `factor` times the largest error of `peer`, plus a
    few roundings of the largest value."""
    bounds = {}
    for name, expected in want.items():
        if expected.numel() == 0:
            bounds[name] = Bound()
            continue
        dtype = peer[name].dtype
        theirs, largest = (
            float((peer[name].double() - expected).abs().nan_to_num().max()),
            float(expected.abs().nan_to_num().max()),
        )
        bounds[name] = Bound(
            0.0,
            factor * theirs
            + (4 if dtype == F32 else roundings) * torch.finfo(dtype).eps * max(floor, largest),
        )
    return bounds


def peer_of(entry: Entry, problem: Problem, dtype: torch.dtype | dict[str, torch.dtype]) -> Tensors:
    """Compute the definition in float32, and round each result once to `dtype` (one dtype, or one
    for each name)."""
    got = oracle(entry, problem, torch.float32)
    return {
        name: t.to(dtype[name] if isinstance(dtype, dict) else dtype) for name, t in got.items()
    }
