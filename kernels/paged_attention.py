"""paged_attention: attention of one query token per row over the paged KV cache, o = sum_t
softmax_t(z) v_t.

    z_t = c tanh(scale q . k_t / c), or scale q . k_t without a softcap c
    for t from max(0, len - window) to len - 1 of the row

Shapes    B rows, Hq query heads, Hkv key/value heads (Hq / Hkv query heads share one key/value
          head), D head dim, M blocks per row of the table, S positions per block. The caches of one
          layer, as kv_cache fills them: K transposed inside a block, [blocks, Hkv, D, S].
Bytes     2 Hkv D s per cached position, once. Triton adds Hq (D + 2) floats, written and read, per
          split of 256 positions: 3% with 4 query heads per group.
Numerics  softmax and sums in float32, one rounding at the end; Triton rounds the softmax's weights
          to the dtype of V before their product, as every tensor-core attention does. The bits of a
          row's result depend only on that row: neither on the other rows nor on the table's width.
          Slots beyond a row's length, and blocks that the row does not need, never affect its
          result, even if they hold NaN.
Source    Vaswani et al. (2017), eq. 1; Kwon et al. (2023), PagedAttention; splits merged as in Dao
          et al. (2023), Flash-Decoding, but with a split every 256 positions, whatever the batch.
          If the number of splits depended on the load, the arithmetic would, too.

Scratch   the splits of up to _SCRATCH bytes at a time: a call of more rows takes several launches.

Triton runs one program per (row, key/value head, split). The lengths are on the device, so the grid
covers the table's width, and a program beyond its row's length ends after one load. The table
should therefore be no wider than the longest row needs. `tl.dot` needs 16 rows, so a group of fewer
query heads is padded. Padding costs only multiplications, and tensor cores can do ten times more of
them in the time of reading the cache (16 heads x 2 flops an element at 2.4e12 elements/s is 77
TFLOP/s). One code path serves every group size. A larger group takes several programs of 16 heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations(
    "paged_attention", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch")
)
LARGEST_HEAD = 256  # D that Triton holds in registers and shared memory
_SPLIT = 256  # positions per program; changing it changes the order of sums
_HEADS = 16  # query heads per program
_SCRATCH = 1 << 28  # bytes that the splits of the rows of one launch may take
# positions at a time (64 spill on gfx942), or 16 if so many positions of K exceed 8 KB
_TILE = 32


# ---- reference -----------------------------------------------------------------------------------
def paged_attention_reference(
    q_BHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_BM: Tensor,
    context_lens_B: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the result by its definition, on any device and in any float dtype. Tests measure the
    other implementations against its float64 result. Gathers the whole cache of every row."""
    B, heads, D = q_BHD.shape
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    blocks, kv_heads, size, M = (
        k_cache.shape[0],
        k_cache.shape[1],
        v_cache.shape[2],
        block_table_BM.shape[1],
    )
    if blocks == 0:  # nothing to gather, and no row can have a context
        return torch.zeros_like(q_BHD)
    slots = torch.arange(M * size, device=q_BHD.device)
    seen = slots < context_lens_B[:, None]
    if window is not None:
        seen &= slots >= context_lens_B[:, None] - window
    # entries that the row does not need may hold anything
    table = torch.where(seen.view(B, M, size).any(-1), block_table_BM, 0).long()
    keys = k_cache[table].permute(0, 2, 3, 1, 4).reshape(B, kv_heads, D, M * size).to(wide)
    values = v_cache[table].permute(0, 2, 1, 3, 4).reshape(B, kv_heads, M * size, D).to(wide)
    seen = seen[:, None, None]
    scores = (
        q_BHD.view(B, kv_heads, heads // kv_heads, D).to(wide)
        @ keys
        * (D**-0.5 if scale is None else scale)
    )
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    weights = torch.where(seen, weights, 0.0)  # a row with no context is zeros, not NaN
    # an unwritten slot may hold NaN, and 0 x NaN is NaN
    values = torch.where(seen.transpose(-1, -2), values, 0.0)
    return (weights @ values).reshape(B, heads, D).to(q_BHD.dtype)


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _tanh(x):
        """Compute tanh from exp; near 0, where 1 - exp(-2|x|) cancels, from the series of tanh."""
        squared = x * x
        series = x * (
            1.0
            + squared
            * (-1.0 / 3 + squared * (2.0 / 15 + squared * (-17.0 / 315 + squared * (62.0 / 2835))))
        )
        decay = tl.exp(-2.0 * tl.abs(x))
        large = (1.0 - decay) / (1.0 + decay)
        return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -large, large))

    @triton.jit
    def _span(lens_ptr, b, window, SPLIT: tl.constexpr):
        """Return (first position seen, length, first split, splits) of row b."""
        length = tl.load(lens_ptr + b).to(tl.int32)
        first = tl.maximum(length - window, 0)
        return first, length, first // SPLIT, tl.cdiv(length, SPLIT) - first // SPLIT

    @triton.jit(do_not_specialize=["M", "window", "splits"])
    def _split_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        lens_ptr,
        out_ptr,
        max_ptr,
        sum_ptr,
        acc_ptr,
        M,
        window,
        splits,
        scale,
        softcap,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        S: tl.constexpr,
        SPLIT: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
    ):
        tiles: tl.constexpr = (GROUP + HEADS - 1) // HEADS
        pair = tl.program_id(0) // tiles  # row and key/value head
        b = pair // KV_HEADS
        first, length, first_split, own = _span(lens_ptr, b, window, SPLIT)
        split = tl.program_id(1)
        if split >= tl.maximum(own, 1):
            return
        low = tl.maximum(first, (first_split + split) * SPLIT)
        high = tl.minimum(length, (first_split + split + 1) * SPLIT)
        g = tl.program_id(0) % tiles * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, BLOCK_D)
        head = pair.to(tl.int64) * GROUP + g  # of all B Hq
        mine = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=mine, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        top = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
        for start in range(low // TILE * TILE, high, TILE):
            t = start + tl.arange(0, TILE)
            # Before and behind the span K is read from the span's own outer blocks: vector loads
            # stay whole without a mask, and a score that was not to be seen is replaced. V is
            # masked by position: there 0 x NaN would reach the sum.
            column = tl.minimum(tl.maximum(t // S, first // S), (length - 1) // S)
            seen = (t >= low) & (t < high)
            block = tl.load(table_ptr + b.to(tl.int64) * M + column).to(tl.int64)
            base = (block * KV_HEADS + pair % KV_HEADS) * (D * S)
            k = tl.load(
                k_ptr + (base + t % S)[None, :] + d[:, None] * S, mask=(d < D)[:, None], other=0.0
            )
            v = tl.load(
                v_ptr + (base + t % S * D)[:, None] + d[None, :],
                mask=seen[:, None] & (d < D)[None, :],
                other=0.0,
            )
            if WIDEN:
                k = k.to(tl.float32)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if CAPPED:
                scores = _tanh(scores / softcap) * softcap
            scores = tl.where(seen[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(v.dtype)
            if WIDEN:
                weights, v = weights.to(tl.float32), v.to(tl.float32)
            acc = acc * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
            top = higher
        if own <= 1:  # nothing to merge; a row with no context has no tile, and is zeros
            tl.store(
                out_ptr + head[:, None] * D + d[None, :],
                acc / tl.where(total == 0.0, 1.0, total)[:, None],
                mask=mine,
            )
        else:
            part = head * splits + split
            tl.store(max_ptr + part, top, mask=g < GROUP)
            tl.store(sum_ptr + part, total, mask=g < GROUP)
            tl.store(acc_ptr + part[:, None] * D + d[None, :], acc, mask=mine)

    @triton.jit(do_not_specialize=["window", "splits"])
    def _merge_kernel(
        lens_ptr,
        out_ptr,
        max_ptr,
        sum_ptr,
        acc_ptr,
        window,
        splits,
        Q_HEADS: tl.constexpr,
        D: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        _first, _length, _first_split, own = _span(lens_ptr, head // Q_HEADS, window, SPLIT)
        if own <= 1:
            return
        d = tl.arange(0, BLOCK_D)
        top = -float("inf")
        total = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, own, 16):
            s = start + tl.arange(0, 16)
            part = head * splits + s
            tops = tl.load(max_ptr + part, mask=s < own, other=-float("inf"))
            sums = tl.load(sum_ptr + part, mask=s < own, other=0.0)
            accs = tl.load(
                acc_ptr + part[:, None] * D + d[None, :],
                mask=(s < own)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            higher = tl.maximum(top, tl.max(tops, 0))
            shrink = tl.exp(top - higher)
            weights = tl.exp(tops - higher)
            total = total * shrink + tl.sum(weights * sums, 0)
            acc = acc * shrink + tl.sum(weights[:, None] * accs, 0)
            top = higher
        tl.store(out_ptr + head * D + d, acc / total, mask=d < D)

    def _offline(dtype: str, group: int, D: int, S: int, capped: bool = False) -> dict[str, dict]:
        """Return the specialisations of both kernels to compile offline."""
        shape, part = (
            _shape(D, 4 if dtype == "fp32" else 2),
            dict.fromkeys(("max_ptr", "sum_ptr", "acc_ptr"), "*fp32"),
        )
        tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {
            "table_ptr": "*i32",
            "lens_ptr": "*i64",
            "out_ptr": f"*{dtype}",
        }
        return {
            f"split_{dtype}_{group}x{D}_{S}{'_capped' if capped else ''}": {
                "kernel": _split_kernel,
                "signature": {
                    **tensors,
                    **part,
                    "M": "i32",
                    "window": "i32",
                    "splits": "i32",
                    "scale": "fp32",
                    "softcap": "fp32",
                },
                "constexprs": {
                    "CAPPED": capped,
                    "WIDEN": False,
                    "KV_HEADS": 8,
                    "GROUP": group,
                    "D": D,
                    "S": S,
                    "SPLIT": _SPLIT,
                    "HEADS": _HEADS,
                    **shape,
                },
                "num_warps": 4,
                "num_stages": _stages(D, 4 if dtype == "fp32" else 2),
            },
            f"merge_{dtype}_{D}": {
                "kernel": _merge_kernel,
                "signature": {
                    "lens_ptr": "*i64",
                    "out_ptr": f"*{dtype}",
                    **part,
                    "window": "i32",
                    "splits": "i32",
                },
                "constexprs": {
                    "Q_HEADS": 8 * group,
                    "D": D,
                    "SPLIT": _SPLIT,
                    "BLOCK_D": shape["BLOCK_D"],
                },
                "num_warps": 4,
            },
        }


# ---- launchers: allocate, grid -------------------------------------------------------------------
def _shape(D: int, bytes_: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(D))
    return {"BLOCK_D": block, "TILE": _TILE if _TILE * block * bytes_ <= 8192 else 16}


def _stages(D: int, bytes_: int) -> int:
    """Return the number of pipeline stages of the loop. The pipeliner spends some stages on block
    look-ups; with five stages two tiles of K and V are in flight. With five, float32 heads of 256
    would need 97 KB."""
    return 5 if D * bytes_ <= 512 else 3


def rows_at_once(heads: int, splits: int, D: int) -> int:
    """Return how many rows share a launch: as many as keep the splits' maxima, sums and weighted
    values within _SCRATCH bytes, at least one; a multiple of 16 where it can be, so that the
    pointers of every launch are aligned."""
    if splits == 1:
        return 2**31 - 1
    rows = _SCRATCH // (4 * heads * splits * (D + 2))
    return rows // 16 * 16 if rows >= 16 else max(1, rows)


@torch.library.custom_op("fusedrl::paged_attention_triton", mutates_args=())
def _paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    (B, heads, D), (_, kv_heads, _, S), M = q.shape, k_cache.shape, block_table.shape[1]
    out, group, shape = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        heads // kv_heads,
        _shape(D, q.element_size()),
    )
    if out.numel() == 0:
        return out
    splits = triton.cdiv(M * S, _SPLIT)
    if window:  # so many positions, wherever they begin, lie in no more splits than this
        splits = min(splits, triton.cdiv(window - 1, _SPLIT) + 1)
    splits, reach = max(1, splits), window or 2**31 - 1
    most = min(B, rows_at_once(heads, splits, D))
    parts = most * heads * splits if splits > 1 else 0
    scratch = [q.new_empty(size, dtype=torch.float32) for size in (parts, parts, parts * D)]
    q, block_table, lens = (t.contiguous() for t in (q, block_table, context_lens))
    # exact; the interpreter would multiply the bits of bfloat16 as integers
    widen = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    for first in range(0, B, most):
        own = slice(first, min(first + most, B))
        rows = own.stop - first
        _split_kernel[(rows * kv_heads * triton.cdiv(group, _HEADS), splits)](
            *(q[own], k_cache, v_cache, block_table[own], lens[own], out[own], *scratch),
            *(M, reach, splits, scale, softcap or 1.0),
            CAPPED=softcap > 0,
            WIDEN=widen,
            KV_HEADS=kv_heads,
            GROUP=group,
            D=D,
            S=S,
            SPLIT=_SPLIT,
            HEADS=_HEADS,
            **shape,
            num_warps=4,
            num_stages=_stages(D, q.element_size()),
        )
        if splits > 1:
            _merge_kernel[(rows * heads,)](
                *(lens[own], out[own], *scratch, reach, splits),
                Q_HEADS=heads,
                D=D,
                SPLIT=_SPLIT,
                BLOCK_D=shape["BLOCK_D"],
                num_warps=4,
            )
    return out


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_paged_attention_triton.register_fake(_fake)
if native.capability:
    torch.library.register_fake("fusedrl::paged_attention", _fake)


# ---- public --------------------------------------------------------------------------------------
def _check_ranges(
    table_BM: Tensor, lens_B: Tensor, blocks: int, size: int, window: int | None
) -> None:
    """Check the ranges for the torch implementation; the cpp op checks them itself. torch's
    indexing would silently take a negative entry from the end."""
    M = table_BM.shape[1]
    if bool(((lens_B < 0) | (lens_B > M * size)).any()):
        raise IndexError(
            f"paged_attention: expected context_lens in [0, {M * size}], got {lens_B.min()} to "
            f"{lens_B.max()}"
        )
    column, first_B1 = (
        torch.arange(M),
        0 if window is None else (lens_B[:, None] - window).clamp(min=0),
    )
    needed = table_BM[(column * size < lens_B[:, None]) & ((column + 1) * size > first_B1)]
    if bool(((needed < 0) | (needed >= blocks)).any()):
        raise IndexError(
            f"paged_attention: expected block_table entries in [0, {blocks}) for every position "
            f"that a row needs, got {needed.min()} "
            f"to {needed.max()}"
        )


def chosen_for(
    op: str,
    implementations: Implementations,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    window: int | None,
    softcap: float | None,
    impl: str | None,
) -> str:
    """Check that sizes, dtypes and limits of a call of `op` agree, but for the number of rows of
    the table, and return its implementation."""
    check(
        op,
        {
            "q": (q, "N Hq D"),
            "k_cache": (k_cache, "blocks Hkv D S"),
            "v_cache": (v_cache, "blocks Hkv S D"),
            "block_table": (block_table, "B M"),
            "context_lens": (context_lens, "N"),
        },
    )
    (_, Hq, D), (_, Hkv, _, S) = q.shape, k_cache.shape
    refused = {}
    if q.dtype == torch.float64:
        refused = {"cpp": "it computes in float32", "triton": "it computes in float32"}
    elif D > LARGEST_HEAD:
        refused = {"triton": f"it serves head dims up to {LARGEST_HEAD}, and this one is {D}"}
    chosen = implementations.choose(q.device, impl, refused)
    check_dtype(op, "q", q, FLOATS)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(op, name, tensor, (q.dtype,))
        if chosen != "torch" and not tensor.is_contiguous():
            raise ValueError(
                f"{op}: expected a contiguous {name}, got strides {tensor.stride()}; allocate it "
                "in this shape"
            )
    check_dtype(op, "block_table", block_table, (torch.int32,))
    check_dtype(op, "context_lens", context_lens, (torch.int32, torch.int64))
    if not Hkv or Hq % Hkv or not D or not S:
        raise ValueError(
            f"{op}: expected query heads in a multiple of the key/value heads, a head dim and "
            f"slots, got Hq {Hq}, Hkv {Hkv}, D {D}, S {S}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{op}: expected window >= 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected a softcap above 0 or None, got {softcap}")
    return chosen


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention of each row's newest token over the row's cached positions, including the
    token's own. No gradient.

    Args:
        q: [B, Hq, D]; Hq a multiple of Hkv.
        k_cache, v_cache: one layer's [blocks, Hkv, D, S] and [blocks, Hkv, S, D], in q's dtype,
            contiguous ("torch" takes any strides).
        block_table: [B, M] int32. Position p of row b lies in block `block_table[b, p // S]`, slot
            p % S. Entries that no row needs may hold anything.
        context_lens: [B] int32 or int64, the number of cached positions of each row, 0 to M S. A
            row of length 0 gives zeros.
        window: a query sees only the last `window` positions. If None, all.
        softcap: replaces the scores by softcap * tanh(scores / softcap). If None, they stay
            unchanged.
        scale: factor of the scores; D ** -0.5 by default.
        impl: "cpp" (CPU; not float64), "triton" (not float64; D up to 256) or "torch"; by default
            the best one for the device.
    Returns:
        [B, Hq, D], in q's dtype.
    Raises:
        IndexError: on CPU tensors, a length or a needed block_table entry is out of range. On a GPU
            this is not checked: such a call reads unrelated memory.
        ValueError: sizes, strides, devices or limits do not agree.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    chosen = chosen_for(
        "paged_attention",
        _IMPLS,
        *(q, k_cache, v_cache, block_table, context_lens, window, softcap, impl),
    )
    check("paged_attention", {"q": (q, "B Hq D"), "block_table": (block_table, "B M")})
    D, (blocks, _, _, S) = q.shape[2], k_cache.shape
    scale = D**-0.5 if scale is None else scale
    if chosen == "cpp":
        return torch.ops.fusedrl.paged_attention(
            q, k_cache, v_cache, block_table, context_lens, window or 0, softcap or 0.0, scale
        )
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ranges(block_table, context_lens, blocks, S, window)
    if chosen == "torch":
        return paged_attention_reference(
            q, k_cache, v_cache, block_table, context_lens, window, softcap, scale
        )
    return _paged_attention_triton(
        q, k_cache, v_cache, block_table, context_lens, window or 0, softcap or 0.0, scale
    )


# What tests/offline_compile.py compiles: groups, head dims and block sizes as models have them, and
# odd ones.
if triton is not None:
    OFFLINE_KERNELS = {
        name: entry
        for case in (
            ("bf16", 4, 128, 16),
            ("bf16", 7, 128, 16, True),
            ("bf16", 4, 64, 64),
            ("bf16", 2, 32, 16),
            ("bf16", 1, 256, 32),
            ("bf16", 5, 80, 24),
            ("fp16", 8, 128, 16),
            ("fp32", 4, 128, 16),
            ("fp32", 2, 256, 16, True),
            ("fp32", 4, 64, 32),
        )
        for name, entry in _offline(*case).items()
    }
