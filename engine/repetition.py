"""How repetitive completions are, on token ids: text that says the same again earns nothing from a reader, whatever a reward model says.

    repeated n-grams    share of a completion's n-grams that occurred in it before: 1 - distinct / all; 0 for fewer than n tokens. Fresh text is near 0
    loop                the completion ends in one block of 2 to 64 tokens three times over (a block of one token, six times)
    longest run         most times that one token comes in a row
    distinct n-grams    of many completions together: distinct / all. Low also where every completion is fresh but they are all the same
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST_BLOCK = 64


def ngrams(ids: Sequence[int], n: int = 3) -> np.ndarray:
    """[max(0, len - n + 1), n] the n-grams of a completion, one a row."""
    tokens = np.asarray(ids, dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, n) if len(tokens) >= n else np.zeros((0, n), dtype=np.int64)


def repeated_share(ids: Sequence[int], n: int = 3) -> float:
    """Share of the n-grams that occurred before in the completion."""
    rows = ngrams(ids, n)
    return 1.0 - _distinct(rows) / len(rows) if len(rows) else 0.0


def distinct_share(completions: Sequence[Sequence[int]], n: int = 3) -> float:
    """Distinct n-grams of all completions together, over all of them; 1 without any (Li et al., 2016, "distinct-n")."""
    rows = np.concatenate([ngrams(ids, n) for ids in completions]) if completions else np.zeros((0, n))
    return _distinct(rows) / len(rows) if len(rows) else 1.0


def _distinct(rows: np.ndarray) -> int:
    ordered = rows[np.lexsort(rows.T)]
    return int((ordered[1:] != ordered[:-1]).any(1).sum()) + min(1, len(ordered))


def longest_run(ids: Sequence[int]) -> int:
    """Most times that one token comes in a row."""
    tokens = np.asarray(ids, dtype=np.int64)
    edges = np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1], [True]])) if len(tokens) else np.zeros(1, dtype=np.int64)
    return int(np.diff(edges).max(initial=0))


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one block of 2 to 64 tokens three times. Give it the tokens without the one that ended the completion."""
    tokens = list(ids)
    return any(tokens[-2 * size:] == tokens[-3 * size:-size] for size in range(2, min(len(tokens) // 3, LONGEST_BLOCK) + 1))
