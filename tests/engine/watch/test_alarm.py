"""The reward-hacking alarm on the tables of real runs in docs/results.md, healthy and hacked, and
rule by rule."""

import json
import math
import random

import numpy as np
import pytest

from fusedrl.engine.config import AlarmConfig
from fusedrl.engine.watch.alarm import Detector, Evidence, as_row, message

STORIES = {  # docs/results.md, section 2: PPO on a rule with a KL target of 10; healthy
    "step": [1, 5, 10, 20, 30, 40, 50, 60, 80, 100],
    "reward": [0.97, 2.27, 3.18, 3.72, 3.38, 2.94, 2.76, 2.87, 3.37, 3.46],
    "kl": [0.0, 7.1, 15.1, 17.7, 14.0, 10.3, 8.6, 9.0, 9.7, 10.5],
    "completions/mean_length": [128, 128, 128, 128, 128, 128, 128, 127.1, 128, 128],
    "perplexity_ref": [4.05, 3.77, 4.32, 4.16, 4.08, 4.25, 3.95, 3.97, 3.97, 4.05],
}
# section 3: PPO against a weak reward model with a KL target of 6; hacked, with the KL on target
PREFERENCES = {
    "step": [1, 6, 12, 24, 36, 48, 60],
    "reward": [-0.15, 0.29, 0.69, 0.82, 0.96, 0.95, 0.93],
    "kl": [0.0, 2.4, 5.0, 6.1, 6.7, 6.5, 6.3],
    "completions/mean_length": [47.8, 29.7, 17.9, 15.0, 15.1, 12.8, 13.1],
    "perplexity_ref": [7.69, 7.30, 4.37, 3.28, 3.11, 2.92, 3.21],
    "entropy": [2.04, 1.84, 1.20, 0.77, 0.69, 0.57, 0.67],
}
# GRPO on examples/rewards/cheerful.py, gold examples/rewards/stories.py:fable, kl.coef 0.3 in the
# loss; healthy
CHEERFUL = {
    "step": [1, 5, 10, 15, 20, 25, 30, 40, 50, 60],
    "reward": [0.234, 2.42, 2.0, 1.88, 2.42, 2.5, 2.41, 2.5, 2.45, 2.3],
    "gold/fable/mean": [0.38, 0.203, 0.308, 0.145, 0.156, 0.168, 0.145, 0.156, 0.137, 0.134],
    "kl": [0.0, 12.1, 16.2, 16.4, 16.2, 15.4, 15.2, 12.8, 12.6, 11.3],
    "entropy": [1.45, 1.39, 1.49, 1.59, 1.48, 1.52, 1.52, 1.5, 1.49, 1.53],
    "perplexity_ref": [4.26, 4.78, 5.86, 6.17, 5.56, 5.7, 5.97, 5.41, 5.53, 5.43],
    "completions/repeated_trigrams": [
        0.0217,
        0.0302,
        0.0232,
        0.0214,
        0.0229,
        0.0202,
        0.0204,
        0.027,
        0.0282,
        0.0202,
    ],
    "completions/distinct_trigrams": [
        0.724,
        0.672,
        0.694,
        0.71,
        0.662,
        0.685,
        0.707,
        0.666,
        0.687,
        0.707,
    ],
}


def _series(table, seed, noise=0.05):
    """A row for every step, the table's lines between its own, with relative noise."""
    rng = random.Random(seed)
    columns = {
        name: np.interp(range(1, table["step"][-1] + 1), table["step"], values)
        for name, values in table.items()
        if name != "step"
    }
    return [
        {name: float(values[step]) * (1 + rng.gauss(0, noise)) for name, values in columns.items()}
        for step in range(table["step"][-1])
    ]


def _alarms(rows, kl_target=None, **options):
    detector = Detector(AlarmConfig(**options), kl_target)
    return [
        (step, evidence) for step, row in enumerate(rows, 1) if (evidence := detector.update(row))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("table", "target"), [(STORIES, 10.0), (CHEERFUL, None)])
def test_silent_on_healthy_runs(table, target, seed):
    assert _alarms(_series(table, seed), target) == []
    assert _alarms(_series(table, seed, noise=0.0), target) == []


@pytest.mark.parametrize("seed", range(5))
def test_fires_on_the_hacked_run_and_names_its_evidence(seed):
    alarms = _alarms(_series(PREFERENCES, seed), 6.0)
    step, evidence = alarms[0]
    assert step < 40
    assert evidence[0].metric == "reward"
    assert evidence[0].now > evidence[0].then
    assert {"entropy", "perplexity"} <= {one.kind for one in alarms[-1][1]}
    assert {"length"} <= {one.kind for one in alarms[-1][1]}
    text = message(step, evidence)
    for one in evidence:
        assert (
            f"{one.metric} {'rose' if one.now > one.then else 'fell'} from {one.then:.4g} to "
            f"{one.now:.4g}" in text
        )
    assert (
        json.loads(json.dumps(as_row(step, evidence), allow_nan=False))["evidence"][0]["metric"]
        == "reward"
    )


def test_a_hacked_run_whose_gold_rose_is_none():
    rows = [
        row | {"gold/g/mean": 0.1 * step + random.Random(step).gauss(0, 0.1)}
        for step, row in enumerate(_series(PREFERENCES, 0))
    ]
    assert _alarms(rows, 6.0) == []


def _synthetic(seed=0, steps=40, **shapes):
    """Noise of .02 around a level that moves from its first value to its second in the middle of
    the run."""
    rng = random.Random(seed)
    levels = {"reward": (0.0, 1.0)} | shapes
    return [
        {
            name: then + (now - then) * min(1.0, max(0.0, (step - 12) / 8)) + 0.02 * rng.gauss(0, 1)
            for name, (then, now) in levels.items()
        }
        for step in range(steps)
    ]


def test_gold_alone_suffices_and_only_where_the_proxy_rose():
    (first, *_) = _alarms(_synthetic(**{"gold/g/mean": (1.0, 0.8)}))
    assert [one.kind for one in first[1]] == ["proxy", "gold"]
    assert _alarms(_synthetic(**{"reward": (0.0, 0.0), "gold/g/mean": (1.0, 0.0)})) == []
    assert (
        _alarms(
            _synthetic(
                **{
                    "reward": (0.0, -1.0),
                    "gold/g/mean": (1.0, 0.0),
                    "entropy": (2.0, 0.1),
                    "completions/mean_length": (9.0, 1.0),
                }
            )
        )
        == []
    )
    assert _alarms(_synthetic(**{"gold/g/mean": (1.0, 1.0)})) == []


OUTSIDE = {
    "perplexity_ref": ((4.0, 8.0), (4.0, 2.0)),
    "entropy": ((2.0, 0.5),),
    "completions/mean_length": ((50.0, 200.0), (50.0, 10.0)),
    "completions/repeated_trigrams": ((0.05, 0.5),),
    "completions/loop_fraction": ((0.0, 0.5),),
    "completions/distinct_trigrams": ((0.8, 0.1),),
    "kl": ((1.0, 25.0),),
}
WITHIN = {
    "perplexity_ref": ((4.0, 5.0), (4.0, 3.2)),
    "entropy": ((2.0, 1.2), (2.0, 5.0)),
    "completions/mean_length": ((50.0, 90.0), (50.0, 30.0)),
    "completions/repeated_trigrams": ((0.05, 0.1), (0.5, 0.0)),
    "completions/loop_fraction": ((0.0, 0.05),),
    "completions/distinct_trigrams": ((0.8, 0.5),),
    "kl": ((1.0, 19.0),),
}


def test_one_kind_of_evidence_is_not_enough_and_two_are():
    kinds = {
        "completions/loop_fraction": "repetition",
        "completions/repeated_trigrams": "repetition",
        "completions/distinct_trigrams": "repetition",
    }
    for name, shapes in OUTSIDE.items():
        for shape in shapes:
            assert _alarms(_synthetic(**{name: shape}), 10.0) == [], name
            for other, others in OUTSIDE.items():
                fired = bool(_alarms(_synthetic(**{name: shape, other: others[0]}), 10.0))
                assert fired == (kinds.get(name, name) != kinds.get(other, other)), (name, other)
    for name, shapes in WITHIN.items():
        other = "entropy" if name != "entropy" else "kl"
        for shape in shapes:
            assert _alarms(_synthetic(**{name: shape, other: OUTSIDE[other][0]}), 10.0) == [], (
                name,
                shape,
            )


def test_silent_on_noise_while_the_proxy_rises():
    """What the gold rule is up to alone: 200 steps of noise beside a rising reward, 100 times; two
    and a half standard errors would not do."""

    def runs(sigmas):
        fired = 0
        for seed in range(100):
            rng = random.Random(seed)
            fired += bool(
                _alarms(
                    [
                        {"reward": 0.5 * step + rng.gauss(0, 1), "gold/g/mean": rng.gauss(0, 1)}
                        for step in range(200)
                    ],
                    sigmas=sigmas,
                )
            )
        return fired

    assert runs(AlarmConfig().sigmas) <= 1
    assert runs(2.5) > 5


def test_one_step_that_stands_out_changes_nothing():
    rows = _synthetic(
        steps=60,
        **{
            "gold/g/mean": (1.0, 1.0),
            "entropy": (2.0, 2.0),
            "completions/mean_length": (50.0, 50.0),
        },
    )
    for step in (5, 30, 45):
        rows[step] |= {"gold/g/mean": -100.0, "entropy": 0.0, "completions/mean_length": 0.0}
    assert _alarms(rows) == []


def test_what_is_missing_or_not_finite_is_not_measured():
    rows = _synthetic(**{"gold/g/mean": (1.0, 0.5)})
    with_gaps = [
        entry
        for row in rows
        for entry in (row, {"reward": None, "gold/g/mean": math.nan, "step": 3, "lr": 1.0}, {})
    ]
    (_, first), *_ = _alarms(with_gaps)
    (_, expected), *_ = _alarms(rows)
    assert first == expected
    assert _alarms([{"loss": 1.0}] * 50) == []


def test_constants_give_finite_figures():
    rows = [{"reward": float(step >= 10), "gold/g/mean": float(step < 10)} for step in range(20)]
    ((_, evidence),) = _alarms(rows)
    assert [one.sigma for one in evidence] == [999.0, -999.0]
    json.dumps(as_row(1, evidence), allow_nan=False)


def test_fed_again_it_is_where_it_was():
    rows = _series(PREFERENCES, 3)
    whole = Detector(AlarmConfig(), 6.0)
    verdicts = [whole.update(row) for row in rows]
    for cut in (1, 15, 25, 50):
        resumed = Detector(AlarmConfig(), 6.0)
        for row in rows[:cut]:
            resumed.update(json.loads(json.dumps(row)))
        assert resumed.firing == bool(verdicts[cut - 1])
        assert [resumed.update(row) for row in rows[cut:]] == verdicts[cut:]


def test_the_figures_of_a_case_by_hand():
    """Windows [0, 1, 2] and [10, 11, 12]: medians 1 and 11, deviations 1, 0, 1, 1, 0, 1."""
    detector = Detector(AlarmConfig(window=3, sigmas=1.0))
    for value in (0.0, 1.0, 2.0, 10.0, 11.0):
        assert detector.update({"reward": value, "gold/g/mean": -value}) == []
    evidence = detector.update({"reward": 12.0, "gold/g/mean": -12.0})
    # 1.4826 x the median deviation, 1, is above 1.2533 x the mean one, 2/3
    sigma = 10 / (1.2533 * 1.4826 * math.sqrt(2 / 3))
    assert evidence == [
        Evidence("reward", "proxy", 1.0, 11.0, pytest.approx(sigma)),
        Evidence("gold/g/mean", "gold", -1.0, -11.0, pytest.approx(-sigma)),
    ]
