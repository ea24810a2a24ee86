"""The environments in examples/: their rules, and that a run plays them."""

import json
from pathlib import Path

import pytest
from examples.calculator import calculate
from examples.guess_number import LARGEST, Game, write_task

from fusedrl.engine.config import GenerationConfig, KLConfig, PolicyConfig, RunConfig, TurnsConfig
from fusedrl.engine.rewards.tools import schemas_of
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.stages.policy import train_policy

pytestmark = pytest.mark.cpu_only("environments are Python")
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_who_searches_by_halves_finds_every_number_in_four_guesses():
    for secret in range(1, LARGEST + 1):
        game, low, high = Game(), 1, LARGEST
        assert game.reset({"prompt": "guess", "secret": secret}) == "guess"
        for _ in range(4):
            middle = (low + high) // 2
            said, reward, done, _ = game.step(f" {middle}")
            if done:
                break
            low, high = (middle + 1, high) if said == "higher" else (low, middle - 1)
        assert (done, reward) == (True, 1.0)
    assert game.step("higher") == ("what", 0.0, False, {"no_number": 1.0})


def test_a_run_plays_the_game(tmp_path):
    task = write_task(tmp_path / "task")
    config = PolicyConfig(
        str(task / "model"),
        str(task / "games.jsonl"),
        (),
        "grpo",
        steps=2,
        prompts_per_step=15,
        samples_per_prompt=4,
        environment=f"{EXAMPLES / 'guess_number.py'}:Game",
        turns=TurnsConfig(max_turns=4),
        generation=GenerationConfig(max_new_tokens=1),
        kl=KLConfig(coef=0.0),
        device="cpu",
        run=RunConfig(str(tmp_path / "run"), progress=False),
    )
    train_policy(config)
    rows = list(read_rows(f"{config.run.dir}/metrics.jsonl"))
    assert [row["turns/failures"] for row in rows] == [0.0, 0.0]
    assert all(0 <= row["rewards/Game/mean"] <= 1 and row["turns/max"] <= 4 for row in rows)
    assert all(row["environment/no_number"] > 0 for row in rows)  # it knows no numbers yet
    sample = json.loads(Path(f"{config.run.dir}/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "guess"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48 + 48 / 2", "72"),
        ("(1,200 - 200) * 3 % 7", "4"),
        ("$5 * -2", "-10"),
        ("7 // 2", "3"),
        ("1 / 3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
    ],
)
def test_the_calculator_is_right(text, result):
    assert calculate(text) == result


@pytest.mark.parametrize(
    "text", ["", "2 ** 3", "a + 1", "__import__('os')", "1e300 * 1e300", "1" * 201]
)
def test_the_calculator_refuses_what_is_no_sum(text):
    with pytest.raises((ValueError, SyntaxError)):
        calculate(text)
    with pytest.raises(ZeroDivisionError):
        calculate("1 / 0")


def test_the_model_is_told_how_to_use_the_calculator():
    (schema,) = schemas_of([f"{EXAMPLES / 'calculator.py'}:calculate"])
    told = schema["function"]
    assert told["parameters"]["required"] == ["expression"]
    assert told["description"].startswith("Work out an arithmetic expression")
