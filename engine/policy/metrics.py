"""Metrics that a policy step reports: those of its rollout, and those of the micro-batches that it
trained on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.policy.objectives import correction_metrics
from fusedrl.kernels.gae import shaped_gae
from fusedrl.kernels.policy_loss import PolicyStats, ValueStats
from fusedrl.kernels.runtime.faults import raise_faults


def measure(
    batch: PackedBatch, kl_coef: float, config: PolicyConfig, scored_N: Tensor | None = None
) -> dict[str, float]:
    """Measure a rollout from its batch, which has the columns old_logp and old_entropy.

    Args:
        scored_N: bool [N], tokens whose old_logp and old_entropy the trainer computed; None: all.
            The old_logp of the remaining tokens is the sampler's; the KL includes these tokens,
            too. Without any such token there are no metrics of single tokens.

    Raises:
        IndexError: a kernel was given ids outside the vocabulary.
        RuntimeError: sampler and trainer disagree.
    """
    # the host waits here anyway; scores of ids outside the vocabulary are NaN, which would look
    # like disagreement
    raise_faults(batch.device)
    mask_N = batch.action_mask
    if scored_N is not None:
        mask_N = mask_N & scored_N
    found = {"step_tokens": float(batch.num_tokens)}
    if mask_N.any():
        found |= _of_tokens(batch.with_columns(action_mask=mask_N), config)
    if config.score_clip:
        found["score_clip_fraction"] = (
            (batch.column("scores").abs() > config.score_clip).double().mean().item()
        )
    if batch.values is not None and batch.rollout_values is not None and mask_N.any():
        found["sampling/value_diff_max"] = (
            (batch.values - batch.rollout_values)[mask_N].abs().max().item()
        )
    if batch.ref_logp is not None:
        found |= _distance(batch, kl_coef, config)
    if batch.values is not None:
        found["val/explained_variance"] = _explained_variance(
            *(batch.column(name)[mask_N].double() for name in ("values", "returns"))
        )
    return found


def _of_tokens(batch: PackedBatch, config: PolicyConfig) -> dict[str, float]:
    """Measure entropy, and the differences between sampler and trainer, over the actions. Raise
    RuntimeError if sampler and trainer disagree."""
    mask_N = batch.action_mask
    old, rolled = (
        x[mask_N].double() for x in (batch.column("old_logp"), batch.column("rollout_logp"))
    )
    difference = (rolled - old).abs()
    ratio = (old - rolled).exp()
    mean, worst = difference.mean().item(), difference.max().item()
    if not mean <= config.max_logp_diff:
        raise RuntimeError(
            f"sampler and trainer disagree: mean |logp difference| {mean:.3g} (max {worst:.3g}) "
            f"over {difference.numel()} tokens, above "
            f"max_logp_diff = {config.max_logp_diff}; expected about 1e-6 in float32 and 1e-3 in "
            "bfloat16. Every ratio would be wrong, so the "
            "run stops; train in float32, or raise max_logp_diff if you mean it"
        )
    return {
        "entropy": batch.column("old_entropy")[mask_N].double().mean().item(),
        "perplexity": math.exp(min(80.0, -old.mean().item())),
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": worst,
        "sampling/ratio_outside_fraction": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
    } | correction_metrics(config.correction, batch)


def _distance(batch: PackedBatch, kl_coef: float, config: PolicyConfig) -> dict[str, float]:
    """Measure the KL from the reference, and its part in the reward."""
    old_N, mask_N = batch.column("old_logp"), batch.action_mask
    # The kernel is the one that computes a KL in the reward. So the KL that is reported, and that
    # the coefficient adapts to, is the KL that was charged.
    shaped = shaped_gae(
        old_N,
        batch.column("ref_logp"),
        old_N,
        batch.column("scores"),
        mask=mask_N,
        cu_seqlens=batch.cu_seqlens,
        kl_coef=0.0,
        score_clip=config.score_clip or None,
        whiten=False,
    )
    kl = shaped.kl_per_sequence.double().mean().item()
    found = {
        "kl": kl,
        "kl_coef": kl_coef,
        "perplexity_ref": math.exp(
            min(80.0, -batch.column("ref_logp")[mask_N].double().mean().item())
        ),
    }
    if config.kl.placement == "reward":
        found |= {
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": shaped.score_per_sequence.double().mean().item()
            - kl_coef * kl,
        }
    return found


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread > 0 else 0.0


class Meter:
    """Collects the statistics of micro-batches and turns them into one number per metric and step.
    Means are weighted by tokens; extremes are the min and max over micro-batches. The numbers are
    read from the device once, at the end."""

    def __init__(self) -> None:
        self.policy: list[PolicyStats] = []
        self.value: list[ValueStats] = []
        self.when: list[tuple[int, bool]] = []
        self.replayed: list[bool] = []
        self.dropped: list[Tensor] = []
        self.grad_norms: list[float] = []
        self._log_ratios: list[Tensor] = []

    def add(
        self,
        policy: PolicyStats,
        value: ValueStats | None,
        dropped: Tensor | None,
        epoch: int,
        *,
        first: bool,
        replayed: bool = False,
    ) -> None:
        """Add one micro-batch.

        Args:
            dropped: number of tokens whose advantage correction.off_policy_delta set to 0.
            first: whether the micro-batch is of this rollout and precedes every optimizer step on
                it.
            replayed: whether the micro-batch holds completions of earlier rollouts only.
        """
        self.policy.append(policy)
        self.when.append((epoch, first))
        self.replayed.append(replayed)
        if dropped is not None:
            self.dropped.append(dropped)
        if value is not None:
            self.value.append(value)

    def add_ratios(self, log_ratios: Tensor) -> None:
        """Add the log ratios of actions in the last pass; `metrics` reports their tails."""
        self._log_ratios.append(log_ratios)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the ratio of every action in the last pass, for histograms."""
        if not self._log_ratios:
            return {}
        return {
            "val/ratio": torch.cat(self._log_ratios).double().clamp(-80, 80).exp().cpu().numpy()
        }

    def metrics(self, exact_kl: bool = False) -> dict[str, float]:
        """Return the metrics of everything that was added.

        Args:
            exact_kl: whether the loss has the exact KL to a reference, so that it can be reported.
        """
        policy, updates = _rows(self.policy), len(self.grad_norms)
        tokens = sum(p["tokens"] for p in policy)
        mean: dict[str, float] = defaultdict(float)
        for p in policy:
            share = p["tokens"] / max(1.0, tokens)
            for name, number in (
                ("policy/approxkl_avg", p["approx_kl_k3"]),
                ("clip_ratio/region_mean", p["clip_fraction_low"] + p["clip_fraction_high"]),
                ("clip_ratio/low_mean", p["clip_fraction_low"]),
                ("clip_ratio/high_mean", p["clip_fraction_high"]),
                ("val/ratio", p["ratio_mean"]),
                ("policy/clamped_fraction", p["clamped_fraction"]),
            ):
                mean[name] += share * number
        if replayed := [
            p for p, old in zip(policy, self.replayed, strict=True) if old and p["tokens"]
        ]:
            sums = [p["ratio_mean"] * p["tokens"] for p in replayed]
            squares = sum(
                total**2 / p["effective_sample_size"]
                for total, p in zip(sums, replayed, strict=True)
            )
            mean["replay/ess"] = sum(sums) ** 2 / squares / sum(p["tokens"] for p in replayed)
        if self.dropped:
            mean["correction/off_policy_fraction"] = torch.stack(self.dropped).sum().item() / max(
                1.0, tokens
            )
        if exact_kl:
            mean["divergence"] = sum(p["ref_kl"] * p["tokens"] for p in policy) / max(1.0, tokens)
        live = [p for p in policy if p["tokens"]]
        first = [
            p
            for p, (_, is_first) in zip(policy, self.when, strict=True)
            if is_first and p["tokens"]
        ]
        last = [
            p for p, (epoch, _) in zip(policy, self.when, strict=True) if epoch == self.when[-1][0]
        ]
        return (
            dict(mean)
            | value_metrics(self.value, updates)
            | {
                "loss/policy_avg": sum(p["loss"] for p in policy) / updates,
                "val/ratio_min": min((p["ratio_min"] for p in live), default=1.0),
                "val/ratio_max": max((p["ratio_max"] for p in live), default=1.0),
                "policy/first_ratio_min": min((p["ratio_min"] for p in first), default=1.0),
                "policy/first_ratio_max": max((p["ratio_max"] for p in first), default=1.0),
                "policy/first_approxkl": max((p["approx_kl_k3"] for p in first), default=0.0),
                "policy/first_clipfrac": max(
                    (p["clip_fraction_low"] + p["clip_fraction_high"] for p in first), default=0.0
                ),
                "policy/last_approxkl": sum(p["approx_kl_k3"] * p["tokens"] for p in last)
                / max(1.0, sum(p["tokens"] for p in last)),
                "grad_norm": sum(self.grad_norms) / updates,
                **_tails(self._log_ratios),
            }
        )


def value_metrics(stats: Sequence[ValueStats], updates: int) -> dict[str, float]:
    """Return the metrics of the micro-batches that a critic was trained on in `updates` updates.
    Without micro-batches there are no metrics."""
    rows = _rows(stats)
    if not rows:
        return {}
    tokens = max(1.0, sum(v["tokens"] for v in rows))
    return {
        "val/clipfrac_avg": sum(v["tokens"] / tokens * v["clip_fraction"] for v in rows),
        "loss/value_avg": sum(v["loss"] for v in rows) / updates,
    }


def _tails(log_ratios: Sequence[Tensor]) -> dict[str, float]:
    ordered = torch.cat(list(log_ratios)).double().sort().values if log_ratios else torch.zeros(0)
    if not len(ordered):
        return {"val/ratio_p01": 1.0, "val/ratio_p99": 1.0, "val/ratio_outside_fraction": 0.0}
    low, high = (
        ordered[round(share * (len(ordered) - 1))].clamp(-80, 80).exp().item()
        for share in (0.01, 0.99)
    )
    return {
        "val/ratio_p01": low,
        "val/ratio_p99": high,
        "val/ratio_outside_fraction": (ordered.abs() > math.log(2.0)).double().mean().item(),
    }


def _rows(stats: Sequence[PolicyStats] | Sequence[ValueStats]) -> list[dict[str, float]]:
    """Read all statistics from the device at once."""
    if not stats:
        return []
    return [
        dict(zip(stats[0]._fields, row, strict=True))
        for row in torch.stack([torch.stack([x.float() for x in s]) for s in stats]).tolist()
    ]
