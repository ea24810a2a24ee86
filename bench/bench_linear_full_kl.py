"""linear_full_kl compared with two products that form all logits and torch's kl_div, eager and
compiled."""

from __future__ import annotations

import pytest
import torch
from bench.bench_full_kl import eager_reverse
from bench.harness import DEVICE, Random, agree, compiled, gradients, implementations, no_grad, on
from torch import Tensor

from fusedrl.kernels import linear_full_kl as module
from fusedrl.kernels.linear_full_kl import linear_full_kl

SIZES = on(cpu=[(512, 256, 16384)], cuda=[(4096, 4096, 131072)])
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def eager(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> tuple[Tensor]:
    return eager_reverse(hidden @ weight.t(), ref_hidden @ ref_weight.t())


def inputs(N: int, H: int, V: int) -> list[Tensor]:
    random = Random()
    hidden, weight = random.normal(N, H, dtype=DTYPE), random.normal(V, H, dtype=DTYPE).div_(H**0.5)
    return [
        hidden,
        weight,
        hidden + 0.1 * random.normal(N, H, dtype=DTYPE),
        weight + 0.1 * random.normal(V, H, dtype=DTYPE).div_(H**0.5),
    ]


def contestants():
    def ours(impl: str):
        return lambda *arguments: (linear_full_kl(*arguments, impl=impl),)

    found = {name: ours(impl) for name, impl in implementations(module, "linear_full_kl").items()}
    return {**found, "eager": eager, "torch.compile": compiled(eager)}


def same(of_max: float):
    return (
        agree(rtol=2e-2, of_max=2e-2)
        if torch.bfloat16 == DTYPE
        else agree(rtol=1e-4, atol=1e-6, of_max=of_max)
    )


@pytest.mark.parametrize("N, H, V", SIZES)
def bench_forward(contest, N, H, V):
    arguments = inputs(N, H, V)
    # Two products of 2 N H V.
    contest(
        "linear_full_kl, reverse, forward",
        f"{N} x {H} x {V}",
        DTYPE,
        {name: no_grad(f, *arguments) for name, f in contestants().items()},
        flops=4 * N * H * V,
        same=same(1e-5),
    )


@pytest.mark.parametrize("N, H, V", SIZES)
def bench_forward_backward(contest, N, H, V):
    hidden, weight, *rest = inputs(N, H, V)
    leaves, upstream = (
        [hidden.requires_grad_(), weight.requires_grad_()],
        [torch.full((N,), 1 / N, device=DEVICE)],
    )
    # The forward's two products and two for the gradients in hidden and weight (ours computes the
    # logits again, which is not the problem's).
    contest(
        "linear_full_kl, reverse, forward+backward",
        f"{N} x {H} x {V}",
        DTYPE,
        {name: gradients(f, leaves, upstream, *rest) for name, f in contestants().items()},
        flops=8 * N * H * V,
        same=same(1e-5),
    )
