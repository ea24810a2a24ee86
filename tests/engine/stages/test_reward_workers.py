"""Runs whose rewards are called in worker processes: the same run however many there are, killed
and resumed too, and a run that goes on when a reward does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fusedrl.engine.base.errors import ConfigError, RewardError
from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    OptimConfig,
    PolicyConfig,
    RejectionConfig,
    RunConfig,
)
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection

pytestmark = pytest.mark.cpu_only("rewards are Python")
REWARDS = """
import os, random, time

def length(completions, tags, **columns):
    for tag in tags:
        tag["seen"].append(1)
    return [len(text) + 0.1 * len(tag["seen"]) for text, tag in zip(completions, tags)]

def draws(completions, **columns):
    return [random.gauss(0, 1) + text.count("w3") for text in completions]

def dies(completions, prompts, **columns):
    if prompts[0].startswith("w1 "):
        os._exit(1)
    return [float(len(completions[0]))]

def stays(completions, **columns):
    child = os.fork()
    if child == 0:
        os.setsid()
    else:
        with open(os.environ["NOTE"], "a") as file:
            print(os.getpid(), os.getppid(), child, file=file)
    time.sleep(1000)
"""


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": f"w{i} w{i + 1}", "tags": {"seen": []}} for i in range(6)]
    data = write_jsonl("prompts.jsonl", rows)

    def make(reward, name, workers=2, kind=PolicyConfig, **options):
        steps = options.pop("steps", 3)
        resume = options.pop("resume", False)
        return kind(
            str(tiny_model),
            str(data),
            (f"{tmp_path / 'rewards.py'}:{reward}",),
            *(("grpo",) if kind is PolicyConfig else ()),
            steps=steps,
            prompts_per_step=3,
            samples_per_prompt=3,
            generation=GenerationConfig(max_new_tokens=5),
            optim=OptimConfig(lr=1e-2, schedule="constant"),
            device="cpu",
            run=RunConfig(str(tmp_path / name), progress=False, resume=resume),
            reward_workers=workers,
            **options,
        )

    return make


def weights(config):
    train = train_policy if isinstance(config, PolicyConfig) else train_rejection
    return load_file(f"{train(config).model}/model.safetensors")


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


def rows_of(config, without=()):
    apart = ("timing/", "tokens_per_s", "mem/", *without)
    return [
        {name: value for name, value in row.items() if not name.startswith(apart)}
        for row in read_rows(f"{config.run.dir}/metrics.jsonl")
    ]


@pytest.mark.parametrize("kind", [PolicyConfig, RejectionConfig])
def test_a_run_is_the_same_with_workers_and_without(kind, config):
    here, there = config("length", "here", 0, kind), config("length", "there", 2, kind)
    assert same(weights(here), weights(there))
    assert rows_of(here) == rows_of(there, ("reward_failures",))
    rows = list(read_rows(f"{there.run.dir}/metrics.jsonl"))
    assert [row["reward_failures"] for row in rows] == [0.0] * 3
    assert all(row["timing/reward_wait"] >= 0 for row in rows)


def test_a_resumed_run_is_bitwise_the_same_whatever_the_number_of_workers(config):
    plain = config("draws", "plain", 1)
    expected = weights(plain)
    watched = config(
        "draws",
        "watched",
        3,
        evaluation=EvaluationConfig(data=plain.data, every=1),
        monitor_reward=config("length", "x").reward,
    )
    assert same(expected, weights(watched))
    assert not same(expected, weights(config("draws", "resumed", 2, steps=1)))
    assert same(expected, weights(config("draws", "resumed", 1, resume=True)))
    assert rows_of(plain) == rows_of(config("draws", "resumed"))
    with pytest.raises(ConfigError, match="reward_workers: 1 -> 0"):
        train_policy(config("draws", "resumed", 0, resume=True, steps=4))


def test_a_run_goes_on_while_few_rewards_fail(config):
    some = config("dies", "some", max_invalid_fraction=0.5, reward_timeout=30.0)
    train_policy(some)
    rows = rows_of(some)
    assert {row["reward_failures"] for row in rows} == {0.0, 3.0}, "w1 is in some of the steps"
    assert [row["completions/invalid"] for row in rows] == [r["reward_failures"] for r in rows]
    with pytest.raises(RewardError, match=r"by dies \(.*\): its process ended with exit status 1"):
        train_policy(config("dies", "many", max_invalid_fraction=0.0))


def test_options_that_contradict(config):
    with pytest.raises(ConfigError, match="expected reward_timeout only together with"):
        config("length", "x", 0, reward_timeout=5.0)
    with pytest.raises(ConfigError, match="expected reward_workers >= 0"):
        config("length", "x", -1)


def test_an_interrupt_during_a_rollout_leaves_no_process(config, tmp_path):
    told, note = config("stays", "stopped"), tmp_path / "note"
    words = [*("train", "grpo", "--model", told.model, "--data", told.data)]
    words += ["--reward", told.reward[0], "--reward_workers", "2", "--run.dir", told.run.dir]
    words += ["--generation.max_new_tokens", "5", "--device", "cpu", "--run.progress", "false"]
    run = subprocess.Popen(
        [sys.executable, "-m", "fusedrl.engine.cli", *words],
        env=os.environ | {"NOTE": str(note)},
        stderr=subprocess.PIPE,
    )
    last = time.monotonic() + 200
    while not (note.exists() and len(note.read_text().split()) == 6):
        assert run.poll() is None, run.stderr.read().decode()
        assert time.monotonic() < last
        time.sleep(0.05)
    pids = [int(pid) for pid in note.read_text().split()]
    run.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert b"Traceback" not in said
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < last, left
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.full
def test_two_ranks_make_the_same_run_as_one(config, tmp_path):
    one = config("draws", "one", 2)
    words = [*("train", "grpo", "--model", one.model, "--data", one.data, "--steps", "3")]
    words += ["--prompts_per_step", "3", "--samples_per_prompt", "3", "--device", "cpu"]
    words += ["--reward", one.reward[0], "--generation.max_new_tokens", "5"]
    words += ["--parallel.lanes", "2", "--reward_workers", "2", "--run.progress", "false"]
    found = []
    for devices in ("1", "2"):
        run = str(tmp_path / f"on{devices}")
        subprocess.run(
            [sys.executable, "-m", "fusedrl.engine.cli", *words, "--devices", devices]
            + ["--run.dir", run],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            timeout=500,
        )
        found.append(load_file(f"{run}/model/model.safetensors"))
    assert same(*found)
