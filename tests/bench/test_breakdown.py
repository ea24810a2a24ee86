"""The clock of bench_breakdown.py: a part's time is its own, and what nobody times is the algorithm
layer's."""

import pytest
from bench import bench_breakdown
from bench.bench_breakdown import ALGORITHM, PARTS, Clock


@pytest.fixture
def ticks(monkeypatch):
    """Time that passes when told to."""
    now = [100.0]
    monkeypatch.setattr(bench_breakdown, "now", lambda: now[0])

    def pass_(seconds):
        now[0] += seconds

    return pass_


def test_what_is_called_within_and_timed_is_taken_off(ticks):
    clock = Clock()
    inner = clock.timed(lambda: ticks(3.0), "forward")
    untimed = clock.timed(lambda: ticks(0.5), "algorithm: loss")

    def outer():
        ticks(1.0)
        inner()
        untimed()
        ticks(1.0)

    clock.start()
    clock.timed(outer, "head")()
    ticks(4.5)  # nobody's
    clock.stop()
    (shares,) = clock.steps
    assert shares == {"forward": 30.0, "algorithm: loss": 5.0, "head": 20.0, ALGORITHM: 50.0}
    assert clock.medians(5) == {
        "algorithm %": 50.0,
        "forward %": 30.0,
        "head %": 20.0,
        "algorithm: loss %": 5.0,
    }


def test_a_call_that_fails_is_counted_and_leaves_the_clock_right(ticks):
    clock = Clock()

    def fails():
        ticks(2.0)
        raise KeyError

    def outer():
        with pytest.raises(KeyError):
            clock.timed(fails, "reward")()
        ticks(6.0)

    clock.start()
    clock.timed(outer, "generation")()
    clock.stop()
    assert clock.steps[0] == {"reward": 25.0, "generation": 75.0, ALGORITHM: 0.0}


def test_every_part_is_there_to_be_timed():
    """A function that moved would silently count as the algorithm layer's."""
    for owner, name, _ in PARTS:
        assert name in vars(owner), f"{owner} has no {name} of its own"
