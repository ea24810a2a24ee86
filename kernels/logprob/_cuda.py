"""logprob in CUDA C++ (csrc/cuda/logprob.cu): its launches, its custom ops for torch.compile, and
their gradient. The mathematics is in __init__.py."""

from __future__ import annotations

from ctypes import c_float, c_int64

import torch
from torch import Tensor

from fusedrl.kernels.runtime import faults, nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch

_THREADS, _TILE = 256, 8192  # kThreads and kTile of logprob.cu
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OFFLINE_SOURCES = {
    "logprob.cu": [
        (f"-DDTYPE={number}", f"-DKEPT={kept}") for kept in (1, 0) for number in _DTYPES.values()
    ]
}  # what tests compile


def _options(logits: Tensor, kept: Tensor | None) -> tuple[str, str]:
    return f"-DDTYPE={_DTYPES[logits.dtype]}", f"-DKEPT={int(kept is not None)}"


# ---- launchers: allocate, grid -------------------------------------------------------------------
def plan_forward(
    logits_NV: Tensor,
    ids_N: Tensor,
    temperature: float,
    temperature_N: Tensor | None,
    entropy: bool,
    ignore_index: int,
    kept_ids_K: Tensor | None,
    kept_offsets: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Allocate (logp [N], entropy [N] or [0], stats [N, 3] = max, S, W / S), and plan the launches
    that write them."""
    N, V = logits_NV.shape
    logp_N, stats_N3 = (
        logits_NV.new_empty(N, dtype=torch.float32),
        logits_NV.new_empty(N, 3, dtype=torch.float32),
    )
    entropy_N = logp_N.new_empty(N if entropy else 0)
    kept = (None if t is None else t.contiguous() for t in (kept_ids_K, kept_offsets))
    arguments = (
        logits_NV,
        ids_N.long().contiguous(),
        logp_N,
        entropy_N if entropy else None,
        stats_N3,
        temperature_N,
        *kept,
        faults.flag("logprob", logits_NV.device),
        c_float(temperature),
        c_int64(V),
        c_int64(logits_NV.stride(0)),
        c_int64(ignore_index),
    )
    launches = (
        [
            Launch(
                "logprob.cu",
                "logprob_forward",
                arguments,
                (N, 1, 1),
                _THREADS,
                _options(logits_NV, kept_ids_K),
            )
        ]
        if N
        else []
    )
    return (logp_N, entropy_N, stats_N3), launches


def plan_backward(
    logp_grad_N: Tensor | None,
    entropy_grad_N: Tensor | None,
    logits_NV: Tensor,
    ids_N: Tensor,
    logp_N: Tensor,
    stats_N3: Tensor,
    temperature: float,
    temperature_N: Tensor | None,
    ignore_index: int,
    kept_ids_K: Tensor | None,
    kept_offsets: Tensor | None,
    out_NV: Tensor,
) -> list[Launch]:
    """Plan the launches that write the gradient into `out_NV`, which may be the logits."""
    N, V = logits_NV.shape
    if N == 0 or V == 0:
        return []
    g_N, h_N, *kept = (
        None if t is None else t.contiguous()
        for t in (logp_grad_N, entropy_grad_N, kept_ids_K, kept_offsets)
    )
    arguments = (
        g_N,
        h_N,
        logits_NV,
        ids_N.long().contiguous(),
        logp_N,
        stats_N3,
        out_NV,
        temperature_N,
        *kept,
        c_float(temperature),
        c_int64(V),
        c_int64(logits_NV.stride(0)),
        c_int64(out_NV.stride(0)),
        c_int64(ignore_index),
    )
    return [
        Launch(
            "logprob.cu",
            "logprob_backward",
            arguments,
            (N, -(-V // _TILE), 1),
            _THREADS,
            _options(logits_NV, kept_ids_K),
        )
    ]


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
@torch.library.custom_op("fusedrl::logprob_cuda", mutates_args=(), device_types="cuda")
def logprob_cuda(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run logprob in CUDA C++."""
    outputs, launches = plan_forward(
        logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets
    )
    nvrtc.run(launches, logits.device)
    return outputs


@logprob_cuda.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    per_row = logits.new_empty(token_ids.shape, dtype=torch.float32)
    return (
        per_row,
        per_row.new_empty(token_ids.shape if entropy else 0),
        per_row.new_empty(token_ids.numel(), 3),
    )


@torch.library.custom_op(
    "fusedrl::logprob_cuda_backward", mutates_args=("out",), device_types="cuda"
)
def _logprob_cuda_backward(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    logits: Tensor | None,
    token_ids: Tensor,
    logp: Tensor,
    stats: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
    out: Tensor,
) -> None:
    """Write the gradient into `out`. If `logits` is None, `out` holds the logits."""
    nvrtc.run(
        plan_backward(
            logp_grad,
            entropy_grad,
            out if logits is None else logits,
            token_ids,
            logp,
            stats,
            temperature,
            temperatures,
            ignore_index,
            kept_ids,
            kept_offsets,
            out,
        ),
        out.device,
    )


@_logprob_cuda_backward.register_fake
def _(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    logits: Tensor | None,
    token_ids: Tensor,
    logp: Tensor,
    stats: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
    out: Tensor,
) -> None:
    return None


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets = (
        inputs
    )
    logp, entropies, stats = output
    ctx.save_for_backward(logits, token_ids, logp, stats, temperatures, kept_ids, kept_offsets)
    ctx.temperature, ctx.ignore_index = temperature, ignore_index
    ctx.mark_non_differentiable(*([stats] if entropy else [stats, entropies]))
    ctx.set_materialize_grads(False)


def _backward(ctx, logp_grad: Tensor | None, entropy_grad: Tensor | None, _stats_grad: None):  # type: ignore[no-untyped-def]
    logits, token_ids, logp, stats, temperatures, *kept = ctx.saved_tensors
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _logprob_cuda_backward(
        logp_grad,
        entropy_grad,
        logits,
        token_ids,
        logp,
        stats,
        ctx.temperature,
        temperatures,
        ctx.ignore_index,
        *kept,
        grad,
    )
    return grad, *(None,) * 7


logprob_cuda.register_autograd(_backward, setup_context=_setup_context)


class InPlaceCuda(torch.autograd.Function):
    """Compute the op above, but overwrite the logits with their gradient."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = logprob_cuda(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, logp_grad, entropy_grad, _stats_grad):  # type: ignore[no-untyped-def]
        # raises when the logits were written to since
        logits, token_ids, logp, stats, temperatures, *kept = ctx.saved_tensors
        # shares the version counter: whoever else saved these logits is told, by the op that
        # mutates it
        grad = logits.detach()
        _logprob_cuda_backward(
            logp_grad,
            entropy_grad,
            None,
            token_ids,
            logp,
            stats,
            ctx.temperature,
            temperatures,
            ctx.ignore_index,
            *kept,
            grad,
        )
        return grad, *(None,) * 7
