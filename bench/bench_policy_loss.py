"""policy_loss, value_loss and policy_value_loss, forward and backward with every statistic,
compared with the same losses in eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench.harness import Random, agree, compiled, implementations, on
from torch import Tensor

from fusedrl.kernels import policy_loss as module
from fusedrl.kernels.policy_loss import PolicyObjective, policy_loss, policy_value_loss, value_loss

SIZES = on(cpu=[262_144], cuda=[1 << 20])
OBJECTIVE = PolicyObjective(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
VALUE_CLIP = 0.2


# ---- the opponents: what a careful author writes with tensor operations --------------------------
def eager_policy(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, metrics: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss with a dual clip; with `metrics`, the statistics of PolicyStats (there is
    no entropy here)."""
    log_ratio = logp - old_logp
    ratio = torch.exp(log_ratio.clamp(-20, 20))
    unclipped, clipped = (
        -advantages * ratio,
        -advantages * ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high),
    )
    pessimistic = torch.maximum(unclipped, clipped)
    bounded = torch.where(
        advantages < 0, torch.minimum(pessimistic, -advantages * OBJECTIVE.dual_clip), pessimistic
    )
    loss = (weights * torch.where(mask, bounded, 0)).sum()
    if not metrics:
        return loss, {}
    with torch.no_grad():
        tokens = mask.sum()

        def mean(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0).sum() / tokens

        live = torch.where(mask, ratio, 0)
        return loss, {
            "clip_fraction_low": mean((advantages < 0) & (ratio < 1 - OBJECTIVE.clip_low)),
            "clip_fraction_high": mean((advantages > 0) & (ratio > 1 + OBJECTIVE.clip_high)),
            "clip_fraction_dual": mean((advantages < 0) & (ratio > OBJECTIVE.dual_clip)),
            "approx_kl_k1": mean(-log_ratio),
            "approx_kl_k2": mean(log_ratio * log_ratio) / 2,
            "approx_kl_k3": mean(ratio - 1 - log_ratio),
            "ratio_mean": mean(ratio),
            "ratio_min": torch.where(mask, ratio, float("inf")).min(),
            "ratio_max": live.max(),
            "effective_sample_size": live.sum() ** 2 / (live * live).sum(),
            "clamped_fraction": mean(log_ratio.abs() > 20),
            "tokens": tokens,
        }


def eager_value(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    bounded = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    errors, bounded_errors = (values - returns) ** 2, (bounded - returns) ** 2
    loss = (weights * torch.where(mask, torch.maximum(errors, bounded_errors), 0)).sum() / 2
    with torch.no_grad():
        tokens = mask.sum()
        return_mean = torch.where(mask, returns, 0).sum() / tokens
        residuals = returns - values
        residual_mean = torch.where(mask, residuals, 0).sum() / tokens
        spread = torch.where(mask, (returns - return_mean) ** 2, 0).sum()
        return loss, {
            "clip_fraction": torch.where(mask, bounded_errors > errors, False).sum() / tokens,
            "explained_variance": 1
            - torch.where(mask, (residuals - residual_mean) ** 2, 0).sum() / spread,
            "value_mean": torch.where(mask, values, 0).sum() / tokens,
            "return_mean": return_mean,
            "tokens": tokens,
        }


def backward(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves)


same = agree(rtol=1e-5, atol=1e-6)


# ---- the contests --------------------------------------------------------------------------------
class Inputs:
    def __init__(self, N: int) -> None:
        random = Random()
        self.mask = random.uniform(N) < 0.8
        self.weights = torch.where(self.mask, 1 / self.mask.sum(), 0)
        self.old_logp, self.advantages = random.normal(N) - 2, random.normal(N)
        self.logp = (self.old_logp + 0.2 * random.normal(N)).requires_grad_()
        self.old_values = random.normal(N)
        self.returns = self.old_values + random.normal(N)
        self.values = (self.old_values + 0.3 * random.normal(N)).requires_grad_()

    def policy(self, loss: Callable, metrics: bool = True) -> Tensor:
        return loss(self.logp, self.old_logp, self.advantages, self.weights, self.mask, metrics)[0]

    def value(self, loss: Callable) -> Tensor:
        return loss(
            self.values, self.old_values, self.returns, self.weights, self.mask, VALUE_CLIP
        )[0]


# Forward: four inputs read and a gradient written; backward: it is read and the scaled one written.
POLICY_BYTES, VALUE_BYTES = 7 * 4, 7 * 4


@pytest.mark.parametrize("N", SIZES)
def bench_policy_loss(contest, N):
    x, fast = Inputs(N), compiled(eager_policy)
    contestants = {
        name: lambda impl=impl: backward(
            policy_loss(
                x.logp, x.old_logp, x.advantages, x.weights, objective=OBJECTIVE, impl=impl
            )[0],
            x.logp,
        )
        for name, impl in implementations(module, "policy_value_loss").items()
    }
    contest(
        "policy_loss forward + backward",
        f"{N} tokens",
        torch.float32,
        {
            **contestants,
            "eager": lambda: backward(x.policy(eager_policy), x.logp),
            "eager without statistics": lambda: backward(x.policy(eager_policy, False), x.logp),
            "torch.compile": lambda: backward(x.policy(fast), x.logp),
        },
        bytes_moved=POLICY_BYTES * N,
        same=same,
    )


@pytest.mark.parametrize("N", SIZES)
def bench_value_loss(contest, N):
    x, fast = Inputs(N), compiled(eager_value)
    contestants = {
        name: lambda impl=impl: backward(
            value_loss(x.values, x.old_values, x.returns, x.weights, clip=VALUE_CLIP, impl=impl)[0],
            x.values,
        )
        for name, impl in implementations(module, "policy_value_loss").items()
    }
    contest(
        "value_loss forward + backward",
        f"{N} tokens",
        torch.float32,
        {
            **contestants,
            "eager": lambda: backward(x.value(eager_value), x.values),
            "torch.compile": lambda: backward(x.value(fast), x.values),
        },
        bytes_moved=VALUE_BYTES * N,
        same=same,
    )


@pytest.mark.parametrize("N", SIZES)
def bench_policy_value_loss(contest, N):
    x, fast_policy, fast_value = Inputs(N), compiled(eager_policy), compiled(eager_value)

    def ours(impl: str) -> tuple[Tensor, ...]:
        loss = policy_value_loss(
            x.logp,
            x.old_logp,
            x.advantages,
            x.weights,
            x.values,
            x.old_values,
            x.returns,
            objective=OBJECTIVE,
            value_clip=VALUE_CLIP,
            value_coef=0.1,
            impl=impl,
        )[0]
        return backward(loss, x.logp, x.values)

    contestants = {
        name: lambda impl=impl: ours(impl)
        for name, impl in implementations(module, "policy_value_loss").items()
    }
    contest(
        "policy_value_loss forward + backward",
        f"{N} tokens",
        torch.float32,
        {
            **contestants,
            "eager": lambda: backward(
                x.policy(eager_policy) + 0.1 * x.value(eager_value), x.logp, x.values
            ),
            "torch.compile": lambda: backward(
                x.policy(fast_policy) + 0.1 * x.value(fast_value), x.logp, x.values
            ),
        },
        bytes_moved=(POLICY_BYTES + VALUE_BYTES - 4) * N,
        same=same,
    )  # the weights are shared
