"""rms_norm: y = weight * x / rms(x) over the last dimension. With a residual, x + residual is
normalised in place of x, and this sum is returned too.

    rstd = (mean(x^2) + eps)^-1/2      u = x rstd      y = weight * u
    dx   = rstd (dy weight - u mean(dy weight u))      dweight = sum over rows of dy u

With an offset, offset + weight replaces weight.

Shapes    N tokens of H values, or N tokens of several heads of H values each (QK-norm); weight [H].
Bytes     forward 2 N H s (read, write), 4 with a residual (two of each); backward 3 (4 with a
          gradient of the sum).
Numerics  as in transformers' LlamaRMSNorm: float32 up to u, which is rounded to the dtype,
          multiplied by the weight, and rounded again. With an offset, as in Gemma's norm: float32
          up to y, offset + weight included. x + residual is rounded before it is normalised. The
          weight's gradient is summed in float32, without atomics, in an order that depends only on
          the number of rows.
Source    Zhang and Sennrich (2019), Root Mean Square Layer Normalization, eq. 4.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, check_last_contiguous
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations("rms_norm", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_IMPLS_FLOAT64 = Implementations("rms_norm of float64", cpu=("torch",), cuda=("torch",))
_LONGEST_ROW = 8192  # H that Triton holds in registers; at 16384 the backward spills on sm_90
_IMPLS_LONG_ROWS = Implementations(
    f"rms_norm of rows above {_LONGEST_ROW}", cpu=("cpp", "torch"), cuda=("torch",)
)
_TILE = 2048  # values of a tile of rows; a longer row is a tile of its own
_PROGRAMS = 512  # of the backward; each has its own sum for the weight's gradient


# ---- reference -----------------------------------------------------------------------------------
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute (y, normalised input) by definition, differentiably, on any device and in any float
    dtype. The second is x + residual. Tests measure the other implementations against its float64
    result."""
    x = x if residual is None else x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (
        weight * unit.to(x.dtype)
        if offset == 0
        else ((weight.to(wide.dtype) + offset) * unit).to(x.dtype)
    ), x


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit(do_not_specialize=["rows"])
    def _forward_kernel(
        x_ptr,
        weight_ptr,
        residual_ptr,
        y_ptr,
        sum_ptr,
        rstd_ptr,
        rows,
        eps,
        offset,
        x_token,
        x_head,
        residual_token,
        residual_head,
        HEADS: tl.constexpr,
        H: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # one program per tile of rows
        n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        h = tl.arange(0, BLOCK)[None, :]
        inside = (n < rows)[:, None] & (h < H)
        x = tl.load(
            x_ptr + (n // HEADS * x_token + n % HEADS * x_head)[:, None] + h, mask=inside, other=0.0
        ).to(tl.float32)
        at = n[:, None] * H + h
        if residual_ptr is not None:
            residual = tl.load(
                residual_ptr
                + (n // HEADS * residual_token + n % HEADS * residual_head)[:, None]
                + h,
                mask=inside,
                other=0.0,
            )
            x = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, x, mask=inside)
            x = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
        unit = x * rstd[:, None]
        unit = tl.where(offset == 0.0, unit.to(y_ptr.dtype.element_ty).to(tl.float32), unit)
        weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32) + offset
        tl.store(y_ptr + at, weight * unit, mask=inside)
        tl.store(rstd_ptr + n, rstd, mask=n < rows)

    @triton.jit(do_not_specialize=["rows"])
    def _backward_kernel(
        y_grad_ptr,
        sum_grad_ptr,
        x_ptr,
        weight_ptr,
        rstd_ptr,
        x_grad_ptr,
        weight_parts_ptr,
        rows,
        offset,
        x_token,
        x_head,
        HEADS: tl.constexpr,
        H: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # program p takes tiles p, p + programs, ...
        h = tl.arange(0, BLOCK)[None, :]
        weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32) + offset
        part = tl.zeros([BLOCK], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            n = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
            inside = (n < rows)[:, None] & (h < H)
            at = n[:, None] * H + h
            dy = tl.load(y_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(
                x_ptr + (n // HEADS * x_token + n % HEADS * x_head)[:, None] + h,
                mask=inside,
                other=0.0,
            ).to(tl.float32)
            rstd = tl.load(rstd_ptr + n, mask=n < rows, other=0.0)[:, None]
            unit = x * rstd
            slope = dy * weight
            dx = (slope - unit * (tl.sum(slope * unit, 1) / H)[:, None]) * rstd
            if sum_grad_ptr is not None:
                dx += tl.load(sum_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_grad_ptr + at, dx, mask=inside)
            part += tl.sum(dy * unit, 0)
        if weight_parts_ptr is not None:
            tl.store(
                weight_parts_ptr + tl.program_id(0).to(tl.int64) * H + tl.arange(0, BLOCK),
                part,
                mask=tl.arange(0, BLOCK) < H,
            )

    def _offline(dtype: str, H: int, heads: int, residual: bool) -> dict[str, dict]:
        """Return the specialisations of both kernels to compile offline."""
        tile = _tile(H)
        name, constexprs = (
            f"{dtype}_{H}{'_residual' if residual else ''}",
            {"HEADS": heads, "H": H, **tile},
        )
        strides = {"x_token": "i64", "x_head": "i64"}
        absent: dict[str, None] = (
            {} if residual else {"residual_ptr": None, "sum_ptr": None, "sum_grad_ptr": None}
        )

        def entry(kernel, pointers: str, scalars: dict[str, str]) -> dict:
            kinds = {
                p: "*fp32" if p in ("rstd_ptr", "weight_parts_ptr") else f"*{dtype}"
                for p in pointers.split()
                if p not in absent
            }
            missing = {p: None for p in pointers.split() if p in absent}
            return {
                "kernel": kernel,
                "signature": kinds | scalars,
                "constexprs": constexprs | missing,
                "num_warps": _warps(H),
            }

        return {
            f"forward_{name}": entry(
                _forward_kernel,
                "x_ptr weight_ptr residual_ptr y_ptr sum_ptr rstd_ptr",
                {
                    "rows": "i32",
                    "eps": "fp32",
                    "offset": "fp32",
                    **strides,
                    "residual_token": "i64",
                    "residual_head": "i64",
                },
            ),
            f"backward_{name}": entry(
                _backward_kernel,
                "y_grad_ptr sum_grad_ptr x_ptr weight_ptr rstd_ptr x_grad_ptr weight_parts_ptr",
                {"rows": "i32", "offset": "fp32", **strides},
            ),
        }


# ---- launchers: allocate, grid -------------------------------------------------------------------
def _tile(H: int) -> dict[str, int]:
    block = triton.next_power_of_2(H)
    return {"ROWS": max(1, _TILE // block), "BLOCK": block}


def _warps(H: int) -> int:
    return 4 if H <= 1024 else 8 if H <= 4096 else 16


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.ndim == 3 else 0


def _heads(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else 1


@torch.library.custom_op("fusedrl::rms_norm_triton", mutates_args=())
def _rms_norm_triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    H, rows = x.shape[-1], x.shape[:-1].numel()
    y, rstd = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)
    added = x.new_empty(0) if residual is None else torch.empty_like(y)
    if rows:
        tile = _tile(H)
        _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x,
            weight.contiguous(),
            residual,
            y,
            None if residual is None else added,
            rstd,
            rows,
            eps,
            offset,
            *_strides(x),
            *((0, 0) if residual is None else _strides(residual)),
            HEADS=_heads(x),
            H=H,
            **tile,
            num_warps=_warps(H),
        )
    return y, added, rstd


@torch.library.custom_op("fusedrl::rms_norm_triton_backward", mutates_args=())
def _rms_norm_triton_backward(
    y_grad: Tensor,
    sum_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_wanted: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    H, rows = x.shape[-1], rstd.shape[0]
    tile = _tile(H)
    programs = min(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS)
    dx = x.new_empty(x.shape)
    parts = rstd.new_empty(programs, H) if weight_wanted else None
    if rows:
        _backward_kernel[(programs,)](
            y_grad.contiguous(),
            None if sum_grad is None else sum_grad.contiguous(),
            x,
            weight.contiguous(),
            rstd,
            dx,
            parts,
            rows,
            offset,
            *_strides(x),
            HEADS=_heads(x),
            H=H,
            **tile,
            num_warps=_warps(H),
        )
    return dx, weight.new_empty(0) if parts is None else parts.sum(0).to(weight.dtype)


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
def _forward_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(rows, dtype=torch.float32),
    )


def _backward_fake(
    y_grad: Tensor,
    sum_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_wanted: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_wanted else 0)


_rms_norm_triton.register_fake(_forward_fake)
_rms_norm_triton_backward.register_fake(_backward_fake)
if native.capability:
    torch.library.register_fake("fusedrl::rms_norm_forward", _forward_fake)
    torch.library.register_fake("fusedrl::rms_norm_backward", _backward_fake)


# ---- autograd (that of the C++ implementation is in C++) -----------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    x, weight, residual, _, ctx.offset = inputs
    _, added, rstd = output
    ctx.residual = residual is not None
    ctx.save_for_backward(added if ctx.residual else x, weight, rstd)
    ctx.mark_non_differentiable(*([rstd] if ctx.residual else [added, rstd]))
    ctx.set_materialize_grads(False)


def _backward(ctx, y_grad: Tensor | None, sum_grad: Tensor | None, _rstd_grad: None):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = sum_grad, None
    if y_grad is not None:
        wanted = ctx.needs_input_grad[1]
        dx, dweight = _rms_norm_triton_backward(
            y_grad, sum_grad if ctx.residual else None, x, weight, rstd, wanted, ctx.offset
        )
        dweight = dweight if wanted else None
    return dx, dweight, dx if ctx.residual else None, None, None


_rms_norm_triton.register_autograd(_backward, setup_context=_setup_context)


# ---- public --------------------------------------------------------------------------------------
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: None = None,
    offset: float = 0.0,
    impl: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor,
    offset: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute weight * x / rms(x) over the last dimension, or the same for x + residual.

    Args:
        x: [N, H], or [N, heads, H] to normalise every head. The last dimension must be contiguous;
            the other strides are free.
        weight: [H], of x's dtype; beside float32 also bfloat16 or float16, which is exact.
        eps: added to the mean of the squares.
        residual: tensor in the shape and dtype of x, added to x first. If None, nothing is added.
        offset: added to the weight, in float32.
        impl: "cpp" (CPU; not float64), "triton" (not float64; H up to 8192) or "torch"; by default
            the best one for the device.
    Returns:
        y, in the shape and dtype of x. With a residual: (y, x + residual), the second for the next
        residual connection. Differentiable in x, weight and residual.
    Raises:
        ValueError: sizes, strides or devices do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op, pattern = "rms_norm", "N heads H" if getattr(x, "ndim", 2) == 3 else "N H"
    H = check(op, {"x": (x, pattern), "weight": (weight, "H"), "residual": (residual, pattern)})[-1]
    if H == 0:
        raise ValueError(f"{op}: expected rows of at least one value, got x {tuple(x.shape)}")
    chosen = (
        _IMPLS_FLOAT64
        if x.dtype == torch.float64
        else _IMPLS_LONG_ROWS
        if H > _LONGEST_ROW
        else _IMPLS
    ).choose(x.device, impl)
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "weight", weight, FLOATS[:3] if x.dtype == torch.float32 else (x.dtype,))
    check_dtype(op, "residual", residual, (x.dtype,))
    if chosen != "triton":
        weight = weight.to(x.dtype)
    for name, tensor in (("x", x), ("residual", residual)):
        check_last_contiguous(op, name, tensor)
    if chosen == "torch":
        y, added = rms_norm_reference(x, weight, eps, residual, offset)
    elif chosen == "cpp":
        y, added = torch.ops.fusedrl.rms_norm(x, weight, residual, eps, offset)
    else:
        y, added, _ = _rms_norm_triton(x, weight, residual, eps, offset)
    return y if residual is None else (y, added)


# What tests/offline_compile.py compiles: hidden sizes with and without a residual, and the norm of
# heads.
if triton is not None:
    OFFLINE_KERNELS: dict[str, dict] = {
        name: entry
        for dtype in ("fp32", "bf16", "fp16")
        for H, heads, residual in (
            (1536, 1, True),
            (4096, 1, False),
            (8192, 1, True),
            (128, 16, False),
        )
        for name, entry in _offline(dtype, H, heads, residual).items()
    }
    # float32 activations between bfloat16 weights
    _decoding = OFFLINE_KERNELS["forward_fp32_1536_residual"]
    OFFLINE_KERNELS["forward_fp32_bf16_1536_residual"] = _decoding | {
        "signature": _decoding["signature"] | {"weight_ptr": "*bf16"}
    }
