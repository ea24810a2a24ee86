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

LARGEST_HEAD = 256
_UNBOUNDED = 1 << 30  # the window that is none; sums with a position stay int32


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _rows(
        ptr, start, at, end, row, head, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr
    ):
        """Load one head of the tokens start + at, [len(at), BLOCK_D]; 0 from `end` on."""
        d = tl.arange(0, BLOCK_D)
        x = tl.load(
            ptr + (start + at).to(tl.int64)[:, None] * row + head * D + d[None, :],
            mask=(at < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
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
        first = tl.program_id(0) % tiles * R
        start = tl.load(ends_ptr + b)
        length = tl.load(ends_ptr + b + 1) - start
        if first >= length:
            return
        i = first + tl.arange(0, R)
        q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN)
        top = tl.full([R], -float("inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
        acc = tl.zeros([R, BLOCK_D], tl.float32)
        low = tl.maximum(first - window + 1, 0) // C * C
        high = tl.minimum(length, first + R if CAUSAL else first + R - 1 + window)
        for begin in range(low, high, C):
            j = begin + tl.arange(0, C)
            k = _rows(k_ptr, start, j, length, k_row, h // GROUP, D, BLOCK_D, WIDEN)
            v = _rows(v_ptr, start, j, length, v_row, h // GROUP, D, BLOCK_D, WIDEN)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                scores = _tanh(scores / softcap) * softcap
            scores = tl.where(
                _sees(i[:, None], j[None, :], length, window, CAUSAL), scores, -float("inf")
            )
            higher = tl.maximum(top, tl.max(scores, 1))
            # a tile of which a row sees nothing, before any that it sees
            base = tl.where(higher == -float("inf"), 0.0, higher)
            shrink = tl.exp(top - base)
            weights = tl.exp(scores - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        total = tl.where(total == 0.0, 1.0, total)  # of rows beyond the end, which are not stored
        _put(o_ptr, acc / total[:, None], start, i, length, HEADS * D, h, D, BLOCK_D)
        tl.store(
            lse_ptr + (start + i).to(tl.int64) * HEADS + h, top + tl.log(total), mask=i < length
        )

    @triton.jit
    def _weights(scores, lse, seen, softcap, CAPPED: tl.constexpr):
        """Return the softmax's weights and the derivative of the capped scores."""
        slope = 1.0
        if CAPPED:
            turned = _tanh(scores / softcap)
            scores, slope = turned * softcap, 1.0 - turned * turned
        return tl.where(seen, tl.exp(tl.where(seen, scores - lse, 0.0)), 0.0), slope

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
        first = tl.program_id(0) % tiles * R
        start = tl.load(ends_ptr + b)
        length = tl.load(ends_ptr + b + 1) - start
        if first >= length:
            return
        i = first + tl.arange(0, R)
        q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN)
        do = _rows(do_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN)
        o = _rows(o_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN)
        slot = (start + i).to(tl.int64) * HEADS + h
        lse = tl.load(lse_ptr + slot, mask=i < length, other=0.0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta_ptr + slot, delta, mask=i < length)
        acc = tl.zeros([R, BLOCK_D], tl.float32)
        low = tl.maximum(first - window + 1, 0) // C * C
        high = tl.minimum(length, first + R if CAUSAL else first + R - 1 + window)
        for begin in range(low, high, C):
            j = begin + tl.arange(0, C)
            k = _rows(k_ptr, start, j, length, k_row, h // GROUP, D, BLOCK_D, WIDEN)
            v = _rows(v_ptr, start, j, length, v_row, h // GROUP, D, BLOCK_D, WIDEN)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            weights, slope = _weights(
                scores,
                lse[:, None],
                _sees(i[:, None], j[None, :], length, window, CAUSAL),
                softcap,
                CAPPED,
            )
            ds = (
                weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]) * slope
            )
            acc += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        _put(dq_ptr, acc * scale, start, i, length, HEADS * D, h, D, BLOCK_D)

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
        dk = tl.zeros([C, BLOCK_D], tl.float32)
        dv = tl.zeros([C, BLOCK_D], tl.float32)
        low = (first if CAUSAL else tl.maximum(first - window + 1, 0)) // R * R
        high = tl.minimum(length, first + C - 1 + window)
        for h in range(kv * GROUP, (kv + 1) * GROUP):
            for begin in range(low, high, R):
                i = begin + tl.arange(0, R)
                q = _rows(q_ptr, start, i, length, q_row, h, D, BLOCK_D, WIDEN)
                do = _rows(do_ptr, start, i, length, HEADS * D, h, D, BLOCK_D, WIDEN)
                slot = (start + i).to(tl.int64) * HEADS + h
                lse = tl.load(lse_ptr + slot, mask=i < length, other=0.0)
                delta = tl.load(delta_ptr + slot, mask=i < length, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
                weights, slope = _weights(
                    scores,
                    lse[None, :],
                    _sees(i[None, :], j[:, None], length, window, CAUSAL),
                    softcap,
                    CAPPED,
                )
                dv += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
                ds = (
                    weights
                    * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                    * slope
                )
                dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
        _put(dk_ptr, dk * scale, start, j, length, (HEADS // GROUP) * D, kv, D, BLOCK_D)
        _put(dv_ptr, dv, start, j, length, (HEADS // GROUP) * D, kv, D, BLOCK_D)


# ---- launchers -----------------------------------------------------------------------------------
def _shape(D: int, backward: bool) -> dict[str, int]:
    """Return tile sizes that do not spill registers on any target: 64 by 64 in the forward up to
    heads of 128 (255 registers on sm_80), else 32 by 32."""
    block = max(16, triton.next_power_of_2(D))
    side = 32 if backward or block > 128 else 64
    return {"BLOCK_D": block, "R": side, "C": side}


def _warps(D: int) -> int:
    return 8 if D > 128 else 4


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    backward: bool,
) -> tuple[tuple, dict]:
    """Return the kernel arguments from the row strides on, and the compile-time constants."""
    Hq, D = q.shape[1:]
    shape = _shape(D, backward)
    # exact; the interpreter would multiply the bits of bfloat16 as integers
    widen = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    tiles = triton.cdiv(max(1, max_length), shape["R"])
    return (
        (q.stride(0), k.stride(0), v.stride(0), tiles, window or _UNBOUNDED, scale, softcap or 1.0),
        {
            "CAUSAL": causal,
            "CAPPED": softcap > 0,
            "WIDEN": widen,
            "HEADS": Hq,
            "GROUP": Hq // k.shape[1],
            "D": D,
            **shape,
            "num_warps": _warps(D),
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
        rest, constants = _common(q, k, v, max_length, causal, window, scale, softcap, False)
        _forward_kernel[((len(cu_seqlens) - 1) * rest[3], q.shape[1])](
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
        rest, constants = _common(q, k, v, max_length, causal, window, scale, softcap, True)
        programs = (len(cu_seqlens) - 1) * rest[3]
        _backward_q_kernel[(programs, q.shape[1])](
            q, k, v, ends, o, lse, do, dq, delta, *rest, **constants
        )
        _backward_kv_kernel[(programs, k.shape[1])](
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
# softcap, and heads of 80, which fill no power of two.
def _offline(dtype: str, D: int, capped: bool) -> dict[str, dict]:
    name = f"{dtype}_{D}{'_capped' if capped else ''}"
    scalars = dict.fromkeys(("q_row", "k_row", "v_row"), "i64") | {
        "tiles": "i32",
        "window": "i32",
        "scale": "fp32",
        "softcap": "fp32",
    }
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {
        "ends_ptr": "*i32",
        "lse_ptr": "*fp32",
    }
    constants = {"CAUSAL": True, "CAPPED": capped, "WIDEN": False, "HEADS": 32, "GROUP": 4, "D": D}
    more = {"num_warps": _warps(D), "num_stages": 2, "targets": ("sm_80", "sm_90", "sm_100")}
    kernels = {
        "forward": (_forward_kernel, {"o_ptr": f"*{dtype}"}),
        "backward_q": (
            _backward_q_kernel,
            dict.fromkeys(("o_ptr", "do_ptr", "dq_ptr"), f"*{dtype}") | {"delta_ptr": "*fp32"},
        ),
        "backward_kv": (
            _backward_kv_kernel,
            dict.fromkeys(("do_ptr", "dk_ptr", "dv_ptr"), f"*{dtype}") | {"delta_ptr": "*fp32"},
        ),
    }
    return {
        f"{kind}_{name}": {
            "kernel": kernel,
            "signature": pointers | own | scalars,
            "constexprs": constants | _shape(D, kind != "forward"),
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
        for name, entry in _offline(dtype, D, capped).items()
    }
