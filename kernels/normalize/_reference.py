"""normalize in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8  # added to the variance


def masked_whiten_reference(
    x: Tensor,
    mask: Tensor | None,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = WHITEN_EPS,
) -> Tensor:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result."""
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = live.sum().to(x.dtype).clamp(min=1)
    mean = torch.where(live, x, 0).sum() / count
    centred = torch.where(live, x - mean, 0)
    residual = centred.sum() / count
    centred = torch.where(live, centred - residual, 0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if shift_mean else torch.where(live, whitened + (mean + residual), 0)


def group_normalize_reference(
    scores_B: Tensor, group_ids_B: Tensor, method: str, eps: float, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Compute group_normalize by its definition, on any device, in float64. The host reads no
    ids."""
    x, B = scores_B.double(), scores_B.numel()
    ids, order = torch.sort(group_ids_B, stable=True)
    # of each sorted score, from 0
    group = torch.cat([ids.new_zeros(min(1, B)), (ids[1:] != ids[:-1]).cumsum(0)])
    # groups that do not exist are empty
    offsets = torch.searchsorted(group, torch.arange(B + 1, device=ids.device))
    x = x[order]

    def of_group(values: Tensor, reduce: str) -> Tensor:
        return (
            torch.segment_reduce(values, reduce, offsets=offsets, unsafe=True)[group]
            if B
            else values
        )

    def std(squares: Tensor, count: Tensor | int) -> Tensor:
        return torch.sqrt(
            squares / torch.as_tensor(count - int(unbiased), device=x.device).clamp(min=1)
        )

    count = (offsets[1:] - offsets[:-1])[group] if B else ids
    equal = of_group(x, "max") == of_group(x, "min")
    centred = torch.where(equal, 0, x - of_group(x, "sum") / count)
    if method == "grpo":
        out = torch.where(equal, 0, centred / (std(of_group(centred.square(), "sum"), count) + eps))
    elif method == "rloo":
        out = centred * (count / (count - 1).clamp(min=1))
    elif method == "batch":
        out = torch.where(
            equal, 0, centred / (std((x - x.sum() / max(1, B)).square().sum(), B) + eps)
        )
    else:
        out = x if method == "none" else centred
    back = torch.empty_like(order).scatter_(0, order, torch.arange(B, device=ids.device))
    return out[back].to(scores_B.dtype), equal[back]
