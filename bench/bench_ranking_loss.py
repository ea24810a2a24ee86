"""The pairwise and the K-wise ranking loss, forward and backward, compared with the same
computation in torch, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bench.harness import DEVICE, Random, agree, compiled, gradients, implementations, on
from torch import Tensor

from fusedrl.kernels import ranking_loss as module
from fusedrl.kernels.ranking_loss import kwise_ranking_loss, pairwise_ranking_loss


def eager_pairwise(chosen: Tensor, rejected: Tensor) -> tuple[Tensor]:
    return (-F.logsigmoid(chosen - rejected).mean(),)


def eager_kwise(scores_PK: Tensor, ranks_PK: Tensor) -> tuple[Tensor]:
    """Every prompt has K answers, no two of one rank."""
    K = scores_PK.shape[1]
    i, j = torch.triu_indices(K, K, 1, device=scores_PK.device).unbind()
    sign = torch.where(ranks_PK[:, i] < ranks_PK[:, j], 1.0, -1.0)
    return (-F.logsigmoid(sign * (scores_PK[:, i] - scores_PK[:, j])).mean(),)


@pytest.mark.parametrize("B", on(cpu=[4096], cuda=[65_536]))
def bench_pairwise(contest, B):
    random = Random()
    leaves = [random.normal(B).requires_grad_(), random.normal(B).requires_grad_()]
    contestants = {
        name: lambda a, b, impl=impl: (pairwise_ranking_loss(a, b, impl=impl),)
        for name, impl in implementations(module, "pairwise_ranking_loss").items()
    }
    contestants |= {"eager": eager_pairwise, "torch.compile": compiled(eager_pairwise)}
    # Two float32 read and two gradients written a pair.
    contest(
        "pairwise_ranking_loss fwd + bwd",
        f"{B} pairs",
        torch.float32,
        {
            name: gradients(f, leaves, [torch.ones((), device=DEVICE)])
            for name, f in contestants.items()
        },
        bytes_moved=16 * B,
        same=agree(1e-5, 1e-9),
    )


@pytest.mark.parametrize("P, K", on(cpu=[(1024, 4), (1024, 9)], cuda=[(8192, 9)]))
def bench_kwise(contest, P, K):
    random = Random()
    leaves, ranks = [random.normal(P, K).requires_grad_()], random.uniform(P, K).argsort(1) + 1
    cu_groups = torch.arange(0, P * K + 1, K, dtype=torch.int32, device=DEVICE)

    def ours(impl: str):
        return lambda scores, ranks: (
            kwise_ranking_loss(scores.view(-1), ranks.view(-1), cu_groups, impl=impl),
        )

    # The reference goes prompt by prompt: it is a definition and no contestant.
    contestants = {
        name: ours(impl)
        for name, impl in implementations(module, "kwise_ranking_loss", reference=False).items()
    }
    contestants |= {"eager": eager_kwise, "torch.compile": compiled(eager_kwise)}
    # A float32 and an int64 read and a gradient written an answer.
    contest(
        "kwise_ranking_loss fwd + bwd",
        f"{P} prompts x {K}",
        torch.float32,
        {
            name: gradients(f, leaves, [torch.ones((), device=DEVICE)], ranks)
            for name, f in contestants.items()
        },
        bytes_moved=16 * P * K,
        same=agree(1e-5, 1e-9),
    )
