"""linear_logprob compared with eager logits, log_softmax and gather, with torch.compile of these,
and with the product alone."""

from __future__ import annotations

import pytest
import torch
from bench.harness import (
    DEVICE,
    Random,
    agree,
    compiled,
    gradients,
    implementations,
    liger,
    no_grad,
    on,
)
from torch import Tensor

from fusedrl.kernels import linear_logprob as module
from fusedrl.kernels.linear_logprob import linear_logprob

SIZES = on(cpu=[(64, 64, 512), (2000, 64, 512), (512, 512, 8192)], cuda=[(8192, 4096, 131072)])
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (
        torch.log_softmax((hidden @ weight.t()).float(), -1)
        .gather(-1, token_ids[:, None])
        .squeeze(-1),
    )


def ours(impl: str):
    return lambda hidden, weight, token_ids: (linear_logprob(hidden, weight, token_ids, impl=impl),)


def inputs(N: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    random = Random()
    return (
        random.normal(N, H, dtype=DTYPE),
        random.normal(V, H, dtype=DTYPE).div_(H**0.5),
        random.integers(0, V, N),
    )


def peer(reduction: str):
    function = liger("transformers.functional.liger_fused_linear_cross_entropy")
    return (
        {}
        if function is None
        else {
            "Liger": lambda hidden, weight, ids: (
                -function(hidden, weight, ids, reduction=reduction),
            )
        }
    )


def same(of_max: float):
    return (
        agree(rtol=2e-2, of_max=2e-2)
        if torch.bfloat16 == DTYPE
        else agree(rtol=1e-4, of_max=of_max)
    )


@pytest.mark.parametrize("N, H, V", SIZES)
def bench_forward(contest, N, H, V):
    hidden, weight, token_ids = inputs(N, H, V)
    contestants = {
        name: ours(impl) for name, impl in implementations(module, "linear_logprob").items()
    }
    contestants |= {
        "eager": eager,
        "torch.compile": compiled(eager),
        **peer("none"),
        "bare GEMM": lambda h, w, _: h @ w.t(),
    }
    # 2 N H V for the logits.
    contest(
        "linear_logprob, forward",
        f"{N} x {H} x {V}",
        DTYPE,
        {name: no_grad(f, hidden, weight, token_ids) for name, f in contestants.items()},
        flops=2 * N * H * V,
        same=same(1e-5),
        unchecked={"bare GEMM"},
    )


@pytest.mark.parametrize("N, H, V", SIZES)
def bench_forward_backward(contest, N, H, V):
    hidden, weight, token_ids = inputs(N, H, V)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    # of the mean, which is all that Liger can differentiate in its one pass
    upstream = torch.full((N,), 1 / N, device=DEVICE)
    contestants = {
        name: ours(impl) for name, impl in implementations(module, "linear_logprob").items()
    }
    contestants |= {"eager": eager, "torch.compile": compiled(eager)}
    called = {name: gradients(f, leaves, [upstream], token_ids) for name, f in contestants.items()}
    called |= {
        name: gradients(f, leaves, [torch.ones((), device=DEVICE)], token_ids)
        for name, f in peer("mean").items()
    }
    # 2 N H V for the logits; twice that again for the gradients (computing the logits a second time
    # is ours alone and not the problem's).
    contest(
        "linear_logprob, forward+backward",
        f"{N} x {H} x {V}",
        DTYPE,
        called,
        flops=6 * N * H * V,
        same=same(1e-5),
    )
