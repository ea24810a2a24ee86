"""full_kl in Triton: one program per row walks the vocabulary once (jsd twice) for the divergence.
The gradient is computed block by block.

The mathematics, shapes and numerics are those of __init__.py. A logit that lies 1e30 below the
largest, or is -inf, gives d = -1e30: its weight e^d is 0, and 0 times it stays 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _scaled(z, top, inverse):
    d = (z - top) * inverse
    return tl.where(d < -1e30, -1e30, d)  # NaN stays


@triton.jit
def _rise(top, z, inverse):
    # The new maximum, what to subtract (finite), and how much d falls by it.
    higher = tl.maximum(top, tl.max(z, 0))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, base, tl.where(top == -float("inf"), 0.0, _scaled(top, base, inverse))


@triton.jit
def _against_mixture(u):
    # log(p / m) of u = log p - log r
    return 0.6931471805599453 - tl.log(1.0 + tl.exp(-tl.abs(u))) - tl.where(u < 0.0, -u, 0.0)


@triton.jit
def _forward_kernel(
    logits_ptr,
    ref_ptr,
    mask_ptr,
    kl_ptr,
    stats_ptr,
    temperature,
    V,
    row_stride,
    ref_stride,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    columns = V
    if mask_ptr is not None:
        columns = tl.where(tl.load(mask_ptr + n), V, 0)
    inverse = 1.0 / temperature
    row_ptr, other_ptr = logits_ptr + n * row_stride, ref_ptr + n * ref_stride
    if DIRECTION == 1:  # KL(own || other) of the two exchanged
        row_ptr, other_ptr = ref_ptr + n * ref_stride, logits_ptr + n * row_stride
    m = -float("inf")
    m_other = -float("inf")
    S = 0.0
    S_other = 0.0
    W = 0.0
    missing = 0.0
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = tl.load(other_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        m, base, shift = _rise(m, z, inverse)
        m_other, base_other, shift_other = _rise(m_other, x, inverse)
        d = _scaled(z, base, inverse)
        d_other = _scaled(x, base_other, inverse)
        e = tl.exp(d)
        if DIRECTION != 2:
            W = tl.exp(shift) * (W + (shift - shift_other) * S) + tl.sum(e * (d - d_other), 0)
            missing += tl.sum(tl.where((d > -1e30) & (d_other <= -1e30), 1.0, 0.0), 0)
        S = tl.exp(shift) * S + tl.sum(e, 0)
        S_other = tl.exp(shift_other) * S_other + tl.sum(tl.exp(d_other), 0)
    some, some_other = tl.where(S == 0.0, 1.0, S), tl.where(S_other == 0.0, 1.0, S_other)
    offset = tl.log(some) - tl.log(some_other)
    broken = (S + S_other) != (S + S_other)
    if DIRECTION == 2:
        of_p = 0.0
        of_r = 0.0
        base = tl.where(m == -float("inf"), 0.0, m)
        base_other = tl.where(m_other == -float("inf"), 0.0, m_other)
        for start in range(0, columns, BLOCK):
            v = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            x = tl.load(other_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            d = _scaled(z, base, inverse)
            d_other = _scaled(x, base_other, inverse)
            u = (d - d_other) - offset
            of_p += tl.sum(tl.exp(d) * _against_mixture(u), 0)
            of_r += tl.sum(tl.exp(d_other) * _against_mixture(-u), 0)
        centre = of_p / some
        kl = 0.5 * (centre + of_r / some_other)
        kl = tl.where(kl > 0.6931471805599453, 0.6931471805599453, tl.where(kl < 0.0, 0.0, kl))
    else:
        kl = W / some - offset
        kl = tl.where((kl < 0.0) | (S == 0.0), 0.0, kl)
        kl = tl.where((missing > 0.0) & (broken == 0), float("inf"), kl)
        centre = kl
    if DIRECTION == 1:
        m, m_other = m_other, m
        S, S_other = S_other, S
    tl.store(kl_ptr + n, tl.where(broken, float("nan"), kl))
    tl.store(stats_ptr + n * 5, m)
    tl.store(stats_ptr + n * 5 + 1, S)
    tl.store(stats_ptr + n * 5 + 2, m_other)
    tl.store(stats_ptr + n * 5 + 3, S_other)
    tl.store(stats_ptr + n * 5 + 4, centre)


@triton.jit
def _backward_kernel(
    kl_grad_ptr,
    logits_ptr,
    ref_ptr,
    stats_ptr,
    grad_ptr,
    temperature,
    V,
    row_stride,
    ref_stride,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(stats_ptr + n * 5)
    S = tl.load(stats_ptr + n * 5 + 1)
    m_ref = tl.load(stats_ptr + n * 5 + 2)
    S_ref = tl.load(stats_ptr + n * 5 + 3)
    centre = tl.load(stats_ptr + n * 5 + 4)
    g = tl.load(kl_grad_ptr + n)
    # A row without a gradient is zero whatever it holds; it is not even read.
    live = (g != 0.0) & (S != 0.0) & (S_ref != 0.0) & (centre != float("inf"))
    S = tl.where(live, S, 1.0)
    S_ref = tl.where(live, S_ref, 1.0)
    m = tl.where(live, m, 0.0)
    m_ref = tl.where(live, m_ref, 0.0)
    inverse = 1.0 / temperature
    inside = v < tl.where(live, V, 0)
    d = _scaled(
        tl.load(logits_ptr + n * row_stride + v, mask=inside, other=-float("inf")).to(tl.float32),
        m,
        inverse,
    )
    d_ref = _scaled(
        tl.load(ref_ptr + n * ref_stride + v, mask=inside, other=-float("inf")).to(tl.float32),
        m_ref,
        inverse,
    )
    p = tl.exp(d) / S
    if DIRECTION == 1:
        grad = p - tl.exp(d_ref) / S_ref
    else:
        offset = tl.log(S) - tl.log(S_ref)
        u = (d - d_ref) - offset
        if DIRECTION == 2:
            grad = 0.5 * p * (_against_mixture(u) - centre)
        else:
            grad = p * (u - centre)
    broken = (S + S_ref) != (S + S_ref)
    grad = tl.where(broken, float("nan"), grad * (g * inverse))
    tl.store(grad_ptr + n * V + v, tl.where(live, grad, 0.0), mask=v < V)


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
def full_kl_backward(
    kl_grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    temperature: float,
    direction: int,
) -> None:
    """Write the gradient of rows with the `stats` of `full_kl_forward`, or of some of their
    columns, into the contiguous `grad`. `grad` may be the logits."""
    N, V = logits.shape
    if N:
        _backward_kernel[(N, triton.cdiv(V, _BLOCK))](
            kl_grad.contiguous(),
            logits,
            ref_logits,
            stats,
            grad,
            temperature,
            V,
            logits.stride(0),
            ref_logits.stride(0),
            DIRECTION=direction,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def full_kl_forward(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: int
) -> tuple[Tensor, Tensor]:
    """Compute (kl [N], stats [N, 5]). The stats are max and S of both rows, and the number that is
    subtracted to centre the gradient."""
    N, V = logits.shape
    kl_N, stats_N5 = (
        logits.new_empty(N, dtype=torch.float32),
        logits.new_empty(N, 5, dtype=torch.float32),
    )
    if N:
        _forward_kernel[(N,)](
            logits,
            ref_logits,
            None if mask is None else mask.contiguous(),
            kl_N,
            stats_N5,
            temperature,
            V,
            logits.stride(0),
            ref_logits.stride(0),
            DIRECTION=direction,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return kl_N, stats_N5


@torch.library.custom_op("fusedrl::full_kl_triton", mutates_args=())
def _full_kl_triton(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: int
) -> tuple[Tensor, Tensor]:
    return full_kl_forward(logits, ref_logits, mask, temperature, direction)


@_full_kl_triton.register_fake
def _(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: int
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.float32), logits.new_empty(
        logits.shape[0], 5, dtype=torch.float32
    )


@torch.library.custom_op("fusedrl::full_kl_triton_backward", mutates_args=())
def _full_kl_triton_backward(
    kl_grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    temperature: float,
    direction: int,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    full_kl_backward(kl_grad, logits, ref_logits, stats, grad, temperature, direction)
    return grad


@_full_kl_triton_backward.register_fake
def _(
    kl_grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    temperature: float,
    direction: int,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    logits, ref_logits, _, ctx.temperature, ctx.direction = inputs
    ctx.save_for_backward(logits, ref_logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, kl_grad: Tensor, _stats_grad: Tensor):
    return (
        _full_kl_triton_backward(kl_grad, *ctx.saved_tensors, ctx.temperature, ctx.direction),
        None,
        None,
        None,
        None,
    )


_full_kl_triton.register_autograd(_backward, setup_context=_setup_context)


# ---- what is compiled offline --------------------------------------------------------------------
_SCALARS = {"temperature": "fp32", "V": "i32", "row_stride": "i64", "ref_stride": "i64"}


def _offline(kernel, pointers: dict[str, str], dtype: str) -> dict[str, dict]:
    return {
        f"{kernel.__name__.strip('_')}_{name}_{dtype}": {
            "kernel": kernel,
            "signature": {**pointers, **_SCALARS},
            "constexprs": {"DIRECTION": direction, "BLOCK": _BLOCK},
            "num_warps": _WARPS,
        }
        for direction, name in enumerate(("reverse", "forward", "jsd"))
    }


def offline_backward(dtype: str, grad_dtype: str) -> dict[str, dict]:
    pointers = {
        "kl_grad_ptr": "*fp32",
        "logits_ptr": f"*{dtype}",
        "ref_ptr": f"*{dtype}",
        "stats_ptr": "*fp32",
        "grad_ptr": f"*{grad_dtype}",
    }
    return _offline(
        _backward_kernel, pointers, dtype if dtype == grad_dtype else f"{dtype}_to_{grad_dtype}"
    )


OFFLINE_KERNELS = {
    name: entry
    for dtype in ("fp32", "bf16")
    for name, entry in (
        _offline(
            _forward_kernel,
            {
                "logits_ptr": f"*{dtype}",
                "ref_ptr": f"*{dtype}",
                "mask_ptr": "*i1",
                "kl_ptr": "*fp32",
                "stats_ptr": "*fp32",
            },
            dtype,
        )
        | offline_backward(dtype, dtype)
    ).items()
}
