"""kl in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # inside exponentials


def token_kl_reference(logp_N: Tensor, ref_logp_N: Tensor, estimator: str) -> Tensor:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result."""
    k1 = logp_N - ref_logp_N
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return 0.5 * k1 * k1
    if estimator == "abs":
        return k1.abs()
    exact = logp_N.double() - ref_logp_N.double()
    return (
        (torch.expm1((-exact).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + exact)
        .clamp(min=0.0)
        .to(k1.dtype)
    )


def _descended(k1: Tensor, estimator: str) -> Tensor:
    """Return the estimator in the form that autograd differentiates: k3 without the clip at 0, and
    constant beyond the clamp."""
    if estimator != "k3":
        return token_kl_reference(k1, torch.zeros_like(k1), estimator)
    return torch.where(
        k1.abs() > MAX_LOG_RATIO,
        k1.detach(),
        torch.expm1(-k1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + k1,
    )


def kl_loss_reference(
    logp_N: Tensor,
    ref_logp_N: Tensor,
    weights_N: Tensor,
    estimator: str,
    gradient: str,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Compute kl_loss by its definition, differentiably, on any device, in float64. `cu_seqlens`
    selects the sequence level; if it is None, the level is tokens."""
    live = weights_N != 0
    k1 = torch.where(live, logp_N.double() - ref_logp_N.double(), 0)
    weights = weights_N.double()
    if cu_seqlens is not None:
        sequence_N = torch.searchsorted(
            cu_seqlens[1:], torch.arange(len(k1), device=k1.device), right=True
        )
        offsets = cu_seqlens.long()
        sums, weight_sums, counts = (
            torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True)
            for x in (k1.detach(), weights, live.double())
        )
        # the sums have a fixed order; the added term is 0 and carries the gradient
        k1 = sums.index_add(0, sequence_N, k1 - k1.detach())
        weights = weight_sums / counts.clamp(min=1)
    descended = (weights * _descended(k1, gradient)).sum()
    value = (weights * token_kl_reference(k1.detach(), torch.zeros_like(k1), estimator)).sum()
    return (value + (descended - descended.detach())).to(logp_N.dtype)
