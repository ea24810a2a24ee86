"""token_kl and kl_loss in Triton: token_kl is one launch. kl_loss computes values and slopes in one
pass, and a second launch of one program adds up the values.

The mathematics and shapes are those of __init__.py. shaped_gae and the policy loss use the
estimators of this file, too.

Bytes     token level as in __init__.py; the sequence level reads the weights twice (the second time
          from the cache). Whole blocks are read and written without a mask, since a mask's unknown
          alignment would reduce every access from 16 bytes to 4.
Numerics  float32 elements. k3 carries the rounding error of logp - ref_logp along, and computes its
          exponential by a polynomial: the hardware's has an error of 2e-6 at 20 nats. Sums of a
          block in float32, of a sequence and of the blocks in float64, in a fixed order, no
          atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.runtime.checks import refuse_double_backward

_BLOCK = 1024
_CHUNK = 1024
_K1, _K2, _K3, _ABS = (tl.constexpr(i) for i in range(4))  # the order of ESTIMATORS in __init__.py


# ---- Triton: estimators --------------------------------------------------------------------------
@triton.jit
def clamp(d):
    return tl.where(d > 20.0, 20.0, tl.where(d < -20.0, -20.0, d))  # where, since minimum drops NaN


@triton.jit
def exponential(clamped, d):
    """Return e^clamped, and e^clamped - 1 - d. With d = k ln 2 + f, e^f - 1 - f = f^2 q(f) is free
    of cancellation. This matters for small d, where k = 0. At d = 0 the results are exactly 1 and
    0, which the hardware's approximate exp does not promise."""
    k = tl.floor(clamped * 1.44269504 + 0.5)
    k = tl.where(k == k, k, 0.0)  # NaN has no integer; it comes back by f
    f = clamped - k * 0.693359375 + k * 2.12194440e-4
    q = ((((f * (1.0 / 5040) + 1.0 / 720) * f + 1.0 / 120) * f + 1.0 / 24) * f + 1.0 / 6) * f + 0.5
    small = f * f * q
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    ratio = power * (f + small) + power
    large = ratio - 1.0 - d
    return ratio, tl.where(k == 0.0, small, tl.where(large < 0.0, 0.0, large))


@triton.jit
def difference(a, b):
    """Return a - b and its rounding error (0 where a or b is infinite)."""
    d = a - b
    t = d - a
    rest = (a - (d - t)) - (b + t)
    return d, tl.where(rest == rest, rest, 0.0)


@triton.jit
def kl_value(d, rest, ESTIMATOR: tl.constexpr):
    """Return the estimate of the KL at log ratio d + rest; d is the float32 part and rest its
    rounding error."""
    if ESTIMATOR == _K1:
        value = d
    elif ESTIMATOR == _K2:
        value = 0.5 * d * d
    elif ESTIMATOR == _ABS:
        value = tl.abs(d)
    else:
        ratio, value = exponential(clamp(-d), -d)
        value -= tl.where(d > -20.0, rest * (ratio - 1.0), 0.0)
        value = tl.where(value < 0.0, 0.0, value)
    return value


@triton.jit
def kl_slope(d, ESTIMATOR: tl.constexpr):
    """Return the derivative of the estimator with respect to the log ratio; for k3 it is 0 beyond
    the clamp."""
    if ESTIMATOR == _K1:
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == _K2:
        slope = d
    elif ESTIMATOR == _ABS:
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        _, excess = exponential(clamp(-d), -d)
        slope = tl.where(tl.abs(d) > 20.0, 0.0, d - excess)
    return slope


# ---- Triton: kernels -----------------------------------------------------------------------------
@triton.jit
def _estimates(logp_ptr, ref_logp_ptr, kl_ptr, n, inside, ESTIMATOR: tl.constexpr):
    d, rest = difference(tl.load(logp_ptr + n, mask=inside), tl.load(ref_logp_ptr + n, mask=inside))
    tl.store(kl_ptr + n, kl_value(d, rest, ESTIMATOR), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _token_kl_kernel(
    logp_ptr, ref_logp_ptr, kl_ptr, N, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n = start + tl.arange(0, BLOCK)
    if start + BLOCK <= N:
        _estimates(logp_ptr, ref_logp_ptr, kl_ptr, n, None, ESTIMATOR)
    else:
        _estimates(logp_ptr, ref_logp_ptr, kl_ptr, n, n < N, ESTIMATOR)


@triton.jit
def _weighted(
    logp_ptr,
    ref_logp_ptr,
    weights_ptr,
    slope_ptr,
    n,
    inside,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Store the weighted slopes, and return the sum of the weighted values."""
    weights = tl.load(weights_ptr + n, mask=inside)
    live = weights != 0.0
    if inside is not None:
        live = live & inside
    logp = tl.where(live, tl.load(logp_ptr + n, mask=inside), 0.0)
    ref_logp = tl.where(live, tl.load(ref_logp_ptr + n, mask=inside), 0.0)
    d, rest = difference(logp, ref_logp)
    tl.store(slope_ptr + n, tl.where(live, weights * kl_slope(d, GRADIENT), 0.0), mask=inside)
    return tl.sum(tl.where(live, weights * kl_value(d, rest, ESTIMATOR), 0.0))


@triton.jit(do_not_specialize=["N"])
def _token_loss_kernel(
    logp_ptr,
    ref_logp_ptr,
    weights_ptr,
    slope_ptr,
    partials_ptr,
    N,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * BLOCK
    n = start + tl.arange(0, BLOCK)
    if start + BLOCK <= N:
        total = _weighted(
            logp_ptr, ref_logp_ptr, weights_ptr, slope_ptr, n, None, ESTIMATOR, GRADIENT
        )
    else:
        total = _weighted(
            logp_ptr, ref_logp_ptr, weights_ptr, slope_ptr, n, n < N, ESTIMATOR, GRADIENT
        )
    tl.store(partials_ptr + block, total.to(tl.float64))


@triton.jit
def _sequence_loss_kernel(
    logp_ptr,
    ref_logp_ptr,
    weights_ptr,
    cu_seqlens_ptr,
    slope_ptr,
    partials_ptr,
    ESTIMATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    # one program a sequence: its log ratio, then the one slope of all its
    # tokens
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0)
    start, end = (
        tl.load(cu_seqlens_ptr + b).to(tl.int64),
        tl.load(cu_seqlens_ptr + b + 1).to(tl.int64),
    )
    lane = tl.arange(0, CHUNK)
    ratios = tl.zeros([CHUNK], tl.float64)
    weight_sums = tl.zeros([CHUNK], tl.float64)
    counts = tl.zeros([CHUNK], tl.int32)
    for at in range(start, end, CHUNK):
        t = at + lane
        weights = tl.load(weights_ptr + t, mask=t < end, other=0.0)
        live = weights != 0.0
        logp = tl.load(logp_ptr + t, mask=live, other=0.0).to(tl.float64)
        ratios += logp - tl.load(ref_logp_ptr + t, mask=live, other=0.0).to(tl.float64)
        weight_sums += weights
        counts += live.to(tl.int32)
    count = tl.sum(counts)
    ratio = tl.sum(ratios)
    weight = tl.sum(weight_sums) / tl.where(count > 0, count, 1)
    d = ratio.to(tl.float32)
    rest = (ratio - d).to(tl.float32)
    value = kl_value(d, tl.where(rest == rest, rest, 0.0), ESTIMATOR)
    tl.store(partials_ptr + b, tl.where(count > 0, weight * value, 0.0))
    slope = (weight * kl_slope(d, GRADIENT)).to(tl.float32)
    for at in range(start, end, CHUNK):
        t = at + lane
        weights = tl.load(weights_ptr + t, mask=t < end, other=0.0)
        tl.store(slope_ptr + t, tl.where(weights != 0.0, slope, 0.0), mask=t < end)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(partials_ptr, sum_ptr, count, CHUNK: tl.constexpr):
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], tl.float64)
    for at in range(0, count, CHUNK):
        sums += tl.load(partials_ptr + at + lane, mask=at + lane < count, other=0.0)
    tl.store(sum_ptr, tl.sum(sums).to(tl.float32))


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
@torch.library.custom_op("fusedrl::token_kl_triton", mutates_args=())
def _token_kl(logp: Tensor, ref_logp: Tensor, estimator: int) -> Tensor:
    kl = torch.empty_like(logp, memory_format=torch.contiguous_format)
    N = kl.numel()
    if N:
        _token_kl_kernel[(triton.cdiv(N, _BLOCK),)](
            logp.contiguous(), ref_logp.contiguous(), kl, N, ESTIMATOR=estimator, BLOCK=_BLOCK
        )
    return kl


@_token_kl.register_fake
def _(logp: Tensor, ref_logp: Tensor, estimator: int) -> Tensor:
    return torch.empty_like(logp, memory_format=torch.contiguous_format)


@torch.library.custom_op("fusedrl::kl_loss_triton", mutates_args=())
def _kl_loss(
    logp: Tensor,
    ref_logp: Tensor,
    weights: Tensor,
    estimator: int,
    gradient: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss, and d loss / d logp [N] for a unit upstream gradient."""
    logp, ref_logp, weights = logp.contiguous(), ref_logp.contiguous(), weights.contiguous()
    loss, slope_N = logp.new_empty(()), torch.empty_like(logp)
    N = logp.numel()
    parts = triton.cdiv(N, _BLOCK) if cu_seqlens is None else cu_seqlens.numel() - 1
    partials = logp.new_empty(parts, dtype=torch.float64)
    if parts == 0:
        pass
    elif cu_seqlens is None:
        _token_loss_kernel[(parts,)](
            logp,
            ref_logp,
            weights,
            slope_N,
            partials,
            N,
            ESTIMATOR=estimator,
            GRADIENT=gradient,
            BLOCK=_BLOCK,
        )
    else:
        _sequence_loss_kernel[(parts,)](
            logp,
            ref_logp,
            weights,
            cu_seqlens.contiguous(),
            slope_N,
            partials,
            ESTIMATOR=estimator,
            GRADIENT=gradient,
            CHUNK=_CHUNK,
        )
    _sum_kernel[(1,)](partials, loss, parts, CHUNK=_CHUNK)
    return loss, slope_N


@_kl_loss.register_fake
def _(
    logp: Tensor,
    ref_logp: Tensor,
    weights: Tensor,
    estimator: int,
    gradient: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return logp.new_empty(()), torch.empty_like(logp, memory_format=torch.contiguous_format)


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, loss_grad: Tensor, _slope_grad: Tensor):
    refuse_double_backward("kl_loss")
    return ctx.saved_tensors[0] * loss_grad, None, None, None, None, None


_kl_loss.register_autograd(_backward, setup_context=_setup_context)


# ---- what is compiled offline --------------------------------------------------------------------
_POINTERS = {
    "logp_ptr": "*fp32",
    "ref_logp_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "cu_seqlens_ptr": "*i32",
    "slope_ptr": "*fp32",
    "partials_ptr": "*fp64",
    "kl_ptr": "*fp32",
    "sum_ptr": "*fp32",
    "N": "i32",
    "count": "i32",
}


def _offline(kernel, **constexprs: int) -> dict:
    return {
        "kernel": kernel,
        "signature": {name: kind for name, kind in _POINTERS.items() if name in kernel.arg_names},
        "constexprs": constexprs,
    }


OFFLINE_KERNELS = {
    **{
        f"token_{name}": _offline(_token_kl_kernel, ESTIMATOR=i, BLOCK=_BLOCK)
        for i, name in enumerate(("k1", "k2", "k3", "abs"))
    },
    "loss_k3_k2": _offline(_token_loss_kernel, ESTIMATOR=2, GRADIENT=1, BLOCK=_BLOCK),
    "loss_k1_k3": _offline(_token_loss_kernel, ESTIMATOR=0, GRADIENT=2, BLOCK=_BLOCK),
    "sequence_k2_k2": _offline(_sequence_loss_kernel, ESTIMATOR=1, GRADIENT=1, CHUNK=_CHUNK),
    "sequence_k3_k3": _offline(_sequence_loss_kernel, ESTIMATOR=2, GRADIENT=2, CHUNK=_CHUNK),
    "sum": _offline(_sum_kernel, CHUNK=_CHUNK),
}
