"""Definitions of advantages, normalisation and ranking losses: loops over sequences, groups and
pairs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.tools.verify.definitions.common import (
    Columns,
    estimate,
    mean_of,
    numbers,
    variance_of,
)

WHITEN_EPS, GROUP_EPS = 1e-8, 1e-6


# ---- advantages: loops over the live tokens of each sequence -------------------------------------
def _live_tokens(mask: Tensor, cu_seqlens: Tensor | None) -> list[list[int]]:
    """List for each sequence the positions of its unmasked tokens in the flattened batch. Without
    cu_seqlens, each row is a sequence."""
    bounds = (
        [b * mask.shape[1] for b in range(mask.shape[0] + 1)]
        if cu_seqlens is None
        else cu_seqlens.tolist()
    )
    live = mask.reshape(-1).tolist()
    return [[t for t in range(start, end) if live[t]] for start, end in pairwise(bounds)]


def _like(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(like.shape)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
) -> Columns:
    """Compute delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. Schulman
    et al. (2016), eq. 16."""
    r, v = numbers(rewards), numbers(values)
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for b, tokens in enumerate(_live_tokens(mask, cu_seqlens)):
        following, running = 0.0 if last_values is None else float(last_values[b]), 0.0
        for t in reversed(tokens):
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            following = v[t]
            advantages[t], returns[t] = running, running + v[t]
    return {"advantages": _like(advantages, rewards), "returns": _like(returns, rewards)}


def discounted_returns(
    rewards: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    gamma: float,
    last_values: Tensor | None,
) -> Tensor:
    """Compute G_t = r_t + gamma G_{t+1}; after the last token, G is the last value. Sutton and
    Barto (2018), eq. 3.9."""
    r = numbers(rewards)
    returns = [0.0] * len(r)
    for b, tokens in enumerate(_live_tokens(mask, cu_seqlens)):
        running = 0.0 if last_values is None else float(last_values[b])
        for t in reversed(tokens):
            returns[t] = running = r[t] + gamma * running
    return _like(returns, rewards)


def k_step_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    k: int,
    gamma: float,
    last_values: Tensor | None,
) -> Columns:
    """Compute A_t = sum of gamma^i delta_{t+i} over k steps, or over the steps that are left if
    they are fewer. Schulman et al. (2016), eq. 14.

    The loop adds one step of the sum at a time, for all tokens of a sequence at once."""
    r, v = np.array(numbers(rewards)), np.array(numbers(values))
    advantages, returns = np.zeros(len(r)), np.zeros(len(r))
    for b, tokens in enumerate(_live_tokens(mask, cu_seqlens)):
        n, V = (
            len(tokens),
            np.append(v[tokens], 0.0 if last_values is None else float(last_values[b])),
        )
        with np.errstate(invalid="ignore"):  # infinities that came in
            delta, total = r[tokens] + gamma * V[1:] - V[:-1], np.zeros(n)
            for i in range(min(k, n)):
                total[: n - i] += gamma**i * delta[i:]
            advantages[tokens], returns[tokens] = total, total + V[:-1]
    return {
        "advantages": _like(advantages.tolist(), rewards),
        "returns": _like(returns.tolist(), rewards),
    }


def shaped_gae(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    token_rewards: Tensor | None,
    score_clip: float | None,
    whiten: bool,
    whiten_unbiased: bool,
) -> Columns:
    """Compute whitened GAE of the rewards r_t = token_rewards_t - kl_coef KL_t, plus the clipped
    score at a sequence's last token.

    Ziegler et al. (2019), eq. 2."""
    lp, ref = numbers(logp), numbers(ref_logp)
    given = [0.0] * len(lp) if token_rewards is None else numbers(token_rewards)
    score = [
        s if score_clip is None else min(max(s, -score_clip), score_clip) for s in numbers(scores)
    ]
    rewards, kl = [0.0] * len(lp), [0.0] * len(score)
    for b, tokens in enumerate(_live_tokens(mask, cu_seqlens)):
        for t in tokens:
            kl_t = estimate(lp[t] - ref[t], kl_estimator)
            kl[b] += kl_t
            rewards[t] = given[t] - kl_coef * kl_t + (score[b] if t == tokens[-1] else 0.0)
    found = gae(_like(rewards, logp), values, mask, cu_seqlens, gamma, lam, None)
    if whiten:
        found["advantages"] = masked_whiten(found["advantages"], mask, True, whiten_unbiased)
    return found | {
        "rewards": _like(rewards, logp),
        "kl_per_sequence": _like(kl, scores),
        "score_per_sequence": _like(score, scores),
    }


# ---- normalisation -------------------------------------------------------------------------------
def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool) -> Tensor:
    """Compute (x - mean) / sqrt(variance + eps) over the unmasked values; without `shift_mean`, add
    the mean again."""
    all_of, live = numbers(x), mask.reshape(-1).tolist()
    shown = [value for value, seen in zip(all_of, live, strict=True) if seen]
    mean, scale = mean_of(shown), math.sqrt(variance_of(shown, unbiased) + WHITEN_EPS)
    kept = 0.0 if shift_mean else mean
    return _like(
        [
            (value - mean) / scale + kept if seen else 0.0
            for value, seen in zip(all_of, live, strict=True)
        ],
        x,
    )


def group_normalize(scores: Tensor, group_ids: list[int], method: str, unbiased: bool) -> Columns:
    """Compute advantages within groups.

    "grpo": Shao et al. (2024). "dr_grpo": Liu et al. (2025). "rloo": Kool et al. (2019). "batch":
    grpo, but divided by the spread of all scores. A group of one value gets 0, except with
    "none"."""
    of_all = numbers(scores)
    spread_of_all = math.sqrt(variance_of(of_all, unbiased))
    groups: dict[int, list[int]] = {}
    for place, group in enumerate(group_ids):
        groups.setdefault(group, []).append(place)
    advantages, zero = [0.0] * len(of_all), [False] * len(of_all)
    for places in groups.values():
        mine = [of_all[i] for i in places]
        equal = min(mine) == max(mine)
        mean, spread = mean_of(mine), math.sqrt(variance_of(mine, unbiased))
        divisor = {"grpo": spread + GROUP_EPS, "batch": spread_of_all + GROUP_EPS}.get(method, 1.0)
        for at, i in enumerate(places):
            zero[i] = equal
            if method == "none":
                advantages[i] = mine[at]
            elif method == "rloo":  # less the mean of the others
                advantages[i] = 0.0 if equal else mine[at] - mean_of(mine[:at] + mine[at + 1 :])
            else:
                advantages[i] = 0.0 if equal else (mine[at] - mean) / divisor
    return {
        "advantages": _like(advantages, scores),
        "zero_variance": torch.tensor(zero, dtype=torch.bool),
    }


# ---- rankings ------------------------------------------------------------------------------------
def _log_loss(d: Tensor) -> Tensor:
    """Compute -log sigmoid(d) = log(1 + e^-d)."""
    return torch.logaddexp(torch.zeros_like(d), -d)


def pairwise_ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None) -> Tensor:
    """Compute the mean of -log sigmoid(chosen - rejected - margin).

    Bradley and Terry (1952); the margin: Touvron et al. (2023), Llama 2, eq. 2."""
    return _log_loss(
        chosen - rejected if margin is None else chosen - rejected - margin
    ).sum() / max(1, len(chosen))


def kwise_ranking_loss(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """Average -log sigmoid(better - worse) over the pairs of each prompt, then over prompts. Ouyang
    et al. (2022), eq. 1."""
    bounds, means = cu_groups.tolist(), []
    for start, end in pairwise(bounds):
        rank = ranks[start:end].tolist()
        pairs = [
            (start + i, start + j)
            for i in range(end - start)
            for j in range(end - start)
            if rank[i] < rank[j]
        ]
        if pairs:
            better, worse = zip(*pairs, strict=True)
            means.append(_log_loss(scores[list(better)] - scores[list(worse)]).mean())
    return torch.stack(means).mean() if means else scores[:0].sum()
