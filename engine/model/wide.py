"""Layers whose activations have a wider dtype than their parameters: float32 between bfloat16
weights, as in `decode_step`.

    y = x W^T + b      dx = dy W      dW = dy^T x      db = sum of dy over tokens

Shapes    N tokens, K inputs and O outputs of a product, V rows of a table, H of its columns.
On a CPU  everything is computed in the activations' dtype. Saved for the backward pass: the inputs,
          and the parameters as they are. At most one tile of a weight's rows is widened at a time,
          in the forward pass and in the backward. If the processor multiplies bfloat16
          (`narrow_products`), the two products of the backward pass use dy and x rounded to it,
          with sums in float32. This is twice as fast, and affects no log-probability.
On a GPU  (`on_tensor_cores`) products are those of kernels/split_linear.py. q, k and v are rounded
          to float16 where the sampler's cache rounds them, and the output of attention is float16
          as well. Saved for the backward pass: the input of each product, gate or attention,
          rounded to two bytes. Gradients are computed from the saved tensors: dy is rounded to
          bfloat16, as if all were bfloat16. Attention is computed again in bfloat16, whose
          exponents hold any gradient, and differentiated.
Numerics  the gradient of a parameter is rounded once, when its sum over the tokens is complete. If
          activations and parameters have the same dtype, torch's own operations are used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedrl.engine.model.step import on_tensor_cores
from fusedrl.kernels import linear_head
from fusedrl.kernels.attention import varlen_attention
from fusedrl.kernels.split_linear import split_linear
from fusedrl.kernels.swiglu import activate

NARROW = torch.bfloat16
TILE = 4 << 20  # bytes of a weight that are wide at a time: they stay in a cache


def _tiles(weight_OK: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight, one tile at a time, in `dtype`."""
    step = max(1, TILE // (dtype.itemsize * max(1, weight_OK.shape[1])))
    for first in range(0, len(weight_OK), step):
        rows = slice(first, first + step)
        yield rows, weight_OK[rows].to(dtype)


def kept(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
    """Return a product's input in the form that is saved for the weight's gradient."""
    return x_NK.to(weight_OK.dtype) if on_tensor_cores(x_NK.device) else x_NK


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16: AVX-512 BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def narrow_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether gradients of products with weights of this dtype are computed from two-byte numbers
    on a CPU."""
    return device.type == "cpu" and dtype == NARROW and _multiplies_bfloat16()


# ---- the three products of a linear layer, without autograd --------------------------------------
def product(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x W^T + b, [N, O] in x's dtype."""
    if x_NK.dtype == weight_OK.dtype:
        return F.linear(x_NK, weight_OK, bias_O)
    if on_tensor_cores(x_NK.device):
        return split_linear(x_NK, weight_OK, bias_O)
    y_NO = x_NK.new_empty(len(x_NK), len(weight_OK))
    for rows, tile in _tiles(weight_OK, x_NK.dtype):
        if bias_O is None:
            torch.mm(x_NK, tile.T, out=y_NO[:, rows])
        else:
            torch.addmm(bias_O[rows].to(x_NK.dtype), x_NK, tile.T, out=y_NO[:, rows])
    return y_NO


def input_grad(grad_NO: Tensor, weight_OK: Tensor) -> Tensor:
    """Return dy W, [N, K] in dy's dtype."""
    if grad_NO.dtype == weight_OK.dtype:
        return grad_NO @ weight_OK
    if on_tensor_cores(grad_NO.device):
        return linear_head.product(grad_NO.to(weight_OK.dtype), weight_OK)
    if narrow_products(grad_NO.device, weight_OK.dtype):
        return (grad_NO.to(NARROW) @ weight_OK).to(grad_NO.dtype)
    out_NK = grad_NO.new_zeros(len(grad_NO), weight_OK.shape[1])
    for rows, tile in _tiles(weight_OK, grad_NO.dtype):
        out_NK.addmm_(grad_NO[:, rows], tile)
    return out_NK


def weight_grad(grad_NO: Tensor, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy^T x, [O, K] rounded to `dtype`; x is the result of `kept`."""
    if x_NK.dtype == dtype:
        return grad_NO.to(dtype).T @ x_NK
    if narrow_products(grad_NO.device, dtype):
        return grad_NO.to(NARROW).T @ x_NK.to(NARROW)
    out_OK = grad_NO.new_empty(grad_NO.shape[1], x_NK.shape[1], dtype=dtype)
    step = max(1, TILE // (grad_NO.itemsize * max(1, x_NK.shape[1])))
    for part_NO, out in zip(grad_NO.split(step, 1), out_OK.split(step), strict=True):
        out.copy_(part_NO.T @ x_NK)
    return out_OK


# ---- with autograd -------------------------------------------------------------------------------
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(kept(x_NK, weight_OK), weight_OK)
        return product(x_NK, weight_OK, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_OK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            input_grad(grad_NO, weight_OK) if for_x else None,
            weight_grad(grad_NO, x_NK, weight_OK.dtype) if for_weight else None,
            grad_NO.sum(0).to(weight_OK.dtype) if for_bias else None,
        )


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, table_VH: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.table = table_VH.shape, table_VH.dtype
        return F.embedding(ids_N, table_VH).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        (ids_N,), (shape, dtype) = ctx.saved_tensors, ctx.table
        grad_VH = grad_NH.new_zeros(shape, dtype=dtype)
        found_U, place_N = ids_N.unique(return_inverse=True)
        sums_UH = torch.ops.aten.embedding_dense_backward(
            grad_NH.to(torch.promote_types(grad_NH.dtype, torch.float32)),
            place_N,
            len(found_U),
            -1,
            False,
        )
        grad_VH[found_U] = sums_UH.to(dtype)
        return None, grad_VH, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_B1: Tensor,
        dtype: torch.dtype,
        options: dict[str, Any],
    ) -> Tensor:
        wide, q, k, v = q.dtype, q.to(dtype), k.to(dtype), v.to(dtype)
        ctx.save_for_backward(q, k, v, cu_seqlens_B1)
        ctx.options = options
        return varlen_attention(q, k, v, cu_seqlens_B1, **options).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *halves, cu_seqlens_B1 = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in halves)
            o = varlen_attention(q, k, v, cu_seqlens_B1, **ctx.options)
            grads = torch.autograd.grad(o, (q, k, v), grad.to(o.dtype))
        return *(x.to(grad.dtype) for x in grads), None, None, None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, gated: bool) -> Tensor:
        ctx.save_for_backward(x.to(torch.bfloat16))
        ctx.options = activation, gated
        return activate(x, activation, gated=gated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (held,), (activation, gated) = ctx.saved_tensors, ctx.options
        with torch.enable_grad():
            x = held.to(grad.dtype).requires_grad_()
            (x_grad,) = torch.autograd.grad(activate(x, activation, gated=gated), x, grad)
        return x_grad, None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_B1: Tensor, dtype: torch.dtype, **options: Any
) -> Tensor:
    """Compute `varlen_attention` in `dtype`; input and output have q's dtype. Differentiable in q,
    k and v."""
    return (
        varlen_attention(q, k, v, cu_seqlens_B1, **options)
        if q.dtype == dtype
        else _Attend.apply(q, k, v, cu_seqlens_B1, dtype, options)
    )


def activated(x: Tensor, activation: str, *, gated: bool, wide: bool) -> Tensor:
    """Compute `activate`; `wide` says that x has a wider dtype than the parameters.
    Differentiable."""
    return (
        _Activate.apply(x, activation, gated)
        if wide and on_tensor_cores(x.device)
        else activate(x, activation, gated=gated)
    )


def linear(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x W^T + b, [N, O] in x's dtype. Differentiable in all three arguments; the weight's
    gradient has the weight's dtype."""
    return (
        F.linear(x_NK, weight_OK, bias_O)
        if x_NK.dtype == weight_OK.dtype
        else _Linear.apply(x_NK, weight_OK, bias_O)
    )


def embed(ids_N: Tensor, table_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows [N, H] of a table, in `dtype`. Differentiable in the table. The gradients of a
    row's tokens are added up in float32 or wider, as torch does on a GPU but not on a CPU."""
    wide = dtype == table_VH.dtype and (table_VH.is_cuda or dtype in (torch.float32, torch.float64))
    return F.embedding(ids_N, table_VH) if wide else _Embed.apply(ids_N, table_VH, dtype)
