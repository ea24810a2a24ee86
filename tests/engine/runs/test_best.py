"""The best checkpoint by a metric: which step it is, that it stays, and that a resumed run keeps
the same one."""

import math

import pytest
from tests.engine.conftest import WORDS

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import GenerationConfig, OptimConfig, PolicyConfig, RunConfig, SFTConfig
from fusedrl.engine.runs.best import Best
from fusedrl.engine.runs.checkpoint import saved_steps
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.status import read_status
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.sft import train_sft

pytestmark = pytest.mark.cpu_only("files of runs")
REWARD = """
from pathlib import Path

STOP = Path(__file__).with_name("stop")

def count(prompts, completions, **columns):
    if STOP.exists() and len(Path(STOP.read_text()).read_bytes().splitlines()) >= 5:
        raise RuntimeError("the reward broke")
    return [float(text.count("w1")) - 0.01 * len(text) for text in completions]
"""


@pytest.mark.parametrize(
    "wanted, values, step",
    [
        ("reward", [1.0, 3.0, 2.0, 3.0], 2),
        ("eval_loss", [1.0, 3.0, 0.5, 0.5], 3),
        ("perplexity", [9.0, 3.0], 2),
        ("min:reward", [1.0, 0.5, 2.0], 2),
        ("max:eval_loss", [1.0, 3.0, 2.0], 2),
        ("reward", [math.nan, -1.0, math.inf, -2.0], 2),
        ("reward", [None, None], None),
        ("", [1.0, 2.0], None),
    ],
)
def test_the_best_step(wanted, values, step):
    best = Best(wanted)
    name = wanted.rpartition(":")[2]
    offered = [best.offer(number, {name: value}) for number, value in enumerate(values, 1)]
    assert best.step == step
    if step is not None:
        assert best.value == values[step - 1]
        assert offered[step - 1]
        assert not any(offered[step:])


def test_only_steps_whose_checkpoints_are_there_are_recalled():
    best = Best("reward")
    best.recall([{"step": 1, "reward": 9.0}, {"step": 2, "reward": 1.0}, {"step": 3}], {2, 3})
    assert (best.step, best.value) == (2, 1.0)


@pytest.fixture
def policy(tiny_model, write_jsonl, tmp_path):
    (tmp_path / "rule.py").write_text(REWARD)
    prompts = write_jsonl("p.jsonl", [{"prompt": word} for word in WORDS[4:16]])

    def config(name: str, steps: int = 8, **run) -> PolicyConfig:
        return PolicyConfig(
            model=str(tiny_model),
            data=prompts,
            algorithm="grpo",
            reward=(f"{tmp_path / 'rule.py'}:count",),
            steps=steps,
            prompts_per_step=4,
            samples_per_prompt=4,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3),
            run=RunConfig(str(tmp_path / name), keep_best="reward", keep=1, progress=False, **run),
        )

    return config


def weights(config: PolicyConfig) -> dict[int, bytes]:
    steps = saved_steps(config.run.dir)
    return {step: (path / "model.safetensors").read_bytes() for step, path in steps.items()}


def test_the_best_checkpoint_stays_beside_the_newest_and_a_resumed_run_keeps_the_same(
    policy, tmp_path, capsys
):
    whole = policy("whole")
    train_policy(whole)
    said = capsys.readouterr().err
    rewards = [row["reward"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")]
    best = rewards.index(max(rewards)) + 1
    assert sorted(saved_steps(whole.run.dir)) == sorted({best, 8})
    assert f"the best reward, {max(rewards):.4g}, is that of step {best}" in said
    assert read_status(tmp_path / "whole")["best"] == ["reward", best, max(rewards)]

    broken = policy("broken")
    (tmp_path / "stop").write_text(str(tmp_path / "broken" / "metrics.jsonl"))
    with pytest.raises(Exception, match="the reward broke"):
        train_policy(broken)
    assert len(rewards) > 5
    (tmp_path / "stop").unlink()
    train_policy(policy("broken", resume=True))
    assert weights(broken) == weights(whole)
    assert read_status(tmp_path / "broken")["best"] == ["reward", best, max(rewards)]


def test_it_may_be_turned_on_by_a_resumed_run(policy, tmp_path):
    from dataclasses import replace

    first = policy("late", steps=3)
    train_policy(replace(first, run=replace(first.run, keep_best="")))
    train_policy(policy("late", steps=6, resume=True))
    kept = saved_steps(first.run.dir)
    rows = {row["step"]: row["reward"] for row in read_rows(tmp_path / "late" / "metrics.jsonl")}
    best = max((3, 4, 5, 6), key=lambda step: (rows[step], -step))  # 1 and 2 were gone by then
    assert sorted(kept) == sorted({best, 6})


def test_a_metric_that_is_none_is_told_before_anything_is_written(policy, tmp_path):
    from dataclasses import replace

    config = policy("typo")
    config = replace(config, run=replace(config.run, keep_best="rewrad"))
    with pytest.raises(ConfigError, match=r"got 'rewrad', did you mean reward\?"):
        train_policy(config)
    assert not list(read_rows(tmp_path / "typo" / "metrics.jsonl"))
    train_policy(policy("typo"))  # in the same directory


def test_a_held_out_loss(tiny_model, write_jsonl, tmp_path, capsys):
    data = write_jsonl("t.jsonl", [{"prompt": w, "completion": f" {w} w1"} for w in WORDS[4:28]])
    config = SFTConfig(
        model=str(tiny_model),
        data=data,
        sequences_per_step=4,
        epochs=2,
        eval_fraction=0.2,
        eval_every=2,
        optim=OptimConfig(lr=5e-2),
        run=RunConfig(str(tmp_path / "sft"), keep_best="eval_loss", keep=1, progress=False),
    )
    train_sft(config)
    losses = {
        row["step"]: row["eval_loss"]
        for row in read_rows(tmp_path / "sft" / "metrics.jsonl")
        if "eval_loss" in row and row["step"]
    }
    best = min(losses, key=lambda step: losses[step])
    assert best in saved_steps(config.run.dir)
    assert f"is that of step {best}" in capsys.readouterr().err
