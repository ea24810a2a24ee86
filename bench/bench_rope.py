"""rope of the queries and keys in the fused projection's output: ours, eager and torch.compile."""

from __future__ import annotations

import torch
from bench.harness import Random, implementations
from bench.layers import SIZES, layer_cases, layer_contest
from torch import Tensor

from fusedrl.kernels import rope as module
from fusedrl.kernels.rope import rope

Heads = tuple[int, int, int]


def eager(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Compute it as transformers does."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * both_cos + torch.cat([-second, first], dim=-1) * both_sin

    both_cos, both_sin = (torch.cat([t, t], dim=-1).to(qkv.dtype)[:, None] for t in (cos, sin))
    q, k, _ = qkv.split(heads, dim=1)
    return rotate(q), rotate(k)


@layer_cases
def bench_rope(contest, size, dtype, direction):
    N, _, _, Hq, Hkv, D = SIZES[size]

    def ours(impl: str):
        def call(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
            q, k, _ = qkv.split(heads, dim=1)
            return rope(q, k, cos, sin, impl=impl)

        return call

    contestants = {
        name: ours(impl) for name, impl in implementations(module, "rope", reference=False).items()
    }
    random = Random()
    leaves, angles = (
        [random.normal(N, Hq + 2 * Hkv, D, dtype=dtype)],
        100 * random.uniform(N, D // 2),
    )
    # A read and a write of q and k each way. What puts their gradients back into one [N, Hq + 2
    # Hkv, D] is timed and not counted.
    moved = 2 * N * (Hq + Hkv) * D * dtype.itemsize
    layer_contest(
        contest,
        "rope",
        f"{N} x {Hq}/{Hkv} x {D}",
        direction,
        contestants,
        eager,
        leaves,
        (angles.cos(), angles.sin(), (Hq, Hkv, Hkv)),
        moved,
        moved,
    )
