"""DecodeState: the state of decoding sequences on the device. `advance` runs one step, and updates
the state there.

Shapes    R rows (sequences that draw a token), K steps until the host reads the tokens, W ids a
          row, N tokens of a step, V vocabulary.

A step runs the model, the head, the sampler, the value head if there is one, and `record`. The
drawn tokens go into a ring buffer that the host reads every K steps. Rows that end are marked, and
the rest move on. No size depends on a value, nothing waits for the host, and the state is changed
in place: so on CUDA a step can be captured (graphs.py). A row that has ended does not move: it
computes its last token again, rewrites the same bits in the cache, and its draws are ignored.

What goes to a GPU or comes back is queued behind the work that was launched before, and the host
goes on (`to_device`, `HostCopy`). So the next steps can be launched before the tokens of the last
ones are read, and a row may move from one state to another without a look of the host (`carry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.engine.generation.cache import KVCache
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.model.step import DecoderWeights, decode_step
from fusedrl.engine.model.strict import strict_logits, strict_row_logprob, strict_step
from fusedrl.kernels.advance_rows import advance_rows_
from fusedrl.kernels.fixed_linear import FIXED_LINEAR_DTYPES, fixed_linear
from fusedrl.kernels.kept import Kept
from fusedrl.kernels.kv_cache import copy_blocks
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.runtime import native
from fusedrl.kernels.sampling import Sampled, sample

ARGUMENTS = ("temperature", "top_k", "top_p", "min_p")


class Tokens(NamedTuple):
    """Tokens of one step, [N] each. `out_slots` [R]: indices of the tokens after which a token is
    drawn; None: all. `copies` [P, 2]: blocks (source, destination) to copy once the tokens are
    computed."""

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    out_slots: Tensor | None = None
    copies: Tensor | None = None


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a GPU without waiting for the work that is queued there. On a CPU, return
    the array itself as a tensor."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class HostCopy:
    """Copies of tensors in the host's memory, with the values that they have when the work queued
    so far is done. `arrays` waits for it. `lasting`: whether more is computed before they are read;
    if not, those of a CPU are the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor], lasting: bool) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._tensors = [tensor.clone() for tensor in tensors] if lasting else list(tensors)
            return
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def arrays(self) -> list[np.ndarray]:
        """Return the copies as arrays."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


class DecodeState:
    """Columns of R rows, and a ring buffer of K steps.

    Attributes:
        columns: always "token_ids", "positions" (both of the newest token), "rows" (of the block
            table), "last_positions" (largest position of the last token but one) and "keys" [R, 4],
            all int64; "stops" [W, R], tokens that end a row, always with -1, which a row with NaN
            draws; and "finished", bool. Only if some row needs them: the sampler's `ARGUMENTS` as
            float64; "suppress_ids" and "suppress_until" [R, W] (the length from which on the id may
            be drawn; repeated ids have equal lengths); "bias_ids" and "bias_values" [R, W] (a
            repeated id adds 0); and "returns_kept" [R], bool.
        numbers: those arguments of the sampler that are the same for all rows.
        slots: slot of each row, for the host.
        values: whether a step also records the value of each row's state.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        numbers: dict[str, float],
        window: int,
        device: torch.device,
        slots: np.ndarray | None = None,
        *,
        values: bool = False,
    ) -> None:
        # The positions in the keys and those of the newest tokens are adjacent in memory, so that
        # one addition advances both.
        counters_5R = to_device(
            np.ascontiguousarray(np.vstack([columns["keys"].T, columns["positions"]])), device
        )
        self._moving_2R = counters_5R[3:]
        self.columns = {
            name: to_device(column, device)
            for name, column in columns.items()
            if name not in ("keys", "positions")
        }
        self.columns |= {"keys": counters_5R[:4].T, "positions": counters_5R[4]}
        self.slots = slots
        R = len(self.columns["token_ids"])
        self.tokens = Tokens(
            self.columns["token_ids"], self.columns["positions"], self.columns["rows"]
        )
        self.arguments: dict[str, Any] = {
            name: self.columns[name] if name in columns else numbers[name] for name in ARGUMENTS
        }
        self.tokens_KR = torch.empty(window, R, dtype=torch.int64, device=device)
        self.logp_KR = torch.empty(window, R, dtype=torch.float32, device=device)
        self.values_KR = (
            torch.empty(window, R, dtype=torch.float32, device=device) if values else None
        )
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        # the tokens that each step could draw, in the host's memory: such steps are not captured
        self.kept: list[Kept] = []

    def refill(self, columns: dict[str, np.ndarray], slots: np.ndarray) -> None:
        """Replace the rows by others of the same shapes, at the same addresses."""
        for name, column in columns.items():
            own = self.columns[name]
            own.copy_(to_device(np.ascontiguousarray(column), own.device), non_blocking=True)
        self.slots = slots

    def moving(self, rows_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of everything that a step changes of these rows."""
        return (
            self.columns["token_ids"].index_select(0, rows_r),
            self.columns["finished"].index_select(0, rows_r),
            self._moving_2R.index_select(1, rows_r),
        )

    def carry(self, rows_r: Tensor, moving: tuple[Tensor, Tensor, Tensor]) -> None:
        """Let these rows go on from where rows of another state are (`moving`)."""
        token_ids_r, finished_r, moving_2r = moving
        self.columns["token_ids"].index_copy_(0, rows_r, token_ids_r)
        self.columns["finished"].index_copy_(0, rows_r, finished_r)
        self._moving_2R.index_copy_(1, rows_r, moving_2r)

    def drawn(self, steps: int, rows: int) -> list[Tensor]:
        """Return of the first rows what the host reads after so many steps: tokens and
        log-probabilities [K, R], the positions of the newest tokens and whether the rows have ended
        [R], and the values [K, R], if there are any."""
        ring = [self.tokens_KR[:steps, :rows], self.logp_KR[:steps, :rows]]
        ring += [self.columns["positions"][:rows], self.columns["finished"][:rows]]
        return ring if self.values_KR is None else [*ring, self.values_KR[:steps, :rows]]

    def suppressed(self, vocab_size: int) -> Tensor | None:
        """Return [R, V] bool: the tokens that may not be drawn now."""
        if "suppress_ids" not in self.columns:
            return None
        ids_RW, until_RW, positions_R = (
            self.columns[name] for name in ("suppress_ids", "suppress_until", "positions")
        )
        mask_RV = torch.zeros(len(ids_RW), vocab_size, dtype=torch.bool, device=ids_RW.device)
        return mask_RV.scatter_(1, ids_RW, until_RW > positions_R[:, None] + 1)

    def record(self, token_ids_R: Tensor, logp_R: Tensor, values_R: Tensor | None = None) -> None:
        """Record the tokens that the rows drew, their log-probabilities, and the values of their
        states."""
        c = self.columns
        advance_rows_(
            token_ids_R,
            logp_R.to(torch.float32),
            c["stops"],
            c["last_positions"],
            c["token_ids"],
            self._moving_2R,
            c["finished"],
            self.tokens_KR,
            self.logp_KR,
            self.cursor,
            values_R,
            self.values_KR,
        )


def advance(
    weights: DecoderWeights,
    state: DecodeState | None,
    block_table_BM: Tensor,
    cache: KVCache,
    strict: bool,
    tokens: Tokens | None = None,
    value_head: ValueHead | None = None,
) -> None:
    """Run one generation step for the rows of `state`. If `state` is None, the step is computed,
    but no token is sampled. `tokens`: the tokens of the step, if it computes more than the newest
    token of each row. `value_head`: needed if the state records values."""
    if tokens is None and state is not None:
        tokens = state.tokens
    if tokens is None:
        return
    token_ids_N, positions_N, rows_N, out_slots_R, copies = tokens
    hidden_RH = (strict_step if strict else decode_step)(
        weights, token_ids_N, positions_N, rows_N, block_table_BM, cache.k, cache.v, out_slots_R
    )
    if copies is not None:
        copy_blocks(cache.k, cache.v, copies)
    if state is None:
        return
    logits_RV = (strict_logits if strict else _logits)(
        hidden_RH, weights.head, weights.options.logit_softcap
    )
    sampled = _sample(logits_RV, state, strict)
    state.record(
        sampled.token_ids,
        sampled.logp,
        None if value_head is None else value_head(hidden_RH, strict=strict or _by_rows(hidden_RH)),
    )


def _sample(logits_RV: Tensor, state: DecodeState, strict: bool) -> Sampled:
    """Draw a token per row, from the biased logits if there are biases. Log-probability and entropy
    are those of the model's own distribution. Rows that return the tokens they were drawn from have
    the log-probability of the restricted draw. `strict`: compute the same bits as the scorer."""
    c = state.columns
    suppress_RV = state.suppressed(logits_RV.shape[1])
    biased_RV, wanted_R, kept = logits_RV, c.get("returns_kept"), None
    if "bias_ids" in c:
        biased_RV = logits_RV.scatter_add(1, c["bias_ids"], c["bias_values"].to(logits_RV.dtype))
    sampled = sample(
        biased_RV,
        **state.arguments,
        keys=c["keys"],
        suppress=suppress_RV,
        return_kept=wanted_R is not None,
    )
    if wanted_R is not None and sampled.kept is not None:
        kept = sampled.kept.only(wanted_R)
        state.kept.append(kept.to("cpu"))
        drawn_R = torch.where(wanted_R, sampled.logp_processed, sampled.logp)
        sampled = sampled._replace(logp=drawn_R)
    if not strict and biased_RV is logits_RV:
        return sampled
    # a row with NaN draws -1, by which the host notices it
    T, token_ids_R = state.arguments["temperature"], sampled.token_ids.clamp(min=0)
    T = torch.where(T > 0, T, 1.0).float() if isinstance(T, Tensor) else T or 1.0
    if strict:
        logp_R, entropy_R = strict_row_logprob(logits_RV, token_ids_R, T, kept)
        return sampled._replace(logp=logp_R, entropy=entropy_R)
    logp_R, entropy_R = logprob(logits_RV, token_ids_R, temperature=T, entropy=True)
    biased_R = (c["bias_values"] != 0).any(1)
    return sampled._replace(
        logp=torch.where(biased_R, logp_R, sampled.logp),
        entropy=torch.where(biased_R, entropy_R, sampled.entropy),
    )


def _by_rows(hidden_RH: Tensor) -> bool:
    """Whether a row's value can be computed independently of the other rows at no cost, as its
    logits are."""
    return hidden_RH.device.type == "cpu" and native.capability is not None


def _logits(hidden_RH: Tensor, head_VH: Tensor, softcap: float | None) -> Tensor:
    """Return [R, V] logits in float32 at least. Rounded to bfloat16, a logit of 10 would be off by
    0.03, and so would its logprob."""
    one_dtype = hidden_RH.dtype == head_VH.dtype
    if hidden_RH.device.type == "cpu" and one_dtype and head_VH.dtype in FIXED_LINEAR_DTYPES:
        return fixed_linear(hidden_RH, head_VH, softcap=softcap)  # each weight is read once
    if hidden_RH.dtype in (torch.float32, torch.float64):
        logits_RV = F.linear(hidden_RH, head_VH)
    elif hidden_RH.device.type == "cuda":
        logits_RV = torch.mm(hidden_RH, head_VH.t(), out_dtype=torch.float32)
    else:
        logits_RV = F.linear(hidden_RH.float(), head_VH.float())
    return logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)
