"""sample draws one token per row with its logprob and entropy; compared with the usual torch calls,
eager and compiled. The drawn tokens differ, the entropies must be equal."""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree, compiled, implementations, no_grad, on
from torch import Tensor

from fusedrl.kernels import sampling as module
from fusedrl.kernels.sampling import sample


def eager_draw(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, logprob and entropy by the usual torch calls."""
    logp = torch.log_softmax(logits_BV, -1)
    p = logp.exp()
    token_ids = torch.multinomial(p, 1)
    return (
        token_ids[:, 0],
        logp.gather(-1, token_ids)[:, 0],
        -torch.where(p > 0, p * logp, 0).sum(-1),
    )


def eager_top_p(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ordered, order = logits_BV.sort(descending=True)
    p = ordered.softmax(-1)
    drop = p.cumsum(-1) - p >= 0.9
    return eager_draw(
        logits_BV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    )


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize(
    "B, V", on(cpu=[(64, 512), (64, 32_000), (8, 128_256)], cuda=[(64, 151_936), (512, 151_936)])
)
def bench_sample(contest, B, V, top_p):
    logits, keys = 2 * Random(1).normal(B, V), torch.arange(4 * B, device=DEVICE).view(B, 4)
    eager = eager_draw if top_p == 1 else eager_top_p
    contestants = {
        name: lambda z, impl=impl: sample(z, temperature=1.0, top_p=top_p, keys=keys, impl=impl)
        for name, impl in implementations(module, "sample").items()
    }
    contestants |= {"eager": eager, "torch.compile": compiled(eager)}

    def same(ours, other) -> None:
        # a Sampled's entropy is that of the full distribution, eager's that of what top-p left
        if len(other) != len(ours):
            if top_p == 1:
                agree(1e-4)([ours.entropy], [other[2]])
        else:
            agree(1e-5)(ours[1:4], other[1:4])

    # One read of the logits.
    contest(
        "sample" if top_p == 1 else f"sample, top-p {top_p}",
        f"{B} x {V}",
        torch.float32,
        {name: no_grad(f, logits) for name, f in contestants.items()},
        bytes_moved=4 * B * V,
        same=same,
    )
