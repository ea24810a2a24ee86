"""Speculation: several tokens of a sequence in one step, where its next ones were guessed
(drafts.py). No bit of a completion depends on the guesses.

    position   p           p + 1    p + 2    p + 3       newest token, and three guessed ones
    input      t           a        b        c
    drawn      a           b        x        .           a and b were right: a, b and x are appended

Every position has a random number of its own, keyed by (seed, request, sample, position). The token
of a position is a function of that number and of the distribution, which depends on the tokens
before it. So a guess is right exactly if it is the token that the position draws, and no token has
to be rejected by chance: what is drawn behind right guesses is what would have been drawn one token
at a time. That holds to the bit where a row of a step does not depend on the rows beside it. So
speculation is only used on a CPU with the C++ kernels.

Shapes    R sequences, S rows: each sequence has one for its newest token, and one for each guess.

Keys and values of wrong guesses stay in the cache behind the newest token. They are written again,
by the tokens that were drawn, before anything reads them.

When it pays. A step of few rows takes the time of reading the weights. Rows add to it: on one CPU
thread with a model of 135 million parameters in float32 a step of 2, 4, 8, 16, 32 and 64 rows took
49, 54, 64, 75 to 90, 105 to 131 and 195 to 229 ms (bfloat16: 33, 34, 41, 60 to 73, 92 to 118 and
171 to 211). `allot` takes the guesses with the best chances as long as they raise the expected
number of tokens per time, and none where that would be by less than a twentieth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusedrl.engine.generation.drafts import Draft

MOST_SEQUENCES = 32  # with more of them a step is bound by arithmetic, and no guess pays
LONGEST = 15  # guesses of a sequence in one step
_LEAST_GAIN = 1.05  # of tokens per time: guessing takes time itself
_ROW_COST = 0.2  # of a row beside reading the weights, over the bytes of a weight


def row_cost(weight_bytes: int) -> float:
    """Return the time of a row, where reading weights of so many bytes each takes the time 1."""
    return _ROW_COST / weight_bytes


def allot(chances: Sequence[Sequence[float]], cost: float) -> list[int]:
    """Return how many guesses of each sequence to compute. `chances` are those of its guesses, each
    together with all before it; `cost` is `row_cost`."""
    rows = len(chances)
    best_first = sorted(
        ((chance, at) for at, row in enumerate(chances) for chance in row),
        key=lambda one: -one[0],
    )
    expected, taken = float(rows), 0
    best = _LEAST_GAIN * rows / (1 + cost * _computed(rows))
    for count, (chance, _) in enumerate(best_first, 1):
        expected += chance
        if (rate := expected / (1 + cost * _computed(rows + count))) > best:
            taken, best = count, rate
    lengths = [0] * rows
    for _, at in best_first[:taken]:
        lengths[at] += 1
    return lengths


def _computed(rows: int) -> int:
    """Return the rows that are computed for so many: the kernels take 2, 4, 8, or a multiple of
    16."""
    return -(-rows // 16) * 16 if rows > 8 else 1 << max(1, (rows - 1).bit_length())


class Guesses(NamedTuple):
    """The rows of a step with guesses.

    Attributes:
        sequence: [S], index of each row's sequence.
        offset: [S], positions behind the sequence's newest token.
        token_ids: [S], the guessed tokens; at offset 0 any number.
        first: [R], each sequence's first row.
        kinds: of each guess, for `Drafts.judge`; a list per sequence.
    """

    sequence: np.ndarray
    offset: np.ndarray
    token_ids: np.ndarray
    first: np.ndarray
    kinds: list[list[int]]

    @classmethod
    def of(cls, drafts: Sequence[Draft | None], lengths: Sequence[int]) -> Guesses:
        """Take the first `lengths` guesses of each sequence's draft."""
        rows = np.array(lengths, dtype=np.int64) + 1
        first = np.cumsum(rows) - rows
        sequence = np.repeat(np.arange(len(rows)), rows)
        offset = np.arange(len(sequence)) - first[sequence]
        token_ids = np.zeros(len(sequence), dtype=np.int64)
        kinds: list[list[int]] = []
        for at, (draft, length) in enumerate(zip(drafts, lengths, strict=True)):
            kinds.append([] if draft is None else draft.kinds[:length])
            if draft is not None:
                begin = int(first[at]) + 1
                token_ids[begin : begin + length] = draft.token_ids[:length]
        return cls(sequence, offset, token_ids, first, kinds)

    def right(self, drawn: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Return [R]: of each sequence's guesses the number of leading ones that were drawn.
        `drawn` and `ended` [S]: the token of each row, and whether it ends the sequence."""
        follows = np.zeros(len(drawn) + 1, dtype=bool)  # whether a row's token is the next row's
        follows[:-2] = (drawn[:-1] == self.token_ids[1:]) & (self.offset[1:] > 0) & ~ended[:-1]
        stops = np.flatnonzero(~follows)
        found: np.ndarray = stops[np.searchsorted(stops, self.first)] - self.first
        return found

    def behind(self, column: np.ndarray, steps: int) -> np.ndarray:
        """Return [steps, R]: the first rows of each sequence, from a column [S]. A sequence with
        fewer rows has any numbers behind them."""
        at = self.first + np.arange(steps)[:, None]
        found: np.ndarray = column[np.minimum(at, len(column) - 1)]
        return found
