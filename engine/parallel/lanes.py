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

Memory    log2(lanes / ranks) + 1 gradients in float32, and two messages for each rank.
Bytes     (P - 1) / P of the gradients leave a rank, and as much of the new parameters comes in
          (Rajbhandari et al., 2020, ZeRO, stage 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from fusedrl.engine.base.packing import cost_of
from fusedrl.engine.parallel.ranks import Ranks

BUCKET = 1 << 24  # numbers that are sent to one owner at a time
Gradients = dict[str, Tensor]
Piece = tuple[str, int, int]  # part of a parameter: its name, first number and last, exclusive
K = TypeVar("K")


def costs_of(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the cost of a forward and backward pass over each group of sequences, in the units of
    `cost_of`."""
    return [sum(cost_of(lengths[b]) for b in group) for group in groups]


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


def added(left: dict[K, Tensor], right: dict[K, Tensor]) -> dict[K, Tensor]:
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
        total = {name: gradient.contiguous() for name, gradient in total.items()}
        found: Gradients = {}
        for bucket in self._buckets(list(live)):
            for (name, start, stop), summed in self._exchanged(bucket, total, live).items():
                if name not in found:
                    # what was sent from here is free to be overwritten
                    own, shape = total.get(name), self._like[name].shape
                    found[name] = self._like[name].new_empty(shape) if own is None else own
                found[name].view(-1)[start:stop] = summed
        return found, list(live)

    def _buckets(self, names: Sequence[str]) -> list[list[list[Piece]]]:
        """Return [round][owner] -> pieces of parameters of one dtype, at most `BUCKET` numbers for
        each owner."""
        rounds: list[list[list[Piece]]] = []
        for dtype in dict.fromkeys(self._like[name].dtype for name in names):
            queues = [
                messages(
                    [n for n in names if self._owners[n] == o and self._like[n].dtype == dtype],
                    self._like,
                )
                for o in range(self._ranks.size)
            ]
            rounds += [list(one) for one in zip_longest(*queues, fillvalue=[])]
        return rounds

    def _exchanged(
        self, bucket: list[list[Piece]], mine: Gradients, live: Mapping[str, Sequence[bool]]
    ) -> dict[Piece, Tensor]:
        """Return the sums of the bucket's pieces that this rank owns. Its gradients of the
        bucket's other parameters are freed once their last piece is sent."""
        like = next(self._like[name] for name, _, _ in chain(*bucket))
        sizes = [sum(stop - start for _, start, stop in pieces) for pieces in bucket]
        flat = torch.cat([like.new_empty(0), *(self._cut(piece, mine) for piece in chain(*bucket))])
        arrived = self._ranks.to_owners("gradients", flat, sizes)
        owned = bucket[self._ranks.rank]
        for name, _, stop in (
            piece for pieces in bucket if pieces is not owned for piece in pieces
        ):
            if stop == self._like[name].numel():
                mine.pop(name, None)
        sums = [
            {
                piece: part
                for piece, part in zip(
                    owned, theirs.split([stop - start for _, start, stop in owned]), strict=True
                )
                if live[piece[0]][rank]
            }
            for rank, theirs in enumerate(arrived)
            if owned
        ]
        while len(sums) > 1:  # neighbours first: the lanes' tree, continued
            sums = [
                added(sums[i], sums[i + 1]) if i + 1 < len(sums) else sums[i]
                for i in range(0, len(sums), 2)
            ]
        return sums[0] if sums else {}

    def _cut(self, piece: Piece, mine: Gradients) -> Tensor:
        name, start, stop = piece
        if name in mine:
            return mine[name].view(-1)[start:stop]
        return torch.zeros(
            stop - start, dtype=self._like[name].dtype, device=self._like[name].device
        )


def messages(names: Iterable[str], like: Mapping[str, Tensor]) -> list[list[Piece]]:
    """Cut parameters into messages of `BUCKET` numbers, the last one shorter. A parameter that does
    not fit goes on in the next message, so buffers do not depend on the largest."""
    found: list[list[Piece]] = []
    room = 0
    for name in names:
        start, numel = 0, like[name].numel()
        while start < numel or numel == 0:
            if not room:
                found.append([])
                room = BUCKET
            stop = min(numel, start + room)
            found[-1].append((name, start, stop))
            start, room = stop, room - (stop - start)
            if not numel:
                break
    return found


def buffer_bytes(numbers: int, ranks: int, itemsize: int = 4) -> int:
    """Return the bytes that an exchange of so many numbers needs beside them, at most: one message
    for each owner, out and in."""
    return 0 if ranks == 1 else 2 * min(numbers, ranks * BUCKET) * itemsize


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
        of_dtype = [name for name in names if parameters[name].dtype == dtype]
        sent = messages(of_dtype, parameters)
        views = {name: parameters[name].detach().view(-1) for name in of_dtype}
        counts = [sum(stop - start for _, start, stop in pieces) for pieces in sent]
        room = views[of_dtype[0]].new_empty(max(counts))
        with ranks.meeting("parameters"):
            for pieces, count in zip(sent, counts, strict=True):
                flat = room[:count]
                parts = flat.split([stop - start for _, start, stop in pieces])
                cuts = [views[name][start:stop] for name, start, stop in pieces]
                if owner == ranks.rank:
                    for part, cut in zip(parts, cuts, strict=True):
                        part.copy_(cut)
                ranks.from_owner("parameters", owner, flat)
                if owner != ranks.rank:
                    for part, cut in zip(parts, cuts, strict=True):
                        cut.copy_(part)
