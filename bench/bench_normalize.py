"""masked_whiten and group_normalize compared with the same computation in torch, eager and
compiled."""

from __future__ import annotations

import pytest
import torch
from bench.harness import Random, agree, compiled, implementations, no_grad, on
from torch import Tensor

from fusedrl.kernels import normalize as module
from fusedrl.kernels.normalize import group_normalize, masked_whiten


def eager_whiten(x: Tensor, mask: Tensor) -> tuple[Tensor]:
    count = mask.sum()
    centred = torch.where(mask, x - torch.where(mask, x, 0).sum() / count, 0)
    return (centred * torch.rsqrt(centred.square().sum() / count + 1e-8),)


def eager_groups(scores_PK: Tensor) -> tuple[Tensor]:
    return (
        (scores_PK - scores_PK.mean(1, keepdim=True)) / (scores_PK.std(1, keepdim=True) + 1e-6),
    )


@pytest.mark.parametrize("B, T", on(cpu=[(256, 1024)], cuda=[(512, 4096)]))
def bench_masked_whiten(contest, B, T):
    random = Random()
    x, mask = random.normal(B, T), random.uniform(B, T) < 0.8
    contestants = {
        name: lambda x, m, impl=impl: (masked_whiten(x, m, impl=impl),)
        for name, impl in implementations(module, "masked_whiten").items()
    }
    contestants |= {"eager": eager_whiten, "torch.compile": compiled(eager_whiten)}
    # Nothing can be written before all was read: float32 and mask read twice, float32 written.
    contest(
        "masked_whiten",
        f"{B} x {T}",
        torch.float32,
        {name: no_grad(f, x, mask) for name, f in contestants.items()},
        bytes_moved=14 * B * T,
        same=agree(1e-4, 1e-5),
    )


@pytest.mark.parametrize("P, K", on(cpu=[(1024, 8)], cuda=[(8192, 16)]))
def bench_group_normalize(contest, P, K):
    scores_PK = Random().normal(P, K)
    contestants = {
        name: lambda s, impl=impl: (
            group_normalize(s.view(-1), group_size=K, impl=impl).advantages.view(P, K),
        )
        for name, impl in implementations(module, "group_normalize").items()
    }
    contestants |= {"eager": eager_groups, "torch.compile": compiled(eager_groups)}
    # One float32 read and one written a score; ours also says which groups have no variance.
    contest(
        "group_normalize, grpo",
        f"{P} x {K}",
        torch.float32,
        {name: no_grad(f, scores_PK) for name, f in contestants.items()},
        bytes_moved=8 * P * K,
        same=agree(1e-4, 1e-5),
    )
