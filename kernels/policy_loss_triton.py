"""policy_value_loss in Triton: one launch forms the gradients and the sums of each block of tokens, a second one adds the blocks up.

The mathematics, shapes and numerics are those of policy_loss.py; C++ (csrc/cpu/policy_value_loss.cpp) does the same in the same order.

Shapes    N tokens in blocks of BLOCK; partials [ROWS, blocks] float32, one row per sum: read by columns in a fixed order, so no atomics.
Bytes     policy 16 N read (20 N with entropy) and 4 N written; value 8 N (12 N with a clip) and 4 N; the partials are N / 16 bytes.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_CHUNK = 256
_ROWS = 32
_STATS = 20  # the fields of PolicyStats, then those of ValueStats

# Rows of the partials. 0 to 15 are sums over the tokens of a block; then two maxima; then the moments of a block, of count _TOKENS.
_LOSS, _LOW, _HIGH, _DUAL, _K1, _K2, _K3, _RATIO, _SQUARED, _CLAMPED, _ENTROPY, _TOKENS = (tl.constexpr(i) for i in range(12))
_VALUE_LOSS, _VALUE_CLIPPED, _VALUE = (tl.constexpr(i) for i in range(12, 15))
_NEGATED_MIN, _MAX = (tl.constexpr(i) for i in range(16, 18))
_RETURN, _RESIDUAL = tl.constexpr(18), tl.constexpr(21)  # three rows each: a mean, what its rounding left over, squared deviations


# ---- Triton ----------------------------------------------------------------------------------------------------------
@triton.jit
def _exponential(clamped, d):
    """e^clamped, and e^clamped - 1 - d. With d = k ln 2 + f, e^f - 1 - f = f^2 q(f) is free of cancellation, which matters where d is small,
    and there k = 0. Exactly 1 and 0 at d = 0, which the hardware's approximate exp does not promise."""
    k = tl.floor(clamped * 1.44269504 + 0.5)
    f = clamped - k * 0.693359375 + k * 2.12194440e-4
    q = ((((f * (1.0 / 5040) + 1.0 / 720) * f + 1.0 / 120) * f + 1.0 / 24) * f + 1.0 / 6) * f + 0.5
    small = f * f * q
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    ratio = power * (f + small) + power
    large = ratio - 1.0 - d
    return ratio, tl.where(k == 0.0, small, tl.where(large < 0.0, 0.0, large))


@triton.jit
def _store_moments(out_ptr, blocks, x, live, count):
    """Mean and sum of squared deviations of a block. The mean is two numbers: far from 0 one float32 is too coarse for the variance."""
    mean = tl.sum(tl.where(live, x, 0.0)) / tl.maximum(count, 1.0)
    deviation = tl.where(live, x - mean, 0.0)
    rest = tl.sum(deviation) / tl.maximum(count, 1.0)
    tl.store(out_ptr, mean)
    tl.store(out_ptr + blocks, rest)
    tl.store(out_ptr + 2 * blocks, tl.sum(deviation * deviation) - rest * rest * count)


@triton.jit(do_not_specialize=["N", "blocks"])
def _block_kernel(logp_ptr, old_logp_ptr, advantages_ptr, weights_ptr, entropy_ptr, values_ptr, old_values_ptr, returns_ptr, logp_grad_ptr,
                  values_grad_ptr, partials_ptr, N, blocks, lower, upper, dual, entropy_coef, value_clip, value_coef, POLICY: tl.constexpr,
                  REINFORCE: tl.constexpr, HAS_ENTROPY: tl.constexpr, VALUE: tl.constexpr, VALUE_CLIP: tl.constexpr, BLOCK: tl.constexpr):
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
        ratio, excess = _exponential(tl.where(d > 20.0, 20.0, tl.where(d < -20.0, -20.0, d)), d)  # where, since minimum drops NaN
        high = (advantages > 0.0) & (ratio > upper)
        low = (advantages < 0.0) & (ratio < lower)
        too_far = (advantages < 0.0) & (ratio > dual)
        if REINFORCE:
            terms = -advantages * logp
            slope = -advantages
        else:
            terms = -advantages * tl.where(high, upper, tl.where(low, lower, tl.where(too_far, dual, ratio)))
            slope = -advantages * tl.where(high | low | too_far | beyond, 0.0, ratio)
        if HAS_ENTROPY:
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
            bounded_error = tl.where(values > top, top, tl.where(values < bottom, bottom, values)) - returns
            clipped = ((values > top) | (values < bottom)) & (bounded_error * bounded_error > squares)
            squares = tl.where(clipped, bounded_error * bounded_error, squares)
            error = tl.where(clipped, 0.0, error)
            tl.store(out_ptr + _VALUE_CLIPPED * blocks, tl.sum(clipped.to(tl.float32)))
        else:
            tl.store(out_ptr + _VALUE_CLIPPED * blocks, 0.0)
        tl.store(values_grad_ptr + n, tl.where(live, value_coef * weights * error, 0.0), mask=inside)
        tl.store(out_ptr + _VALUE_LOSS * blocks, tl.sum(weights * (0.5 * squares)))
        tl.store(out_ptr + _VALUE * blocks, tl.sum(values))
        _store_moments(out_ptr + _RETURN * blocks, blocks, returns, live, tokens)
        _store_moments(out_ptr + _RESIDUAL * blocks, blocks, returns - values, live, tokens)


@triton.jit
def _row(x, rows, wanted: tl.constexpr):
    return tl.sum(tl.where(rows == wanted, x, 0.0))


@triton.jit
def _mean(ptr, blocks, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float64) + tl.load(ptr + blocks, mask=inside, other=0.0)


@triton.jit
def _merge_moments(counts_ptr, moments_ptr, blocks, seen, CHUNK: tl.constexpr):
    """Mean and sum of squared deviations of everything from those of the blocks (Chan's merge), chunks of blocks in order, in float64."""
    at = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(0, blocks, CHUNK):
        inside = start + at < blocks
        sums += tl.load(counts_ptr + start + at, mask=inside, other=0.0) * _mean(moments_ptr + start + at, blocks, inside)
    center = tl.sum(sums) / seen
    squares = tl.zeros([CHUNK], dtype=tl.float64)
    for start in range(0, blocks, CHUNK):
        inside = start + at < blocks
        difference = _mean(moments_ptr + start + at, blocks, inside) - center
        squares += tl.load(counts_ptr + start + at, mask=inside, other=0.0) * (difference * difference)
        squares += tl.load(moments_ptr + 2 * blocks + start + at, mask=inside, other=0.0)
    return center, tl.sum(squares)


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(partials_ptr, loss_ptr, stats_ptr, blocks, value_coef, POLICY: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
                    CHUNK: tl.constexpr):
    """Every statistic from the partials: one program, chunks of blocks in order, in float64."""
    rows = tl.arange(0, ROWS)
    at = tl.arange(0, CHUNK)
    sums = tl.zeros([ROWS, CHUNK], dtype=tl.float64)
    maxima = tl.full([ROWS, CHUNK], float("-inf"), dtype=tl.float32)
    for start in range(0, blocks, CHUNK):
        inside = (start + at)[None, :] < blocks
        part = tl.load(partials_ptr + rows[:, None].to(tl.int64) * blocks + (start + at)[None, :], mask=inside & (rows < 18)[:, None], other=0.0)
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
        tl.store(stats_ptr + 8, tl.where(some, tl.where(whole, -_row(largest, rows, _NEGATED_MIN), ratio_sum), 1.0))
        tl.store(stats_ptr + 9, tl.where(some, tl.where(whole, _row(largest, rows, _MAX), ratio_sum), 1.0))
        tl.store(stats_ptr + 10, tl.where(some, ratio_sum * ratio_sum / tl.where(some, squared, 1.0), 0.0))
        tl.store(stats_ptr + 11, _row(total, rows, _CLAMPED) / seen)
        tl.store(stats_ptr + 12, _row(total, rows, _ENTROPY) / seen)
        tl.store(stats_ptr + 13, tokens)
    else:
        for i in tl.static_range(14):
            tl.store(stats_ptr + i, 0.0)
    if VALUE:
        value_loss = _row(total, rows, _VALUE_LOSS)
        loss += value_coef * value_loss
        return_mean, spread = _merge_moments(partials_ptr + _TOKENS * blocks, partials_ptr + _RETURN * blocks, blocks, seen, CHUNK)
        _, unexplained = _merge_moments(partials_ptr + _TOKENS * blocks, partials_ptr + _RESIDUAL * blocks, blocks, seen, CHUNK)
        resolution = 1.1920928955078125e-07 * return_mean
        varies = spread > seen * resolution * resolution
        tl.store(stats_ptr + 14, value_loss)
        tl.store(stats_ptr + 15, _row(total, rows, _VALUE_CLIPPED) / seen)
        tl.store(stats_ptr + 16, tl.where(varies, 1.0 - unexplained / tl.where(varies, spread, 1.0), 0.0))
        tl.store(stats_ptr + 17, _row(total, rows, _VALUE) / seen)
        tl.store(stats_ptr + 18, return_mean)
        tl.store(stats_ptr + 19, tokens)
    else:
        for i in tl.static_range(14, 20):
            tl.store(stats_ptr + i, 0.0)
    tl.store(loss_ptr, loss)


# ---- custom op and launcher: what torch.compile sees, allocate, grid ------------------------------------------------------
@torch.library.custom_op("fusedrl::policy_value_loss_triton", mutates_args=())
def _policy_value_loss(
        logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None, values: Tensor | None,
        old_values: Tensor | None, returns: Tensor | None, reinforce: bool, lower: float, upper: float, dual: float, entropy_coef: float,
        value_clip: float, value_coef: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, and d loss / d logp and d loss / d values for a unit upstream gradient (empty where that part is absent)."""
    loss, stats, logp_grad, values_grad = _outputs(logp, weights, values)
    N = weights.numel()
    blocks = triton.cdiv(N, _BLOCK)
    partials = weights.new_empty(_ROWS, blocks)  # rows of an absent part stay unwritten and reach no statistic
    inputs = [None if t is None else t.contiguous() for t in (logp, old_logp, advantages, weights, entropy, values, old_values, returns)]
    policy, value = logp is not None, values is not None
    if blocks:
        _block_kernel[(blocks,)](
            *inputs, logp_grad, values_grad, partials, N, blocks, lower, upper, dual, entropy_coef, value_clip, value_coef, POLICY=policy,
            REINFORCE=reinforce, HAS_ENTROPY=entropy is not None, VALUE=value, VALUE_CLIP=old_values is not None, BLOCK=_BLOCK, num_warps=8)
    _combine_kernel[(1,)](partials, loss, stats, blocks, value_coef, POLICY=policy, VALUE=value, ROWS=_ROWS, CHUNK=_CHUNK, num_warps=8)
    return loss, stats, logp_grad, values_grad


def _outputs(logp: Tensor | None, weights: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = weights.numel()
    sizes: tuple[tuple[int, ...], ...] = ((), (_STATS,), (0 if logp is None else N,), (0 if values is None else N,))
    loss, stats, logp_grad, values_grad = (weights.new_empty(size) for size in sizes)
    return loss, stats, logp_grad, values_grad


@_policy_value_loss.register_fake
def _(logp: Tensor | None, old_logp: Tensor | None, advantages: Tensor | None, weights: Tensor, entropy: Tensor | None, values: Tensor | None,
      *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(logp, weights, values)


@torch.library.custom_op("fusedrl::policy_value_loss_scale", mutates_args=())
def _scale(gradient: Tensor, scale: Tensor, of: Tensor) -> Tensor:
    """gradient * scale, once: how the gradient depends on the input `of` is not known any more, and a double backward is refused."""
    return gradient * scale


@_scale.register_fake
def _(gradient: Tensor, scale: Tensor, of: Tensor) -> Tensor:
    return torch.empty_like(gradient)


# ---- autograd ----------------------------------------------------------------------------------------------------------
def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, stats, logp_grad, values_grad = output
    ctx.mark_non_differentiable(stats, logp_grad, values_grad)
    ctx.save_for_backward(logp_grad, inputs[3], values_grad, inputs[0], inputs[4], inputs[5])
    ctx.entropy_coef = inputs[12]


def _backward(ctx, loss_grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    logp_grad, weights, values_grad, logp, entropy, values = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 15
    if ctx.needs_input_grad[0]:
        grads[0] = _scale(logp_grad, loss_grad, logp)
    if ctx.needs_input_grad[4]:
        grads[4] = _scale(weights, loss_grad * -ctx.entropy_coef, entropy)
    if ctx.needs_input_grad[5]:
        grads[5] = _scale(values_grad, loss_grad, values)
    return tuple(grads)


def _refuse(ctx, *grads: Tensor) -> None:  # type: ignore[no-untyped-def]
    raise RuntimeError('policy_value_loss: expected one backward pass, got a double backward; use impl="torch" for second derivatives')


_policy_value_loss.register_autograd(_backward, setup_context=_setup)
_scale.register_autograd(_refuse)


# ---- offline compilation: name -> what triton.compile needs (tests/offline_compile.py) ----------------------------------
def _offline(policy: bool, reinforce: bool, entropy: bool, value: bool, clip: bool) -> dict:
    used = {"logp_ptr": policy, "old_logp_ptr": policy, "advantages_ptr": policy, "weights_ptr": True, "entropy_ptr": entropy, "values_ptr": value,
            "old_values_ptr": clip, "returns_ptr": value, "logp_grad_ptr": True, "values_grad_ptr": True, "partials_ptr": True}
    scalars = dict.fromkeys(("lower", "upper", "dual", "entropy_coef", "value_clip", "value_coef"), "fp32")
    flags = {"POLICY": policy, "REINFORCE": reinforce, "HAS_ENTROPY": entropy, "VALUE": value, "VALUE_CLIP": clip, "BLOCK": _BLOCK}
    return {"kernel": _block_kernel, "signature": {name: "*fp32" for name, given in used.items() if given} | {"N": "i32", "blocks": "i32"} | scalars,
            "constexprs": {name: None for name, given in used.items() if not given} | flags, "num_warps": 8}


OFFLINE_KERNELS = {
    "block_policy_value": _offline(True, False, True, True, True),
    "block_policy": _offline(True, False, False, False, False),
    "block_reinforce": _offline(True, True, True, False, False),
    "block_value": _offline(False, False, False, True, True),
    "combine": {"kernel": _combine_kernel,
                "signature": {"partials_ptr": "*fp32", "loss_ptr": "*fp32", "stats_ptr": "*fp32", "blocks": "i32", "value_coef": "fp32"},
                "constexprs": {"POLICY": True, "VALUE": True, "ROWS": _ROWS, "CHUNK": _CHUNK}, "num_warps": 8},
}
