"""What of a mean chance does not explain."""

from __future__ import annotations

import torch
from torch import Tensor


def beyond_chance(x_B: Tensor, prompts_B: Tensor, answered_B: Tensor) -> tuple[float, Tensor]:
    """Shrink the mean c of x over prompts to the part that chance does not explain:

        (1 - s^2 / c^2) c, or 0 where that is negative

    Return this number, and a tensor [B] that holds for each completion the same number computed
    without its own prompt. A single outlier makes c and s equally large, so it gives 0.

    s^2 estimates the variance of c from the spread of the n prompts' means, times the variance of
    Student's t with n - 1 degrees of freedom, (n - 1) / (n - 3). With three prompts or fewer the
    result is 0. Source: James and Stein (1961), Estimation with quadratic loss; the positive part.

    Args:
        x_B: numbers to average, float64.
        prompts_B: prompt id of each completion; completions of one prompt are not independent.
        answered_B: which completions count.
    """
    others_B = torch.zeros_like(x_B)
    if not answered_B.any():
        return 0.0, others_B
    order = torch.sort(prompts_B, stable=True).indices
    _, group, sizes = torch.unique_consecutive(
        prompts_B[order], return_inverse=True, return_counts=True
    )
    counted = answered_B[order].double()
    sums_G, counts_G = (
        torch.segment_reduce(y, "sum", lengths=sizes)
        for y in (torch.where(answered_B, x_B, 0.0)[order], counted)
    )
    there_G = counts_G > 0
    mean_G = torch.where(there_G, sums_G / counts_G.clamp(min=1), 0.0)
    n, middle = there_G.sum(), mean_G.sum() / there_G.sum()
    off_G = torch.where(there_G, mean_G - middle, 0.0)
    total, square = off_G.sum(), off_G.square().sum()
    found_G = _shrunk(n - there_G.long(), total - off_G, square - off_G.square(), middle)
    others_B[order] = found_G[group]
    return _shrunk(n, total, square, middle).item(), others_B


def _shrunk(n: Tensor, total: Tensor, square: Tensor, middle: Tensor) -> Tensor:
    """Compute `beyond_chance` of n numbers from the sum and the sum of squares of their differences
    from `middle`."""
    n_safe = n.clamp(min=1)
    mean_off = total / n_safe
    c = middle + mean_off
    variance = (square / n_safe - mean_off.square()).clamp(min=0) / (n - 3).clamp(min=1)
    return torch.where(
        (n > 3) & (c.square() > variance), c - variance / torch.where(c == 0, 1.0, c), 0.0
    )
