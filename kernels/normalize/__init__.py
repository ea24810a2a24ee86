"""Normalisation over a batch: masked whitening, advantages within groups, and running moments over
many batches.

    masked_whiten     (x - mean) / sqrt(variance + eps), + mean if shift_mean is False
    group_normalize   grpo (s - mean_g) / (std_g + eps)     dr_grpo s - mean_g
                      rloo s - mean of the others = G / (G - 1) (s - mean_g)
                      batch (s - mean_g) / (std of all scores + eps)               none s

Shapes    masked_whiten takes any shape and has one mean and one variance over all unmasked
          elements. group_normalize takes B scores in groups g of G scores.
Bytes     4 B read and 4 B written per element, the mask's byte, and one more read for the moments.
Numerics  two passes, never E[x^2] - E[x]^2, which cancels. The torch implementation subtracts the
          remaining mean a second time: with a mean of 1e4 the error falls from 9e-4 to 3e-7. C++
          and Triton hold the moments in double. Blocks are merged in a fixed order, so results do
          not depend on the thread count. Groups, a few scores each, are computed in double. A group
          whose scores are all equal gets exact zeros, not the rounding error of its mean.
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
    # [B] bool: whether all scores of the score's group are equal (as in a group of one), so that
    # there is nothing to learn from it
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
    """Scale the unmasked elements to mean 0 and variance 1. Masked elements become 0, even if they
    held NaN.

    Args:
        x: any shape, any float dtype; computed in float32 (float64 only by the torch
            implementation).
        mask: bool in the shape of `x`, False where masked. If None, no element is masked.
        shift_mean: False leaves the mean as it is and scales only the variance.
        unbiased: True divides the variance by count - 1 instead of count.
        eps: added to the variance.
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        A tensor in the shape of `x`, float32 (float64 for float64), without a gradient. If only one
        element is unmasked, it becomes 0 (with shift_mean False it stays unchanged).
    Raises:
        ValueError: shapes or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
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
    """Compute the advantage of each score over its group. A group is the completions of one prompt
    (formulas at the top of this file).

    Args:
        scores: [B], any float dtype, computed in float64.
        group_ids: [B] int64 or int32; scores with equal ids are one group. Any values in any order.
            An integer in place of a tensor means `group_size`.
        group_size: in place of ids, the number of consecutive scores that make a group.
        method: "grpo", "dr_grpo", "rloo", "batch" or "none" (returns the scores unchanged).
        eps: added to the standard deviation (grpo, batch).
        unbiased: True divides the variance by count - 1 instead of count (grpo, batch).
        impl: "cpp", "torch" or "triton"; by default the best one for the device.
    Returns:
        GroupNormalized(advantages [B], zero_variance [B]), float32 (float64 for float64), without a
        gradient. A group whose scores are all equal, or that has one score, gets advantages of
        exactly 0 (unless "none"). A NaN score makes the advantages of its group NaN ("batch": of
        all groups).
    Raises:
        ValueError: the method is unknown, sizes or devices do not agree, or neither or both of
            `group_ids` and `group_size` are given.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
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
    """Running mean and variance of all elements passed to `update`, for reward scaling. Before the
    first element: mean 0, variance 1, count 0.

    `state_dict` holds plain floats, which a JSON checkpoint restores exactly.
    """

    def __init__(self) -> None:
        self.mean, self.variance, self.count = 0.0, 1.0, 0.0

    @property
    def std(self) -> float:
        """Square root of the unbiased variance. For a single element: of the population variance.
        Before the first element: 1."""
        return (
            math.sqrt(self.variance * self.count / (self.count - 1.0))
            if self.count > 1.0
            else math.sqrt(self.variance)
        )

    def update(self, x: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
        """Merge the unmasked elements of `x` into the moments; the host reads these elements.
        Return the mean and population variance of `x` alone.

        Raises:
            ValueError: an element is NaN or infinite. It would spoil the moments for ever.
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
        """Restore the moments that `state_dict` returned. Raise KeyError if an entry is missing."""
        self.mean, self.variance, self.count = (
            float(state["mean"]),
            float(state["variance"]),
            float(state["count"]),
        )
