"""Rank correlations against counts by hand."""

import itertools
import math
import random

import pytest

from fusedrl.engine.base.association import agreement, kendall, spearman

pytestmark = pytest.mark.cpu_only("numbers alone")


def test_by_hand():
    assert spearman([1, 2, 3], [10, 20, 300]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # ties: ranks 1.5 1.5 3 and 1 2 3
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert kendall([5, 5, 9], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    for one in (spearman, kendall):
        assert math.isnan(one([], []))
        assert math.isnan(one([1.0], [2.0]))
        assert math.isnan(one([1.0, 1.0], [1.0, 2.0]))


def test_kendall_is_a_count_over_pairs():
    rng = random.Random(0)
    x, y = ([rng.randrange(5) for _ in range(40)] for _ in range(2))
    pairs = list(itertools.combinations(range(40), 2))
    sign = [((x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])) for i, j in pairs]
    alike = sum(a * b for a, b in sign)
    untied = [sum(s[k] != 0 for s in sign) for k in (0, 1)]
    assert kendall(x, y) == pytest.approx(alike / math.sqrt(untied[0] * untied[1]))


def test_agreement_is_within_groups_and_over_pairs_that_both_order():
    x, y = [1, 2, 2, 9, 0], [1, 3, 4, 0, 5]
    # of the first group: (0,1) and (0,2) alike, (1,2) a tie; of the second: not alike
    assert agreement(x, y, [0, 0, 0, 1, 1]) == [(0, 1.0), (0, 1.0), (1, 0.0)]
