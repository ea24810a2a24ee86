"""linear_logprob in Triton: the forward is one product whose epilogue reduces every 128 logits to
three numbers, so that no logit is ever written.

The mathematics and numerics are those of __init__.py.

Forward   as many programs as the GPU runs at once take one tile after the other. A program forms
          BLOCK_R x BLOCK_V logits in registers (bias, softcap). For each row and part of 128
          columns it writes the maximum m, S = sum 2^d and W = sum d 2^d with d = (z - m) log2(e) /
          T, and the label's logit if the tile contains it. A second kernel merges a row's parts in
          the order of the vocabulary. A row's arithmetic depends only on V, H and the dtype: not on
          N, the other rows, the workspace, or a later backward. Rows to skip are sorted to the end
          on the device, and no tile has only such rows: the host reads nothing. The tile
          is the largest that spills no register: 128 x 256 on sm_90 and sm_100, 128 x 128 on sm_80
          and gfx942, 64 x 128 in float32.
Backward  torch's product computes the logits of R rows and C columns again, then comes their
          gradient, then the two products of that tile. A float32 gradient overwrites the logits; in
          a narrower dtype it is a separate tensor. The float32 sums move 8 H (1 / R + 1 / C) bytes
          per logit, so tiles are square. With chunks of whole rows, weight's gradient would pass
          through memory once for every chunk.
Bytes     forward N H s + V H s ceil(N / (BLOCK_R GROUP)) read and 3 N V / 16 for the parts, written
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


class Tile(NamedTuple):
    """A program's rows, columns and inputs at a time; its warps and pipeline stages; whether what
    follows the product takes the columns by halves, one after the other."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    halves: bool = False


FLOAT32, NARROW = Tile(64, 128, 32, 8, 2), Tile(128, 128, 64, 8, 3)
# The largest of two-byte inputs that spill no register, by the major version of compute
# capability: of 128 x 256, what follows takes too many registers on sm_80, and the operands do not
# fit the shared memory of any other.
WIDE = {9: Tile(128, 256, 64, 8, 3), 10: Tile(128, 256, 64, 8, 3, halves=True)}
BLOCK_ROWS = 128
# columns whose partial results are kept together; one number for all tiles, so that they merge in
# one order
_PART = 128
_GROUP = 16  # row tiles that share a tile of weight while it is in L2
_COMBINE_ROWS, _COMBINE_PARTS = 16, 64
_GRADIENT_ROWS, _GRADIENT_COLUMNS, _GRADIENT_WARPS = 4, 1024, 8
_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-290.0)  # 2 to this power is 0, and not -inf times 0 of a masked logit
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
    logits_width,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
):
    """Store the partial results of rows i, up to `limit`, over one tile of the vocabulary, in parts
    of PART columns; and the logits, if they are kept."""
    BLOCK_R: tl.constexpr = z.shape[0]
    BLOCK_V: tl.constexpr = z.shape[1]
    PARTS: tl.constexpr = BLOCK_V // PART
    inside = i < limit
    first = tile_V * BLOCK_V
    v = first + tl.arange(0, BLOCK_V)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + tl.minimum(v, V - 1)).to(tl.float32)[None, :]
    if SOFTCAP:
        z = _cap(z, softcap)
    local = (i - begin).to(tl.int64)
    if logits_ptr is not None:
        tl.store(
            logits_ptr + local[:, None] * logits_width + v[None, :],
            z,
            mask=inside[:, None] & (v < logits_width)[None, :],
        )
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    here = (label >= first) & (label < tl.minimum(first + BLOCK_V, V))
    if tl.max(here.to(tl.int32), 0) > 0:  # few tiles hold a label
        picked = tl.sum(tl.where(v[None, :] == label[:, None].to(tl.int32), z, 0.0), 1)
        tl.store(label_ptr + i, picked, mask=here)
    if first + BLOCK_V > V:  # the last tile alone
        z = tl.where((v < V)[None, :], z, -float("inf"))
    scale = (1.0 / temperature) * _LOG2_E
    if temperatures_ptr is not None:
        T = tl.load(temperatures_ptr + i, mask=inside, other=1.0)
        scale = ((1.0 / T) * _LOG2_E)[:, None, None]
    z = tl.reshape(z, [BLOCK_R, PARTS, PART])
    m = tl.max(z, 2)
    d = (z - _base(m)[:, :, None]) * scale
    e = tl.exp2(d)
    part = tile_V * PARTS + tl.arange(0, PARTS)
    at = partials_ptr + part.to(tl.int64)[None, :] * (end - begin) + local[:, None]
    plane = tl.cdiv(V, PART).to(tl.int64) * (end - begin)
    kept = inside[:, None] & (part * PART < V)[None, :]
    tl.store(at, m, mask=kept)
    tl.store(at + plane, tl.sum(e, 2), mask=kept)
    tl.store(at + 2 * plane, tl.sum(tl.maximum(d, _LEAST) * e, 2), mask=kept)


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
    logits_width,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
):
    if EVEN:  # strides come in units of 16, which is how the compiler learns that rows are aligned
        hidden_stride *= 16
        weight_stride *= 16
    limit = end
    if live_ptr is not None:
        limit = tl.minimum(end, tl.load(live_ptr).to(tl.int32))
    tiles_R, tiles_V = tl.cdiv(tl.maximum(limit - begin, 0), BLOCK_R), tl.cdiv(V, BLOCK_V)
    k = tl.arange(0, BLOCK_H)
    for tile in tl.range(tl.program_id(0), tiles_R * tiles_V, tl.num_programs(0)):
        first = tile // (GROUP * tiles_V) * GROUP
        height = tl.minimum(tiles_R - first, GROUP)
        tile_R = first + tile % (GROUP * tiles_V) % height
        tile_V = tile % (GROUP * tiles_V) // height
        i = begin + tile_R * BLOCK_R + tl.arange(0, BLOCK_R)
        v = tile_V * BLOCK_V + tl.arange(0, BLOCK_V)
        # Rows and columns past the end repeat the first row and the last column; neither is stored.
        row = tl.load(rows_ptr + tl.where(i < limit, i, begin)).to(tl.int64)
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
        pointers = (bias_ptr, ids_ptr, temperatures_ptr, logits_ptr, partials_ptr, label_ptr)
        rest = (temperature, softcap, begin, end, V, logits_width)
        if HALVES:
            left, right = _halves(z)
            _keep(left, 2 * tile_V, i, limit, *pointers, *rest, SOFTCAP, PART)
            _keep(right, 2 * tile_V + 1, i, limit, *pointers, *rest, SOFTCAP, PART)
        else:
            _keep(z, tile_V, i, limit, *pointers, *rest, SOFTCAP, PART)


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
    scale = (1.0 / T) * _LOG2_E
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
            m_t == -float("inf"), 0.0, tl.maximum((m_t - base[None, :]) * scale, _LEAST)
        )
        factor = tl.exp2(shift)
        W += tl.sum(factor * (W_t + shift * S_t), 0)
        S += tl.sum(factor * S_t, 0)
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    in_range = (label >= 0) & (label < V)
    z_y = tl.load(label_ptr + i, mask=live & in_range, other=0.0)
    some = tl.where(S == 0.0, 1.0, S)
    log_S = tl.log(some)
    mean = W * _LN_2 / some
    logp = tl.where((z_y == -float("inf")) & (S == S), -float("inf"), (z_y - m) / T - log_S)
    logp = tl.where(live, tl.where(in_range, logp, float("nan")), 0.0)
    tl.store(fault_ptr + i * 0, 1, mask=live & ~in_range)
    tl.store(logp_ptr + i, logp, mask=inside)
    tl.store(entropy_ptr + i, tl.where(live, log_S - mean, 0.0), mask=inside)
    tl.store(stats_ptr + i * 3, m, mask=inside)
    tl.store(stats_ptr + i * 3 + 1, S, mask=inside)
    tl.store(stats_ptr + i * 3 + 2, mean, mask=inside)


@triton.jit(do_not_specialize=["A", "V", "first"])
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
    logits_stride,
    grad_stride,
    SOFTCAP: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute row j of the gradient from row source[j] (without a source: j) of columns [first,
    first + width) of the logits. FINISH: the logits still lack bias and softcap. Where width and
    strides are multiples of 16, loads and stores are vectors."""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * COLUMNS
    c = begin + tl.arange(0, COLUMNS)
    inside = j < A
    i = j.to(tl.int64)
    if source_ptr is not None:
        i = tl.load(source_ptr + j, mask=inside, other=0).to(tl.int64)
    label = tl.load(ids_ptr + i, mask=inside, other=-1)
    T = temperature
    if temperatures_ptr is not None:
        T = tl.load(temperatures_ptr + i, mask=inside, other=1.0)
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
    g = tl.where((label >= 0) & (label < V), g, float("nan")) / T
    h = h / T
    # p (constant - slope d) with p = 2^d / S, plus g at the label
    scale = ((tl.zeros([ROWS], tl.float32) + 1.0 / T) * _LOG2_E)[:, None]
    of_S = (1.0 / tl.where(live, S, 1.0))[:, None]
    constant, slope = (h * mean - g)[:, None], (h * _LN_2)[:, None]
    wanted = live[:, None] & (c < width)[None, :]
    z = tl.load(
        logits_ptr + i[:, None] * logits_stride + c[None, :], mask=wanted, other=-float("inf")
    )
    if FINISH:
        if bias_ptr is not None:
            z += tl.load(bias_ptr + first + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z = tl.where(wanted, _cap(z, softcap), z)
    d = (z - m[:, None]) * scale
    grad = tl.exp2(d) * of_S * (constant - slope * tl.maximum(d, _LEAST))
    here = (label >= first + begin) & (label < first + begin + COLUMNS)
    if tl.max(here.to(tl.int32), 0) > 0:  # few tiles hold a label
        at_label = (label - first).to(tl.int32)[:, None] == c[None, :]
        grad = tl.where(at_label, grad + g[:, None], grad)
    if SOFTCAP:
        t = z / softcap
        grad *= 1.0 - t * t
    tl.store(
        grad_ptr + j.to(tl.int64)[:, None] * grad_stride + c[None, :],
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


def padded(V: int) -> int:
    """Return the columns of a matrix of V logits a row whose rows all start at a whole cache
    line."""
    return triton.cdiv(V, 64) * 64


def _tile(device: torch.device, narrow: bool) -> Tile:
    """Return the tile of a device; `narrow`: of two-byte inputs."""
    if not narrow:
        return FLOAT32
    if device.type != "cuda" or torch.version.hip:
        return NARROW
    return WIDE.get(torch.cuda.get_device_capability(device)[0], NARROW)


def _programs(device: torch.device, tile: Tile) -> int:
    """Return how many programs of the product a device runs at once: by their registers, two on a
    multiprocessor in float32, else one."""
    if device.type != "cuda":
        return 2
    each = 2 if tile is FLOAT32 else 1
    return each * torch.cuda.get_device_properties(device).multi_processor_count


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
    """Write the scores of rows [begin, end). If `logits` is given, also write their logits into it:
    [end - begin, `padded(V)`], whose last columns are no logits."""
    weight, bias, temperature, softcap = head
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    (V, H), narrow = weight.shape, hidden.dtype.itemsize == 2
    tile = _tile(hidden.device, narrow)
    tiles, parts = triton.cdiv(V, tile.columns), triton.cdiv(V, _PART)
    even = H % tile.inputs == 0 and hidden.stride(0) % 16 == 0 and weight.stride(0) % 16 == 0
    unit = 16 if even else 1
    step = (
        end - begin
        if logits is not None
        else max(1, workspace_bytes // (12 * parts * tile.rows)) * tile.rows
    )
    label_z = torch.empty_like(scores.logp)
    for first in range(begin, end, max(1, step)):
        last = min(first + step, end)
        partials = scores.logp.new_empty(3, parts, last - first)
        grid = min(tiles * triton.cdiv(last - first, tile.rows), _programs(hidden.device, tile))
        _logits_kernel[(grid,)](
            *(hidden, weight, bias, rows.ids, rows.row, rows.live, rows.temperatures),
            *(logits, partials, label_z, temperature, softcap, first, last, V, H),
            hidden.stride(0) // unit,
            weight.stride(0) // unit,
            padded(V),
            SOFTCAP=softcap > 0,
            EVEN=even,
            WIDEN=_INTERPRETED and narrow,
            BLOCK_R=tile.rows,
            BLOCK_V=tile.columns,
            BLOCK_H=tile.inputs,
            PART=_PART,
            GROUP=_GROUP,
            HALVES=tile.halves,
            num_warps=tile.warps,
            num_stages=tile.stages,
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
    is None. `logits` has as many columns."""
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
            logits.stride(0),
            out.stride(0),
            SOFTCAP=head.softcap > 0,
            FINISH=not finished,
            ROWS=_GRADIENT_ROWS,
            COLUMNS=_GRADIENT_COLUMNS,
            num_warps=_GRADIENT_WARPS,
        )
