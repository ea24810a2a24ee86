"""The Triton ops of linear_logprob: the custom ops for torch.compile, their gradient, and the
specialisations to compile offline. The kernels and their launchers are in _triton.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedrl.kernels.linear_head import head_gradients, product, tile_of
from fusedrl.kernels.linear_logprob._triton import (
    _COMBINE_PARTS,
    _COMBINE_ROWS,
    _GRADIENT_COLUMNS,
    _GRADIENT_ROWS,
    _GRADIENT_WARPS,
    _GROUP,
    _PART,
    FLOAT32,
    NARROW,
    WIDE,
    HeadOf,
    Rows,
    Scores,
    Tile,
    _combine_kernel,
    _gradient_kernel,
    _logits_kernel,
    logits_gradient,
    score,
    unscored,
)


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
@torch.library.custom_op("fusedrl::linear_logprob_triton", mutates_args=())
def _linear_logprob_triton(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    ignore_index: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logp [N], entropy [N] and stats [N, 3]."""
    ignored = token_ids == ignore_index
    order = ignored.to(torch.uint8).argsort(stable=True)
    rows = Rows(
        order,
        token_ids[order],
        None if temperatures is None else temperatures[order].float(),
        (~ignored).sum(),
    )
    scores = unscored(rows)
    score(
        hidden,
        HeadOf(weight, bias, temperature, softcap),
        rows,
        scores,
        0,
        hidden.shape[0],
        workspace_bytes,
    )
    logp, entropy, stats = (torch.empty_like(t).index_copy_(0, order, t) for t in scores)
    return logp, entropy, stats


@_linear_logprob_triton.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    ignore_index: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    logp = token_ids.new_empty(token_ids.shape, dtype=torch.float32)
    return logp, torch.empty_like(logp), logp.new_empty(*logp.shape, 3)


@torch.library.custom_op("fusedrl::linear_logprob_triton_backward", mutates_args=())
def _linear_logprob_triton_backward(
    logp_grad: Tensor,
    entropy_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    stats: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float,
    ignore_index: int,
    workspace_bytes: int,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias; those that are not requested are empty."""
    head = HeadOf(weight, bias, temperature, softcap)
    index_A = (
        ((token_ids != ignore_index) & ((logp_grad != 0) | (entropy_grad != 0)))
        .nonzero()
        .squeeze(1)
    )  # the one read
    per_logit = 4 if hidden.dtype == torch.float32 else 4 + hidden.dtype.itemsize
    tile = tile_of(workspace_bytes // per_logit, index_A.numel(), weight.shape[0])

    def of_rows(index: Tensor, hidden_RH: Tensor) -> Callable[[slice], Tensor]:
        rows = Rows(
            index, token_ids[index], None if temperatures is None else temperatures[index].float()
        )
        scores = Scores(logp[index], logp, stats[index])
        g, h = logp_grad[index], entropy_grad[index]

        def gradient_of(columns: slice) -> Tensor:
            z_RC = product(hidden_RH, weight[columns].t())
            dz_RC = (
                z_RC if hidden.dtype == z_RC.dtype else torch.empty_like(z_RC, dtype=hidden.dtype)
            )
            logits_gradient(g, h, z_RC, head, rows, scores, None, dz_RC, columns.start)
            return dz_RC

        return gradient_of

    return head_gradients(hidden, weight, index_A, tile, of_rows, for_hidden, for_weight, for_bias)


@_linear_logprob_triton_backward.register_fake
def _(
    logp_grad: Tensor,
    entropy_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    stats: Tensor,
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
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    (
        hidden,
        weight,
        token_ids,
        bias,
        ctx.temperature,
        temperatures,
        ctx.softcap,
        ctx.ignore_index,
        ctx.workspace_bytes,
    ) = inputs
    logp, _, stats = output
    ctx.save_for_backward(hidden, weight, token_ids, bias, logp, stats, temperatures)
    ctx.mark_non_differentiable(stats)


def _backward(ctx, logp_grad: Tensor, entropy_grad: Tensor, _stats_grad: None):
    if torch.is_grad_enabled():  # create_graph: the gradients would pass for constants
        raise RuntimeError(
            "linear_logprob: expected one backward pass, got a double backward "
            "(create_graph=True), which this op does not have"
        )
    hidden, weight, token_ids, bias, logp, stats, temperatures = ctx.saved_tensors
    needed = ctx.needs_input_grad
    for_hidden, for_weight, for_bias = needed[0], needed[1], bias is not None and needed[3]
    grads = _linear_logprob_triton_backward(
        logp_grad,
        entropy_grad,
        hidden,
        weight,
        token_ids,
        bias,
        logp,
        stats,
        ctx.temperature,
        temperatures,
        ctx.softcap,
        ctx.ignore_index,
        ctx.workspace_bytes,
        for_hidden,
        for_weight,
        for_bias,
    )
    hidden_grad, weight_grad, bias_grad = (
        grad if wanted else None
        for grad, wanted in zip(grads, (for_hidden, for_weight, for_bias), strict=True)
    )
    return hidden_grad, weight_grad, None, bias_grad, None, None, None, None, None


_linear_logprob_triton.register_autograd(_backward, setup_context=_setup_context)


# ---- what is compiled offline --------------------------------------------------------------------
def _offline_logits(dtype: str, tile: Tile, everything: bool, store: bool) -> dict:
    """Return one specialisation of the logits kernel. `everything`: with each optional input and
    the softcap; `store`: the logits are written."""
    optional = {
        "bias_ptr": (f"*{dtype}", everything),
        "live_ptr": ("*i64", not store),
        "temperatures_ptr": ("*fp32", everything),
        "logits_ptr": ("*fp32", store),
    }
    return {
        "kernel": _logits_kernel,
        "signature": {
            "hidden_ptr": f"*{dtype}",
            "weight_ptr": f"*{dtype}",
            "ids_ptr": "*i64",
            "rows_ptr": "*i64",
            "partials_ptr": "*fp32",
            "label_ptr": "*fp32",
            "temperature": "fp32",
            "softcap": "fp32",
            "begin": "i32",
            "end": "i32",
            "V": "i32",
            "H": "i32",
            "hidden_stride": "i32",
            "weight_stride": "i32",
            "logits_width": "i32",
        }
        | {name: kind for name, (kind, used) in optional.items() if used},
        "constexprs": {
            "SOFTCAP": everything,
            "EVEN": True,
            "WIDEN": False,
            "BLOCK_R": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.inputs,
            "PART": _PART,
            "GROUP": _GROUP,
            "HALVES": tile.halves,
        }
        | {name: None for name, (_, used) in optional.items() if not used},
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "divisible": ("logits_width",),
    }


def _offline_gradient(dtype: str, finish: bool) -> dict:
    """Return one specialisation of the gradient kernel. `finish`: as linear_logprob's backward uses
    it, with every option; else as linear_policy_loss uses it."""
    pointers = {
        "logp_grad_ptr": "*fp32",
        "entropy_grad_ptr": "*fp32",
        "logits_ptr": "*fp32",
        "ids_ptr": "*i64",
        "logp_ptr": "*fp32",
        "stats_ptr": "*fp32",
        "grad_ptr": f"*{dtype}",
    }
    pointers |= (
        {"bias_ptr": f"*{dtype}", "temperatures_ptr": "*fp32"} if finish else {"source_ptr": "*i64"}
    )
    return {
        "kernel": _gradient_kernel,
        "signature": pointers
        | {
            "temperature": "fp32",
            "softcap": "fp32",
            "A": "i32",
            "V": "i32",
            "first": "i32",
            "width": "i32",
            "logits_stride": "i32",
            "grad_stride": "i32",
        },
        "constexprs": {
            "SOFTCAP": finish,
            "FINISH": finish,
            "ROWS": _GRADIENT_ROWS,
            "COLUMNS": _GRADIENT_COLUMNS,
        }
        | ({"source_ptr": None} if finish else {"bias_ptr": None, "temperatures_ptr": None}),
        "num_warps": _GRADIENT_WARPS,
        "divisible": ("width", "logits_stride", "grad_stride"),
    }


# tile -> what the names of its kernels end with, and where it serves
_OFFLINE_TILES = {
    FLOAT32: ("", ("sm_80", "sm_90", "sm_100", "gfx942")),
    NARROW: ("", ("sm_80", "gfx942")),
    WIDE[9]: ("_wide", ("sm_90",)),
    WIDE[10]: ("_halves", ("sm_100",)),
}
OFFLINE_KERNELS = (
    {
        "_".join(
            ("logits", *(["store"] * store), *(["everything"] * everything), dtype + ending)
        ): _offline_logits(dtype, tile, everything, store) | {"targets": targets}
        for tile, (ending, targets) in _OFFLINE_TILES.items()
        for dtype in (("fp32",) if tile is FLOAT32 else ("bf16", "fp16"))
        for everything in (False, True)
        for store in (False, True)
    }
    | {
        "combine": {
            "kernel": _combine_kernel,
            "signature": {
                "partials_ptr": "*fp32",
                "label_ptr": "*fp32",
                "ids_ptr": "*i64",
                "live_ptr": "*i64",
                "temperatures_ptr": "*fp32",
                "logp_ptr": "*fp32",
                "entropy_ptr": "*fp32",
                "stats_ptr": "*fp32",
                "fault_ptr": "*i32",
                "temperature": "fp32",
                "begin": "i32",
                "end": "i32",
                "V": "i32",
                "parts": "i32",
            },
            "constexprs": {"ROWS": _COMBINE_ROWS, "PARTS": _COMBINE_PARTS},
        },
    }
    | {
        f"gradient_{'finish_' if finish else ''}{dtype}": _offline_gradient(dtype, finish)
        for dtype in ("fp32", "bf16", "fp16")
        for finish in (False, True)
    }
)
