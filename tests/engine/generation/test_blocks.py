import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fusedrl.engine.generation.blocks import BlockManager

SIZE = 2


class Collides(int):
    """A token whose hash says nothing: every cache key of the same length collides."""

    def __hash__(self):
        return 7


class Machine(RuleBasedStateMachine):
    """The manager against a naive model: `written` is what each block physically holds, `tokens`
    what each sequence must find there."""

    manager_type = BlockManager

    def __init__(self):
        super().__init__()
        self.manager = self.manager_type(8, SIZE)
        self.tokens = {}  # sequence -> its tokens
        # block -> list of (version, whole prefix up to and with the token), as a cache of keys and
        # values would hold them
        self.written = {}
        self.birth = {}  # sequence -> version of its first token
        self.adapted = {}  # sequence -> whether an adapter computes it
        self.next = 0
        self.version = 0

    def snapshot(self):
        m = self.manager
        return (
            list(m._free),
            list(m._references),
            list(m._keys),
            dict(m._cache),
            {s: list(t.blocks) for s, t in m._tables.items()},
        )

    def write(self, sequence, start):
        """What the model does: compute the tokens from `start` on and put them into the sequence's
        blocks."""
        tokens, table = self.tokens[sequence], self.manager.table(sequence)
        for t in range(start, len(tokens)):
            held = self.written.setdefault(table[t // SIZE], [None] * SIZE)
            held[t % SIZE] = (self.version, tuple(tokens[: t + 1]), self.adapted[sequence])

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        keep=st.integers(0, 3),
        commit=st.booleans(),
        adapted=st.sampled_from([True, True, False]),
    )
    def allocate(self, tokens, keep, commit, adapted):
        tokens = [Collides(t) for t in tokens]
        before, available = self.snapshot(), self.manager.available
        self.next += 1
        cached = self.manager.allocate(self.next, tokens, keep=keep, adapted=adapted)
        if cached is None:
            assert self.snapshot() == before
            # never refused by an empty pool
            assert -(-len(tokens) // SIZE) + keep > available - self.manager.total
            return
        assert self.manager.available >= keep
        assert cached < len(tokens)
        assert cached % SIZE == 0
        table = self.manager.table(self.next)
        # a hit holds these very tokens after this very prefix, by the present weights
        for t in range(cached):
            assert self.written[table[t // SIZE]][t % SIZE] == (
                self.version,
                tuple(tokens[: t + 1]),
                adapted,
            )
        self.tokens[self.next], self.birth[self.next], self.adapted[self.next] = (
            tokens,
            self.version,
            adapted,
        )
        self.write(self.next, cached)
        if commit:
            self.manager.commit(self.next, tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data, more):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        before, length = self.snapshot(), len(self.tokens[sequence])
        need = -(-(length + len(more)) // SIZE) - len(self.manager.table(sequence))
        fits = need <= self.manager.available
        assert self.manager.grow(sequence, length + len(more)) == fits
        if not fits:
            assert self.snapshot() == before
            return
        self.tokens[sequence] = [*self.tokens[sequence], *map(Collides, more)]
        self.write(sequence, length)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.integers(0, 9))
    def grow_ahead_and_shrink_back(self, data, more):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        length, before = len(self.tokens[sequence]), list(self.manager.table(sequence))
        if self.manager.grow(sequence, length + more):
            assert self.manager.table(sequence)[: len(before)] == before
            for block in self.manager.table(sequence)[len(before) :]:
                self.written.pop(block, None)
        self.manager.shrink(sequence, length)
        assert self.manager.table(sequence) == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        length = data.draw(st.integers(0, len(self.tokens[parent])))
        before, available = self.snapshot(), self.manager.available
        self.next += 1
        copies = self.manager.fork(parent, self.next, length)
        if copies is None:
            assert available == 0
            assert length % SIZE
            assert self.snapshot() == before
            return
        assert len(copies) == (1 if length % SIZE else 0)
        for source, destination in copies:
            self.written[destination] = list(self.written[source])
        self.tokens[self.next], self.birth[self.next], self.adapted[self.next] = (
            self.tokens[parent][:length],
            self.birth[parent],
            self.adapted[parent],
        )

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def commit(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        length = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.manager.commit(sequence, self.tokens[sequence][:length])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.manager.free(sequence)
        del self.tokens[sequence]
        with pytest.raises(ValueError, match="no table"):
            self.manager.free(sequence)

    @rule()
    def bump(self):
        self.manager.bump()
        self.version += 1

    @invariant()
    def books_balance(self):
        m = self.manager
        tables = {s: m.table(s) for s in self.tokens}
        counts = [0] * m.num_blocks
        for sequence, table in tables.items():
            assert len(table) == -(-len(self.tokens[sequence]) // SIZE)
            for block in table:
                counts[block] += 1
        assert counts == m._references
        assert counts[0] == 0  # the null block is never issued
        assert 0 not in m._free
        used = sum(c > 0 for c in counts)
        evictable = sum(m._keys[b] is not None for b in m._free)
        empty = sum(m._keys[b] is None for b in m._free)
        assert used + evictable + empty == m.total
        assert not any(counts[b] for b in m._free)
        for key, (block, _) in m._cache.items():
            assert m._keys[block] == key
            assert [entry and (entry[0], entry[1][-1]) for entry in self.written[block]] == [
                (key[0], token) for token in key[2]
            ]
        assert sum(key is not None for key in m._keys) == len(m._cache)

    @invariant()
    def blocks_hold_what_their_sequences_need(self):
        for sequence, tokens in self.tokens.items():
            table = self.manager.table(sequence)
            for t in range(len(tokens)):
                assert self.written[table[t // SIZE]][t % SIZE][1] == tuple(tokens[: t + 1])

    @invariant()
    def no_block_is_writable_by_two(self):
        writable = [
            self.manager.table(s)[-1] for s, tokens in self.tokens.items() if len(tokens) % SIZE
        ]
        assert all(self.manager._references[block] == 1 for block in writable)

    def teardown(self):
        for sequence in list(self.tokens):
            self.manager.free(sequence)
        assert self.manager.available == self.manager.total


RUN = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_against_a_naive_model():
    run_state_machine_as_test(Machine, settings=RUN)


# ---- bugs that the machine has to catch ----------------------------------------------------------
class ForgetsVersion(BlockManager):
    def bump(self):
        pass


class ForgetsTheAdapter(BlockManager):
    def allocate(self, sequence, tokens, *, keep=0, adapted=True):
        return super().allocate(sequence, tokens, keep=keep)


class SharesPartialBlock(BlockManager):
    def fork(self, parent, child, num_tokens):
        table = self._table(parent)
        copies = super().fork(parent, child, num_tokens)
        if copies:
            (source, destination), own = copies[0], self._tables[child].blocks
            own[-1] = source
            self._references[source] += 1
            self._references[destination] = 0
            self._free[destination] = None
            assert source in table.blocks
            return []
        return copies


class KeysWithoutPrefix(BlockManager):
    def _match(self, tokens, root):
        hits = []
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            piece = tuple(tokens[start : start + self.block_size])
            found = next(
                (
                    entry
                    for key, entry in self._cache.items()
                    if key[0] == self.version and key[2] == piece
                ),
                None,
            )
            if found is None:
                break
            hits.append(found[0])
        return hits, 0


class TrustsHashes(BlockManager):
    def _match(self, tokens, root):
        hits, serial = [], 0
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            wanted = hash((self.version, serial, tuple(tokens[start : start + self.block_size])))
            found = next((entry for key, entry in self._cache.items() if hash(key) == wanted), None)
            if found is None:
                break
            hits.append(found[0])
            serial = found[1]
        return hits, serial


class LeavesKeyOnReuse(BlockManager):
    def _take(self):
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        return block


class IssuesHitTwice(BlockManager):
    def allocate(self, sequence, tokens, *, keep=0, adapted=True):
        hits, _ = self._match(tokens, -1 if not adapted else 0)
        free = [b for b in hits if not self._references[b]]
        cached = super().allocate(sequence, tokens, keep=keep, adapted=adapted)
        if cached is not None:
            self._free.update(dict.fromkeys(free))
        return cached


class LosesABlock(BlockManager):
    def grow(self, sequence, num_tokens):
        while self.blocks_for(num_tokens) > len(self.table(sequence)):
            if not self._free:
                return False
            self.table(sequence).append(self._take())
        return True


class IgnoresDoubleFree(BlockManager):
    def free(self, sequence):
        if sequence in self._tables:
            super().free(sequence)


@pytest.mark.parametrize(
    "bug",
    [
        ForgetsVersion,
        ForgetsTheAdapter,
        SharesPartialBlock,
        KeysWithoutPrefix,
        TrustsHashes,
        LeavesKeyOnReuse,
        IssuesHitTwice,
        LosesABlock,
        IgnoresDoubleFree,
    ],
    ids=lambda bug: bug.__name__,
)
def test_the_machine_catches(bug):
    machine = type("Broken", (Machine,), {"manager_type": bug})
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        run_state_machine_as_test(
            machine, settings=settings(RUN, report_multiple_bugs=False, phases=RUN.phases[:3])
        )


# ---- by hand -------------------------------------------------------------------------------------
def test_prefix_hit_leaves_one_token_and_survives_its_owner():
    manager = BlockManager(8, 4)
    manager.allocate(1, range(8))
    manager.commit(1, range(8))
    manager.free(1)
    # the last token is computed again: its hidden state is wanted
    assert manager.allocate(2, range(8)) == 4
    assert manager.allocate(3, range(9)) == 8
    assert manager.table(3)[:1] == manager.table(2)[:1]
    assert manager.allocate(4, [0, 1, 2, 9, 4]) == 0


def test_cached_blocks_are_evicted_oldest_first_and_from_the_end():
    manager = BlockManager(5, 2)
    manager.allocate(1, [1, 2, 3, 4])
    manager.commit(1, [1, 2, 3, 4])
    first, second = manager.table(1)
    manager.free(1)
    manager.allocate(2, [9] * 6)
    assert second in manager.table(2)
    assert first not in manager.table(2)
    assert manager.allocate(3, [1, 2, 3]) is None  # one block left, which is the hit itself
    manager.free(2)
    assert manager.allocate(3, [1, 2, 3]) == 2


def test_ints_whose_hashes_collide_by_nature():
    manager = BlockManager(8, 1)
    assert hash(-1) == hash(-2)
    manager.allocate(1, [-1, 5])
    manager.commit(1, [-1, 5])
    assert manager.allocate(2, [-2, 5]) == 0


def test_a_table_that_lived_through_a_bump_is_not_cached():
    manager = BlockManager(8, 2)
    manager.allocate(1, [1])
    manager.bump()
    manager.grow(1, 4)
    manager.commit(1, [1, 2, 3, 4])
    manager.free(1)
    assert manager.allocate(2, [1, 2, 3, 4]) == 0


@pytest.mark.parametrize("bumps", [1, 2, 3])
def test_after_a_bump_warm_blocks_are_issued_first(bumps):
    """However many optimizer steps a rollout is followed by."""
    manager = BlockManager(12, 2)
    manager.allocate(1, [1, 2, 3, 4, 5])
    manager.commit(1, [1, 2, 3, 4, 5])
    used = list(manager.table(1))
    manager.free(1)
    for _ in range(bumps):
        manager.bump()
    manager.allocate(2, [6, 7, 8, 9, 10])
    assert set(manager.table(2)) == set(used)
    assert not manager._cache, "what can never be found again is not kept"


def test_released_blocks_are_free_and_still_found():
    manager, tokens = BlockManager(7, 2), list(range(10))
    manager.allocate(1, tokens)
    held = list(manager.table(1))
    manager.commit(1, tokens)
    manager.release(1, 5)
    assert (manager.available, manager.table(1)) == (3, [0, 0, *held[2:]])
    manager.release(1, 3)  # less than before: nothing to do
    manager.release(1, 7)
    assert (manager.available, manager.table(1)) == (4, [0, 0, 0, *held[3:]])
    with pytest.raises(ValueError, match="first 3 blocks were released"):
        manager.fork(1, 2, 5)
    manager.fork(1, 2, 8)
    manager.free(1)
    assert manager.available == 5
    manager.free(2)
    assert manager.available == 6
    assert manager.allocate(3, tokens) == 8, "found as long as nothing else took them"
    assert manager.table(3)[:4] == held[:4]


def test_a_prefix_whose_blocks_were_released_and_taken_is_not_found():
    manager, tokens = BlockManager(5, 2), list(range(8))
    manager.allocate(1, tokens)
    manager.release(1, 4)  # never committed: nothing of it can be found
    manager.commit(1, tokens)
    assert manager.allocate(2, [9, 9, 9]) == 0
    manager.free(1)
    manager.free(2)
    assert manager.allocate(3, tokens) == 0
    assert len(set(manager.table(3))) == 4


def test_refuses():
    with pytest.raises(ValueError, match="num_blocks >= 2"):
        BlockManager(1, 16)
    manager = BlockManager(4, 2)
    manager.allocate(1, [1, 2])
    with pytest.raises(ValueError, match="has a table already"):
        manager.allocate(1, [1])
    with pytest.raises(ValueError, match="hold fewer"):
        manager.fork(1, 2, 3)
    with pytest.raises(ValueError, match="no table"):
        manager.grow(7, 1)


@pytest.mark.parametrize("operations", [20_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_many_operations_leak_nothing(operations):
    draw, manager, live = random.Random(0), BlockManager(64, 4), {}
    for step in range(operations):
        kind = draw.random()
        if kind < 0.4 or not live:
            tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
            if manager.allocate(step, tokens) is not None:
                live[step] = tokens
            continue
        sequence = draw.choice(list(live))
        if kind < 0.6:
            if manager.grow(sequence, len(live[sequence]) + 3):
                live[sequence] = live[sequence] + [draw.randrange(3) for _ in range(3)]
        elif kind < 0.7:
            if manager.fork(sequence, step, len(live[sequence])) is not None:
                live[step] = live[sequence]
        elif kind < 0.999:
            manager.commit(sequence, live[sequence])
            manager.free(sequence)
            del live[sequence]
        else:
            manager.bump()
    for sequence in live:
        manager.free(sequence)
    assert manager.available == manager.total
    assert set(manager._references) == {0}
    assert len(manager._cache) <= manager.total
