"""Settings and statistics of the losses in policy_loss/: the policy terms that an update can
minimise, and the weights of its tokens.

    l_t = correction_t * policy term_t (PolicyObjective, RolloutCorrection) + kl_coef * kl_t -
        entropy_coef * entropy_t
    loss = sum_t weights_t * l_t (token_weights)

Shapes    N tokens, B sequences, T steps. Sequence b is the slice cu_seqlens[b] : cu_seqlens[b + 1]
          of N, or row b of [B, T].
Source    clip, kl_penalty: Schulman et al. (2017), eq. 7 and 8; the dual clip is Ye et al. (2020),
          eq. 5; gspo: Zheng et al. (2025), group sequence policy optimization; cispo: MiniMax-M1
          (2025); sapo: Gao et al. (2025), soft adaptive policy optimization; geometric_mean: Zhao
          et al. (2025), GMPO; dro: Richemond et al. (2024), offline regularised RL. Aggregations as
          in Shao et al. (2024), eq. 3 (sequence_mean_token_mean), Yu et al. (2025), eq. 8
          (token_mean) and Liu et al. (2025), Dr. GRPO (sequence_sum_norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.kl import ESTIMATORS, MAX_LOG_RATIO
from fusedrl.kernels.runtime.checks import check, check_dtype

# kind -> the fields that it uses and their defaults. C++ and CUDA look a kind up by its name:
# FUSEDRL_KINDS in csrc/shared/objectives.h.
_DEFAULTS: dict[str, dict[str, float | None]] = {
    "clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "ratio": {},
    "reinforce": {},
    "kl_penalty": {"beta": 1.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_max": 5.0},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "geometric_mean": {"clip_low": 0.4, "clip_high": 0.4},
    "dro": {"beta": 1.0},
}
KINDS = tuple(_DEFAULTS)
SEQUENCE_KINDS = ("gspo", "geometric_mean")  # a term depends on other tokens of the sequence
KL_ESTIMATORS = ESTIMATORS  # per token; kernels have one more, "sequence_k2"
# The numbers that kernels take, in the order of FUSEDRL_COEFFICIENTS in that file.
COEFFICIENTS = (
    "lower",
    "upper",
    "dual",
    "tau_positive",
    "tau_negative",
    "beta",
    "kl_coef",
    "entropy_coef",
    "value_clip",
    "value_coef",
)
AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_norm",
    "token_sum",
)


# ---- what is minimised ---------------------------------------------------------------------------
@dataclass(frozen=True)
class PolicyObjective:
    """Kind and settings of the policy term of the loss. Per token, lp = logp, d = logp - old_logp,
    ratio = exp(d), A is the advantage, and sg[] stops the gradient.

    "clip"            max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), and with
                      `dual_clip` c, where A < 0, at most -A c
    "ratio"           -A ratio
    "reinforce"       -A lp
    "kl_penalty"      -A ratio + beta (ratio - 1 - d): the second part estimates KL(old || new), its
                      value and its gradient
    "cispo"           -A sg[min(ratio, clip_max)] lp: a cap on the weight, no token loses its
                      gradient. clip_max bounds the ratio itself.
    "sapo"            -A sigmoid(tau (ratio - 1)) 4 / tau, tau = tau_positive where A > 0, else
                      tau_negative; slope -A at ratio 1
    "dro"             -(A lp - beta d^2 / 2), A the soft advantage: the token-level form of an
                      objective stated for whole completions
    "gspo"            "clip" with the sequence's s = exp(mean d) in place of the ratio, as sg[s]
                      exp(lp - sg[lp])
    "geometric_mean"  -A sg[s] exp(lp - sg[lp]), s = exp(mean c), c = min(d, clip_high) where A > 0,
                      else max(d, -clip_low): bounds of the log
                      ratio. A token beyond its bound has no gradient.

    "gspo" and "geometric_mean" need `cu_seqlens`; their means are over a sequence's unmasked
    tokens. They are written per token, so every token has its own advantage and weight. If both are
    constant within a sequence (as with sequence_mean_token_mean), value and gradient equal those of
    the sequence objective.

    A field that is None takes the default of its kind: clip 0.2 and 0.2 with no dual clip; gspo
    3e-4 and 4e-4 (at 0.2 it never clips); geometric_mean 0.4 and 0.4; cispo 5.0; sapo 1.0 and 1.05;
    beta 1.0.

    Raises:
        ValueError: the kind is unknown, a number is out of range, or a field that the kind does not
            use is not None.
    """

    kind: str = "clip"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    clip_max: float | None = None
    tau_positive: float | None = None
    tau_negative: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULTS:
            raise ValueError(
                f"PolicyObjective: expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}"
            )
        used = _DEFAULTS[self.kind]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kind" or (value is None and field.name not in used):
                continue
            if field.name not in used:
                raise ValueError(
                    f"PolicyObjective: kind {self.kind!r} does not use {field.name}; leave it at "
                    f"None, got {value!r}"
                )
            if value is None:
                object.__setattr__(self, field.name, used[field.name])
        ranges = [
            ("clip_low", 0.0, 1.0 if self.kind in ("clip", "gspo") else math.inf),
            ("clip_high", 0.0, math.inf),
            ("beta", 0.0, math.inf),
        ]
        for name, lowest, highest in ranges:
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                bound = (
                    f"{lowest:g} <= {name} <= {highest:g}"
                    if highest < math.inf
                    else f"{name} >= {lowest:g}"
                )
                raise ValueError(f"PolicyObjective: expected {bound}, got {value!r}")
        for name in ("clip_max", "tau_positive", "tau_negative"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"PolicyObjective: expected a finite {name} > 0, got {value!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                "PolicyObjective: expected dual_clip > 1 (3 is usual) or None, got "
                f"{self.dual_clip!r}"
            )

    @property
    def by_sequence(self) -> bool:
        """Whether a token's term depends on the other tokens of its sequence."""
        return self.kind in SEQUENCE_KINDS

    @property
    def bounds(self) -> tuple[float, float, float]:
        """(lower, upper, dual) bounds of the ratio (geometric_mean: of its logarithm); infinite
        where there is no bound."""
        if self.clip_max is not None:
            return -math.inf, self.clip_max, math.inf
        if self.clip_low is None or self.clip_high is None:
            return -math.inf, math.inf, math.inf
        one = 0.0 if self.kind == "geometric_mean" else 1.0
        return (
            one - self.clip_low,
            one + self.clip_high,
            math.inf if self.dual_clip is None else self.dual_clip,
        )

    @property
    def coefficients(self) -> dict[str, float]:
        """Return those of COEFFICIENTS that the objective sets: the bounds, tau_positive,
        tau_negative, beta; tau 1 and beta 0 where unused."""
        lower, upper, dual = self.bounds
        return {
            "lower": lower,
            "upper": upper,
            "dual": dual,
            "tau_positive": self.tau_positive or 1.0,
            "tau_negative": self.tau_negative or 1.0,
            "beta": self.beta or 0.0,
        }


@dataclass(frozen=True)
class RolloutCorrection:
    """Importance weights for tokens that another program sampled: the policy term is multiplied by
    w = exp(old_logp - rollout_logp), detached.

    The log of a weight is clamped at +-20. Do not use this correction if old_logp comes from the
    rollout itself: every weight is then 1.

    Attributes:
        kind: "truncated": min(w, cap). "masked": w, but 0 where w > cap or w < floor, which removes
            such tokens from the policy term. "sequence_masked": w, but 0 at all tokens of a
            sequence if the geometric mean of its w is above cap or below floor (needs cu_seqlens).
        level: "token": one w per token. "sequence": every token of a sequence gets the product of w
            over the sequence's unmasked tokens (needs cu_seqlens).
        cap, floor: bounds of w, as `kind` uses them.

    Raises:
        ValueError: the kind or level is unknown, the cap is not above 0, or the floor is outside
            [0, cap) or given with "truncated".
    """

    kind: str = "truncated"
    level: str = "token"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("truncated", "masked", "sequence_masked"):
            raise ValueError(
                "RolloutCorrection: expected kind to be truncated, masked or sequence_masked, got "
                f"{self.kind!r}"
            )
        if self.level not in ("token", "sequence"):
            raise ValueError(
                f"RolloutCorrection: expected level to be token or sequence, got {self.level!r}"
            )
        if not self.cap > 0:
            raise ValueError(f"RolloutCorrection: expected cap > 0, got {self.cap!r}")
        if not 0 <= self.floor < self.cap or (self.floor and self.kind == "truncated"):
            raise ValueError(
                "RolloutCorrection: expected 0 <= floor < cap, and 0 unless masked, got floor "
                f"{self.floor!r} with kind {self.kind!r}"
            )

    @property
    def by_sequence(self) -> bool:
        """Whether a token's weight depends on the other tokens of its sequence."""
        return self.level == "sequence" or self.kind == "sequence_masked"


# ---- what is reported ----------------------------------------------------------------------------
class PolicyStats(NamedTuple):
    """Statistics of the policy term: 0-d float32 tensors on the device of the loss, detached.

    Means are over unmasked tokens and ignore the tokens' weights. Statistics of ratios use the
    ratio of each token, also for kinds that use a ratio of the sequence.

    Attributes:
        loss: sum of weights * (correction * policy term + kl_coef * kl - entropy_coef * entropy).
        clip_fraction_low, clip_fraction_high, clip_fraction_dual: fraction of tokens whose gradient
            a bound removed: ratio < 1 - clip_low with A < 0, ratio > 1 + clip_high with A > 0,
            ratio > dual_clip with A < 0 (gspo: the sequence's ratio; geometric_mean: the log ratio
            and its bounds). For cispo clip_fraction_high is the fraction of ratios above clip_max,
            whose gradient is capped.
        approx_kl_k1, approx_kl_k2, approx_kl_k3: KL(old || new) estimated by the means of -d,
            d^2 / 2 and exp(d) - 1 - d, where d = logp - old_logp.
        ratio_mean, ratio_min, ratio_max: mean, minimum and maximum of the ratio; 1 if there are no
            tokens.
        effective_sample_size: (sum ratio)^2 / sum ratio^2, in tokens.
        clamped_fraction: fraction of tokens with |d| > 20, where the exponential is clamped and its
            gradient 0.
        ref_kl: mean KL to the reference, by the estimator of the KL term; 0 without a reference.
        entropy: mean of the given entropy; 0 if none is given.
        correction_mean: mean of the rollout correction's weights; 1 without a correction.
        tokens: how many were unmasked.
    """

    loss: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    clip_fraction_dual: Tensor
    approx_kl_k1: Tensor
    approx_kl_k2: Tensor
    approx_kl_k3: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    effective_sample_size: Tensor
    clamped_fraction: Tensor
    ref_kl: Tensor
    entropy: Tensor
    correction_mean: Tensor
    tokens: Tensor


class ValueStats(NamedTuple):
    """Statistics of the value term: 0-d float32 tensors on the device of the loss, detached.

    Means are over unmasked tokens and ignore the tokens' weights.

    Attributes:
        loss: sum of weights * value term, without the coefficient.
        clip_fraction: fraction of tokens whose gradient the clip removed.
        explained_variance: 1 - Var(returns - values) / Var(returns); 0 where the returns vary by
            less than float32 resolves.
        value_mean, return_mean: mean of the values, and of the returns that are their targets.
        tokens: how many were unmasked.
    """

    loss: Tensor
    clip_fraction: Tensor
    explained_variance: Tensor
    value_mean: Tensor
    return_mean: Tensor
    tokens: Tensor


# ---- how tokens are weighted ---------------------------------------------------------------------
def token_weights(
    mask: Tensor | None,
    aggregation: str,
    *,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Compute the weight of each token in a loss; masked tokens get 0.

    Compute the weights once for all tokens of one optimizer step, then split them into
    micro-batches together with the tokens. The denominators are then those of the whole step. So
    every split adds up to the same gradient, without another division.

    Args:
        mask: bool, [N] packed or [B, T] padded (each row a sequence), True where a token counts. If
            None, every token of `cu_seqlens` counts (the host reads one number).
        aggregation: how to weight tokens. With n_b unmasked tokens in sequence b, and S sequences
            that have unmasked tokens, the weight of an unmasked token is "token_mean" 1 / sum_b
            n_b; "sequence_mean_token_mean" 1 / (S n_b); "sequence_mean_token_sum" 1 / S;
            "sequence_sum_norm" 1 / (S max_length); "token_sum" 1.
        cu_seqlens: [B + 1] int32 or int64, from 0 to N; needed by the sequence aggregations if the
            mask is packed.
        max_length: constant in "sequence_sum_norm": the largest allowed length of a completion, not
            the largest one in the batch.
    Returns:
        float32 in the shape of the mask; all 0 if every token is masked.
    Raises:
        ValueError: the aggregation is unknown, an argument is missing or superfluous, or sizes do
            not agree.
        TypeError: a dtype is not supported.
    """
    op = "token_weights"
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"{op}: expected aggregation to be one of {', '.join(AGGREGATIONS)}, got "
            f"{aggregation!r}"
        )
    if (aggregation == "sequence_sum_norm") != (max_length is not None):
        raise ValueError(
            f"{op}: expected max_length with sequence_sum_norm and with nothing else, got "
            f"{aggregation} and max_length={max_length!r}"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"{op}: expected max_length >= 1, got {max_length!r}")
    if mask is None:
        if cu_seqlens is None:
            raise ValueError(f"{op}: expected a mask, cu_seqlens, or both, got neither")
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    padded = mask.ndim == 2
    check(op, {"mask": (mask, "B T" if padded else "N"), "cu_seqlens": (cu_seqlens, "E")})
    check_dtype(op, "mask", mask, (torch.bool,))
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if padded and cu_seqlens is not None:
        raise ValueError(
            f"{op}: expected cu_seqlens with a packed mask [N] only, got one with "
            f"{list(mask.shape)}, whose rows are the sequences"
        )
    if cu_seqlens is not None and cu_seqlens.numel() == 0:
        raise ValueError(
            f"{op}: expected cu_seqlens [B + 1], which is [0] for no sequences, got an empty tensor"
        )

    if aggregation == "token_sum":
        weight = torch.ones((), dtype=torch.float64, device=mask.device)
    elif aggregation == "token_mean":
        weight = mask.sum().clamp(min=1).double().reciprocal()
    else:
        per_token, sequences = _per_sequence(op, mask, cu_seqlens, padded)
        weight = sequences.clamp(min=1).double().reciprocal()
        if aggregation == "sequence_mean_token_mean":
            weight = weight / per_token.clamp(min=1)
        elif max_length is not None:
            weight = weight / max_length
    return torch.where(mask, weight, 0).float()


def _per_sequence(
    op: str, mask: Tensor, cu_seqlens: Tensor | None, padded: bool
) -> tuple[Tensor, Tensor]:
    """Return the number of unmasked tokens in each token's sequence (broadcastable to the mask),
    and the number of sequences that have unmasked tokens."""
    if padded:
        counts_B = mask.sum(1)
        return counts_B[:, None], (counts_B > 0).sum()
    if cu_seqlens is None:
        raise ValueError(
            f"{op}: expected cu_seqlens with a packed mask {list(mask.shape)} for a sequence "
            "aggregation, got None"
        )
    check_bounds(op, cu_seqlens, mask.numel())
    bounds = cu_seqlens.long()
    before = torch.cat([bounds.new_zeros(1), mask.cumsum(0)])
    counts_B = before[bounds[1:]] - before[bounds[:-1]]
    return torch.repeat_interleave(counts_B, bounds.diff(), output_size=mask.numel()), (
        counts_B > 0
    ).sum()


# ---- what a token takes from its sequence --------------------------------------------------------
def check_bounds(op: str, cu_seqlens: Tensor, N: int) -> None:
    """Raise ValueError unless `cu_seqlens` [B + 1], a CPU tensor, rises from 0 to N."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != N or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{op}: expected cu_seqlens to rise from 0 to {N}, the number of tokens, got "
            f"{cu_seqlens.tolist()[:8]} ..."
        )


def sequence_sum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return, for each token, the sum of x over the token's sequence, in double."""
    lengths_B = cu_seqlens.long().diff()
    sums_B = torch.segment_reduce(x_N.double(), "sum", lengths=lengths_B, unsafe=True, initial=0.0)
    return torch.repeat_interleave(sums_B, lengths_B, output_size=x_N.numel())


def sequence_log_ratio(
    objective: PolicyObjective,
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantages_N: Tensor,
    live_N: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Return log s of each token's sequence, as "gspo" or "geometric_mean" defines s; [N],
    detached."""
    d = torch.where(live_N, logp_N.detach() - old_logp_N.detach(), 0)
    if objective.kind == "geometric_mean":
        low, high, _ = objective.bounds
        d = torch.where(
            torch.where(live_N, advantages_N, 0) > 0,
            torch.where(d > high, high, d),
            torch.where(d < low, low, d),
        )
    return (sequence_sum(d, cu_seqlens) / sequence_sum(live_N, cu_seqlens).clamp(min=1)).to(d.dtype)


def rollout_weights(
    correction: RolloutCorrection,
    old_logp_N: Tensor,
    rollout_logp_N: Tensor,
    live_N: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return the factor by which `correction` multiplies each token's policy term; [N],
    detached."""
    each = log_w = torch.where(live_N, old_logp_N.detach() - rollout_logp_N.detach(), 0)
    if correction.level == "sequence" and cu_seqlens is not None:
        log_w = sequence_sum(each, cu_seqlens).to(each.dtype)
    w = judged = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if correction.kind == "truncated":
        return w.clamp(max=correction.cap)
    if correction.kind == "sequence_masked" and cu_seqlens is not None:
        judged = (
            (sequence_sum(each, cu_seqlens) / sequence_sum(live_N, cu_seqlens).clamp(min=1))
            .clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            .exp()
        )
    return torch.where((judged > correction.cap) | (judged < correction.floor), 0, w)
