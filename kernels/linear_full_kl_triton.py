"""linear_full_kl in Triton: the products by the library, chunk by chunk, the rows by the kernels of full_kl_triton.py.

The mathematics and numerics are those of linear_full_kl.py.

Forward    R rows of both heads' logits, 8 R V bytes, and the divergence of each pair of rows.
Backward   both heads' logits of R rows and C columns again, the first overwritten by (float32; else narrowed to the dtype of hidden beside) their
           gradient, then the two products of that tile. Tiles are square, as in linear_logprob_triton.py and for its reason.
Bytes      besides the products' own: 16 N V written and read forward (jsd 24), and 20 N V (narrow dtypes) or 24 N V backward.
Host       the forward reads the mask once, where there is one; the backward reads once which rows a gradient reaches.
"""
from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.full_kl_triton import full_kl_backward, full_kl_forward, offline_backward
from fusedrl.kernels.linear_head import add_product, product
from fusedrl.kernels.linear_logprob_triton import tile_of


def _logits(hidden_RH: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z_RV = product(hidden_RH, weight.t())
    return z_RV if bias is None else z_RV.add_(bias)


# ---- custom ops: what torch.compile sees --------------------------------------------------------------------------------
@torch.library.custom_op("fusedrl::linear_full_kl_triton", mutates_args=())
def _linear_full_kl_triton(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias: Tensor | None, ref_bias: Tensor | None,
                           mask: Tensor | None, temperature: float, direction: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """kl [N], stats [N, 5]."""
    N, V = hidden.shape[0], weight.shape[0]
    kl, stats = hidden.new_zeros(N, dtype=torch.float32), hidden.new_zeros(N, 5, dtype=torch.float32)
    index_M = None if mask is None else mask.nonzero().squeeze(1)
    M, R = N if index_M is None else index_M.numel(), max(1, workspace_bytes // (8 * V))

    def chunk(rows: slice | Tensor) -> None:
        z_RV, ref_RV = _logits(hidden[rows], weight, bias), _logits(ref_hidden[rows], ref_weight, ref_bias)
        kl[rows], stats[rows] = full_kl_forward(z_RV, ref_RV, None, temperature, direction)

    for begin in range(0, M, R):
        rows = slice(begin, min(begin + R, M))
        chunk(rows if index_M is None else index_M[rows])
    return kl, stats


@_linear_full_kl_triton.register_fake
def _(hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    kl = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return kl, kl.new_empty(hidden.shape[0], 5)


@torch.library.custom_op("fusedrl::linear_full_kl_triton_backward", mutates_args=())
def _linear_full_kl_triton_backward(kl_grad: Tensor, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias: Tensor | None,
                                    ref_bias: Tensor | None, mask: Tensor | None, stats: Tensor, temperature: float, direction: int,
                                    workspace_bytes: int, for_hidden: bool, for_weight: bool, for_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those not asked for are empty."""
    index_A = (kl_grad != 0 if mask is None else mask & (kl_grad != 0)).nonzero().squeeze(1)  # the one read
    V, A = weight.shape[0], index_A.numel()
    R, C = tile_of(workspace_bytes // (8 if hidden.dtype == torch.float32 else 8 + hidden.dtype.itemsize), A, V)
    hidden_grad = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if for_hidden else hidden.new_empty(0)
    weight_grad = weight.new_zeros(weight.shape if for_weight else 0, dtype=torch.float32)
    bias_grad = weight.new_zeros(V if for_bias else 0, dtype=torch.float32)

    def tile(hidden_RH: Tensor, ref_hidden_RH: Tensor, g: Tensor, stats_R5: Tensor, grad_RH: Tensor, columns: slice) -> None:
        z = _logits(hidden_RH, weight[columns], None if bias is None else bias[columns])
        ref = _logits(ref_hidden_RH, ref_weight[columns], None if ref_bias is None else ref_bias[columns])
        dz = z if hidden.dtype == z.dtype else torch.empty_like(z, dtype=hidden.dtype)
        full_kl_backward(g, z, ref, stats_R5, dz, temperature, direction)
        del z, ref
        if for_hidden:
            add_product(grad_RH, dz, weight[columns])
        if for_weight:
            add_product(weight_grad[columns], dz.t(), hidden_RH)
        if for_bias:
            bias_grad[columns] += dz.sum(0, dtype=torch.float32)

    for begin in range(0, A, R):
        index = index_A[begin:begin + R]
        hidden_RH, ref_hidden_RH = hidden[index], ref_hidden[index]
        grad_RH = hidden.new_zeros(hidden_RH.shape if for_hidden else 0, dtype=torch.float32)
        for first in range(0, V, C):
            tile(hidden_RH, ref_hidden_RH, kl_grad[index], stats[index], grad_RH, slice(first, min(first + C, V)))
        if for_hidden:
            hidden_grad[index] = grad_RH.to(hidden.dtype)
    return hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype)


@_linear_full_kl_triton_backward.register_fake
def _(kl_grad: Tensor, hidden: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = rest[-3:]
    return (hidden.new_empty(hidden.shape if for_hidden else 0), weight.new_empty(weight.shape if for_weight else 0),
            weight.new_empty(weight.shape[0] if for_bias else 0))


# ---- autograd -----------------------------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.direction, ctx.workspace_bytes = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, kl_grad: Tensor, _stats_grad: Tensor):
    if torch.is_grad_enabled():  # create_graph: the gradients would pass for constants
        raise RuntimeError("linear_full_kl: expected one backward pass, got a double backward (create_graph=True), which this op does not have")
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
    grads = _linear_full_kl_triton_backward(kl_grad, *ctx.saved_tensors, ctx.temperature, ctx.direction, ctx.workspace_bytes, *wanted)
    hidden_grad, weight_grad, bias_grad = (grad if needed else None for grad, needed in zip(grads, wanted, strict=True))
    return hidden_grad, weight_grad, None, None, bias_grad, *(None,) * 5


_linear_full_kl_triton.register_autograd(_backward, setup_context=_setup_context)

# ---- what is compiled offline: the gradient of float32 logits in a narrow dtype (the other kernels are in the table of full_kl_triton.py) -----
OFFLINE_KERNELS = offline_backward("fp32", "bf16") | offline_backward("fp32", "fp16")
