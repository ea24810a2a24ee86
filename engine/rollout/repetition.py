"""Measures of how repetitive completions are, computed on token ids. A reward model may like text
that repeats itself; a reader does not.

repeated triples    share of a completion's triples of tokens that occurred in it before: 1 -
                    distinct / all; 0 without any. Fresh text is near 0
loop                the completion ends in one block of 2 to 64 tokens three times over (a block of
                    one token, six times)
longest run         most times that one token comes in a row
distinct triples    of many completions together: distinct / all. Low also where every completion is
                    fresh but they are all the same
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST_BLOCK = 64


def trigrams(ids: Sequence[int]) -> np.ndarray:
    """Return [max(0, len - 2)] int64: the triples of a completion, each packed into one number. Ids
    must be below 2^21."""
    tokens = np.asarray(ids, dtype=np.int64)
    return tokens[:-2] << 42 | tokens[1:-1] << 21 | tokens[2:]


def repeated_share(ids: Sequence[int]) -> float:
    """Return the share of a completion's triples that occurred in it before."""
    keys = trigrams(ids)
    return 1.0 - _distinct(keys) / len(keys) if len(keys) else 0.0


def distinct_share(completions: Sequence[Sequence[int]]) -> float:
    """Return the number of distinct triples in all completions together, divided by the number of
    all their triples; 1 if there are none (Li et al., 2016, "distinct-n")."""
    keys = np.concatenate([np.zeros(0, dtype=np.int64), *map(trigrams, completions)])
    return _distinct(keys) / len(keys) if len(keys) else 1.0


def _distinct(keys: np.ndarray) -> int:
    ordered = np.sort(keys)
    return int((ordered[1:] != ordered[:-1]).sum()) + 1


def longest_run(ids: Sequence[int]) -> int:
    """Return the length of the longest run of one and the same token."""
    tokens = np.asarray(ids, dtype=np.int64)
    edges = (
        np.flatnonzero(np.concatenate([[True], tokens[1:] != tokens[:-1], [True]]))
        if len(tokens)
        else np.zeros(1, dtype=np.int64)
    )
    return int(np.diff(edges).max(initial=0))


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one block of 2 to 64 tokens, repeated three times. Leave out the
    token that ended the completion."""
    tokens = list(ids)
    return any(
        tokens[-2 * size :] == tokens[-3 * size : -size]
        for size in range(2, min(len(tokens) // 3, LONGEST_BLOCK) + 1)
    )
