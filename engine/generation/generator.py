"""Generator: prompts in, completions out, through the paged cache. `step` schedules tokens, runs
the model, reads the drawn tokens, and hands out completions.

Shapes    N tokens of a step, R sequences that draw a token, K steps of a window.
While the same sequences go on decoding, their state stays on the device and is advanced there
(state.py). A window of steps runs before the host reads the drawn tokens and learns which sequences
have ended. Tokens that a sequence drew after its end are cut off, so the length of a window changes
no completion. On a CPU reading costs nothing: there a window ends as soon as a sequence does.

Where steps are captured, the host reads the tokens of a window while the device computes the next
one. A sequence that has ended meanwhile is in that window, too. It rewrites what it wrote last, and
what it draws is dropped.

One file: a call, its steps and the completions handed out share one state and one lock.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.generation.blocks import BlockManager
from fusedrl.engine.generation.cache import CacheConfig, KVCache
from fusedrl.engine.generation.drafts import Draft, Drafts
from fusedrl.engine.generation.graphs import (
    CudaCapture,
    StepGraphs,
    addresses,
    pad,
    padded_blocks,
    padded_rows,
)
from fusedrl.engine.generation.sampler import SamplingParams, SamplingTable
from fusedrl.engine.generation.scheduler import Plan, Running, Scheduler
from fusedrl.engine.generation.speculation import (
    LONGEST,
    MOST_SEQUENCES,
    Guesses,
    allot,
    row_cost,
)
from fusedrl.engine.generation.state import DecodeState, HostCopy, Tokens, advance, to_device
from fusedrl.engine.generation.texts import Texts
from fusedrl.engine.generation.turns import Turns
from fusedrl.engine.model.decoder import Decoder, own_precision
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.model.step import rows_alone, weight_dtypes
from fusedrl.engine.model.watch import Depth, Watch

_WINDOW, _CPU_WINDOW = 8, 16  # steps until the host reads the tokens; a CPU's may end early


class Drawn(NamedTuple):
    """Tokens drawn in the steps of a plan, with their log-probabilities and values, [K, R] each."""

    slots: np.ndarray
    version: int  # of the weights
    tokens: np.ndarray
    logp: np.ndarray
    values: np.ndarray | None  # None without a value head
    positions: np.ndarray  # [R], of each sequence's newest token
    ended: np.ndarray  # [R] bool
    # (ids, offsets) of each step: the tokens that could be drawn, if some sequence returns them
    kept: list[tuple[np.ndarray, np.ndarray]]
    rows: np.ndarray  # [R], of each sequence in `kept`


class Flight(NamedTuple):
    """Steps that were launched and whose tokens the host has not read."""

    slots: np.ndarray
    ids: np.ndarray  # of the sequences that were in these slots
    version: int
    steps: int
    copied: HostCopy
    kept: list[tuple[np.ndarray, np.ndarray]]


class Drawing(NamedTuple):
    """The tokens that a step has added to a completion; with the last of them the completion."""

    token_ids: list[int]
    completion: Completion | None


class Finished(NamedTuple):
    """A completion and its place in the call: it is sample `sample` of prompt `prompt`."""

    prompt: int
    sample: int
    completion: Completion


@dataclass(eq=False)
class Ticket:
    """State of one call: its sequences that are not finished, and its completions that nobody has
    fetched.

    Attributes:
        error: why the unfinished sequences were lost.
        closed: whether nobody will fetch any more completions.
        follows: whether somebody looks at the tokens after each step.
        drafts: what next tokens are guessed from; None: none are guessed.
    """

    live: dict[int, Running] = field(default_factory=dict)
    finished: deque[Finished] = field(default_factory=deque)
    error: BaseException | None = None
    closed: bool = False
    follows: bool = False
    drafts: Drafts | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Request:
    """One prompt of a call."""

    ticket: Ticket
    index: int
    prompt_ids: list[int]
    params: SamplingParams
    request_id: int
    stop_ids: frozenset[int]
    before: Completion | None  # the completion that the prompt continues


class Generator:
    """Continuous batching over the live weights of one decoder.

    `prepare` checks prompts and parameters, `enqueue` starts them, `step` computes; completions
    arrive in the ticket's `finished`. Several threads may use it at once. They take turns, and each
    step computes tokens for all of them. Draws are keyed, so every thread gets the completions that
    it would have got alone.

    Args:
        watch: reports, before a step, that weights have changed; None: whoever changes them calls
            `bump`.
        value_head: computes the value of every state that draws a token, in the same step; None: no
            values.
        window: steps until the host reads the tokens; by default a number that suits the device.
        graphs: captured steps; by default CUDA's, and none on a CPU.
        activity: counts completions and tokens for whoever shows them.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any = None,
        config: CacheConfig | None = None,
        *,
        watch: Watch | None = None,
        strict: bool = False,
        window: int | None = None,
        graphs: StepGraphs | None = None,
        value_head: ValueHead | None = None,
        activity: Activity | None = None,
    ) -> None:
        config = config or CacheConfig()
        if decoder.dtype not in (allowed := weight_dtypes(decoder.device)):
            raise TypeError(
                "HybridActor.generate: expected weights in "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in allowed)}, got "
                f"{str(decoder.dtype).removeprefix('torch.')}, which the sampler does not compute "
                f"in on {decoder.device}; cast them: "
                "actor.decoder.to(torch.bfloat16)"
            )
        self.decoder, self.tokenizer, self.value_head = decoder, tokenizer, value_head
        self._watch, self._strict = watch, strict
        self.weights_version = 0 if watch is None else watch.version
        self.cache = KVCache(
            config, decoder.weights(), decoder.config.max_positions, decoder.cache_dtype
        )
        windows = [layer.window for layer in decoder.weights().layers]
        self.scheduler = Scheduler(
            BlockManager(self.cache.num_blocks, config.block_size),
            config.max_sequences,
            config.max_tokens_per_step,
            values=value_head is not None,
            apart=graphs is not None or self.cache.k.device.type == "cuda",
            window=max(windows) if all(windows) else 0,
        )
        self._table = SamplingTable(config.max_sequences)
        self._texts = Texts(tokenizer)
        eos = getattr(tokenizer, "eos_token_id", None)
        self._tokenizer_eos = frozenset() if eos is None else frozenset({eos})
        self._turns = Turns()
        self._activity = activity or Activity()
        self._tickets: list[Ticket] = []
        self._leaving: deque[Ticket] = deque()  # to be aborted before the next step
        self._next_id = 0
        self._lent = False
        device = self.cache.k.device
        self._window = window or (_CPU_WINDOW if device.type == "cpu" else _WINDOW)
        # whether to check after every step if some sequence has ended
        self._looks = device.type == "cpu" and graphs is None
        self._graphs = (
            StepGraphs(CudaCapture(device)) if graphs is None and device.type == "cuda" else graphs
        )
        self._state: DecodeState | None = None
        self._flights: deque[Flight] = deque()  # the oldest first
        # states that have the newest tokens of slots whose tokens are not all read
        self._sources: list[DecodeState] = []
        self._block_table: Tensor | None = None  # the device's copy

    # ---- asking ----------------------------------------------------------------------------------
    def prepare(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[int] | None = None,
    ) -> tuple[Ticket, list[Running]]:
        """Check a call and make its sequences, without queueing them. The sequences will use the
        adapter as it is now (on or off), however late they are computed.

        Args and errors are those of `HybridActor.generate`.
        """
        if isinstance(prompts, str | bytes | Mapping):
            raise TypeError(
                f"generate: expected a list of prompts, got one {type(prompts).__name__}; wrap it "
                "in a list"
            )
        ids = self._texts.encode(prompts)
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        keys = list(range(len(ids))) if request_ids is None else list(request_ids)
        for name, given in (("SamplingParams", each), ("request_ids", keys)):
            if len(given) != len(ids):
                raise ValueError(
                    f"generate: {len(ids)} prompts and {len(given)} {name}; expected one per prompt"
                )
        eos_ids = self._ends_of_model()
        ticket = Ticket()
        sequences: list[Running] = []
        special: dict[SamplingParams, SamplingParams] = {}  # most prompts share theirs
        for index, (prompt, p, key) in enumerate(zip(ids, each, keys, strict=True)):
            before = prompts[index] if isinstance(prompts[index], Completion) else None
            self._check(index, prompt, p, key, before)
            if p.stop:
                p = special[p] = special.get(p) or self._texts.with_special_stops(p)
            request = _Request(
                ticket,
                index,
                prompt if before is None else before.prompt_ids,
                p,
                int(key),
                eos_ids | frozenset(p.stop_token_ids),
                before,
            )
            tokens = np.array(prompt, dtype=np.int64)
            for number in range(p.n):
                sample = number if before is None else before.sample + number
                sequences.append(
                    Running.start(
                        -1,
                        request,
                        sample,
                        tokens,
                        len(prompt) + p.max_new_tokens,
                        self.decoder.adapter_enabled,
                    )
                )
        return ticket, sequences

    def _ends_of_model(self) -> frozenset[int]:
        return self._tokenizer_eos.union(self.decoder.config.eos_token_ids)

    def _check(
        self, index: int, prompt: list[int], p: Any, key: Any, before: Completion | None
    ) -> None:
        """Raise TypeError or ValueError if a prompt of a call can never run."""
        vocab, positions = self.decoder.config.vocab_size, self.decoder.config.max_positions
        if not isinstance(p, SamplingParams):
            raise TypeError(
                f"generate: expected SamplingParams for prompt {index}, got {type(p).__name__}"
            )
        if not isinstance(key, Integral) or not -(2**63) <= int(key) < 2**63:
            raise TypeError(
                f"generate: expected an integer of 64 bits as request id of prompt {index}, "
                f"got {key!r}"
            )
        if bad := [t for t in (*prompt, *p.token_ids()) if not 0 <= t < vocab]:
            raise ValueError(
                f"generate: token id {bad[0]} of prompt {index} or its SamplingParams is "
                f"outside the model's vocabulary [0, {vocab})"
            )
        never = set(p.banned_token_ids)
        if p.min_new_tokens:
            never |= self._ends_of_model().union(p.stop_token_ids)
        if len(never) >= vocab:
            raise ValueError(
                f"generate: the SamplingParams of prompt {index} leave no token of {vocab} to "
                "draw; shorten banned_token_ids"
                + (", or lower min_new_tokens" if p.min_new_tokens else "")
            )
        if len(prompt) + p.max_new_tokens > positions:
            raise ValueError(
                f"generate: prompt {index} has {len(prompt)} tokens, and with "
                f"max_new_tokens={p.max_new_tokens} that exceeds the model's "
                f"{positions} positions; shorten the prompt or lower max_new_tokens"
            )
        try:
            self.scheduler.check_fits(len(prompt), p.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"generate: prompt {index} can never run: {error}") from None
        if before is not None and before.kept is not None and not p.return_kept:
            raise ValueError(
                f"generate: prompt {index} is a completion that says what its tokens were "
                "drawn from; continue it with return_kept=True"
            )

    def enqueue(self, ticket: Ticket, sequences: list[Running]) -> None:
        """Queue the sequences that `prepare` made.

        Raises:
            RuntimeError: the cache is lent.
        """
        with self._turns:
            self._sweep()
            self._look("all")
            for number, sequence in enumerate(sequences, self._next_id):
                sequence.id = number
            self._next_id += len(sequences)
            ticket.live = {sequence.id: sequence for sequence in sequences}
            if ticket.drafts is not None:
                ticket.drafts.begin()
            self._tickets.append(ticket)
            self.scheduler.submit(sequences)

    def run(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[int] | None = None,
        to_caller: bool = True,
        drafts: Drafts | None = None,
    ) -> Iterator[Finished]:
        """Return an iterator over completions as they finish. The call is checked at once. Closing
        the iterator early ends its sequences. `to_caller`: whether the completions go to code that
        may write to the weights before it asks for the next completion. `drafts`: guess next tokens
        from it, and let it hear of what is drawn."""
        ticket, sequences = self.prepare(prompts, params, request_ids)
        ticket.drafts = drafts
        return self._drive(ticket, sequences, to_caller)

    def _drive(
        self, ticket: Ticket, sequences: list[Running], to_caller: bool
    ) -> Iterator[Finished]:
        self.enqueue(ticket, sequences)
        self._activity.begin("generating", "completions", len(sequences))
        depth: Depth = "counts"
        try:
            while True:
                with self._turns:
                    self._sweep()
                    if ticket.live and not ticket.finished:
                        self._step(ticket, depth)
                    out, over = list(ticket.finished), not ticket.live
                    self._activity.done = len(sequences) - len(ticket.live)
                    ticket.finished.clear()
                depth = "first rows" if out and to_caller else "counts"
                yield from out
                if over and ticket.error is not None:
                    raise RuntimeError(
                        "generate: a step failed in another call on this actor, and the "
                        "completions that were on the way are lost "
                        f"({type(ticket.error).__name__}: {ticket.error})"
                    ) from ticket.error
                if over:
                    return
        finally:
            ticket.closed = True
            self.abort(ticket)

    def advance(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Finished]]:
        """Compute a step for calls, unless completions of them have finished already, and return
        those that have.

        Raises:
            RuntimeError: a step failed, here or in another call.
        """
        with self._turns:
            self._sweep()
            live = next((ticket for ticket in tickets if ticket.live), None)
            if live is not None and not any(ticket.finished for ticket in tickets):
                self._step(live, "counts")
            out = [(ticket, done) for ticket in tickets for done in ticket.finished]
            for ticket in tickets:
                ticket.finished.clear()
        if error := next((ticket.error for ticket in tickets if ticket.error is not None), None):
            raise RuntimeError(
                "generate: a step failed in another call on this actor, and the completions that "
                f"were on the way are lost ({type(error).__name__}: {error})"
            ) from error
        return out

    def follow(self, prompt: Any, params: SamplingParams, request_id: int) -> Iterator[Drawing]:
        """Complete one prompt, and yield what each step adds. The arguments are checked at once.
        Closing the iterator early ends the completion."""
        ticket, sequences = self.prepare([prompt], params, [request_id])
        ticket.follows = True
        return self._followed(ticket, sequences)

    def _followed(self, ticket: Ticket, sequences: list[Running]) -> Iterator[Drawing]:
        (one,), seen = sequences, sequences[0].num_prompt
        try:
            self.enqueue(ticket, sequences)
            while not ticket.finished:
                with self._turns:
                    self._sweep()
                    if ticket.live:
                        self._step(ticket, "counts")
                    length = int(self.scheduler.slots.length[one.slot]) if one.slot >= 0 else seen
                    new = (
                        self.scheduler.slots.tokens[one.slot, seen:length].tolist()
                        if ticket.live
                        else []
                    )
                if ticket.error is not None:
                    raise RuntimeError(
                        "generate: a step failed in another call on this actor, and this "
                        f"completion is lost ({type(ticket.error).__name__}: {ticket.error})"
                    ) from ticket.error
                seen += len(new)
                if new:
                    yield Drawing(new, None)
            done = ticket.finished.popleft().completion
            yield Drawing([*done.prompt_ids, *done.token_ids][seen:], done)
        finally:
            ticket.closed = True
            self.abort(ticket)

    def abort(self, ticket: Ticket | None = None) -> None:
        """End the sequences of one call, or of all calls, with the tokens they have; their
        finish_reason is "aborted". If another thread is computing a step, they end after it."""
        self._leaving.extend([ticket] if ticket is not None else list(self._tickets))
        if self._turns.try_enter():
            try:
                self._sweep()
            finally:
                self._turns.leave()

    def _sweep(self) -> None:
        """Remove the sequences of aborted calls."""
        while self._leaving:
            ticket = self._leaving.popleft()
            live = list(ticket.live.values())
            self.scheduler.finish(live)
            for sequence in live:
                self._hand_out(sequence, "aborted")
            if ticket.closed and ticket in self._tickets:
                self._tickets.remove(ticket)

    def bump(self, weights_version: int) -> None:
        """Note that the weights changed. Tokens drawn from now on get the new version, and no
        cached prefix is reused. Running sequences keep the keys and values that the older weights
        computed."""
        self.weights_version = weights_version
        self.scheduler.blocks.bump()

    def vacate(self) -> tuple[Tensor, Tensor]:
        """Lend the tensors of the cache for another use until the next call. No cached prefix will
        be found afterwards.

        Raises:
            RuntimeError: the cache is lent already, or unfinished completions need it.
        """
        with self._turns:
            self._sweep()
            if self._lent:
                raise RuntimeError(
                    "the KV cache is lent to another thread already; train in one at a time"
                )
            if flying := sum(len(ticket.live) for ticket in self._tickets):
                raise RuntimeError(
                    f"the KV cache cannot be lent: {flying} completions are in flight; let their "
                    "streams come to an end, or abort them"
                )
            for flight in self._flights:  # of sequences that have all ended
                flight.copied.arrays()
            self._flights.clear()
            self.scheduler.blocks.bump()
            self._lent = True
            return self.cache.k, self.cache.v

    def take_back(self) -> None:
        """Note that the tensors of the cache are no longer lent."""
        self._lent = False

    def _look(self, depth: Depth) -> None:
        """Check whether weights have changed since the last step."""
        if self._lent:
            raise RuntimeError(
                "HybridActor.generate: the KV cache is lent to training; leave the lend_cache() "
                "block first"
            )
        if (
            self._watch is None
            or (version := self._watch.look(depth, lightly=depth == "counts"))
            == self.weights_version
        ):
            return
        expected, held = (
            (self.decoder.device, self.decoder.cache_dtype),
            (self.cache.k.device, self.cache.k.dtype),
        )
        if expected != held:
            raise RuntimeError(
                f"HybridActor: the model was moved or cast, to {expected[1]} on {expected[0]}, "
                "while completions were "
                f"on the way whose keys and values are {held[1]} on {held[0]}; let the streams "
                "come to an end "
                "first, or abort them"
            )
        self.bump(version)

    # ---- a step ----------------------------------------------------------------------------------
    def step(self) -> None:
        """Compute a token of every decoding sequence, and as much prefill as fits in the same step.
        If nothing prefills, compute up to a window of tokens.

        Raises:
            RuntimeError: no progress, NaN in the logits, or weights that cannot be followed
                (`Watch.look`). Like any error in a step, it ends all unfinished sequences, and the
                other calls raise an error, too.
        """
        with self._turns:
            self._sweep()
            self._step(None, "first rows")

    @torch.no_grad()
    def _step(self, ticket: Ticket | None, depth: Depth) -> None:
        """Compute a step that `ticket` waits for, and read the tokens of the oldest one that has
        not been read; while steps are captured, not before another one is under way."""
        try:
            with (
                contextlib.nullcontext() if self._watch is None else self._watch.still(),
                own_precision(self.decoder.device),
            ):
                self._look(depth)
                # only the host finds stop strings, so it must read every token
                watched = self._table.watched[self.scheduler.decoding].any() or any(
                    one.follows for one in self._tickets
                )
                ahead = int(not watched and self._captures(self.scheduler.decoding))
                guessing = self._guessing(self.scheduler.decoding)
                plan = guesses = drawn = None
                if len(self._flights) <= ahead:
                    plan = self.scheduler.schedule(1 if watched or guessing else self._window)
                if plan is not None:
                    guesses = self._guess(plan) if guessing else None
                    if guesses is not None:
                        drawn = self._verify(plan, guesses)
                    else:
                        ahead = ahead if self._launch(plan) else 0
                    self.scheduler.complete(plan)
                if guesses is None and (len(self._flights) > ahead or plan is None):
                    drawn = self._read()
        except BaseException as error:
            self.scheduler.blocks.bump()  # blocks of the step that failed may be half written
            self._state, self._sources = None, []
            self._flights.clear()
            for one in self._tickets:
                lost = list(one.live.values())
                self.scheduler.finish(lost)
                one.live.clear()
                one.error = error if lost and one is not ticket else one.error
            raise
        if drawn is not None:
            self._take(drawn)

    def _captures(self, drew: np.ndarray) -> bool:
        """Whether a step in which these slots decode is captured."""
        return (
            self._graphs is not None
            and padded_rows(len(drew)) is not None
            and not self._table.returns_kept[drew].any()
        )

    def _launch(self, plan: Plan) -> bool:
        """Launch the steps of the plan, and note their flight if a sequence draws a token. Return
        whether there was anything to launch."""
        weights, cache, drew, head = (
            self.decoder.weights(self.scheduler.adapted),
            self.cache,
            plan.sampled,
            self.value_head,
        )
        if not (plan.chunks or (len(drew) and plan.steps)):
            return False
        captured = not plan.chunks and self._captures(drew)
        table_BM = self._device_table()
        tokens = self._tokens(plan) if plan.chunks else None
        state = self._rows_of(drew, captured) if len(drew) else None

        def step() -> None:
            advance(weights, state, table_BM, cache, self._strict, tokens, head)

        if state is None:
            step()
            return True
        run = step
        if self._graphs is not None and captured:
            most = min(self.decoder.config.max_positions, cache.k.shape[1] * cache.k.shape[4])
            # allocated at full size: a table that grew later would force all captures to be redone
            weights.rope_table.upto(most)
            run = self._graphs.replay(
                step,
                state,
                table_BM.shape[1],
                addresses(
                    weights, cache.k, cache.v, table_BM, *(head.parameters() if head else ())
                ),
            )
        state.cursor.zero_()
        state.kept.clear()
        done = 0
        while done < plan.steps and not (
            done and self._looks and bool(state.columns["finished"].any())
        ):
            run()
            done += 1
        if captured or self._graphs is None:
            self._state = state
        self._depart(plan, state, done)
        return True

    def _depart(self, plan: Plan, state: DecodeState, steps: int) -> None:
        """Note that these steps were launched."""
        slots, drew = self.scheduler.slots, plan.sampled
        kept = [(kept.token_ids.numpy(), kept.offsets.numpy()) for kept in state.kept]
        copied = HostCopy(state.drawn(steps, len(drew)), lasting=self._graphs is not None)
        if self._graphs is not None:
            slots.ahead[drew] += steps
            self._sources = [*self._sources, state] if plan.chunks else [state]
        self._flights.append(
            Flight(drew, slots.ids[drew], self.weights_version, steps, copied, kept)
        )

    def _read(self) -> Drawn | None:
        """Read the tokens of the oldest flight. Drop those of sequences that have left meanwhile.

        Raises:
            RuntimeError: NaN in the logits of a sequence.
        """
        if not self._flights:
            return None
        drew, ids, version, steps, copied, kept = self._flights.popleft()
        tokens, logp, positions, ended, *values = copied.arrays()
        rows = np.arange(len(drew))
        if self._graphs is not None:
            slots = self.scheduler.slots
            stay = slots.ids[drew] == ids
            if not stay.all():
                drew, rows, tokens, logp, positions, ended = (
                    drew[stay],
                    rows[stay],
                    tokens[:, stay],
                    logp[:, stay],
                    positions[stay],
                    ended[stay],
                )
                values = [column[:, stay] for column in values]
            slots.ahead[drew] -= steps
        if ended.any() and (tokens[:, ended] < 0).any():
            raise RuntimeError(
                "Generator: the logits of a sequence hold NaN or infinity; look at the weights "
                "(a non-finite update?)"
            )
        return Drawn(
            drew, version, tokens, logp, values[0] if values else None, positions, ended, kept, rows
        )

    def _rows_of(self, drew: np.ndarray, captured: bool) -> DecodeState:
        """Return the device state of the slots that draw. If they are the same slots as before, it
        is the state that the previous step left."""
        slots, device = self.scheduler.slots, self.cache.k.device
        length, state = slots.length[drew], self._state
        if (
            state is not None
            and state.slots is drew
            and ("suppress_ids" in state.columns) == self._table.suppresses(drew, length)
        ):
            return state
        carried = self._carried(drew) if captured else []
        newest = slots.tokens[drew, length - 1]
        columns, numbers = self._columns(drew, length, newest, captured)
        if self._graphs is None or not captured:
            return DecodeState(
                columns, numbers, self._window, device, drew, values=self.value_head is not None
            )
        padded = pad(columns, padded_rows(len(drew)) or len(drew), slots.count)
        state = self._graphs.state(
            padded, numbers, self._window, device, drew, values=self.value_head is not None
        )
        for rows_r, moving in carried:
            state.carry(rows_r, moving)
        return state

    def _columns(
        self, slots_R: np.ndarray, lengths_R: np.ndarray, token_ids_R: np.ndarray, captured: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return the columns and numbers of a `DecodeState` in which each row computes a token of a
        slot, the one that makes it `lengths_R` long, and draws the next."""
        table = self._table
        columns, numbers = table.arguments(slots_R, fixed=captured)
        columns |= {
            "token_ids": token_ids_R,
            "positions": lengths_R - 1,
            "rows": slots_R,
            "last_positions": self.scheduler.slots.limit[slots_R] - 2,
            "finished": np.zeros(len(slots_R), dtype=bool),
            "keys": table.keys(slots_R, lengths_R),
            "stops": table.stops(slots_R),
            **table.suppressed(slots_R, lengths_R),
            **table.biases(slots_R),
        }
        if table.returns_kept[slots_R].any():
            columns["returns_kept"] = table.returns_kept[slots_R]
        return columns, numbers

    # ---- guessed tokens --------------------------------------------------------------------------
    def _guessing(self, decoding: np.ndarray) -> bool:
        """Whether next tokens of these slots may be guessed."""
        return (
            self._looks
            and 0 < len(decoding) <= MOST_SEQUENCES
            and any(one.drafts is not None for one in self._tickets)
            and rows_alone(self.decoder.device)
        )

    def _guess(self, plan: Plan) -> Guesses | None:
        """Guess next tokens of the slots that decode, and give them the blocks for these. Return
        None if no guess is worth its time, or the plan has prompts to read."""
        if plan.chunks or not len(plan.decode):
            return None
        slots, vocab = self.scheduler.slots, self.decoder.config.vocab_size
        cost = row_cost(self.decoder.dtype.itemsize)
        found: list[Draft | None] = []
        for slot in plan.decode.tolist():
            sequence, length = self.scheduler.at(slot), int(slots.length[slot])
            request: _Request = sequence.request
            most = min(LONGEST, int(slots.limit[slot]) - 1 - length)
            draft = None
            if request.ticket.drafts is not None:
                text = slots.tokens[slot, len(request.prompt_ids) : length].tolist()
                draft = request.ticket.drafts.guess(
                    request.prompt_ids, sequence.id, text, most, cost
                )
            found.append(draft)
        lengths = allot([draft.chances if draft is not None else [] for draft in found], cost)
        for at, (slot, draft) in enumerate(zip(plan.decode.tolist(), found, strict=True)):
            ids = draft.token_ids[: lengths[at]] if draft is not None else []
            known = next((i for i, token in enumerate(ids) if not 0 <= token < vocab), len(ids))
            lengths[at] = self.scheduler.reach_further(slot, known) if known else 0
        return Guesses.of(found, lengths) if any(lengths) else None

    def _verify(self, plan: Plan, guesses: Guesses) -> Drawn:
        """Compute the newest tokens of the slots that decode, and the guessed ones behind them.
        Return what each slot draws as long as its guesses are right."""
        weights, slots, drew = (
            self.decoder.weights(self.scheduler.adapted),
            self.scheduler.slots,
            plan.decode,
        )
        slots_S = drew[guesses.sequence]
        lengths_S = slots.length[slots_S] + guesses.offset
        newest_S = slots.tokens[slots_S, slots.length[slots_S] - 1]
        columns, numbers = self._columns(
            slots_S,
            lengths_S,
            np.where(guesses.offset > 0, guesses.token_ids, newest_S),
            captured=False,
        )
        state = DecodeState(
            columns, numbers, 1, self.cache.k.device, values=self.value_head is not None
        )
        table_BM, head = self._device_table(), self.value_head
        advance(weights, state, table_BM, self.cache, self._strict, None, head)
        self._state = None
        tokens_1S, logp_1S, _, ended_S, *values = (
            column.numpy() for column in state.drawn(1, len(slots_S))
        )
        tokens_S = tokens_1S[0]
        right = self._before_stops(drew, guesses, tokens_S, guesses.right(tokens_S, ended_S))
        ended = ended_S[guesses.first + right]
        for slot, kinds, count in zip(drew.tolist(), guesses.kinds, right.tolist(), strict=True):
            drafts = self.scheduler.at(slot).request.ticket.drafts
            if kinds and drafts is not None:
                drafts.judge(kinds, count)
        steps = int(right.max()) + 1
        kept = [(kept.token_ids.numpy(), kept.offsets.numpy()) for kept in state.kept]
        return Drawn(
            drew,
            self.weights_version,
            guesses.behind(tokens_S, steps),
            guesses.behind(logp_1S[0], steps),
            guesses.behind(values[0][0], steps) if values else None,
            slots.length[drew] + right - ended,
            ended,
            [(ids, offsets[step:]) for ids, offsets in kept for step in range(steps)],
            guesses.first,
        )

    def _before_stops(
        self, drew: np.ndarray, guesses: Guesses, tokens_S: np.ndarray, right: np.ndarray
    ) -> np.ndarray:
        """Return how many of the right guesses come before the end that a stop string sets."""
        slots, right = self.scheduler.slots, right.copy()
        for at in np.flatnonzero(self._table.watched[drew] & (right > 0)).tolist():
            sequence, length = self.scheduler.at(int(drew[at])), int(slots.length[drew[at]])
            first, params = int(guesses.first[at]), sequence.request.params
            text = np.concatenate(
                [slots.tokens[drew[at], :length], tokens_S[first : first + int(right[at])]]
            )
            for count in range(int(right[at])):
                if self._texts.stop_string(params, text[: length + count + 1], sequence.num_prompt):
                    right[at] = count
                    break
        return right

    def _carried(self, drew: np.ndarray) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        """Return (rows, what they go on from) of the slots whose newest tokens the host has not
        read; of a row that is named twice, the last counts."""
        slots, device, found = self.scheduler.slots, self.cache.k.device, []
        unread = slots.ahead[drew] > 0
        for source in self._sources if unread.any() else ():
            if source.slots is None:
                continue
            at = np.full(slots.count, -1, dtype=np.int64)  # row of each slot in the source
            at[source.slots] = np.arange(len(source.slots))
            rows = np.flatnonzero(unread & (at[drew] >= 0))
            if len(rows):
                moving = source.moving(to_device(at[drew[rows]], device))
                found.append((to_device(rows, device), moving))
        return found

    def _tokens(self, plan: Plan) -> Tokens:
        """Collect the tokens of a step with prefills from the host's arrays."""
        slots, decode, device = self.scheduler.slots, plan.decode, self.cache.k.device
        for chunk in plan.chunks:
            for sequence in (chunk.sequence, *chunk.forks) if chunk.final else ():
                request: _Request = sequence.request
                self._table.put(
                    sequence.slot,
                    request.params,
                    request.request_id,
                    sequence.sample,
                    request.stop_ids,
                    sequence.num_prompt,
                )
        last = slots.length[decode] - 1
        parts = [np.stack([slots.tokens[decode, last], last, decode])]
        out, count = [np.arange(len(decode))], len(decode)
        for chunk in plan.chunks:
            slot, size = chunk.sequence.slot, chunk.stop - chunk.start
            parts.append(
                np.stack(
                    [
                        slots.tokens[slot, chunk.start : chunk.stop],
                        np.arange(chunk.start, chunk.stop),
                        np.full(size, slot),
                    ]
                )
            )
            count += size
            if chunk.final:
                out.append(np.full(1 + len(chunk.forks), count - 1))
        token_ids, positions, rows = to_device(np.concatenate(parts, axis=1), device).unbind(0)
        return Tokens(
            token_ids,
            positions,
            rows,
            to_device(np.concatenate(out), device),
            to_device(np.array(plan.copies, dtype=np.int64), device) if plan.copies else None,
        )

    def _device_table(self) -> Tensor:
        """Return the block table where the model reads it: the host's array itself, or a copy on
        the device at a fixed address, no wider than needed."""
        slots = self.scheduler.slots
        if self._graphs is None:
            return torch.from_numpy(slots.block_table).to(self.cache.k.device)
        if self._block_table is None:
            most = -(-self.decoder.config.max_positions // slots.block_size)
            self._block_table = torch.zeros(
                slots.count + 1, most, dtype=torch.int32, device=self.cache.k.device
            )
        width = padded_blocks(int(slots.held.max()) // slots.block_size, self._block_table.shape[1])
        if slots.table_changed:
            host = np.ascontiguousarray(slots.block_table[:, :width])
            self._block_table[:, : host.shape[1]].copy_(
                to_device(host, self._block_table.device), non_blocking=True
            )
            slots.table_changed = False
        return self._block_table[:, :width]

    def _take(self, drawn: Drawn) -> None:
        """Append the drawn tokens up to the end of each sequence, and hand out the sequences that
        ended."""
        slots, drew, tokens_KR, K = (
            self.scheduler.slots,
            drawn.slots,
            drawn.tokens,
            len(drawn.tokens),
        )
        ended = drawn.ended.copy()
        # the token that ends a sequence does not become its newest one
        count = drawn.positions - slots.length[drew] + 1 + ended
        last = tokens_KR[count - 1, np.arange(len(drew))]
        count = None if bool((count == K).all()) else count
        slots.append(drew, tokens_KR, drawn.logp, drawn.version, count, drawn.values)
        self._activity.tokens += K * len(drew) if count is None else int(count.sum())
        if drawn.kept:
            for row in np.flatnonzero(self._table.returns_kept[drew]).tolist():
                sequence, at = self.scheduler.at(int(drew[row])), int(drawn.rows[row])
                for ids, offsets in drawn.kept[: K if count is None else int(count[row])]:
                    sequence.kept.append(ids[offsets[at] : offsets[at + 1]].copy())
        stopped = np.zeros(len(drew), dtype=bool)
        if ended.any():
            stopped[ended] = self._table.is_stop(drew[ended], last[ended])
        for row in np.flatnonzero(self._table.watched[drew] & ~stopped).tolist():
            slot = int(drew[row])
            sequence = self.scheduler.at(slot)
            stopped[row] = (
                self._texts.stop_string(
                    sequence.request.params,
                    slots.tokens[slot, : slots.length[slot]],
                    sequence.num_prompt,
                )
                is not None
            )
            ended[row] |= stopped[row]
        if not ended.any():
            return
        out = [
            (self.scheduler.at(slot), "stop" if stop else "length")
            for slot, stop in zip(drew[ended].tolist(), stopped[ended].tolist(), strict=True)
        ]
        self.scheduler.finish([sequence for sequence, _ in out])
        for sequence, reason in out:
            self._hand_out(sequence, reason)

    def _hand_out(self, sequence: Running, reason: str) -> None:
        request: _Request = sequence.request
        start, before = sequence.num_prompt, request.before
        token_ids, logp, versions = (
            column[start:].tolist()
            for column in (sequence.tokens, sequence.logp, sequence.versions)
        )
        values: list[float] | None = (
            sequence.values[start:].tolist() if self.value_head is not None else None
        )
        mask = None
        kept: list[Any] | None = sequence.kept if request.params.return_kept else None
        if before is not None:
            if kept is not None:
                drawn_whole: list[Any] = [()] * len(before.token_ids)
                kept = [*(drawn_whole if before.kept is None else before.kept), *kept]
            if before.action_mask is not None:
                mask = [*before.action_mask, *([True] * len(token_ids))]
            token_ids, logp, versions = (
                [*before.token_ids, *token_ids],
                [*before.logprobs, *logp],
                [*before.weights_versions, *versions],
            )
            values = None if values is None or before.values is None else [*before.values, *values]
        text = self._texts.text(request.prompt_ids, token_ids) if self.tokenizer is not None else ""
        if request.params.stop and reason == "stop":
            found = self._texts.stop_string(request.params, sequence.tokens, start)
            text = text[: text.rindex(found)] if found is not None and found in text else text
        completion = Completion(
            request.prompt_ids,
            token_ids,
            logp,
            text,
            reason,
            versions,
            sequence.sample,
            mask,
            values,
            kept,
        )
        if request.ticket.drafts is not None:
            whole = sequence.tokens[len(request.prompt_ids) :].tolist()
            request.ticket.drafts.finish(request.prompt_ids, sequence.id, whole)
        del request.ticket.live[sequence.id]
        request.ticket.finished.append(Finished(request.index, sequence.sample, completion))
