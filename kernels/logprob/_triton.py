"""logprob in Triton: one program per row walks the vocabulary, or only the row's kept tokens, with
an online maximum. The gradient is computed block by block.

The mathematics, shapes and numerics are those of __init__.py. Exponentials are powers of 2, whose
factor log2(e) is part of 1 / T. Every thread keeps its own maximum and sums, which the program
merges once, at the end of the row: no barrier stands in the loop. A tile is [TIMES, LANES, WIDTH],
so that a thread holds WIDTH neighbours, which it loads at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.runtime import faults

_BLOCK, _WARPS = 4096, 8
_LANES = 32 * _WARPS
# of the backward where rows list what they kept: a thread counts a 32nd of the columns, so more of
# them spill
_KEPT_BLOCK, _KEPT_WARPS = 1024, 4


_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-290.0)  # 2 to this power is 0, and not -inf times 0 of a masked logit


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _base(m):
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _moved(m, base, scale):
    """Return the power of 2 by which sums with maximum m are scaled for the maximum `base`."""
    return tl.where(m == -float("inf"), 0.0, tl.maximum((m - base) * scale, _LEAST))


@triton.jit
def _add(m_L, S_L, W_L, z, scale, ENTROPY: tl.constexpr):
    """Add a tile of logits to the lanes' maxima and sums (W in base 2). A lane's NaN or +inf makes
    its S NaN."""
    higher_L = tl.maximum(m_L, tl.max(tl.max(z, 2), 0))
    base_L = _base(higher_L)
    d = (z - base_L[None, :, None]) * scale
    e = tl.exp2(d)
    shift_L = _moved(m_L, base_L, scale)
    factor_L = tl.exp2(shift_L)
    if ENTROPY:
        W_L = factor_L * (W_L + shift_L * S_L) + tl.sum(tl.sum(tl.maximum(d, _LEAST) * e, 2), 0)
    S_L = factor_L * S_L + tl.sum(tl.sum(e, 2), 0)
    return higher_L, S_L, W_L


@triton.jit
def _kept_columns(ids_ptr, count, first, BLOCK: tl.constexpr):
    # Which of the columns first .. first + BLOCK - 1 are among `count` ascending ids, at most BLOCK
    # squared of them. Two loads find the first.
    lanes = tl.arange(0, BLOCK)
    step = tl.cdiv(count, BLOCK)
    below = tl.load(ids_ptr + lanes * step, mask=lanes < tl.cdiv(count, step), other=first) < first
    start = tl.maximum(tl.sum(below.to(tl.int32), 0) - 1, 0) * step
    below = (
        tl.load(ids_ptr + start + lanes, mask=(lanes < step) & (start + lanes < count), other=first)
        < first
    )
    start += tl.sum(below.to(tl.int32), 0)
    column = tl.load(ids_ptr + start + lanes, mask=start + lanes < count, other=first - 1) - first
    inside = (column >= 0) & (column < BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    if tl.max(inside.to(tl.int32), 0) > 0:
        found = tl.histogram(column, BLOCK, mask=inside)
    return found > 0


@triton.jit
def _forward_kernel(
    logits_ptr,
    ids_ptr,
    logp_ptr,
    entropy_ptr,
    stats_ptr,
    temperatures_ptr,
    kept_ids_ptr,
    kept_offsets_ptr,
    fault_ptr,
    temperature,
    V,
    row_stride,
    ignore_index,
    ENTROPY: tl.constexpr,
    PER_ROW: tl.constexpr,
    KEPT: tl.constexpr,
    TIMES: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = TIMES * LANES * WIDTH
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(ids_ptr + n)
    row_ptr = logits_ptr + n * row_stride
    T = temperature
    if PER_ROW:
        T = tl.load(temperatures_ptr + n)
    scale = (1.0 / T) * _LOG2_E
    count = V
    if KEPT:
        begin = tl.load(kept_offsets_ptr + n)
        kept_count = (tl.load(kept_offsets_ptr + n + 1) - begin).to(tl.int32)
        count = tl.where(kept_count > 0, kept_count, V)
    count = tl.where(label == ignore_index, 0, count)
    m_L = tl.full([LANES], -float("inf"), tl.float32)
    S_L = tl.zeros([LANES], tl.float32)
    W_L = tl.zeros([LANES], tl.float32)
    # of the kept ids: 1, the label is among them; 2, one is out of range
    seen = tl.full((), 0, tl.int32)
    place = (
        tl.arange(0, TIMES)[:, None, None] * (LANES * WIDTH)
        + tl.arange(0, LANES)[None, :, None] * WIDTH
        + tl.arange(0, WIDTH)[None, None, :]
    )
    whole = count // BLOCK * BLOCK
    if KEPT:
        whole = 0
    for start in range(0, whole, BLOCK):
        z = tl.load(row_ptr + start + place).to(tl.float32)
        m_L, S_L, W_L = _add(m_L, S_L, W_L, z, scale, ENTROPY)
    for start in range(whole, count, BLOCK):  # once, or of kept ids
        v = start + place
        inside = v < count
        if KEPT:
            v = tl.load(kept_ids_ptr + begin + v, mask=v < kept_count, other=0) + tl.where(
                kept_count > 0, 0, v
            )
            found = tl.where((v < 0) | (v >= V), 2, tl.where(v == label, 1, 0))
            found = tl.where(inside, found, 0)
            seen = tl.maximum(seen, tl.max(tl.max(tl.max(found, 2), 0), 0))
            inside = inside & (v >= 0) & (v < V)
        z = tl.load(row_ptr + v, mask=inside, other=-float("inf")).to(tl.float32)
        m_L, S_L, W_L = _add(m_L, S_L, W_L, z, scale, ENTROPY)
    m = tl.max(m_L, 0)
    shift_L = _moved(m_L, _base(m), scale)
    factor_L = tl.exp2(shift_L)
    S = tl.sum(factor_L * S_L, 0)
    W = tl.sum(factor_L * (W_L + shift_L * S_L), 0) * _LN_2
    in_range = (label >= 0) & (label < V)
    readable = in_range
    fault = ~in_range
    if KEPT:
        readable = in_range & (seen == 1)
        fault = fault | (seen == 2)
        S = tl.where(seen == 2, float("nan"), S)
    z_y = tl.load(row_ptr + tl.where(readable, label, 0), mask=readable, other=-float("inf")).to(
        tl.float32
    )
    log_S = tl.log(tl.where(S == 0.0, 1.0, S))
    logp = tl.where((z_y == -float("inf")) & (S == S), -float("inf"), (z_y - m) / T - log_S)
    logp = tl.where(label == ignore_index, 0.0, tl.where(in_range, logp, float("nan")))
    mean = W / tl.where(S == 0.0, 1.0, S)
    tl.store(logp_ptr + n, logp)
    if ENTROPY:
        tl.store(entropy_ptr + n, log_S - mean)
    tl.store(stats_ptr + n * 3, m)
    tl.store(stats_ptr + n * 3 + 1, S)
    tl.store(stats_ptr + n * 3 + 2, mean)
    tl.store(fault_ptr, 1, mask=fault & (label != ignore_index))


@triton.jit
def _row_gradient(z, v, m, scale, of_S, constant, slope, g, label, ENTROPY: tl.constexpr):
    """Return p (constant - slope d) with p = 2^d of_S, plus g at the label."""
    d = (z - m) * scale
    p = tl.exp2(d) * of_S
    if ENTROPY:
        grad = p * (constant - slope * tl.maximum(d, _LEAST))
    else:
        grad = p * constant
    return tl.where(v == label, grad + g, grad)


@triton.jit
def _backward_kernel(
    logp_grad_ptr,
    entropy_grad_ptr,
    logits_ptr,
    ids_ptr,
    logp_ptr,
    stats_ptr,
    grad_ptr,
    temperatures_ptr,
    kept_ids_ptr,
    kept_offsets_ptr,
    temperature,
    V,
    row_stride,
    grad_stride,
    ignore_index,
    ENTROPY: tl.constexpr,
    PER_ROW: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    v = first + tl.arange(0, BLOCK)
    label = tl.load(ids_ptr + n)
    T = temperature
    if PER_ROW:
        T = tl.load(temperatures_ptr + n)
    m = tl.load(stats_ptr + n * 3)
    S = tl.load(stats_ptr + n * 3 + 1)
    mean = tl.load(stats_ptr + n * 3 + 2)
    in_range = (label >= 0) & (label < V)
    # A label on -inf gets nothing from g. The logit itself may be gone: another block of an
    # in-place call may have been here.
    g = tl.where(tl.load(logp_ptr + n) == -float("inf"), 0.0, tl.load(logp_grad_ptr + n))
    h = 0.0
    if ENTROPY:
        h = tl.load(entropy_grad_ptr + n)
    # A row that no gradient reaches is zero whatever it holds; it is not even read.
    live = (label != ignore_index) & ((g != 0.0) | (h != 0.0)) & (S != 0.0)
    g = tl.where(in_range, g, float("nan")) / T
    h = h / T
    of_S = 1.0 / tl.where(live, S, 1.0)
    scale = (1.0 / T) * _LOG2_E
    constant = h * mean - g
    slope = h * _LN_2
    here = tl.where((label >= first) & (label < first + BLOCK), label, -1).to(tl.int32)
    out_ptr = grad_ptr + n * grad_stride + v
    row_ptr = logits_ptr + n * row_stride + v
    whole = live & (first + BLOCK <= V)
    if KEPT:
        whole = live & False
    if whole:
        z = tl.load(row_ptr).to(tl.float32)
        grad = _row_gradient(z, v, m, scale, of_S, constant, slope, g, here, ENTROPY)
        tl.store(out_ptr, grad)
    else:
        inside = v < tl.where(live, V, 0)
        if KEPT:
            begin = tl.load(kept_offsets_ptr + n)
            kept_count = (tl.load(kept_offsets_ptr + n + 1) - begin).to(tl.int32)
            if live & (kept_count > 0):
                inside = inside & _kept_columns(kept_ids_ptr + begin, kept_count, first, BLOCK)
        z = tl.load(row_ptr, mask=inside, other=-float("inf")).to(tl.float32)
        grad = _row_gradient(z, v, m, scale, of_S, constant, slope, g, here, ENTROPY)
        tl.store(out_ptr, tl.where(inside, grad, 0.0), mask=v < V)


# ---- launchers: allocate, grid -------------------------------------------------------------------
def _tile(itemsize: int, scattered: bool | int) -> dict[str, int]:
    """Return the tile of the forward: a thread's logits in vectors of 16 bytes, or, where rows may
    start anywhere or are gathered, one at a time."""
    width = 1 if scattered else 16 // itemsize
    return {"TIMES": _BLOCK // (_LANES * width), "LANES": _LANES, "WIDTH": width}


def _forward_triton(
    logits_NV: Tensor,
    ids_N: Tensor,
    temperature: float,
    temperature_N: Tensor | None,
    entropy: bool,
    ignore_index: int,
    kept_ids_K: Tensor | None,
    kept_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (logp [N], entropy [N] or [0], stats [N, 3] = max, S, W / S)."""
    N, V = logits_NV.shape
    logp_N, stats_N3 = (
        logits_NV.new_empty(N, dtype=torch.float32),
        logits_NV.new_empty(N, 3, dtype=torch.float32),
    )
    entropy_N = torch.empty_like(logp_N) if entropy else logp_N.new_empty(0)
    if N:
        fault = faults.flag("logprob", logits_NV.device)
        _forward_kernel[(N,)](
            logits_NV,
            ids_N.contiguous(),
            logp_N,
            entropy_N if entropy else logp_N,
            stats_N3,
            logp_N if temperature_N is None else temperature_N,
            fault if kept_ids_K is None else kept_ids_K.contiguous(),
            fault if kept_offsets is None else kept_offsets.contiguous(),
            fault,
            temperature,
            V,
            logits_NV.stride(0),
            ignore_index,
            ENTROPY=entropy,
            PER_ROW=temperature_N is not None,
            KEPT=kept_ids_K is not None,
            **_tile(logits_NV.dtype.itemsize, kept_ids_K is not None or logits_NV.stride(0) % 16),
            num_warps=_WARPS,
        )
    return logp_N, entropy_N, stats_N3


def _backward_triton(
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
) -> None:
    """Write the gradient into `out_NV`, which may be the logits."""
    N, V = logits_NV.shape
    if N == 0:
        return
    g_N = torch.zeros_like(logp_N) if logp_grad_N is None else logp_grad_N.contiguous()
    h_N = g_N if entropy_grad_N is None else entropy_grad_N.contiguous()
    ids_N = ids_N.contiguous()
    block, warps = (_BLOCK, _WARPS) if kept_ids_K is None else (_KEPT_BLOCK, _KEPT_WARPS)
    _backward_kernel[(N, triton.cdiv(V, block))](
        g_N,
        h_N,
        logits_NV,
        ids_N,
        logp_N,
        stats_N3,
        out_NV,
        logp_N if temperature_N is None else temperature_N,
        ids_N if kept_ids_K is None else kept_ids_K.contiguous(),
        ids_N if kept_offsets is None else kept_offsets.contiguous(),
        temperature,
        V,
        logits_NV.stride(0),
        out_NV.stride(0),
        ignore_index,
        ENTROPY=entropy_grad_N is not None,
        PER_ROW=temperature_N is not None,
        KEPT=kept_ids_K is not None,
        BLOCK=block,
        num_warps=warps,
    )


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
@torch.library.custom_op("fusedrl::logprob_triton", mutates_args=())
def logprob_triton(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run logprob in Triton."""
    return _forward_triton(
        logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets
    )


@logprob_triton.register_fake
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
        torch.empty_like(per_row) if entropy else per_row.new_empty(0),
        per_row.new_empty(token_ids.numel(), 3),
    )


@torch.library.custom_op("fusedrl::logprob_triton_backward", mutates_args=())
def _logprob_triton_backward(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logp: Tensor,
    stats: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward_triton(
        logp_grad,
        entropy_grad,
        logits,
        token_ids,
        logp,
        stats,
        temperature,
        temperatures,
        ignore_index,
        kept_ids,
        kept_offsets,
        grad,
    )
    return grad


@_logprob_triton_backward.register_fake
def _(
    logp_grad: Tensor | None,
    entropy_grad: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logp: Tensor,
    stats: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx, inputs, output) -> None:
    logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets = (
        inputs
    )
    logp, entropies, stats = output
    ctx.save_for_backward(logits, token_ids, logp, stats, temperatures, kept_ids, kept_offsets)
    ctx.temperature, ctx.entropy, ctx.ignore_index = temperature, entropy, ignore_index
    ctx.mark_non_differentiable(*([stats] if entropy else [stats, entropies]))
    ctx.set_materialize_grads(False)


def _backward(ctx, logp_grad: Tensor | None, entropy_grad: Tensor | None, _stats_grad: None):
    logits, token_ids, logp, stats, temperatures, kept_ids, kept_offsets = ctx.saved_tensors
    grad = _logprob_triton_backward(
        logp_grad,
        entropy_grad,
        logits,
        token_ids,
        logp,
        stats,
        ctx.temperature,
        temperatures,
        ctx.ignore_index,
        kept_ids,
        kept_offsets,
    )
    return grad, *(None,) * 7


logprob_triton.register_autograd(_backward, setup_context=_setup_context)


class InPlaceTriton(torch.autograd.Function):
    """Compute the op above, but overwrite the logits with their gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        output = logprob_triton(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, logp_grad, entropy_grad, _stats_grad):
        # raises when the logits were written to since
        logits, token_ids, logp, stats, temperatures, kept_ids, kept_offsets = ctx.saved_tensors
        # shares the version counter: whoever else saved these logits is told
        grad = logits.detach()
        _backward_triton(
            logp_grad,
            entropy_grad,
            grad,
            token_ids,
            logp,
            stats,
            ctx.temperature,
            temperatures,
            ctx.ignore_index,
            kept_ids,
            kept_offsets,
            grad,
        )
        torch.autograd.graph.increment_version(grad)
        return grad, *(None,) * 7


# ---- what is compiled offline --------------------------------------------------------------------
_KEPT = {"temperatures_ptr": "*fp32", "kept_ids_ptr": "*i32", "kept_offsets_ptr": "*i64"}
_SCALARS = {"temperature": "fp32", "V": "i32", "row_stride": "i64", "ignore_index": "i32"}
_FORWARD = {
    "logits_ptr": "*logits",
    "ids_ptr": "*i64",
    "logp_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "fault_ptr": "*i32",
}
_BACKWARD = {
    "logp_grad_ptr": "*fp32",
    "entropy_grad_ptr": "*fp32",
    "logits_ptr": "*logits",
    "ids_ptr": "*i64",
    "logp_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "grad_ptr": "*logits",
    "grad_stride": "i64",
}
_ITEMS = {"fp32": 4, "bf16": 2, "fp16": 2}


def _offline(kernel, dtype: str, entropy: bool, kept: bool, aligned: bool) -> dict:
    """Return one specialisation. `aligned`: V and the strides are multiples of 16."""
    forward = kernel is _forward_kernel
    block, warps = (_KEPT_BLOCK, _KEPT_WARPS) if kept and not forward else (_BLOCK, _WARPS)
    arguments = {**(_FORWARD if forward else _BACKWARD), **_KEPT, **_SCALARS}
    tile = _tile(_ITEMS[dtype], not aligned) if forward else {"BLOCK": block}
    return {
        "kernel": kernel,
        "signature": {name: kind.replace("logits", dtype) for name, kind in arguments.items()},
        "constexprs": {"ENTROPY": entropy, "PER_ROW": entropy, "KEPT": kept, **tile},
        "num_warps": warps,
        "divisible": ("V", "row_stride", "grad_stride") if aligned else (),
    }


OFFLINE_KERNELS = {
    "_".join(
        (kernel.__name__.strip("_"), dtype, *(["entropy"] if entropy else ()))
        + (("kept",) if kept else ())
        + (("aligned",) if aligned else ())
    ): _offline(kernel, dtype, entropy, kept, aligned)
    for kernel in (_forward_kernel, _backward_kernel)
    for dtype in _ITEMS
    for entropy, kept in ((False, False), (True, False), (True, True))
    for aligned in ((False,) if kept else (False, True))
}
