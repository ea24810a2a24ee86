"""What an update minimises, by name: the kernel's objectives with the engine's bounds, and those
that users register; with KL, entropy and values beside.

    loss = sum_t w_t (correction_t policy term_t + kl_coef kl_t - entropy_coef H_t) + value_coef
        sum_t w_t value term_t

correction_t makes up for a sampler that is not the trainer (CorrectionConfig); it is 1 without one.
A registered objective gives the policy terms:
f(logp_N, old_logp_N, advantages_N, batch) -> [N], differentiable in logp_N; correction, weights,
KL, entropy and statistics are added around it. The built-in ones are fused (kernels/policy_loss/),
but for `SequenceRatio`.
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
_NONE = PolicyObjective(kind="reinforce")  # of advantages that are 0
# kinds whose term has no gradient where the advantage is 0, whatever the ratio
_OF_ADVANTAGES = {"reinforce", "ratio", "clip", "gspo", "cispo", "sapo", "geometric_mean"}


def register_objective(name: str) -> Callable[[ObjectiveFunction], ObjectiveFunction]:
    """Make a function known as `loss.objective = name`."""

    def register(function: ObjectiveFunction) -> ObjectiveFunction:
        _REGISTERED[name] = function
        return function

    return register


def make_objective(config: PolicyConfig, penalty: float) -> Objective:
    """The configuration's objective; `penalty` is the coefficient of ppo_penalty, which adapts.

    Raises:
        ConfigError: an unknown name, or a bound that the objective has no use for.
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
    """The clipped ratio of whole completions, on whatever the advantage says of each (monte_carlo:
    its reward itself, with no baseline and no critic).

        s = exp(sum_t logp_t - old_logp_t)
        term = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    The term of every token is its completion's, so that with the weights of
    sequence_mean_token_mean the loss is the mean over completions; A is the mean over the
    completion's tokens. The logarithm of s is cut at +-20 and has no gradient beyond. The
    importance weight E_p[f] = E_q[f p / q] in full: unbiased, and as noisy as E_p[f^2 p / q] is
    large, which is why it serves for study and PPO takes ratios of tokens. A KL belongs, detached,
    into the reward:
    outside the ratio its expected gradient is 0.
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
    """e^x, cut at +-20 and without gradient beyond; NaN stays NaN."""
    return torch.where(
        x.abs() > MAX_LOG_RATIO, x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), x
    ).exp()


def ratio_kl(
    logp_N: Tensor, old_logp_N: Tensor, ref_logp_N: Tensor, mask_N: Tensor, estimator: str
) -> Tensor:
    """[N] ratio * k, ratio = exp(logp - old_logp) and k the estimator k1 or k3 of KL(policy ||
    reference), differentiable through both; 0 where masked.

    Its expectation over tokens of the old policy is that of k over the policy's own, at every
    state, and so is its gradient: that of KL(pi || ref) for k1 and k3 alike (DeepSeek-V3.2, 2025,
    eq. 7). In float64; log ratios are cut at +-20 inside exponentials, and have no gradient beyond.
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
    """Translate the options of a correction for the kernels; None: no correction."""
    return (
        None
        if config.kind == "none"
        else RolloutCorrection(config.kind, config.level, cap=config.high, floor=config.floor)
    )


def behaviour(
    config: CorrectionConfig, batch: PackedBatch, logp_N: Tensor | None
) -> tuple[PackedBatch, Tensor | None]:
    """The batch as its sampler is to be judged: old_logp is rollout_logp where it is bypassed, and
    advantages are 0 at all tokens with a negative one of completions that the policy, logp_N, has
    left by more than off_policy_delta (needed for that alone). Beside it how many tokens those are,
    or None."""
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
    """Measure the weights exp(old_logp - rollout_logp) before any bound: mean, max, effective
    sample size as a fraction, chi2 = E[w^2] - 1 under the sampler; and the fraction of tokens whose
    weight a bound changed. Over tokens, or completions at the sequence level. Empty without a
    correction."""
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
    """[N] weights of one optimizer step's tokens; its cut into micro-batches then changes
    nothing."""
    aggregation = config.loss.aggregation
    longest = config.generation.max_new_tokens if aggregation == "sequence_sum_norm" else None
    return token_weights(
        batch.action_mask, aggregation, cu_seqlens=batch.cu_seqlens, max_length=longest
    )


def leaves_out(config: PolicyConfig) -> bool:
    """Whether updates leave out completions whose advantages are all 0: nothing else in the loss
    has a gradient there, be it KL, entropy, values or a registered objective."""
    kind = OBJECTIVES.get(config.objective, ("", {}))[0]
    return (
        kind in _OF_ADVANTAGES
        and config.objective != "trpo"
        and not (config.kl.placement == "loss" and config.kl.coef > 0)
        and config.loss.entropy_coef == 0
    )


def without_gradient(config: PolicyConfig, batch: PackedBatch) -> set[int]:
    """The completions, by number, that add nothing to the gradient of an update: all of their
    advantages are exactly 0, as in groups of equal rewards. None where the batch has no
    advantages, where a critic on the policy's trunk learns from it, or where the loss has terms
    beside (`leaves_out`)."""
    shared_critic = batch.returns is not None and config.own_critic is None
    if batch.advantages is None or shared_critic or not leaves_out(config):
        return set()
    moved_N = batch.action_mask & (batch.advantages != 0)
    moved_B = batch.counts_before(moved_N)[batch.cu_seqlens.long()].diff()
    return {b for b, count in enumerate(moved_B.tolist()) if not count}


def entropy_coefficient(config: PolicyConfig, batch: PackedBatch) -> float:
    """The weight of the entropy in the loss of a rollout. With an entropy target the slope of
    entropy_coef |H - target| in H, the mean entropy of the batch's actions (its column
    old_entropy): the same for all of a rollout's micro-batches, however they are cut."""
    loss = config.loss
    if loss.entropy_target is None:
        return loss.entropy_coef
    mean = batch.column("old_entropy")[batch.action_mask].double().mean().item()
    return loss.entropy_coef * (1.0 if mean < loss.entropy_target else -1.0)


class ValueScale(NamedTuple):
    """Unit in which the value loss of a rollout counts. `clip`: how far values may move, in
    rewards, or None. `error`: what errors are divided by."""

    clip: float | None
    error: float

    @classmethod
    def of(cls, config: PolicyConfig, batch: PackedBatch, unit: float) -> ValueScale:
        """Derive it from a rollout's batch, however that is cut, and the unit of the head. The clip
        is so many units: absolute, it would stop values that have far to go.

        An error is divided by the unit, or where it is larger by the root mean square of what all
        values are off by, so that no rollout's value loss is far above 1 / 2. In rewards it grows
        with their square, which on a trunk that the policy shares would drown the policy's gradient
        wherever rewards, or the KL's coefficient, are large, or one reward is. On a shared trunk
        `objective_loss` multiplies by the error once where advantages are not whitened: the
        policy's gradient is counted in rewards then, and drowned where they are small."""
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
    """Why log-probabilities are needed by themselves before there is a loss (`objective_loss`);
    None: the loss comes out of the head (`head_loss`).

    scored: old_logp is known before the update.
    """
    reasons = {
        "a strict actor computes the head as its sampler does": strict,
        f"the objective {config.objective} is a function of log-probabilities": not isinstance(
            objective, PolicyObjective
        ),
        "kl.through_ratio is a function of log-probabilities": config.kl.through_ratio,
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
    """The keywords of the policy losses that say what stands beside the objective."""
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
    """The loss with more terms of its tokens."""
    for term_N in terms_N:
        added = (weights_N * torch.where(weights_N != 0, term_N, 0)).sum()
        total, stats = total + added, stats._replace(loss=stats.loss + added.detach())
    return total, stats


class HeadLoss(NamedTuple):
    """Result of `head_loss`."""

    loss: Tensor  # 0-d, differentiable
    policy: PolicyStats
    value: ValueStats | None
    logp: Tensor  # [N] float32, a constant, as the entropy
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
    """`objective_loss` of what the actor's head says of these hidden states, in one pass over it:
    where `two_steps` has nothing against it.

    Args: those of `objective_loss`. old_logp may be missing; the ratio is then exactly 1.
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
    """[N] terms of an objective that is a function, times the weights of the correction."""
    live_N, old_N = batch.column("weights") != 0, batch.column("old_logp")
    seen = (logp_N, old_N, batch.column("advantages"))
    call = partial(objective, *(torch.where(live_N, x, 0) for x in seen), batch)
    if isinstance(objective, SequenceRatio):  # ours, whose errors are
        term_N = call()
    else:
        what = f"the objective {config.objective}"
        returned = blame(what, call, ConfigError)
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
    """The loss of a micro-batch with the columns weights, old_logp and advantages; values, returns
    where a critic is trained; ref_logp with the KL in the loss.

    Args:
        kl_coef: the coefficient now, wherever the KL is placed.
        logp_N, entropy_N, values_N: of the policy and critic that are trained.
        full_kl_N: KL(policy || reference) at each token, for kl.estimator = full.
        entropy_coef: in place of the configuration's, as `entropy_coefficient` gives it.
        value: what values count in; None: rewards.
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
    if kl.placement == "loss" and kl_coef > 0 and kl.through_ratio:
        terms_N.append(
            kl_coef
            * ratio_kl(logp_N, old_N, batch.column("ref_logp"), weights_N != 0, kl.estimator)
        )
    return *_with(total, stats, weights_N, terms_N), value_stats
