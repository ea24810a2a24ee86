"""Lanes: how work is divided among ranks, and in which order its gradients are added up again.

A lane is a fixed share of the micro-batches. The number of lanes is a power of two, and which
micro-batches a lane gets depends only on their sizes. Each lane adds up its gradients in order, and
the lanes are added in one binary tree. A rank has neighbouring lanes, so it holds a subtree. The
rest of the tree is added across ranks, each parameter's gradient on the rank that owns it. With the
same lanes the sum has the same bits on 1, 2, 4 and 8 ranks.

    lanes       0   1   2   3   4   5   6   7
                 \\ /     \\ /     \\ /     \\ /       on 4 ranks: the first row on each, the others
                  \\_______/       \\_______/        between them
                      \\_______________/

Memory    log2(lanes / ranks) + 1 gradients in float32, and one more while it goes to its owners.
Bytes     (P - 1) / P of the gradients leave a rank, and as much of the new parameters comes in
          (Rajbhandari et al., 2020, ZeRO, stage 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fusedrl.engine.parallel.ranks import Ranks

_BUCKET = 1 << 24  # numbers that are sent to one owner at a time
Gradients = dict[str, Tensor]


def costs_of(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the cost of a forward and backward pass over each group of sequences, in arbitrary
    units: proportional to the tokens, plus a quadratic part for attention."""
    return [sum(lengths[b] * (4096 + lengths[b]) for b in group) for group in groups]


def deal(costs: Sequence[int], hands: int, most: int | None = None) -> list[list[int]]:
    """Deal items to hands, the most expensive first, each to the hand with the lowest cost so far;
    a hand takes at most `most` items. Each hand's items are in ascending order. The result depends
    only on the arguments.

    Among hands with the same cost, hands far apart come first one after the other, because
    neighbouring lanes belong to one rank.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    held = [0] * hands
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        open_ = [h for h in range(hands) if most is None or len(dealt[h]) < most]
        hand = min(open_, key=lambda h: (held[h], _reversed(h, hands), h))
        dealt[hand].append(item)
        held[hand] += costs[item]
    return [sorted(items) for items in dealt]


def _reversed(hand: int, hands: int) -> int:
    """Return the number with its bits in reverse order: 0 4 2 6 1 5 3 7 for 8 hands."""
    digits = max(1, (hands - 1).bit_length())
    return int(f"{hand:0{digits}b}"[::-1], 2)


def owners_of(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Assign each parameter to the rank that updates it. Parameters stay whole; the largest are
    assigned first, each to the rank that has the fewest elements."""
    dealt = deal(list(sizes.values()), ranks)
    names = list(sizes)
    return {names[item]: rank for rank, items in enumerate(dealt) for item in items}


def added(left: Gradients, right: Gradients) -> Gradients:
    """Return left + right, name by name, in left's memory. A name that only one of them has is
    taken over unchanged."""
    for name, gradient in right.items():
        if name in left:
            left[name] += gradient
        else:
            left[name] = gradient
    return left


class Tree:
    """Sum of the gradients of lanes, added as they arrive, like the digits of a binary counter.

    Args:
        ranks: ranks that share the lanes.
        owners: owner of every parameter, in the same order on all ranks.
        like: shapes and dtypes of the sums, by name.
    """

    def __init__(self, ranks: Ranks, owners: Mapping[str, int], like: Mapping[str, Tensor]) -> None:
        self._ranks, self._owners, self._like = ranks, owners, like
        self._held: list[tuple[int, Gradients]] = []  # (lanes in it, their sum)

    def take(self, gradients: Gradients) -> None:
        """Add the gradients of this rank's next lane. The tensors belong to the tree from now
        on."""
        lanes = 1
        while self._held and self._held[-1][0] == lanes:
            gradients = added(self._held.pop()[1], gradients)
            lanes *= 2
        self._held.append((lanes, gradients))

    @torch.no_grad()
    def result(self) -> tuple[Gradients, list[str]]:
        """Return the sums over all lanes for the parameters that this rank owns, and the names of
        all parameters that have a gradient on any rank. Errors are those of `Ranks.meet`."""
        total: Gradients = {}
        while self._held:  # a single sum, if the number of lanes is a power of two
            total = added(self._held.pop()[1], total)
        if self._ranks.size == 1:
            return total, [name for name in self._owners if name in total]
        names = list(self._owners)
        there = self._ranks.gather("gradients", [name in total for name in names])
        live = {name: [row[i] for row in there] for i, name in enumerate(names)}
        live = {name: on for name, on in live.items() if any(on)}
        found: Gradients = {}
        for bucket in self._buckets(list(live)):
            found |= self._exchanged(bucket, total, live)
        return found, list(live)

    def _buckets(self, names: Sequence[str]) -> list[list[list[str]]]:
        """Return [round][owner] -> names of one dtype, so many that a message has about `_BUCKET`
        numbers."""
        rounds: list[list[list[str]]] = []
        for dtype in dict.fromkeys(self._like[name].dtype for name in names):
            queues = [
                [n for n in names if self._owners[n] == o and self._like[n].dtype == dtype]
                for o in range(self._ranks.size)
            ]
            while any(queues):
                rounds.append([_taken(queue, self._like) for queue in queues])
        return rounds

    def _exchanged(
        self, bucket: list[list[str]], mine: Gradients, live: Mapping[str, Sequence[bool]]
    ) -> Gradients:
        """Return the sums of the bucket's parameters that this rank owns. Its gradients of the
        bucket's other parameters are freed."""
        like = next(self._like[name] for names in bucket for name in names)
        parts = [
            torch.cat([like.new_empty(0), *(self._flat(name, mine) for name in names)])
            for names in bucket
        ]
        arrived = self._ranks.to_owners("gradients", parts)
        owned = bucket[self._ranks.rank]
        sizes = [self._like[name].numel() for name in owned]
        sums: list[Gradients] = (
            [
                {
                    name: part.view(self._like[name].shape)
                    for name, part in zip(owned, flat.split(sizes), strict=True)
                    if live[name][rank]
                }
                for rank, flat in enumerate(arrived)
            ]
            if owned
            else []
        )
        while len(sums) > 1:  # neighbours first: the lanes' tree, continued
            sums = [
                added(sums[i], sums[i + 1]) if i + 1 < len(sums) else sums[i]
                for i in range(0, len(sums), 2)
            ]
        return sums[0] if sums else {}

    def _flat(self, name: str, mine: Gradients) -> Tensor:
        gradient = mine.pop(name, None)
        return (torch.zeros_like(self._like[name]) if gradient is None else gradient).reshape(-1)


def _taken(queue: list[str], like: Mapping[str, Tensor]) -> list[str]:
    """Take names off the queue until a message is full, at least one."""
    names: list[str] = []
    room = _BUCKET
    while queue and (not names or like[queue[0]].numel() <= room):
        room -= like[queue[0]].numel()
        names.append(queue.pop(0))
    return names


def send_parameters(
    ranks: Ranks, owners: Mapping[str, int], parameters: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Fill the parameters with these names, in place, with their owners' values."""
    if ranks.size == 1:
        return
    for owner in range(ranks.size):
        _send_from(ranks, owner, [n for n in names if owners[n] == owner], parameters)


def _send_from(
    ranks: Ranks, owner: int, names: Sequence[str], parameters: Mapping[str, Tensor]
) -> None:
    """Fill the parameters that one rank owns. All memory is allocated before the ranks meet."""
    for dtype in dict.fromkeys(parameters[name].dtype for name in names):
        queue = [name for name in names if parameters[name].dtype == dtype]
        messages = []
        while queue:
            messages.append(_taken(queue, parameters))
        counts = [sum(parameters[name].numel() for name in taken) for taken in messages]
        room = parameters[messages[0][0]].detach().new_empty(max(counts))
        with ranks.meeting("parameters"):
            for taken, count in zip(messages, counts, strict=True):
                flat, sizes = room[:count], [parameters[name].numel() for name in taken]
                parts = list(zip(taken, flat.split(sizes), strict=True))
                if owner == ranks.rank:
                    for name, part in parts:
                        part.view(parameters[name].shape).copy_(parameters[name].detach())
                ranks.from_owner("parameters", owner, flat)
                if owner != ranks.rank:
                    for name, part in parts:
                        parameters[name].copy_(part.view(parameters[name].shape))
