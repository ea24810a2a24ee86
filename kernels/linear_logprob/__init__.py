"""linear_logprob: from hidden states, through the head, to the log-probability of one token per
row. It never holds all N V logits when they are many.

    z = hidden weight^T + bias      z' = softcap tanh(z / softcap)

Each row of z' is then scored as in kernels/logprob.

Shapes    N rows, H hidden size, V vocabulary size. R rows make a chunk, whose R V float32 logits
          are the workspace. Triton holds no logits in its forward, and tiles of logits in its
          backward (linear_logprob/_triton.py).
Flops     forward 2 N H V. backward 6 N H V: it computes each chunk's logits again before the two
          products of the gradients. In C++, if a backward will follow, logits of up to 64 MiB in
          all (or the requested workspace) are stored, and the backward is 4 N H V. N does not count
          ignored rows nor, in the backward, rows without a gradient: they are dropped before the
          products.
Numerics  logits, row results and the weight's gradient across chunks are float32 whatever the dtype
          of hidden and weight. The forward is the same with and without a gradient: scoring and
          training the same rows agree in every bit. On a GPU, with bfloat16 or float16 inputs, the
          gradient of the logits is rounded to the inputs' dtype for its two products on tensor
          cores.
Kept      with `kept`, a row is scored only over the tokens that truncation left (see logprob).
          Every implementation does this on chunks of logits.
Source    chunked heads as in Wijmans et al. (2024), Cut your losses in large-vocabulary language
          models, without its approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.kept import Kept
from fusedrl.kernels.linear_head import check_head, keeps_logits, product, workspace
from fusedrl.kernels.logprob import check_ids, logprob, logprob_reference
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import check
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton

if triton is not None:
    from fusedrl.kernels.linear_logprob import _triton_ops  # noqa: F401  (registers fusedrl::linear_logprob_triton)

_IMPLS = Implementations("linear_logprob", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))


# ---- reference -----------------------------------------------------------------------------------
def linear_logprob_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    token_ids_N: Tensor,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (logp, entropy) by definition, holding all N V logits; differentiable, on any device
    and in any float dtype. Tests measure the other implementations against its float64 result."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    # an ignored row may hold anything
    hidden = hidden_NH.to(wide).masked_fill((token_ids_N == ignore_index)[:, None], 0.0)
    return logprob_reference(
        finish(hidden @ weight_VH.to(wide).t(), bias_V, softcap),
        token_ids_N,
        temperature,
        ignore_index,
        kept,
    )


def finish(z_RV: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Turn the product of hidden and weight into logits: add the bias, then apply the softcap."""
    z_RV = z_RV if bias_V is None else z_RV + bias_V.to(z_RV.dtype)
    return z_RV if softcap is None else softcap * torch.tanh(z_RV / softcap)


# ---- torch, a chunk at a time --------------------------------------------------------------------
class _Chunked(torch.autograd.Function):
    @staticmethod
    def chunks(rows: Tensor, N: int, V: int, workspace_bytes: int | None):
        return (
            rows.split(max(1, workspace(workspace_bytes, N, V, rows.device) // (4 * V)))
            if rows.numel()
            else ()
        )

    @staticmethod
    def row_results(
        z_RV: Tensor,
        bias_V: Tensor | None,
        token_ids: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
        kept: Kept | None,
        impl: str | None,
    ) -> tuple[Tensor, Tensor]:
        z_RV = finish(z_RV, bias_V, softcap)
        # kernels do not support float64
        if (z_RV.is_cuda or kept is not None) and z_RV.dtype != torch.float64:
            logp_R, entropy_R = logprob(
                z_RV, token_ids, temperature=temperature, entropy=True, kept=kept, impl=impl
            )
            return logp_R, entropy_R
        return logprob_reference(z_RV, token_ids, temperature, kept=kept)

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        token_ids,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        kept,
        impl,
    ):
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            token_ids,
            temperature if isinstance(temperature, Tensor) else None,
        )
        ctx.rest = (temperature, softcap, ignore_index, workspace_bytes, kept, impl)
        logp, entropy = hidden.new_zeros(
            2, hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)
        ).unbind()
        for index in _Chunked.chunks(
            (token_ids != ignore_index).nonzero().squeeze(1),
            hidden.shape[0],
            weight.shape[0],
            workspace_bytes,
        ):
            scale = temperature[index] if isinstance(temperature, Tensor) else temperature
            logp[index], entropy[index] = _Chunked.row_results(
                product(hidden[index], weight.t()),
                bias,
                token_ids[index],
                scale,
                softcap,
                None if kept is None else kept.select(index),
                impl,
            )
        return logp, entropy

    @staticmethod
    def backward(ctx, logp_grad, entropy_grad):
        hidden, weight, bias, token_ids, _ = ctx.saved_tensors
        temperature, softcap, ignore_index, workspace_bytes, kept, impl = ctx.rest
        wide = torch.promote_types(weight.dtype, torch.float32)
        hidden_grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        active = (token_ids != ignore_index) & ((logp_grad != 0) | (entropy_grad != 0))
        for index in _Chunked.chunks(
            active.nonzero().squeeze(1), hidden.shape[0], weight.shape[0], workspace_bytes
        ):
            scale = temperature[index] if isinstance(temperature, Tensor) else temperature
            with torch.enable_grad():
                z_RV = product(hidden[index], weight.t()).detach().requires_grad_()
                results = _Chunked.row_results(
                    z_RV,
                    bias,
                    token_ids[index],
                    scale,
                    softcap,
                    None if kept is None else kept.select(index),
                    impl,
                )
                (dz_RV,) = torch.autograd.grad(
                    results, z_RV, (logp_grad[index], entropy_grad[index])
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
            None if bias_grad is None else bias_grad.to(bias.dtype),
            *(None,) * 7,
        )


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::linear_logprob_forward")
    def _(
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        bias: Tensor | None,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        workspace_bytes: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        N, V = hidden.shape[0], weight.shape[0]
        logp_N = hidden.new_empty(N, dtype=torch.float32)
        kept = keep and keeps_logits(None if workspace_bytes < 0 else workspace_bytes, 4 * N * V)
        return (
            logp_N,
            torch.empty_like(logp_N) if entropy else logp_N.new_empty(0),
            logp_N.new_empty(N, 3),
            logp_N.new_empty(N if kept else 0, V),
        )

    @torch.library.register_fake("fusedrl::linear_logprob_backward")
    def _(
        logp_grad: Tensor | None,
        entropy_grad: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        bias: Tensor | None,
        stats: Tensor,
        kept: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float,
        ignore_index: int,
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
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    kept: Kept | None = None,
    workspace_bytes: int | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `logprob(hidden @ weight.T + bias, token_ids)` in a bounded workspace, without
    holding all logits at once.

    Args:
        hidden, weight: [N, H] and [V, H], of one dtype: float32, bfloat16 or float16 (the torch
            implementation also float64).
        token_ids: [N] int64 or int32.
        bias: [V], of the same dtype.
        temperature: above 0; a number, or a tensor [N] (it receives no gradient). It divides the
            logits after the softcap.
        softcap: replaces the logits by softcap * tanh(logits / softcap). If None, they stay
            unchanged.
        entropy: True also returns the entropy of each row.
        ignore_index: rows whose token id is this number have logp 0, entropy 0 and no gradient.
            They take part in no product and may hold anything, NaN included.
        kept: for each row, the tokens that truncation left (as in `logprob`). The row is scored
            over only these tokens.
        workspace_bytes: bound of the chunk's float32 logits; the chunk holds at least one row.
            Default: the smaller of 256 MiB and an eighth of the full logits, but never less than 4
            MiB, since thin chunks make slow products; on a GPU, 1,024 rows of logits. In C++ the
            logits are stored for the backward if all of them fit the given bound (64 MiB if None).
        impl: "cpp", "triton" or "torch"; by default the best one for the device.
    Returns:
        logp [N], or (logp [N], entropy [N]); float32. Differentiable once in hidden, weight and
        bias. With equal workspaces, equal rows give equal bits, with and without a gradient.
    Raises:
        IndexError: an id is outside [0, V), on the CPU (on a GPU the result of its row is NaN).
        ValueError: sizes, devices or a number do not fit.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "linear_logprob"
    per_row = temperature if isinstance(temperature, Tensor) else None
    check(
        op,
        {
            "hidden": (hidden, "N H"),
            "weight": (weight, "V H"),
            "token_ids": (token_ids, "N"),
            "bias": (bias, "V"),
            "temperature": (per_row, "N"),
        },
    )
    chosen = _IMPLS.choose(hidden.device, impl)
    check_head(op, chosen, hidden, weight, bias, token_ids, temperature, softcap, workspace_bytes)
    if kept is not None and kept.offsets.shape[0] != token_ids.shape[0] + 1:
        raise ValueError(
            f"{op}: expected {token_ids.shape[0] + 1} kept.offsets, one more than rows, got "
            f"{kept.offsets.shape[0]}; keep what the same rows kept"
        )
    value, rows_T = (1.0, per_row.detach()) if per_row is not None else (float(temperature), None)
    arguments = (hidden, weight, token_ids, bias, value, rows_T, softcap or 0.0)
    if chosen == "cpp" and kept is None:
        logp, entropies = torch.ops.fusedrl.linear_logprob(
            *arguments, entropy, ignore_index, -1 if workspace_bytes is None else workspace_bytes
        )
        return (logp, entropies) if entropy else logp
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(op, token_ids, weight.shape[0], ignore_index)
    if chosen == "triton" and kept is None:
        of_row = 4 + hidden.dtype.itemsize
        room = workspace(workspace_bytes, hidden.shape[0], weight.shape[0], hidden.device, of_row)
        logp, entropies, _ = torch.ops.fusedrl.linear_logprob_triton(*arguments, ignore_index, room)
        return (logp, entropies) if entropy else logp
    logp, entropies = _Chunked.apply(
        hidden,
        weight,
        bias,
        token_ids,
        value if rows_T is None else rows_T,
        softcap,
        ignore_index,
        workspace_bytes,
        kept,
        chosen if kept is not None else None,
    )
    return (logp, entropies) if entropy else logp
