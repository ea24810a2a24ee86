"""paged_attention of one decoded token per sequence over its cached context, compared with torch,
which gathers the blocks for scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad, on
from bench.paged import cache, scattered
from torch import Tensor

module = pytest.importorskip("fusedrl.kernels.paged_attention")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def eager(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor
) -> tuple[Tensor]:
    (B, M), (_, Hkv, D, S) = block_table.shape, k_cache.shape
    keys = k_cache[block_table].permute(0, 2, 1, 4, 3).reshape(B, Hkv, M * S, D)
    values = v_cache[block_table].permute(0, 2, 1, 3, 4).reshape(B, Hkv, M * S, D)
    seen = torch.arange(M * S, device=q.device) < context_lens[:, None]
    return (
        F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=True
        )[:, :, 0],
    )


@pytest.mark.parametrize(
    "B, context, heads, S",
    on(
        cpu=[(64, 256, (8, 4, 8), 16), (16, 1024, (8, 2, 64), 16)],
        cuda=[
            (64, 1024, (32, 8, 128), 16),
            (64, 1024, (32, 8, 128), 64),
            (8, 16384, (32, 8, 128), 16),
        ],
    ),
    ids=str,
)
def bench_paged_attention(contest, B, context, heads, S):
    Hq, Hkv, D = heads
    random, M = Random(), context // S
    q, (k_cache, v_cache) = (
        random.normal(B, Hq, D, dtype=DTYPE),
        cache(random, B * M, Hkv, D, S, DTYPE),
    )
    block_table = scattered(random, B * M).view(B, M).int()
    context_lens = random.integers(context // 2, context + 1, B).int()
    contestants = {
        name: lambda *a, impl=impl: (module.paged_attention(*a, impl=impl),)
        for name, impl in implementations(module, "paged_attention").items()
    }
    contestants |= {"eager": eager, "torch.compile": compiled(eager)}
    # Keys and values of every position in its context, q and the output. Two products of 2 Hq D a
    # position.
    seen = int(context_lens.sum())
    tolerance = 1e-4 if torch.float32 == DTYPE else 2e-2
    contest(
        "paged_attention",
        f"{B} x <={context}, {Hq}/{Hkv} x {D}, blocks of {S}",
        DTYPE,
        {
            name: no_grad(f, q, k_cache, v_cache, block_table, context_lens)
            for name, f in contestants.items()
        },
        bytes_moved=(2 * seen * Hkv * D + 2 * B * Hq * D) * DTYPE.itemsize,
        flops=4 * seen * Hq * D,
        same=agree(rtol=tolerance, of_max=tolerance),
    )
