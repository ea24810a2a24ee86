"""varlen_attention in Triton, forward and backward. Tiles of queries walk over the keys that they
may see, and tiles of keys walk over the queries that see them.

Shapes    N tokens of B sequences, Hq query heads, Hkv key/value heads, D head dim; R rows and C
          columns of a tile.
Bytes     forward: q, o and Hq floats per token once; k and v once per tile of queries, mostly from
          the second-level cache. Backward: two kernels. The first computes the gradient of q and
          the products o . do. The second computes the gradients of k and v for all query heads of a
          group, so that no sum crosses programs.
Numerics  scores, softmax and sums in float32; the weights are rounded to the inputs' dtype before
          their products, as every tensor-core attention does. Float32 inputs are multiplied as
          float32. Fixed order, no atomics: bitwise reproducible, and the bits of a sequence do not
          depend on the other sequences.
Source    Dao (2023), FlashAttention-2, algorithms 1 and 2.

One file: forward and both backward kernels walk the same tiles.

Serves    bfloat16 and float16 on NVIDIA GPUs. Float32 does not use tensor cores and is left to
          torch's products. On gfx942 the backward pass spills (297 registers with tiles of 64, 41
          with 32), so ROCm is left to torch, too. The interpreter runs float32 as well. These
          kernels have not run on a GPU in this project.

The lengths are on the device, so the grid covers the longest sequence. A program beyond the end of
its sequence returns after two loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.runtime.checks import refuse_double_backward
from fusedrl.kernels.runtime.triton import tl, triton

if triton is not None:
    from fusedrl.kernels.paged_attention import _tanh

    _LOG2_E = tl.constexpr(1.4426950408889634)

LARGEST_HEAD = 256
_UNBOUNDED = 1 << 30  # the window that is none; sums with a position stay int32


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _rows(
        ptr,
        start,
        at,
        end,
        row,
        head,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WIDEN: tl.constexpr,
        ALL: tl.constexpr = False,
    ):
        """Load one head of the tokens start + at, [len(at), BLOCK_D]; 0 from `end` on. ALL: no
        token lies beyond the end."""
        d = tl.arange(0, BLOCK_D)
        places = ptr + (start + at).to(tl.int64)[:, None] * row + head * D + d[None, :]
        if not ALL:
            x = tl.load(places, mask=(at < end)[:, None] & (d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            x = tl.load(places)
        else:
            x = tl.load(places, mask=(d < D)[None, :], other=0.0)
        return x.to(tl.float32) if WIDEN else x

    @triton.jit
    def _put(ptr, x, start, at, end, row, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
        d = tl.arange(0, BLOCK_D)
        tl.store(
            ptr + (start + at).to(tl.int64)[:, None] * row + head * D + d[None, :],
            x,
            mask=(at < end)[:, None] & (d < D)[None, :],
        )

    @triton.jit
    def _sees(i, j, length, window, CAUSAL: tl.constexpr):
        """Whether query i sees key j; the two broadcast."""
        near = (i < length) & (j < length) & (i - j < window) & (j - i < window)
        return near & (j <= i) if CAUSAL else near

    @triton.jit
    def _keys(first, length, window, CAUSAL: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """Return where the tiles of keys begin that queries first to first + R - 1 see, where those
        begin and end that all of these queries see whole, and the last key."""
        low = tl.maximum(first - window + 1, 0) // C * C
        high = tl.minimum(length, first + R if CAUSAL else first + R - 1 + window)
        whole = (tl.maximum(first + R - window, 0) + C - 1) // C * C
        whole = tl.minimum(whole, (high + C - 1) // C * C)
        end = (first + 1 if CAUSAL else tl.minimum(length, first + window)) // C * C
        return low, whole, tl.maximum(end, whole), high

    @triton.jit
    def _queries(first, length, window, CAUSAL: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        """Return the same of the tiles of queries that see keys first to first + C - 1."""
        low = (first if CAUSAL else tl.maximum(first - window + 1, 0)) // R * R
        high = tl.minimum(length, first + C - 1 + window)
        whole = first + C - 1 if CAUSAL else tl.maximum(first + C - window, 0)
        whole = tl.minimum((whole + R - 1) // R * R, (high + R - 1) // R * R)
        end = tl.minimum(length, first + window) // R * R
        return low, whole, tl.maximum(end, whole), high

    @triton.jit
    def _forward_tiles(
        acc,
        total,
        top,
        q,
        i,
        k_ptr,
        v_ptr,
        start,
        begin,
        end,
        length,
        k_row,
        v_row,
        kv,
        window,
        scale,
        softcap,
        ALL: tl.constexpr,
        CAUSAL: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        C: tl.constexpr,
    ):
        """Continue the softmax of the queries over the keys begin to end. ALL: every query sees
        every one of them. Scores are in units of ln 2: one multiplication turns them into those,
        and exp2 is one instruction."""
        for at in range(begin, end, C):
            j = at + tl.arange(0, C)
            k = _rows(k_ptr, start, j, length, k_row, kv, D, BLOCK_D, WIDEN, ALL)
            v = _rows(v_ptr, start, j, length, v_row, kv, D, BLOCK_D, WIDEN, ALL)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if CAPPED:
                scores = _tanh(scores * (scale / softcap)) * (softcap * _LOG2_E)
            else:
                scores *= scale * _LOG2_E
            if not ALL:
                seen = _sees(i[:, None], j[None, :], length, window, CAUSAL)
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # a tile of which a row sees nothing, before any that it sees
            base = higher if ALL else tl.where(higher == -float("inf"), 0.0, higher)
            shrink = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = higher
        return acc, total, top

    @triton.jit(do_not_specialize=["tiles", "window"])
    def _forward_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        ends_ptr,
        o_ptr,
        lse_ptr,
        q_row,
        k_row,
        v_row,
        tiles,
        window,
        scale,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
    ):
        b, h = tl.program_id(0) // tiles, tl.program_id(1)
        first = (tiles - 1 - tl.program_id(0) % tiles) * R  # those that see most begin first
        start = tl.load(ends_ptr + b)
        length = tl.load(ends_ptr + b + 1) - start
        if first >= length:
            return
        i = first + tl.arange(0, R)
        q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN)
        state = (
            tl.zeros([R, BLOCK_D], tl.float32),
            tl.zeros([R], tl.float32),
            tl.full([R], -float("inf"), tl.float32),
        )
        low, whole, end, high = _keys(first, length, window, CAUSAL, R, C)
        of = (k_row, v_row, h // GROUP, window, scale, softcap)
        keys = (q, i, k_ptr, v_ptr, start)
        if WINDOWED:
            state = _forward_tiles(
                *state, *keys, low, whole, length, *of, False, CAUSAL, CAPPED, WIDEN, D, BLOCK_D, C
            )
        state = _forward_tiles(
            *state, *keys, whole, end, length, *of, True, CAUSAL, CAPPED, WIDEN, D, BLOCK_D, C
        )
        acc, total, top = _forward_tiles(
            *state, *keys, end, high, length, *of, False, CAUSAL, CAPPED, WIDEN, D, BLOCK_D, C
        )
        total = tl.where(total == 0.0, 1.0, total)  # of rows beyond the end, which are not stored
        _put(o_ptr, acc / total[:, None], start, i, length, HEADS * D, h, D, BLOCK_D)
        tl.store(
            lse_ptr + (start + i).to(tl.int64) * HEADS + h,
            (top + tl.log2(total)) / _LOG2_E,
            mask=i < length,
        )

    @triton.jit
    def _weights(dot, lse, scale, softcap, CAPPED: tl.constexpr):
        """Return the softmax's weights and the derivative of the capped scores. Scores and lse are
        in units of ln 2."""
        if CAPPED:
            turned = _tanh(dot * (scale / softcap))
            scores, slope = turned * (softcap * _LOG2_E), 1.0 - turned * turned
        else:
            scores, slope = dot * (scale * _LOG2_E), 1.0
        return scores - lse, slope

    @triton.jit
    def _backward_q_tiles(
        acc,
        q,
        do,
        lse,
        delta,
        i,
        k_ptr,
        v_ptr,
        start,
        begin,
        end,
        again,
        high,
        length,
        k_row,
        v_row,
        kv,
        window,
        scale,
        softcap,
        ALL: tl.constexpr,
        CAUSAL: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        C: tl.constexpr,
    ):
        """Add to the gradient of the queries what the keys begin to end give, and those from
        `again` to `high`. ALL: every query sees the former, and there are no others."""
        count = tl.cdiv(end - begin, C)
        for n in range(0, count if ALL else count + tl.cdiv(high - again, C)):
            at = begin + n * C if ALL or n < count else again + (n - count) * C
            j = at + tl.arange(0, C)
            k = _rows(k_ptr, start, j, length, k_row, kv, D, BLOCK_D, WIDEN, ALL)
            v = _rows(v_ptr, start, j, length, v_row, kv, D, BLOCK_D, WIDEN, ALL)
            scores, slope = _weights(
                tl.dot(q, tl.trans(k), input_precision="ieee"),
                lse[:, None],
                scale,
                softcap,
                CAPPED,
            )
            if not ALL:
                seen = _sees(i[:, None], j[None, :], length, window, CAUSAL)
                scores = tl.where(seen, scores, -float("inf"))
            ds = tl.exp2(scores) * (
                tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]
            )
            acc = tl.dot((ds * slope).to(k.dtype), k, acc, input_precision="ieee")
        return acc

    @triton.jit(do_not_specialize=["tiles", "window"])
    def _backward_q_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        ends_ptr,
        o_ptr,
        lse_ptr,
        do_ptr,
        dq_ptr,
        delta_ptr,
        q_row,
        k_row,
        v_row,
        tiles,
        window,
        scale,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
    ):
        b, h = tl.program_id(0) // tiles, tl.program_id(1)
        first = (tiles - 1 - tl.program_id(0) % tiles) * R
        start = tl.load(ends_ptr + b)
        length = tl.load(ends_ptr + b + 1) - start
        if first >= length:
            return
        i = first + tl.arange(0, R)
        q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN)
        do = _rows(do_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN)
        o = _rows(o_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN)
        slot = (start + i).to(tl.int64) * HEADS + h
        lse = tl.load(lse_ptr + slot, mask=i < length, other=0.0) * _LOG2_E
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta_ptr + slot, delta, mask=i < length)
        low, whole, end, high = _keys(first, length, window, CAUSAL, R, C)
        acc = tl.zeros([R, BLOCK_D], tl.float32)
        queries, of = (q, do, lse, delta, i), (k_row, v_row, h // GROUP, window, scale, softcap)
        keys = (k_ptr, v_ptr, start)
        acc = _backward_q_tiles(
            acc,
            *queries,
            *keys,
            low if WINDOWED else whole,
            whole,
            end,
            high,
            length,
            *of,
            False,
            CAUSAL,
            CAPPED,
            WIDEN,
            D,
            BLOCK_D,
            C,
        )
        acc = _backward_q_tiles(
            acc,
            *queries,
            *keys,
            whole,
            end,
            end,
            end,
            length,
            *of,
            True,
            CAUSAL,
            CAPPED,
            WIDEN,
            D,
            BLOCK_D,
            C,
        )
        _put(dq_ptr, acc * scale, start, i, length, HEADS * D, h, D, BLOCK_D)

    @triton.jit
    def _backward_kv_tiles(
        dk,
        dv,
        k,
        v,
        j,
        q_ptr,
        do_ptr,
        lse_ptr,
        delta_ptr,
        start,
        begin,
        end,
        again,
        high,
        length,
        q_row,
        h,
        window,
        scale,
        softcap,
        ALL: tl.constexpr,
        CAUSAL: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        R: tl.constexpr,
    ):
        """Add to the gradients of the keys and values what the queries begin to end of one head
        give, and those from `again` to `high`. ALL: the former see every key, and there are no
        others."""
        count = tl.cdiv(end - begin, R)
        for n in range(0, count if ALL else count + tl.cdiv(high - again, R)):
            at = begin + n * R if ALL or n < count else again + (n - count) * R
            i = at + tl.arange(0, R)
            q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN, ALL)
            do = _rows(do_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN, ALL)
            slot = (start + i).to(tl.int64) * HEADS + h
            lse = tl.load(lse_ptr + slot, mask=i < length, other=0.0) * _LOG2_E
            delta = tl.load(delta_ptr + slot, mask=i < length, other=0.0)
            scores, slope = _weights(
                tl.dot(k, tl.trans(q), input_precision="ieee"),
                lse[None, :],
                scale,
                softcap,
                CAPPED,
            )
            if not ALL:
                seen = _sees(i[None, :], j[:, None], length, window, CAUSAL)
                scores = tl.where(seen, scores, -float("inf"))
            weights = tl.exp2(scores)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            ds = weights * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk = tl.dot((ds * slope).to(q.dtype), q, dk, input_precision="ieee")
        return dk, dv

    @triton.jit(do_not_specialize=["tiles", "window"])
    def _backward_kv_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        ends_ptr,
        lse_ptr,
        do_ptr,
        delta_ptr,
        dk_ptr,
        dv_ptr,
        q_row,
        k_row,
        v_row,
        tiles,
        window,
        scale,
        softcap,
        CAUSAL: tl.constexpr,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
    ):
        b, kv = tl.program_id(0) // tiles, tl.program_id(1)
        first = tl.program_id(0) % tiles * C
        start = tl.load(ends_ptr + b)
        length = tl.load(ends_ptr + b + 1) - start
        if first >= length:
            return
        j = first + tl.arange(0, C)
        k = _rows(k_ptr, start, j, length, k_row, kv, D, BLOCK_D, WIDEN)
        v = _rows(v_ptr, start, j, length, v_row, kv, D, BLOCK_D, WIDEN)
        low, whole, end, high = _queries(first, length, window, CAUSAL, R, C)
        sums = (tl.zeros([C, BLOCK_D], tl.float32), tl.zeros([C, BLOCK_D], tl.float32))
        keys, queries = (k, v, j), (q_ptr, do_ptr, lse_ptr, delta_ptr, start)
        for h in range(kv * GROUP, (kv + 1) * GROUP):
            of = (length, q_row, h, window, scale, softcap)
            # what the diagonal, the window and the end of the sequence cut, and then the rest
            sums = _backward_kv_tiles(
                *sums,
                *keys,
                *queries,
                low,
                whole,
                end,
                high,
                *of,
                False,
                CAUSAL,
                CAPPED,
                WIDEN,
                HEADS,
                D,
                BLOCK_D,
                R,
            )
            sums = _backward_kv_tiles(
                *sums,
                *keys,
                *queries,
                whole,
                end,
                end,
                end,
                *of,
                True,
                CAUSAL,
                CAPPED,
                WIDEN,
                HEADS,
                D,
                BLOCK_D,
                R,
            )
        dk, dv = sums
        _put(dk_ptr, dk * scale, start, j, length, (HEADS // GROUP) * D, kv, D, BLOCK_D)
        _put(dv_ptr, dv, start, j, length, (HEADS // GROUP) * D, kv, D, BLOCK_D)


# ---- launchers -----------------------------------------------------------------------------------
def _shape(D: int, kind: str, wgmma: bool) -> dict[str, int]:
    """Return the tile sizes and warps of a kernel ("forward", "q" or "kv", of the backward).

    With `wgmma`, on sm_90, products have 64 or 128 rows, which its tensor cores take in one
    instruction. Elsewhere such tiles would spill registers."""
    block = max(16, triton.next_power_of_2(D))
    if wgmma and block <= 128:
        rows, columns = (128, 64) if kind != "kv" else (64, 128) if block <= 64 else (32, 64)
        return {"BLOCK_D": block, "R": rows, "C": columns, "num_warps": 8}
    side = 64 if kind == "forward" and block <= 128 else 32
    # as many as leave each thread enough registers
    warps = {"forward": 8 if block > 128 else 4, "q": 4, "kv": 4 if block == 128 else 8}[kind]
    return {"BLOCK_D": block, "R": side, "C": side, "num_warps": warps}


def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    kind: str,
) -> tuple[int, tuple, dict]:
    """Return the tiles of a sequence, the kernel arguments from the row strides on, and the
    compile-time constants."""
    Hq, D = q.shape[1:]
    shape = _shape(D, kind, _has_wgmma(q.device))
    # exact; the interpreter would multiply the bits of bfloat16 as integers
    widen = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    tiles = triton.cdiv(max(1, max_length), shape["C" if kind == "kv" else "R"])
    return (
        tiles,
        (q.stride(0), k.stride(0), v.stride(0), tiles, window or _UNBOUNDED, scale, softcap or 1.0),
        {
            "CAUSAL": causal,
            "WINDOWED": window > 0,
            "CAPPED": softcap > 0,
            "WIDEN": widen,
            "HEADS": Hq,
            "GROUP": Hq // k.shape[1],
            "D": D,
            **shape,
            "num_stages": 2,
        },
    )


def _dense_heads(x: Tensor) -> Tensor:
    """Return x with contiguous heads, as in a slice of the fused projection's output; the stride of
    the tokens is free."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@torch.library.custom_op("fusedrl::varlen_attention_triton", mutates_args=())
def varlen_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Compute o [N, Hq, D] and the log-sum-exp of the scores, [N, Hq] float32."""
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if o.numel():
        tiles, rest, constants = _common(
            q, k, v, max_length, causal, window, scale, softcap, "forward"
        )
        _forward_kernel[((len(cu_seqlens) - 1) * tiles, q.shape[1])](
            q, k, v, cu_seqlens.contiguous(), o, lse, *rest, **constants
        )
    return o, lse


@torch.library.custom_op("fusedrl::varlen_attention_triton_backward", mutates_args=())
def _varlen_triton_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v, do, ends, delta = (
        _dense_heads(q),
        _dense_heads(k),
        _dense_heads(v),
        do.contiguous(),
        cu_seqlens.contiguous(),
        torch.empty_like(lse),
    )
    if dq.numel():
        how = (max_length, causal, window, scale, softcap)
        tiles, rest, constants = _common(q, k, v, *how, "q")
        _backward_q_kernel[((len(cu_seqlens) - 1) * tiles, q.shape[1])](
            q, k, v, ends, o, lse, do, dq, delta, *rest, **constants
        )
        tiles, rest, constants = _common(q, k, v, *how, "kv")
        _backward_kv_kernel[((len(cu_seqlens) - 1) * tiles, k.shape[1])](
            q, k, v, ends, lse, do, delta, dk, dv, *rest, **constants
        )
    return dq, dk, dv


@varlen_triton.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_varlen_triton_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ---- autograd ------------------------------------------------------------------------------------
def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("varlen_attention")
    return (*_varlen_triton_backward(do, *ctx.saved_tensors, *ctx.rest), *(None,) * 6)


varlen_triton.register_autograd(_backward, setup_context=_setup_context)


# What tests/offline_compile.py compiles: a Llama's heads of 64 and 128, Gemma's of 256 with a
# softcap and a window, and heads of 80, which fill no power of two.
def _offline(dtype: str, D: int, capped: bool, wgmma: bool) -> dict[str, dict]:
    name = f"{dtype}_{D}{'_capped' if capped else ''}{'_wgmma' if wgmma else ''}"
    rows = ("q_row", "k_row", "v_row")
    scalars = dict.fromkeys(rows, "i64") | {
        "tiles": "i32",
        "window": "i32",
        "scale": "fp32",
        "softcap": "fp32",
    }
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {
        "ends_ptr": "*i32",
        "lse_ptr": "*fp32",
    }
    constants = {
        "CAUSAL": True,
        "WINDOWED": capped,
        "CAPPED": capped,
        "WIDEN": False,
        "HEADS": 32,
        "GROUP": 4,
        "D": D,
    }
    more = {
        "num_stages": 2,
        "divisible": rows if wgmma else (),
        "targets": ("sm_90",) if wgmma else ("sm_80", "sm_100"),
    }
    kernels = {
        "forward": (_forward_kernel, {"o_ptr": f"*{dtype}"}),
        "q": (
            _backward_q_kernel,
            dict.fromkeys(("o_ptr", "do_ptr", "dq_ptr"), f"*{dtype}") | {"delta_ptr": "*fp32"},
        ),
        "kv": (
            _backward_kv_kernel,
            dict.fromkeys(("do_ptr", "dk_ptr", "dv_ptr"), f"*{dtype}") | {"delta_ptr": "*fp32"},
        ),
    }
    shapes = {kind: _shape(D, kind, wgmma) for kind in kernels}
    warps = {kind: shape.pop("num_warps") for kind, shape in shapes.items()}
    return {
        f"{kind if kind == 'forward' else f'backward_{kind}'}_{name}": {
            "kernel": kernel,
            "signature": pointers | own | scalars,
            "constexprs": constants | shapes[kind],
            "num_warps": warps[kind],
            **more,
        }
        for kind, (kernel, own) in kernels.items()
    }


if triton is not None:
    OFFLINE_KERNELS = {
        name: entry
        for dtype, D, capped in (
            ("bf16", 64, False),
            ("bf16", 128, False),
            ("bf16", 80, False),
            ("bf16", 256, True),
            ("fp16", 128, False),
        )
        for wgmma in (False, True)
        for name, entry in _offline(dtype, D, capped, wgmma).items()
    }
