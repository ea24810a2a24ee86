"""Environments: their contract, in this process and in workers; what they do to their process costs
their trajectory alone, and others that lived there go on as if nothing had happened."""

import random
import time

import pytest

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.hosted import Wrong, reset_answer, step_answer
from fusedrl.engine.rewards.pool import Workers

pytestmark = pytest.mark.cpu_only("environments are Python")
SECONDS = 2.0
GAMES = """
import asyncio, ctypes, os, random, time
import numpy as np

class Counts:
    def reset(self, row, seed):
        self.drawn, self.seen = [random.Random(seed).random()], []
        row["prompt"] = "written over"
        return [{"role": "user", "content": row["question"]}]

    def step(self, completion):
        self.seen.append(completion)
        self.drawn += [random.random(), np.random.rand()]
        if completion == "crashes":
            ctypes.string_at(0)
        if completion == "hangs":
            time.sleep(100)
        if completion == "exits":
            raise SystemExit(3)
        if completion == "raises":
            return 1 / 0
        text = f"{self.drawn} {self.seen} {completion}"
        return {"role": "tool", "content": text}, len(self.seen), completion == "ends", {"n": 2}

class Waits(Counts):
    async def step(self, completion):
        await asyncio.sleep(100 if completion == "waits" else 0.05)
        found, *rest = super().step(completion)
        # others have drawn from the process's generators meanwhile
        return {"role": "tool", "content": f"{self.drawn[0]} {self.seen}"}, *rest

class Forgetful(Counts):
    def reset(self, row):
        self.pid = os.getpid()
        return row["question"]

    def step(self, completion):
        if completion == "crashes":
            os._exit(3)
        return str(self.pid), 0, False

class Hidden(Counts):
    def step(self, completion):
        return asyncio.sleep(0)

class Closes(Counts):
    def close(self):
        print("closed", flush=True)

class Needs:
    def __init__(self, where):
        pass
    reset = step = lambda self, x: x

class NoStep:
    def reset(self, row):
        return None

class TwoArguments:
    def reset(self, row, other): return None
    def step(self, completion): return None
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "games.py").write_text(GAMES, encoding="utf-8")
    return lambda name: f"{tmp_path / 'games.py'}:{name}"


class Player:
    """One trajectory, as a rollout asks for it."""

    def __init__(self, environments, number=0):
        self.environments, self.name = environments, f"{number}/0"
        self.texts, self.digests = [], []
        self.row = {"prompt": "p", "question": f"w{number}"}
        self.number = number

    def ask(self):
        seeds = [7, *(100 * self.number + i for i in range(len(self.texts)))]
        request = {"trajectory": self.name, "row": self.row, "texts": list(self.texts)}
        return self.environments.ask(request | {"seeds": seeds, "answers": list(self.digests)})

    def take(self, future):
        told = future.result(60)
        if "value" in told:
            self.digests.append(told["value"]["digest"])
        return told

    def say(self, *texts):
        found = [self.take(self.ask())] if not self.digests else []
        for text in texts:
            self.texts.append(text)
            found.append(self.take(self.ask()))
        return found[-1]


def test_an_environment_answers_the_same_in_this_process_and_in_workers(spec):
    with Workers(2, SECONDS) as workers:
        there = Environments(spec("Counts"), workers=workers)
        here = Environments(spec("Counts"))
        assert (there.elsewhere, here.elsewhere, here.name) == (True, False, "Counts")
        before = random.getstate()
        for number in range(3):
            one, other = Player(there, number), Player(here, number)
            for text in ("w1", "w2", "ends"):
                told = one.say(text)
                assert told == other.say(text)
            assert told["value"]["reward"] == 3
            assert told["value"]["done"]
            assert told["value"]["observation"] is None
            assert told["value"]["info"] == {"n": 2.0}
            assert one.row["prompt"] == other.row["prompt"] == "p"  # it got a copy
        assert random.getstate() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("crashes", "SIGSEGV"),
        ("hangs", "took longer than 2 s"),
        ("exits", "raised SystemExit: 3"),
        ("raises", "raised ZeroDivisionError"),
    ],
)
def test_what_an_environment_does_costs_its_trajectory_alone(text, reason, spec):
    """All live in one process; the others' environments are made anew elsewhere by the same
    calls."""
    with Workers(1, SECONDS, say=lambda line: None) as workers:
        there = Environments(spec("Counts"), workers=workers)
        alone = Environments(spec("Counts"))
        others = [Player(there, number) for number in range(3)]
        for other in others:
            other.say("w1")
        assert reason in Player(there, 9).say("w5", text)["lost"]
        for number, other in enumerate(others):
            assert other.say("w2") == Player(alone, number).say("w1", "w2")


def test_in_this_process_an_exception_costs_its_trajectory_alone(spec):
    here = Environments(spec("Counts"))
    other = Player(here, 1)
    other.say("w1")
    lost = Player(here, 9).say("raises")["lost"]
    assert "ZeroDivisionError" in lost
    assert "games.py:" in lost
    assert "raised SystemExit" in Player(here, 8).say("exits")["lost"]
    assert other.say("w2")["value"]["reward"] == 2


@pytest.mark.parametrize("processes", [0, 1])
def test_asynchronous_environments_wait_together(processes, spec):
    with Workers(processes, SECONDS) as workers:
        environments = Environments(spec("Waits"), workers=workers)
        players = [Player(environments, number) for number in range(20)]
        for player in players:
            player.say()
        began = time.monotonic()
        for player in players:
            player.texts.append("w1")
        futures = [player.ask() for player in players]
        for player, future in zip(players, futures, strict=True):
            assert player.take(future)["value"]["reward"] == 1
        assert time.monotonic() - began < 20 * 0.05
        if processes:
            assert players[0].say("waits")["lost"] == "took longer than 2 s"
            assert players[1].say("w1")["value"]["reward"] == 2


def test_asynchronous_environments_survive_a_crash_among_them(spec):
    with Workers(1, SECONDS, say=lambda line: None) as workers:
        environments = Environments(spec("Waits"), workers=workers)
        players = [Player(environments, number) for number in range(4)]
        for player in players:
            player.say("w1")
        players[2].texts.append("crashes")
        for player in (players[0], players[1], players[3]):
            player.texts.append("w2")
        futures = [player.ask() for player in players]
        told = [p.take(future) for p, future in zip(players, futures, strict=True)]
        assert "SIGSEGV" in told[2]["lost"]
        here = Environments(spec("Waits"))
        for number in (0, 1, 3):
            assert told[number] == Player(here, number).say("w1", "w2")


def test_an_environment_that_answers_otherwise_when_repeated_is_told_of(spec):
    with Workers(1, SECONDS, say=lambda line: None) as workers:
        there = Environments(spec("Forgetful"), workers=workers)
        one = Player(there, 1)
        one.say("w1")
        assert "lost" in Player(there, 2).say("crashes")
        assert "answered otherwise" in one.say("w2")["lost"]


def test_trajectories_are_spread_over_processes_and_stay_there(spec):
    with Workers(3, SECONDS) as workers:
        there = Environments(spec("Forgetful"), workers=workers)
        players = [Player(there, number) for number in range(6)]
        first = [player.say("w1")["value"]["observation"] for player in players]
        assert len(set(first)) == 3
        for _ in range(3):
            assert [p.say("w1")["value"]["observation"] for p in players] == first


def test_an_environment_that_was_ended_is_dropped(spec):
    said = []
    with Workers(1, SECONDS, say=said.append) as workers:
        there = Environments(spec("Closes"), workers=workers)
        one, other = Player(there, 1), Player(there, 2)
        one.say("w1")
        there.end(one.name)
        other.say("ends")
    assert sum("closed" in line for line in said) == 2


def test_an_environment_that_waits_without_saying_so_is_told_of(spec):
    assert "write `async def`" in Player(Environments(spec("Hidden"))).say("w1")["lost"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "the file has no 'Missing'"),
        ("NoStep", "without step"),
        ("Needs", "made without arguments"),
        ("TwoArguments", "expected reset to take one argument, row"),
    ],
)
def test_a_class_that_is_no_environment_is_refused(name, message, spec):
    with pytest.raises(RewardError, match=message):
        Environments(spec(name))


@pytest.mark.parametrize("spec_", ["games.py", "Game", "games:Game"])
def test_a_specification_that_names_no_class_is_refused(spec_):
    with pytest.raises(RewardError, match=r"expected file\.py:NAME"):
        Environments(spec_)


USER = [{"role": "user", "content": "w1"}]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "expected step to return"),
        (("w1", 1.0), "expected step to return"),
        (("w1", 1.0, 1), "done to be True or False"),
        (("w1", "x", False), "step's reward: expected a finite number"),
        (("w1", float("nan"), False), "expected a finite number"),
        ((None, 1.0, False), "expected an observation"),
        (([], 1.0, False), "expected an observation"),
        ((3, 1.0, False), "expected step to return a text, or messages"),
        (([{"role": "assistant", "content": "w1"}], 1.0, False), "messages of user, tool"),
        (([{"role": "tool", "content": 3}], 1.0, False), "with a content"),
        (([{"role": "tool", "content": "w", "x": {1}}], 1.0, False), "JSON values"),
        (("w1", 1.0, False, 3), "fourth value"),
        (("w1", 1.0, False, {"n": "x"}), "fourth value"),
        (("w1", 1.0, False, {"": 1}), "fourth value"),
    ],
)
def test_wrong_answers_of_step_are_told_of(found, message):
    with pytest.raises(Wrong, match=message):
        step_answer(found)


@pytest.mark.parametrize("found", [3, [], [USER[0], {"role": "assistant", "content": "w"}], [3]])
def test_wrong_prompts_of_reset_are_told_of(found):
    with pytest.raises(Wrong, match="expected reset to return"):
        reset_answer(found, {"prompt": USER})


def test_right_answers_are_taken_as_they_are_meant():
    assert reset_answer(None, {"prompt": "w1"}) == {"prompt": "w1"}
    assert reset_answer(USER, {"prompt": "w1"}) == {"prompt": USER}
    ended = step_answer((None, None, True))
    assert ended == {"observation": None, "reward": 0.0, "done": True, "info": {}}
    assert step_answer(["w1", True, False])["reward"] == 1.0
    assert step_answer((USER[0], 2, False))["observation"] == USER
