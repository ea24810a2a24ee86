"""Runs with an environment: the same run wherever environments are called, killed and resumed too;
one that goes on when an environment does not; and options that say when they do not fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fusedrl.engine.base.errors import ConfigError, RewardError
from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    OptimConfig,
    PolicyConfig,
    ReplayConfig,
    RunConfig,
    TurnsConfig,
)
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.stages.policy import train_policy

pytestmark = pytest.mark.cpu_only("environments are Python")
GAMES = """
import os, random, time

class Game:
    offset = 0.0
    def reset(self, row, seed):
        self.turns, self.random = 0, random.Random(seed)
        return f"{row['prompt']} w{self.random.randrange(28)}"

    def step(self, completion):
        self.turns += 1
        said = completion.split()
        reward = said.count("w3") + len(said) / 8 + self.offset * (self.turns == 1)
        return f"w{random.randrange(28)} w7", reward, self.turns == 3 or "w5" in said

class Far(Game):
    offset = 1000.0

class Constant(Game):
    def step(self, completion):
        self.turns += 1
        return "w1", 0.5, self.turns == 2

class Mortal(Game):
    def step(self, completion):
        with open(os.environ["CALLS"], "a") as file:
            file.write(".")
        if os.path.getsize(os.environ["CALLS"]) == int(os.environ["DIES_AT"]):
            raise KeyboardInterrupt
        return super().step(completion)

class Fails(Game):
    def step(self, completion):
        if self.turns and len(completion.split()) % 5 == 4:
            return 1 / 0
        return super().step(completion)

class Bad(Game):
    def step(self, completion):
        return 3

class Crashes(Game):
    def reset(self, row):
        self.first = row["prompt"].startswith("w1 ")
        return super().reset(row, 0)
    def step(self, completion):
        if self.first:
            os._exit(1)
        return super().step(completion)

def add(a: int, b: int) -> int:
    '''
    Add.

    Args:
        a: One.
        b: Other.
    '''
    return a + b

def longest(completions, **columns):
    return [float(len(one[-1]["content"])) for one in completions]

def calls_of(text):
    words = text.split()
    calls = [{"name": "add", "arguments": {"a": 1, "b": len(words)}}]
    return calls if "w3" in words or len(words) < 4 else []

def seen(completions, prompts, **columns):
    return [float(len(text.split())) for text in completions]
"""


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "games.py").write_text(GAMES, encoding="utf-8")
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(6)])

    def make(environment, name, algorithm="grpo", workers=0, **options):
        resume = options.pop("resume", False)
        here = tmp_path / "games.py"
        options.setdefault("reward", ())
        usual = {
            "steps": 3,
            "prompts_per_step": 3,
            "samples_per_prompt": 1 if algorithm == "ppo" else 3,
            "optim": OptimConfig(lr=1e-2, schedule="constant"),
            "environment": None if environment is None else f"{here}:{environment}",
        }
        reward = tuple(f"{here}:{one}" for one in options.pop("reward"))
        return PolicyConfig(
            str(tiny_model),
            str(data),
            reward,
            algorithm,
            generation=GenerationConfig(max_new_tokens=6),
            device="cpu",
            run=RunConfig(str(tmp_path / name), progress=False, resume=resume, save_every=1),
            reward_workers=workers,
            **(usual | options),
        )

    return make


def weights(config):
    return load_file(f"{train_policy(config).model}/model.safetensors")


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


def rows_of(config, without=()):
    apart = ("timing/", "tokens_per_s", "mem/", *without)
    return [
        {name: value for name, value in row.items() if not name.startswith(apart)}
        for row in read_rows(f"{config.run.dir}/metrics.jsonl")
    ]


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"algorithm": "ppo"}])
def test_a_run_is_the_same_with_workers_and_without(options, config):
    here = config("Game", "here", **options)
    there = config("Game", "there", workers=2, **options)
    assert same(weights(here), weights(there))
    assert rows_of(here) == rows_of(there)
    row = rows_of(here)[-1]
    assert row["turns/failures"] == 0
    assert row["sampling/sampling_logp_difference/max"] <= (0 if "strict" in options else 1e-4)
    assert (row["policy/first_ratio_min"], row["policy/first_ratio_max"]) == (1, 1)
    assert 1 <= row["turns/mean"] <= 3
    assert row["step_tokens"] > row["completions/mean_length"] * (
        3 if "algorithm" in options else 9
    )


@pytest.mark.parametrize("strict", [False, True])
def test_a_run_killed_in_a_rollout_goes_on_bitwise(strict, config, monkeypatch, tmp_path):
    whole = config("Game", "whole", strict=strict)
    undisturbed = weights(whole)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DIES_AT", "30")
    broken = config("Mortal", "broken", strict=strict)
    with pytest.raises(KeyboardInterrupt):
        train_policy(broken)
    assert 0 < len(rows_of(broken)) < 3
    resumed = config("Mortal", "broken", strict=strict, resume=True)
    assert same(undisturbed, weights(resumed))
    assert rows_of(whole, ("rewards/",)) == rows_of(resumed, ("rewards/",))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trajectory_that_fails_is_left_out_and_counted(workers, config):
    some = config("Fails", "some", workers=workers, max_invalid_fraction=0.9)
    weights(some)
    rows = rows_of(some)
    failed = [row["turns/failures"] for row in rows]
    assert sum(failed) > 0
    assert failed == [row["completions/invalid"] for row in rows]
    with pytest.raises(RewardError, match=r"more than max_invalid_fraction = 0\.0.*ZeroDivision"):
        train_policy(config("Fails", "none", workers=workers, max_invalid_fraction=0.0))


def test_a_group_whose_process_crashes_is_left_out(config):
    """Its prompt is in every step, since a step has all six."""
    some = config("Crashes", "some", workers=2, max_invalid_fraction=0.5, prompts_per_step=6)
    weights(replace(some, steps=2))
    assert [row["turns/failures"] for row in rows_of(some)] == [3.0, 3.0]


def test_an_environment_that_never_answers_rightly_ends_the_run(config):
    with pytest.raises(RewardError, match=r"9 of 9 samples .* by Bad.*expected step to return"):
        train_policy(config("Bad", "bad"))
    with pytest.raises(RewardError, match="none of the 9 samples has a valid reward"):
        train_policy(config("Bad", "allowed", max_invalid_fraction=1.0))


def test_equal_rewards_teach_nothing_and_are_told_of(config, capfd):
    flat = config("Constant", "flat", kl=replace(config("Game", "x").kl, coef=0.0))
    before = load_file(f"{flat.model}/model.safetensors")
    after = weights(flat)
    assert all(row["frac_reward_zero_std"] == 1.0 for row in rows_of(flat))
    assert all(row["reward"] == 1.0 for row in rows_of(flat))
    assert same({name: after[name] for name in before if name in after}, before)
    assert "were all equal" in capfd.readouterr().err


def test_a_constant_in_the_rewards_changes_no_course(config):
    near, far = (config(name, name, "dr_grpo") for name in ("Game", "Far"))
    weights(near), weights(far)
    for one, other in zip(rows_of(near), rows_of(far), strict=True):
        assert other["reward"] - one["reward"] == pytest.approx(1000, abs=1e-3)
        assert one["completions/mean_length"] == other["completions/mean_length"]
        assert one["entropy"] == pytest.approx(other["entropy"], abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"refill_tries": 2},
        {"replay": ReplayConfig(capacity=16, fraction=0.5)},
        {"monitor_reward": "seen"},
        {"reward": ("seen",)},
        {"generation": GenerationConfig(max_new_tokens=6, top_p=0.9)},
        {"turns": TurnsConfig(credit="state", gamma=0.95, max_turns=2)},
        {"turns": TurnsConfig(credit="turn"), "algorithm": "rloo"},
        {"mask_truncated_completions": True, "turns": TurnsConfig(max_turns=2)},
        {"algorithm": "gdpo"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_beside_an_environment_are_resumed_bitwise(options, config, monkeypatch, tmp_path):
    if "monitor_reward" in options:
        options = {"monitor_reward": (f"{tmp_path / 'games.py'}:seen",)}
    if "generation" in options:
        generation = options["generation"]
        options = {key: value for key, value in options.items() if key != "generation"}
    else:
        generation = GenerationConfig(max_new_tokens=6)
    whole = replace(config("Game", "whole", **options), generation=generation)
    undisturbed = weights(whole)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DIES_AT", "40")
    broken = replace(config("Mortal", "broken", **options), generation=generation)
    with pytest.raises(KeyboardInterrupt):
        train_policy(broken)
    resumed = replace(config("Mortal", "broken", resume=True, **options), generation=generation)
    assert same(undisturbed, weights(resumed))


def test_rewards_beside_an_environment_are_added_to_its_own(config):
    both = config("Game", "both", reward=("seen",), reward_weights=(0.5,))
    weights(both)
    for row in rows_of(both):
        own, beside = row["rewards/Game/mean"], row["rewards/seen/mean"]
        assert row["reward"] == pytest.approx(own + 0.5 * beside, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_evaluates_with_its_environment_and_is_unchanged(workers, config, write_jsonl):
    held = write_jsonl("held.jsonl", [{"prompt": f"w{i}"} for i in range(4)])
    judged = EvaluationConfig(held, every=1, samples_per_prompt=2)
    watched = config("Game", "watched", workers=workers, evaluation=judged)
    plain = config("Game", "plain", workers=workers)
    assert same(weights(watched), weights(plain))
    rows = rows_of(watched)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["eval_reward"] > 0
    assert rows[0]["eval_completions/mean_length"] > 1
    lines = Path(f"{watched.run.dir}/samples_eval.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    assert len(shown) == 16
    assert all(one["scores"]["reward"] is not None for one in shown)


def test_tools_are_called_in_a_run(config, tmp_path, tiny_model):
    """The tiny model's turns are read by a parser of one's own, which finds calls in some."""
    from fusedrl.engine.model.weights import load_tokenizer

    here = tmp_path / "games.py"
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ 'w9 ' if t.function.name == 'add' }}{% endfor %}"
        "{% for m in messages %}{{ {'user': 'w20', 'assistant': 'w21', 'tool': 'w22'}[m.role] }} "
        "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
    )
    model = tmp_path / "chat"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(model)
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(6)]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for workers in (0, 2):
        one = config(
            None,
            f"tools{workers}",
            workers=workers,
            reward=("longest",),
            tools=(f"{here}:add",),
            turns=TurnsConfig(tool_parser=f"{here}:calls_of", max_turns=3),
        )
        one = replace(one, model=str(model), data=str(data))
        found.append(weights(one))
        row = rows_of(one)[-1]
        assert row["environment/tool_calls"] > 0
        assert row["environment/tool_errors"] == 0
        assert row["rewards/longest/mean"] == pytest.approx(row["reward"], rel=1e-5)
        assert "rewards/tools/mean" not in row
    assert same(*found)
    sample = json.loads(Path(f"{one.run.dir}/samples.jsonl").read_text().splitlines()[0])
    assert {message["role"] for message in sample["messages"]} <= {"assistant", "tool"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": ("t.py:f",)}, "expected tools to be left out with an environment"),
        ({"overlong_buffer": 2}, "expected overlong_buffer 0 with environment or tools"),
        ({"algorithm": "remax"}, "expected loss.advantage another one than remax"),
        (
            {"algorithm": "ppo", "turns": TurnsConfig(credit="turn")},
            "expected turns.credit trajectory with an advantage other than",
        ),
        ({"environment": None, "tools": ("t.py:f",)}, "expected reward at least one with tools"),
        ({"environment": None}, "expected reward at least one"),
        (
            {"environment": None, "reward": ("seen",), "turns": TurnsConfig(max_turns=2)},
            "expected turns only together with environment or tools, got max_turns = 2",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, config):
    with pytest.raises(ConfigError, match=message):
        config(**({"environment": "Game", "name": "refused"} | options))


@pytest.mark.parametrize(
    "options",
    [
        {"max_turns": 0},
        {"max_total_tokens": 0},
        {"max_length": 1},
        {"credit": "token"},
        {"gamma": 1.5, "credit": "turn"},
        {"gamma": 0.5},
        {"state_weight": -1.0},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"expected turns.{next(iter(options))}"):
        TurnsConfig(**options)


def test_the_command_line_names_environments_and_tools(config, tmp_path, tiny_model):
    told = config("Game", "told")
    words = ["train", "grpo", "--model", told.model, "--data", told.data, "--steps", "1"]
    words += ["--prompts_per_step", "2", "--samples_per_prompt", "2", "--device", "cpu"]
    words += ["--run.progress", "false", "--generation.max_new_tokens", "4"]

    def run(*more):
        return subprocess.run(
            [sys.executable, "-m", "fusedrl.engine.cli", *words, *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("--environment", told.environment, "--run.dir", told.run.dir)
    assert done.returncode == 0, done.stderr
    assert rows_of(told)[0]["rewards/Game/mean"] > 0
    kept = json.loads(Path(f"{told.run.dir}/config.json").read_text())
    assert f"environment {told.environment}" in kept["told"]
    wrong = run("--environment", told.environment + "s", "--run.dir", str(tmp_path / "wrong"))
    assert wrong.returncode == 2
    assert "did you mean Game?" in wrong.stderr
    file = told.environment.rpartition(":")[0]
    tools = run("--tools", f"{file}:add", "--tools", f"{file}:ad", "--reward", f"{file}:seen")
    assert tools.returncode == 2
    assert "tool " in tools.stderr
    assert "'ad'" in tools.stderr
    alone = run("--tools", f"{file}:add", "--run.dir", str(tmp_path / "alone"))
    assert alone.returncode == 2
    assert "expected --reward" in alone.stderr


@pytest.mark.full
@pytest.mark.parametrize("workers", ["0", "2"])
def test_two_ranks_make_the_same_run_as_one(workers, config, tmp_path):
    one = config("Game", "one")
    words = [*("train", "grpo", "--model", one.model, "--data", one.data, "--steps", "3")]
    words += ["--prompts_per_step", "3", "--samples_per_prompt", "3", "--device", "cpu"]
    words += ["--environment", one.environment, "--generation.max_new_tokens", "6"]
    words += ["--parallel.lanes", "2", "--run.progress", "false", "--strict", "true"]
    words += ["--reward_workers", workers, "--evaluation.data", one.data]
    found, rows = [], []
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
        rows.append(rows_of(replace(one, run=replace(one.run, dir=run)), ("parallel/",)))
    assert same(*found)
    assert rows[0] == rows[1]
