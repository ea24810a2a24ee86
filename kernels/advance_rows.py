"""advance_rows_: record the tokens of a decoding step and move its rows on, in place and in one
launch.

    ring[cursor] = (token, logp), and the value of the state before the token, where one is given
    cursor += 1
    finished |= position >= last_position, or token in stops
    token_id, positions = token, positions + 1      of rows that are not finished; finished rows
                                                    stay as they are

Shapes    R rows, W stop ids each, laid out [W, R]; a ring of K steps. positions [2, R] are those of
          the token to draw and of the newest token; both advance together.
Bytes     a few integers per row: the gain is one launch in place of a dozen. On a GPU a single
          program does all rows, since the cursor has to move last.
Numerics  integers; logp and values copied.
Source    the per-sequence state of continuous batching: Yu et al. (2022), Orca.

On a GPU, a row whose logits hold NaN draws token -1 (sampling/_triton.py). If -1 is among its stop
ids, the row then ends, and token -1 is never looked up in an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import tl, triton

_IMPLS = Implementations("advance_rows_", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_BLOCK = 256  # rows at a time
_DTYPES = dict.fromkeys(("logp", "ring_logp", "values", "ring_values"), torch.float32) | {
    "finished": torch.bool
}  # all others are int64


# ---- reference -----------------------------------------------------------------------------------
def advance_rows_reference(
    drawn_R: Tensor,
    logp_R: Tensor,
    stops_WR: Tensor,
    last_positions_R: Tensor,
    token_ids_R: Tensor,
    positions_2R: Tensor,
    finished_R: Tensor,
    ring_tokens_KR: Tensor,
    ring_logp_KR: Tensor,
    cursor: Tensor,
    values_R: Tensor | None = None,
    ring_values_KR: Tensor | None = None,
) -> None:
    """Compute the step by its definition, on any device."""
    ring_tokens_KR.index_copy_(0, cursor, drawn_R[None])
    ring_logp_KR.index_copy_(0, cursor, logp_R[None])
    if values_R is not None and ring_values_KR is not None:
        ring_values_KR.index_copy_(0, cursor, values_R[None])
    cursor += 1
    finished_R |= (positions_2R[1] >= last_positions_R) | (drawn_R == stops_WR).any(0)
    torch.where(finished_R, token_ids_R, drawn_R, out=token_ids_R)
    positions_2R += ~finished_R


# ---- Triton --------------------------------------------------------------------------------------
if triton is not None:

    @triton.jit(do_not_specialize=["R", "W", "K"])
    def _advance_rows_kernel(
        drawn_ptr,
        logp_ptr,
        stops_ptr,
        last_ptr,
        token_ids_ptr,
        positions_ptr,
        finished_ptr,
        ring_tokens_ptr,
        ring_logp_ptr,
        cursor_ptr,
        values_ptr,
        ring_values_ptr,
        R,
        W,
        K,
        BLOCK: tl.constexpr,
    ):
        step = tl.load(cursor_ptr)
        for start in range(0, R, BLOCK):
            r = start + tl.arange(0, BLOCK)
            inside = r < R
            token = tl.load(drawn_ptr + r, mask=inside, other=0)
            if (step >= 0) & (step < K):
                tl.store(ring_tokens_ptr + step * R + r, token, mask=inside)
                tl.store(
                    ring_logp_ptr + step * R + r,
                    tl.load(logp_ptr + r, mask=inside, other=0.0),
                    mask=inside,
                )
                if values_ptr is not None:
                    tl.store(
                        ring_values_ptr + step * R + r,
                        tl.load(values_ptr + r, mask=inside, other=0.0),
                        mask=inside,
                    )
            key_at = tl.load(positions_ptr + r, mask=inside, other=0)
            at = tl.load(positions_ptr + R + r, mask=inside, other=0)
            ended = tl.load(finished_ptr + r, mask=inside, other=0).to(tl.int32)
            ended = tl.where(at >= tl.load(last_ptr + r, mask=inside, other=0), 1, ended)
            for w in range(0, W):
                ended = tl.where(
                    token == tl.load(stops_ptr + w * R + r, mask=inside, other=0), 1, ended
                )
            moves = inside & (ended == 0)
            tl.store(finished_ptr + r, ended != 0, mask=inside)
            tl.store(token_ids_ptr + r, token, mask=moves)
            tl.store(positions_ptr + r, key_at + 1, mask=moves)
            tl.store(positions_ptr + R + r, at + 1, mask=moves)
        tl.debug_barrier()  # every warp has read the cursor
        tl.store(cursor_ptr, step + 1)


# ---- launcher, and the op that torch.compile sees ------------------------------------------------
@torch.library.custom_op(
    "fusedrl::advance_rows_triton_",
    mutates_args=(
        "token_ids",
        "positions",
        "finished",
        "ring_tokens",
        "ring_logp",
        "cursor",
        "ring_values",
    ),
)
def _advance_rows_triton(
    drawn: Tensor,
    logp: Tensor,
    stops: Tensor,
    last_positions: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    finished: Tensor,
    ring_tokens: Tensor,
    ring_logp: Tensor,
    cursor: Tensor,
    values: Tensor | None = None,
    ring_values: Tensor | None = None,
) -> None:
    _advance_rows_kernel[(1,)](
        drawn,
        logp,
        stops,
        last_positions,
        token_ids,
        positions,
        finished,
        ring_tokens,
        ring_logp,
        cursor,
        values,
        ring_values,
        drawn.shape[0],
        stops.shape[0],
        ring_tokens.shape[0],
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _fake(
    drawn: Tensor,
    logp: Tensor,
    stops: Tensor,
    last_positions: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    finished: Tensor,
    ring_tokens: Tensor,
    ring_logp: Tensor,
    cursor: Tensor,
    values: Tensor | None = None,
    ring_values: Tensor | None = None,
) -> None:
    return None


_advance_rows_triton.register_fake(_fake)
if native.capability:
    torch.library.register_fake("fusedrl::advance_rows_", _fake)


# ---- public --------------------------------------------------------------------------------------
@torch.no_grad()
def advance_rows_(
    drawn: Tensor,
    logp: Tensor,
    stops: Tensor,
    last_positions: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    finished: Tensor,
    ring_tokens: Tensor,
    ring_logp: Tensor,
    cursor: Tensor,
    values: Tensor | None = None,
    ring_values: Tensor | None = None,
    *,
    impl: str | None = None,
) -> None:
    """Record the tokens that R rows drew, mark the rows that end, and move the others to their next
    position. All tensors must be contiguous. No gradient.

    Args:
        drawn: [R] int64, the drawn tokens.
        logp: [R] float32, their log-probabilities.
        stops: [W, R] int64, the tokens that end a row.
        last_positions: [R] int64. A row ends when it draws a token at this position or a later one.
        token_ids: [R] int64, the newest token of each row. Written in place.
        positions: [2, R] int64, those of the token to draw and of the newest token. Written in
            place.
        finished: [R] bool, True for rows that have ended. Written in place.
        ring_tokens, ring_logp: [K, R] int64 and float32; row `cursor` of each is written.
        cursor: [1] int64 in [0, K); increased by one, in place.
        values: [R] float32 values of the states before the tokens, written into ring_values [K, R].
            Give both or neither.
        impl: "cpp" (CPU), "triton" or "torch"; by default the best one for the device.
    Raises:
        ValueError: sizes, strides or devices do not agree.
        TypeError: a dtype is not supported.
        IndexError: the cursor is outside [0, K). A GPU does not check this; Triton then does not
            record the step.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "advance_rows_"
    arguments = (
        *(drawn, logp, stops, last_positions, token_ids, positions, finished),
        *(ring_tokens, ring_logp, cursor, values, ring_values),
    )
    chosen = _IMPLS.choose(drawn.device, impl)
    # the cpp op checks its arguments itself: a check of a dozen tensors in Python takes too long
    if chosen == "cpp":
        torch.ops.fusedrl.advance_rows_(*arguments)
        return
    names = {
        "drawn": "R",
        "logp": "R",
        "stops": "W R",
        "last_positions": "R",
        "token_ids": "R",
        "positions": "2 R",
        "finished": "R",
        "ring_tokens": "K R",
        "ring_logp": "K R",
        "cursor": "1",
        "values": "R",
        "ring_values": "K R",
    }
    if (values is None) != (ring_values is None):
        raise ValueError(
            f"{op}: expected values and ring_values together, got only "
            f"{'ring_values' if values is None else 'values'}"
        )
    check(
        op,
        {
            name: (tensor, pattern)
            for (name, pattern), tensor in zip(names.items(), arguments, strict=True)
        },
    )
    for name, tensor in zip(names, arguments, strict=True):
        check_dtype(op, name, tensor, (_DTYPES.get(name, torch.int64),))
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: expected {name} contiguous, got strides {tensor.stride()}")
    if (
        drawn.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not 0 <= int(cursor) < ring_tokens.shape[0]
    ):
        raise IndexError(
            f"{op}: expected the cursor in [0, {ring_tokens.shape[0]}), the steps of the ring, got "
            f"{int(cursor)}"
        )
    (advance_rows_reference if chosen == "torch" else _advance_rows_triton)(*arguments)


# What tests/offline_compile.py compiles.
if triton is not None:
    OFFLINE_KERNELS = {
        name: {
            "kernel": _advance_rows_kernel,
            "signature": dict.fromkeys(
                (
                    "drawn_ptr",
                    "stops_ptr",
                    "last_ptr",
                    "token_ids_ptr",
                    "positions_ptr",
                    "ring_tokens_ptr",
                    "cursor_ptr",
                ),
                "*i64",
            )
            | {
                "logp_ptr": "*fp32",
                "ring_logp_ptr": "*fp32",
                "finished_ptr": "*i1",
                "R": "i32",
                "W": "i32",
                "K": "i32",
            }
            | kinds,
            "constexprs": {"BLOCK": _BLOCK} | absent,
        }
        for name, kinds, absent in (
            ("advance_rows", {}, dict.fromkeys(("values_ptr", "ring_values_ptr"))),
            ("advance_rows_values", dict.fromkeys(("values_ptr", "ring_values_ptr"), "*fp32"), {}),
        )
    }
