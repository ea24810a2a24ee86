"""rms_norm with a residual: ours, eager, torch.compile and, on a GPU, Liger."""

from __future__ import annotations

import torch
from bench.harness import Random, implementations, liger
from bench.layers import SIZES, layer_cases, layer_contest
from torch import Tensor

from fusedrl.kernels import rms_norm as module
from fusedrl.kernels.rms_norm import rms_norm

EPS = 1e-5


def eager(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Compute it as transformers does."""
    total = x + residual
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(
        x.dtype
    ), total


@layer_cases
def bench_rms_norm(contest, size, dtype, direction):
    N, H, *_ = SIZES[size]
    random = Random()
    leaves = [
        random.normal(N, H, dtype=dtype),
        random.normal(H, dtype=dtype),
        random.normal(N, H, dtype=dtype),
    ]
    ours = {
        name: lambda x, w, r, impl=impl: rms_norm(x, w, eps=EPS, residual=r, impl=impl)
        for name, impl in implementations(module, "rms_norm", reference=False).items()
    }
    peer = liger("ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction")
    # Forward: two reads and two writes (the norm and the sum). Backward: both gradients and the sum
    # in, one gradient out, which is that of both addends.
    moved = 4 * N * H * dtype.itemsize
    layer_contest(
        contest,
        "rms_norm + residual",
        f"{N} x {H}",
        direction,
        ours,
        eager,
        leaves,
        (),
        moved,
        moved,
        {} if peer is None else {"Liger": lambda x, w, r: peer.apply(x, r, w, EPS)},
    )
