"""The losses that an update minimises, by name: the kernels' objectives with the engine's bounds,
and those that users register; together with KL, entropy and value loss.

    loss = sum_t w_t (correction_t policy term_t + kl_coef kl_t - entropy_coef H_t
                      + kl_cov_coef held_t |logp_t - old_logp_t|) + value_coef
        sum_t w_t value term_t

correction_t makes up for differences between sampler and trainer (CorrectionConfig); it is 1
without a correction. A registered objective computes the policy terms:
f(logp_N, old_logp_N, advantages_N, batch) -> [N], differentiable in logp_N; correction, weights,
KL, entropy and statistics are added around it. All built-in objectives except `SequenceRatio` are
fused kernels (kernels/policy_loss/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.blame import blame, per_token, place_of
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import CorrectionConfig, PolicyConfig
from fusedrl.engine.config.algorithms import BOUNDS, OBJECTIVES, resolve
from fusedrl.kernels.objective import (
    MAX_LOG_RATIO,
    RolloutCorrection,
    rollout_weights,
    sequence_sum,
)
from fusedrl.kernels.policy_loss import (
    PolicyObjective,
    PolicyStats,
    ValueStats,
    policy_loss,
    policy_value_loss,
    token_weights,
    value_loss,
)

ObjectiveFunction = Callable[[Tensor, Tensor, Tensor, PackedBatch], Tensor]
Objective = PolicyObjective | ObjectiveFunction
_REGISTERED: dict[str, ObjectiveFunction] = {}
_NONE = PolicyObjective(kind="reinforce")  # used with advantages of 0, so it adds nothing
# kinds whose term has no gradient where the advantage is 0, whatever the ratio
_OF_ADVANTAGES = {"reinforce", "ratio", "clip", "gspo", "cispo", "sapo", "geometric_mean"}


def register_objective(name: str) -> Callable[[ObjectiveFunction], ObjectiveFunction]:
    """Register a function under the name that `loss.objective` refers to."""

    def register(function: ObjectiveFunction) -> ObjectiveFunction:
        _REGISTERED[name] = function
        return function

    return register


def make_objective(config: PolicyConfig, penalty: float) -> Objective:
    """Return the configuration's objective. `penalty` is the current coefficient of ppo_penalty,
    which adapts from step to step.

    Raises:
        ConfigError: an unknown name, or a bound that the objective does not use.
    """
    found = resolve("objective", config.objective, OBJECTIVES | _REGISTERED)
    bounds = {name: value for name in BOUNDS if (value := getattr(config.loss, name)) is not None}
    if not isinstance(found, tuple):
        if bounds:
            raise ConfigError(
                f"config: the objective {config.objective} has no use for "
                f"loss.{', loss.'.join(bounds)}; leave them out"
            )
        return found
    kind, usual = found
    if kind == "sequence_ratio":
        if surplus := bounds.keys() - usual:
            raise ConfigError(
                f"config: loss: the objective {config.objective} does not use "
                f"{', '.join(sorted(surplus))}; leave it out"
            )
        return SequenceRatio(**usual | bounds)
    if kind == "kl_penalty":
        bounds.setdefault("beta", penalty)
    try:
        return PolicyObjective(kind=kind, **bounds)
    except ValueError as error:
        raise ConfigError(f"config: loss: {error}") from error


@dataclass(frozen=True)
class SequenceRatio:
    """Clipped ratio of whole completions, for any advantage function (with monte_carlo, the
    advantage is the completion's reward itself, without baseline or critic).

        s = exp(sum_t logp_t - old_logp_t)
        term = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    Every token of a completion has the same term. With the weights of sequence_mean_token_mean, the
    loss is therefore the mean over completions. A is the mean advantage over the completion's
    tokens. The logarithm of s is clipped to +-20 and has no gradient beyond.

    The importance weight E_p[f] = E_q[f p / q] is used in full. It is unbiased, but its noise grows
    with E_p[f^2 p / q]. So this objective is for study; PPO uses ratios of tokens instead. A KL
    belongs, detached, into the reward: outside the ratio its expected gradient is 0.
    """

    clip_low: float
    clip_high: float
    kind: ClassVar[str] = "sequence_ratio"

    def __call__(
        self, logp_N: Tensor, old_logp_N: Tensor, advantages_N: Tensor, batch: PackedBatch
    ) -> Tensor:
        mask_N, cu = batch.action_mask, batch.cu_seqlens
        log_s_N = sequence_sum(torch.where(mask_N, logp_N - old_logp_N, 0), cu)
        A_N = sequence_sum(torch.where(mask_N, advantages_N, 0), cu) / sequence_sum(
            mask_N, cu
        ).clamp(min=1)
        s_N = _exp(log_s_N)
        return torch.where(
            mask_N,
            torch.maximum(-A_N * s_N, -A_N * s_N.clamp(1 - self.clip_low, 1 + self.clip_high)),
            0,
        ).to(logp_N.dtype)


def _exp(x: Tensor) -> Tensor:
    """Return e^x with x clipped to +-20, without gradient beyond; NaN stays NaN."""
    return torch.where(
        x.abs() > MAX_LOG_RATIO, x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), x
    ).exp()


def ratio_kl(
    logp_N: Tensor, old_logp_N: Tensor, ref_logp_N: Tensor, mask_N: Tensor, estimator: str
) -> Tensor:
    """Return [N] ratio * k; 0 where masked. ratio = exp(logp - old_logp), and k is the estimator k1
    or k3 of KL(policy || reference); the result is differentiable through both.

    At every state, its expectation over tokens of the old policy equals the expectation of k over
    tokens of the policy itself. The same holds for the gradient, which is that of KL(pi || ref) for
    k1 and k3 alike (DeepSeek-V3.2, 2025, eq. 7). Computed in float64; log ratios inside
    exponentials are clipped to +-20 and have no gradient beyond.
    """
    logp, old, ref = (
        torch.where(mask_N, x_N, 0).double()
        for x_N in (logp_N, old_logp_N.detach(), ref_logp_N.detach())
    )
    k = logp - ref
    if estimator == "k3":
        inside = torch.where(k.abs() > MAX_LOG_RATIO, k.detach(), k)
        k = torch.expm1(-inside.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + inside
    return (_exp(logp - old) * k).to(logp_N.dtype)


# ---- samplers and policies that are not the trainer's --------------------------------------------
def rollout_correction(config: CorrectionConfig) -> RolloutCorrection | None:
    """Translate the options of a correction for the kernels; return None if there is no
    correction."""
    return (
        None
        if config.kind == "none"
        else RolloutCorrection(config.kind, config.level, cap=config.high, floor=config.floor)
    )


def behaviour(
    config: CorrectionConfig, batch: PackedBatch, logp_N: Tensor | None
) -> tuple[PackedBatch, Tensor | None]:
    """Return the batch as the loss is to use it, and how many tokens `off_policy_delta` left out.

    If `config.bypass`, old_logp is replaced by rollout_logp. If `off_policy_delta` is set, tokens
    with a negative advantage get the advantage 0 in completions that the policy has left: those
    whose mean of rollout_logp - logp exceeds `off_policy_delta`. Only this needs `logp_N`. The
    number of tokens is None without `off_policy_delta` or `logp_N`.
    """
    if config.bypass:
        batch = batch.with_columns(old_logp=batch.column("rollout_logp"))
    if config.off_policy_delta is None or logp_N is None:
        return batch, None
    mask_N, cu, advantages_N = batch.action_mask, batch.cu_seqlens, batch.column("advantages")
    apart_N = sequence_sum(
        torch.where(mask_N, batch.column("rollout_logp") - logp_N.detach(), 0), cu
    ) / sequence_sum(mask_N, cu).clamp(min=1)
    dropped_N = mask_N & (advantages_N < 0) & (apart_N > config.off_policy_delta)
    return batch.with_columns(advantages=torch.where(dropped_N, 0, advantages_N)), dropped_N.sum()


def correction_metrics(config: CorrectionConfig, batch: PackedBatch) -> dict[str, float]:
    """Measure the weights exp(old_logp - rollout_logp) before any bound applies: mean, max,
    effective sample size as a fraction, and chi2 = E[w^2] - 1 under the sampler. Also measure the
    fraction of tokens whose weight a bound changed. Weights are per token, or per completion if
    correction.level is "sequence". Return nothing if there is no correction."""
    correction = rollout_correction(config)
    if correction is None:
        return {}
    mask_N, cu = batch.action_mask, batch.cu_seqlens
    old_N, rolled_N = (
        torch.where(mask_N, batch.column(name), 0).double() for name in ("old_logp", "rollout_logp")
    )
    log_w = sequence_sum(old_N - rolled_N, cu) if config.level == "sequence" else old_N - rolled_N
    w_N = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    changed = (
        (rollout_weights(correction, old_N, rolled_N, mask_N, cu) != w_N)[mask_N]
        .double()
        .mean()
        .item()
    )
    starts = cu[:-1].long()
    w = (
        w_N[mask_N]
        if config.level == "token"
        else w_N[starts][sequence_sum(mask_N, cu)[starts] > 0]
    )
    square = w.square().mean().item()
    return {
        "correction/mean": w.mean().item(),
        "correction/max": w.max().item(),
        "correction/fraction": changed,
        "correction/ess": w.mean().item() ** 2 / square,
        "correction/chi2": square - 1,
    }


def minibatch_weights(config: PolicyConfig, batch: PackedBatch) -> Tensor:
    """Return [N] weights of one optimizer step's tokens; 0 where the loss_mask leaves them out.
    Weights of the whole step make the loss independent of how it is split into micro-batches."""
    aggregation = config.loss.aggregation
    longest = config.generation.max_new_tokens if aggregation == "sequence_sum_norm" else None
    return token_weights(
        batch.trained_mask, aggregation, cu_seqlens=batch.cu_seqlens, max_length=longest
    )


def leaves_out(config: PolicyConfig) -> bool:
    """Whether updates may skip completions whose advantages are all 0. They may if no other term of
    the loss (KL, entropy, a registered objective) has a gradient there."""
    kind = OBJECTIVES.get(config.objective, ("", {}))[0]
    return (
        kind in _OF_ADVANTAGES
        and config.objective != "trpo"
        and not (config.kl.placement == "loss" and config.kl.coef > 0)
        and config.loss.entropy_coef == 0
    )


def without_gradient(config: PolicyConfig, batch: PackedBatch) -> set[int]:
    """Return the indices of the completions that add nothing to the gradient of an update, because
    the loss leaves them out (loss_mask) or all of their advantages are exactly 0 (as in groups of
    equal rewards). Advantages of 0 do not matter if the batch has none yet, if a critic on the
    policy's trunk learns from it, or if other terms of the loss have a gradient (`leaves_out`)."""
    shared_critic = batch.returns is not None and config.own_critic is None
    moved_N = batch.trained_mask
    if batch.advantages is not None and not shared_critic and leaves_out(config):
        moving_N = batch.advantages != 0
        moved_N = moved_N & (moving_N if batch.held is None else moving_N | batch.held)
    elif batch.loss_mask is None:
        return set()
    moved_B = batch.counts_before(moved_N)[batch.cu_seqlens.long()].diff()
    return {b for b, count in enumerate(moved_B.tolist()) if not count}


def entropy_coefficient(config: PolicyConfig, batch: PackedBatch) -> float:
    """Return the weight of the entropy in the loss of a rollout. With an entropy target, the loss
    has the term entropy_coef |H - target|, where H is the mean entropy of the batch's actions
    (column old_entropy). The weight is then entropy_coef if H is below the target and -entropy_coef
    otherwise, the same for all micro-batches of the rollout."""
    loss = config.loss
    if loss.entropy_target is None:
        return loss.entropy_coef
    mean = batch.column("old_entropy")[batch.action_mask].double().mean().item()
    return loss.entropy_coef * (1.0 if mean < loss.entropy_target else -1.0)


class ValueScale(NamedTuple):
    """Scale of a rollout's value loss.

    Attributes:
        clip: how far values may move, in units of the reward; None: any distance.
        error: number that errors of values are divided by.
    """

    clip: float | None
    error: float

    @classmethod
    def of(cls, config: PolicyConfig, batch: PackedBatch, unit: float) -> ValueScale:
        """Derive the scale from a rollout's whole batch and the unit of the value head. How the
        batch is split does not matter. `clip` is a multiple of the unit: an absolute clip would
        stop values that have far to go.

        Errors are divided by the unit, or by the root mean square of all values' errors if that is
        larger. So no rollout's value loss is far above 1 / 2. Undivided, the value loss would grow
        with the square of the rewards. On a trunk shared with the policy it would then drown the
        policy's gradient if the rewards or the KL coefficient are large, or even if only one
        reward is large.

        If advantages are not whitened, the policy's gradient is proportional to the rewards.
        `objective_loss` then divides the value loss by `error`, not by the square of `error`, so
        that the value loss scales with the rewards as well. Otherwise it would drown the policy's
        gradient on a shared trunk when rewards are small.
        """
        clip = None if config.loss.value_clip is None else config.loss.value_clip * unit
        if batch.returns is None:
            return cls(clip, unit)
        errors_A = (batch.returns - batch.column("values"))[batch.action_mask].double()
        return cls(
            clip, max(unit, float(errors_A.square().mean().sqrt())) if len(errors_A) else unit
        )


def two_steps(
    config: PolicyConfig, objective: Objective, *, strict: bool, scored: bool
) -> str | None:
    """Return the reason why log-probabilities must be computed in a step before the loss
    (`objective_loss`). Return None if the head can compute the loss directly (`head_loss`).

    Args:
        strict: whether the actor is strict.
        scored: whether old_logp is known before the update.
    """
    reasons = {
        "a strict actor computes the head as its sampler does": strict,
        f"the objective {config.objective} is a function of log-probabilities": not isinstance(
            objective, PolicyObjective
        ),
        "kl.through_ratio is a function of log-probabilities": config.kl.through_ratio,
        "loss.kl_cov_ratio is a function of log-probabilities": config.loss.kl_cov_ratio > 0,
        "truncated rollouts are scored over the tokens they were drawn from": (
            config.generation.truncates
        ),
        "correction.off_policy_delta asks how far completions have been left": (
            config.correction.off_policy_delta is not None
        ),
        "old log-probabilities are this pass's own, and the loss needs them before": not scored
        and (
            config.correction.kind != "none"
            or (isinstance(objective, PolicyObjective) and objective.by_sequence)
        ),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _terms(
    config: PolicyConfig, kl_coef: float, batch: PackedBatch, entropy_coef: float | None
) -> dict[str, Any]:
    """Return the keyword arguments of the policy losses for everything but the objective itself."""
    kl, correction = config.kl, rollout_correction(config.correction)
    penalised = (
        kl.placement == "loss" and kl_coef > 0 and kl.estimator != "full" and not kl.through_ratio
    )
    terms: dict[str, Any] = {
        "entropy_coef": config.loss.entropy_coef if entropy_coef is None else entropy_coef,
        "ref_logp": batch.column("ref_logp") if penalised else None,
        "kl_coef": kl_coef if penalised else 0.0,
        "kl_estimator": kl.estimator if penalised else "k3",
        "kl_level": "sequence" if penalised and kl.level == "sequence" else "token",
    }
    if correction is not None:
        terms |= {"rollout_logp": batch.column("rollout_logp"), "rollout_correction": correction}
    return terms


def _value_coef(config: PolicyConfig, value: ValueScale) -> float:
    return config.loss.value_coef / value.error ** (2 if config.loss.whiten else 1)


def _with(
    total: Tensor, stats: PolicyStats, weights_N: Tensor, terms_N: list[Tensor]
) -> tuple[Tensor, PolicyStats]:
    """Return the loss and its statistics with more terms per token added."""
    for term_N in terms_N:
        added = (weights_N * torch.where(weights_N != 0, term_N, 0)).sum()
        total, stats = total + added, stats._replace(loss=stats.loss + added.detach())
    return total, stats


class HeadLoss(NamedTuple):
    """Result of `head_loss`."""

    loss: Tensor  # 0-d, differentiable
    policy: PolicyStats
    value: ValueStats | None
    logp: Tensor  # [N] float32, without gradient, as is entropy
    entropy: Tensor


def head_loss(
    config: PolicyConfig,
    objective: PolicyObjective,
    kl_coef: float,
    batch: PackedBatch,
    actor: HybridActor,
    hidden_NH: Tensor,
    values_N: Tensor | None,
    full_kl_N: Tensor | None = None,
    *,
    entropy_coef: float | None = None,
    value: ValueScale | None = None,
) -> HeadLoss:
    """Compute `objective_loss` from hidden states, in one pass over the actor's head. Allowed if
    `two_steps` returns None.

    Args are those of `objective_loss`. If the batch has no old_logp, the ratio is exactly 1.
    """
    old_N, weights_N, value = (
        batch.old_logp,
        batch.column("weights"),
        value or ValueScale(config.loss.value_clip, 1.0),
    )
    found = actor.policy_loss(
        batch,
        hidden_NH,
        weights_N,
        batch.column("advantages"),
        old_logp=old_N,
        temperature=config.generation.temperature,
        objective=objective,
        **_terms(config, kl_coef, batch, entropy_coef),
    )
    total, value_stats = found.loss, None
    if values_N is not None:
        part, value_stats = value_loss(
            values_N, batch.column("values"), batch.column("returns"), weights_N, clip=value.clip
        )
        total = total + _value_coef(config, value) * part
    total, stats = _with(
        total, found.stats, weights_N, [] if full_kl_N is None else [kl_coef * full_kl_N]
    )
    return HeadLoss(total, stats, value_stats, found.logp, found.entropy)


def _registered(
    config: PolicyConfig, objective: Callable[..., Tensor], batch: PackedBatch, logp_N: Tensor
) -> Tensor:
    """Return [N] terms of an objective that is a Python function, times the weights of the
    correction."""
    live_N, old_N = batch.column("weights") != 0, batch.column("old_logp")
    seen = (logp_N, old_N, batch.column("advantages"))
    call = partial(objective, *(torch.where(live_N, x, 0) for x in seen), batch)
    if isinstance(objective, SequenceRatio):  # built in: its errors are not the user's
        term_N = call()
    else:
        what = f"the objective {config.objective}"
        returned = blame(what, call, ConfigError, objective)
        term_N = per_token(f"{what}, {place_of(objective)}", returned, "terms", logp_N)
    correction = rollout_correction(config.correction)
    if correction is None:
        return term_N
    rolled_N = batch.column("rollout_logp")
    return rollout_weights(correction, old_N, rolled_N, live_N, batch.cu_seqlens) * term_N


def objective_loss(
    config: PolicyConfig,
    objective: Objective,
    kl_coef: float,
    batch: PackedBatch,
    logp_N: Tensor,
    entropy_N: Tensor | None,
    values_N: Tensor | None,
    full_kl_N: Tensor | None = None,
    *,
    entropy_coef: float | None = None,
    value: ValueScale | None = None,
) -> tuple[Tensor, PolicyStats, ValueStats | None]:
    """Return the loss of a micro-batch, with its policy and value statistics.

    The batch needs the columns weights, old_logp and advantages; values and returns if a critic is
    trained; and ref_logp if the KL is in the loss.

    Args:
        kl_coef: current KL coefficient, whether the KL is in the reward or in the loss.
        logp_N, entropy_N, values_N: outputs of the policy and the critic that are trained.
        full_kl_N: KL(policy || reference) at each token, for kl.estimator = full.
        entropy_coef: replaces the configuration's, as `entropy_coefficient` computes it.
        value: scale of the value loss; None: units of the reward.
    """
    kl, old_N, advantages_N, weights_N = (
        config.kl,
        batch.column("old_logp"),
        batch.column("advantages"),
        batch.column("weights"),
    )
    fused = isinstance(objective, PolicyObjective)
    if not fused:
        advantages_N = torch.zeros_like(advantages_N)
    common = _terms(config, kl_coef, batch, entropy_coef) | {
        "objective": objective if fused else _NONE,
        "entropy": entropy_N,
        "cu_seqlens": batch.cu_seqlens,
    }
    value_stats, value = None, value or ValueScale(config.loss.value_clip, 1.0)
    if values_N is None:
        total, stats = policy_loss(
            logp_N,
            old_N,
            advantages_N,
            weights_N,
            **common,
        )
    else:
        total, stats, value_stats = policy_value_loss(
            logp_N,
            old_N,
            advantages_N,
            weights_N,
            values_N,
            batch.column("values"),
            batch.column("returns"),
            value_clip=value.clip,
            value_coef=_value_coef(config, value),
            **common,
        )
    terms_N: list[Tensor] = []
    if not isinstance(objective, PolicyObjective):
        terms_N.append(_registered(config, objective, batch, logp_N))
    if full_kl_N is not None:
        terms_N.append(kl_coef * full_kl_N)
    if batch.held is not None:
        apart_N = (logp_N - old_N).abs()
        terms_N.append(config.loss.kl_cov_coef * torch.where(batch.held, apart_N, 0.0))
    if kl.placement == "loss" and kl_coef > 0 and kl.through_ratio:
        terms_N.append(
            kl_coef
            * ratio_kl(logp_N, old_N, batch.column("ref_logp"), weights_N != 0, kl.estimator)
        )
    return *_with(total, stats, weights_N, terms_N), value_stats
