"""Strict numerics: the trainer's numbers for a token are, bit for bit, those of the sampler.

The sampler runs `decode_step` and `fixed_linear`, whose sums have the same order whatever else is
in a batch: in C++ on a CPU, in Triton on a GPU. The strict training forward runs the same two, over
a separate cache. Its gradient is that of the ordinary forward, which is recomputed in the backward
pass:

    outputs     decode_step, fixed_linear, logprob       bits that do not depend on companions,
                                                         chunks, preemption or prefix hits
    gradients   the ordinary forward at the same weights   equal up to rounding; nothing is kept
                                                           between the passes, so it saves
                                                           activations, too

Shapes    N tokens, H hidden, V vocabulary, R rows that have a label.
Cost      one more forward in every training pass, with attention over a paged cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.step import DecoderWeights, allocate_cache, decode_step, on_tensor_cores
from fusedrl.kernels.fixed_linear import fixed_linear
from fusedrl.kernels.kept import Kept
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.runtime.dispatch import unavailable

_WORKSPACE = 64 << 20  # bytes of logits held at a time


def _impl(device: torch.device) -> str:
    """Return the implementation whose rows do not depend on one another, even if another one is
    preferred."""
    return "triton" if device.type == "cuda" or on_tensor_cores(device) else "cpp"


def strict_fault(decoder: Decoder) -> str | None:
    """Return the reason why a decoder's numerics cannot be strict; None if they can."""
    if decoder.device.type not in ("cpu", "cuda"):
        return f"there are none for {decoder.device.type}"
    if decoder.dtype not in (torch.float32, torch.bfloat16):
        return f"they take float32 and bfloat16, not {str(decoder.dtype).removeprefix('torch.')}"
    return unavailable(_impl(decoder.device), decoder.device.type)


def strict_step(
    weights: DecoderWeights,
    token_ids_N: Tensor,
    positions_N: Tensor,
    rows_N: Tensor,
    block_table_BM: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots_R: Tensor | None = None,
) -> Tensor:
    """Run `decode_step` so that each token's bits depend only on the token's sequence."""
    return decode_step(
        weights,
        token_ids_N,
        positions_N,
        rows_N,
        block_table_BM,
        k_cache,
        v_cache,
        out_slots_R,
        fixed=True,
        impl=_impl(token_ids_N.device),
    )


def _trained(decoder: Decoder, adapted: bool) -> list[Tensor]:
    """Return the parameters that get a gradient, which excludes those of an adapter that is off."""
    return [
        p
        for name, p in decoder.named_parameters()
        if p.requires_grad and (adapted or ".lora." not in name)
    ]


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        decoder: Decoder,
        block_size: int,
        batch: tuple[Tensor, Tensor, Tensor, int],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.decoder, ctx.batch, ctx.adapted, ctx.versions = (
            decoder,
            batch,
            decoder.adapter_enabled,
            [p._version for p in parameters],
        )
        token_ids_N, positions_N, cu_seqlens_B1, max_length = batch
        B, M = len(cu_seqlens_B1) - 1, -(-max_length // block_size)
        weights = decoder.weights()
        k, v = allocate_cache(weights, max(1, B * M), block_size, dtype=decoder.cache_dtype)
        table_BM = torch.arange(B * M, dtype=torch.int32, device=k.device).view(B, M)
        rows_N = torch.repeat_interleave(
            torch.arange(B, device=k.device), cu_seqlens_B1.diff().long()
        )
        return strict_step(weights, token_ids_N, positions_N, rows_N, table_BM, k, v)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        parameters = _trained(ctx.decoder, ctx.adapted)
        # fused optimizers do not count, for autograd's own check neither
        if [p._version for p in parameters] != ctx.versions:
            raise RuntimeError(
                "strict forward: the weights changed between the forward and the backward pass; "
                "call backward before the optimizer's step"
            )
        with torch.enable_grad(), ctx.decoder.adapter(enabled=ctx.adapted):
            hidden_NH = ctx.decoder(*ctx.batch)
            grads = torch.autograd.grad(hidden_NH, parameters, grad_NH, allow_unused=True)
        return (None, None, None, *grads)


def strict_hidden(
    decoder: Decoder,
    token_ids_N: Tensor,
    positions_N: Tensor,
    cu_seqlens_B1: Tensor,
    max_length: int,
    block_size: int,
) -> Tensor:
    """Compute `Decoder.forward` with the sampler's bits: [N, H], differentiable in the parameters.
    `block_size`: block size of the sampler's cache."""
    parameters = _trained(decoder, decoder.adapter_enabled)
    return _Hidden.apply(
        decoder, block_size, (token_ids_N, positions_N, cu_seqlens_B1, max_length), *parameters
    )


def strict_logits(hidden_RH: Tensor, head_VH: Tensor, softcap: float | None = None) -> Tensor:
    """Return logits [R, V] float32; each row depends only on its hidden state and the head. No
    gradient."""
    return fixed_linear(hidden_RH, head_VH, softcap=softcap, impl=_impl(hidden_RH.device))


def strict_row_logprob(
    logits_RV: Tensor, token_ids_R: Tensor, temperature: float | Tensor, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy), [R] float32, of rows of logits. A row's results depend on this row
    alone, whatever other rows of the batch request. If the row has `kept` tokens (those that top-k,
    top-p or min-p left), the distribution is over these alone."""
    T_R = (
        torch.as_tensor(temperature, dtype=torch.float32, device=logits_RV.device)
        .expand(len(token_ids_R))
        .contiguous()
    )
    logp_R, entropy_R = logprob(
        logits_RV,
        token_ids_R,
        temperature=T_R,
        entropy=True,
        kept=kept,
        impl=_impl(logits_RV.device),
    )
    return logp_R, entropy_R


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, weight_OK)
        return fixed_linear(x_NK, weight_OK, bias_O, impl=_impl(x_NK.device))

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_OK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            grad_NO @ weight_OK if for_x else None,
            grad_NO.T @ x_NK if for_weight else None,
            grad_NO.sum(0) if for_bias else None,
        )


def strict_linear(x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor) -> Tensor:
    """Return x W^T + b, [N, O] float32; each row depends only on its row of x and the weights.
    Differentiable in all three arguments."""
    return _Linear.apply(x_NK, weight_OK, bias_O)


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        labels_N: Tensor,
        temperature: float,
        softcap: float | None,
        ignore_index: int,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_NH, head_VH, labels_N)
        ctx.options = {
            "temperature": temperature,
            "softcap": softcap,
            "ignore_index": ignore_index,
            "kept": kept,
        }
        logp_N, entropy_N = (
            torch.zeros(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
            for _ in range(2)
        )
        labelled = (labels_N != ignore_index).nonzero()[:, 0]
        for rows_R in labelled.split(max(1, _WORKSPACE // (4 * len(head_VH)))):
            logits_RV = strict_logits(hidden_NH[rows_R], head_VH, softcap)
            logp_N[rows_R], entropy_N[rows_R] = strict_row_logprob(
                logits_RV,
                labels_N[rows_R],
                temperature,
                None if kept is None else kept.select(rows_R),
            )
        return logp_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, logp_grad_N: Tensor, entropy_grad_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, head_VH, labels_N = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [
                x.detach().requires_grad_(needed)
                for x, needed in zip((hidden_NH, head_VH), ctx.needs_input_grad, strict=False)
            ]
            outs = linear_logprob(inputs[0], inputs[1], labels_N, entropy=True, **ctx.options)
            wanted = [x for x in inputs if x.requires_grad]
            grads = iter(torch.autograd.grad(outs, wanted, (logp_grad_N, entropy_grad_N)))
        return (
            *(next(grads) if x.requires_grad else None for x in inputs),
            None,
            None,
            None,
            None,
            None,
        )


def strict_logprob(
    hidden_NH: Tensor,
    head_VH: Tensor,
    labels_N: Tensor,
    temperature: float,
    softcap: float | None = None,
    ignore_index: int = -100,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_logprob` with the sampler's bits: (logp, entropy), [N] float32,
    differentiable in the hidden states and the head."""
    return _Logprob.apply(hidden_NH, head_VH, labels_N, temperature, softcap, ignore_index, kept)
