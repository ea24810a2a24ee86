"""linear_full_kl in Triton: chunk by chunk, torch computes the products and the kernels of
full_kl/_triton.py the rows.

The mathematics and numerics are those of __init__.py.

Forward    R rows of both heads' logits, 8 R V bytes, and the divergence of each pair of rows.
Backward   computes both heads' logits of R rows and C columns again, then their gradient, then the
           two products of that tile. A float32 gradient overwrites the first head's logits; in a
           narrower dtype it is a separate tensor. Tiles are square for the reason given in
           linear_logprob/_triton.py.
Bytes      besides the products' own: 16 N V written and read forward (jsd 24), and 20 N V (narrow
           dtypes) or 24 N V backward.
Host       the forward reads the mask once, where there is one; the backward reads once which rows a
           gradient reaches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedrl.kernels.full_kl._triton import full_kl_backward, full_kl_forward, offline_backward
from fusedrl.kernels.linear_head import head_gradients, product, tile_of


def _logits(hidden_RH: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z_RV = product(hidden_RH, weight.t())
    return z_RV if bias is None else z_RV.add_(bias)


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
@torch.library.custom_op("fusedrl::linear_full_kl_triton", mutates_args=())
def _linear_full_kl_triton(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    direction: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Compute kl [N] and stats [N, 5]."""
    N, V = hidden.shape[0], weight.shape[0]
    kl, stats = (
        hidden.new_zeros(N, dtype=torch.float32),
        hidden.new_zeros(N, 5, dtype=torch.float32),
    )
    index_M = None if mask is None else mask.nonzero().squeeze(1)
    M, R = N if index_M is None else index_M.numel(), max(1, workspace_bytes // (8 * V))

    def chunk(rows: slice | Tensor) -> None:
        z_RV, ref_RV = (
            _logits(hidden[rows], weight, bias),
            _logits(ref_hidden[rows], ref_weight, ref_bias),
        )
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
def _linear_full_kl_triton_backward(
    kl_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    direction: int,
    workspace_bytes: int,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias; those that are not requested are empty."""
    # the one read
    index_A = (kl_grad != 0 if mask is None else mask & (kl_grad != 0)).nonzero().squeeze(1)
    per_logit = 8 if hidden.dtype == torch.float32 else 8 + hidden.dtype.itemsize
    tile = tile_of(workspace_bytes // per_logit, index_A.numel(), weight.shape[0])

    def of_rows(index: Tensor, hidden_RH: Tensor) -> Callable[[slice], Tensor]:
        ref_hidden_RH, g, stats_R5 = ref_hidden[index], kl_grad[index], stats[index]

        def gradient_of(columns: slice) -> Tensor:
            z_RC = _logits(hidden_RH, weight[columns], None if bias is None else bias[columns])
            ref_RC = _logits(
                ref_hidden_RH, ref_weight[columns], None if ref_bias is None else ref_bias[columns]
            )
            dz_RC = (
                z_RC if hidden.dtype == z_RC.dtype else torch.empty_like(z_RC, dtype=hidden.dtype)
            )
            full_kl_backward(g, z_RC, ref_RC, stats_R5, dz_RC, temperature, direction)
            return dz_RC

        return gradient_of

    return head_gradients(hidden, weight, index_A, tile, of_rows, for_hidden, for_weight, for_bias)


@_linear_full_kl_triton_backward.register_fake
def _(
    kl_grad: Tensor, hidden: Tensor, weight: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.direction, ctx.workspace_bytes = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, kl_grad: Tensor, _stats_grad: Tensor):
    if torch.is_grad_enabled():  # create_graph: the gradients would pass for constants
        raise RuntimeError(
            "linear_full_kl: expected one backward pass, got a double backward "
            "(create_graph=True), which this op does not have"
        )
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4])
    grads = _linear_full_kl_triton_backward(
        kl_grad, *ctx.saved_tensors, ctx.temperature, ctx.direction, ctx.workspace_bytes, *wanted
    )
    hidden_grad, weight_grad, bias_grad = (
        grad if needed else None for grad, needed in zip(grads, wanted, strict=True)
    )
    return hidden_grad, weight_grad, None, None, bias_grad, *(None,) * 5


_linear_full_kl_triton.register_autograd(_backward, setup_context=_setup_context)

# ---- offline compilation: the gradient of float32 logits in a narrow dtype
# The other kernels are in the table of full_kl/_triton.py.
OFFLINE_KERNELS = offline_backward("fp32", "bf16") | offline_backward("fp32", "fp16")
