"""Normalisation over a batch: masked whitening, and moments that run on from batch to batch.

    masked_whiten   (x - mean) / sqrt(variance + eps), + mean where the mean is to stay

Shapes    any; one mean and one variance over all unmasked elements.
Bytes     4 B read and 4 B written an element, the mask's byte, and another read for the moments.
Numerics  two passes, never E[x^2] - E[x]^2, which cancels. torch subtracts the residual mean once more: with a mean of 1e4 the error falls from
          9e-4 to 3e-7. C++ keeps the moments in double. Blocks are merged in a fixed order: no dependence on the thread count.
Source    Chan, Golub and LeVeque (1983), Algorithms for Computing the Sample Variance; whitening as in lm-human-preferences (Ziegler et al., 2019).
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check_dtype, describe
from fusedrl.kernels.dispatch import Implementations

_IMPLS = Implementations("masked_whiten", cpu=("cpp", "torch"), cuda=("torch",))
WHITEN_EPS = 1e-8  # added to the variance


# ---- reference -------------------------------------------------------------------------------------------------------
def masked_whiten_reference(x: Tensor, mask: Tensor | None, shift_mean: bool = True, unbiased: bool = False, eps: float = WHITEN_EPS) -> Tensor:
    """The definition, on any device and in any float dtype (float64 is the oracle)."""
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = live.sum().to(x.dtype).clamp(min=1)
    mean = torch.where(live, x, 0).sum() / count
    centred = torch.where(live, x - mean, 0)
    residual = centred.sum() / count
    centred = torch.where(live, centred - residual, 0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else torch.where(live, whitened + (mean + residual), 0)


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::masked_whiten")
    def _(x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- public ------------------------------------------------------------------------------------------------------------
def masked_whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False, eps: float = WHITEN_EPS,
                  impl: str | None = None) -> Tensor:
    """Mean 0 and variance 1 over the unmasked elements; masked elements become 0, whatever they held (NaN too).

    Args:
        x: any shape, any float dtype, computed in float32 (float64 with the torch implementation only).
        mask: bool in the shape of `x`; None takes every element.
        shift_mean: False keeps the mean and sets only the variance.
        unbiased: divide by count - 1 instead of count.
        eps: added to the variance.
        impl: "cpp" or "torch"; by default the best one for the device.
    Returns:
        Like `x`, in float32 (float64 for float64). One unmasked element becomes 0 (itself without shift_mean). Carries no gradient.
    Raises:
        ValueError: shapes or devices that do not agree. TypeError: dtypes. RuntimeError: `impl` cannot run here.
    """
    op = "masked_whiten"
    if mask is not None and (mask.shape != x.shape or mask.device != x.device):
        raise ValueError(f"{op}: expected a mask of the shape and device of x, {describe(x)}, got {describe(mask)}")
    chosen_impl = _IMPLS.choose(x.device, impl)
    check_dtype(op, "x", x, FLOATS if chosen_impl == "torch" else FLOATS[:3])
    check_dtype(op, "mask", mask, (torch.bool,))
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    if chosen_impl == "torch":
        return masked_whiten_reference(x, mask, shift_mean, unbiased, eps)
    return torch.ops.fusedrl.masked_whiten(x, mask, shift_mean, unbiased, eps)


class RunningMoments:
    """Mean and variance of everything seen so far (reward scaling). Before the first element: mean 0, variance 1, count 0.

    `state_dict` is plain floats: it goes into a JSON checkpoint and comes back bitwise.
    """

    def __init__(self) -> None:
        self.mean, self.variance, self.count = 0.0, 1.0, 0.0

    @property
    def std(self) -> float:
        """Square root of the unbiased variance; of the population variance for a single element; 1 before the first."""
        return math.sqrt(self.variance * self.count / (self.count - 1.0)) if self.count > 1.0 else math.sqrt(self.variance)

    def update(self, x: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
        """Merge the (unmasked) elements of `x`; reads them on the host. Returns this batch's own mean and population variance.

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
            raise ValueError(f"RunningMoments: expected finite elements, got a batch of {int(n)} with mean {batch_mean}; mask or clip what is not finite")
        total, shift = self.count + n, batch_mean - self.mean
        seen = self.variance * self.count if self.count else 0.0
        self.variance = (seen + batch_variance * n + shift * shift * (self.count * n / total)) / total
        self.mean += shift * (n / total)
        self.count = total
        return batch_mean, batch_variance

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises KeyError for a missing entry."""
        self.mean, self.variance, self.count = float(state["mean"]), float(state["variance"]), float(state["count"])
