"""token_kl and kl_loss compared with the same computation in torch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, compiled, gradients, implementations, no_grad, on
from torch import Tensor

from fusedrl.kernels import kl as module
from fusedrl.kernels.kl import kl_loss, token_kl

SIZES = on(cpu=[262_144], cuda=[1 << 24])


def eager_k3(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor]:
    log_ratio = ref_logp - logp
    return (torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio,)


def eager_k2_loss(logp: Tensor, ref_logp: Tensor, weights: Tensor) -> tuple[Tensor]:
    return ((weights * (logp - ref_logp).square()).sum() / 2,)


def columns(N: int) -> tuple[Tensor, Tensor, Tensor]:
    random = Random()
    logp = -5 * random.uniform(N)
    return logp, logp + 0.3 * random.normal(N), torch.full((N,), 1 / N, device=DEVICE)


@pytest.mark.parametrize("N", SIZES)
def bench_token_kl(contest, N):
    logp, ref_logp, _ = columns(N)
    contestants = {
        name: lambda a, b, impl=impl: (token_kl(a, b, estimator="k3", impl=impl),)
        for name, impl in implementations(module, "token_kl").items()
    }
    contestants |= {"eager": eager_k3, "torch.compile": compiled(eager_k3)}
    # Two float32 read and one written a token. Eager k3 errs by some 1e-6: the subtraction of the
    # log ratio.
    contest(
        "token_kl, k3",
        f"{N} tokens",
        torch.float32,
        {name: no_grad(f, logp, ref_logp) for name, f in contestants.items()},
        bytes_moved=12 * N,
        same=agree(rtol=1e-5, atol=1e-6),
    )


@pytest.mark.parametrize("N", SIZES)
def bench_kl_loss(contest, N):
    logp, ref_logp, weights = columns(N)
    contestants = {
        name: lambda a, b, w, impl=impl: (
            kl_loss(a, b, w, estimator="k2", gradient="k2", impl=impl),
        )
        for name, impl in implementations(module, "kl_loss").items()
    }
    contestants |= {"eager": eager_k2_loss, "torch.compile": compiled(eager_k2_loss)}
    leaves, upstream = [logp.requires_grad_()], [torch.ones((), device=DEVICE)]
    # Three float32 read and the gradient written a token; the gradient can be formed where the loss
    # is.
    contest(
        "kl_loss, k2, forward+backward",
        f"{N} tokens",
        torch.float32,
        {
            name: gradients(f, leaves, upstream, ref_logp, weights)
            for name, f in contestants.items()
        },
        bytes_moved=16 * N,
        same=agree(rtol=1e-5, atol=1e-9),
    )
