"""A reward tried before a run: rewards whose faults are known, and the command."""

import itertools
import json
import math
import os
import subprocess
import sys
import time

import pytest
from tests.support.ranks import ROOT

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.cli.main import main
from fusedrl.engine.rewards.rewards import load_reward
from fusedrl.engine.watch.reward_check import Sample, check_reward, check_tables, try_reward

pytestmark = pytest.mark.cpu_only("functions on texts")


def samples(texts, groups=None, ranks=None, **columns):
    groups = groups or list(range(len(texts)))
    return [
        Sample(
            f"p{group}",
            [1],
            text,
            list(text.encode()),
            {name: column[i] for name, column in columns.items()},
            group,
            None if ranks is None else ranks[i],
            group,
        )
        for i, (text, group) in enumerate(zip(texts, groups, strict=True))
    ]


def check(function, texts, groups=None, ranks=None, **options):
    return check_reward(load_reward(function), samples(texts, groups, ranks), **options)


def sizes(completions, **columns):
    return [float(len(text)) for text in completions]


def test_the_distribution():
    found = check(sizes, ["a" * n for n in range(1, 101)])
    assert (found.valid, found.mean, found.distinct) == (100, 50.5, 100)
    assert found.quantiles == {"min": 1, "5%": 6, "50%": 51, "95%": 95, "max": 100}
    assert sum(count for _, _, count in found.histogram) == 100
    assert len(found.histogram) == 10
    assert found.with_length == pytest.approx(1.0)
    assert found.changed == (0, 0.0)
    few = check(
        lambda completions, **_: [float(len(t) > 1) for t in completions], ["a", "bb", "cc"]
    )
    assert few.histogram == [(0.0, 0.0, 1), (1.0, 1.0, 2)]


def test_ties_are_of_prompts_with_several_completions():
    found = check(sizes, ["a", "b", "cc", "d", "ee"], [0, 0, 1, 1, 2])
    assert (found.ties.value, found.several) == (0.5, 2)
    assert check(sizes, ["a", "b"]).ties is None


def test_failures_by_kind_with_an_example():
    def wild(completions, **columns):
        values = {"nan": math.nan, "inf": math.inf, "word": "much", "none": None, "huge": 1e300}
        found = []
        for text in completions:
            if text == "raise":
                raise ZeroDivisionError("no")
            if text == "exit":
                sys.exit(1)
            found.append(values.get(text, 1.0))
        return found

    texts = ["good", "nan", "inf", "word", "none", "raise", "exit", "raise", "huge", "good"]
    found = check(wild, texts)
    assert {kind: one["completions"] for kind, one in found.failures.items()} == {
        "raised ZeroDivisionError": 2,
        "NaN": 1,
        "infinite": 1,
        "no number": 1,
        "None: does not apply": 1,
        "raised SystemExit": 1,
        "too large": 1,
    }
    one = found.failures["raised ZeroDivisionError"]
    assert (one["prompt"], one["completion"]) == ("'p5'", "raise")
    assert "test_reward_check.py" in one["message"]
    assert found.valid == 2
    assert found.changed == (0, 0.0)


@pytest.mark.parametrize(
    "returned, kind",
    [
        (lambda texts: 3.0, "returned no list"),
        (lambda texts: [1.0] * (len(texts) + 1), "returned a list of another length"),
        (lambda texts: dict.fromkeys(texts, 1.0), "returned no list"),
    ],
)
def test_what_is_no_list_of_that_length(returned, kind):
    found = check(lambda completions, **columns: returned(completions), ["a"] * 6)
    assert {kind: 6} == {name: one["completions"] for name, one in found.failures.items()}


def test_a_reward_that_fails_for_all_is_not_called_for_each():
    calls = itertools.count()

    def broken(completions, **columns):
        next(calls)
        raise KeyError("gold")

    found = check(broken, ["a"] * 64)
    assert found.failures["raised KeyError"]["completions"] == 64
    assert next(calls) <= 2 * (1 + 4)
    assert math.isnan(found.mean)
    assert check_tables(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_reward_that_fails_for_several_at_once_alone():
    def single(completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [1.0]

    assert check(single, ["a", "b"]).failures["raised ValueError"]["completions"] == 2


def test_a_column_that_is_missing():
    def needs(completions, gold):
        return [1.0] * len(completions)

    (kind,) = check(needs, ["a"]).failures
    assert kind == "refused: needs the column 'gold' of the data, which has none beside the prompt"


def test_a_reward_that_says_another_thing_the_second_time():
    turn = itertools.count()

    def moody(completions, **columns):
        add = next(turn)
        return [len(text) + add * (text == "b") for text in completions]

    assert check(moody, ["a", "b", "c"]).changed == (1, 1.0)


def test_a_call_that_hangs_is_ended_and_said():
    def sleepy(completions, **columns):
        time.sleep(0.0 if completions == ["b"] else 30.0)
        return [1.0] * len(completions)

    began = time.monotonic()
    found = check(sleepy, ["a", "b", "c"], limit=0.2)
    assert time.monotonic() - began < 5
    assert found.failures["took longer than 0.2 s"]["completions"] == 2
    assert found.valid == 1
    assert found.changed is None


def test_a_pattern_that_backtracks_is_ended():
    pattern = load_reward("regex:pattern=^(a+)+$")
    found = try_reward(pattern, samples(["a" * 40 + "b"]), limit=0.3)
    assert found.hung


def test_better_answers():
    texts, groups = ["aaa", "b", "c", "dd", "ee", "ff"], [0, 0, 1, 1, 2, 2]
    assert check(sizes, texts, groups, [1, 2] * 3).ranked.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert check(sizes, texts, groups).ranked is None


def test_agreement_with_another_reward():
    def short(completions, **columns):
        return [-float(len(text)) for text in completions]

    texts, groups = ["a", "bb", "ccc", "dddd"], [0, 0, 1, 1]
    for other, sign in ((sizes, 1.0), (short, -1.0)):
        found = check(sizes, texts, groups, against=load_reward(other)).against
        assert (found.completions, found.pairs) == (4, 2)
        assert (found.spearman, found.kendall) == pytest.approx((sign, sign))
        assert found.ordered_alike.value == (sign + 1) / 2


def test_nothing_to_try():
    with pytest.raises(RewardError, match="at least one completion"):
        check(sizes, [])


# ---- the command ---------------------------------------------------------------------------------
def told(capsys, *argv):
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_on_pairs(write_jsonl, tmp_path, capsys):
    rows = [
        {"prompt": "p", "chosen": f"[[{n}]] \U0001f600", "rejected": "no"} for n in range(3)
    ] + [{"prompt": "q", "chosen": "w", "rejected": "\u05e9\u05dc\u05d5\u05dd"}]
    (tmp_path / "r.py").write_text(
        "def size(completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "def bad(completions, **_):\n"
        "    return [1 / 0 if '[[1]]' in one else 1.0 for one in completions]\n"
    )
    data, spec = write_jsonl("pairs.jsonl", rows), f"{tmp_path}/r.py:size"
    code, out, err = told(
        capsys,
        "reward-check",
        spec,
        "--data",
        data,
        "--against",
        f"{tmp_path}/r.py:bad",
        "--output-json",
        tmp_path / "found.json",
    )
    assert code == 0, err
    assert "75.0% (30.1% to 95.4%)" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completions"], found["prompts"], found["several"]) == (8, 2, 2)
    code, out, _ = told(capsys, "reward-check", f"{tmp_path}/r.py:bad", "--data", data)
    assert code == 0
    assert "raised ZeroDivisionError" in out
    assert "[[1]]" in out


def test_the_command_on_completions_of_a_model(write_jsonl, tiny_model, tmp_path, capsys):
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i}", "gold": "w3"} for i in range(6)])
    code, out, err = told(
        capsys,
        "reward-check",
        "length:target=4",
        "--data",
        data,
        "--model",
        tiny_model,
        "--n",
        3,
        "--max_new_tokens",
        8,
        "--output-json",
        "-",
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["completions"], found["prompts"], found["several"]) == (18, 6, 6)
    assert found["valid"] == 18


def test_mistakes(write_jsonl, tiny_model, tmp_path, capsys):
    data = write_jsonl("rows.jsonl", [{"prompt": "p", "completion": "w1 w2"}])
    for argv, message in (
        (["length:target=3", "--data", data], "length reads token ids; say whose with --tokenizer"),
        (["nope", "--data", data], "or one of exact_match"),
        (["exact_match", "--data", tmp_path / "none.jsonl"], "no such data file"),
        (["exact_match", "--data", write_jsonl("p.jsonl", [{"prompt": "p"}])], "rows with answers"),
        (["exact_match", "--data", data, "--timeout", "-1"], "--timeout"),
        (["exact_match"], "--data"),
    ):
        code, _, err = told(capsys, "reward-check", *argv)
        assert code == 2, argv
        assert message in err
        assert err.count("\n") == 1
    code, out, _ = told(
        capsys,
        "reward-check",
        "length:target=3",
        "--data",
        data,
        "--tokenizer",
        tiny_model,
        "--output-json",
        "-",
    )
    assert code == 0
    assert json.loads(out)["mean"] == 0.0  # two words and the EOS


def test_a_reward_that_waits_for_ever_does_not_hold_the_command(write_jsonl, tmp_path):
    """One that is async, too: it runs in a thread of its own."""
    (tmp_path / "r.py").write_text(
        "import time\nasync def stuck(completions, **_):\n    time.sleep(3600)\n"
    )
    data = write_jsonl("rows.jsonl", [{"prompt": "p", "completion": "w1 w2"}])
    began = time.monotonic()
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "fusedrl.engine.cli", "reward-check"),
            *(f"{tmp_path}/r.py:stuck", "--data", data, "--timeout", "1"),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "took longer than 1 s" in ran.stdout, ran.stderr[-2000:]
    assert ran.returncode == 0
    assert time.monotonic() - began < 60
