"""gae, shaped_gae and k_step_advantages in Triton, with one program per sequence.

The mathematics and shapes are those of __init__.py. A program walks its sequence in chunks and
carries state from one chunk to the next, so the length of a sequence is a run-time argument. gae
and shaped_gae walk from the end, in one launch. Associative scans find the next unmasked value (if
tokens are masked) and compose the recurrence's (a, b). A second launch applies shaped_gae's
whitening.

Scans from the end run forward over lanes that hold the tokens in reverse order: lane 0 loads and
stores the last token of a chunk. Triton's own reverse scan is not used. In released versions it has
been reported wrong where the order of the operands matters (triton issues 4362 and 8412), as it
does here.

k_step_advantages is two launches and O(N) work, whatever k. The unmasked tokens of a sequence are
divided into blocks of k, so a window of k consists of the end of one block and the beginning of the
next. The first launch walks from the left and stores the sums from each block's beginning, without
gaps. The second walks from the right, sums to each block's end and adds the two. Sums only, of k
terms or fewer, so nothing cancels.

Bytes     gae and shaped_gae read the values and the mask twice (the second time shifted by one,
          from the cache), the rest once. k-step 24 read and 16 written per token, and twice the
          mask; without a mask 20 and 12.
Numerics  float32 elements; the sums of shaped_gae over chunks and sequences are float64, a few
          scalars per program. Fixed order, no atomics.
Source    blocks and windows: van Herk (1992), A fast algorithm for local minimum and maximum
          filters; Gil and Werman (1993), for any associative operation.

One file: the kernels share tiles, and the layout of partial results, with their launchers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.kl._triton import difference, kl_value
from fusedrl.kernels.normalize import WHITEN_EPS
from fusedrl.kernels.normalize._triton import merge, moments, store_moments, whiten_kernel

_CHUNK, _WARPS = 1024, 8
_BLOCK, _MERGED = 1024, 256  # whitening: tokens, and sequences' moments, at a time


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _compose(a_right, b_right, a_left, b_left):
    # The scan meets tokens from the end, so its first operand is what lies right of the second.
    return a_left * a_right, b_left + a_left * b_right


@triton.jit
def _nearest(live_right, v_right, live_left, v_left):
    return live_left | live_right, tl.where(live_left != 0, v_left, v_right)


@triton.jit
def _from_beginning(begins_left, a_left, b_left, begins_right, a_right, b_right):
    # b = b_left + a_left b_right, but what lies left of a block's beginning is forgotten.
    begins = begins_right != 0
    return (
        begins_left | begins_right,
        tl.where(begins, a_right, a_left * a_right),
        tl.where(begins, b_right, b_left + a_left * b_right),
    )


@triton.jit
def _to_end(ends_right, a_right, b_right, ends_left, a_left, b_left):
    # The same from the right: what lies right of a block's end is forgotten.
    ends = ends_left != 0
    return (
        ends_left | ends_right,
        tl.where(ends, a_left, a_left * a_right),
        tl.where(ends, b_left, b_left + a_left * b_right),
    )


@triton.jit
def _place(cu_seqlens_ptr, b, T):
    """Return the index of a sequence's first token among all tokens, and its length. Indices within
    a sequence fit into 32 bits."""
    if cu_seqlens_ptr is None:
        start, length = b.to(tl.int64) * T, T
    else:
        first = tl.load(cu_seqlens_ptr + b)
        start, length = first.to(tl.int64), tl.load(cu_seqlens_ptr + b + 1) - first
    return start, length


@triton.jit
def _from(ptr, start):
    if ptr is None:
        moved = None
    else:
        moved = ptr + start
    return moved


@triton.jit
def _live(mask_ptr, t, length):
    live = t < length
    if mask_ptr is not None:
        live = tl.load(mask_ptr + t, mask=live, other=0) != 0
    return live


@triton.jit
def _at(x, lane, wanted):
    return tl.sum(tl.where(lane == wanted, x, 0))


@triton.jit
def _next_value(values_ptr, mask_ptr, t, length, carry_value):
    """Return, for each token, the nearest unmasked value after it, searched in this chunk and the
    token after the chunk. If there is none, `carry_value` is the nearest one. Also return whether
    the value was found there."""
    live_1 = _live(mask_ptr, t + 1, length)
    v_1 = tl.load(values_ptr + t + 1, mask=live_1, other=0.0).to(tl.float32)
    has_next = live_1.to(tl.int32)
    if mask_ptr is not None:
        has_next, v_1 = tl.associative_scan((has_next, v_1), 0, _nearest)
    return tl.where(has_next != 0, v_1, carry_value), has_next


@triton.jit
def _advantages(delta, live, decay, carry_advantage):
    """Compute the recurrence across masked tokens; the result is defined at every token."""
    a, local = tl.associative_scan((tl.where(live, decay, 1.0), delta), 0, _compose)
    return local + a * carry_advantage


@triton.jit(do_not_specialize=["T"])
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    last_values_ptr,
    advantages_ptr,
    returns_ptr,
    T,
    gamma,
    decay,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0)
    start, length = _place(cu_seqlens_ptr, b, T)
    rewards_ptr += start
    values_ptr += start
    mask_ptr = _from(mask_ptr, start)
    advantages_ptr += start
    returns_ptr += start
    lane = tl.arange(0, CHUNK)
    carry_advantage = tl.full([], 0.0, tl.float32)
    carry_value = tl.full([], 0.0, tl.float32)
    if last_values_ptr is not None:
        carry_value = tl.load(last_values_ptr + b)
    chunks = tl.cdiv(length, CHUNK)
    for i in range(0, chunks):
        t = (chunks - i) * CHUNK - 1 - lane  # from the end
        live = _live(mask_ptr, t, length)
        v = tl.load(values_ptr + t, mask=live, other=0.0)
        reward = tl.load(rewards_ptr + t, mask=live, other=0.0)
        next_v, _ = _next_value(values_ptr, mask_ptr, t, length, carry_value)
        delta = tl.where(live, reward + (gamma * next_v - v), 0.0)
        running = _advantages(delta, live, decay, carry_advantage)
        tl.store(advantages_ptr + t, tl.where(live, running, 0.0), mask=t < length)
        tl.store(returns_ptr + t, tl.where(live, running + v, 0.0), mask=t < length)
        carry_advantage = _at(running, lane, CHUNK - 1)
        carry_value = _at(next_v, lane, CHUNK - 1)


@triton.jit(do_not_specialize=["T"])
def _shaped_gae_kernel(
    logp_ptr,
    ref_logp_ptr,
    values_ptr,
    scores_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    kl_coef_ptr,
    token_rewards_ptr,
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    score_ptr,
    moments_ptr,
    T,
    kl_coef,
    gamma,
    decay,
    score_bound,
    ESTIMATOR: tl.constexpr,
    WHITEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0)
    start, length = _place(cu_seqlens_ptr, b, T)
    logp_ptr += start
    ref_logp_ptr += start
    values_ptr += start
    mask_ptr = _from(mask_ptr, start)
    token_rewards_ptr = _from(token_rewards_ptr, start)
    advantages_ptr += start
    returns_ptr += start
    rewards_ptr += start
    if kl_coef_ptr is not None:
        kl_coef = tl.load(kl_coef_ptr)
    score = tl.load(scores_ptr + b).to(tl.float32)
    score = tl.where(
        score > score_bound, score_bound, tl.where(score < -score_bound, -score_bound, score)
    )

    lane = tl.arange(0, CHUNK)
    carry_advantage = tl.full([], 0.0, tl.float32)
    carry_value = tl.full([], 0.0, tl.float32)
    carry_live = tl.full([], 0, tl.int32)
    kl_sum = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    chunks = tl.cdiv(length, CHUNK)
    for i in range(0, chunks):
        t = (chunks - i) * CHUNK - 1 - lane  # from the end
        inside = t < length
        live = _live(mask_ptr, t, length)
        v = tl.load(values_ptr + t, mask=live, other=0.0).to(tl.float32)
        logp = tl.load(logp_ptr + t, mask=live, other=0.0).to(tl.float32)
        ref_logp = tl.load(ref_logp_ptr + t, mask=live, other=0.0).to(tl.float32)
        d, rest = difference(logp, ref_logp)
        kl = tl.where(live, kl_value(d, rest, ESTIMATOR), 0.0)
        next_v, has_next = _next_value(values_ptr, mask_ptr, t, length, carry_value)
        has_next |= carry_live

        reward = -kl_coef * kl
        if token_rewards_ptr is not None:
            reward = (
                tl.load(token_rewards_ptr + t, mask=live, other=0.0).to(tl.float32) - kl_coef * kl
            )
        reward = tl.where(has_next != 0, reward, reward + score)
        reward = tl.where(live, reward, 0.0)

        delta = tl.where(live, reward + (gamma * next_v - v), 0.0)
        running = _advantages(delta, live, decay, carry_advantage)
        advantage = tl.where(live, running, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=inside)
        tl.store(returns_ptr + t, tl.where(live, advantage + v, 0.0), mask=inside)
        tl.store(rewards_ptr + t, reward, mask=inside)

        carry_advantage = _at(running, lane, CHUNK - 1)
        carry_value = _at(next_v, lane, CHUNK - 1)
        carry_live = _at(has_next, lane, CHUNK - 1)
        kl_sum += tl.sum(kl).to(tl.float64)
        if WHITEN:
            n_c, mean_c, m2_c = moments(advantage, live)
            count, mean, m2 = merge(count, mean, m2, n_c, mean_c, m2_c)
    tl.store(kl_ptr + b, kl_sum.to(tl.float32))
    tl.store(score_ptr + b, score)
    if WHITEN:
        store_moments(moments_ptr, b, count, mean, m2)


@triton.jit(do_not_specialize=["T", "k"])
def _beginnings_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    last_values_ptr,
    sums_ptr,
    live_values_ptr,
    tails_ptr,
    counts_ptr,
    T,
    k,
    gamma,
    CHUNK: tl.constexpr,
):
    """Store, for the p-th unmasked token, the discounted rewards since the beginning of its block,
    and its value, at place p of its sequence. Also store the tails (the discounted value after the
    last token) and the number of unmasked tokens."""
    b = tl.program_id(0)
    start, length = _place(cu_seqlens_ptr, b, T)
    rewards_ptr += start
    values_ptr += start
    mask_ptr = _from(mask_ptr, start)
    sums_ptr += start
    live_values_ptr += start
    lane = tl.arange(0, CHUNK)
    count = tl.full([], 0, tl.int32)
    carry_a = tl.full([], 1.0, tl.float32)
    carry = tl.full([], 0.0, tl.float32)
    for at in range(0, length, CHUNK):
        t = at + lane
        live = _live(mask_ptr, t, length)
        reward = tl.load(rewards_ptr + t, mask=live, other=0.0)
        p = t
        if mask_ptr is not None:
            p = count + tl.cumsum(live.to(tl.int32), 0) - 1
        begins = live & (p % k == 0)
        seen, a, total = tl.associative_scan(
            (begins.to(tl.int32), tl.where(live, gamma, 1.0), reward), 0, _from_beginning
        )
        total = tl.where(seen != 0, total, carry + carry_a * total)
        a = tl.where(seen != 0, a, carry_a * a)
        tl.store(sums_ptr + p, total, mask=live)
        if mask_ptr is not None:
            tl.store(live_values_ptr + p, tl.load(values_ptr + t, mask=live, other=0.0), mask=live)
            count += tl.sum(live.to(tl.int32))
        carry_a = _at(a, lane, CHUNK - 1)
        carry = _at(total, lane, CHUNK - 1)
    last_value = tl.full([], 0.0, tl.float32)
    if last_values_ptr is not None:
        last_value = tl.load(last_values_ptr + b)
    tl.store(tails_ptr + b, carry + carry_a * last_value)
    tl.store(counts_ptr + b, length if mask_ptr is None else count)


@triton.jit(do_not_specialize=["T", "k"])
def _k_step_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    last_values_ptr,
    sums_ptr,
    live_values_ptr,
    tails_ptr,
    counts_ptr,
    advantages_ptr,
    returns_ptr,
    T,
    k,
    gamma,
    gamma_k,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0)
    start, length = _place(cu_seqlens_ptr, b, T)
    rewards_ptr += start
    values_ptr += start
    mask_ptr = _from(mask_ptr, start)
    sums_ptr += start
    live_values_ptr += start
    advantages_ptr += start
    returns_ptr += start
    last_value = tl.full([], 0.0, tl.float32)
    if last_values_ptr is not None:
        last_value = tl.load(last_values_ptr + b)
    tail = tl.load(tails_ptr + b)
    count = tl.load(counts_ptr + b)
    left = count  # live tokens of this chunk and those left of it
    lane = tl.arange(0, CHUNK)
    carry_a = tl.full([], 1.0, tl.float32)
    carry = tl.full([], 0.0, tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for i in range(0, chunks):
        t = (chunks - i) * CHUNK - 1 - lane  # from the end
        live = _live(mask_ptr, t, length)
        v = tl.load(values_ptr + t, mask=live, other=0.0)
        reward = tl.load(rewards_ptr + t, mask=live, other=0.0)
        p = t
        if mask_ptr is not None:
            p = left - tl.cumsum(live.to(tl.int32), 0)
            left -= tl.sum(live.to(tl.int32))
        in_block = p % k
        reward = tl.where(live & (p == count - 1), reward + gamma * last_value, reward)
        ends = live & (in_block == k - 1)
        seen, a, window = tl.associative_scan(
            (ends.to(tl.int32), tl.where(live, gamma, 1.0), reward), 0, _to_end
        )
        window = tl.where(seen != 0, window, window + a * carry)
        a = tl.where(seen != 0, a, a * carry_a)
        carry_a = _at(a, lane, CHUNK - 1)
        carry = _at(window, lane, CHUNK - 1)

        # of the window; in the next block if that exists and this is not all of its own
        last = tl.minimum(p + k, count) - 1
        crosses = live & (in_block > 0) & (p - in_block + k < count)
        beginning = tl.load(sums_ptr + last, mask=crosses & (last < count - 1), other=0.0)
        beginning = tl.where(last == count - 1, tail, beginning)
        window += tl.where(crosses, a * beginning, 0.0)
        goes_on = live & (p + k < count)
        window += tl.where(
            goes_on, gamma_k * tl.load(live_values_ptr + p + k, mask=goes_on, other=0.0), 0.0
        )
        advantage = tl.where(live, window - v, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=t < length)
        tl.store(returns_ptr + t, tl.where(live, advantage + v, 0.0), mask=t < length)


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _like(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate advantages and returns for a kernel to write."""
    return torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device), torch.empty(
        tokens.shape, dtype=torch.float32, device=tokens.device
    )


@torch.library.custom_op("fusedrl::gae_triton", mutates_args=())
def _gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _like(rewards)
    B = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rewards.numel():
        _gae_kernel[(B,)](
            *_contiguous(rewards, values, mask, cu_seqlens, last_values),
            advantages,
            returns,
            rewards.shape[-1],
            gamma,
            gamma * lam,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
        )
    return advantages, returns


@_gae_triton.register_fake
def _(rewards, values, mask, cu_seqlens, gamma, lam, last_values):
    return _like(rewards)


@torch.library.custom_op("fusedrl::k_step_advantages_triton", mutates_args=())
def _k_step_advantages_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    k: int,
    gamma: float,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _like(rewards)
    N, B = rewards.numel(), rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if N:
        k = min(k, N)  # no window is longer; places and k add up in int32
        rewards, values, mask, cu_seqlens, last_values = _contiguous(
            rewards, values, mask, cu_seqlens, last_values
        )
        sums = torch.empty(N, dtype=torch.float32, device=rewards.device)
        live_values = values if mask is None else torch.empty_like(sums)
        tails, counts = (
            torch.empty(B, dtype=torch.float32, device=rewards.device),
            torch.empty(B, dtype=torch.int32, device=rewards.device),
        )
        inputs, scratch, T = (
            (rewards, values, mask, cu_seqlens, last_values),
            (sums, live_values, tails, counts),
            advantages.shape[-1],
        )
        _beginnings_kernel[(B,)](*inputs, *scratch, T, k, gamma, CHUNK=_CHUNK, num_warps=_WARPS)
        _k_step_kernel[(B,)](
            *inputs,
            *scratch,
            advantages,
            returns,
            T,
            k,
            gamma,
            gamma**k,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
        )
    return advantages, returns


@_k_step_advantages_triton.register_fake
def _(rewards, values, mask, cu_seqlens, k, gamma, last_values):
    return _like(rewards)


@torch.library.custom_op("fusedrl::shaped_gae_triton", mutates_args=())
def _shaped_gae_triton(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_coef_tensor: Tensor | None,
    kl_estimator: int,
    gamma: float,
    lam: float,
    token_rewards: Tensor | None,
    score_clip: float | None,
    whiten: bool,
    whiten_unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (advantages, returns), rewards = (
        _like(logp),
        torch.empty(logp.shape, dtype=torch.float32, device=logp.device),
    )
    N, B = logp.numel(), scores.shape[0]
    kl_B, score_B = (torch.empty(B, dtype=torch.float32, device=logp.device) for _ in range(2))
    logp, ref_logp, values, scores, mask, cu_seqlens, token_rewards = _contiguous(
        logp, ref_logp, values, scores, mask, cu_seqlens, token_rewards
    )
    parts = torch.empty(3 * B, dtype=torch.float64, device=logp.device) if whiten else None
    if B:
        _shaped_gae_kernel[(B,)](
            logp,
            ref_logp,
            values,
            scores,
            mask,
            cu_seqlens,
            kl_coef_tensor,
            token_rewards,
            advantages,
            returns,
            rewards,
            kl_B,
            score_B,
            parts,
            advantages.shape[-1],
            kl_coef,
            gamma,
            gamma * lam,
            math.inf if score_clip is None else score_clip,
            ESTIMATOR=kl_estimator,
            WHITEN=whiten,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
        )
    if whiten and N:
        # In place, at most 512 programs: each reads every sequence's moments.
        whiten_kernel[(min(triton.cdiv(N, _BLOCK), 512),)](
            advantages,
            mask,
            parts,
            advantages,
            N,
            B,
            int(whiten_unbiased),
            WHITEN_EPS,
            0,
            BLOCK=_BLOCK,
            MERGED=_MERGED,
        )
    return advantages, returns, rewards, kl_B, score_B


@_shaped_gae_triton.register_fake
def _(
    logp,
    ref_logp,
    values,
    scores,
    mask,
    cu_seqlens,
    kl_coef,
    kl_coef_tensor,
    kl_estimator,
    gamma,
    lam,
    token_rewards,
    score_clip,
    whiten,
    whiten_unbiased,
):
    per_sequence = torch.empty(scores.shape, dtype=torch.float32, device=logp.device)
    return *_like(logp), _like(logp)[0], per_sequence, torch.empty_like(per_sequence)


# ---- what is compiled offline --------------------------------------------------------------------
_SCALARS = {
    "T": "i32",
    "k": "i32",
    **dict.fromkeys(("kl_coef", "gamma", "gamma_k", "decay", "score_bound"), "fp32"),
}
_POINTERS = {
    "mask_ptr": "*i1",
    "cu_seqlens_ptr": "*i32",
    "counts_ptr": "*i32",
    "moments_ptr": "*fp64",
}  # the others float32


def _offline(kernel, *absent: str, **constexprs: int | bool) -> dict:
    fixed = {"CHUNK": _CHUNK} | constexprs | dict.fromkeys(absent)
    signature = {
        name: (_SCALARS | _POINTERS).get(name, "*fp32")
        for name in kernel.arg_names
        if name not in fixed
    }
    return {"kernel": kernel, "signature": signature, "constexprs": fixed, "num_warps": _WARPS}


OFFLINE_KERNELS = {
    "gae_packed": _offline(_gae_kernel, "last_values_ptr"),
    "gae_packed_unmasked": _offline(_gae_kernel, "mask_ptr", "last_values_ptr"),
    "gae_padded_last_values": _offline(_gae_kernel, "cu_seqlens_ptr"),
    "beginnings_packed": _offline(_beginnings_kernel),
    "beginnings_padded_unmasked": _offline(
        _beginnings_kernel, "mask_ptr", "cu_seqlens_ptr", "last_values_ptr"
    ),
    "k_step_packed": _offline(_k_step_kernel),
    "k_step_padded_unmasked": _offline(
        _k_step_kernel, "mask_ptr", "cu_seqlens_ptr", "last_values_ptr"
    ),
    "shaped_packed_k1": _offline(
        _shaped_gae_kernel, "kl_coef_ptr", "token_rewards_ptr", ESTIMATOR=0, WHITEN=True
    ),
    "shaped_packed_k1_device_coef": _offline(
        _shaped_gae_kernel, "token_rewards_ptr", ESTIMATOR=0, WHITEN=True
    ),
    "shaped_padded_k1": _offline(
        _shaped_gae_kernel,
        "kl_coef_ptr",
        "token_rewards_ptr",
        "cu_seqlens_ptr",
        ESTIMATOR=0,
        WHITEN=True,
    ),
    "shaped_packed_k3_token_rewards": _offline(
        _shaped_gae_kernel, "kl_coef_ptr", "moments_ptr", ESTIMATOR=2, WHITEN=False
    ),
}
