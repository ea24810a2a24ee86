"""docs/metrics.md against what runs write: every metric has its row, and every row is written by
some run."""

import json
import re
from pathlib import Path

import pytest

from fusedrl.engine.config import (
    CorrectionConfig,
    CriticConfig,
    DPOConfig,
    EvaluationConfig,
    GenerationConfig,
    KTOConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    PtxConfig,
    RejectionConfig,
    ReplayConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.runs.names import METRICS
from fusedrl.engine.stages.dpo import train_dpo
from fusedrl.engine.stages.kto import train_kto
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection
from fusedrl.engine.stages.reward_model import train_reward_model
from fusedrl.engine.stages.sft import train_sft

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
REWARDS = """
def binary(prompts, completions, completion_ids, **columns):
    return [float(len(ids) % 2) for ids in completion_ids]

def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]

def huge(prompts, completions, completion_ids, **columns):
    return [3e38 * (-1) ** i for i in range(len(completions))]
"""

GAME = """
class Game:
    def reset(self, row):
        return None

    def step(self, completion):
        return "w1", 1.0, False, {"asked": 1}
"""


def _patterns(*headings: str) -> dict[str, re.Pattern[str]]:
    """Of the tables under these headings: the names as they stand there, and what they stand
    for."""
    found: dict[str, re.Pattern[str]] = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        if section.splitlines()[0] in headings:
            for cell in re.findall(r"^\| (`[^|]*`) \|", section, flags=re.MULTILINE):
                for name in re.findall(r"`([^`]+)`", cell):
                    text = (
                        re.escape(name)
                        .replace("<name>", "[^/]+")
                        .replace("<k>", r"\d+")
                        .replace("<phase>", "(?!step|peak|reward_wait|environment_wait)[a-z_]+")
                    )
                    found[name] = re.compile(
                        text + ("(_stderr)?" if name.startswith("eval_") else "")
                    )
    return found


def test_every_metric_has_a_unit():
    pages = PAGE.split("## Names of TRL")[0]
    rows = [line.split(" | ") for line in pages.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row[0] for row in rows if len(row) != 4 or not row[2].strip()]


def _names(directory: str) -> set[str]:
    return {
        name
        for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()
        for name in json.loads(line)
    }


@pytest.fixture
def policy_names(tiny_model, tmp_path, write_jsonl, monkeypatch) -> set[str]:
    # rewards that overflow are refused otherwise
    monkeypatch.setattr("fusedrl.engine.rewards.functions.LARGEST", float("inf"))
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(6)])

    def run(name, rewards, algorithm="grpo", steps=1, speculate=False, **options):
        config = PolicyConfig(
            str(tiny_model),
            data,
            tuple(f"{tmp_path / 'rewards.py'}:{reward}" for reward in rewards),
            algorithm,
            steps=steps,
            prompts_per_step=2,
            generation=GenerationConfig(max_new_tokens=24 if speculate else 4, speculate=speculate),
            run=RunConfig(str(tmp_path / name), progress=False),
            reference_model=str(tiny_model) if algorithm == "distill" else None,
            **options,
        )
        train_policy(config)
        return _names(config.run.dir)

    kinds = {
        (
            row.advantage,
            row.objective,
            row.kl_coef > 0,
            row.kl_placement,
            row.refill_tries > 0,
        ): name
        for name, row in ALGORITHMS.items()
    }
    names = set().union(*(run(name, ["likes_w3"], name) for name in kinds.values()))
    names |= run("huge", ["huge"], "reinforce")  # a gradient that is not finite
    watched = dict(
        evaluation=EvaluationConfig(data, samples_per_prompt=2),
        monitor_reward=(f"{tmp_path / 'rewards.py'}:likes_w3",),
    )
    texts = write_jsonl("texts.jsonl", [{"prompt": "w1", "completion": "w2 w3"}] * 4)
    names |= run(
        "apart",
        ["likes_w3"],
        "ppo",
        critic=CriticConfig("policy"),
        ptx=PtxConfig(texts, sequences_per_step=2),
        loss=LossConfig(entropy_coef=0.01, entropy_target=1.0),
        correction=CorrectionConfig("truncated", off_policy_delta=0.1),
    )
    names |= run("replayed", ["likes_w3"], replay=ReplayConfig(), steps=2)
    names |= run("guessed", ["likes_w3"], "ppo", speculate=True)
    (tmp_path / "game.py").write_text(GAME, encoding="utf-8")
    names |= run("played", [], environment=f"{tmp_path / 'game.py'}:Game")
    return (
        names
        | run("watched", ["binary"], reward_workers=1, **watched)
        | run("two", ["binary", "likes_w3"], **watched)
    )


def _compare(names: set[str], patterns: dict[str, re.Pattern[str]]) -> None:
    unknown = [
        name
        for name in names
        if sum(bool(pattern.fullmatch(name)) for pattern in patterns.values()) != 1
    ]
    assert not unknown, f"docs/metrics.md has no row, or several, for {sorted(unknown)}"
    unused = [
        row
        for row, pattern in patterns.items()
        if not any(pattern.fullmatch(name) for name in names)
    ]
    assert not unused, f"no run writes {unused}"


def test_every_metric_of_a_policy_run_has_its_row_and_no_row_is_left_over(policy_names):
    _compare(policy_names, _patterns("A policy step", "Time and memory"))
    with pytest.raises(AssertionError, match="kl2"):
        _compare(policy_names | {"kl2"}, _patterns("A policy step", "Time and memory"))
    with pytest.raises(AssertionError, match="no run writes"):
        _compare(
            policy_names, _patterns("A policy step", "Time and memory") | {"x": re.compile("x")}
        )


def _compare_stage(directory: str, *headings: str) -> None:
    names, shared = _names(directory), _patterns("Time and memory") | {"step": re.compile("step")}
    _compare(
        {name for name in names if not any(pattern.fullmatch(name) for pattern in shared.values())},
        _patterns(*headings),
    )


def test_every_metric_of_an_sft_run_has_its_row(tiny_model, tmp_path, write_jsonl):
    data = write_jsonl(
        "sft.jsonl", [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2}"} for i in range(8)]
    )
    train_sft(
        SFTConfig(
            str(tiny_model),
            data,
            eval_fraction=0.25,
            eval_every=1,
            sequences_per_step=4,
            optim=OptimConfig(),
            run=RunConfig(str(tmp_path / "run"), progress=False),
        )
    )
    _compare_stage(str(tmp_path / "run"), "Supervised fine-tuning")


def test_every_metric_of_preferences_has_its_row(tiny_model, tmp_path, write_jsonl):
    data = write_jsonl(
        "pairs.jsonl",
        [{"prompt": f"w{i}", "chosen": f"w{i + 1} w{i + 2}", "rejected": "w3"} for i in range(8)],
    )
    train_reward_model(
        RewardModelConfig(
            str(tiny_model),
            data,
            eval_fraction=0.25,
            imitation_coef=0.1,
            run=RunConfig(str(tmp_path / "reward"), progress=False),
        )
    )
    _compare_stage(str(tmp_path / "reward"), "Reward models")
    train_dpo(
        DPOConfig(
            str(tiny_model),
            data,
            eval_fraction=0.25,
            run=RunConfig(str(tmp_path / "dpo"), progress=False),
        )
    )
    _compare_stage(str(tmp_path / "dpo"), "Direct preference optimisation")
    run = RunConfig(str(tmp_path / "kto"), progress=False)
    train_kto(KTOConfig(str(tiny_model), data, eval_fraction=0.25, run=run))
    _compare_stage(str(tmp_path / "kto"), "Kahneman-Tversky optimisation")


def test_every_metric_of_rejection_sampling_has_its_row(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "rewards.py").write_text(REWARDS)
    config = RejectionConfig(
        str(tiny_model),
        write_jsonl("prompts.jsonl", [{"prompt": f"w{i}"} for i in range(4)]),
        (f"{tmp_path / 'rewards.py'}:likes_w3",),
        steps=1,
        prompts_per_step=2,
        generation=GenerationConfig(max_new_tokens=4),
        run=RunConfig(str(tmp_path / "run"), progress=False),
    )
    train_rejection(config)
    patterns = _patterns("Rejection sampling")
    assert not (set(patterns) - _names(config.run.dir)), "no run writes them"
    completions = {name for name in _names(config.run.dir) if name not in patterns}
    assert all(
        any(
            pattern.fullmatch(name)
            for pattern in _patterns("A policy step", "Time and memory").values()
        )
        for name in completions
    )


def test_the_names_that_options_may_give_are_those_of_the_page():
    tables = PAGE.partition("## Names of TRL")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", tables, flags=re.MULTILINE)
    names = {re.sub(r"<\w+>", "*", name) for cell in cells for name in re.findall("`(.+?)`", cell)}
    assert set(METRICS) == names
