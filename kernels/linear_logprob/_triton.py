"""linear_logprob in Triton: the forward is one product whose epilogue reduces every 32 logits to
three numbers, so that no logit is ever written.

The mathematics and numerics are those of __init__.py.

Forward   a program forms BLOCK_R x BLOCK_V logits in registers (bias, softcap). For each row and
          part of 32 columns it writes the maximum m, S = sum e^d and W = sum d e^d with d = (z - m)
          / T, and the label's logit if the part contains it. A second kernel merges a row's parts
          in the order of the vocabulary. A row's arithmetic depends only on V, H and the dtype: not
          on N, the other rows, the workspace, or a later backward. Rows to skip are sorted to the
          end on the device, and programs with only such rows stop: the host reads nothing.
Backward  torch's product computes the logits of R rows and C columns again, then comes their
          gradient, then the two products of that tile. A float32 gradient overwrites the logits; in
          a narrower dtype it is a separate tensor. The float32 sums move 8 H (1 / R + 1 / C) bytes
          per logit, so tiles are square. With chunks of whole rows, weight's gradient would pass
          through memory once for every 400 rows or so of 256 MiB.
Bytes     forward N H s + V H s ceil(N / (BLOCK_R GROUP)) read and 3 N V / 4 for the parts, written
          and read; the logits would be 8 N V.
Host      the forward never waits. The backward reads once which rows a gradient reaches.
Source    __init__.py; partial results per tile as in Wijmans et al. (2024), Cut your losses in
          large-vocabulary language models.

One file: the kernels share tiles, and the layout of partial results, with their launchers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.runtime import faults

# BLOCK_R, BLOCK_V, BLOCK_H, warps, stages. The wide tile has no registers left for the addresses of
# logits to be written, and its operands do not fit the 64 KB that AMD's processors share.
_WIDE, _NARROW, _FLOAT32 = (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 16, 8, 2)
BLOCK_ROWS = 128
# columns whose partial results are kept together; one number for all tiles, so that they merge in
# one order
_PART = 32
_GROUP = 16  # row tiles that share a tile of weight while it is in L2
_COMBINE_ROWS, _COMBINE_PARTS = 16, 64
_GRADIENT_ROWS, _GRADIENT_COLUMNS, _GRADIENT_WARPS = 4, 1024, 8
# whose tl.dot takes the bits of bfloat16 for integers: operands are widened there, exactly
_INTERPRETED = triton.knobs.runtime.interpret


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _cap(z, softcap):
    # softcap tanh(z / softcap)
    e = tl.exp(-2.0 * tl.abs(z) / softcap)
    t = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(z < 0.0, -t, t)


@triton.jit
def _base(m):
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _halves(z):
    return tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _keep(
    z,
    part,
    i,
    limit,
    bias_ptr,
    ids_ptr,
    temperatures_ptr,
    logits_ptr,
    partials_ptr,
    label_ptr,
    temperature,
    softcap,
    begin,
    end,
    V,
    SOFTCAP: tl.constexpr,
):
    """Store the partial results of rows i, up to `limit`, over one part of the vocabulary."""
    WIDTH: tl.constexpr = z.shape[1]
    inside = i < limit
    v = part * WIDTH + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = _cap(z, softcap)
    local = (i - begin).to(tl.int64)
    if logits_ptr is not None:
        tl.store(
            logits_ptr + local[:, None] * V + v[None, :], z, mask=inside[:, None] & (v < V)[None, :]
        )
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    here = (label >= part * WIDTH) & (label < tl.minimum(part * WIDTH + WIDTH, V))
    tl.store(
        label_ptr + i, tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1), mask=inside & here
    )
    T = temperature
    if temperatures_ptr is not None:
        T = tl.load(temperatures_ptr + i, mask=inside, other=1.0)[:, None]
    z = tl.where((v < V)[None, :], z, -float("inf"))
    m = tl.max(z, 1)
    d = (z - _base(m)[:, None]) * (1.0 / T)
    e = tl.exp(d)
    at = partials_ptr + part.to(tl.int64) * (end - begin) + local
    plane = tl.cdiv(V, WIDTH).to(tl.int64) * (end - begin)
    kept = i < tl.where(part * WIDTH < V, limit, begin)
    tl.store(at, m, mask=kept)
    tl.store(at + plane, tl.sum(e, 1), mask=kept)
    tl.store(at + 2 * plane, tl.sum(tl.where(e > 0.0, d, 0.0) * e, 1), mask=kept)


@triton.jit
def _keep_four(
    z,
    four,
    i,
    limit,
    bias_ptr,
    ids_ptr,
    temperatures_ptr,
    logits_ptr,
    partials_ptr,
    label_ptr,
    temperature,
    softcap,
    begin,
    end,
    V,
    SOFTCAP: tl.constexpr,
):
    left, right = _halves(z)
    a, b = _halves(left)
    _keep(
        a,
        4 * four,
        i,
        limit,
        bias_ptr,
        ids_ptr,
        temperatures_ptr,
        logits_ptr,
        partials_ptr,
        label_ptr,
        temperature,
        softcap,
        begin,
        end,
        V,
        SOFTCAP,
    )
    _keep(
        b,
        4 * four + 1,
        i,
        limit,
        bias_ptr,
        ids_ptr,
        temperatures_ptr,
        logits_ptr,
        partials_ptr,
        label_ptr,
        temperature,
        softcap,
        begin,
        end,
        V,
        SOFTCAP,
    )
    c, d = _halves(right)
    _keep(
        c,
        4 * four + 2,
        i,
        limit,
        bias_ptr,
        ids_ptr,
        temperatures_ptr,
        logits_ptr,
        partials_ptr,
        label_ptr,
        temperature,
        softcap,
        begin,
        end,
        V,
        SOFTCAP,
    )
    _keep(
        d,
        4 * four + 3,
        i,
        limit,
        bias_ptr,
        ids_ptr,
        temperatures_ptr,
        logits_ptr,
        partials_ptr,
        label_ptr,
        temperature,
        softcap,
        begin,
        end,
        V,
        SOFTCAP,
    )


@triton.jit(do_not_specialize=["begin", "end", "V", "H", "hidden_stride", "weight_stride"])
def _logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    rows_ptr,
    live_ptr,
    temperatures_ptr,
    logits_ptr,
    partials_ptr,
    label_ptr,
    temperature,
    softcap,
    begin,
    end,
    V,
    H,
    hidden_stride,
    weight_stride,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    if EVEN:  # strides come in units of 16, which is how the compiler learns that rows are aligned
        hidden_stride *= 16
        weight_stride *= 16
    tiles_R, tiles_V = tl.cdiv(end - begin, BLOCK_R), tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_V) * GROUP
    height = tl.minimum(tiles_R - first, GROUP)
    tile_R = first + pid % (GROUP * tiles_V) % height
    tile_V = pid % (GROUP * tiles_V) // height
    limit = end
    if live_ptr is not None:
        limit = tl.minimum(end, tl.load(live_ptr).to(tl.int32))
    if begin + tile_R * BLOCK_R < limit:
        i = begin + tile_R * BLOCK_R + tl.arange(0, BLOCK_R)
        v = tile_V * BLOCK_V + tl.arange(0, BLOCK_V)
        k = tl.arange(0, BLOCK_H)
        inside = i < limit
        # Rows and columns past the end repeat the first row and the last column; neither is stored.
        row = tl.load(rows_ptr + tl.where(inside, i, begin)).to(tl.int64)
        hidden_at = hidden_ptr + row[:, None] * hidden_stride + k[None, :]
        weight_at = (
            weight_ptr + tl.minimum(v, V - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
        )
        z = tl.zeros([BLOCK_R, BLOCK_V], dtype=tl.float32)
        for start in range(0, H, BLOCK_H):
            if EVEN:
                x = tl.load(hidden_at)
                w = tl.load(weight_at)
            else:
                x = tl.load(hidden_at, mask=(start + k < H)[None, :], other=0.0)
                w = tl.load(weight_at, mask=(start + k < H)[:, None], other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision="ieee")
            hidden_at += BLOCK_H
            weight_at += BLOCK_H
        # In parts: registers that hold a tile's logits do not hold what becomes of all of them as
        # well.
        if BLOCK_V == 4 * PART:
            _keep_four(
                z,
                tile_V,
                i,
                limit,
                bias_ptr,
                ids_ptr,
                temperatures_ptr,
                logits_ptr,
                partials_ptr,
                label_ptr,
                temperature,
                softcap,
                begin,
                end,
                V,
                SOFTCAP,
            )
        else:
            left, right = _halves(z)
            _keep_four(
                left,
                2 * tile_V,
                i,
                limit,
                bias_ptr,
                ids_ptr,
                temperatures_ptr,
                logits_ptr,
                partials_ptr,
                label_ptr,
                temperature,
                softcap,
                begin,
                end,
                V,
                SOFTCAP,
            )
            _keep_four(
                right,
                2 * tile_V + 1,
                i,
                limit,
                bias_ptr,
                ids_ptr,
                temperatures_ptr,
                logits_ptr,
                partials_ptr,
                label_ptr,
                temperature,
                softcap,
                begin,
                end,
                V,
                SOFTCAP,
            )


@triton.jit(do_not_specialize=["begin", "end", "V", "parts"])
def _combine_kernel(
    partials_ptr,
    label_ptr,
    ids_ptr,
    live_ptr,
    temperatures_ptr,
    logp_ptr,
    entropy_ptr,
    stats_ptr,
    fault_ptr,
    temperature,
    begin,
    end,
    V,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    i = begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < end
    live = inside
    if live_ptr is not None:
        live = inside & (i < tl.load(live_ptr))
    T = temperature
    if temperatures_ptr is not None:
        T = tl.load(temperatures_ptr + i, mask=inside, other=1.0)
    inverse = 1.0 / T
    plane = parts.to(tl.int64) * (end - begin)
    at = partials_ptr + (i - begin)[None, :]
    t = tl.arange(0, PARTS)[:, None]
    m = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    for start in range(0, parts, PARTS):
        wanted = (start + t < parts) & live[None, :]
        m = tl.maximum(
            m,
            tl.max(
                tl.load(
                    at + (start + t).to(tl.int64) * (end - begin), mask=wanted, other=-float("inf")
                ),
                0,
            ),
        )
    base = _base(m)
    S = tl.zeros([ROWS], dtype=tl.float32)
    W = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, parts, PARTS):
        wanted = (start + t < parts) & live[None, :]
        part_at = at + (start + t).to(tl.int64) * (end - begin)
        m_t = tl.load(part_at, mask=wanted, other=-float("inf"))
        S_t = tl.load(part_at + plane, mask=wanted, other=0.0)
        W_t = tl.load(part_at + 2 * plane, mask=wanted, other=0.0)
        shift = tl.where(
            m_t == -float("inf"), 0.0, tl.maximum((m_t - base[None, :]) * inverse, -200.0)
        )
        factor = tl.exp(shift)
        W += tl.sum(factor * (W_t + shift * S_t), 0)
        S += tl.sum(factor * S_t, 0)
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    in_range = (label >= 0) & (label < V)
    z_y = tl.load(label_ptr + i, mask=live & in_range, other=0.0)
    some = tl.where(S == 0.0, 1.0, S)
    log_S = tl.log(some)
    mean = W / some
    logp = tl.where((z_y == -float("inf")) & (S == S), -float("inf"), (z_y - m) / T - log_S)
    logp = tl.where(live, tl.where(in_range, logp, float("nan")), 0.0)
    tl.store(fault_ptr + i * 0, 1, mask=live & ~in_range)
    tl.store(logp_ptr + i, logp, mask=inside)
    tl.store(entropy_ptr + i, tl.where(live, log_S - mean, 0.0), mask=inside)
    tl.store(stats_ptr + i * 3, m, mask=inside)
    tl.store(stats_ptr + i * 3 + 1, S, mask=inside)
    tl.store(stats_ptr + i * 3 + 2, mean, mask=inside)


@triton.jit(do_not_specialize=["A", "V", "first", "width"])
def _gradient_kernel(
    logp_grad_ptr,
    entropy_grad_ptr,
    logits_ptr,
    bias_ptr,
    ids_ptr,
    logp_ptr,
    stats_ptr,
    source_ptr,
    temperatures_ptr,
    grad_ptr,
    temperature,
    softcap,
    A,
    V,
    first,
    width,
    SOFTCAP: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute row j of the gradient from row source[j] (without a source: j) of columns [first,
    first + width) of the logits. FINISH: the logits still lack bias and softcap."""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < A
    i = j.to(tl.int64)
    if source_ptr is not None:
        i = tl.load(source_ptr + j, mask=inside, other=0).to(tl.int64)
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    T = temperature
    if temperatures_ptr is not None:
        T = tl.load(temperatures_ptr + i, mask=inside, other=1.0)[:, None]
    m = tl.load(stats_ptr + i * 3, mask=inside, other=0.0)
    S = tl.load(stats_ptr + i * 3 + 1, mask=inside, other=0.0)
    mean = tl.load(stats_ptr + i * 3 + 2, mask=inside, other=0.0)
    # A label on -inf gets nothing from g.
    g = tl.where(
        tl.load(logp_ptr + i, mask=inside, other=0.0) == -float("inf"),
        0.0,
        tl.load(logp_grad_ptr + i, mask=inside, other=0.0),
    )
    h = tl.load(entropy_grad_ptr + i, mask=inside, other=0.0)
    live = inside & ((g != 0.0) | (h != 0.0)) & (S != 0.0)
    g = tl.where((label >= 0) & (label < V), g, float("nan"))
    wanted = live[:, None] & (c < width)[None, :]
    z = tl.load(logits_ptr + i[:, None] * width + c[None, :], mask=wanted, other=0.0)
    if FINISH:
        if bias_ptr is not None:
            z += tl.load(bias_ptr + first + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z = _cap(z, softcap)
    d = (z - m[:, None]) * (1.0 / T)
    p = tl.exp(d) / tl.where(live, S, 1.0)[:, None]
    grad = tl.where((first + c)[None, :] == label[:, None], g[:, None], 0.0) - g[:, None] * p
    grad = (grad - h[:, None] * p * (tl.where(p > 0.0, d, 0.0) - mean[:, None])) / T
    if SOFTCAP:
        t = z / softcap
        grad *= 1.0 - t * t
    tl.store(
        grad_ptr + j.to(tl.int64)[:, None] * width + c[None, :],
        tl.where(live[:, None], grad, 0.0),
        mask=inside[:, None] & (c < width)[None, :],
    )


# ---- launchers: allocate, grid -------------------------------------------------------------------
class Rows(NamedTuple):
    """Rows to score and their inputs; row i is row `row[i]` of hidden. Rows from index `live` on (a
    number on the device) are skipped; if it is None, no row is."""

    row: Tensor
    ids: Tensor
    temperatures: Tensor | None
    live: Tensor | None = None


class Scores(NamedTuple):
    """Results of each row, 0 where skipped: logp, entropy, and (max z, S, W / S)."""

    logp: Tensor
    entropy: Tensor
    stats: Tensor


class HeadOf(NamedTuple):
    """Arithmetic that turns hidden states into logits."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float  # 0: none


def unscored(rows: Rows) -> Scores:
    """Allocate scores for a kernel to write."""
    logp = rows.ids.new_empty(rows.ids.shape, dtype=torch.float32)
    return Scores(logp, torch.empty_like(logp), logp.new_empty(*logp.shape, 3))


def score(
    hidden: Tensor,
    head: HeadOf,
    rows: Rows,
    scores: Scores,
    begin: int,
    end: int,
    workspace_bytes: int,
    logits: Tensor | None = None,
) -> None:
    """Write the scores of rows [begin, end). If `logits` is given, also write their logits [end -
    begin, V] into it."""
    weight, bias, temperature, softcap = head
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    (V, H), narrow = weight.shape, hidden.dtype.itemsize == 2
    block_R, block_V, block_H, warps, stages = (
        _FLOAT32 if not narrow else _NARROW if logits is not None or torch.version.hip else _WIDE
    )
    tiles, parts = triton.cdiv(V, block_V), triton.cdiv(V, _PART)
    even = H % block_H == 0 and hidden.stride(0) % 16 == 0 and weight.stride(0) % 16 == 0
    unit = 16 if even else 1
    step = (
        end - begin
        if logits is not None
        else max(1, workspace_bytes // (12 * parts * block_R)) * block_R
    )
    label_z = torch.empty_like(scores.logp)
    for first in range(begin, end, max(1, step)):
        last = min(first + step, end)
        partials = scores.logp.new_empty(3, parts, last - first)
        _logits_kernel[(tiles * triton.cdiv(last - first, block_R),)](
            *(hidden, weight, bias, rows.ids, rows.row, rows.live, rows.temperatures),
            *(logits, partials, label_z, temperature, softcap, first, last, V, H),
            hidden.stride(0) // unit,
            weight.stride(0) // unit,
            SOFTCAP=softcap > 0,
            EVEN=even,
            WIDEN=_INTERPRETED and narrow,
            BLOCK_R=block_R,
            BLOCK_V=block_V,
            BLOCK_H=block_H,
            PART=_PART,
            GROUP=_GROUP,
            num_warps=warps,
            num_stages=stages,
        )
        _combine_kernel[(triton.cdiv(last - first, _COMBINE_ROWS),)](
            partials,
            label_z,
            rows.ids,
            rows.live,
            rows.temperatures,
            *scores,
            faults.flag("linear_logprob", partials.device),
            temperature,
            first,
            last,
            V,
            parts,
            ROWS=_COMBINE_ROWS,
            PARTS=_COMBINE_PARTS,
        )


def logits_gradient(
    logp_grad: Tensor,
    entropy_grad: Tensor,
    logits: Tensor,
    head: HeadOf,
    rows: Rows,
    scores: Scores,
    source: Tensor | None,
    out: Tensor,
    first: int = 0,
    finished: bool = False,
) -> None:
    """Write the gradient of the product into `out` [A, width], which may be the logits if `source`
    is None."""
    A, width = out.shape
    if A and width:
        _gradient_kernel[(triton.cdiv(A, _GRADIENT_ROWS), triton.cdiv(width, _GRADIENT_COLUMNS))](
            logp_grad,
            entropy_grad,
            logits,
            head.bias,
            rows.ids,
            scores.logp,
            scores.stats,
            source,
            rows.temperatures,
            out,
            head.temperature,
            head.softcap,
            A,
            head.weight.shape[0],
            first,
            width,
            SOFTCAP=head.softcap > 0,
            FINISH=not finished,
            ROWS=_GRADIENT_ROWS,
            COLUMNS=_GRADIENT_COLUMNS,
            num_warps=_GRADIENT_WARPS,
        )
