"""The verifier of GSM8K and the reward for abstaining, through the loader that runs use."""

import math
import re
from pathlib import Path

import pytest

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.data.readers import load_demonstrations, load_prompts
from fusedrl.engine.rewards.rewards import RewardSet, load_reward

REWARDS = Path(__file__).resolve().parents[3] / "examples/rewards"


def _score(name, completions, prompts=None, **columns):
    count = len(completions)
    return RewardSet([load_reward(f"{REWARDS}/{name}")]).score(
        prompts or ["p"] * count, completions, [[1]] * count, [[2]] * count, columns
    )


# ---- GSM8K ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "completion, gold, exact, last",
    [
        ("6*7=42\n#### 42", "42", 1, 1),
        ("#### 1,042", "1042", 1, 1),
        ("#### $42.00.", "42", 1, 1),
        ("#### 42%", "42", 1, 1),
        ("####42", "42", 1, 1),
        ("#### 41\n#### 42", "42", 1, 1),
        ("#### 42\n#### 41", "42", 0, 0),
        ("#### -3.5", "-3.5", 1, 1),
        ("#### .5", "0.5", 1, 1),
        ("The answer is 42.", "42", 0, 1),
        ("42 of 43", "42", 0, 0),
        ("#### 420", "42", 0, 0),
        ("#### 42.5", "42", 0, 0),
        ("#### 1,04", "1", 0, 0),
        ("#### forty-two", "42", 0, 0),
        ("", "42", 0, 0),
        ("#### ", "42", 0, 0),
        ("#### 2\nso 7 in all", "2", 1, 0),
        ("#### 1" + "0" * 5000, "1", 0, 0),
    ],
)
def test_the_number_behind_the_mark_is_compared_as_a_number(completion, gold, exact, last):
    assert _score("gsm8k.py:exact", [completion], gold=[gold]).total == [exact]
    assert _score("gsm8k.py:last_number", [completion], gold=[gold]).total == [last]


@pytest.mark.parametrize(
    "completion, gold, right",
    [
        ("The answer is...18", "18", 1),
        ("So she has: ...54 eggs.", "54", 1),
        ("The answer is.18", "18", 1),
        ("The share is .18", "0.18", 1),
        ("The result-18", "18", 1),
        ("The result\u201418", "18", 1),
        ("It is -18", "-18", 1),
        ("x = -18", "-18", 1),
        ("-$3", "-3", 1),
        ("$-3", "-3", 1),
        ("\u22123", "-3", 1),
        ("1/2", "0.5", 1),
        ("1/2", "2", 0),
        ("1/0", "0", 0),
        ("10-4", "4", 0),
        ("10 - 4", "4", 0),
        ("10-4=6", "6", 1),
        ("12 / 3 / 2", "2", 0),
        ("2x4", "4", 0),
        ("3 \\times 4", "4", 0),
        ("3^2", "2", 0),
        ("2 -3", "-3", 1),
        ("1.5e3", "1500", 1),
        ("3 eggs", "3", 1),
        ("1e999", "1", 0),
        ("18.", "18", 1),
        ("$1,200", "1200", 1),
        ("18.0", "18", 1),
        (r"\boxed{18}", "18", 1),
        ("**18**", "18", 1),
        ("1200", "1,200", 1),
        ("5", "$5", 1),
        ("0.5", "1/2", 1),
        ("3", 3, 1),
        ("0.25", 0.25, 1),
    ],
)
def test_a_number_is_read_by_one_rule(completion, gold, right):
    assert _score("gsm8k.py:last_number", [completion], gold=[gold]).total == [right]
    # behind the mark the first number counts, and no other stands here
    if completion[0] in "$-\u22120123456789" and not set(completion) & set(" ="):
        assert _score("gsm8k.py:exact", [f"so 7\n#### {completion}"], gold=[gold]).total == [right]


@pytest.mark.parametrize("gold", ["", "abc", "1/0", "10-4", "18 eggs", True, [18]])
@pytest.mark.parametrize("name", ["exact", "last_number"])
def test_a_gold_that_is_no_number_is_named(gold, name):
    with pytest.raises(
        RewardError,
        match=rf"reward '{name}' raised ValueError: row 1: expected a number in the column gold, "
        rf".* got {re.escape(repr(gold))}; null leaves",
    ):
        _score(f"gsm8k.py:{name}", ["18", "18"], gold=["18", gold])


def test_rows_without_a_gold_number_are_left_to_other_rewards_and_chats_are_read():
    chat = [{"role": "user", "content": "q"}]
    scores = _score(
        "gsm8k.py:exact",
        ["#### 1", "#### 1", "#### 2"],
        prompts=["p", chat, chat],
        gold=[None, "1", "1"],
    )
    assert scores.per_reward == {"exact": [None, 1.0, 0.0]}
    assert math.isnan(scores.total[0])


def test_every_real_solution_is_right_and_its_neighbours_is_not(shared):
    path = shared / "data/gsm8k/test.jsonl"
    gold = [example.columns["gold"] for example in load_prompts(path)]
    solutions = [example.completion for example in load_demonstrations(path)]
    assert len(gold) == 1319
    for name in ("exact", "last_number"):
        assert set(_score(f"gsm8k.py:{name}", solutions, gold=gold).total) == {1.0}
    shifted = _score("gsm8k.py:exact", solutions[1:] + solutions[:1], gold=gold).total
    assert sum(shifted) == sum(a == b for a, b in zip(gold, gold[1:] + gold[:1], strict=True))


# ---- abstention ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "completion, answers, kind, value",
    [
        ("It is the Eiffel Tower, in Paris.", "Eiffel Tower", "knowledge-seeking", 1.0),
        ("It is in Rome.", ["Paris"], "knowledge-seeking", -5.0),
        ("I don't know.", ["Paris"], "knowledge-seeking", -0.5),
        ("I\u2019m not sure, but Paris.", ["Paris"], "knowledge-seeking", -0.5),
        ("paris!", ["Lyon", "PARIS"], None, 1.0),
        ("Parisian", "Paris", None, -5.0),
        ("我不知道", "巴黎", None, -0.5),
        ("答案是巴黎。", "巴黎", None, 1.0),
        ("I cannot say.", "Paris", "text-grounded", -0.5),
        ("Rome", "Paris", "text-grounded", -1.0),
        ("There is not enough information.", [], "text-grounded", 1.0),
        ("Rome", None, "text-grounded", -1.0),
        ("", "Paris", None, -5.0),
        ("Once upon a time", None, "creative", None),
    ],
)
def test_right_answers_beat_abstaining_and_abstaining_beats_mistakes(
    completion, answers, kind, value
):
    assert _score(
        "abstention.py:honest", [completion], answers=[answers], type=[kind]
    ).per_reward == {"honest": [value]}


def test_the_type_column_may_be_missing_and_may_not_be_unknown():
    assert _score("abstention.py:honest", ["Paris", "Rome"], answers=["Paris", "Paris"]).total == [
        1.0,
        -5.0,
    ]
    with pytest.raises(
        ValueError, match="expected a type of text-grounded, knowledge-seeking or creative, got 'x'"
    ):
        _score("abstention.py:honest", ["Paris"], answers=["Paris"], type=["x"])


# ---- a reward that is there to be hacked ---------------------------------------------------------
def test_cheerful_words_are_counted_however_often_they_come():
    texts = ["", "Tom was HAPPY. He smiled!", "unhappy unhappily", "happy " * 9]
    assert _score("cheerful.py:cheerful", texts).total == [0.0, 2.0, 0.0, 9.0]
