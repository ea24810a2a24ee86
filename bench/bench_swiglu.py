"""swiglu of the fused gate and up projections: ours, eager, torch.compile and, on a GPU, Liger."""

from __future__ import annotations

import torch.nn.functional as F
from bench.harness import Random, implementations, liger
from bench.layers import SIZES, layer_cases, layer_contest
from torch import Tensor

from fusedrl.kernels import swiglu as module
from fusedrl.kernels.swiglu import swiglu


def eager(gate_up: Tensor) -> tuple[Tensor]:
    """Compute it as transformers does."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


@layer_cases
def bench_swiglu(contest, size, dtype, direction):
    N, width = SIZES[size].N, SIZES[size].F
    ours = {
        name: lambda x, impl=impl: (swiglu(x, impl=impl),)
        for name, impl in implementations(module, "swiglu", reference=False).items()
    }
    peer = liger("ops.swiglu.LigerSiLUMulFunction")
    # Forward: gate and up in, their product out. Backward: its gradient, gate and up in, two
    # gradients out.
    moved = N * width * dtype.itemsize
    layer_contest(
        contest,
        "swiglu",
        f"{N} x {width}",
        direction,
        ours,
        eager,
        [Random().normal(N, 2 * width, dtype=dtype)],
        (),
        3 * moved,
        5 * moved,
        {} if peer is None else {"Liger": lambda x: (peer.apply(*x.chunk(2, dim=-1)),)},
    )
