"""Estimates against enumeration and simulation."""

import math
import random
from itertools import combinations

import pytest

from fusedrl.engine.base.estimates import Estimate, Interval, pass_at_k, student_t, wilson_interval


def test_pass_at_k_is_the_share_of_all_choices():
    for samples in range(1, 8):
        for right in range(samples + 1):
            outcomes = [index < right for index in range(samples)]
            for k in range(1, samples + 1):
                chosen = [any(choice) for choice in combinations(outcomes, k)]
                assert pass_at_k(right, samples, k) == pytest.approx(sum(chosen) / len(chosen))


def test_pass_at_k_is_unbiased_and_the_plain_estimate_is_not():
    p, samples, k = 0.3, 5, 3
    truth = 1 - (1 - p) ** k
    chance = [
        math.comb(samples, right) * p**right * (1 - p) ** (samples - right)
        for right in range(samples + 1)
    ]
    assert sum(q * pass_at_k(right, samples, k) for right, q in enumerate(chance)) == pytest.approx(
        truth
    )
    assert (
        abs(sum(q * (1 - (1 - right / samples) ** k) for right, q in enumerate(chance)) - truth)
        > 0.02
    )


@pytest.mark.parametrize("arguments", [(1, 2, 0), (1, 2, 3), (3, 2, 1), (-1, 2, 1)])
def test_pass_at_k_refuses_what_is_no_choice(arguments):
    with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
        pass_at_k(*arguments)


def test_an_estimate_over_prompts():
    values = [1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 0.0, 0.0]  # prompts: 2, 5, nothing, 0
    found = Estimate.of(values, per=2)
    assert found.mean == pytest.approx(7 / 3)
    spread = math.sqrt(((2 - 7 / 3) ** 2 + (5 - 7 / 3) ** 2 + (7 / 3) ** 2) / 2)
    assert found.error == pytest.approx(spread / math.sqrt(3))
    assert math.isnan(Estimate.of([]).mean)
    assert math.isnan(Estimate.of([2.0, 4.0], per=2).error)
    assert Estimate.of([2.0, 4.0], per=2).mean == 3.0


def test_errors_over_prompts_cover_where_samples_of_a_prompt_are_alike():
    """Four samples of each of 30 prompts, which agree within the prompt: an error over samples
    would be half as large as it is."""
    rng = random.Random(1)
    covered, naive = 0, 0
    for _ in range(300):
        values = [
            level + 0.1 * rng.gauss(0, 1)
            for level in (rng.gauss(0, 1) for _ in range(30))
            for _ in range(4)
        ]
        covered += abs(Estimate.of(values, per=4).mean) < 1.96 * Estimate.of(values, per=4).error
        naive += abs(Estimate.of(values).mean) < 1.96 * Estimate.of(values).error
    assert 270 <= covered <= 297
    assert naive < 240


def test_wilson_covers_shares_and_means_of_probabilities():
    rng = random.Random(2)
    for draw in (lambda: float(rng.random() < 0.7), lambda: rng.choice([0.0, 0.5, 1.0, 1.0, 1.0])):
        covered = 0
        for _ in range(400):
            low, high = wilson_interval(sum(draw() for _ in range(40)), 40)
            covered += low <= 0.7 <= high
        assert covered >= 370
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0


def test_students_quantiles():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    for freedom, quantile in table.items():
        assert student_t(freedom) == pytest.approx(quantile, abs=2e-3)


def test_the_interval_of_a_mean_is_over_prompts():
    found = Interval.mean([1.0, 3.0, 5.0, 7.0], per=2)  # means 2 and 6
    assert (found.value, found.high - found.value) == pytest.approx((4.0, 12.7062 * 2.0))
    assert Interval.mean([1.0, math.nan, 5.0, 7.0], per=2).value == 3.5
    assert math.isnan(Interval.mean([1.0], per=1).low)
    assert Interval.mean([math.nan]).to_json() == {"value": None, "low": None, "high": None}


def test_intervals_cover():
    rng = random.Random(1)
    inside = {"mean": 0, "share": 0, "ratio": 0}
    for _ in range(400):
        tokens = [rng.randrange(1, 20) for _ in range(12)]
        losses = [t * 2.0 + rng.gauss(0, 1) * t for t in tokens]
        for name, found, truth in (
            ("mean", Interval.mean([rng.gauss(3, 2) for _ in range(8)]), 3.0),
            ("share", Interval.share([float(rng.random() < 0.3) for _ in range(30)]), 0.3),
            ("ratio", Interval.ratio(losses, tokens), 2.0),
        ):
            inside[name] += found.low <= truth <= found.high
    assert all(0.90 <= count / 400 <= 0.99 for count in inside.values()), inside


def test_a_ratio_of_sums():
    found = Interval.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found.value == 2.5
    spread = sum((x - 2.5 * y) ** 2 for x, y in ((2, 1), (4, 2), (9, 3))) * 3 / 2
    assert found.high - found.value == pytest.approx(4.30265 * math.sqrt(spread) / 6)
    assert math.isnan(Interval.ratio([0.0], [0.0]).value)
    assert math.isnan(Interval.ratio([1.0], [2.0]).low)
