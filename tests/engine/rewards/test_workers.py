"""Rewards in worker processes: what they do to their process costs their completion alone, what
they return is what they return in this process, and nothing of them is left."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.rewards import RewardSet, load_reward

pytestmark = pytest.mark.cpu_only("rewards are Python")
SECONDS = 2.0
REWARDS = """
import asyncio, ctypes, os, random, sys, time
from pathlib import Path
import numpy as np

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def misbehaves(completions, **columns):
    text = completions[0]
    if text == "sleeps":
        time.sleep(100)
    if text == "keeps the GIL":
        ctypes.PyDLL(None).sleep(100)
    if text == "crashes":
        ctypes.string_at(0)
    if text == "leaves":
        os._exit(3)
    if text == "exits":
        sys.exit(4)
    if text == "forks" and os.fork() == 0:
        return [7.0]
    if text == "raises":
        return [1 / 0]
    if text == "prints":
        print("one line")
        print("x" * 1_000_000)
    return {"nan": [float("nan")], "text": ["x"], "two": [1.0, 2.0], "none": None}.get(text, [1.0])

def leaves_a_child(completions, **columns):
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(1000)
    with open(completions[0], "a") as file:
        print(os.getpid(), os.getppid(), child, file=file)
    while completions[0].endswith("hangs"):
        pass
    return [1.0]

def draws(completions, **columns):
    return [random.random() + np.random.rand() for _ in completions]

def draws_late(completions, **columns):
    import torch
    return [torch.rand(()).item() for _ in completions]

RUNNING = []

async def waits(completions, **columns):
    drawn = random.random()
    if completions[0] == "never":
        await asyncio.sleep(100)
    if completions[0] == "blocks":
        time.sleep(99)
    await asyncio.sleep(0.3)
    return [drawn for _ in completions]

async def together(completions, **columns):
    RUNNING.append(1)
    while len(RUNNING) < 4:
        await asyncio.sleep(0.01)
    return [4.0 for _ in completions]

def ids(prompts, completions, completion_ids, tags, **columns):
    tags[0]["seen"].append(1)
    return [[float(token) for token in completion_ids[0]] if len(tags[0]["seen"]) == 1 else None]

def shape(prompts, completions, **columns):
    return np.array([isinstance(c, list) * 1.0 + len(p) for p, c in zip(prompts, completions)])

def centred(completions, **columns):
    lengths = [len(text) for text in completions]
    return [length - sum(lengths) / len(lengths) for length in lengths]

def needs(completions, answer):
    return [1.0 for _ in completions]

def descriptors(completions, **columns):
    held = [os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{one}")]
    return [float(any(name.endswith("lock") for name in held))]
"""
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def score(tmp_path):
    """Score texts by functions of the file, in worker processes or here."""
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")

    def run(
        names, texts, workers=2, columns=None, prompts=None, said=None, seconds=SECONDS, **options
    ):
        say = None if said is None else said.append
        pool = Workers(workers, seconds, say)
        specs = [f"{tmp_path / 'rewards.py'}:{name}" for name in names.split()]
        rewards = RewardSet([load_reward(spec, workers=pool) for spec in specs])
        count = len(texts)
        ids = [list(range(1, 2 + index)) for index in range(count)]
        with pool:
            return rewards.score(
                prompts or ["p"] * count, texts, [[1]] * count, ids, columns, **options
            )

    return run


def reasons(found):
    return {index: reason for index, _, reason in found.invalid}


def line(what):
    """The number of the line of the file that has this text."""
    return next(n for n, text in enumerate(REWARDS.splitlines(), 1) if what in text)


def gone(pids, seconds=20.0):
    """Whether no process of these numbers is left, but for dead ones that wait for their parent."""
    last = time.monotonic() + seconds
    while left := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() > last:
            return left
        time.sleep(0.05)
    return left


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- what misbehaves -----------------------------------------------------------------------------
def test_what_a_reward_does_costs_its_completion_alone(score, tmp_path):
    texts = ["fine", "sleeps", "keeps the GIL", "crashes", "leaves", "exits", "forks", "raises"]
    texts += ["prints", "nan", "text", "two", "none", "fine"]
    said, file = [], str(tmp_path / "rewards.py")
    found = score("misbehaves", texts, workers=3, said=said)
    why = reasons(found)
    for index, text in enumerate(texts):
        fine = text in ("fine", "forks", "prints")
        assert found.total[index] == 1.0 if fine else math.isnan(found.total[index]), text
    assert why[1] == f"took longer than 2 s ({file}:{line('time.sleep(100)')})"
    assert why[2] == f"took longer than 2 s ({file}:{line('PyDLL')})"
    assert why[3] == f"its process was ended by SIGSEGV ({file}:{line('string_at')})"
    assert why[4] == "its process ended with exit status 3"
    assert why[5] == f"raised SystemExit: 4 ({file}:{line('sys.exit')})"
    assert f"raised ZeroDivisionError: division by zero ({file}:{line('1 / 0')})" == why[7]
    assert why[9] == "expected a finite number or None, got nan"
    assert why[10] == "expected a finite number or None, got 'x'"
    assert why[11] == "expected 1 values, one per completion, got 2"
    assert why[12] == "expected a list of 1 values, one per completion, got NoneType"
    assert found.lost == 8, "those with a value that is none of a reward are not lost"
    printed = [text for text in said if "prints:" in text]
    assert any(text.endswith("prints: one line") for text in printed)
    assert sum(map(len, printed)) < 100_000
    assert sum("is replaced" in text for text in said) == 4


def test_a_reward_that_fails_on_all_ends_soon(score):
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"have no valid reward so far.*took longer than 2 s"):
        score("misbehaves", ["sleeps"] * 40, most_lost=1)
    assert time.monotonic() - began < 30, "40 of them would take that long"


def test_async_rewards_run_together_and_fail_alone(score, tmp_path):
    texts = [*"abcdef", "never", "blocks", "g"]
    found = score("waits", texts, workers=1)
    assert [index for index, value in enumerate(found.total) if math.isnan(value)] == [6, 7]
    assert reasons(found)[6] == "took longer than 2 s"
    assert (
        reasons(found)[7] == f"took longer than 2 s ({tmp_path / 'rewards.py'}:{line('sleep(99)')})"
    )
    assert score("together", list("abcd"), workers=1).total == [4.0] * 4
    assert found.total[0] == score("waits", ["a"], workers=2).total[0], (
        "keyed, up to its first wait"
    )


def test_no_process_is_left(score, tmp_path):
    notes = [str(tmp_path / "hangs"), str(tmp_path / "ends")]
    score("leaves_a_child", notes)
    pids = [int(pid) for note in notes for pid in Path(note).read_text().split()]
    assert len(pids) >= 6
    assert not gone(pids)


# ---- what comes of them --------------------------------------------------------------------------
def test_values_are_those_of_this_process(score):
    texts, tags = ["a", "bb", "ccc", "dd"], [{"seen": []} for _ in range(4)]
    prompts = ["p", CHAT, "\N{GRINNING FACE} \u05e9\u05dc\u05d5\u05dd", "p"]
    for names in ("length shape", "length ids"):
        here, there = (
            score(names, texts, workers, {"tags": tags}, prompts)
            for workers in ((0, 2) if "shape" in names else (2, 1))
        )
        assert here.total == there.total
        assert here.per_reward == there.per_reward
        assert here.tokens == there.tokens
    assert there.tokens[2] == [1.0, 2.0, 3.0]
    assert tags == [{"seen": []}] * 4, "what a worker writes to is its own"


@pytest.mark.parametrize("names", ["draws", "draws_late", "draws length draws"])
def test_draws_depend_on_the_key_alone(score, names):
    texts = ["a", "b", "c", "d", "e"]
    # the first call of a process imports torch
    score = partial(score, seconds=120)
    one = score(names, texts, workers=1)
    many = score(names, texts, workers=3)
    back = score(names, texts[::-1], workers=2, keys=[(index,) for index in range(4, -1, -1)])
    assert one.per_reward == many.per_reward
    assert [values[::-1] for values in back.per_reward.values()] == list(one.per_reward.values())
    assert len(set(one.total)) == 5
    assert score(names, texts, keys=[(1, index) for index in range(5)]).total != one.total


def test_a_reward_that_compares_completions_is_refused(score):
    texts = ["a", "bbb", "cc"]
    assert score("centred", texts, workers=0).total == [-1.0, 1.0, 0.0]
    with pytest.raises(RewardError, match=r"rewards.py:\d+\): expected a value that does not depe"):
        score("centred", texts)
    score("centred", ["same"] * 3)  # nothing to tell it by


def test_mistakes_in_the_data_are_told_as_in_this_process(score, tmp_path):
    with pytest.raises(RewardError, match="needs the column 'answer'"):
        score("needs", ["a"])
    with pytest.raises(RewardError, match="expected columns of JSON values"):
        score("needs", ["a"], columns={"answer": [object()]})


def test_a_file_that_a_worker_cannot_import(tmp_path):
    file = tmp_path / "once.py"
    file.write_text(
        "import os\n"
        "if os.environ['PYTHONHASHSEED' if 'PYTHONHASHSEED' in os.environ else 'HOME'] == '0':\n"
        "    raise OSError('no second time')\n"
        "def f(completions, **columns):\n    return [1.0]\n"
    )
    pool = Workers(2, SECONDS)
    rewards = RewardSet([load_reward(f"{file}:f", workers=pool)])
    with (
        pool,
        pytest.raises(RewardError, match=r"once.py:f: importing the file raised OSError: no"),
    ):
        rewards.score(["p"], ["a"], [[1]], [[2]])


def test_threads_that_ask_first_start_it_once_and_its_end_leaves_nothing(monkeypatch):
    """Of a pool without processes, whose requests wait until it is closed."""
    made, answers, real = [], [], os.pipe

    def slow():
        time.sleep(0.2)
        made.append(real())
        return made[-1]

    monkeypatch.setattr(os, "pipe", slow)
    before = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    pool = Workers(0, SECONDS)
    threads = [
        threading.Thread(target=lambda: answers.append(pool.ask("reward", {}))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    pool.close()
    assert [answer.cancelled() for answer in answers] == [True] * 3
    assert (len(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before
    pool.close()  # once more is nothing


def test_a_worker_holds_no_lock_of_the_run(score, tmp_path):
    with open(tmp_path / "lock", "w") as held:
        assert held
        assert score("descriptors", ["a"]).total == [0.0]


PROGRAM = """
import sys, time
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
pool = Workers(2, 100.0)
rewards = RewardSet([load_reward(sys.argv[1], workers=pool)])
with pool:
    rewards.score(["p"] * 2, [sys.argv[2]] * 2, [[1]] * 2, [[2]] * 2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_no_process(number, score, tmp_path):
    score("length", ["a"])  # writes the file
    note = tmp_path / "hangs"
    spec = f"{tmp_path / 'rewards.py'}:leaves_a_child"
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, spec, str(note)], stderr=subprocess.DEVNULL
    )
    last = time.monotonic() + 120
    while not (note.exists() and len(note.read_text().split()) == 6):
        assert run.poll() is None
        assert time.monotonic() < last
        time.sleep(0.05)
    os.kill(run.pid, number)
    run.wait(60)
    assert not gone([int(pid) for pid in note.read_text().split()])
