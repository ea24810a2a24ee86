"""How work is dealt out, and that sums over lanes are the same tree on any number of ranks: in one
process, whose ranks exchange by hand."""

import contextlib
import threading
from fractions import Fraction

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config.base import ParallelConfig
from fusedrl.engine.parallel import lanes as lanes_module
from fusedrl.engine.parallel.lanes import (
    Tree,
    added,
    costs_of,
    deal,
    messages,
    owners_of,
    send_parameters,
)
from fusedrl.engine.parallel.ranks import Ranks, lanes_of, world


@pytest.mark.parametrize("hands", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("items", [0, 1, 5, 64])
def test_everything_is_dealt_once_and_no_hand_has_much_more(items, hands):
    generator = torch.Generator().manual_seed(items)
    costs = torch.randint(1, 100, (items,), generator=generator).tolist()
    dealt = deal(costs, hands)
    assert sorted(item for hand in dealt for item in hand) == list(range(items))
    assert all(hand == sorted(hand) for hand in dealt)
    assert dealt == deal(costs, hands)
    held = [sum(costs[i] for i in hand) for hand in dealt]
    # longest first, to the emptiest: within 4/3 of the best there is (Graham, 1969)
    best = max([Fraction(sum(costs), hands), *costs[:1], *([max(costs)] if costs else [])])
    assert max(held, default=0) <= best * Fraction(4, 3) + (0 if items <= hands else 1)


def test_no_hand_has_more_than_its_share():
    dealt = deal([100, 1, 1, 1, 1, 1, 1], 2, 4)
    assert [len(hand) for hand in dealt] == [3, 4]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_few_items_are_spread_over_ranks_and_not_over_the_lanes_of_one(ranks):
    lanes = deal([5] * ranks, 8)
    each = 8 // ranks
    assert [sum(map(len, lanes[each * r : each * (r + 1)])) for r in range(ranks)] == [1] * ranks


def test_long_sequences_cost_more_than_as_many_tokens_in_short_ones():
    short, long = costs_of([100] * 10 + [1000], [range(10), [10]])
    assert short < long < 2 * short


def test_owners_have_about_as_much_each():
    sizes = {"embedding": 50, "a": 20, "b": 20, "c": 10, "d": 1}
    owners = owners_of(sizes, 2)
    held = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in (0, 1)]
    assert sorted(held) == [50, 51]
    assert set(owners_of(sizes, 1).values()) == {0}


class Together(Ranks):
    """Ranks of one process, a thread each, that exchange by hand."""

    def __init__(self, rank, size, lanes, table, barrier):
        super().__init__(rank, size, lanes)
        self._table, self._barrier = table, barrier

    def _all(self, value):
        self._table[self.rank] = value
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        return found

    def gather(self, what, value):
        return self._all(value)

    @contextlib.contextmanager
    def meeting(self, what):
        yield

    def to_owners(self, what, flat, sizes):
        return [theirs[self.rank].clone() for theirs in self._all(list(flat.split(sizes)))]

    def from_owner(self, what, owner, flat):
        flat.copy_(self._all(flat.clone())[owner])


def lanes_gradients(device, lane):
    """Of a lane: numbers of very different sizes, whose sum depends on its order; one parameter has
    a gradient in some lanes alone, one in none, one in two bytes less."""
    generator = torch.Generator().manual_seed(lane)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(device) * 10 ** (lane % 4)

    found = {"w": some(7, 5), "bias": some(3), "double": some(4).double()}
    return found | ({"rare": some(2, 2)} if lane in (1, 6) else {})


NAMES = {"w": (7, 5), "bias": (3,), "rare": (2, 2), "never": (5,), "double": (4,)}


def summed(ranks, device):
    like = {
        name: torch.zeros(
            shape, dtype=torch.float64 if name == "double" else torch.float32, device=device
        )
        for name, shape in NAMES.items()
    }
    owners = owners_of({name: x.numel() for name, x in like.items()}, ranks.size)
    tree, each = Tree(ranks, owners, like), ranks.lanes // ranks.size
    for lane in range(ranks.rank * each, (ranks.rank + 1) * each):
        tree.take(lanes_gradients(device, lane))
    return tree.result()


@pytest.mark.parametrize("bucket", [1 << 24, 6])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_sum_has_the_same_bits_on_any_number_of_ranks(size, bucket, device, monkeypatch):
    """With a small bucket, messages have parts of several parameters."""
    monkeypatch.setattr(lanes_module, "BUCKET", bucket)
    alone, live = summed(Ranks(lanes=8), device)
    assert set(live) == {"w", "bias", "rare", "double"} == set(alone)
    table, barrier, found = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        found[rank] = summed(Together(rank, size, 8, table, barrier), device)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(names == live for _, names in found)
    parts = [part for part, _ in found]
    assert sorted(name for part in parts for name in part) == sorted(live)  # each has one owner
    whole = {name: tensor for part in parts for name, tensor in part.items()}
    for name in live:
        assert torch.equal(whole[name], alone[name]), name
        exact = sum(
            g[name].double()
            for g in (lanes_gradients(device, lane) for lane in range(8))
            if name in g
        )
        torch.testing.assert_close(whole[name].double(), exact, rtol=1e-5, atol=1e-3)


def test_messages_have_every_number_once_and_none_is_long(monkeypatch):
    monkeypatch.setattr(lanes_module, "BUCKET", 8)
    like = {"big": torch.zeros(5, 5), "small": torch.zeros(3), "none": torch.zeros(0)}
    found = messages(like, like)
    assert found == [
        [("big", 0, 8)],
        [("big", 8, 16)],
        [("big", 16, 24)],
        [("big", 24, 25), ("small", 0, 3), ("none", 0, 0)],
    ]
    assert messages([], like) == []


def test_parameters_arrive_whole_in_short_messages(device, monkeypatch):
    monkeypatch.setattr(lanes_module, "BUCKET", 4)
    names = {"a": (3, 3), "b": (2,), "c": (7,)}
    owners = {"a": 0, "b": 1, "c": 1}
    table, barrier = [None] * 2, threading.Barrier(2)
    held = [
        {
            name: torch.full(shape, float(rank), device=device, dtype=torch.bfloat16)
            for name, shape in names.items()
        }
        for rank in (0, 1)
    ]
    threads = [
        threading.Thread(
            target=lambda rank=rank: send_parameters(
                Together(rank, 2, 2, table, barrier), owners, held[rank], list(names)
            )
        )
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for parameters in held:
        assert {name: p.unique().tolist() for name, p in parameters.items()} == {
            name: [owner] for name, owner in owners.items()
        }


def test_another_tree_gives_other_bits(device):
    """Else the test above could not fail."""
    tree, _ = summed(Ranks(lanes=8), device)
    in_a_row = {}
    for lane in range(8):
        in_a_row = added(in_a_row, lanes_gradients(device, lane))
    assert not torch.equal(tree["w"], in_a_row["w"])


def test_lanes_that_cannot_be_are_refused():
    for lanes in (0, 3, 6, -8):
        with pytest.raises(ConfigError, match=r"parallel.lanes a power of two"):
            ParallelConfig(lanes)
    assert (world().size, world().lanes) == (1, 1)
    asked = [(None, False, 1), (None, True, 1), (None, False, 4), (None, True, 4), (16, True, 4)]
    assert [lanes_of(*one) for one in asked] == [1, 1, 4, 8, 16]
    with pytest.raises(ConfigError, match="a multiple of the 3 ranks, got 8"):
        lanes_of(8, False, 3)
