"""What a policy update minimises, and how its tokens are weighted: descriptions and statistics of the losses in policy_loss.py.

    l_t = policy term (PolicyObjective) - entropy_coef * entropy_t          loss = sum_t weights_t * l_t          (token_weights)

Shapes    N tokens, B sequences, T steps. Sequence b owns the slots cu_seqlens[b] : cu_seqlens[b + 1] of N, or the row b of [B, T].
Source    Schulman et al. (2017), eq. 7; the dual clip is Ye et al. (2020), eq. 5; aggregations as in Shao et al. (2024), eq. 3
          (sequence_mean_token_mean), Yu et al. (2025), eq. 8 (token_mean) and Liu et al. (2025), Dr. GRPO (sequence_sum_norm).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.checks import check, check_dtype

_USES = {"clip": ("clip_low", "clip_high", "dual_clip"), "ratio": (), "reinforce": ()}
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_norm", "token_sum")


# ---- what is minimised -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PolicyObjective:
    """The policy term of the loss, per token, with ratio = exp(logp - old_logp) and advantage A.

    kind "clip": max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), and with `dual_clip` c, where A < 0, at most -A c.
    kind "ratio": -A ratio. kind "reinforce": -A logp.

    Raises:
        ValueError: an unknown kind, a bound out of range, or a field that the kind does not use and that is not at its default.
    """

    kind: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _USES:
            raise ValueError(f"PolicyObjective: expected kind to be one of {', '.join(_USES)}, got {self.kind!r}")
        for field in fields(self):
            if field.name != "kind" and field.name not in _USES[self.kind] and getattr(self, field.name) != field.default:
                raise ValueError(f"PolicyObjective: kind {self.kind!r} does not use {field.name}; leave it at {field.default!r}, "
                                 f"got {getattr(self, field.name)!r}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"PolicyObjective: expected 0 <= clip_low <= 1, got {self.clip_low!r}")
        if not self.clip_high >= 0:
            raise ValueError(f"PolicyObjective: expected clip_high >= 0, got {self.clip_high!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"PolicyObjective: expected dual_clip > 1 (3 is usual) or None, got {self.dual_clip!r}")

    @property
    def bounds(self) -> tuple[float, float, float]:
        """(lower, upper, dual): where the ratio stops to count; infinite where there is no bound."""
        if self.kind != "clip":
            return -math.inf, math.inf, math.inf
        return 1 - self.clip_low, 1 + self.clip_high, math.inf if self.dual_clip is None else self.dual_clip


# ---- what is reported --------------------------------------------------------------------------------------------------
class PolicyStats(NamedTuple):
    """0-d float32 tensors on the device of the loss, detached. Means are over unmasked tokens, each counting one whatever its weight.

    loss: sum of weights * (policy term - entropy_coef * entropy).
    clip_fraction_low, clip_fraction_high, clip_fraction_dual: tokens whose gradient a bound removed: ratio < 1 - clip_low with A < 0,
    ratio > 1 + clip_high with A > 0, ratio > dual_clip with A < 0.
    approx_kl_k1, approx_kl_k2, approx_kl_k3: KL(old || new) estimated by the means of -d, d^2 / 2 and exp(d) - 1 - d, d = logp - old_logp.
    ratio_mean, ratio_min, ratio_max: 1 without tokens. effective_sample_size: (sum ratio)^2 / sum ratio^2, in tokens.
    clamped_fraction: tokens with |d| > 20, where the exponential is cut and its gradient 0. entropy: 0 when none is given.
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
    entropy: Tensor
    tokens: Tensor


class ValueStats(NamedTuple):
    """0-d float32 tensors on the device of the loss, detached. Means are over unmasked tokens, each counting one whatever its weight.

    loss: sum of weights * value term, without the coefficient. clip_fraction: tokens whose gradient the clip removed.
    explained_variance: 1 - Var(returns - values) / Var(returns); 0 where the returns vary by less than float32 resolves.
    """

    loss: Tensor
    clip_fraction: Tensor
    explained_variance: Tensor
    value_mean: Tensor
    return_mean: Tensor
    tokens: Tensor


# ---- how tokens are weighted -------------------------------------------------------------------------------------------
def token_weights(mask: Tensor | None, aggregation: str, *, cu_seqlens: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """Weights of tokens in a loss, 0 where masked.

    Compute them once for everything that one optimizer step sees and cut them like the tokens: the denominators are then those of the
    whole, so any split into micro-batches adds up to the same gradient, and nothing is divided again.

    Args:
        mask: bool, [N] packed or [B, T] padded (each row a sequence), True where a token counts; None: every token of
            `cu_seqlens` does (one read by the host).
        aggregation: with n_b unmasked tokens in sequence b, and S sequences that have any, an unmasked token weighs
            "token_mean" 1 / sum_b n_b; "sequence_mean_token_mean" 1 / (S n_b); "sequence_mean_token_sum" 1 / S;
            "sequence_sum_norm" 1 / (S max_length); "token_sum" 1.
        cu_seqlens: [B + 1] int32 or int64, from 0 to N; needed by the sequence aggregations for a packed mask.
        max_length: the constant of "sequence_sum_norm": the longest completion allowed, not the longest seen.
    Returns:
        float32 in the shape of the mask; all 0 when nothing is unmasked.
    Raises:
        ValueError: an unknown aggregation, a missing or superfluous argument, sizes that do not agree. TypeError: dtypes.
    """
    op = "token_weights"
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"{op}: expected aggregation to be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if (aggregation == "sequence_sum_norm") != (max_length is not None):
        raise ValueError(f"{op}: expected max_length with sequence_sum_norm and with nothing else, got {aggregation} and max_length={max_length!r}")
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
        raise ValueError(f"{op}: expected cu_seqlens with a packed mask [N] only, got one with {list(mask.shape)}, whose rows are the sequences")
    if cu_seqlens is not None and cu_seqlens.numel() == 0:
        raise ValueError(f"{op}: expected cu_seqlens [B + 1], which is [0] for no sequences, got an empty tensor")

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


def _per_sequence(op: str, mask: Tensor, cu_seqlens: Tensor | None, padded: bool) -> tuple[Tensor, Tensor]:
    """Unmasked tokens of each token's sequence (broadcastable to the mask), and the number of sequences that have any."""
    if padded:
        counts_B = mask.sum(1)
        return counts_B[:, None], (counts_B > 0).sum()
    if cu_seqlens is None:
        raise ValueError(f"{op}: expected cu_seqlens with a packed mask {list(mask.shape)} for a sequence aggregation, got None")
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if mask.device.type == "cpu" and (bounds[0] != 0 or bounds[-1] != mask.numel() or bool((lengths < 0).any())):
        raise ValueError(f"{op}: expected cu_seqlens to rise from 0 to {mask.numel()}, the length of the mask, got {cu_seqlens.tolist()[:8]} ...")
    before = torch.cat([bounds.new_zeros(1), mask.cumsum(0)])
    counts_B = before[bounds[1:]] - before[bounds[:-1]]
    return torch.repeat_interleave(counts_B, lengths, output_size=mask.numel()), (counts_B > 0).sum()
