"""linear_full_kl: full_kl of the logits of two heads, hidden weight^T and ref_hidden ref_weight^T,
without ever holding all N V logits when they are many.

Shapes    N rows; H hidden size (the reference may have a different one, H_ref); V vocabulary size.
          R rows make a chunk, whose 2 R V float32 logits are the workspace.
Flops     forward 2 N V (H + H_ref); backward the same again to compute each chunk's logits anew,
          and 4 N V H for the gradients. In C++, if a backward will follow, logits of up to 64 MiB
          in all (or the requested workspace) are stored instead. N does not count masked rows nor,
          in the backward, rows without a gradient: they are dropped before the products.
Numerics  logits, row results and the weight's gradient across chunks are float32 whatever the
          dtypes. Each row is computed as in full_kl. On a GPU, with bfloat16 or float16 inputs, the
          gradient of the logits is rounded to the inputs' dtype for its two products on tensor
          cores.
Host      the host reads which rows count, in the forward if there is a mask, and in the backward.
          On a GPU this synchronises.
Source    full_kl; chunked heads as in linear_logprob.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.full_kl import DIRECTIONS, check_direction, full_kl, full_kl_reference
from fusedrl.kernels.linear_head import check_head, keeps_logits, product, workspace
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.linear_full_kl import _triton  # noqa: F401  (registers fusedrl::linear_full_kl_triton)

_IMPLS = Implementations("linear_full_kl", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))


# ---- reference -----------------------------------------------------------------------------------
def linear_full_kl_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    ref_hidden_NH: Tensor,
    ref_weight_VH: Tensor,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    mask_N: Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "reverse",
) -> Tensor:
    """Compute linear_full_kl by definition, holding all N V logits; differentiable, on any device
    and in any float dtype. Tests measure the other implementations against its float64 result."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden = (
            hidden.to(wide)
            if mask_N is None
            else hidden.to(wide).masked_fill(~mask_N[:, None], 0.0)
        )  # a masked row may hold anything
        z = hidden @ weight.to(wide).t()
        return z if bias is None else z + bias.to(wide)

    ref_logits = logits(ref_hidden_NH, ref_weight_VH, ref_bias_V).detach()
    return full_kl_reference(
        logits(hidden_NH, weight_VH, bias_V), ref_logits, mask_N, temperature, direction
    )


def chunk_bytes(workspace_bytes: int | None, N: int, V: int, device: torch.device) -> int:
    """Return the bytes for a chunk of both heads' logits."""
    if device.type == "cpu":
        return workspace(workspace_bytes, 2 * N, V)
    return workspace(workspace_bytes, N, V, device, of_row=8)


# ---- torch, a chunk at a time --------------------------------------------------------------------
class _Chunked(torch.autograd.Function):
    @staticmethod
    def chunks(rows: Tensor, N: int, V: int, workspace_bytes: int | None):
        return (
            rows.split(max(1, chunk_bytes(workspace_bytes, N, V, rows.device) // (8 * V)))
            if rows.numel()
            else ()
        )

    @staticmethod
    def logits(hidden_RH: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z_RV = product(hidden_RH, weight.t())
        return z_RV if bias is None else z_RV + bias.to(z_RV.dtype)

    @staticmethod
    def row_results(z_RV: Tensor, ref_RV: Tensor, temperature: float, direction: str) -> Tensor:
        if z_RV.is_cuda and z_RV.dtype != torch.float64:  # kernels do not support float64
            return full_kl(z_RV, ref_RV, temperature=temperature, direction=direction)
        return full_kl_reference(z_RV, ref_RV, None, temperature, direction)

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        bias,
        ref_bias,
        mask,
        temperature,
        direction,
        workspace_bytes,
    ):
        kl_N = hidden.new_zeros(
            hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        rows = (
            torch.arange(hidden.shape[0], device=hidden.device)
            if mask is None
            else mask.nonzero().squeeze(1)
        )
        for index in _Chunked.chunks(rows, hidden.shape[0], weight.shape[0], workspace_bytes):
            ref_RV = _Chunked.logits(ref_hidden[index], ref_weight, ref_bias).to(kl_N.dtype)
            kl_N[index] = _Chunked.row_results(
                _Chunked.logits(hidden[index], weight, bias), ref_RV, temperature, direction
            )
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask)
        ctx.rest = (temperature, direction, workspace_bytes)
        return kl_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, kl_grad):
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask = ctx.saved_tensors
        temperature, direction, workspace_bytes = ctx.rest
        wide = torch.promote_types(weight.dtype, torch.float32)
        hidden_grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[4] else None
        active = kl_grad != 0 if mask is None else mask & (kl_grad != 0)
        for index in _Chunked.chunks(
            active.nonzero().squeeze(1), hidden.shape[0], weight.shape[0], workspace_bytes
        ):
            ref_RV = _Chunked.logits(ref_hidden[index], ref_weight, ref_bias).to(kl_grad.dtype)
            with torch.enable_grad():
                z_RV = _Chunked.logits(hidden[index], weight, bias).detach().requires_grad_()
                (dz_RV,) = torch.autograd.grad(
                    _Chunked.row_results(z_RV, ref_RV, temperature, direction), z_RV, kl_grad[index]
                )
            if hidden_grad is not None:
                hidden_grad[index] = product(dz_RV, weight).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad += product(dz_RV.t(), hidden[index])
            if bias_grad is not None:
                bias_grad += dz_RV.sum(0)
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None,
            None,
            None if bias_grad is None else bias_grad.to(bias.dtype),
            *(None,) * 5,
        )


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::linear_full_kl_forward")
    def _(
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
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, V = hidden.shape[0], weight.shape[0]
        kl_N = hidden.new_empty(N, dtype=torch.float32)
        kept = keep and keeps_logits(None if workspace_bytes < 0 else workspace_bytes, 8 * N * V)
        return kl_N, kl_N.new_empty(N, 5), kl_N.new_empty(2, N if kept else 0, V)

    @torch.library.register_fake("fusedrl::linear_full_kl_backward")
    def _(
        kl_grad: Tensor,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        bias: Tensor | None,
        ref_bias: Tensor | None,
        stats: Tensor,
        kept: Tensor,
        mask: Tensor | None,
        temperature: float,
        direction: int,
        workspace_bytes: int,
        for_hidden: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            hidden.new_empty(hidden.shape if for_hidden else (0,)),
            weight.new_empty(weight.shape if for_weight else (0,)),
            bias.new_empty(bias.shape)
            if for_bias and bias is not None
            else hidden.new_empty(0, dtype=torch.float32),
        )


# ---- public --------------------------------------------------------------------------------------
def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "reverse",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute `full_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias)` in a
    bounded workspace, without holding all logits at once.

    Args:
        hidden, weight: [N, H] and [V, H], of one dtype: float32, bfloat16 or float16 (the torch
            implementation also float64).
        ref_hidden, ref_weight: [N, H_ref] and [V, H_ref], of one dtype; constants. If policy and
            reference differ only by an adapter, pass the same weight twice.
        temperature, direction: as in `full_kl`.
        bias, ref_bias: [V], of their weight's dtype.
        mask: [N] bool; False rows have KL 0 and no gradient, take part in no product and may hold
            anything. If None, every row counts.
        workspace_bytes: bound of a chunk's float32 logits, those of both heads together; the chunk
            holds at least one row. Default: the smaller of 256 MiB and an eighth of the full
            logits, but never less than 4 MiB; on a GPU, 1,024 rows.
        impl: "cpp", "triton" or "torch"; by default the best one for the device.
    Returns:
        [N] float32. Differentiable once in hidden, weight and bias.
    Raises:
        ValueError: the direction is unknown, or a number, sizes or devices do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "linear_full_kl"
    check_direction(op, direction, temperature)
    check(
        op,
        {
            "hidden": (hidden, "N H"),
            "weight": (weight, "V H"),
            "ref_hidden": (ref_hidden, "N H_ref"),
            "ref_weight": (ref_weight, "V H_ref"),
            "bias": (bias, "V"),
            "ref_bias": (ref_bias, "V"),
            "mask": (mask, "N"),
        },
    )
    chosen_impl = _IMPLS.choose(hidden.device, impl)
    allowed = FLOATS if chosen_impl == "torch" else FLOATS[:3]
    check_head(op, chosen_impl, hidden, weight, bias, None, temperature, None, workspace_bytes)
    check_dtype(op, "ref_hidden", ref_hidden, allowed)
    check_dtype(op, "ref_weight", ref_weight, (ref_hidden.dtype,))
    check_dtype(op, "ref_bias", ref_bias, (ref_hidden.dtype,))
    check_dtype(op, "mask", mask, (torch.bool,))
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: expected a vocabulary, got a weight of size {list(weight.shape)}")
    ref_hidden, ref_weight, ref_bias = (
        ref_hidden.detach(),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
    )
    if chosen_impl == "torch":
        return _Chunked.apply(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            bias,
            ref_bias,
            mask,
            float(temperature),
            direction,
            workspace_bytes,
        )
    inputs = (
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        bias,
        ref_bias,
        mask,
        float(temperature),
        DIRECTIONS.index(direction),
    )
    if chosen_impl == "triton":
        return torch.ops.fusedrl.linear_full_kl_triton(
            *inputs,
            chunk_bytes(workspace_bytes, hidden.shape[0], weight.shape[0], hidden.device),
        )[0]
    return torch.ops.fusedrl.linear_full_kl(
        *inputs, -1 if workspace_bytes is None else workspace_bytes
    )
