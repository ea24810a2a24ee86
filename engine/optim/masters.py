"""Low-precision parameters beside their float32 masters: where the two are no longer the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_FEW, _MANY = 1 << 18, 1 << 24  # elements that are rounded at a time on a CPU, on a GPU

Pair = tuple[Tensor, Tensor]  # a parameter and its master, or the same part of both


def differing_parts(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """Yield those parts of (parameter, master) in which the parameter is not the rounded master.
    Waits for a GPU once."""
    parts = [
        part for narrow, wide in pairs for part in zip(_parts(narrow), _parts(wide), strict=True)
    ]
    if not parts or parts[0][0].device.type == "cpu":
        yield from (part for part in parts if not torch.equal(*_both(part)))
        return
    differ = torch.stack([torch.ne(*_both(part)).any() for part in parts]).tolist()
    yield from (part for part, other in zip(parts, differ, strict=True) if other)


def _both(part: Pair) -> Pair:
    """Return the bits of the rounded master and of the parameter."""
    narrow, wide = part
    return _bits(wide.to(narrow.dtype)), _bits(narrow)


def _parts(p: Tensor) -> Sequence[Tensor]:
    """Return the tensor in parts; on a CPU, so small that their copies stay in the cache."""
    most = _FEW if p.device.type == "cpu" else _MANY
    return p.split(max(1, most * len(p) // p.numel())) if p.numel() > most else (p,)


def _bits(p: Tensor) -> Tensor:
    """View a 16-bit tensor as integers, of 64 bits if possible: they are compared several times
    faster than bfloat16."""
    whole = p.is_contiguous() and p.numel() % 4 == 0 and p.storage_offset() % 4 == 0
    return p.view(-1).view(torch.int64) if whole else p.view(torch.int16)
