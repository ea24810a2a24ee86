import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrl.engine.generation.blocks import BlockManager
from fusedrl.engine.generation.scheduler import Running, Scheduler

SIZE = 4


def next_token(tokens, sample):
    """The "model": what follows depends on every token before it, and on the sample."""
    return (hash(tuple(tokens)) + 31 * sample) % 3


class Simulator:
    """Runs a scheduler's plans on a cache that remembers what was written where, and checks that
    each token finds its whole prefix."""

    def __init__(
        self,
        num_blocks,
        max_sequences,
        budget,
        scheduler_type=Scheduler,
        window=1,
        looks=False,
        sees=0,
    ):
        """window: steps that a plan may be for. looks: the first sequence that ends ends the plan
        too; else those that ended wait for the others. sees: tokens that attention sees, 0: all."""
        self.scheduler = scheduler_type(
            BlockManager(num_blocks + 1, SIZE), max_sequences, budget, window=sees
        )
        self.window, self.looks, self.sees = window, looks, sees
        self.budget, self.cache = budget, {}
        self.done, self.next_id, self.steps, self.computed = {}, 0, 0, 0

    def submit(self, prompts):
        """prompts: (tokens, max_new, n). Returns the sequences."""
        made = []
        for tokens, max_new, n in prompts:
            request = object()
            for sample in range(n):
                made.append(
                    Running.start(
                        self.next_id,
                        request,
                        sample,
                        np.array(tokens, dtype=np.int64),
                        len(tokens) + max_new,
                    )
                )
                self.next_id += 1
        self.scheduler.submit(made)
        return made

    def compute(self, slot, position):
        """One token: write it, and see that everything before it is there, as far as it sees."""
        s = self.scheduler.slots
        tokens, table = s.tokens[slot, : position + 1].tolist(), s.block_table[slot]
        self.cache[table[position // SIZE], position % SIZE] = tuple(tokens)
        for p in range(max(0, position + 1 - self.sees) if self.sees else 0, position + 1):
            assert table[p // SIZE] != 0
            assert self.cache.get((table[p // SIZE], p % SIZE)) == tuple(tokens[: p + 1]), (
                f"slot {slot} reads at {p} what is not its own"
            )
        self.computed += 1

    def step(self):
        scheduler = self.scheduler
        plan, s = scheduler.schedule(self.window), scheduler.slots
        assert len(plan.decode) + sum(c.stop - c.start for c in plan.chunks) <= self.budget
        assert len(set(plan.sampled.tolist())) == len(plan.sampled)
        assert 1 <= plan.steps <= (1 if plan.chunks else self.window)
        for slot in plan.decode.tolist():
            self.compute(slot, int(s.length[slot]) - 1)
        for chunk in plan.chunks:
            assert chunk.start < chunk.stop
            for position in range(chunk.start, chunk.stop):
                self.compute(chunk.sequence.slot, position)
        for source, destination in plan.copies:
            for p in range(SIZE):
                if (source, p) in self.cache:
                    self.cache[destination, p] = self.cache[source, p]
        drew, done = plan.sampled, 0
        while len(drew) and done < plan.steps:
            going = drew[s.length[drew] < s.limit[drew]]
            for slot in going.tolist() if done else ():
                self.compute(slot, int(s.length[slot]) - 1)
            tokens = np.array(
                [
                    next_token(s.tokens[i, : s.length[i]].tolist(), scheduler.at(i).sample)
                    for i in going.tolist()
                ],
                dtype=np.int64,
            )
            s.append(going, tokens, -tokens.astype(np.float32), 0)
            done += 1
            if self.looks and (s.length[drew] >= s.limit[drew]).any():
                break
        scheduler.complete(plan)
        ended = [scheduler.at(i) for i in drew[s.length[drew] >= s.limit[drew]].tolist()]
        scheduler.finish(ended)
        for sequence in ended:
            assert sequence.id not in self.done
            self.done[sequence.id] = sequence
        self.steps += 1
        self.balance()

    def balance(self):
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        owners = [s for s in scheduler._running.values() if s.leader is None]
        assert set(blocks._tables) == {s.id for s in owners}
        assert len(scheduler._free_slots) + len(scheduler._running) == scheduler.slots.count
        for sequence in owners:
            table = blocks.table(sequence.id)
            row = scheduler.slots.block_table[sequence.slot, : len(table)].tolist()
            # the places of blocks that were released are not read again
            assert [block for block, own in zip(row, table, strict=True) if own] == list(
                filter(None, table)
            )
            assert scheduler.slots.held[sequence.slot] == len(table) * SIZE
            assert len(table) <= -(
                -max(scheduler.slots.length[sequence.slot] + self.window - 1, len(sequence.tokens))
                // SIZE
            )

    def drain(self):
        while self.scheduler.busy:
            self.step()
            assert self.steps < 5000

    def check_done(self, sequences):
        for sequence in sequences:
            tokens = sequence.tokens[: sequence.num_prompt].tolist()
            while len(tokens) < sequence.limit:
                tokens.append(next_token(tokens, sequence.sample))
            assert self.done[sequence.id].tokens.tolist() == tokens
            assert self.done[sequence.id].logp.tolist() == [0.0] * sequence.num_prompt + [
                -float(t) for t in tokens[sequence.num_prompt :]
            ]

    def check_empty(self):
        assert self.scheduler.blocks.available == self.scheduler.blocks.total
        assert len(self.scheduler._free_slots) == self.scheduler.slots.count
        assert not self.scheduler.busy


PROMPTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 14), st.integers(1, 4)
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    prompts=PROMPTS,
    num_blocks=st.integers(7, 40),
    slots=st.integers(1, 9),
    budget=st.integers(0, 12),
    window=st.integers(1, 9),
    looks=st.booleans(),
    sees=st.sampled_from([0, 0, 1, 2, 5, 6, 8, 17]),
    data=st.data(),
)
def test_every_plan_is_computable_and_every_sequence_ends_as_if_alone(
    prompts, num_blocks, slots, budget, window, looks, sees, data
):
    simulator = Simulator(num_blocks, slots, slots + budget, window=window, looks=looks, sees=sees)
    sequences = simulator.submit(prompts)
    for _ in range(data.draw(st.integers(0, 12))):
        if simulator.scheduler.busy:
            simulator.step()
    late = simulator.submit([([1, 2, 0, 1, 2], 5, 2)])
    aborted = data.draw(st.lists(st.sampled_from(sequences + late), unique_by=id, max_size=5))
    aborted = [s for s in aborted if s.id not in simulator.done]
    simulator.scheduler.finish(aborted)
    simulator.balance()
    gone = {s.id for s in aborted}
    simulator.drain()
    assert not gone & simulator.done.keys()
    simulator.check_done([s for s in sequences + late if s.id not in gone])
    simulator.check_empty()


# ---- bugs that the simulator has to catch --------------------------------------------------------
class ForgetsCopies(Scheduler):
    def schedule(self, window=1):
        plan = super().schedule(window)
        plan.copies.clear()
        return plan


class CommitsTheTokenNotComputed(Scheduler):
    def _release(self, sequence):
        if (
            sequence.leader is None
            and len(self.blocks.table(sequence.id)) * SIZE >= self.slots.length[sequence.slot]
        ):
            self.blocks.commit(
                sequence.id,
                self.slots.tokens[sequence.slot, : self.slots.length[sequence.slot]].tolist(),
            )
        super()._release(sequence)


class KeepsBlocksOfPreempted(Scheduler):
    def _requeue(self, sequence):
        free, self.blocks.free = self.blocks.free, lambda _: None
        super()._requeue(sequence)
        self.blocks.free = free


class LosesTokensOfPreempted(Scheduler):
    def _requeue(self, sequence):
        super()._requeue(sequence)
        sequence.tokens = sequence.tokens[: sequence.num_prompt]


class LooksTooFarAhead(Scheduler):
    def _look_ahead(self, window):
        super()._look_ahead(window)
        return window


class GivesBackTooMuch(Scheduler):
    def _give_back(self):
        self.slots.length -= 1
        try:
            return super()._give_back()
        finally:
            self.slots.length += 1


class LetsGoTooEarly(Scheduler):
    def _let_go(self, sequence):
        seen, self._window = self._window, self._window and self._window - SIZE
        super()._let_go(sequence)
        self._window = seen


def runs(scheduler_type):
    for seed in range(20):
        draw = np.random.default_rng(seed)
        simulator = Simulator(
            8,
            4,
            5,
            scheduler_type,
            window=1 + seed % 9,
            looks=bool(seed % 2),
            sees=(0, 6, 9)[seed % 3],
        )
        prompt = draw.integers(0, 2, 9).tolist()
        sequences = simulator.submit(
            [(prompt, 8, 3), (prompt, 11, 2), (draw.integers(0, 2, 6).tolist(), 12, 3)]
        )
        simulator.drain()
        # then a prompt that goes on from the whole of the sequence before it, which ended with a
        # full block
        for _ in range(2):
            sequences += simulator.submit([(prompt, 11, 1)])
            simulator.drain()
            prompt = [*sequences[-1].tokens.tolist(), 1]
        simulator.check_done(sequences)
        simulator.check_empty()
        # Many that end one after the other, at windows that were meant to be longer: what lay ahead
        # of the others goes to those that wait.
        simulator = Simulator(10, 5, 9, scheduler_type, window=9, looks=True)
        sequences = simulator.submit(
            [
                (draw.integers(0, 2, draw.integers(1, 7)).tolist(), int(draw.integers(1, 20)), 1)
                for _ in range(14)
            ]
        )
        simulator.drain()
        simulator.check_done(sequences)
        simulator.check_empty()


@pytest.mark.parametrize(
    "bug",
    [
        ForgetsCopies,
        CommitsTheTokenNotComputed,
        KeepsBlocksOfPreempted,
        LosesTokensOfPreempted,
        LooksTooFarAhead,
        GivesBackTooMuch,
        LetsGoTooEarly,
    ],
    ids=lambda bug: bug.__name__,
)
def test_the_simulator_catches(bug):
    runs(Scheduler)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        runs(bug)


# ---- policy --------------------------------------------------------------------------------------
def test_longest_first_and_groups_together():
    simulator = Simulator(40, 4, 64)
    short, long, middle = simulator.submit([([1], 3, 1), ([1, 2], 30, 1), ([2, 1], 9, 1)])
    group = simulator.submit([([0, 1, 2, 0, 1, 2], 12, 2)])
    simulator.step()
    assert list(simulator.scheduler._running) == [long.id, *(s.id for s in group), middle.id]
    assert simulator.computed == 2 + 6 + 2  # the group's prompt once
    assert short in simulator.scheduler._waiting
    simulator.drain()


def test_prefill_shares_a_step_with_decoding_under_the_budget():
    simulator = Simulator(40, 4, 6)
    first, second = simulator.submit([([1] * 4, 20, 1), ([2] * 13, 4, 1)])
    simulator.step()
    plan = simulator.scheduler.schedule()
    assert [(c.sequence, c.stop - c.start) for c in plan.chunks] == [(second, 5)]
    assert plan.decode.tolist() == [first.slot]


def test_preempts_the_newest_and_recomputes_it():
    simulator = Simulator(8, 3, 64)
    sequences = simulator.submit([([1, 1, 1], 20, 1), ([2, 2, 2], 19, 1), ([0, 0, 0], 18, 1)])
    preempted = []
    requeue = simulator.scheduler._requeue
    simulator.scheduler._requeue = lambda sequence: (
        preempted.append(sequence.id),
        requeue(sequence),
    )
    simulator.drain()
    assert preempted[0] == sequences[2].id
    assert sequences[0].id not in preempted
    simulator.check_done(sequences)
    simulator.check_empty()


def test_a_window_looks_ahead_and_gives_back_what_others_need():
    simulator = Simulator(9, 3, 64, window=9, looks=True)
    first, short = simulator.submit([([1, 1, 1, 1], 20, 1), ([2, 2, 2], 4, 1)])
    scheduler, blocks = simulator.scheduler, simulator.scheduler.blocks
    simulator.step()  # prefills, and draws one each
    plan = scheduler.schedule(9)
    assert plan.steps == 9
    # of 5 + 8 tokens, and of the 6 that are computed of 7
    assert [len(blocks.table(s.id)) for s in (first, short)] == [4, 2]
    simulator.step()
    assert simulator.done.keys() == {short.id}
    assert scheduler.slots.length[first.slot] == 8
    assert len(blocks.table(first.id)) == 4
    blocks.allocate(10**6, [7] * 4 * blocks.available)  # somebody takes all the rest
    (newer,) = simulator.submit([([0, 0, 0, 0], 3, 1)])
    scheduler._blocked = False
    plan = scheduler.schedule(9)
    assert [chunk.sequence for chunk in plan.chunks] == [newer]
    assert len(blocks.table(first.id)) == 2
    blocks.free(10**6)


def test_sequences_hold_no_more_than_layers_see():
    """With a window, blocks behind it serve others: nothing is preempted, and what was cached of
    them is found by a sequence that goes on."""
    computed, held = {}, {}
    for sees in (0, 8):
        simulator = Simulator(14, 4, 8, sees=sees)
        blocks = simulator.scheduler.blocks
        sequences = simulator.submit([([1, 2, first], 30, 1) for first in range(4)])
        most = 0
        while simulator.scheduler.busy:
            simulator.step()
            most = max(most, blocks.total - blocks.available)
        simulator.check_done(sequences)
        simulator.check_empty()
        computed[sees], held[sees] = simulator.computed, most
    assert computed[8] == 4 * 32, "each token once"
    assert computed[0] > computed[8]
    assert held == {0: 14, 8: 4 * (8 // SIZE + 1)}


def test_what_can_never_fit_is_refused_with_both_numbers():
    scheduler = Scheduler(BlockManager(5, SIZE), 2, 8)
    scheduler.check_fits(10, 7)  # the last of 17 tokens is never computed
    with pytest.raises(ValueError, match=r"need 5 KV blocks of 4 tokens, and the cache has 4"):
        scheduler.check_fits(10, 8)


def test_no_progress_raises_with_a_dump():
    simulator = Simulator(8, 2, 8)
    simulator.scheduler.blocks.allocate(10**6, [7] * 32)  # somebody holds the whole cache
    simulator.submit([([1, 2], 4, 1)])
    for _ in range(7):
        assert not simulator.scheduler.schedule().chunks
    with pytest.raises(
        RuntimeError,
        match=r"no progress in 8 steps; 0 of 8 blocks and 2 of 2 slots are free; the next of 1 "
        r"waiting has 2 tokens \(1 bl",
    ):
        simulator.scheduler.schedule()
