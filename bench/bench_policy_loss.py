"""policy_loss, forward and backward with every statistic, against the same loss in eager PyTorch and under torch.compile.

    OMP_NUM_THREADS=1 python -m bench.bench_policy_loss          (writes bench/results/policy_loss.json)
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from bench.harness import contest, report
from torch import Tensor

from fusedrl.kernels.policy_loss import PolicyObjective, policy_loss, policy_value_loss

N = 262_144
OBJECTIVE = PolicyObjective(clip_low=0.2, clip_high=0.28, dual_clip=3.0)


# ---- the opponents: what a careful author writes with tensor operations --------------------------------------------------
def eager_policy(logp: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor,
                 metrics: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss with a dual clip; with `metrics`, the statistics of PolicyStats (there is no entropy here)."""
    log_ratio = logp - old_logp
    ratio = torch.exp(log_ratio.clamp(-20, 20))
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    bounded = torch.where(advantages < 0, torch.minimum(pessimistic, -advantages * OBJECTIVE.dual_clip), pessimistic)
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
            "approx_kl_k1": mean(-log_ratio), "approx_kl_k2": mean(log_ratio * log_ratio) / 2, "approx_kl_k3": mean(ratio - 1 - log_ratio),
            "ratio_mean": mean(ratio), "ratio_min": torch.where(mask, ratio, float("inf")).min(), "ratio_max": live.max(),
            "effective_sample_size": live.sum() ** 2 / (live * live).sum(), "clamped_fraction": mean(log_ratio.abs() > 20), "tokens": tokens,
        }


def eager_value(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    bounded = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    errors, bounded_errors = (values - returns) ** 2, (bounded - returns) ** 2
    loss = (weights * torch.where(mask, torch.maximum(errors, bounded_errors), 0)).sum() / 2
    with torch.no_grad():
        tokens = mask.sum()
        return_mean = torch.where(mask, returns, 0).sum() / tokens
        residuals = returns - values
        residual_mean = torch.where(mask, residuals, 0).sum() / tokens
        spread = torch.where(mask, (returns - return_mean) ** 2, 0).sum()
        return loss, {"clip_fraction": torch.where(mask, bounded_errors > errors, False).sum() / tokens,
                      "explained_variance": 1 - torch.where(mask, (residuals - residual_mean) ** 2, 0).sum() / spread,
                      "value_mean": torch.where(mask, values, 0).sum() / tokens, "return_mean": return_mean, "tokens": tokens}


# ---- the rows ------------------------------------------------------------------------------------------------------------
def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(N, generator=generator) for _ in range(6)]
    mask = torch.rand(N, generator=generator) < 0.8
    weights = torch.where(mask, 1 / mask.sum(), 0)
    old_logp, advantages = normal[0] - 2, normal[1]
    logp = (old_logp + 0.2 * normal[2]).requires_grad_()
    old_values, returns = normal[3], normal[3] + normal[4]
    values = (old_values + 0.3 * normal[5]).requires_grad_()

    def backward(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def same(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def policy_only(loss: Callable[..., tuple[Tensor, object]], metrics: bool) -> tuple[Tensor, ...]:
        return backward(loss(logp, old_logp, advantages, weights, mask, metrics)[0], logp)

    def both(policy: Callable, value: Callable) -> tuple[Tensor, ...]:
        loss = policy(logp, old_logp, advantages, weights, mask, True)[0] + 0.1 * value(values, old_values, returns, weights, mask, 0.2)[0]
        return backward(loss, logp, values)

    compiled_policy, compiled_value = torch.compile(eager_policy, fullgraph=True), torch.compile(eager_value, fullgraph=True)
    # Forward: four inputs read and a gradient written; backward: it is read and the scaled one written. The value part: the weights are shared.
    policy_bytes, value_bytes = 7 * 4 * N, 6 * 4 * N
    rows = contest("policy_loss forward + backward", f"{N} tokens", "float32", {
        "fusedrl": lambda: backward(policy_loss(logp, old_logp, advantages, weights, objective=OBJECTIVE)[0], logp),
        "eager": lambda: policy_only(eager_policy, True),
        "eager without statistics": lambda: policy_only(eager_policy, False),
        "torch.compile": lambda: policy_only(compiled_policy, True),
    }, bytes_moved=policy_bytes, same=same)
    rows += contest("policy_value_loss forward + backward", f"{N} tokens", "float32", {
        "fusedrl": lambda: backward(policy_value_loss(logp, old_logp, advantages, weights, values, old_values, returns, objective=OBJECTIVE,
                                                      value_clip=0.2)[0], logp, values),
        "eager": lambda: both(eager_policy, eager_value),
        "torch.compile": lambda: both(compiled_policy, compiled_value),
    }, bytes_moved=policy_bytes + value_bytes, same=same)
    report("policy_loss", rows)


if __name__ == "__main__":
    main()
