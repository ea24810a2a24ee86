"""gae in torch: the definition, on any device and in any float dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.kl import token_kl_reference
from fusedrl.kernels.normalize import WHITEN_EPS, masked_whiten_reference


class ShapedGAE(NamedTuple):
    """Result of `shaped_gae`. Per-token tensors are 0 where masked."""

    advantages: Tensor  # [N] or [B, T], whitened unless whiten=False
    returns: Tensor  # [N] or [B, T], advantages before whitening plus values
    rewards: Tensor  # [N] or [B, T], the rewards behind the advantages
    kl_per_sequence: Tensor  # [B] sum of the estimates, without the coefficient
    score_per_sequence: Tensor  # [B] the score after clipping, placed or not


class _Layout(NamedTuple):
    """Indices for every token: its sequence, the end of this sequence, the next unmasked token (N
    if there is none), and whether the sequence has a next unmasked token. The host reads
    nothing."""

    sequence_N: Tensor
    end_N: Tensor
    next_N: Tensor
    has_next_N: Tensor
    starts: Tensor  # [B]
    longest: int  # an upper bound of a sequence's length

    @classmethod
    def of(cls, live: Tensor, cu_seqlens: Tensor | None) -> _Layout:
        slots = torch.arange(live.numel(), device=live.device)
        if cu_seqlens is None:
            B, T = live.shape
            bounds, longest = torch.arange(B + 1, device=live.device) * T, T
        else:
            bounds, longest = cu_seqlens.long(), live.numel()
        sequence_N = torch.searchsorted(bounds[1:], slots, right=True)
        end_N = bounds[1:][sequence_N]
        at_or_after = (
            torch.where(live.reshape(-1), slots, live.numel()).flip(0).cummin(0).values.flip(0)
        )
        next_N = torch.cat(
            [at_or_after[1:], at_or_after.new_full((min(1, live.numel()),), live.numel())]
        )
        return cls(sequence_N, end_N, next_N, next_N < end_N, bounds[:-1], longest)

    def suffix_scan(self, a_N: Tensor, b_N: Tensor) -> Tensor:
        """Compute y_t = b_t + a_t y_{t+1} within each sequence. After the step with `distance`, y_t
        holds the terms of t ... t + 2 distance - 1."""
        remaining = self.end_N - torch.arange(b_N.numel(), device=b_N.device)
        distance = 1
        while distance < self.longest:
            a, b, inside = a_N[:-distance], b_N[:-distance], remaining[:-distance] > distance
            b_N = torch.cat([torch.where(inside, b + a * b_N[distance:], b), b_N[-distance:]])
            a_N = torch.cat([torch.where(inside, a * a_N[distance:], a), a_N[-distance:]])
            distance *= 2
        return b_N


def _deltas(
    layout: _Layout,
    live_N: Tensor,
    rewards_N: Tensor,
    values_N: Tensor,
    gamma: float,
    last_values_B: Tensor,
) -> Tensor:
    padded = torch.cat([values_N, values_N.new_zeros(1)])
    next_values = torch.where(
        layout.has_next_N, padded[layout.next_N], last_values_B[layout.sequence_N]
    )
    return torch.where(live_N, rewards_N + (gamma * next_values - values_N), 0)


def _advantages(
    layout: _Layout,
    live_N: Tensor,
    rewards_N: Tensor,
    values_N: Tensor,
    gamma: float,
    lam: float | Tensor,
    last_values_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) in the rewards' dtype, each rounded only once. Float32 sums over
    thousands of tokens would have a larger error. `lam` is one number, or one of each sequence."""
    lam = lam.double()[layout.sequence_N] if isinstance(lam, Tensor) else lam
    dtype, values_N = rewards_N.dtype, values_N.double()
    delta = _deltas(layout, live_N, rewards_N.double(), values_N, gamma, last_values_B.double())
    decay = torch.where(live_N, gamma * lam, torch.ones_like(delta))
    advantages = torch.where(live_N, layout.suffix_scan(decay, delta), 0)
    return advantages.to(dtype), torch.where(live_N, advantages + values_N, 0).to(dtype)


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute gae by its definition, as a scan by doubling, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    layout = _Layout.of(live, cu_seqlens)
    last = rewards.new_zeros(layout.starts.shape) if last_values is None else last_values
    advantages, returns = _advantages(
        layout, live.reshape(-1), rewards.reshape(-1), values.reshape(-1), gamma, lam, last
    )
    return advantages.view(rewards.shape), returns.view(rewards.shape)


def k_step_advantages_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    k: int,
    gamma: float,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result."""
    live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    layout, live_N, values_N = _Layout.of(live, cu_seqlens), live.reshape(-1), values.reshape(-1)
    last = rewards.new_zeros(layout.starts.shape) if last_values is None else last_values
    delta = _deltas(layout, live_N, rewards.reshape(-1), values_N, gamma, last)
    # Sort the unmasked tokens to the front and the masked ones to the end; count for each token how
    # many unmasked ones follow in its sequence.
    place = torch.sort(~live_N, stable=True).indices
    before = torch.cat([layout.end_N.new_zeros(1), live_N.cumsum(0)])
    following = before[layout.end_N[place]] - torch.arange(len(place), device=place.device) - 1
    window = delta[place]  # sums of `width` deltas
    total, done, width = torch.zeros_like(window), 0, 1  # sums of `done` deltas
    k = min(k, layout.longest)
    while width <= k:
        if k & width:
            ahead = torch.cat([window[done:], window.new_zeros(min(done, len(window)))])
            total = torch.where(following >= done, total + gamma**done * ahead, total)
            done += width
        ahead = torch.cat([window[width:], window.new_zeros(min(width, len(window)))])
        window = torch.where(following >= width, window + gamma**width * ahead, window)
        width *= 2
    advantages = torch.where(live_N, torch.zeros_like(total).scatter(0, place, total), 0)
    return advantages.view(rewards.shape), torch.where(live_N, advantages + values_N, 0).view(
        rewards.shape
    )


def shaped_gae_reference(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float | Tensor,
    kl_estimator: str,
    gamma: float,
    lam: float,
    token_rewards: Tensor | None,
    score_clip: float | None,
    whiten: bool,
    whiten_unbiased: bool,
) -> ShapedGAE:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result."""
    layout, live = _Layout.of(mask, cu_seqlens), mask.reshape(-1)
    kl = torch.where(
        live, token_kl_reference(logp.reshape(-1), ref_logp.reshape(-1), kl_estimator), 0
    )
    score_B = scores.clone() if score_clip is None else scores.clamp(-score_clip, score_clip)
    rewards = -kl_coef * kl if token_rewards is None else token_rewards.reshape(-1) - kl_coef * kl
    rewards = torch.where(layout.has_next_N, rewards, rewards + score_B[layout.sequence_N])
    rewards = torch.where(live, rewards, 0)
    advantages, returns = _advantages(
        layout, live, rewards, values.reshape(-1), gamma, lam, torch.zeros_like(scores)
    )
    sums = torch.cat([layout.suffix_scan(torch.ones_like(kl), kl), kl.new_zeros(1)])
    ends = torch.cat(
        [layout.starts[1:], layout.starts.new_full((min(1, len(layout.starts)),), kl.numel())]
    )
    kl_B = torch.where(ends > layout.starts, sums[layout.starts], 0)
    if whiten:
        advantages = masked_whiten_reference(
            advantages, live, unbiased=whiten_unbiased, eps=WHITEN_EPS
        )
    return ShapedGAE(
        advantages.view(logp.shape),
        returns.view(logp.shape),
        rewards.view(logp.shape),
        kl_B,
        score_B,
    )
