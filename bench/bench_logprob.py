"""logprob compared with eager log_softmax + gather, and with torch.compile of these.

"forward" runs under no_grad. "forward+backward" is one call and `torch.autograd.grad` of its result
with a random upstream gradient. The gradient is a new tensor, except for logprob_ (and Liger's),
which overwrites the logits: each round then reads the gradient of the previous round as its logits.
"""

from __future__ import annotations

import pytest
import torch
from bench.harness import Random, agree, compiled, gradients, implementations, liger, no_grad, on
from torch import Tensor

from fusedrl.kernels import logprob as module
from fusedrl.kernels.logprob import logprob, logprob_

F32, BF16 = torch.float32, torch.bfloat16


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (torch.log_softmax(logits.float(), -1).gather(-1, token_ids[:, None]).squeeze(-1),)


def eager_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def ours(impl: str | None, entropy: bool, op=logprob):
    def call(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        out = op(logits, token_ids, entropy=entropy, impl=impl)
        return out if entropy else (out,)

    return call


def same(dtype: torch.dtype):
    return agree(rtol=2e-2 if dtype == BF16 else 1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "N, V, dtype, entropy",
    on(
        cpu=[
            (2048, 32000, F32, False),
            (2048, 32000, F32, True),
            (512, 151936, F32, False),
            (2048, 32000, BF16, False),
        ],
        cuda=[(8192, 151936, BF16, False), (8192, 151936, BF16, True), (8192, 32000, F32, True)],
    ),
)
def bench_forward(contest, N, V, dtype, entropy):
    random = Random()
    logits, token_ids = random.normal(N, V, dtype=dtype), random.integers(0, V, N)
    plain = eager_entropy if entropy else eager
    contestants = {
        name: ours(impl, entropy)
        for name, impl in implementations(module, "logprob", reference=False).items()
    }
    contestants |= {"eager": plain, "torch.compile": compiled(plain)}
    peer = liger("transformers.functional.liger_cross_entropy")
    if peer is not None and not entropy:
        contestants["Liger cross entropy"] = lambda z, ids: (-peer(z, ids, reduction="none"),)
    # The logits are read once.
    contest(
        f"logprob{' + entropy' if entropy else ''}, forward",
        f"{N} x {V}",
        dtype,
        {name: no_grad(function, logits, token_ids) for name, function in contestants.items()},
        bytes_moved=N * V * dtype.itemsize,
        same=same(dtype),
    )


@pytest.mark.parametrize(
    "N, V, dtype, entropy",
    on(
        cpu=[
            (2048, 32000, F32, False),
            (2048, 32000, F32, True),
            (1024, 151936, F32, True),
            (2048, 32000, BF16, False),
        ],
        cuda=[(8192, 151936, BF16, False), (8192, 151936, BF16, True), (8192, 32000, F32, True)],
    ),
)
def bench_forward_backward(contest, N, V, dtype, entropy):
    random = Random()
    leaf, token_ids = random.normal(N, V, dtype=dtype).requires_grad_(), random.integers(0, V, N)
    upstream = [random.normal(N) for _ in range(2 if entropy else 1)]
    plain = eager_entropy if entropy else eager

    def in_place(function):
        buffer = leaf.detach().clone().requires_grad_()

        def call():
            computed = buffer.view(N, V)  # not a leaf, so that its memory may become the gradient
            return torch.autograd.grad(function(computed, token_ids), computed, upstream)

        return call

    def fresh(function):
        return gradients(function, [leaf], upstream, token_ids)

    contestants = {
        name: fresh(ours(impl, entropy))
        for name, impl in implementations(module, "logprob", reference=False).items()
    }
    contestants |= {
        "fusedrl logprob_": in_place(ours(None, entropy, logprob_)),
        "eager": fresh(plain),
        "torch.compile": fresh(compiled(plain)),
    }
    peer = liger("transformers.functional.liger_cross_entropy")
    if peer is not None and not entropy:
        contestants["Liger cross entropy"] = in_place(
            lambda z, ids: (-peer(z, ids, reduction="none").float(),)
        )
    # The logits are read twice and their gradient is written.
    contest(
        f"logprob{' + entropy' if entropy else ''}, forward+backward",
        f"{N} x {V}",
        dtype,
        contestants,
        bytes_moved=3 * N * V * dtype.itemsize,
        same=same(dtype),
    )
