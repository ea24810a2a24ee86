"""The paged KV cache: its size and its tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrl.engine.base.errors import SetupError, ran_out
from fusedrl.engine.base.memory import advise_huge_pages
from fusedrl.engine.model.step import DecoderWeights, allocate_cache

_FRACTION = {"cuda": 0.5, "cpu": 0.25}  # of the free device memory, of the host's memory


@dataclass(frozen=True)
class CacheConfig:
    """Size of the KV cache and of the steps that use it.

    At most one of num_blocks (blocks that sequences can hold), memory_bytes and memory_fraction (of
    the memory free on a CUDA device, of the host's memory on CPU) is given. By default the cache
    holds max_sequences sequences of the model's full length, within half of the free device memory
    or a quarter of the host's. On CPU, memory that is never written costs nothing. Stages that
    train on a GPU first set aside the memory that training needs (`plan.cache_for`).

    Attributes:
        block_size: tokens in a block.
        max_sequences: sequences that run at once.
        max_tokens_per_step: tokens of one step, decoded and prefilled together.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    memory_fraction: float | None = None
    max_sequences: int = 256
    max_tokens_per_step: int = 2048

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "num_blocks",
            "memory_bytes",
            "max_sequences",
            "max_tokens_per_step",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"CacheConfig: expected {name} >= 1, got {value}")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"CacheConfig: expected memory_fraction in (0, 1], got {self.memory_fraction}"
            )
        given = [
            name
            for name in ("num_blocks", "memory_bytes", "memory_fraction")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(
                f"CacheConfig: {' and '.join(given)} each set the size of the cache; give one of "
                "them"
            )
        if self.max_tokens_per_step < self.max_sequences:
            raise ValueError(
                "CacheConfig: expected max_tokens_per_step >= max_sequences, got "
                f"{self.max_tokens_per_step} < {self.max_sequences}: "
                "every running sequence decodes a token in every step"
            )


def block_bytes(weights: DecoderWeights, block_size: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of one block: keys and values of `block_size` tokens in all layers, in
    `dtype` (by default the weights' dtype)."""
    return (
        2
        * len(weights.layers)
        * weights.num_kv_heads
        * weights.head_dim
        * block_size
        * (dtype or weights.embedding.dtype).itemsize
    )


def blocks_for(config: CacheConfig, sequences: int, tokens: int) -> int:
    """Return the number of blocks for `sequences` sequences of `tokens` tokens each, of which at
    most max_sequences run at once."""
    return min(sequences, config.max_sequences) * -(-tokens // config.block_size)


def resolve_num_blocks(
    config: CacheConfig,
    weights: DecoderWeights,
    max_positions: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Return the number of blocks that sequences can hold under `config`; `dtype` as for
    `block_bytes`.

    Raises:
        ValueError: the memory granted does not hold a single block; the message gives both sizes.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    size, device = block_bytes(weights, config.block_size, dtype), weights.embedding.device
    if config.memory_bytes is not None:
        memory = config.memory_bytes
    elif device.type == "cuda":
        memory = int(
            torch.cuda.mem_get_info(device)[0] * (config.memory_fraction or _FRACTION["cuda"])
        )
    else:
        memory = int(
            os.sysconf("SC_PAGE_SIZE")
            * os.sysconf("SC_PHYS_PAGES")
            * (config.memory_fraction or _FRACTION["cpu"])
        )
    if memory < 2 * size:  # one more than sequences can hold: the null block
        raise ValueError(
            f"CacheConfig: {memory} bytes of cache hold no sequence: a block of "
            f"{config.block_size} tokens takes {size} bytes, and one is "
            "the null block; grant more memory or choose a smaller block_size"
        )
    fits = memory // size - 1
    if config.memory_bytes is None and config.memory_fraction is None:
        fits = min(fits, blocks_for(config, config.max_sequences, max_positions))
    return fits


class KVCache:
    """Tensors of the cache: k [L, blocks, Hkv, D, block_size] and v [L, blocks, Hkv, block_size,
    D], both of `dtype` (by default the weights'). Block 0 is the null block: it pads block tables
    and holds no sequence.

    Raises:
        SetupError: the device has no room for it.
    """

    def __init__(
        self,
        config: CacheConfig,
        weights: DecoderWeights,
        max_positions: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.block_size = config.block_size
        self.num_blocks = resolve_num_blocks(config, weights, max_positions, dtype) + 1
        self.k: Tensor
        self.v: Tensor
        try:
            self.k, self.v = allocate_cache(
                weights, self.num_blocks, config.block_size, dtype=dtype
            )
        except Exception as error:
            if not ran_out(error):
                raise
            size = self.num_blocks * block_bytes(weights, config.block_size, dtype)
            raise SetupError(
                f"out of memory: no room for a KV cache of {size / 2**30:.2f} GiB beside what is "
                "there; grant it less (CacheConfig: memory_bytes, memory_fraction, num_blocks or "
                "max_sequences)"
            ) from error
        for pool in (self.k, self.v):
            advise_huge_pages(pool)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.k.nbytes + self.v.nbytes
