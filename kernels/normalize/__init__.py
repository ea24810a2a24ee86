"""Normalisation over a batch: masked whitening, advantages within groups, and moments that run on
from batch to batch.

    masked_whiten     (x - mean) / sqrt(variance + eps), + mean where the mean is to stay
    group_normalize   grpo (s - mean_g) / (std_g + eps)     dr_grpo s - mean_g
                      rloo s - mean of the others = G / (G - 1) (s - mean_g)
                      batch (s - mean_g) / (std of all scores + eps)               none s

Shapes    masked_whiten any; one mean and one variance over all unmasked elements. group_normalize B
          scores in groups g of G.
Bytes     4 B read and 4 B written an element, the mask's byte, and another read for the moments.
Numerics  two passes, never E[x^2] - E[x]^2, which cancels. torch subtracts the residual mean once
          more: with a mean of 1e4 the error falls from 9e-4 to 3e-7. C++ and Triton keep the
          moments in double. Blocks are merged in a fixed order: no dependence on the thread count.
          Groups, a few scores each, are computed in double; one whose scores are all equal gets
          exact zeros, not the rounding of its mean.
Source    Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance; whitening as
          in lm-human-preferences (Ziegler et al., 2019). Groups: Shao et al. (2024), GRPO; Liu et
          al. (2025), Dr. GRPO; Kool, van Hoof and Welling (2019) and Ahmadian et al. (2024), RLOO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.normalize._reference import (
    WHITEN_EPS,
    group_normalize_reference,
    masked_whiten_reference,
)
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, describe
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.normalize import _triton  # noqa: F401  (registers fusedrl::masked_whiten_triton and fusedrl::group_normalize_triton)

_IMPLS = Implementations("masked_whiten", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_GROUP = Implementations(
    "group_normalize", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
# the order of GroupMethod in csrc/cpu/ops/normalize.cpp
GROUP_METHODS = ("grpo", "dr_grpo", "rloo", "batch", "none")


class GroupNormalized(NamedTuple):
    """Result of `group_normalize`."""

    advantages: Tensor  # [B]
    # [B] bool: whether the score's group has a single value (so do all groups of one), and nothing
    # to learn from
    zero_variance: Tensor


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::masked_whiten")
    def _(x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("fusedrl::group_normalize")
    def _(
        scores: Tensor,
        group_ids: Tensor | None,
        group_size: int,
        method: int,
        eps: float,
        unbiased: bool,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(scores, memory_format=torch.contiguous_format), scores.new_empty(
            scores.shape, dtype=torch.bool
        )


# ---- public --------------------------------------------------------------------------------------
def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = WHITEN_EPS,
    impl: str | None = None,
) -> Tensor:
    """Mean 0 and variance 1 over the unmasked elements; masked elements become 0, whatever they
    held (NaN too).

    Args:
        x: any shape, any float dtype, computed in float32 (float64 with the torch implementation
            only).
        mask: bool in the shape of `x`; None takes every element.
        shift_mean: False keeps the mean and sets only the variance.
        unbiased: divide by count - 1 instead of count.
        eps: added to the variance.
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        Like `x`, in float32 (float64 for float64). One unmasked element becomes 0 (itself without
        shift_mean). Carries no gradient.
    Raises:
        ValueError: shapes or devices that do not agree.
        TypeError: dtypes.
        RuntimeError: `impl` cannot run here.
    """
    op = "masked_whiten"
    if mask is not None and (mask.shape != x.shape or mask.device != x.device):
        raise ValueError(
            f"{op}: expected a mask of the shape and device of x, {describe(x)}, got "
            f"{describe(mask)}"
        )
    chosen_impl = _IMPLS.choose(x.device, impl)
    check_dtype(op, "x", x, FLOATS if chosen_impl == "torch" else FLOATS[:3])
    check_dtype(op, "mask", mask, (torch.bool,))
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if chosen_impl == "torch":
        return masked_whiten_reference(x, mask, shift_mean, unbiased, eps)
    call = (
        torch.ops.fusedrl.masked_whiten
        if chosen_impl == "cpp"
        else torch.ops.fusedrl.masked_whiten_triton
    )
    return call(x, mask, shift_mean, unbiased, eps)


def group_normalize(
    scores: Tensor,
    group_ids: Tensor | int | None = None,
    *,
    group_size: int | None = None,
    method: str = "grpo",
    eps: float = 1e-6,
    unbiased: bool = True,
    impl: str | None = None,
) -> GroupNormalized:
    """Advantages of scores against their group, the completions of one prompt (formulas at the top
    of this file).

    Args:
        scores: [B], any float dtype, computed in float64.
        group_ids: [B] int64 or int32, equal where the group is; any values in any order. An integer
            is taken for `group_size`.
        group_size: in place of ids, groups of so many consecutive scores.
        method: "grpo", "dr_grpo", "rloo", "batch" or "none" (the scores as they are).
        eps: added to the standard deviation (grpo, batch).
        unbiased: that deviation over count - 1 (grpo, batch).
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        GroupNormalized(advantages [B], zero_variance [B]), float32 (float64 for float64), without a
        gradient. Where a group has a single value, as a group of one always does, its advantages
        are exactly 0 (unless "none"). A NaN score makes its group NaN ("batch": all).
    Raises:
        ValueError: an unknown method, sizes or devices that do not agree, neither or both of ids
            and size.
        TypeError: dtypes.
        RuntimeError: `impl` cannot run here.
    """
    op = "group_normalize"
    if method not in GROUP_METHODS:
        raise ValueError(f"{op}: expected a method of {', '.join(GROUP_METHODS)}, got {method!r}")
    if not eps >= 0.0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")
    if (group_ids is None) == (group_size is None):
        raise ValueError(
            f"{op}: expected either group_ids [B] or group_size, got "
            f"{'neither' if group_ids is None else 'both'}"
        )
    ids, group_size = (None, group_ids) if isinstance(group_ids, int) else (group_ids, group_size)
    (B,) = check(op, {"scores": (scores, "B"), "group_ids": (ids, "B")})
    if group_size is not None and (group_size < 1 or B % group_size):
        raise ValueError(
            f"{op}: expected a group_size that divides the {B} scores, got {group_size}; give "
            "group_ids for groups of different sizes"
        )
    chosen_impl = _GROUP.choose(scores.device, impl)
    check_dtype(op, "scores", scores, FLOATS if chosen_impl == "torch" else FLOATS[:3])
    check_dtype(op, "group_ids", ids, (torch.int64, torch.int32))
    scores = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    if chosen_impl == "torch":
        ids = torch.arange(B, device=scores.device) // (group_size or 1) if ids is None else ids
        return GroupNormalized(*group_normalize_reference(scores, ids, method, eps, unbiased))
    call = (
        torch.ops.fusedrl.group_normalize
        if chosen_impl == "cpp"
        else torch.ops.fusedrl.group_normalize_triton
    )
    return GroupNormalized(
        *call(scores, ids, group_size or 0, GROUP_METHODS.index(method), eps, unbiased)
    )


class RunningMoments:
    """Mean and variance of everything seen so far (reward scaling). Before the first element: mean
    0, variance 1, count 0.

    `state_dict` is plain floats: it goes into a JSON checkpoint and comes back bitwise.
    """

    def __init__(self) -> None:
        self.mean, self.variance, self.count = 0.0, 1.0, 0.0

    @property
    def std(self) -> float:
        """Square root of the unbiased variance; of the population variance for a single element; 1
        before the first."""
        return (
            math.sqrt(self.variance * self.count / (self.count - 1.0))
            if self.count > 1.0
            else math.sqrt(self.variance)
        )

    def update(self, x: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
        """Merge the (unmasked) elements of `x`; reads them on the host. Returns this batch's own
        mean and population variance.

        Raises:
            ValueError: a NaN or infinity among them, which would stay for ever.
        """
        batch = x.detach().double() if mask is None else x.detach().double()[mask]
        n = float(batch.numel())
        if n == 0.0:
            return 0.0, 0.0
        batch_mean = float(batch.mean())
        batch_variance = float((batch - batch_mean).square().mean())
        if not (math.isfinite(batch_mean) and math.isfinite(batch_variance)):
            raise ValueError(
                f"RunningMoments: expected finite elements, got a batch of {int(n)} with mean "
                f"{batch_mean}; mask or clip what is not finite"
            )
        total, shift = self.count + n, batch_mean - self.mean
        seen = self.variance * self.count if self.count else 0.0
        self.variance = (
            seen + batch_variance * n + shift * shift * (self.count * n / total)
        ) / total
        self.mean += shift * (n / total)
        self.count = total
        return batch_mean, batch_variance

    def state_dict(self) -> dict[str, float]:
        """Return the moments as JSON values."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over moments that `state_dict` gave. Raises KeyError for a missing entry."""
        self.mean, self.variance, self.count = (
            float(state["mean"]),
            float(state["variance"]),
            float(state["count"]),
        )
