"""paged_prefill of prompts' last tokens over their cached context, compared with torch, which
gathers the blocks of each row for scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad, on
from bench.paged import cache, scattered
from torch import Tensor

module = pytest.importorskip("fusedrl.kernels.paged_prefill")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def eager(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    context_lens: Tensor,
) -> tuple[Tensor]:
    (B, M), (_, Hkv, D, S), Hq = block_table.shape, k_cache.shape, q.shape[1]
    keys = k_cache[block_table].permute(0, 2, 1, 4, 3).reshape(B, Hkv, M * S, D)
    values = v_cache[block_table].permute(0, 2, 1, 3, 4).reshape(B, Hkv, M * S, D)
    seen = torch.arange(M * S, device=q.device) < context_lens.view(B, 1, -1, 1)
    out = F.scaled_dot_product_attention(
        q.view(B, -1, Hq, D).transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True
    )
    return (out.transpose(1, 2).reshape(q.shape),)


@pytest.mark.parametrize(
    "B, context, fresh, heads, S",
    on(
        cpu=[(2, 256, 128, (8, 4, 8), 16), (1, 512, 512, (9, 3, 64), 16)],
        cuda=[
            (8, 1024, 1024, (32, 8, 128), 16),
            (2, 4096, 4096, (14, 2, 64), 16),
            (1, 16384, 1024, (32, 8, 128), 16),
        ],
    ),
    ids=str,
)
def bench_paged_prefill(contest, B, context, fresh, heads, S):
    Hq, Hkv, D = heads
    random, M = Random(), context // S
    q = random.normal(B * fresh, Hq, D, dtype=DTYPE)
    k_cache, v_cache = cache(random, B * M, Hkv, D, S, DTYPE)
    block_table = scattered(random, B * M).view(B, M).int()
    rows = torch.arange(B, device=DEVICE).repeat_interleave(fresh)
    context_lens = torch.arange(context - fresh + 1, context + 1, device=DEVICE).repeat(B)
    contestants = {
        name: lambda *a, impl=impl: (module.paged_prefill(*a, impl=impl),)
        for name, impl in implementations(module, "paged_prefill").items()
    }
    contestants |= {"eager": eager, "torch.compile": compiled(eager)}
    # q and the output, and K and V of every context once. Two products of 2 Hq D a position.
    seen = int(context_lens.sum())
    tolerance = 1e-4 if torch.float32 == DTYPE else 2e-2
    contest(
        "paged_prefill",
        f"{B} x {fresh} of {context}, {Hq}/{Hkv} x {D}, blocks of {S}",
        DTYPE,
        {
            name: no_grad(f, q, k_cache, v_cache, block_table, rows, context_lens)
            for name, f in contestants.items()
        },
        bytes_moved=2 * (B * context * Hkv * D + q.numel()) * DTYPE.itemsize,
        flops=4 * seen * Hq * D,
        same=agree(rtol=tolerance, of_max=tolerance),
    )
