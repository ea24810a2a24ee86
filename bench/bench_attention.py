"""varlen_attention, forward and backward, on packed sequences, compared with
scaled_dot_product_attention on the same sequences padded to the longest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.harness import DEVICE, Random, agree, implementations, on
from torch import Tensor

from fusedrl.kernels import attention as module
from fusedrl.kernels.attention import varlen_attention


def some_lengths(sequences: int, low: int, high: int) -> list[int]:
    return torch.randint(
        low, high, (sequences,), generator=torch.Generator().manual_seed(0)
    ).tolist()


LENGTHS = {
    "ragged": some_lengths(20, 100, 300),
    "one long": [2048],
    "ragged, long": some_lengths(16, 512, 4097),
    "equal, long": [2048] * 8,
}
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Right padding needs no mask under a causal rule."""
    q_BHTD, k_BHTD, v_BHTD = (
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    )
    out = F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


@pytest.mark.parametrize(
    "heads, sequences",
    on(
        cpu=[((8, 4, 8), "ragged"), ((8, 2, 64), "ragged"), ((4, 4, 64), "one long")],
        cuda=[((32, 8, 128), "ragged, long"), ((32, 8, 128), "equal, long")],
    ),
    ids=str,
)
def bench_varlen_attention(contest, heads, sequences):
    lengths = LENGTHS[sequences]
    Hq, Hkv, D = heads
    N, cu_seqlens, random = (
        sum(lengths),
        torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
        Random(),
    )
    q, k, v = (random.normal(N, h, D, dtype=DTYPE).requires_grad_() for h in (Hq, Hkv, Hkv))
    upstream = random.normal(N, Hq, D, dtype=DTYPE)

    def both_ways(out: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)

    contestants = {
        name: lambda impl=impl: both_ways(
            varlen_attention(q, k, v, cu_seqlens, max_length=max(lengths), impl=impl)
        )
        for name, impl in implementations(module, "varlen_attention").items()
    }
    # Multiply-adds of the causal half: two products forward, five backward.
    flops = 7 * 2 * Hq * D * sum(n * (n + 1) // 2 for n in lengths)
    tolerance = 1e-4 if torch.float32 == DTYPE else 2e-2
    contest(
        "varlen_attention, both ways",
        f"{len(lengths)} x <={max(lengths)}, {Hq}/{Hkv} x {D}",
        DTYPE,
        {**contestants, "scaled_dot_product, padded": lambda: both_ways(padded(q, k, v, lengths))},
        flops=flops,
        same=agree(rtol=tolerance, of_max=tolerance),
    )
