"""What the metrics give cause to say: each thing once, when it has lasted, and only where it
means something."""

import json
import math

import pytest

from fusedrl.engine.config import (
    GenerationConfig,
    LossConfig,
    PolicyConfig,
    RejectionConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.runs import cautions
from fusedrl.engine.runs.cautions import Cautions, bounds_of
from fusedrl.engine.stages.policy import train_policy

pytestmark = pytest.mark.cpu_only("arithmetic of the host")
CLIP, GAP = "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean"
CASES = [  # metric, value within bounds, value beyond, steps until it is said, words
    ("completions/clipped_ratio", 0.5, 0.75, 5, "75% of the completions are cut off"),
    ("val/explained_variance", 0.05, -0.5, 50, "the critic explains -50% of the variance"),
    (CLIP, 0.5, 0.6, 5, "removes the gradient of 60% of the tokens"),
    (CLIP, 0.01, 0.0, 50, "the clip has never acted"),
    (GAP, 1e-4, 0.02, 1, "differ by 0.02 nats a token, more than float32 rounds"),
]


def _config(**options) -> PolicyConfig:
    return PolicyConfig("m", "d", ("r.py:f",), "ppo", **options)


def test_what_a_limit_of_turns_ends_is_said_of_trajectories():
    config = PolicyConfig("m", "d", (), "ppo", environment="e.py:E")
    found = Cautions(config, "float32")
    (said,) = [x for _ in range(9) for x in found.update({"completions/clipped_ratio": 0.75})]
    assert "75% of the trajectories are ended by a limit (turns.max_turns = 8, or another)" in said
    assert "max_new_tokens" not in said


@pytest.mark.parametrize("metric, good, bad, steps, words", CASES)
def test_said_once_when_it_has_lasted(metric, good, bad, steps, words):
    found = Cautions(_config(), "float32")
    assert not [said for _ in range(200) for said in found.update({metric: good})] or good == 0.0
    found = Cautions(_config(), "float32")
    for _ in range(2):  # a good step in between begins the count again
        assert not [said for _ in range(steps - 1) for said in found.update({metric: bad})]
        assert not found.update({metric: good})
    said = [(step, text) for step in range(1, 200) for text in found.update({metric: bad})]
    assert [step for step, _ in said] == [steps]
    assert words in said[0][1]
    assert said[0][1].startswith(f"for {steps} steps now, ") is (steps > 1)


def test_what_was_not_measured_counts_neither_way():
    found = Cautions(_config(), "float32")
    for value in (0.9, None, math.nan, 0.9, 0.9, 0.9):
        assert not found.update({"completions/clipped_ratio": value})
        assert not found.update({})
    assert found.update({"completions/clipped_ratio": 0.9})


def test_only_where_it_means_something():
    def metrics(config, dtype="float32"):
        return [b.metric for b in bounds_of(config, dtype)]

    assert metrics(SFTConfig("m", "d")) == []
    rejection = RejectionConfig("m", "d", ("r.py:f",))
    assert metrics(rejection) == ["completions/clipped_ratio"]
    assert metrics(_config()).count(CLIP) == 2
    once = _config(epochs=1, minibatches=1)
    assert once.idle_bounds
    assert CLIP not in metrics(once)
    free = _config(loss=LossConfig(objective="reinforce"))
    assert CLIP not in metrics(free)
    for name in ALGORITHMS:
        config = PolicyConfig("m", "d", ("r.py:f",), name)
        assert (CLIP in metrics(config)) is (
            config.loss.clip_low is not None and not config.idle_bounds
        )


def test_bfloat16_rounds_more_than_float32():
    for dtype, value in cautions.MOST_GAP.items():
        found = Cautions(_config(), dtype)
        assert not found.update({GAP: 0.9 * value})
        assert found.update({GAP: 1.1 * value})


def test_a_run_says_it_and_a_resumed_run_does_not_say_it_again(
    tiny_model, tmp_path, write_jsonl, capsys
):
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, completion_ids, **_):\n"
        "    return [float(len(set(ids))) for ids in completion_ids]\n"
    )

    def train(steps: int, resume: bool) -> str:
        train_policy(
            PolicyConfig(
                str(tiny_model),
                write_jsonl("prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}]),
                (f"{tmp_path / 'r.py'}:f",),
                "grpo",
                steps=steps,
                prompts_per_step=2,
                samples_per_prompt=2,
                generation=GenerationConfig(max_new_tokens=1),
                mask_truncated_completions=True,
                run=RunConfig(str(tmp_path / "run"), resume=resume, progress=False),
            )
        )
        return capsys.readouterr().err

    said = train(6, False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert min(row["completions/clipped_ratio"] for row in rows[:5]) > cautions.MOST_CUT_OFF
    assert said.count("are cut off at generation.max_new_tokens = 1") == 1
    assert "step 5: for 5 steps now" in said
    every = [row["step"] for row in rows if row["completions/clipped_ratio"] == 1]
    assert said.count("nothing is learned of the rewards") == 1
    assert f"step {every[0]}: all completions are cut off" in said
    assert "are cut off" not in train(12, True)
