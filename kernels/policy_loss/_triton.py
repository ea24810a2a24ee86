"""policy_value_loss in Triton: one launch computes the gradients and the sums of each block of
tokens; a second launch adds up the blocks.

The mathematics, shapes and numerics are those of __init__.py; C++
(csrc/cpu/ops/policy_value_loss.cpp) does the same in the same order.

Shapes    N tokens in blocks of BLOCK; partials [ROWS, blocks] float32, one row per sum. Blocks are
          added in a fixed order, without atomics.
Bytes     policy 16 N read (4 N more for each optional input) and 4 N written; value 8 N (12 N with
          a clip) and 4 N; the partials are N / 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.kl._triton import clamp, exponential, kl_slope, kl_value
from fusedrl.kernels.objective import COEFFICIENTS, KL_ESTIMATORS
from fusedrl.kernels.policy_loss import _fused as policy_loss_fused

_BLOCK = 2048
_CHUNK = 256
_ROWS = 32

# Rows of the partials. 0 to 16 are sums over the tokens of a block; then two maxima; then the
# moments of a block, of count _TOKENS.
(
    _LOSS,
    _LOW,
    _HIGH,
    _DUAL,
    _K1,
    _K2,
    _K3,
    _RATIO,
    _SQUARED,
    _CLAMPED,
    _ENTROPY,
    _TOKENS,
    _REF_KL,
    _CORRECTION,
) = (tl.constexpr(i) for i in range(14))
_VALUE_LOSS, _VALUE_CLIPPED, _VALUE = (tl.constexpr(i) for i in range(14, 17))
_NEGATED_MIN, _MAX = (tl.constexpr(i) for i in range(17, 19))
# three rows each: a mean, what its rounding left over, squared deviations
_RETURN, _RESIDUAL = tl.constexpr(19), tl.constexpr(22)

# the number of "sequence_k2", behind those of kl/_triton.py
_KL_SEQUENCE = tl.constexpr(len(KL_ESTIMATORS))


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _kl_value(k, kl_sum, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == _KL_SEQUENCE:
        value = 0.5 * k * kl_sum
    else:
        value = kl_value(k, 0.0, ESTIMATOR)
    return value


@triton.jit
def _kl_slope(k, kl_sum, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == _KL_SEQUENCE:
        slope = kl_sum
    else:
        slope = kl_slope(k, ESTIMATOR)
    return slope


@triton.jit
def _store_moments(out_ptr, blocks, x, live, count):
    """Store mean and sum of squared deviations of a block. The mean is stored as two numbers: far
    from 0, one float32 is too coarse for the variance."""
    mean = tl.sum(tl.where(live, x, 0.0)) / tl.maximum(count, 1.0)
    deviation = tl.where(live, x - mean, 0.0)
    rest = tl.sum(deviation) / tl.maximum(count, 1.0)
    tl.store(out_ptr, mean)
    tl.store(out_ptr + blocks, rest)
    tl.store(out_ptr + 2 * blocks, tl.sum(deviation * deviation) - rest * rest * count)


@triton.jit(do_not_specialize=["N", "blocks"])
def _block_kernel(
    logp_ptr,
    old_logp_ptr,
    advantages_ptr,
    weights_ptr,
    entropy_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    ref_logp_ptr,
    correction_ptr,
    log_s_ptr,
    kl_sum_ptr,
    logp_grad_ptr,
    values_grad_ptr,
    partials_ptr,
    N,
    blocks,
    lower,
    upper,
    dual,
    tau_positive,
    tau_negative,
    beta,
    kl_coef,
    entropy_coef,
    value_clip,
    value_coef,
    POLICY: tl.constexpr,
    KIND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    weights = tl.load(weights_ptr + n, mask=inside, other=0.0)
    live = weights != 0.0
    tokens = tl.sum(live.to(tl.float32))
    out_ptr = partials_ptr + block
    tl.store(out_ptr + _TOKENS * blocks, tokens)
    if POLICY:
        logp = tl.load(logp_ptr + n, mask=live, other=0.0)
        advantages = tl.load(advantages_ptr + n, mask=live, other=0.0)
        d = logp - tl.load(old_logp_ptr + n, mask=live, other=0.0)
        beyond = tl.abs(d) > 20.0
        ratio, excess = exponential(clamp(d), d)
        high = tl.zeros([BLOCK], dtype=tl.int1)
        low = high
        too_far = high
        # terms, and slope: their derivative by logp
        if KIND == "reinforce":
            terms = -advantages * logp
            slope = -advantages
        elif KIND == "dro":
            terms = 0.5 * beta * d * d - advantages * logp
            slope = beta * d - advantages
        elif KIND == "kl_penalty":
            terms = beta * excess - advantages * ratio
            slope = tl.where(beyond, 0.0, beta * (excess + d) - advantages * ratio)
        elif KIND == "cispo":
            high = live & (ratio > upper)
            slope = -advantages * tl.where(high, upper, ratio)
            terms = slope * logp
        elif KIND == "sapo":
            tau = tl.where(advantages > 0.0, tau_positive, tau_negative)
            x = tau * (1.0 - ratio)
            e = tl.exp(tl.where(x < -80.0, -80.0, tl.where(x > 80.0, 80.0, x)))
            sigmoid = 1.0 / (1.0 + e)
            terms = -advantages * (4.0 / tau * sigmoid)
            slope = tl.where(beyond, 0.0, -advantages * (4.0 * sigmoid * (e * sigmoid) * ratio))
        elif KIND == "geometric_mean":
            log_s = tl.load(log_s_ptr + n, mask=live, other=0.0)
            s, _ = exponential(clamp(log_s), log_s)
            high = (advantages > 0.0) & (d > upper)
            low = (advantages < 0.0) & (d < lower)
            terms = -advantages * s
            slope = -advantages * tl.where(high | low | (tl.abs(log_s) > 20.0), 0.0, s)
        else:  # clip, ratio, gspo
            r = ratio
            cut = beyond
            if KIND == "gspo":
                log_s = tl.load(log_s_ptr + n, mask=live, other=0.0)
                r, _ = exponential(clamp(log_s), log_s)
                cut = tl.abs(log_s) > 20.0
            high = (advantages > 0.0) & (r > upper)
            low = (advantages < 0.0) & (r < lower)
            too_far = (advantages < 0.0) & (r > dual)
            terms = -advantages * tl.where(
                high, upper, tl.where(low, lower, tl.where(too_far, dual, r))
            )
            slope = -advantages * tl.where(high | low | too_far | cut, 0.0, r)
        if correction_ptr is not None:
            correction = tl.load(correction_ptr + n, mask=live, other=0.0)
            terms *= correction
            slope *= correction
            tl.store(out_ptr + _CORRECTION * blocks, tl.sum(correction))
        else:
            tl.store(out_ptr + _CORRECTION * blocks, tokens)
        if ref_logp_ptr is not None:
            k = logp - tl.load(ref_logp_ptr + n, mask=live, other=0.0)
            kl_sum = k
            if kl_sum_ptr is not None:
                kl_sum = tl.load(kl_sum_ptr + n, mask=live, other=0.0)
            kl = _kl_value(k, kl_sum, KL_ESTIMATOR)
            terms += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            slope += tl.where(kl_coef != 0.0, kl_coef * _kl_slope(k, kl_sum, KL_GRADIENT), 0.0)
            tl.store(out_ptr + _REF_KL * blocks, tl.sum(kl))
        else:
            tl.store(out_ptr + _REF_KL * blocks, 0.0)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + n, mask=live, other=0.0)
            terms -= entropy_coef * entropy
            tl.store(out_ptr + _ENTROPY * blocks, tl.sum(entropy))
        else:
            tl.store(out_ptr + _ENTROPY * blocks, 0.0)
        tl.store(logp_grad_ptr + n, tl.where(live, weights * slope, 0.0), mask=inside)
        live_ratio = tl.where(live, ratio, 0.0)
        tl.store(out_ptr + _LOSS * blocks, tl.sum(weights * terms))
        tl.store(out_ptr + _LOW * blocks, tl.sum(low.to(tl.float32)))
        tl.store(out_ptr + _HIGH * blocks, tl.sum(high.to(tl.float32)))
        tl.store(out_ptr + _DUAL * blocks, tl.sum(too_far.to(tl.float32)))
        tl.store(out_ptr + _K1 * blocks, -tl.sum(d))
        tl.store(out_ptr + _K2 * blocks, tl.sum(d * d * 0.5))
        tl.store(out_ptr + _K3 * blocks, tl.sum(excess))
        tl.store(out_ptr + _RATIO * blocks, tl.sum(live_ratio))
        tl.store(out_ptr + _SQUARED * blocks, tl.sum(live_ratio * live_ratio))
        tl.store(out_ptr + _CLAMPED * blocks, tl.sum(beyond.to(tl.float32)))
        tl.store(out_ptr + _NEGATED_MIN * blocks, tl.max(tl.where(live, -ratio, float("-inf"))))
        tl.store(out_ptr + _MAX * blocks, tl.max(tl.where(live, ratio, float("-inf"))))
    if VALUE:
        values = tl.load(values_ptr + n, mask=live, other=0.0)
        returns = tl.load(returns_ptr + n, mask=live, other=0.0)
        error = values - returns
        squares = error * error
        if VALUE_CLIP:
            old = tl.load(old_values_ptr + n, mask=live, other=0.0)
            top, bottom = old + value_clip, old - value_clip
            bounded_error = (
                tl.where(values > top, top, tl.where(values < bottom, bottom, values)) - returns
            )
            clipped = ((values > top) | (values < bottom)) & (
                bounded_error * bounded_error > squares
            )
            squares = tl.where(clipped, bounded_error * bounded_error, squares)
            error = tl.where(clipped, 0.0, error)
            tl.store(out_ptr + _VALUE_CLIPPED * blocks, tl.sum(clipped.to(tl.float32)))
        else:
            tl.store(out_ptr + _VALUE_CLIPPED * blocks, 0.0)
        tl.store(
            values_grad_ptr + n, tl.where(live, value_coef * weights * error, 0.0), mask=inside
        )
        tl.store(out_ptr + _VALUE_LOSS * blocks, tl.sum(weights * (0.5 * squares)))
        tl.store(out_ptr + _VALUE * blocks, tl.sum(values))
        _store_moments(out_ptr + _RETURN * blocks, blocks, returns, live, tokens)
        _store_moments(out_ptr + _RESIDUAL * blocks, blocks, returns - values, live, tokens)


@triton.jit
def _row(x, rows, wanted: tl.constexpr):
    return tl.sum(tl.where(rows == wanted, x, 0.0))


@triton.jit
def _mean(ptr, blocks, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float64) + tl.load(
        ptr + blocks, mask=inside, other=0.0
    )


@triton.jit
def _merge_moments(counts_ptr, moments_ptr, blocks, seen, CHUNK: tl.constexpr):
    """Merge the blocks' means and sums of squared deviations into those of all tokens (Chan's
    merge), chunks of blocks in order, in float64."""
    at = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(0, blocks, CHUNK):
        inside = start + at < blocks
        sums += tl.load(counts_ptr + start + at, mask=inside, other=0.0) * _mean(
            moments_ptr + start + at, blocks, inside
        )
    center = tl.sum(sums) / seen
    squares = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(0, blocks, CHUNK):
        inside = start + at < blocks
        difference = _mean(moments_ptr + start + at, blocks, inside) - center
        squares += tl.load(counts_ptr + start + at, mask=inside, other=0.0) * (
            difference * difference
        )
        squares += tl.load(moments_ptr + 2 * blocks + start + at, mask=inside, other=0.0)
    return center, tl.sum(squares)


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(
    partials_ptr,
    loss_ptr,
    stats_ptr,
    blocks,
    value_coef,
    POLICY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute every statistic from the partials: one program, chunks of blocks in order, in
    float64."""
    rows = tl.arange(0, ROWS)
    at = tl.arange(0, CHUNK)
    sums = tl.zeros([ROWS, CHUNK], dtype=tl.float64)
    maxima = tl.full([ROWS, CHUNK], float("-inf"), dtype=tl.float32)
    for start in range(0, blocks, CHUNK):
        inside = (start + at)[None, :] < blocks
        part = tl.load(
            partials_ptr + rows[:, None].to(tl.int64) * blocks + (start + at)[None, :],
            mask=inside & (rows < 19)[:, None],
            other=0.0,
        )
        sums += part.to(tl.float64)
        maxima = tl.maximum(maxima, tl.where(inside, part, float("-inf")))
    total, largest = tl.sum(sums, axis=1), tl.max(maxima, axis=1)
    tokens = _row(total, rows, _TOKENS)
    seen = tl.maximum(tokens, 1.0)
    loss = tl.zeros([], dtype=tl.float64)
    if POLICY:
        loss += _row(total, rows, _LOSS)
        ratio_sum, squared = _row(total, rows, _RATIO), _row(total, rows, _SQUARED)
        some = tokens > 0.0
        whole = ratio_sum == ratio_sum  # maxima drop NaN; the sum does not
        tl.store(stats_ptr, _row(total, rows, _LOSS))
        for i in tl.static_range(1, 7):  # the clip fractions and the KLs
            tl.store(stats_ptr + i, _row(total, rows, i) / seen)
        tl.store(stats_ptr + 7, tl.where(some, ratio_sum / seen, 1.0))
        tl.store(
            stats_ptr + 8,
            tl.where(some, tl.where(whole, -_row(largest, rows, _NEGATED_MIN), ratio_sum), 1.0),
        )
        tl.store(
            stats_ptr + 9,
            tl.where(some, tl.where(whole, _row(largest, rows, _MAX), ratio_sum), 1.0),
        )
        tl.store(
            stats_ptr + 10,
            tl.where(some, ratio_sum * ratio_sum / tl.where(some, squared, 1.0), 0.0),
        )
        tl.store(stats_ptr + 11, _row(total, rows, _CLAMPED) / seen)
        tl.store(stats_ptr + 12, _row(total, rows, _REF_KL) / seen)
        tl.store(stats_ptr + 13, _row(total, rows, _ENTROPY) / seen)
        tl.store(stats_ptr + 14, tl.where(some, _row(total, rows, _CORRECTION) / seen, 1.0))
        tl.store(stats_ptr + 15, tokens)
    else:
        for i in tl.static_range(16):
            tl.store(stats_ptr + i, 0.0)
    if VALUE:
        value_loss = _row(total, rows, _VALUE_LOSS)
        loss += value_coef * value_loss
        return_mean, spread = _merge_moments(
            partials_ptr + _TOKENS * blocks, partials_ptr + _RETURN * blocks, blocks, seen, CHUNK
        )
        _, unexplained = _merge_moments(
            partials_ptr + _TOKENS * blocks, partials_ptr + _RESIDUAL * blocks, blocks, seen, CHUNK
        )
        resolution = 1.1920928955078125e-07 * return_mean
        varies = spread > seen * resolution * resolution
        tl.store(stats_ptr + 16, value_loss)
        tl.store(stats_ptr + 17, _row(total, rows, _VALUE_CLIPPED) / seen)
        tl.store(
            stats_ptr + 18, tl.where(varies, 1.0 - unexplained / tl.where(varies, spread, 1.0), 0.0)
        )
        tl.store(stats_ptr + 19, _row(total, rows, _VALUE) / seen)
        tl.store(stats_ptr + 20, return_mean)
        tl.store(stats_ptr + 21, tokens)
    else:
        for i in tl.static_range(16, 22):
            tl.store(stats_ptr + i, 0.0)
    tl.store(loss_ptr, loss)


# ---- custom op and launcher: what torch.compile sees, allocate, grid -----------------------------
@torch.library.custom_op("fusedrl::policy_value_loss_triton", mutates_args=())
def policy_value_loss_triton(
    logp: Tensor | None,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor,
    entropy: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logp: Tensor | None,
    correction: Tensor | None,
    sequence_log_ratio: Tensor | None,
    kl_sum: Tensor | None,
    kind: str,
    kl_estimator: str,
    kl_gradient: str,
    coefficients: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute loss, statistics, d loss / d logp and d loss / d values for a unit upstream gradient.
    A gradient is empty if its part is absent."""
    x = policy_loss_fused.Arguments(
        logp,
        old_logp,
        advantages,
        weights,
        entropy,
        values,
        old_values,
        returns,
        ref_logp,
        correction,
        sequence_log_ratio,
        kl_sum,
        kind,
        kl_estimator,
        kl_gradient,
        coefficients,
    )
    loss, stats, logp_grad, values_grad = policy_loss_fused.outputs(logp, weights, values)
    N = weights.numel()
    blocks = triton.cdiv(N, _BLOCK)
    # rows of an absent part stay unwritten and reach no statistic
    partials = weights.new_empty(_ROWS, blocks)
    policy, value = logp is not None, values is not None
    if blocks:
        _block_kernel[(blocks,)](
            *x.columns(),
            logp_grad,
            values_grad,
            partials,
            N,
            blocks,
            *coefficients,
            POLICY=policy,
            KIND=kind,
            KL_ESTIMATOR=_estimator(kl_estimator),
            KL_GRADIENT=_estimator(kl_gradient),
            VALUE=value,
            VALUE_CLIP=old_values is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    _combine_kernel[(1,)](
        partials,
        loss,
        stats,
        blocks,
        x.coefficient("value_coef"),
        POLICY=policy,
        VALUE=value,
        ROWS=_ROWS,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    return loss, stats, logp_grad, values_grad


def _estimator(name: str) -> int:
    return (*KL_ESTIMATORS, "sequence_k2").index(name)


policy_loss_fused.attach(policy_value_loss_triton)


# ---- offline compilation: name -> what triton.compile needs (tests/offline_compile.py) -----------
def _offline(
    policy: bool = True,
    kind: str = "clip",
    kl: tuple[str, str] | None = None,
    value: bool = False,
    **given: bool,
) -> dict:
    used = {
        "logp_ptr": policy,
        "old_logp_ptr": policy,
        "advantages_ptr": policy,
        "weights_ptr": True,
        "entropy_ptr": False,
        "values_ptr": value,
        "old_values_ptr": value,
        "returns_ptr": value,
        "ref_logp_ptr": kl is not None,
        "correction_ptr": False,
        "log_s_ptr": False,
        "kl_sum_ptr": False,
        "logp_grad_ptr": True,
        "values_grad_ptr": True,
        "partials_ptr": True,
    } | given
    scalars = dict.fromkeys(COEFFICIENTS, "fp32")
    estimator, gradient = map(_estimator, kl or ("k3", "k3"))
    flags = {
        "POLICY": policy,
        "KIND": kind,
        "KL_ESTIMATOR": estimator,
        "KL_GRADIENT": gradient,
        "VALUE": value,
        "VALUE_CLIP": value,
        "BLOCK": _BLOCK,
    }
    return {
        "kernel": _block_kernel,
        "signature": {name: "*fp32" for name, is_used in used.items() if is_used}
        | {"N": "i32", "blocks": "i32"}
        | scalars,
        "constexprs": {name: None for name, is_used in used.items() if not is_used} | flags,
        "num_warps": 8,
    }


OFFLINE_KERNELS = {
    "block_policy_value": _offline(value=True, entropy_ptr=True),
    "block_policy": _offline(),
    "block_policy_value_everything": _offline(
        kl=("k3", "k2"), value=True, entropy_ptr=True, correction_ptr=True
    ),
    "block_reinforce": _offline(kind="reinforce", entropy_ptr=True),
    "block_kl_penalty": _offline(kind="kl_penalty"),
    "block_gspo": _offline(
        kind="gspo", kl=("sequence_k2", "sequence_k2"), log_s_ptr=True, kl_sum_ptr=True
    ),
    "block_cispo": _offline(kind="cispo"),
    "block_sapo": _offline(kind="sapo", kl=("abs", "k1")),
    "block_geometric_mean": _offline(kind="geometric_mean", log_s_ptr=True),
    "block_dro": _offline(kind="dro"),
    "block_value": _offline(policy=False, value=True),
    "combine": {
        "kernel": _combine_kernel,
        "signature": {
            "partials_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "stats_ptr": "*fp32",
            "blocks": "i32",
            "value_coef": "fp32",
        },
        "constexprs": {"POLICY": True, "VALUE": True, "ROWS": _ROWS, "CHUNK": _CHUNK},
        "num_warps": 8,
    },
}
