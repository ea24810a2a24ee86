"""policy_loss in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.objective import (
    COEFFICIENTS,
    MAX_LOG_RATIO,
    PolicyObjective,
    PolicyStats,
    RolloutCorrection,
    ValueStats,
    rollout_weights,
    sequence_log_ratio,
    sequence_sum,
)

_CLIP = PolicyObjective()


def policy_loss_reference(
    logp_N: Tensor,
    old_logp_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    objective: PolicyObjective = _CLIP,
    ref_logp_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_level: str = "token",
    entropy_N: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logp_N: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    part = PolicyPart(
        logp=logp_N,
        old_logp=old_logp_N,
        advantages=advantages_N,
        objective=objective,
        ref_logp=ref_logp_N,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_gradient=kl_gradient,
        kl_level=kl_level,
        entropy=entropy_N,
        entropy_coef=entropy_coef,
        rollout_logp=rollout_logp_N,
        rollout_correction=rollout_correction,
        cu_seqlens=cu_seqlens,
    )
    return part.reference(weights_N, part.derived(weights_N))


def _reference(
    logp_N: Tensor,
    old_logp_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    derived: Derived,
    objective: PolicyObjective,
    ref_logp_N: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_gradient: str | None,
    entropy_N: Tensor | None,
    entropy_coef: float,
) -> tuple[Tensor, PolicyStats]:
    live = weights_N != 0
    logp, advantages, weights = (
        torch.where(live, logp_N, 0),
        torch.where(live, advantages_N.detach(), 0),
        weights_N.detach(),
    )
    old_logp = logp.detach() if old_logp_N is None else torch.where(live, old_logp_N.detach(), 0)
    d = logp - old_logp
    clamped = _clamp(d)
    ratio = clamped.exp()
    terms, high, low, too_far = _policy_terms(
        objective, logp, d, ratio, advantages, derived.sequence_log_ratio
    )
    if derived.correction is not None:
        terms = terms * derived.correction
    kl = torch.zeros_like(d)
    if ref_logp_N is not None:
        k = logp - torch.where(live, ref_logp_N.detach(), 0)
        kl = _kl_term(k, kl_estimator, derived.kl_sum)
        if kl_coef:
            slope = _kl_term(k, kl_gradient or kl_estimator, derived.kl_sum)
            terms = terms + kl_coef * (kl.detach() + slope - slope.detach())
    if entropy_N is not None:
        terms = terms - entropy_coef * torch.where(live, entropy_N, 0)
    loss = (weights * terms).sum()

    return loss, _statistics(
        loss.detach(),
        live,
        d.detach(),
        ratio.detach(),
        (low, high, too_far),
        kl.detach(),
        entropy_N,
        derived.correction,
    )


@torch.no_grad()
def _statistics(
    loss: Tensor,
    live: Tensor,
    d: Tensor,
    ratio: Tensor,
    bounded: tuple[Tensor, Tensor, Tensor],
    kl: Tensor,
    entropy_N: Tensor | None,
    correction: Tensor | None,
) -> PolicyStats:
    """Compute the statistics as means over the unmasked tokens. bounded: masks of the tokens whose
    gradient the lower, the upper and the dual bound removed."""
    (low, high, too_far), clamped = bounded, _clamp(d)
    tokens = live.sum().to(loss.dtype)
    seen, any_token = tokens.clamp(min=1), tokens > 0
    infinity = ratio.new_full((1,), math.inf)
    k3 = (clamped.expm1() - d).clamp(min=0)
    live_ratio = torch.where(live, ratio, 0)
    return PolicyStats(
        loss=loss,
        clip_fraction_low=low.sum() / seen,
        clip_fraction_high=high.sum() / seen,
        clip_fraction_dual=too_far.sum() / seen,
        approx_kl_k1=-d.sum() / seen,
        approx_kl_k2=(d * d).sum() / 2 / seen,
        approx_kl_k3=k3.sum() / seen,
        ratio_mean=torch.where(any_token, live_ratio.sum() / seen, 1),
        ratio_min=torch.where(
            any_token, torch.cat([torch.where(live, ratio, math.inf), infinity]).amin(), 1
        ),
        ratio_max=torch.where(
            any_token, torch.cat([torch.where(live, ratio, -math.inf), -infinity]).amax(), 1
        ),
        effective_sample_size=torch.where(
            any_token, live_ratio.sum() ** 2 / (live_ratio**2).sum(), 0
        ),
        clamped_fraction=(d.abs() > MAX_LOG_RATIO).sum() / seen,
        ref_kl=kl.sum() / seen,
        entropy=torch.zeros_like(tokens)
        if entropy_N is None
        else torch.where(live, entropy_N, 0).sum() / seen,
        correction_mean=torch.ones_like(tokens)
        if correction is None
        else torch.where(any_token, torch.where(live, correction, 0).sum() / seen, 1),
        tokens=tokens,
    )


def _clamp(d: Tensor) -> Tensor:
    return torch.where(
        d > MAX_LOG_RATIO, MAX_LOG_RATIO, torch.where(d < -MAX_LOG_RATIO, -MAX_LOG_RATIO, d)
    )  # clamp() would give NaN a zero gradient


def _cut(x: Tensor, d: Tensor) -> Tensor:
    """Return x, without gradient where |d| is beyond the clamp."""
    return torch.where(d.abs() > MAX_LOG_RATIO, x.detach(), x)


def _policy_terms(
    objective: PolicyObjective,
    logp: Tensor,
    d: Tensor,
    ratio: Tensor,
    A: Tensor,
    log_s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the policy terms, and masks of the tokens that the upper, lower and dual bounds
    clipped."""
    kind, (lower, upper, dual, tau_positive, tau_negative, beta) = (
        objective.kind,
        objective.coefficients.values(),
    )
    high = low = too_far = torch.zeros_like(A, dtype=torch.bool)
    if kind == "reinforce":
        return -A * logp, high, low, too_far
    if kind == "dro":
        return -A * logp + beta * d * d / 2, high, low, too_far
    if kind == "kl_penalty":
        return -A * ratio + beta * _cut((_clamp(d).expm1() - d).clamp(min=0), d), high, low, too_far
    if kind == "cispo":
        high = ratio > upper
        return -A * torch.where(high, upper, ratio).detach() * logp, high, low, too_far
    if kind == "sapo":
        tau = torch.full_like(A, tau_negative).masked_fill(A > 0, tau_positive)
        return -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, high, low, too_far
    if log_s is not None:  # sg[s] exp(logp - sg[logp])
        ratio = _cut(_clamp(log_s).exp() * (logp - logp.detach()).exp(), log_s)
    if kind == "geometric_mean":
        high, low = (A > 0) & (d > upper), (A < 0) & (d < lower)
        return -A * torch.where(high | low, ratio.detach(), ratio), high, low, too_far
    high, low, too_far = (
        (A > 0) & (ratio > upper),
        (A < 0) & (ratio < lower),
        (A < 0) & (ratio > dual),
    )
    return (
        -A * torch.where(high, upper, torch.where(low, lower, torch.where(too_far, dual, ratio))),
        high,
        low,
        too_far,
    )


def _kl_term(k: Tensor, estimator: str, kl_sum: Tensor | None) -> Tensor:
    if kl_sum is not None:
        return kl_sum * (k.detach() / 2 + k - k.detach())
    if estimator == "k3":
        return _cut((_clamp(-k).expm1() + k).clamp(min=0), k)
    return {"k1": k, "k2": k * k / 2, "abs": k.abs()}[estimator]


class Derived(NamedTuple):
    """Per-token constants [N], or None, computed from the tokens' sequences and from the
    rollout."""

    correction: Tensor | None
    sequence_log_ratio: Tensor | None
    kl_sum: Tensor | None


class PolicyPart(NamedTuple):
    """Arguments of the policy part of a call, as policy_loss documents them. `logp` is None if
    there is no policy part, or if it is not known yet."""

    logp: Tensor | None = None
    old_logp: Tensor | None = None
    advantages: Tensor | None = None
    objective: PolicyObjective = _CLIP
    ref_logp: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str | None = None
    kl_level: str = "token"
    entropy: Tensor | None = None
    entropy_coef: float = 0.0
    rollout_logp: Tensor | None = None
    rollout_correction: RolloutCorrection | None = None
    cu_seqlens: Tensor | None = None

    @property
    def by_sequence(self) -> bool:
        """Whether a token's term depends on the logp of other tokens."""
        return self.objective.by_sequence or self.kl_level == "sequence"

    def derived(self, weights_N: Tensor) -> Derived:
        """Compute the per-token constants of the loss. Needs `logp` if the part is by sequence."""
        correction = log_s = kl_sum = None
        live = weights_N != 0
        if (
            self.rollout_correction is not None
            and self.rollout_logp is not None
            and self.old_logp is not None
        ):
            correction = rollout_weights(
                self.rollout_correction, self.old_logp, self.rollout_logp, live, self.cu_seqlens
            )
        if self.logp is not None and self.cu_seqlens is not None:
            if (
                self.objective.by_sequence
                and self.old_logp is not None
                and self.advantages is not None
            ):
                log_s = sequence_log_ratio(
                    self.objective, self.logp, self.old_logp, self.advantages, live, self.cu_seqlens
                )
            if self.kl_level == "sequence" and self.ref_logp is not None:
                kl_sum = sequence_sum(
                    torch.where(live, self.logp.detach() - self.ref_logp.detach(), 0),
                    self.cu_seqlens,
                ).to(self.logp.dtype)
        return Derived(correction, log_s, kl_sum)

    def reference(self, weights_N: Tensor, derived: Derived) -> tuple[Tensor, PolicyStats]:
        """Return the policy loss and its statistics by the torch reference."""
        if self.logp is None or self.advantages is None:
            raise TypeError(
                f"policy_loss: expected tensors for logp and advantages, got {self.logp!r} and "
                f"{self.advantages!r}"
            )
        return _reference(
            self.logp,
            self.old_logp,
            self.advantages,
            weights_N,
            derived,
            self.objective,
            self.ref_logp,
            self.kl_coef,
            self.kl_estimator,
            self.kl_gradient,
            self.entropy,
            self.entropy_coef,
        )

    def settings(
        self, value_clip: float = math.inf, value_coef: float = 0.0
    ) -> tuple[str, str, str, list[float]]:
        """Return the kernels' arguments that are not tensors: the kind, the estimators of the KL's
        value and slope, and COEFFICIENTS."""
        of_sequence = self.kl_level == "sequence"
        value, slope = (
            ("sequence_k2",) * 2
            if of_sequence
            else (self.kl_estimator, self.kl_gradient or self.kl_estimator)
        )
        given = self.objective.coefficients | {
            "kl_coef": self.kl_coef,
            "entropy_coef": self.entropy_coef,
            "value_clip": value_clip,
            "value_coef": value_coef,
        }
        return self.objective.kind, value, slope, [float(given[name]) for name in COEFFICIENTS]


def value_loss_reference(
    values_N: Tensor,
    old_values_N: Tensor | None,
    returns_N: Tensor,
    weights_N: Tensor,
    *,
    clip: float | None = None,
) -> tuple[Tensor, ValueStats]:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    live = weights_N != 0
    values, returns, weights = (
        torch.where(live, values_N, 0),
        torch.where(live, returns_N.detach(), 0),
        weights_N.detach(),
    )
    squares = (values - returns) ** 2
    clipped = torch.zeros_like(live)
    if clip is not None and old_values_N is not None:
        old = torch.where(live, old_values_N.detach(), 0)
        bounded = torch.where(
            values > old + clip, old + clip, torch.where(values < old - clip, old - clip, values)
        )
        clipped = (bounded != values) & ((bounded - returns) ** 2 > squares)
        squares = torch.where(clipped, (bounded - returns) ** 2, squares)
    loss = (weights * squares).sum() / 2

    with torch.no_grad():
        tokens = live.sum().to(loss.dtype)
        seen = tokens.clamp(min=1)
        return_mean = returns.sum() / seen
        spread, unexplained = (
            _squared_deviations(torch.where(live, x - x.sum() / seen, 0), seen)
            for x in (returns, returns - values)
        )
        varies = spread > seen * (torch.finfo(torch.float32).eps * return_mean) ** 2
        stats = ValueStats(
            loss=loss.detach(),
            clip_fraction=clipped.sum() / seen,
            explained_variance=torch.where(varies, 1 - unexplained / spread, 0),
            value_mean=values.sum() / seen,
            return_mean=return_mean,
            tokens=tokens,
        )
    return loss, stats


def _squared_deviations(deviations_N: Tensor, seen: Tensor) -> Tensor:
    """Return the sum of squared deviations, corrected for the rounding of the mean."""
    return deviations_N.square().sum() - deviations_N.sum() ** 2 / seen
