"""Scheduler: which tokens the next step computes. Continuous batching over a fixed number of slots
and of blocks.

All requests are known up front in RL, so the longest are admitted first and the short ones fill the
end. The samples of a prompt are admitted together: one prefills, the rest wait in their slots and
fork from it. Prefills are split to fit the token budget that decoding leaves in a step. When blocks
run out, the newest sequence goes back to the queue with its tokens, and is computed again later
(much of it is then found in the prefix cache).

A decoding sequence of `length` tokens has the keys and values of all but its last token in the
cache: a step computes the last token and draws the next. If nothing prefills, a plan may cover
several steps in a row. Every table then has the blocks that all these steps write to, as long as no
other sequence needs these blocks.

Where decoding steps are captured (graphs.py), prefills are plans of their own, so that decoding
stays captured. Each costs a call that the host issues launch by launch, so sequences are admitted
in batches: when an eighth of the running ones have left. There the next plan may be made before the
tokens of the last one are read. `Slots.ahead` counts such tokens. A sequence may turn out to have
ended before them; until then it is treated as if it had not.

A model's adapter is on or off for a whole step. So the sequences that want it on and those that
want it off take turns. When both kinds wait, sequences of the running kind are admitted until the
first running one leaves; the other kind is admitted when the last has left.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusedrl.engine.generation.blocks import BlockManager

_STALLED_STEPS = 8
_BATCH = 8  # one of so many running sequences must have left before others are admitted apart


@dataclass(eq=False, slots=True)
class Running:
    """One completion that is being generated. While the sequence has a slot, its columns are in
    `Slots`, and those here are out of date."""

    id: int
    request: Any  # the prompt's request, an object of the caller; all samples of a prompt share it
    sample: int
    num_prompt: int
    limit: int  # largest number of tokens, prompt and completion together
    tokens: np.ndarray  # [length] int64, the prompt first
    logp: np.ndarray  # [length] float32
    versions: np.ndarray  # [length] int64, version of the weights that drew the token
    # [length] float32, value of the state that drew the token; [0] if `Slots` has no values
    values: np.ndarray
    adapted: bool = True  # whether it is computed with the adapter
    slot: int = -1
    computed: int = 0  # while it prefills: leading tokens whose keys and values are in the cache
    leader: Running | None = None  # sequence whose prefill it waits for, without blocks until then
    followers: list[Running] = field(default_factory=list)
    # the tokens that each token after the prompt could be drawn from, if the request asks for them
    kept: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        id: int,
        request: Any,
        sample: int,
        prompt: np.ndarray,
        limit: int,
        adapted: bool = True,
    ) -> Running:
        """Make a sequence that consists of its prompt."""
        size = len(prompt)
        logp, versions, values = (
            np.zeros(size, dtype=dtype) for dtype in (np.float32, np.int64, np.float32)
        )
        return cls(id, request, sample, size, limit, prompt, logp, versions, values, adapted)


class Slots:
    """The running sequences in arrays, one row each, so that a step advances all of them at once.
    `values`: whether each token has a value."""

    def __init__(self, count: int, block_size: int, values: bool = False) -> None:
        self.count, self.block_size = count, block_size
        self.length = np.zeros(count, dtype=np.int64)
        self.limit = np.zeros(count, dtype=np.int64)
        self.ahead = np.zeros(count, dtype=np.int64)  # tokens that are computed and not yet read
        self.ids = np.full(count, -1, dtype=np.int64)  # of the sequence in the row
        self.held = np.zeros(count, dtype=np.int64)  # tokens that the blocks of a row's table hold
        self.tokens = np.zeros((count, 0), dtype=np.int64)
        self.logp = np.zeros((count, 0), dtype=np.float32)
        self.versions = np.zeros((count, 0), dtype=np.int64)
        self.values = np.zeros((count, 0), dtype=np.float32)
        self._columns = (
            ("tokens", "logp", "versions", "values") if values else ("tokens", "logp", "versions")
        )
        # the last row belongs to no sequence: null blocks, for rows that pad a step
        self.block_table = np.zeros((count + 1, 0), dtype=np.int32)
        self.table_changed = True  # whether the table differs from the device's copy

    def reserve(self, num_tokens: int) -> None:
        """Make the rows at least `num_tokens` long."""
        more = num_tokens - self.tokens.shape[1]
        if more > 0:
            for name in self._columns:
                setattr(self, name, np.pad(getattr(self, name), ((0, 0), (0, more))))
            blocks = -(-num_tokens // self.block_size)
            self.block_table = np.pad(
                self.block_table, ((0, 0), (0, blocks - self.block_table.shape[1]))
            )
            self.table_changed = True

    def put(self, sequence: Running) -> None:
        """Write the columns of `sequence` into the row `sequence.slot`."""
        slot, size = sequence.slot, len(sequence.tokens)
        self.length[slot], self.limit[slot], self.held[slot] = size, sequence.limit, 0
        self.ahead[slot], self.ids[slot] = 0, sequence.id
        for name in self._columns:
            getattr(self, name)[slot, :size] = getattr(sequence, name)

    def take(self, sequence: Running) -> None:
        """Read the columns of `sequence` back out of its row."""
        row = (sequence.slot, slice(0, self.length[sequence.slot]))
        for name in self._columns:
            setattr(sequence, name, getattr(self, name)[row].copy())

    def append(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        logp: np.ndarray,
        version: int,
        count: np.ndarray | None = None,
        values: np.ndarray | None = None,
    ) -> None:
        """Append tokens to these slots. `tokens`, `logp` and `values` are [K, R]; of each column,
        the first `count` [R] entries are appended, by default all. [R] is one token each."""
        tokens, logp = np.atleast_2d(tokens), np.atleast_2d(logp)
        values = None if values is None else np.atleast_2d(values)
        steps, at = np.arange(len(tokens))[:, None], self.length[slots]
        if count is None:
            rows, columns = slots, at + steps
        else:
            drawn = steps < count
            rows, columns, tokens, logp = (
                np.broadcast_to(slots, drawn.shape)[drawn],
                (at + steps)[drawn],
                tokens[drawn],
                logp[drawn],
            )
            values = None if values is None else values[drawn]
        self.tokens[rows, columns], self.logp[rows, columns], self.versions[rows, columns] = (
            tokens,
            logp,
            version,
        )
        if values is not None:
            self.values[rows, columns] = values
        self.length[slots] = at + (len(steps) if count is None else count)

    def reach(self, slots: np.ndarray) -> np.ndarray:
        """Return the lengths of these sequences if none of them has ended yet."""
        return self.length[slots] + self.ahead[slots]

    def set_table(self, slot: int, blocks: list[int]) -> None:
        """Set the blocks of the row. The new list may be longer or shorter than the old one, but
        must agree with it in the part that they share."""
        had = int(self.held[slot]) // self.block_size
        self.block_table[slot, had : len(blocks)] = blocks[had:]
        self.held[slot] = len(blocks) * self.block_size
        self.table_changed = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `stop` of a sequence that prefills. The last chunk of a sequence is
    `final`: after it, tokens are drawn for the sequence and its forks."""

    sequence: Running
    start: int
    stop: int
    final: bool
    forks: tuple[Running, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Work of one step, or of several equal steps in a row.

    Attributes:
        decode: slots that compute the token they drew last.
        chunks: parts of prompts to prefill.
        copies: (source, destination) blocks, copied once the step is computed.
        sampled: slots that draw a token: those of `decode`, then those of the chunks that end a
            prompt, each with its forks.
        steps: number of such steps that may follow one another before the host must read the
            tokens; 0 if all that could be drawn is drawn, and must be read.
    """

    decode: np.ndarray
    chunks: list[Chunk]
    copies: list[tuple[int, int]]
    sampled: np.ndarray
    steps: int = 1


class Scheduler:
    """Owns the queue, the slots and the block manager. Call `submit`, then `schedule` and
    `complete` in turn; `finish` sequences between steps. `apart`: a plan either prefills or
    decodes. `window`: no layer sees more than so many tokens, 0 if some layer sees all."""

    def __init__(
        self,
        blocks: BlockManager,
        max_sequences: int,
        max_tokens_per_step: int,
        values: bool = False,
        apart: bool = False,
        window: int = 0,
    ) -> None:
        self.blocks, self._apart, self._window = blocks, apart, window
        self.slots = Slots(max_sequences, blocks.block_size, values)
        self._budget = max_tokens_per_step
        self.adapted = True  # whether the running sequences are computed with the adapter
        self._waiting: list[Running] = []  # the next one to admit is the last
        # sequences that wait for the other state of the adapter, in the same order
        self._others: list[Running] = []
        # a sequence has left while `_others` waited: they are next as soon as nothing runs
        self._draining = False
        self._running: dict[int, Running] = {}  # by id, in the order of admission
        self._prefilling: list[Running] = []
        self._decode = np.zeros(0, dtype=np.int64)  # slots, in the order of admission
        self._by_slot: list[Running | None] = [None] * max_sequences
        self._free_slots = list(range(max_sequences))[::-1]
        self._blocked = False  # the head of the queue did not fit, and nothing has left since
        self._stalled = 0
        self._spare = False  # some table may hold more than the next step writes
        self._left = 0  # sequences that have left since others were last admitted
        self._open = False  # admitting goes on until no more fit

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self._waiting or self._others or self._running)

    @property
    def decoding(self) -> np.ndarray:
        """Slots that decode."""
        return self._decode

    def at(self, slot: int) -> Running:
        """Return the sequence that runs in `slot`."""
        sequence = self._by_slot[slot]
        if sequence is None:
            raise RuntimeError(f"Scheduler: slot {slot} is empty; {self.describe()}")
        return sequence

    def check_fits(self, num_prompt: int, max_new_tokens: int) -> None:
        """Raise ValueError if a sequence would not fit into an empty cache."""
        # the last token drawn needs no keys and values
        need = self.blocks.blocks_for(num_prompt + max_new_tokens - 1)
        if need > self.blocks.total:
            raise ValueError(
                f"{num_prompt} prompt tokens and max_new_tokens={max_new_tokens} need {need} KV "
                f"blocks of {self.blocks.block_size} tokens, "
                f"and the cache has {self.blocks.total}; shorten the request or enlarge the cache "
                "(CacheConfig)"
            )

    def submit(self, sequences: list[Running]) -> None:
        """Queue sequences that fit (`check_fits`). Samples of one request must have consecutive
        ids."""
        self.slots.reserve(max((sequence.limit for sequence in sequences), default=0))
        for queue, adapted in ((self._waiting, self.adapted), (self._others, not self.adapted)):
            queue.extend(sequence for sequence in sequences if sequence.adapted is adapted)
            queue.sort(key=_order)
        self._blocked, self._open = False, True

    # ---- a step ----------------------------------------------------------------------------------
    def schedule(self, window: int = 1) -> Plan | None:
        """Plan what to compute next, for at most `window` steps. The tables in the plan have the
        blocks for everything that these steps write. Return None if blocks are short, and the
        tokens that are not yet read (`Slots.ahead`) may show that some are free.

        Raises:
            RuntimeError: several steps in a row found nothing to do while sequences wait; the
                message describes the state.
        """
        if self._others and not self._running and (self._draining or not self._waiting):
            self._waiting, self._others, self.adapted = (
                self._others,
                self._waiting,
                not self.adapted,
            )
            self._draining = self._blocked = False
        preempted = self._make_room_to_decode()
        if preempted is None:
            return None
        budget = self._budget - (0 if self._apart else len(self._decode))
        chunks: list[Chunk] = []
        copies: list[tuple[int, int]] = []
        for sequence in self._prefilling:
            if budget > 0:
                budget -= self._add_chunk(sequence, budget, chunks, copies)
        while budget > 0 and not preempted and self._admits() and (admitted := self._admit_next()):
            budget -= self._add_chunk(admitted, budget, chunks, copies)
        drawn = [
            member.slot
            for chunk in chunks
            if chunk.final
            for member in (chunk.sequence, *chunk.forks)
        ]
        decode = self._decode[:0] if chunks and self._apart else self._decode
        sampled = np.concatenate([decode, np.array(drawn, dtype=np.int64)]) if drawn else decode
        plan = Plan(decode, chunks, copies, sampled, 1 if chunks else self._look_ahead(window))
        self._stalled = 0 if len(plan.decode) or chunks or not self.busy else self._stalled + 1
        if self._stalled >= _STALLED_STEPS:
            raise RuntimeError(
                f"Scheduler: no progress in {self._stalled} steps; {self.describe()}"
            )
        return plan

    def complete(self, plan: Plan) -> None:
        """Note that the step ran, so that its keys and values are in the cache."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.stop
            self.blocks.commit(sequence.id, self.slots.tokens[sequence.slot, : chunk.stop].tolist())
            if chunk.final:
                self._prefilling.remove(sequence)
        if not (plan.chunks and self._apart):
            self._decode = plan.sampled
        elif len(plan.sampled):
            self._decode = np.concatenate([self._decode, plan.sampled])

    def finish(self, sequences: Iterable[Running]) -> None:
        """Remove sequences, whether they wait or run. Their columns then hold the tokens drawn so
        far."""
        leaving = set()
        for sequence in sequences:
            leaving.add(sequence.id)
            if sequence.id in self._running:
                self._release(sequence)
        for queue in (self._waiting, self._others):
            if any(sequence.id in leaving for sequence in queue):
                queue[:] = [sequence for sequence in queue if sequence.id not in leaving]

    def reach_further(self, slot: int, more: int) -> int:
        """Give a decoding sequence the blocks for up to `more` tokens behind its newest one, as far
        as blocks are free. Return for how many they suffice."""
        slots, sequence = self.slots, self.at(slot)
        length = int(slots.length[slot])
        if not self.blocks.grow(sequence.id, length + more):
            more = min(more, int(slots.held[slot]) - length)
        slots.set_table(slot, self.blocks.table(sequence.id))
        self._spare |= more > 0
        return more

    def describe(self) -> str:
        """Return the state in one line, for errors."""
        head = self._waiting[-1] if self._waiting else None
        queue = (
            f"{len(self._others)} wait for the adapter to be switched"
            if self._others
            else "none waits"
        )
        if head is not None:
            queue = (
                f"the next of {len(self._waiting)} waiting has {len(head.tokens)} tokens "
                f"({self.blocks.blocks_for(len(head.tokens))} blocks)"
            )
        running = ", ".join(
            f"#{s.id}: {self.slots.length[s.slot]} of {s.limit} tokens"
            for s in list(self._running.values())[:8]
        )
        return (
            f"{self.blocks.available} of {self.blocks.total} blocks and {len(self._free_slots)} of "
            f"{self.slots.count} slots are free; {queue}; "
            f"{len(self._running)} run ({running or 'none'}), {len(self._prefilling)} of them "
            "prefill"
        )

    # ---- parts -----------------------------------------------------------------------------------
    def _make_room_to_decode(self) -> bool | None:
        """Give a block to every decoding sequence whose next token starts a new block. If there are
        none left, move the newest sequence back to the queue. Return whether that was necessary;
        None if it would be, and tokens have to be read first."""
        slots, decode, preempted = self.slots, self._decode, False
        reach = np.minimum(slots.reach(decode), slots.limit[decode] - 1)
        due = reach > slots.held[decode]
        for slot, tokens in zip(decode[due].tolist(), reach[due].tolist(), strict=True):
            sequence = self._by_slot[slot]
            if sequence is not None:
                self._let_go(sequence)
            while sequence is not None and not self.blocks.grow(sequence.id, tokens):
                if self._give_back():
                    continue
                if slots.ahead.any():
                    return None
                self._requeue(next(reversed(self._running.values())))
                # the sequence that needs a block may have been the newest itself
                sequence, preempted = self._by_slot[slot], True
            if sequence is not None:
                slots.set_table(slot, self.blocks.table(sequence.id))
        return preempted

    def _let_go(self, sequence: Running) -> None:
        """Free the blocks of tokens that no layer sees any more. The next token to be computed is
        the last one drawn."""
        unseen = int(self.slots.length[sequence.slot]) - self._window
        if self._window and unseen >= self.blocks.block_size:
            tokens = self.slots.tokens[sequence.slot, :unseen]
            self.blocks.commit(sequence.id, tokens.tolist())
            self.blocks.release(sequence.id, unseen)

    def _look_ahead(self, window: int) -> int:
        """Give the decoding sequences the blocks that they write in up to `window` steps, as far as
        blocks are free. Return the number of steps for which they suffice."""
        slots, decode, size = self.slots, self._decode, self.blocks.block_size
        if window == 1 and not slots.ahead.any():
            return 1
        # the last token drawn needs no keys and values
        reach, last = slots.reach(decode), slots.limit[decode] - 1
        steps = min(window, int((last + 1 - reach).max(initial=0)))
        while steps > 1:
            need = np.minimum(reach + steps - 1, last)
            due = need > slots.held[decode]
            fresh = int((-(-need[due] // size) - slots.held[decode[due]] // size).sum())
            if fresh <= self.blocks.available:
                break
            steps //= 2
        else:
            return steps
        for slot, tokens in zip(decode[due].tolist(), need[due].tolist(), strict=True):
            sequence = self.at(slot)
            self.blocks.grow(sequence.id, tokens)
            slots.set_table(slot, self.blocks.table(sequence.id))
        self._spare |= bool(fresh)
        return steps

    def _give_back(self) -> bool:
        """Take back the unused blocks that `_look_ahead` gave, because other sequences need them
        now. Return whether there were any."""
        slots, decode, before = self.slots, self._decode, self.blocks.available
        size = self.blocks.block_size
        for slot in (
            decode[slots.held[decode] >= slots.reach(decode) + size].tolist() if self._spare else ()
        ):
            sequence = self.at(slot)
            self.blocks.shrink(sequence.id, int(slots.length[slot] + slots.ahead[slot]))
            slots.set_table(slot, self.blocks.table(sequence.id))
        self._spare = False
        return self.blocks.available > before

    def _admits(self) -> bool:
        """Whether it is time to admit sequences. While others decode and prefills run apart, it is
        as soon as one of `_BATCH` has left, or all that wait have a slot."""
        self._open |= (
            not self._apart
            or not len(self._decode)
            or self._left * _BATCH >= len(self._running)
            or len(self._waiting) <= len(self._free_slots)
        )
        return self._open

    def _admit_next(self) -> Running | None:
        """Admit the next waiting sequence (`_admit`). If it cannot be, admitting ends for now."""
        admitted = self._admit()
        if admitted is None:
            self._open, self._left = False, 0
        return admitted

    def _admit(self) -> Running | None:
        """Admit the next waiting sequence, with a slot and a table, and behind it the fresh samples
        of its request, each with a slot. Return the sequence, or None if it cannot be admitted."""
        if (
            self._blocked
            or not self._waiting
            or not self._free_slots
            or (self._draining and self._others)
        ):
            return None
        head = self._waiting[-1]
        members = [head]
        while len(members) < min(len(self._free_slots), len(self._waiting)) and self._forks_from(
            head, self._waiting[-1 - len(members)]
        ):
            members.append(self._waiting[-1 - len(members)])
        # Keep a block for each running sequence that may still grow, and one for each partial last
        # block that will be forked. Otherwise preemption would follow at once.
        partial = len(head.tokens) % self.blocks.block_size > 0
        running = np.array([one.slot for one in self._running.values()], dtype=np.int64)
        growing = int((self.slots.limit[running] - 1 > self.slots.held[running]).sum())
        keep = growing + (len(members) - 1) * partial if self._running else 0
        cached = self.blocks.allocate(
            head.id, head.tokens.tolist(), keep=keep, adapted=head.adapted
        )
        if cached is None and self._give_back():
            cached = self.blocks.allocate(
                head.id, head.tokens.tolist(), keep=keep, adapted=head.adapted
            )
        if cached is None:
            self._blocked = True
            return None
        del self._waiting[-len(members) :]
        for member in members:
            member.slot = self._free_slots.pop()
            self._by_slot[member.slot] = self._running[member.id] = member
            self.slots.put(member)
            member.leader = head if member is not head else None
        head.followers, head.computed = members[1:], cached
        self.slots.set_table(head.slot, self.blocks.table(head.id))
        self._prefilling.append(head)
        return head

    @staticmethod
    def _forks_from(head: Running, other: Running) -> bool:
        return (
            other.request is head.request
            and len(head.tokens) == len(other.tokens) == head.num_prompt
        )

    def _add_chunk(
        self, sequence: Running, budget: int, chunks: list[Chunk], copies: list[tuple[int, int]]
    ) -> int:
        length = len(sequence.tokens)
        stop = min(length, sequence.computed + budget)
        forks = []
        if stop == length:
            for follower in list(sequence.followers):
                pairs = self.blocks.fork(sequence.id, follower.id, length)
                if pairs is None and self._give_back():
                    pairs = self.blocks.fork(sequence.id, follower.id, length)
                if pairs is None:
                    self._requeue(follower)
                else:
                    copies += pairs
                    forks.append(follower)
                    follower.leader = None
                    self.slots.set_table(follower.slot, self.blocks.table(follower.id))
            sequence.followers.clear()
        chunks.append(Chunk(sequence, sequence.computed, stop, stop == length, tuple(forks)))
        return stop - sequence.computed

    def _requeue(self, sequence: Running) -> None:
        self._release(sequence)
        insort(self._waiting, sequence, key=_order)

    def _release(self, sequence: Running) -> None:
        """Take a running sequence off its slot and free its blocks."""
        slots, slot = self.slots, sequence.slot
        slots.take(sequence)
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        else:
            for follower in list(sequence.followers):
                self._requeue(follower)
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)
            else:
                self._decode = self._decode[self._decode != slot]
                self.blocks.commit(sequence.id, sequence.tokens[:-1].tolist())
            self.blocks.free(sequence.id)
        del self._running[sequence.id]
        self._by_slot[slot] = None
        self._free_slots.append(slot)
        slots.held[slot], slots.ahead[slot], slots.ids[slot] = 0, 0, -1
        self._left += 1
        sequence.slot, sequence.computed = -1, 0
        self._blocked = False
        self._draining = bool(self._others)


def _order(sequence: Running) -> tuple[int, int]:
    """Sort key: sequences with the most expected tokens last (the queue is popped from its end),
    then by id."""
    return sequence.limit, -sequence.id
