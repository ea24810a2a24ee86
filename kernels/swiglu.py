"""swiglu: y = silu(gate) * up from the output of the fused projection, and its gradient. Forward
and backward take one pass each.

    y     = s gate up                                   s = sigmoid(gate)
    dgate = dy up s (1 + gate (1 - s))
    dup   = dy gate s

Shapes    N tokens, F feed-forward width. A row of gate_up [N, 2F] holds the F gates of a token,
          then its F ups.
Bytes     forward 3 N F s (two reads, one write); backward 5 N F s. The gradient is written as one
          [N, 2F] tensor, so nothing has to be concatenated.
Numerics  float32 inside, rounded once to the dtype. s and 1 - s are computed from e^-|gate|, which
          neither cancels nor overflows.
Source    Shazeer (2020), GLU Variants Improve Transformer, eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, check_last_contiguous
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations("swiglu", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_ROWS_IMPLS = Implementations("activate_rows", cpu=("triton",), cuda=("triton",))
_IMPLS_FLOAT64 = Implementations("swiglu of float64", cpu=("torch",), cuda=("torch",))
_BLOCK = 1024
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
}


# ---- reference -----------------------------------------------------------------------------------
def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Compute the result by its definition, differentiably, on any device and in any float dtype.
    Tests measure the other implementations against its float64 result."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _sigmoid(x):
        e = tl.exp(-tl.abs(x))
        large = 1.0 / (1.0 + e)
        small = e * large
        return tl.where(x >= 0.0, large, small), tl.where(x >= 0.0, small, large)

    @triton.jit
    def _forward_kernel(gate_up_ptr, y_ptr, row_stride, F: tl.constexpr, BLOCK: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = f < F
        gate = tl.load(gate_up_ptr + n * row_stride + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + n * row_stride + F + f, mask=inside, other=0.0).to(tl.float32)
        s, _ = _sigmoid(gate)
        tl.store(y_ptr + n * F + f, gate * s * up, mask=inside)

    @triton.jit
    def _backward_kernel(
        y_grad_ptr, gate_up_ptr, grad_ptr, row_stride, F: tl.constexpr, BLOCK: tl.constexpr
    ):
        n = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = f < F
        dy = tl.load(y_grad_ptr + n * F + f, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + n * row_stride + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + n * row_stride + F + f, mask=inside, other=0.0).to(tl.float32)
        s, rest = _sigmoid(gate)
        tl.store(grad_ptr + n * 2 * F + f, dy * up * s * (1.0 + gate * rest), mask=inside)
        tl.store(grad_ptr + n * 2 * F + F + f, dy * gate * s, mask=inside)

    @triton.jit
    def _rows_kernel(
        x_ptr,
        y_ptr,
        F: tl.constexpr,
        GATED: tl.constexpr,
        GELU: tl.constexpr,
        TANH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = f < F
        row_ptr = x_ptr + n * (2 * F if GATED else F)
        x = tl.load(row_ptr + f, mask=inside, other=0.0).to(tl.float32)
        if TANH:
            # (1 + tanh u) / 2 = sigmoid(2 u), which does not cancel
            s, _ = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            y = x * s
        elif GELU:
            y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        else:
            s, _ = _sigmoid(x)
            y = x * s
        if GATED:
            y *= tl.load(row_ptr + F + f, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + n * F + f, y, mask=inside)

    # What tests/offline_compile.py compiles.
    OFFLINE_KERNELS = {
        f"{name}_{dtype}": {
            "kernel": kernel,
            "signature": dict.fromkeys(pointers.split(), f"*{dtype}") | {"row_stride": "i64"},
            "constexprs": {"F": 8960, "BLOCK": _BLOCK},
        }
        for dtype in ("fp32", "bf16", "fp16")
        for name, kernel, pointers in (
            ("forward", _forward_kernel, "gate_up_ptr y_ptr"),
            ("backward", _backward_kernel, "y_grad_ptr gate_up_ptr grad_ptr"),
        )
    } | {
        f"rows_{activation}_{'gated_' if gated else ''}{dtype}": {
            "kernel": _rows_kernel,
            "signature": dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"),
            "constexprs": {
                "F": 8960,
                "GATED": gated,
                "GELU": activation == "gelu",
                "TANH": activation == "gelu_tanh",
                "BLOCK": _BLOCK,
            },
        }
        for dtype, gated in (("fp32", False), ("fp32", True), ("bf16", True))
        for activation in ("silu", "gelu", "gelu_tanh")
    }


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
@torch.library.custom_op("fusedrl::swiglu_triton", mutates_args=())
def _swiglu_triton(gate_up: Tensor) -> Tensor:
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    y_NF = gate_up.new_empty(N, F)
    if y_NF.numel():
        _forward_kernel[(N, triton.cdiv(F, _BLOCK))](
            gate_up, y_NF, gate_up.stride(0), F=F, BLOCK=_BLOCK
        )
    return y_NF


@torch.library.custom_op("fusedrl::swiglu_triton_backward", mutates_args=())
def _swiglu_triton_backward(y_grad: Tensor, gate_up: Tensor) -> Tensor:
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    grad = gate_up.new_empty(N, 2 * F)
    if grad.numel():
        _backward_kernel[(N, triton.cdiv(F, _BLOCK))](
            y_grad.contiguous(), gate_up, grad, gate_up.stride(0), F=F, BLOCK=_BLOCK
        )
    return grad


@torch.library.custom_op("fusedrl::activate_rows", mutates_args=())
def _activate_rows(x: Tensor, activation: str, gated: bool) -> Tensor:
    N, F = x.shape[0], x.shape[1] // (2 if gated else 1)
    y_NF = x.new_empty(N, F)
    if y_NF.numel():
        _rows_kernel[(N, triton.cdiv(F, _BLOCK))](
            x.contiguous(),
            y_NF,
            F=F,
            GATED=gated,
            GELU=activation == "gelu",
            TANH=activation == "gelu_tanh",
            BLOCK=_BLOCK,
        )
    return y_NF


@_activate_rows.register_fake
def _(x: Tensor, activation: str, gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (2 if gated else 1))


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _backward_fake(y_grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_swiglu_triton.register_fake(_forward_fake)
_swiglu_triton_backward.register_fake(_backward_fake)
if native.capability:
    torch.library.register_fake("fusedrl::swiglu_forward", _forward_fake)
    torch.library.register_fake("fusedrl::swiglu_backward", _backward_fake)


# ---- autograd (that of the C++ implementation is in C++) -----------------------------------------
_swiglu_triton.register_autograd(
    lambda ctx, y_grad: _swiglu_triton_backward(y_grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# ---- public --------------------------------------------------------------------------------------
def swiglu(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [N, 2F]; a row holds the gates of a token, then its ups. The last dimension must be
            contiguous.
        impl: "cpp" (CPU; not float64), "triton" (not float64) or "torch"; by default the best one
            for the device.
    Returns:
        [N, F] in the dtype of gate_up. Differentiable.
    Raises:
        ValueError: the shape or strides do not fit.
        TypeError: the dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "swiglu"
    _, width = check(op, {"gate_up": (gate_up, "N 2F")})
    if width % 2:
        raise ValueError(
            f"{op}: expected gate_up [N, 2F] with as many gates as ups, got {width} columns"
        )
    chosen = (_IMPLS_FLOAT64 if gate_up.dtype == torch.float64 else _IMPLS).choose(
        gate_up.device, impl
    )
    check_dtype(op, "gate_up", gate_up, FLOATS)
    check_last_contiguous(op, "gate_up", gate_up)
    if chosen == "torch":
        return swiglu_reference(gate_up)
    return torch.ops.fusedrl.swiglu(gate_up) if chosen == "cpp" else _swiglu_triton(gate_up)


def activate_rows(x: Tensor, activation: str, *, gated: bool) -> Tensor:
    """Compute `activate` in Triton, so that each row's bits depend only on that row. torch's own
    kernels do not promise this: they compute the end of a tensor by different code. No gradient.

    Raises:
        RuntimeError: Triton cannot run on this machine.
    """
    _ROWS_IMPLS.choose(x.device)
    return _activate_rows(x, activation, gated)


def activate(x: Tensor, activation: str, *, gated: bool, impl: str | None = None) -> Tensor:
    """Apply the activation between an MLP's two matmuls. Not gated: activation(x) for x [N, F].
    Gated: activation(first half) * second half, for x [N, 2F]. `activation` is "silu", "gelu_tanh"
    or "gelu".

    `impl` applies only to gated "silu", which calls `swiglu`; the other cases use torch's own
    kernels. Differentiable.
    """
    if gated and activation == "silu":
        return swiglu(x, impl=impl)
    if not gated:
        return ACTIVATIONS[activation](x)
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
