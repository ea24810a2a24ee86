"""rms_norm, swiglu and rope: ours, eager and torch.compile, forward and forward + backward, with bytes and percent of the copy ceiling.

    python -m bench.bench_layers [--rounds N] [--cases tiny,large]
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench.harness import Row, contest, copy_bandwidth, one_thread, report
from torch import Tensor

from fusedrl.kernels.rms_norm import rms_norm
from fusedrl.kernels.rope import rope
from fusedrl.kernels.swiglu import swiglu

EPS = 1e-5


# As transformers writes them.
def eager_rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype), total


def eager_swiglu(gate_up: Tensor) -> tuple[Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up,)


def eager_rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * both_cos + torch.cat([-second, first], dim=-1) * both_sin

    both_cos, both_sin = (torch.cat([t, t], dim=-1).to(qkv.dtype)[:, None] for t in (cos, sin))
    q, k, _ = qkv.split(heads, dim=1)
    return rotate(q), rotate(k)


def close(ours: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for a, b in zip(ours, other, strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def both_ways(name: str, size: str, ours: Callable, eager: Callable, leaves: Sequence[Tensor], rest: tuple[Any, ...], forward_bytes: int, backward_bytes: int,
              ceiling: float, rounds: int) -> list[Row]:
    compiled = torch.compile(eager)
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype) for y in eager(*leaves, *rest)]

    def scored(function: Callable) -> Callable:
        def call() -> Sequence[Tensor]:
            with torch.no_grad():
                return function(*leaves, *rest)
        return call

    def trained(function: Callable) -> Callable:
        return lambda: torch.autograd.grad(function(*leaves, *rest), leaves, upstream)

    kind, functions = str(leaves[0].dtype).removeprefix("torch."), {"fusedrl": ours, "eager": eager, "torch.compile": compiled}
    rows = contest(f"{name}, forward", size, kind, {who: scored(f) for who, f in functions.items()}, bytes_moved=forward_bytes, ceiling=ceiling, rounds=rounds,
                   same=close)
    return rows + contest(f"{name}, forward+backward", size, kind, {who: trained(f) for who, f in functions.items()},
                          bytes_moved=forward_bytes + backward_bytes, ceiling=ceiling, rounds=rounds, same=close)


def layers(N: int, H: int, F_: int, heads: tuple[int, int, int], D: int, dtype: torch.dtype, ceiling: float, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    s, (Hq, Hkv, _) = dtype.itemsize, heads
    # Forward: two reads and two writes (the norm and the sum). Backward: both gradients and the sum in, one gradient out, which is that of both addends.
    rows = both_ways("rms_norm + residual", f"{N} x {H}", lambda x, w, r: rms_norm(x, w, eps=EPS, residual=r), eager_rms_norm,
                     [leaf(N, H), leaf(H), leaf(N, H)], (), 4 * N * H * s, 4 * N * H * s, ceiling, rounds)
    rows += both_ways("swiglu", f"{N} x {F_}", lambda gate_up: (swiglu(gate_up),), eager_swiglu, [leaf(N, 2 * F_)], (), 3 * N * F_ * s, 5 * N * F_ * s, ceiling,
                      rounds)

    def ours(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.split(heads, dim=1)
        return rope(q, k, cos, sin)

    # A read and a write of q and k each way. What puts their gradients back into one [N, Hq + 2 Hkv, D] is timed and not counted.
    angles = 100 * torch.rand(N, D // 2, generator=generator)
    moved = 2 * N * (Hq + Hkv) * D * s
    return rows + both_ways("rope", f"{N} x {Hq}/{Hkv} x {D}", ours, eager_rope, [leaf(N, Hq + 2 * Hkv, D)], (angles.cos(), angles.sin(), heads), moved, moved,
                            ceiling, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default="")
    arguments = parser.parse_args()
    one_thread()
    ceiling = copy_bandwidth()
    rows: list[Row] = []
    # The sizes of stories260k and of a 1.5 billion parameter model.
    sizes = {"tiny": (4096, 64, 172, (8, 4, 4), 8), "large": (2048, 1536, 8960, (12, 2, 2), 128)}
    for name, size in sizes.items():
        if name.startswith(tuple(arguments.cases.split(","))):
            for dtype in (torch.float32, torch.bfloat16):
                rows += layers(*size, dtype, ceiling, arguments.rounds)
                report("layers", rows)


if __name__ == "__main__":
    main()
