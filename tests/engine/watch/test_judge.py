"""Pairwise judging against judges whose bias and accuracy are known."""

import io
import json
import math
import random

import pytest
import torch
from rich.console import Console

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.cli.main import main
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.watch.judge import (
    Answers,
    FunctionJudge,
    Pairs,
    RewardJudge,
    Share,
    judge_pairs,
    load_judge,
    report_table,
)


def _pairs(a, b, columns=None) -> Pairs:
    prompts = [f"p{i}" for i in range(len(a))]
    return Pairs(
        prompts,
        [[1]] * len(a),
        Answers(a, [[2] * len(text) for text in a]),
        Answers(b, [[2] * len(text) for text in b]),
        columns or {},
    )


def _good(text: str) -> int:
    """What a text is worth: the number in it."""
    return int(text.partition(" ")[0])


def test_a_judge_that_always_prefers_the_first():
    found = judge_pairs(
        FunctionJudge(lambda prompts, a, b: ["a"] * len(a)), _pairs(["x"] * 200, ["yy"] * 200)
    )
    assert (found.win_rate.value, found.first_wins.value, found.inconsistent.value) == (
        0.5,
        1.0,
        1.0,
    )
    assert (found.wins, found.ties, found.losses) == (0, 200, 0)
    assert found.first_wins.low > 0.97
    assert found.win_rate.low < 0.5 < found.win_rate.high
    second = judge_pairs(
        FunctionJudge(lambda prompts, a, b: [0.0] * len(a)), _pairs(["x"] * 200, ["yy"] * 200)
    )
    assert (second.win_rate.value, second.first_wins.value) == (0.5, 0.0)


def test_a_judge_that_is_right():
    a, b = ["3 x", "1 x", "2 x", "5 x"], ["1 y", "4 y", "2 yy", "0 y"]
    found = judge_pairs(
        FunctionJudge(
            lambda a, b: [
                "tie" if _good(x) == _good(y) else "a" if _good(x) > _good(y) else "b"
                for x, y in zip(a, b, strict=True)
            ]
        ),
        _pairs(a, b),
    )
    assert found.preferences == [1.0, 0.0, 0.5, 1.0]
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate.value == pytest.approx(2.5 / 4)
    assert found.inconsistent.value == 0.0
    assert found.first_wins.value == 0.5
    assert found.longer_wins.value == 0.5  # of the one pair whose lengths differ, a tie


def test_the_verdict_in_each_order_by_hand():
    """P(first is better) of .8 and .4: A is preferred by (.8 + .6) / 2, in both orders; what stands
    first gets (.8 + .4) / 2."""
    verdicts = iter([[0.8], [0.4]])
    found = judge_pairs(FunctionJudge(lambda a, b: next(verdicts)), _pairs(["long"], ["x"]))
    assert found.preferences == pytest.approx([0.7])
    assert found.first_wins.value == pytest.approx(0.6)
    assert (found.wins, found.inconsistent.value, found.longer_wins.value) == (
        1,
        0.0,
        pytest.approx(0.7),
    )


def _noisy(accuracy: float, rng: random.Random):
    def judge(prompts, a, b):
        return [
            "a" if (_good(x) > _good(y)) == (rng.random() < accuracy) else "b"
            for x, y in zip(a, b, strict=True)
        ]

    return FunctionJudge(judge)


def test_the_interval_covers_for_a_noisy_judge_and_no_bias_is_found_where_there_is_none():
    """A is better in 70% of the pairs, the judge right in 80%: A is preferred in .7 x .8 + .3 x .2
    = 62%."""
    rng = random.Random(0)
    won = unbiased = 0
    for _ in range(200):
        better = [rng.random() < 0.7 for _ in range(60)]
        found = judge_pairs(
            _noisy(0.8, rng),
            _pairs(
                ["1 x" if a else "0 x" for a in better], ["0 y" if a else "1 y" for a in better]
            ),
        )
        won += found.win_rate.low <= 0.62 <= found.win_rate.high
        unbiased += found.first_wins.low <= 0.5 <= found.first_wins.high
        assert found.inconsistent.value == pytest.approx(found.ties / 60)
    assert won >= 185
    assert unbiased >= 185


def test_judging_in_one_order_alone_would_mislead():
    """Sides are equal, and the judge takes the first in 80%: both orders say 50%, one would say
    80%."""
    rng = random.Random(1)
    judge = FunctionJudge(lambda a, b: [float(rng.random() < 0.8) for _ in a])
    found = judge_pairs(judge, _pairs(["x"] * 2000, ["y"] * 2000))
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert abs(found.win_rate.value - 0.5) < 0.03
    assert abs(found.first_wins.value - 0.8) < 0.03


def test_a_judge_that_likes_length():
    rng = random.Random(2)
    a, b = (
        ["x" * rng.randint(1, 9) for _ in range(100)],
        ["x" * rng.randint(1, 9) for _ in range(100)],
    )
    found = judge_pairs(
        FunctionJudge(
            lambda a, b: [
                float(len(x) > len(y)) if len(x) != len(y) else "tie"
                for x, y in zip(a, b, strict=True)
            ]
        ),
        _pairs(a, b),
    )
    assert found.longer_wins.value == 1.0
    assert found.first_wins.value == 0.5
    same = judge_pairs(FunctionJudge(lambda a, b: ["tie"] * len(a)), _pairs(["x"] * 3, ["y"] * 3))
    assert math.isnan(same.longer_wins.value)
    assert same.to_json()["longer_wins"] == {"value": None, "low": 0.0, "high": 1.0}
    json.dumps(same.to_json(), allow_nan=False)
    for report in (found, same):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(report_table(report, ("new", "old")))
        assert "new (A) against old (B)" in console.export_text()


def test_intervals_are_over_prompts():
    """Forty pairs of four prompts that agree within each are four observations."""
    better = [group % 2 for group in range(4) for _ in range(10)]
    pairs = _pairs([f"{x} a" for x in better], [f"{1 - x} b" for x in better])
    judge = FunctionJudge(
        lambda a, b: [float(_good(x) > _good(y)) for x, y in zip(a, b, strict=True)]
    )
    groups = [group for group in range(4) for _ in range(10)]
    grouped, flat = judge_pairs(judge, pairs, groups), judge_pairs(judge, pairs)
    assert (grouped.win_rate.value, grouped.prompts, grouped.pairs) == (0.5, 4, 40)
    assert grouped.win_rate.high - grouped.win_rate.low > 2 * (
        flat.win_rate.high - flat.win_rate.low
    )
    # prompts count alike, however many pairs they have
    assert Share.of([1.0, 1.0, 0.0], [0, 0, 1]).value == 0.5


def test_the_columns_that_a_judge_names_reach_it():
    def judge(prompts, a, b, answer):
        assert prompts == ["p0", "p1"]
        return [float(x == right) for x, right in zip(a, answer, strict=True)]

    assert judge_pairs(
        FunctionJudge(judge),
        _pairs(["x", "y"], ["u", "v"], {"answer": ["x", "v"], "other": [1, 2]}),
    ).preferences == [1.0, 0.0]


def test_a_judge_made_of_rewards():
    def length(completions, completion_ids):
        return [
            None if text == "none" else float("nan") if text == "bad" else len(ids)
            for text, ids in zip(completions, completion_ids, strict=True)
        ]

    judge = RewardJudge(RewardSet([load_reward(length)]))
    found = judge_pairs(
        judge, _pairs(["aaa", "a", "aa", "bad", "none"], ["b", "bb", "bb", "b", "bad"])
    )
    assert found.preferences == [1.0, 0.0, 0.5, 0.0, 0.5]
    assert found.first_wins.value == 0.5


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (["a"], "judge 'judge': expected 3 verdicts, one per pair, got 1"),
        ("aab", "expected a list of 3 verdicts"),
        (None, "got NoneType"),
        (["a", "b", "c"], "for pair 2, got 'c'"),
        ([0.5, 1.5, 0.0], "pair 1, got 1.5"),
        ([0.5, math.nan, 0.0], "pair 1"),
        (["a", None, "b"], "pair 1, got None"),
        ([True, False, True], "pair 0, got True"),
    ],
)
def test_what_a_judge_must_not_return(returned, message):
    def judge(a, b):
        return returned

    with pytest.raises(RewardError, match=message):
        judge_pairs(FunctionJudge(judge), _pairs(["x"] * 3, ["y"] * 3))


def test_a_judge_that_raises_and_one_that_is_not_there(tmp_path):
    def broken(a, b):
        raise KeyError("no such thing")

    with pytest.raises(
        RewardError,
        match=r"judge 'broken' raised KeyError: 'no such thing' \(.*test_judge.py:\d+\)",
    ):
        judge_pairs(FunctionJudge(broken), _pairs(["x"], ["y"]))

    class Silent(Exception):
        def __str__(self):
            return self.missing

        __repr__ = __str__

    def silent(a, b):
        raise Silent

    with pytest.raises(RewardError, match="'silent' raised Silent: <its text cannot be shown>"):
        judge_pairs(FunctionJudge(silent), _pairs(["x"], ["y"]))
    with pytest.raises(RewardError, match="for pair 0, got a Silent that cannot be shown"):
        judge_pairs(FunctionJudge(lambda a, b: [Silent()]), _pairs(["x"], ["y"]))
    with pytest.raises(RewardError, match="at least one pair"):
        judge_pairs(FunctionJudge(broken), _pairs([], []))
    (tmp_path / "judges.py").write_text("def first(a, b):\n    return ['a'] * len(a)\n")
    assert (
        judge_pairs(
            load_judge(f"{tmp_path / 'judges.py'}:first"), _pairs(["x"], ["y"])
        ).first_wins.value
        == 1.0
    )
    for spec, message in (
        (f"{tmp_path / 'judges.py'}:second", "judge .*its functions: first"),
        ("nowhere.py:f", "judge nowhere.py:f: there is no such file"),
        (str(tmp_path), "expected file.py:function"),
    ):
        with pytest.raises(RewardError, match=message):
            load_judge(spec)


def test_tensors_of_probabilities():
    found = judge_pairs(
        FunctionJudge(lambda a, b: torch.tensor([0.25] * len(a))), _pairs(["x"] * 2, ["y"] * 2)
    )
    assert found.first_wins.value == 0.25


# ---- the command ---------------------------------------------------------------------------------
def test_the_command(tiny_model, tmp_path, write_jsonl, capsys):
    (tmp_path / "judges.py").write_text(
        "def longer(prompts, a, b, row):\n"
        "    return [float(len(x) > len(y)) if len(x) != len(y) else .5 for x, y in zip(a, b)]\n"
        "def count(prompts, completions, completion_ids, **columns):\n    return [float(len(text)) "
        "for text in completions]\n"
        "def broken(a, b):\n    return [2.0] * len(a)\n"
    )
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i}", "row": i} for i in range(6)])
    models = ["--a", str(tiny_model), "--b", str(tiny_model)]
    common = ["judge", *models, "--data", data, "--max_new_tokens", "5", "--n", "2"]
    found = {}
    for way in (
        ["--judge", f"{tmp_path / 'judges.py'}:longer"],
        ["--reward", f"{tmp_path / 'judges.py'}:count"],
    ):
        assert main([*common, *way, "--output-json", "-"]) == 0
        found[way[0]] = json.loads(capsys.readouterr().out)
    ours, theirs = found.values()
    assert (ours["pairs"], ours["prompts"]) == (12, 6)
    assert ours["longer_wins"]["value"] == 1.0
    assert ours["preferences"] == theirs["preferences"]  # the same question
    assert len(set(ours["preferences"])) > 1  # one model against itself draws other completions
    assert (
        main(
            [
                *common,
                "--judge",
                f"{tmp_path / 'judges.py'}:longer",
                "--rows",
                "3",
                "--output-json",
                str(tmp_path / "out.json"),
            ]
        )
        == 0
    )
    assert "win rate of A" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["prompts"] == 3
    for way, message in (
        (["--judge", f"{tmp_path / 'judges.py'}:broken"], "got 2.0"),
        (["--judge", "x.py:f"], "there is no such file"),
        (["--reward", "x.py:f"], "there is no such file"),
        (["--reward", "x", "--rows", "-1"], "--rows"),
        (
            ["--reward", f"{tmp_path / 'judges.py'}:count", "--max_new_tokens", "64"],
            "--max_new_tokens below the model's 64 positions",
        ),
    ):
        assert main([*common, *way]) == 2
        assert message in capsys.readouterr().err
    assert main(common) == 2  # by what?
