"""shaped_gae in Triton: one launch shapes the rewards, scans and sums, one program a sequence; a second one applies the whitening.

The mathematics and shapes are those of gae.py. A sequence is walked in chunks from its end; the advantage, the value and "something live follows" are
carried from chunk to chunk, so its length is a run-time argument. Within a chunk two associative scans from the right do the work: one finds the next live
value, one composes the recurrence's (a, b).

Bytes     the values and the mask are read twice (the second time shifted by one, from the cache); the rest once.
Numerics  float32 elements; what is summed over chunks and sequences is float64, a few scalars a program. Fixed order, no atomics.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.kl import ESTIMATORS
from fusedrl.kernels.normalize import WHITEN_EPS

_CHUNK, _WARPS = 1024, 8
_BLOCK, _ROWS = 1024, 256  # whitening: tokens, and sequences' moments, at a time


# ---- Triton ----------------------------------------------------------------------------------------------------------
@triton.jit
def _compose(a_right, b_right, a_left, b_left):
    return a_left * a_right, b_left + a_left * b_right


@triton.jit
def _nearest(live_right, v_right, live_left, v_left):
    return live_left | live_right, tl.where(live_left != 0, v_left, v_right)


@triton.jit
def _token_kl(logp, ref_logp, ESTIMATOR: tl.constexpr):
    d = logp - ref_logp
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "abs":
        kl = tl.abs(d)
    else:
        x = tl.where(d < -20.0, 20.0, tl.where(d > 20.0, -20.0, -d))
        # expm1(x) - x cancels for small x: there its series, up to x^9 / 9!
        near = 1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0))))))
        kl = tl.where(tl.abs(x) < 0.5, 0.5 * x * x * near, (tl.exp(x) - 1.0) + d)
        kl = tl.where(kl < 0.0, 0.0, kl)
    return kl


@triton.jit
def _merge(count, mean, m2, other_count, other_mean, other_m2):
    # Chan's merge in float64; an empty side changes nothing.
    total = count + other_count
    share = other_count / tl.where(total > 0.0, total, 1.0)
    shift = other_mean - mean
    return total, mean + shift * share, m2 + other_m2 + shift * shift * count * share


@triton.jit(do_not_specialize=["T"])
def _shaped_gae_kernel(
    logp_ptr, ref_logp_ptr, values_ptr, scores_ptr, mask_ptr, cu_seqlens_ptr, kl_coef_ptr, token_rewards_ptr,
    advantages_ptr, returns_ptr, rewards_ptr, kl_ptr, score_ptr, moments_ptr,
    T, kl_coef, gamma, decay, score_bound,
    ESTIMATOR: tl.constexpr, WHITEN: tl.constexpr, CHUNK: tl.constexpr,
):  # one program a sequence, chunks from the right
    b = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        start, end = b * T, b * T + T
    else:
        start, end = tl.load(cu_seqlens_ptr + b).to(tl.int64), tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
    if kl_coef_ptr is not None:
        kl_coef = tl.load(kl_coef_ptr)
    score = tl.load(scores_ptr + b).to(tl.float32)
    score = tl.where(score > score_bound, score_bound, tl.where(score < -score_bound, -score_bound, score))

    lane = tl.arange(0, CHUNK)
    carry_advantage = tl.full([], 0.0, tl.float32)
    carry_value = tl.full([], 0.0, tl.float32)  # the nearest live value behind the chunk, 0 while there is none
    carry_live = tl.full([], 0, tl.int32)
    kl_sum = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(0, chunks):
        t = start + (chunks - 1 - i) * CHUNK + lane
        inside = t < end
        live = tl.load(mask_ptr + t, mask=inside, other=0) != 0
        v = tl.load(values_ptr + t, mask=live, other=0.0).to(tl.float32)
        logp = tl.load(logp_ptr + t, mask=live, other=0.0).to(tl.float32)
        ref_logp = tl.load(ref_logp_ptr + t, mask=live, other=0.0).to(tl.float32)
        kl = tl.where(live, _token_kl(logp, ref_logp, ESTIMATOR), 0.0)

        # The next live value of slot t is the nearest one at or behind slot t + 1.
        live_1 = tl.load(mask_ptr + t + 1, mask=t + 1 < end, other=0) != 0
        v_1 = tl.load(values_ptr + t + 1, mask=live_1, other=0.0).to(tl.float32)
        has_next, next_v = tl.associative_scan((live_1.to(tl.int32), v_1), 0, _nearest, reverse=True)
        next_v = tl.where(has_next != 0, next_v, carry_value)
        has_next = has_next | carry_live

        reward = -kl_coef * kl
        if token_rewards_ptr is not None:
            reward = tl.load(token_rewards_ptr + t, mask=live, other=0.0).to(tl.float32) - kl_coef * kl
        reward = tl.where(has_next != 0, reward, reward + score)
        reward = tl.where(live, reward, 0.0)

        delta = tl.where(live, reward + (gamma * next_v - v), 0.0)
        a, local = tl.associative_scan((tl.where(live, decay, 1.0), delta), 0, _compose, reverse=True)
        running = local + a * carry_advantage
        advantage = tl.where(live, running, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=inside)
        tl.store(returns_ptr + t, tl.where(live, advantage + v, 0.0), mask=inside)
        tl.store(rewards_ptr + t, reward, mask=inside)

        first = lane == 0
        carry_advantage = tl.sum(tl.where(first, running, 0.0))
        carry_value = tl.sum(tl.where(first, next_v, 0.0))
        carry_live = tl.sum(tl.where(first, has_next, 0))
        kl_sum += tl.sum(kl).to(tl.float64)
        if WHITEN:  # float32 deviations from a pivot near the mean, the rest in float64
            n = tl.sum(live.to(tl.int32)).to(tl.float32)
            some = tl.where(n > 0.0, n, 1.0)
            pivot = tl.sum(advantage) / some
            deviation = tl.where(live, advantage - pivot, 0.0)
            residual = tl.sum(deviation).to(tl.float64) / some
            chunk_m2 = tl.sum(deviation * deviation).to(tl.float64) - residual * residual * n
            count, mean, m2 = _merge(count, mean, m2, n.to(tl.float64), pivot.to(tl.float64) + residual, chunk_m2)
    tl.store(kl_ptr + b, kl_sum.to(tl.float32))
    tl.store(score_ptr + b, score)
    if WHITEN:
        tl.store(moments_ptr + 3 * b, count)
        tl.store(moments_ptr + 3 * b + 1, mean)
        tl.store(moments_ptr + 3 * b + 2, m2)


@triton.jit(do_not_specialize=["N", "B", "unbiased"])
def _whiten_kernel(advantages_ptr, mask_ptr, moments_ptr, N, B, unbiased, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    # Every program sums up all sequences' moments in the same order, then whitens its share.
    row = tl.arange(0, ROWS)
    count = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for at in range(0, B, ROWS):
        n = tl.load(moments_ptr + 3 * (at + row), mask=at + row < B, other=0.0)
        total += tl.sum(n * tl.load(moments_ptr + 3 * (at + row) + 1, mask=at + row < B, other=0.0))
        count += tl.sum(n)
    mean = total / tl.where(count > 0.0, count, 1.0)
    for at in range(0, B, ROWS):
        n = tl.load(moments_ptr + 3 * (at + row), mask=at + row < B, other=0.0)
        shift = tl.load(moments_ptr + 3 * (at + row) + 1, mask=at + row < B, other=0.0) - mean
        m2 += tl.sum(tl.load(moments_ptr + 3 * (at + row) + 2, mask=at + row < B, other=0.0) + n * shift * shift)
    divisor = count - unbiased
    rstd = (1.0 / tl.sqrt(m2 / tl.where(divisor > 1.0, divisor, 1.0) + eps)).to(tl.float32)
    high = mean.to(tl.float32)  # mean = high + low: the difference to a large mean stays exact
    low = (mean - high.to(tl.float64)).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        t = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK
        live = tl.load(mask_ptr + t, mask=t < N, other=0) != 0
        advantage = tl.load(advantages_ptr + t, mask=live, other=0.0)
        tl.store(advantages_ptr + t, ((advantage - high) - low) * rstd, mask=live)


# ---- launcher, and the op that torch.compile sees ------------------------------------------------------------------
@torch.library.custom_op("fusedrl::shaped_gae_triton", mutates_args=())
def _shaped_gae_triton(
    logp: Tensor, ref_logp: Tensor, values: Tensor, scores: Tensor, mask: Tensor, cu_seqlens: Tensor | None, kl_coef: float, kl_coef_tensor: Tensor | None,
    kl_estimator: int, gamma: float, lam: float, token_rewards: Tensor | None, score_clip: float | None, whiten: bool, whiten_unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards = (torch.empty(logp.shape, dtype=torch.float32, device=logp.device) for _ in range(3))
    N, B = logp.numel(), scores.shape[0]
    kl_B, score_B = (torch.empty(B, dtype=torch.float32, device=logp.device) for _ in range(2))
    mask = mask.contiguous()
    moments = torch.empty(3 * B, dtype=torch.float64, device=logp.device) if whiten else None
    if B:
        _shaped_gae_kernel[(B,)](
            logp.contiguous(), ref_logp.contiguous(), values.contiguous(), scores.contiguous(), mask, None if cu_seqlens is None else cu_seqlens.contiguous(),
            kl_coef_tensor, None if token_rewards is None else token_rewards.contiguous(), advantages, returns, rewards, kl_B, score_B, moments,
            logp.shape[-1], kl_coef, gamma, gamma * lam, math.inf if score_clip is None else score_clip,
            ESTIMATOR=ESTIMATORS[kl_estimator], WHITEN=whiten, CHUNK=_CHUNK, num_warps=_WARPS)
    if whiten and N:
        # At most 512 programs: each reads every sequence's moments.
        _whiten_kernel[(min(triton.cdiv(N, _BLOCK), 512),)](advantages, mask, moments, N, B, int(whiten_unbiased), WHITEN_EPS, BLOCK=_BLOCK, ROWS=_ROWS)
    return advantages, returns, rewards, kl_B, score_B


@_shaped_gae_triton.register_fake
def _(logp, ref_logp, values, scores, mask, cu_seqlens, kl_coef, kl_coef_tensor, kl_estimator, gamma, lam, token_rewards, score_clip, whiten,
      whiten_unbiased):
    like, per_sequence = torch.empty(logp.shape, dtype=torch.float32, device=logp.device), torch.empty(scores.shape, dtype=torch.float32, device=logp.device)
    return like, torch.empty_like(like), torch.empty_like(like), per_sequence, torch.empty_like(per_sequence)


# ---- what is compiled offline -------------------------------------------------------------------------------------------
_POINTERS = {
    "logp_ptr": "*fp32", "ref_logp_ptr": "*fp32", "values_ptr": "*fp32", "scores_ptr": "*fp32", "mask_ptr": "*i1", "cu_seqlens_ptr": "*i32",
    "kl_coef_ptr": "*fp32", "token_rewards_ptr": "*fp32", "advantages_ptr": "*fp32", "returns_ptr": "*fp32", "rewards_ptr": "*fp32", "kl_ptr": "*fp32",
    "score_ptr": "*fp32", "moments_ptr": "*fp64",
}
_SCALARS = {"T": "i32", "kl_coef": "fp32", "gamma": "fp32", "decay": "fp32", "score_bound": "fp32"}


def _offline(estimator: str, whiten: bool, *absent: str) -> dict:
    signature = {name: kind for name, kind in (_POINTERS | _SCALARS).items() if name not in absent}
    constexprs = {"ESTIMATOR": estimator, "WHITEN": whiten, "CHUNK": _CHUNK} | dict.fromkeys(absent)
    return {"kernel": _shaped_gae_kernel, "signature": signature, "constexprs": constexprs, "num_warps": _WARPS}


OFFLINE_KERNELS = {
    "packed_k1": _offline("k1", True, "kl_coef_ptr", "token_rewards_ptr"),
    "packed_k1_device_coef": _offline("k1", True, "token_rewards_ptr"),
    "padded_k1": _offline("k1", True, "kl_coef_ptr", "token_rewards_ptr", "cu_seqlens_ptr"),
    "packed_k3_token_rewards": _offline("k3", False, "kl_coef_ptr", "moments_ptr"),
    "whiten": {"kernel": _whiten_kernel, "constexprs": {"BLOCK": _BLOCK, "ROWS": _ROWS},
               "signature": {"advantages_ptr": "*fp32", "mask_ptr": "*i1", "moments_ptr": "*fp64", "N": "i64", "B": "i32", "unbiased": "i32", "eps": "fp32"}},
}
