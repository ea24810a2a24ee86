"""Mixture of several files as one endless stream, in proportion to their weights
(helpful@2,harmless@1).

    no weights      shuffled passes over the rows of all files together, as control.data_order has
                    them
    weights         blocks of L positions, in each of which file s has exactly n_s places, n_s / L =
                    its weight / the sum of weights. L is the smallest number up to 1000 for which
                    that is exact; else 1000, and n_s is rounded. Places within a block are
                    shuffled; each file goes through shuffled passes of its own, so a small file of
                    much weight comes round more often than a large one of little

The row at a position depends on (sizes, weights, seed, position) alone, so that a resumed run needs
only its step number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.base.ordering import data_order, shuffled
from fusedrl.engine.data.readers import Data, Source, parse_data

T = TypeVar("T")
LONGEST_BLOCK = 1000


class Mixture(Generic[T]):
    """Examples of several sources. `len` is the number of all examples. One pass of a mixture with
    weights has that many positions, but contains some rows more often than others.

    Raises:
        DataError: there is no source, a source is empty, the number of weights differs from that of
            sources, or a weight leaves a source less than one place in a thousand.
    """

    def __init__(
        self, sources: Sequence[Sequence[T]], weights: Sequence[float] | None = None
    ) -> None:
        self.sources = [list(source) for source in sources]
        self.examples = [example for source in self.sources for example in source]
        self.weights = None if weights is None or len(self.sources) == 1 else list(weights)
        if (
            not self.sources
            or not all(self.sources)
            or (weights is not None and len(weights) != len(self.sources))
        ):
            raise DataError(
                "mixture: expected non-empty sources and a weight for each or for none, got "
                f"{[len(source) for source in self.sources]} examples "
                f"and the weights {weights}"
            )
        self._places = [] if self.weights is None else _places(self.weights)

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, seed: int, start: int, stop: int) -> list[T]:
        """Return the examples at positions start .. stop of the stream."""
        if not self._places:
            return [
                self.examples[index] for index in data_order(len(self.examples), seed, start, stop)
            ]
        return [self.sources[source][row] for source, row in self._order(seed, start, stop)]

    def _order(self, seed: int, start: int, stop: int) -> list[tuple[int, int]]:
        block = [source for source, places in enumerate(self._places) for _ in range(places)]
        L = len(block)
        taken, cursors = list[int](), list[int]()
        for number in range(start // L, (stop - 1) // L + 1) if stop > start else ():
            order = [block[place] for place in shuffled(L, seed, "mixture", number)]
            first, last = max(0, start - number * L), min(L, stop - number * L)
            if not taken:  # how far each source has come at `start`
                cursors = [
                    number * places + order[:first].count(source)
                    for source, places in enumerate(self._places)
                ]
            taken += order[first:last]
        rows = [
            iter(
                data_order(
                    len(examples),
                    f"{seed} source {source}",
                    cursors[source],
                    cursors[source] + taken.count(source),
                )
            )
            for source, examples in enumerate(self.sources)
            if taken
        ]
        return [(source, next(rows[source])) for source in taken]

    def split(
        self, hold_out: Callable[[list[T]], tuple[list[T], list[T]]]
    ) -> tuple[Mixture[T], list[T]]:
        """Split each source by `hold_out`. Return the mixture of the remaining examples, and all
        examples held out."""
        parts = [hold_out(source) for source in self.sources]
        return Mixture([kept for kept, _ in parts], self.weights), [
            example for _, held in parts for example in held
        ]


def _places(weights: Sequence[float]) -> list[int]:
    """Return the number of places of each source in a block."""
    shares = [weight / sum(weights) for weight in weights]
    size = next(
        (
            n
            for n in range(1, LONGEST_BLOCK)
            if all(
                abs(n * share - round(n * share)) < 1e-9 and round(n * share) for share in shares
            )
        ),
        LONGEST_BLOCK,
    )
    places = [int(size * share + 1e-9) for share in shares]
    for index in sorted(range(len(shares)), key=lambda index: places[index] - size * shares[index])[
        : size - sum(places)
    ]:  # largest remainders
        places[index] += 1
    if not all(places):
        raise DataError(
            "mixture: expected weights of at least a thousandth of their sum, got "
            f"{list(weights)}; leave the file out, or raise its weight"
        )
    return places


def mix(data: Data, read: Callable[[Source], list[T]]) -> Mixture[T]:
    """Return the mixture that a --data option describes. `read` returns the examples of one file.
    If some files have a weight, the others get the weight 1."""
    sources = parse_data(data)
    weighted = any(source.weight is not None for source in sources)
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    return Mixture([read(source) for source in sources], weights if weighted else None)
