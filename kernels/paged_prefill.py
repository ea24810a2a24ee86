"""paged_prefill: paged_attention of many query tokens per row, as in a prompt or in what is added
to a conversation. Tiles of queries walk over the pages together.

    o_n = the result of paged_attention for query n, whose row of the block table is rows[n]

paged_attention reads the whole context for every query. Queries that follow one another in a
sequence see nearly the same positions, so a tile of them reads these once.

Shapes    N queries, Hq query heads, Hkv key/value heads, GROUP = Hq / Hkv, D head dim, B rows of
          the table, M blocks per row, S positions per block; R rows of a tile, which are Q queries
          of the heads of one group, and C positions of a tile.
Bytes     2 Hkv D s per position that a tile sees, once per tile: 1 / Q of what paged_attention
          reads for a long prompt. q and o once. No scratch in proportion to the context.
Numerics  those of paged_attention, but a query's positions are summed in one walk, without splits.
          So the two agree up to rounding and not in every bit. The bits of a query depend only on
          its own values and context: tiles of positions begin at multiples of C, and a tile that
          a query does not see leaves its sums as they are.
Source    Kwon et al. (2023), PagedAttention; Dao (2023), FlashAttention-2, algorithm 1.

A tile belongs to one run: queries of one row at consecutive positions. Where tiles begin is
computed on the device (`prefill_tiles`), once for all layers. Programs begin with the last tiles,
which in a prompt see most. "cpp" and "torch" are paged_attention's, query by query. Tile sizes are
those that spill no register on a device (`_tile`), as the compilers report it; the Triton kernel
has not run on a GPU in this project.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.paged_attention import chosen_for, paged_attention
from fusedrl.kernels.runtime.checks import check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

if triton is not None:
    from fusedrl.kernels.paged_attention import _tanh

    _LOG2_E = tl.constexpr(1.4426950408889634)

_IMPLS = Implementations("paged_prefill", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_HEADS = 16  # most query heads of a program
_UNBOUNDED = 1 << 30  # the window that is none; sums with a position stay int32


class Tile(NamedTuple):
    """Rows and positions of a tile; warps of its program, and pipeline stages."""

    rows: int
    positions: int
    warps: int
    stages: int


# Head dim up to -> tile. Of two-byte numbers by the major version of compute capability, of older
# and unknown ones and of ROCm: the largest that spill no register. Stages are spent on the look-up
# of blocks, too: with five, two tiles of keys and values are on the way.
WGMMA = {64: Tile(128, 64, 8, 5), 128: Tile(128, 64, 8, 5), 256: Tile(64, 32, 8, 5)}
MMA = {64: Tile(128, 64, 8, 5), 128: Tile(64, 64, 8, 5), 256: Tile(32, 32, 8, 5)}
ROCM = {64: Tile(128, 16, 8, 2), 128: Tile(64, 16, 4, 2), 256: Tile(32, 16, 4, 2)}
# products of float32 do not use tensor cores
FLOAT32 = {64: Tile(32, 32, 8, 2), 128: Tile(32, 16, 4, 2), 256: Tile(16, 16, 8, 2)}

# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _walk(
        acc,
        total,
        top,
        q,
        lens,
        k_ptr,
        v_ptr,
        table_ptr,
        begin,
        end,
        low,
        high,
        kv,
        window,
        scale,
        softcap,
        ALL: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        KV_HEADS: tl.constexpr,
        D: tl.constexpr,
        S: tl.constexpr,
        BLOCK_D: tl.constexpr,
        C: tl.constexpr,
    ):
        """Continue the softmax of a tile over the positions begin to end. ALL: every query sees
        every one of them. Scores are in units of ln 2."""
        d = tl.arange(0, BLOCK_D)
        for at in range(begin, end, C):
            t = at + tl.arange(0, C)
            column = t // S
            inside = d[None, :] < D
            if not ALL:  # outside, K is read from the outer blocks and its score replaced
                column = tl.minimum(tl.maximum(column, low // S), (high - 1) // S)
                inside = inside & ((t >= low) & (t < high))[:, None]
            block = tl.load(table_ptr + column).to(tl.int64)
            base = (block * KV_HEADS + kv) * (D * S)
            k = tl.load(
                k_ptr + (base + t % S)[None, :] + d[:, None] * S, mask=(d < D)[:, None], other=0.0
            )
            v = tl.load(v_ptr + (base + t % S * D)[:, None] + d[None, :], mask=inside, other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
            scores = tl.dot(q, k, input_precision="ieee")
            if CAPPED:
                scores = _tanh(scores * (scale / softcap)) * (softcap * _LOG2_E)
            else:
                scores *= scale * _LOG2_E
            if not ALL:
                seen = (t[None, :] < lens[:, None]) & (t[None, :] >= lens[:, None] - window)
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # a tile of which a query sees nothing, before any that it sees
            base_R = higher if ALL else tl.where(higher == -float("inf"), 0.0, higher)
            shrink = tl.exp2(top - base_R)
            weights = tl.exp2(scores - base_R[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(v.dtype)
            if WIDEN:
                weights, v = weights.to(tl.float32), v.to(tl.float32)
            acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
            top = higher
        return acc, total, top

    @triton.jit(do_not_specialize=["N", "M", "window"])
    def _prefill_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        rows_ptr,
        lens_ptr,
        tiles_ptr,
        out_ptr,
        N,
        M,
        window,
        scale,
        softcap,
        WINDOWED: tl.constexpr,
        CAPPED: tl.constexpr,
        WIDEN: tl.constexpr,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        S: tl.constexpr,
        BLOCK_D: tl.constexpr,
        R: tl.constexpr,
        C: tl.constexpr,
    ):
        parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
        kv, part = tl.program_id(1) // parts, tl.program_id(1) % parts
        lane = tl.arange(0, R)
        g = part * HEADS + lane % HEADS
        d = tl.arange(0, BLOCK_D)
        programs = tl.num_programs(0)
        tile = programs - 1 - tl.program_id(0)
        start = tl.load(tiles_ptr + tile)
        while start < N:
            end = tl.load(tiles_ptr + tile + 1)
            n = start + lane // HEADS
            mine = (n < end) & (g < GROUP)
            at = (n.to(tl.int64) * KV_HEADS + kv) * GROUP + g
            places = at[:, None] * D + d[None, :]
            filled = mine[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + places, mask=filled, other=0.0)
            if WIDEN:
                q = q.to(tl.float32)
            lens = tl.load(lens_ptr + n, mask=n < end, other=0).to(tl.int32)
            shortest = tl.load(lens_ptr + start).to(tl.int32)
            high = tl.load(lens_ptr + end - 1).to(tl.int32)
            low = tl.maximum(shortest - window, 0)
            # Whole tiles: those behind where the last query begins to see, and before the first's
            # own end.
            whole = (tl.maximum(high - window, 0) + C - 1) // C * C
            whole = tl.minimum(whole, (high + C - 1) // C * C)
            last = tl.maximum(shortest // C * C, whole)
            row = tl.load(rows_ptr + start).to(tl.int64)
            pages = (q, lens, k_ptr, v_ptr, table_ptr + row * M)
            of = (low, high, kv, window, scale, softcap)
            state = (
                tl.zeros([R, BLOCK_D], tl.float32),
                tl.zeros([R], tl.float32),
                tl.full([R], -float("inf"), tl.float32),
            )
            if WINDOWED:
                first = low // C * C
                state = _walk(
                    *state,
                    *pages,
                    first,
                    whole,
                    *of,
                    False,
                    CAPPED,
                    WIDEN,
                    KV_HEADS,
                    D,
                    S,
                    BLOCK_D,
                    C,
                )
            state = _walk(
                *state, *pages, whole, last, *of, True, CAPPED, WIDEN, KV_HEADS, D, S, BLOCK_D, C
            )
            acc, total, _ = _walk(
                *state, *pages, last, high, *of, False, CAPPED, WIDEN, KV_HEADS, D, S, BLOCK_D, C
            )
            total = tl.where(total == 0.0, 1.0, total)  # of lanes without a query, or a context
            tl.store(out_ptr + places, acc / total[:, None], mask=filled)
            tile += programs
            start = tl.load(tiles_ptr + tile, mask=tile < N, other=N)


# ---- launcher, and the op that torch.compile sees ------------------------------------------------
def _tile(D: int, bytes_: int, device: torch.device) -> Tile:
    """Return the tile for head dim D and elements of so many bytes."""
    table = MMA
    if bytes_ == 4:
        table = FLOAT32
    elif device.type == "cuda" and torch.version.hip:
        table = ROCM
    elif device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        table = WGMMA
    return table[next(most for most in table if most >= D)]


def _constants(group: int, D: int, tile: Tile) -> dict[str, int]:
    """Return what is fixed at compile time for query heads per key/value head and head dim."""
    return {
        "HEADS": min(group, _HEADS),
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "R": tile.rows,
        "C": tile.positions,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def queries_of_a_tile(group: int, D: int, bytes_: int, device: torch.device) -> int:
    """Return how many queries share a tile, for query heads per key/value head, head dim and bytes
    of an element."""
    return _tile(D, bytes_, device).rows // min(group, _HEADS)


def prefill_tiles(rows_N: Tensor, context_lens_N: Tensor, queries: int) -> Tensor:
    """Return [N + 2] int32: the first query of each tile, then N. A tile has up to `queries`
    queries of one row at consecutive positions. Nothing is read back from the device."""
    N = rows_N.shape[0]
    n = torch.arange(N, dtype=torch.int32, device=rows_N.device)
    begins = torch.ones(N, dtype=torch.bool, device=rows_N.device)
    begins[1:] = rows_N[1:] != rows_N[:-1]
    begins[1:] |= context_lens_N[1:] != context_lens_N[:-1] + 1
    run = torch.where(begins, n, 0).cummax(0).values
    opens = (n - run) % queries == 0
    tiles = torch.full((N + 2,), N, dtype=torch.int32, device=rows_N.device)
    return tiles.scatter_(
        0, torch.where(opens, opens.cumsum(0) - 1, N + 1), torch.where(opens, n, N)
    )


@torch.library.custom_op("fusedrl::paged_prefill_triton", mutates_args=())
def _paged_prefill_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    (N, heads, D), (_, kv_heads, _, S), (B, M) = q.shape, k_cache.shape, block_table.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    group = heads // kv_heads
    tile = _tile(D, q.element_size(), q.device)
    # as many tiles as there are if every row has one run; programs go on to the others
    programs = min(N, triton.cdiv(N, tile.rows // min(group, _HEADS)) + B)
    _prefill_kernel[(programs, kv_heads * triton.cdiv(group, _HEADS))](
        q.contiguous(),
        k_cache,
        v_cache,
        block_table.contiguous(),
        rows.contiguous(),
        context_lens.contiguous(),
        tiles,
        out,
        *(N, M, window or _UNBOUNDED, scale, softcap or 1.0),
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        # exact; the interpreter would multiply the bits of bfloat16 as integers
        WIDEN=q.dtype == torch.bfloat16 and q.device.type == "cpu",
        KV_HEADS=kv_heads,
        GROUP=group,
        D=D,
        S=S,
        **_constants(group, D, tile),
    )
    return out


@_paged_prefill_triton.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# ---- public --------------------------------------------------------------------------------------
@torch.no_grad()
def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    *,
    tiles: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention of many tokens per row over the rows' cached positions, their own included.
    No gradient.

    Args:
        q: [N, Hq, D]; Hq a multiple of Hkv.
        k_cache, v_cache: one layer's [blocks, Hkv, D, S] and [blocks, Hkv, S, D], as for
            `paged_attention`.
        block_table: [B, M] int32.
        rows: [N] int64, the row of the table of each query. On a GPU, queries of one row share
            their reading if they follow one another with lengths that grow by one.
        context_lens: [N] int32 or int64, the number of cached positions that each query sees.
        tiles: `prefill_tiles(rows, context_lens, queries_of_a_tile(...))`, for callers that need it
            more than once; computed here by default.
        window, softcap, scale, impl: as for `paged_attention`.
    Returns:
        [N, Hq, D], in q's dtype.
    Raises:
        IndexError, ValueError, TypeError, RuntimeError: as `paged_attention`.
    """
    op = "paged_prefill"
    where = (q, k_cache, v_cache, block_table, context_lens)
    chosen = chosen_for(op, _IMPLS, *where, window, softcap, impl)
    check(op, {"q": (q, "N Hq D"), "rows": (rows, "N")})
    check_dtype(op, "rows", rows, (torch.int64,))
    if chosen != "triton":
        return paged_attention(
            q,
            k_cache,
            v_cache,
            block_table[rows],
            context_lens,
            window=window,
            softcap=softcap,
            scale=scale,
            impl=chosen,
        )
    D, group = q.shape[2], q.shape[1] // k_cache.shape[1]
    if tiles is None:
        queries = queries_of_a_tile(group, D, q.element_size(), q.device)
        tiles = prefill_tiles(rows, context_lens, queries)
    scale = D**-0.5 if scale is None else scale
    return _paged_prefill_triton(
        *(q, k_cache, v_cache, block_table, rows, context_lens, tiles),
        *(window or 0, softcap or 0.0, scale),
    )


# What tests/offline_compile.py compiles: groups, head dims and block sizes as models have them,
# with the tile of each target.
def _offline(dtype: str, group: int, D: int, S: int, tile: Tile, windowed: bool) -> dict:
    scalars = {"N": "i32", "M": "i32", "window": "i32", "scale": "fp32", "softcap": "fp32"}
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    constants = _constants(group, D, tile)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    return {
        "kernel": _prefill_kernel,
        "signature": pointers
        | {"table_ptr": "*i32", "rows_ptr": "*i64", "lens_ptr": "*i64", "tiles_ptr": "*i32"}
        | scalars,
        "constexprs": {
            "WINDOWED": windowed,
            "CAPPED": windowed,
            "WIDEN": False,
            "KV_HEADS": 2,
            "GROUP": group,
            "D": D,
            "S": S,
            **constants,
        },
        "num_warps": warps,
        "num_stages": stages,
    }


if triton is not None:
    _TABLES = {
        "mma": (MMA, ("sm_80",)),
        "wgmma": (WGMMA, ("sm_90", "sm_100")),
        "rocm": (ROCM, ("gfx942",)),
    }
    OFFLINE_KERNELS = {
        f"{dtype}_{group}x{D}_{S}{'_capped' if windowed else ''}_{name}": {
            **_offline(dtype, group, D, S, table[most], windowed),
            "targets": targets,
        }
        for dtype, group, D, S, most, windowed in (
            ("fp16", 7, 64, 16, 64, False),
            ("fp16", 1, 64, 16, 64, True),
            ("bf16", 3, 64, 16, 64, False),
            ("fp16", 8, 128, 16, 128, False),
            ("bf16", 4, 128, 16, 128, True),
            ("fp16", 5, 80, 24, 128, False),
            ("fp16", 2, 256, 16, 256, True),
        )
        for name, (table, targets) in _TABLES.items()
    } | {
        f"fp32_{group}x{D}_16{'_capped' if windowed else ''}": _offline(
            "fp32", group, D, 16, FLOAT32[D], windowed
        )
        for group, D, windowed in ((4, 64, False), (8, 128, False), (2, 256, True))
    }
