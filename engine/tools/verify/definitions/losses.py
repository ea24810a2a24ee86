"""Definitions of KL estimates, the policy objectives and the value loss, over the tokens whose
weight is not 0."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.tools.verify.definitions.common import (
    CUT,
    Columns,
    estimate,
    mean_of,
    numbers,
    variance_of,
)

F32_EPS = 2.0**-23


# ---- estimates of a KL ---------------------------------------------------------------------------
def token_kl(k: Tensor, estimator: str) -> Tensor:
    """Return the KL estimate of every log ratio k = logp - ref_logp."""
    each = [estimate(ratio, estimator) for ratio in numbers(k)]
    return torch.tensor(each, dtype=k.dtype, device=k.device).view(k.shape)


def _slope(k: Tensor, estimator: str) -> Tensor:
    """Return d estimate / d k. For k3, whose exponent is cut at +-20, it is 0 beyond."""
    if estimator == "k3":
        return torch.where(k.abs() > CUT, 0.0, -torch.expm1(-k))
    return {"k1": torch.ones_like(k), "k2": k, "abs": k.sign()}[estimator].clone()


def _estimated(k: Tensor, estimator: str, gradient: str) -> Tensor:
    """Return a tensor with the value of one estimator and the gradient of another."""
    fixed = k.detach()
    return token_kl(fixed, estimator) + _slope(fixed, gradient) * (k - fixed)


def _sequence_of(cu_seqlens: Tensor) -> Tensor:
    """Return the index of each token's sequence."""
    numbered = [
        b for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())) for _ in range(start, end)
    ]
    return torch.tensor(numbered, dtype=torch.int64, device=cu_seqlens.device)


def kl_loss(
    logp: Tensor,
    ref_logp: Tensor,
    weights: Tensor,
    estimator: str,
    gradient: str,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Compute sum_t w_t estimate(k_t). With cu_seqlens, compute sum_b w_b estimate(sum_t k_t), w_b
    a sequence's mean weight."""
    live = weights != 0
    k, w = logp[live] - ref_logp[live], weights[live]
    if cu_seqlens is not None:
        of = _sequence_of(cu_seqlens)[live]
        mine = [of == b for b in of.unique().tolist()]
        if mine:
            k, w = (
                torch.stack([k[tokens].sum() for tokens in mine]),
                torch.stack([w[tokens].mean() for tokens in mine]),
            )
    return (w * _estimated(k, estimator, gradient)).sum()


# ---- policy and value losses ---------------------------------------------------------------------
def _exp(d: Tensor) -> Tensor:
    """Compute e^d with d cut at +-20; beyond that the gradient is 0."""
    return d.clamp(-CUT, CUT).exp()


def _of_sequences(x: Tensor, sequence: Tensor, mean: bool) -> Tensor:
    """Return for each token the mean or sum over its sequence's live tokens."""
    out = torch.zeros_like(x)
    for b in sequence.unique().tolist():
        mine = sequence == b
        out[mine] = x[mine].mean() if mean else x[mine].sum()
    return out


def _policy_term(
    o: Any, lp: Tensor, old: Tensor, A: Tensor, sequence: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each token's term of the objective, and three masks: tokens whose ratio is stopped by
    the lower bound, by the upper bound, and by the dual-clip bound."""
    d, never = lp - old, torch.zeros_like(A, dtype=torch.bool)
    fixed, r = d.detach(), _exp(d)
    if o.kind == "reinforce":  # Williams (1992)
        return -A * lp, never, never, never
    if o.kind == "dro":  # Richemond et al. (2024)
        return -(A * lp - o.beta * d**2 / 2), never, never, never
    if o.kind == "ratio":
        return -A * r, never, never, never
    if o.kind == "kl_penalty":  # Schulman et al. (2017), eq. 8; e^d - 1 - d is k3 of KL(old || new)
        return -A * r + o.beta * _estimated(-d, "k3", "k3"), never, never, never
    if o.kind == "cispo":  # MiniMax-M1 (2025)
        return -A * r.detach().clamp(max=o.clip_max) * lp, never, r.detach() > o.clip_max, never
    if o.kind == "sapo":  # Gao et al. (2025)
        tau = torch.where(A > 0, o.tau_positive, o.tau_negative)
        return -A * 4 / tau / (1 + torch.exp(-(tau * (r - 1)))), never, never, never
    if o.kind == "geometric_mean":  # Zhao et al. (2025)
        low, high = (A < 0) & (fixed < -o.clip_low), (A > 0) & (fixed > o.clip_high)
        cut = torch.where(A > 0, fixed.clamp(max=o.clip_high), fixed.clamp(min=-o.clip_low))
        log_s = _of_sequences(cut, sequence, mean=True)
        moves = torch.where(low | high | (log_s.abs() > CUT), 0.0, 1.0)
        return -A * _exp(log_s) * (1 + moves * (lp - lp.detach())), low, high, never
    if o.kind == "gspo":  # Zheng et al. (2025): s by value, the token by its slope
        log_s = _of_sequences(fixed, sequence, mean=True)
        r = _exp(log_s) * (1 + torch.where(log_s.abs() > CUT, 0.0, 1.0) * (lp - lp.detach()))
    elif o.kind != "clip":
        raise ValueError(f"expected a kind that has a definition, got {o.kind!r}")
    # Schulman et al. (2017), eq. 7
    term = torch.maximum(-A * r, -A * r.clamp(1 - o.clip_low, 1 + o.clip_high))
    low, high, dual = (
        (A < 0) & (r.detach() < 1 - o.clip_low),
        (A > 0) & (r.detach() > 1 + o.clip_high),
        never,
    )
    if o.dual_clip is not None:  # Ye et al. (2020), eq. 5
        dual = (A < 0) & (r.detach() > o.dual_clip)
        term = torch.where(A < 0, torch.minimum(term, -A * o.dual_clip), term)
    return term, low, high, dual


def _rollout_weights(c: Any, old: Tensor, rollout: Tensor, sequence: Tensor) -> Tensor:
    """Return truncated or masked importance weights, old policy to sampler, of the tokens."""
    log_w = old - rollout
    w = _exp(log_w if c.level == "token" else _of_sequences(log_w, sequence, mean=False))
    if c.kind == "truncated":
        return w.clamp(max=c.cap)
    judged = _exp(_of_sequences(log_w, sequence, mean=True)) if c.kind == "sequence_masked" else w
    return torch.where((judged > c.cap) | (judged < c.floor), 0.0, w)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    objective: Any,
    ref_logp: Tensor,
    entropy: Tensor,
    cu_seqlens: Tensor,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    kl_level: str = "token",
    entropy_coef: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_correction: Any = None,
) -> tuple[Tensor, Columns]:
    """Return (loss, statistics); the loss is sum_t w_t (correction_t term_t + kl_coef kl_t -
    entropy_coef H_t)."""
    live = weights != 0
    lp, old, A, w, ref, H = (
        x[live] for x in (logp, old_logp, advantages, weights, ref_logp, entropy)
    )
    sequence = _sequence_of(cu_seqlens)[live]
    term, low, high, dual = _policy_term(objective, lp, old, A, sequence)
    correction = torch.ones_like(A)
    if rollout_correction is not None and rollout_logp is not None:
        correction = _rollout_weights(rollout_correction, old, rollout_logp[live], sequence)
    k = lp - ref
    if kl_level == "sequence":  # K^2 / 2 of a sequence's K, written per token
        K = _of_sequences(k.detach(), sequence, mean=False)
        kl = K * k.detach() / 2 + K * (k - k.detach())
    else:
        kl = _estimated(k, kl_estimator, kl_gradient or kl_estimator)
    loss = (w * (correction * term + kl_coef * kl - entropy_coef * H)).sum()
    stats = {"loss": loss} | _ratio_stats((lp - old).detach(), low, high, dual)
    n, none = max(1, len(lp)), len(lp) == 0
    stats |= {
        "ref_kl": kl.sum() / n,
        "entropy": H.sum() / n,
        "correction_mean": loss.new_ones(()) if none else correction.mean(),
        "tokens": loss.new_tensor(float(len(lp))),
    }
    return loss, {name: value.detach().to(loss.dtype) for name, value in stats.items()}


def _ratio_stats(d: Tensor, low: Tensor, high: Tensor, dual: Tensor) -> Columns:
    """Return statistics of the tokens' log ratios d, and of the tokens that a bound stopped, as
    means over tokens."""
    n, none, r = max(1, len(d)), len(d) == 0, _exp(d)
    one, zero = d.new_ones(()), d.new_zeros(())
    return {
        "clip_fraction_low": low.sum() / n,
        "clip_fraction_high": high.sum() / n,
        "clip_fraction_dual": dual.sum() / n,
        "approx_kl_k1": -d.sum() / n,
        "approx_kl_k2": (d**2).sum() / 2 / n,
        "approx_kl_k3": token_kl(-d, "k3").sum() / n,
        "ratio_mean": one if none else r.mean(),
        "ratio_min": one if none else r.min(),
        "ratio_max": one if none else r.max(),
        "effective_sample_size": zero if none else r.sum() ** 2 / (r**2).sum(),
        "clamped_fraction": (d.abs() > CUT).sum() / n,
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Columns]:
    """Return (loss, statistics); the loss is sum_t w_t max((V - R)^2, (clip(V, V_old +- c) - R)^2)
    / 2.

    Schulman et al. (2017), eq. 9, clipped."""
    live = weights != 0
    V, old, R, w = (x[live] for x in (values, old_values, returns, weights))
    squares, clipped = (V - R) ** 2, torch.zeros_like(V, dtype=torch.bool)
    if clip is not None:
        bounded = torch.minimum(torch.maximum(V, old - clip), old + clip)
        clipped = (bounded != V) & ((bounded - R) ** 2 > squares)
        squares = torch.where(clipped, ((bounded - R) ** 2).detach(), squares)
    loss, n = (w * squares / 2).sum(), max(1, len(V))
    of_returns, unexplained = (variance_of(numbers(x.detach()), False) for x in (R, R - V))
    resolved = of_returns > (F32_EPS * mean_of(numbers(R))) ** 2
    stats = {
        "loss": loss.detach(),
        "clip_fraction": clipped.sum() / n,
        "value_mean": V.detach().sum() / n,
        "return_mean": R.sum() / n,
        "explained_variance": loss.new_tensor(1 - unexplained / of_returns if resolved else 0.0),
        "tokens": loss.new_tensor(float(len(V))),
    }
    return loss, {name: value.to(loss.dtype) for name, value in stats.items()}
