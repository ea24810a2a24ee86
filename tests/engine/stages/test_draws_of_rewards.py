"""Rewards that draw random numbers, and rewards that write to what they are given: neither an
evaluation nor a resume changes the course."""

import dataclasses

import pytest
from safetensors.torch import load_file

from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.watch.judge import Answers, FunctionJudge, Pairs

pytestmark = pytest.mark.cpu_only("rewards are Python")
REWARDS = """
import random
import numpy as np
import torch

def python(prompts, completions, **columns):
    return [random.random() + random.gauss(0, 1) for _ in completions]

def of_numpy(prompts, completions, **columns):
    return [np.random.rand() + np.random.randn() for _ in completions]

def of_torch(prompts, completions, **columns):
    return [torch.rand(()).item() for _ in completions]

def writes(prompts, completions, tags, **columns):
    for tag in tags:
        tag["seen"].append(1)
    return [float(len(tag["seen"])) + len(text) for tag, text in zip(tags, completions)]

def counts(prompts, completions, tags, **columns):
    return [float(len(tag["seen"])) for tag in tags]
"""


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "drawing.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": f"w{i} w{i + 1}", "tags": {"seen": []}} for i in range(6)]
    data = write_jsonl("prompts.jsonl", rows)

    def make(reward, name, steps=4, **options):
        return PolicyConfig(
            str(tiny_model),
            str(data),
            (f"{tmp_path / 'drawing.py'}:{reward}",),
            "grpo",
            steps=steps,
            prompts_per_step=3,
            samples_per_prompt=3,
            generation=GenerationConfig(max_new_tokens=5),
            optim=OptimConfig(lr=1e-2, schedule="constant"),
            device="cpu",
            run=RunConfig(str(tmp_path / name), progress=False),
            **options,
        )

    return make


def weights(config):
    return load_file(f"{train_policy(config).model}/model.safetensors")


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("reward", ["python", "of_numpy", "of_torch"])
def test_draws_of_rewards_belong_to_the_run(reward, config, tmp_path):
    plain = weights(config(reward, "plain"))
    again = weights(config(reward, "again"))
    assert same(plain, again), "the seed is theirs, too"
    watched = config(
        reward,
        "watched",
        evaluation=EvaluationConfig(data=config(reward, "x").data, every=1),
        monitor_reward=config(reward, "x").reward,
    )
    assert same(plain, weights(watched))
    first = config(reward, "resumed", steps=2)
    assert not same(plain, weights(first))
    run = dataclasses.replace(first.run, resume=True)
    assert same(plain, weights(dataclasses.replace(config(reward, "resumed"), run=run)))


def test_a_reward_that_writes_changes_no_data(config):
    told = config("writes", "written", monitor_reward=config("counts", "x").reward)
    train_policy(told)
    rows = list(read_rows(f"{told.run.dir}/metrics.jsonl"))
    assert [row["gold/counts/mean"] for row in rows] == [0.0] * 4


def test_what_a_reward_writes_no_other_sample_reward_or_judge_sees():
    def first(prompts, completions, completion_ids, **columns):
        for prompt, text in zip(prompts, completions, strict=True):
            prompt.append(text[0])
        return [float(len(prompt)) for prompt in prompts]

    prompt = [{"role": "user", "content": "hi"}]
    rewards = RewardSet([load_reward(first), load_reward(first)])
    for _ in range(2):
        found = rewards.score([prompt] * 3, ["a", "b", "c"], [[1]] * 3, [[2]] * 3, {})
        assert all(values == [2.0] * 3 for values in found.per_reward.values())
    assert len(prompt) == 1

    def judge(prompts, a, b, tags):
        for each, tag in zip(prompts, tags, strict=True):
            each.append(None)
            tag.append(1)
        return [
            "a" if len(each) == 2 and len(tag) == 1 else "b"
            for each, tag in zip(prompts, tags, strict=True)
        ]

    tag = []
    answers = Answers(["a", "b"], [[1], [2]])
    pairs = Pairs([prompt] * 2, [[1]] * 2, answers, answers, {"tags": [tag, tag]})
    assert FunctionJudge(judge)(pairs) == ["a", "a"]
    assert (len(prompt), tag) == (1, [])
