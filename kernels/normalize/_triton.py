"""masked_whiten and group_normalize in Triton. masked_whiten is two launches: the first computes
the moments of each program's blocks; in the second every program merges them and whitens its share.
group_normalize is one launch.

The mathematics and shapes are those of __init__.py. Group ids are in any order, so a program
compares the ids of its rows with all ids, tile by tile. It does so twice: for the sum and the
count, then for the squared deviations.

Bytes     masked_whiten 8 read and 4 written per element, and the mask twice. group_normalize moves
          next to no bytes; its cost is 2 B^2 comparisons (2 B G with group_size, unless the method
          is batch). This is negligible below 10^4 scores, and some milliseconds at 10^5, where a
          sort would be faster.
Numerics  whitening: float32 deviations from a pivot near the mean of their block, the rest float64.
          Groups are computed in float64. Fixed order of summation, no atomics; a group's members
          add up in the order of their tiles and every other score adds an exact 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _MERGED = 1024, 256  # whitening: elements, and moments, at a time
# of either launch, at most: each of the second reads the moments of all of the first
_PROGRAMS = 512
_ROWS, _COLUMNS = 32, 32  # groups: scores of a program, and scores they are compared with at a time
# the order of GROUP_METHODS in __init__.py
_GRPO, _DR_GRPO, _RLOO, _OF_BATCH, _NONE = (tl.constexpr(i) for i in range(5))


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    # Chan's merge in float64; an empty side changes nothing.
    total = count + other_count
    share = other_count / tl.where(total > 0.0, total, 1.0)
    shift = other_mean - mean
    return total, mean + shift * share, m2 + other_m2 + shift * shift * count * share


@triton.jit
def moments(x, live):
    """Return count, mean and sum of squared deviations of a block, in float64 from float32
    elements."""
    n = tl.sum(live.to(tl.int32)).to(tl.float32)
    some = tl.where(n > 0.0, n, 1.0)
    pivot = tl.sum(tl.where(live, x, 0.0)) / some
    deviation = tl.where(live, x - pivot, 0.0)
    residual = tl.sum(deviation).to(tl.float64) / some
    m2 = tl.sum(deviation * deviation).to(tl.float64) - residual * residual * n
    return n.to(tl.float64), pivot.to(tl.float64) + residual, m2


@triton.jit
def store_moments(moments_ptr, row, count, mean, m2):
    tl.store(moments_ptr + 3 * row, count)
    tl.store(moments_ptr + 3 * row + 1, mean)
    tl.store(moments_ptr + 3 * row + 2, m2)


@triton.jit(do_not_specialize=["N"])
def _moments_kernel(x_ptr, mask_ptr, moments_ptr, N, BLOCK: tl.constexpr):
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        n = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK
        live = n < N
        x = tl.load(x_ptr + n, mask=live, other=0.0)
        if mask_ptr is not None:
            live = tl.load(mask_ptr + n, mask=live, other=0) != 0
        n_b, mean_b, m2_b = moments(x, live)
        count, mean, m2 = merge(count, mean, m2, n_b, mean_b, m2_b)
    store_moments(moments_ptr, tl.program_id(0), count, mean, m2)


@triton.jit(do_not_specialize=["N", "parts", "unbiased", "keep_mean"])
def whiten_kernel(
    x_ptr,
    mask_ptr,
    moments_ptr,
    out_ptr,
    N,
    parts,
    unbiased,
    eps,
    keep_mean,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
):
    # Every program sums up all the moments in the same order, then whitens its share. out_ptr may
    # be x_ptr.
    row = tl.arange(0, MERGED)
    count = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for at in range(0, parts, MERGED):
        n = tl.load(moments_ptr + 3 * (at + row), mask=at + row < parts, other=0.0)
        total += tl.sum(
            n * tl.load(moments_ptr + 3 * (at + row) + 1, mask=at + row < parts, other=0.0)
        )
        count += tl.sum(n)
    mean = total / tl.where(count > 0.0, count, 1.0)
    for at in range(0, parts, MERGED):
        n = tl.load(moments_ptr + 3 * (at + row), mask=at + row < parts, other=0.0)
        shift = tl.load(moments_ptr + 3 * (at + row) + 1, mask=at + row < parts, other=0.0) - mean
        m2 += tl.sum(
            tl.load(moments_ptr + 3 * (at + row) + 2, mask=at + row < parts, other=0.0)
            + n * shift * shift
        )
    divisor = count - unbiased
    rstd = (1.0 / tl.sqrt(m2 / tl.where(divisor > 1.0, divisor, 1.0) + eps)).to(tl.float32)
    high = mean.to(tl.float32)  # mean = high + low: the difference to a large mean stays exact
    low = (mean - high.to(tl.float64)).to(tl.float32)
    add = tl.where(keep_mean != 0, high, 0.0)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        n = tl.arange(0, BLOCK).to(tl.int64) + block * BLOCK
        inside = n < N
        whitened = ((tl.load(x_ptr + n, mask=inside, other=0.0) - high) - low) * rstd + add
        if mask_ptr is not None:
            whitened = tl.where(tl.load(mask_ptr + n, mask=inside, other=0) != 0, whitened, 0.0)
        tl.store(out_ptr + n, whitened, mask=inside)


@triton.jit
def _ids(ids_ptr, i, B, group_size):
    if ids_ptr is None:
        ids = i // group_size
    else:
        ids = tl.load(ids_ptr + i, mask=i < B, other=0)
    return ids


@triton.jit(do_not_specialize=["B", "group_size", "unbiased"])
def _group_kernel(
    scores_ptr,
    ids_ptr,
    out_ptr,
    equal_ptr,
    B,
    group_size,
    eps,
    unbiased,
    METHOD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(scores_ptr + i, mask=i < B, other=0.0)
    group = _ids(ids_ptr, i, B, group_size)
    first, end = 0, B
    # only where the rows' groups lie, in the same tiles as with ids: the sums have the same bits
    if ids_ptr is None and METHOD != _OF_BATCH:
        first = tl.program_id(0) * ROWS // group_size * group_size // COLUMNS * COLUMNS
        end = tl.minimum(B, ((tl.program_id(0) + 1) * ROWS // group_size + 1) * group_size)
    total = tl.zeros([ROWS], tl.float64)
    count = tl.zeros([ROWS], tl.int32)
    same_score = tl.zeros([ROWS], tl.int32)
    batch_total = tl.full([], 0.0, tl.float64)
    for at in range(first, end, COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        y = tl.load(scores_ptr + j, mask=j < B, other=0.0)
        same = (_ids(ids_ptr, j, B, group_size)[None, :] == group[:, None]) & (j < B)[None, :]
        count += tl.sum(same.to(tl.int32), axis=1)
        same_score += tl.sum((same & (y[None, :] == x[:, None])).to(tl.int32), axis=1)
        total += tl.sum(tl.where(same, y[None, :].to(tl.float64), 0.0), axis=1)
        batch_total += tl.sum(y.to(tl.float64))
    equal = same_score == count  # NaN is not equal to itself
    mean = total / tl.where(count > 0, count, 1)
    batch_mean = batch_total / B
    squares = tl.zeros([ROWS], tl.float64)
    if METHOD == _GRPO:
        for at in range(first, end, COLUMNS):
            j = at + tl.arange(0, COLUMNS)
            y = tl.load(scores_ptr + j, mask=j < B, other=0.0)
            same = (_ids(ids_ptr, j, B, group_size)[None, :] == group[:, None]) & (j < B)[None, :]
            deviation = tl.where(same, y[None, :].to(tl.float64) - mean[:, None], 0.0)
            squares += tl.sum(deviation * deviation, axis=1)
    batch_squares = tl.full([], 0.0, tl.float64)
    if METHOD == _OF_BATCH:
        for at in range(first, end, COLUMNS):
            j = at + tl.arange(0, COLUMNS)
            deviation = tl.where(
                j < B,
                tl.load(scores_ptr + j, mask=j < B, other=0.0).to(tl.float64) - batch_mean,
                0.0,
            )
            batch_squares += tl.sum(deviation * deviation)
    centred = tl.where(equal, 0.0, x.to(tl.float64) - mean)
    others = tl.where(count > 1, count - 1, 1)
    divisor = tl.where(count - unbiased > 1, count - unbiased, 1)
    if METHOD == _GRPO:
        out = centred / tl.where(equal, 1.0, tl.sqrt(squares / divisor) + eps)
    elif METHOD == _RLOO:
        out = centred * (count / others.to(tl.float64))
    elif METHOD == _OF_BATCH:
        batch_divisor = tl.where(B - unbiased > 1, B - unbiased, 1)
        out = tl.where(
            equal, 0.0, centred / tl.where(equal, 1.0, tl.sqrt(batch_squares / batch_divisor) + eps)
        )
    elif METHOD == _DR_GRPO:
        out = centred
    else:
        out = x
    tl.store(out_ptr + i, out.to(tl.float32), mask=i < B)
    tl.store(equal_ptr + i, equal, mask=i < B)


# ---- launchers, and the ops that torch.compile sees ----------------------------------------------
@torch.library.custom_op("fusedrl::masked_whiten_triton", mutates_args=())
def _masked_whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    out, N = torch.empty_like(x), x.numel()
    programs = min(triton.cdiv(N, _BLOCK), _PROGRAMS)
    if N:
        partials = torch.empty(3 * programs, dtype=torch.float64, device=x.device)
        _moments_kernel[(programs,)](x, mask, partials, N, BLOCK=_BLOCK)
        whiten_kernel[(programs,)](
            x,
            mask,
            partials,
            out,
            N,
            programs,
            int(unbiased),
            eps,
            int(not shift_mean),
            BLOCK=_BLOCK,
            MERGED=_MERGED,
        )
    return out


@_masked_whiten.register_fake
def _(x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fusedrl::group_normalize_triton", mutates_args=())
def _group_normalize(
    scores: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    method: int,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    scores, group_ids = scores.contiguous(), None if group_ids is None else group_ids.contiguous()
    out, equal, B = (
        torch.empty_like(scores),
        torch.empty_like(scores, dtype=torch.bool),
        scores.numel(),
    )
    if B:
        _group_kernel[(triton.cdiv(B, _ROWS),)](
            scores,
            group_ids,
            out,
            equal,
            B,
            group_size,
            eps,
            int(unbiased),
            METHOD=method,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out, equal


@_group_normalize.register_fake
def _(
    scores: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    method: int,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores, memory_format=torch.contiguous_format), scores.new_empty(
        scores.shape, dtype=torch.bool
    )


# ---- what is compiled offline --------------------------------------------------------------------
_KINDS = {
    "x_ptr": "*fp32",
    "mask_ptr": "*i1",
    "moments_ptr": "*fp64",
    "out_ptr": "*fp32",
    "N": "i64",
    "parts": "i32",
    "unbiased": "i32",
    "eps": "fp32",
    "keep_mean": "i32",
    "scores_ptr": "*fp32",
    "ids_ptr": "*i64",
    "equal_ptr": "*i1",
    "B": "i32",
    "group_size": "i32",
}


def _offline(kernel, *absent: str, **constexprs: int) -> dict:
    fixed = constexprs | dict.fromkeys(absent)
    return {
        "kernel": kernel,
        "signature": {name: _KINDS[name] for name in kernel.arg_names if name not in fixed},
        "constexprs": fixed,
    }


OFFLINE_KERNELS = {
    "moments": _offline(_moments_kernel, BLOCK=_BLOCK),
    "moments_unmasked": _offline(_moments_kernel, "mask_ptr", BLOCK=_BLOCK),
    "whiten": _offline(whiten_kernel, BLOCK=_BLOCK, MERGED=_MERGED),
    "whiten_unmasked": _offline(whiten_kernel, "mask_ptr", BLOCK=_BLOCK, MERGED=_MERGED),
    **{
        f"group_{name}": _offline(_group_kernel, METHOD=i, ROWS=_ROWS, COLUMNS=_COLUMNS)
        for i, name in enumerate(("grpo", "dr_grpo", "rloo", "batch", "none"))
    },
    "group_size_grpo": _offline(_group_kernel, "ids_ptr", METHOD=0, ROWS=_ROWS, COLUMNS=_COLUMNS),
    "group_size_batch": _offline(_group_kernel, "ids_ptr", METHOD=3, ROWS=_ROWS, COLUMNS=_COLUMNS),
}
