"""full_kl compared with two log_softmax and torch's kl_div, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bench.harness import Random, agree, compiled, gradients, implementations, no_grad, on
from torch import Tensor

from fusedrl.kernels import full_kl as module
from fusedrl.kernels.full_kl import full_kl

CASES = on(
    cpu=[(512, 32000, torch.float32, "reverse"), (512, 32000, torch.float32, "jsd")],
    cuda=[
        (8192, 151936, torch.bfloat16, "reverse"),
        (4096, 131072, torch.float32, "reverse"),
        (8192, 151936, torch.bfloat16, "jsd"),
    ],
)


def eager_reverse(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor]:
    own, other = (z.float().log_softmax(-1) for z in (logits, ref_logits))
    return (F.kl_div(other, own, log_target=True, reduction="none").sum(-1),)


def eager_jsd(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor]:
    own, other = (z.float().log_softmax(-1) for z in (logits, ref_logits))
    middle = torch.logaddexp(own, other) - math.log(2)
    return (
        sum(
            F.kl_div(middle, log_p, log_target=True, reduction="none").sum(-1)
            for log_p in (own, other)
        )
        / 2,
    )


def contestants(direction: str):
    def ours(impl: str):
        return lambda logits, ref_logits: (
            full_kl(logits, ref_logits, direction=direction, impl=impl),
        )

    eager = eager_reverse if direction == "reverse" else eager_jsd
    found = {
        name: ours(impl)
        for name, impl in implementations(module, "full_kl", reference=False).items()
    }
    return {**found, "eager": eager, "torch.compile": compiled(eager)}


def inputs(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = Random()
    logits = random.normal(N, V, dtype=dtype)
    return logits, logits + 0.3 * random.normal(N, V, dtype=dtype)


@pytest.mark.parametrize("N, V, dtype, direction", CASES)
def bench_forward(contest, N, V, dtype, direction):
    logits, ref_logits = inputs(N, V, dtype)
    # Both rows of logits are read once (the middle of a jsd needs both sums first: twice).
    reads = 4 if direction == "jsd" else 2
    contest(
        f"full_kl, {direction}, forward",
        f"{N} x {V}",
        dtype,
        {name: no_grad(f, logits, ref_logits) for name, f in contestants(direction).items()},
        bytes_moved=reads * N * V * dtype.itemsize,
        same=agree(rtol=1e-4, atol=1e-5),
    )


@pytest.mark.parametrize("N, V, dtype, direction", CASES)
def bench_forward_backward(contest, N, V, dtype, direction):
    logits, ref_logits = inputs(N, V, dtype)
    leaves, upstream = [logits.requires_grad_()], [Random(1).normal(N)]
    # The forward's reads, then both rows once more and one gradient written.
    reads = 4 if direction == "jsd" else 2
    contest(
        f"full_kl, {direction}, forward+backward",
        f"{N} x {V}",
        dtype,
        {
            name: gradients(f, leaves, upstream, ref_logits)
            for name, f in contestants(direction).items()
        },
        bytes_moved=(reads + 3) * N * V * dtype.itemsize,
        same=agree(rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, of_max=1e-4),
    )
