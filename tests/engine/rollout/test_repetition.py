"""Repetition against its definitions, spelled out in plain loops."""

import random

import pytest

from fusedrl.engine.rollout.repetition import (
    distinct_share,
    ends_in_loop,
    longest_run,
    repeated_share,
    trigrams,
)


def _cases() -> list[list[int]]:
    rng = random.Random(0)
    drawn = [
        [rng.randrange(size) for _ in range(length)]
        for size in (1, 2, 5, 2**21)
        for length in (0, 1, 2, 3, 4, 7, 33)
    ]
    return [*drawn, [1, 2, 3] * 5, [7] * 9, [5, *[1, 2] * 3], list(range(100))]


def test_shares_against_sets():
    for ids in _cases():
        seen, repeated = set(), 0
        for start in range(len(ids) - 2):
            triple = tuple(ids[start : start + 3])
            repeated += triple in seen
            seen.add(triple)
        count = max(0, len(ids) - 2)
        unpacked = [
            (key >> 42, key >> 21 & (2**21 - 1), key & (2**21 - 1))
            for key in trigrams(ids).tolist()
        ]
        assert unpacked == [tuple(ids[i : i + 3]) for i in range(count)]
        assert repeated_share(ids) == pytest.approx(repeated / count if count else 0.0)
        assert distinct_share([ids]) == pytest.approx(len(seen) / count if count else 1.0)


def test_completions_that_are_all_the_same_are_distinct_within_and_not_between():
    same = [list(range(12))] * 8
    assert all(repeated_share(ids) == 0.0 for ids in same)
    assert distinct_share(same) == 1 / 8
    assert distinct_share([]) == distinct_share([[], [1]]) == 1.0
    assert distinct_share([[1, 2], [3, 4]]) == 1.0  # no triple runs from one into the next


def test_longest_run():
    for ids in _cases():
        longest = max((sum(1 for _ in run) for run in _runs(ids)), default=0)
        assert longest_run(ids) == longest


def _runs(ids):
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[start]:
            yield ids[start:i]
            start = i


def test_loops():
    def defined(ids):
        return any(
            ids[-size:] == ids[-2 * size : -size] == ids[-3 * size : -2 * size]
            for size in range(2, 65)
            if len(ids) >= 3 * size
        )

    for ids in _cases():
        assert ends_in_loop(ids) == defined(ids), ids
    assert ends_in_loop([9, 9, 1, 2, 1, 2, 1, 2])
    assert ends_in_loop([4] * 6)
    assert not ends_in_loop([4] * 5)  # very very very very very
    assert not ends_in_loop([1, 2, 1, 2, 1, 2, 3])  # the loop was left
    assert ends_in_loop(list(range(64)) * 3)
    assert not ends_in_loop(list(range(65)) * 3)
