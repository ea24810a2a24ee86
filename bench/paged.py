"""A paged cache for the benches that read or write one: K transposed inside a block, [blocks, Hkv,
D, S]; V [blocks, Hkv, S, D]."""

from __future__ import annotations

import torch
from bench.harness import DEVICE, Random
from torch import Tensor


def cache(
    random: Random, blocks: int, Hkv: int, D: int, S: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return random.normal(blocks, Hkv, D, S, dtype=dtype), random.normal(
        blocks, Hkv, S, D, dtype=dtype
    )


def scattered(random: Random, blocks: int) -> Tensor:
    """All blocks in a random order, as a pool that was used for a while hands them out."""
    return torch.randperm(blocks, generator=random.generator, device=DEVICE)
