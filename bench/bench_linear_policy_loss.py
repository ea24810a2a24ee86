"""linear_policy_loss, forward and backward, against its bare products, our own two steps, eager PyTorch and torch.compile; by active rows.

    OMP_NUM_THREADS=1 python -m bench.bench_linear_policy_loss          (writes bench/results/linear_policy_loss.json)
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench.harness import contest, one_thread, report
from torch import Tensor

from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import linear_policy_loss
from fusedrl.kernels.policy_loss import policy_loss

N, H, V = 2048, 512, 32000


# ---- the opponent: what a careful author writes with tensor operations -----------------------------------------------------
def eager(hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """PPO's clipped loss through the head, with the entropy as a statistic."""
    logits = hidden @ weight.t()
    logps = logits.log_softmax(-1)
    logp = logps.gather(-1, ids[:, None]).squeeze(-1)
    with torch.no_grad():
        -(logps.exp() * logps).sum(-1).mean()
    ratio = (logp - old_logp).exp()
    return (weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))).sum()


# ---- the rows ------------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--dry", action="store_true", help="print the rows and write no file")
    arguments = parser.parse_args()
    one_thread()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) / H**0.5).requires_grad_()
    ids = torch.randint(0, V, (N,), generator=generator)
    weights = torch.full((N,), 1 / N)
    with torch.no_grad():
        old_logp = linear_logprob(hidden, weight, ids)
    compiled = torch.compile(eager)
    gradient = torch.randn(N, V, generator=generator)

    def both(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    def same(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
        for a, b in zip(ours, other, strict=False):
            if a.shape == b.shape:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def products() -> tuple[Tensor, ...]:
        """The three products alone, on logits and gradients that exist already."""
        with torch.no_grad():
            return torch.empty(0), (hidden @ weight.t())[:0], gradient @ weight, gradient.t() @ hidden

    rows = []
    for share in (1.0, 0.5, 0.1):
        active = torch.rand(N, generator=generator) < share
        advantages = torch.where(active, torch.randn(N, generator=generator), 0.0)  # no KL, no entropy bonus: a zero advantage is a zero gradient
        columns = (ids, old_logp, advantages, weights)
        contestants: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "fusedrl": lambda columns=columns: both(linear_policy_loss(hidden, weight, *columns)[0]),
            "fusedrl, two steps": lambda columns=columns: both(two_steps(hidden, weight, *columns)),
            "eager": lambda columns=columns: both(eager(hidden, weight, *columns)),
        }
        if share == 1.0:
            if not arguments.no_compile:
                contestants["torch.compile"] = lambda columns=columns: both(compiled(hidden, weight, *columns))
            contestants["its three products"] = products
        rows += contest("linear_policy_loss fwd + bwd", f"{N} x {H} x {V}", "float32", contestants, rounds=arguments.rounds, warmup=1,
                        flops=int((2 + 4 * active.float().mean().item()) * N * H * V), same=same, note=f"{share:.0%} of the rows active")
    if arguments.dry:
        for row in rows:
            print(f"{row.note:28} {row.contestant:20} {row.p50_ms:9.1f} ms [{row.p20_ms:.1f}, {row.p80_ms:.1f}]  x{row.ratio:.2f}")
    else:
        report("linear_policy_loss", rows)


def two_steps(hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    logp, entropy = linear_logprob(hidden, weight, ids, entropy=True)
    return policy_loss(logp, old_logp, advantages, weights, entropy=entropy)[0]


if __name__ == "__main__":
    main()
