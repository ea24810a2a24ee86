"""Ready rewards: right answers, form, length, and how their names and options are read."""

import functools
import gc
import json
import math
import warnings

import pytest

from fusedrl.engine.base.errors import RewardError, SetupError
from fusedrl.engine.cli.main import main
from fusedrl.engine.rewards import ready as ready_rewards
from fusedrl.engine.rewards.answers import final_answer, last_number, same_answer
from fusedrl.engine.rewards.ready import READY, exact_match, length, ready
from fusedrl.engine.rewards.rewards import RewardSet, load_reward

pytestmark = pytest.mark.cpu_only("texts alone")


def scored(spec, completions, ids=None, prompts=None, **columns):
    count = len(completions)
    prompts = prompts or ["p"] * count
    ids = ids or [[1]] * count
    return RewardSet([load_reward(spec)]).score(prompts, completions, [[1]] * count, ids, columns)


# ---- answers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"$\boxed{\text{a {b} c}}$", r"\text{a {b} c}"),
        (r"\boxed 7 apples", "7"),
        (r"\boxed{1 was cut off. #### 4", "4"),
        ("so\n#### 18\n", "18"),
        ("#### 3\nno\n#### 4", "4"),
        ("The answer is 12.", "12."),
        ("Answer: 7 \nthank you", "7"),
        ("The final answer is: $\\frac12$", r"$\frac12$"),
        ("<think>#### 3</think>\n#### 4", "4"),
        ("<think>The answer is 3</think>5", "5"),
        ("  42 ", "42"),
        ("", ""),
    ],
)
def test_where_an_answer_stands(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("18", "18.0"),
        ("1,200", "$1200"),
        ("1{,}200", "1200"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\frac{1}{2}", "-.5"),
        (r"3\frac{1}{2}", "3.5"),
        ("50%", "0.5"),
        (r"50\%", "1/2"),
        ("50", "50%"),
        ("12.5%", "12.5"),
        ("\u22123", "-3"),
        ("1.5e3", "1500"),
        ("(1, 2)", "(1.0,2)"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("x = 5", "5"),
        (r"\text{Paris}", "paris"),
        (r"90^\circ", "90"),
        ("5.", "5"),
        ("$x+1$", "x + 1"),
        ("**7**", "7"),
        (r"18 \text{ apples}", "18"),
        (r"\frac{1}{2}\,\text{cm}", "0.5"),
        (r"$18\text{ cm}^{2}$.", r"18\mathrm{\ cm}"),
    ],
)
def test_answers_that_are_the_same(ours, theirs):
    assert same_answer(ours, theirs)
    assert same_answer(theirs, ours)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("18", "81"),
        ("0.33", "1/3"),
        (r"3\frac{1}{2}", "31/2"),
        ("3 1/2", "31/2"),
        ("(1, 2)", "[1, 2]"),
        ("(1, 2)", "(2, 1)"),
        ("(1, 2)", "(1, 2, 3)"),
        ("10-4", "6"),
        ("5 or 6", "5"),
        ("5 million", "5"),
        (r"5 \text{ million}", "5"),
        (r"5 \text{ or } 6", "5"),
        (r"\text{east}", r"\text{west}"),
        ("50%", "5"),
        ("1/0", "0"),
        ("", "0"),
        ("x + 1", "x - 1"),
    ],
)
def test_answers_that_differ(ours, theirs):
    assert not same_answer(ours, theirs)
    assert not same_answer(theirs, ours)


def test_the_last_number():
    assert last_number("of 3 and 5, 5% remain") == "5%"
    assert last_number("10-4=6 pens") == "6"
    assert last_number("it is 10-4") == ""
    assert last_number("none") == ""


def test_exact_match():
    said = ["#### 18", "it is 18", "The answer is 17", "18"]
    found = scored("exact_match", said, gold=["18", "18", 18, None])
    assert found.per_reward["exact_match"] == [1.0, 0.0, 0.0, None]
    assert scored("exact_match:find=number", said[:3], gold=["18"] * 3).total == [1.0, 1.0, 0.0]
    # a solution is read like a completion; several right answers; another column
    assert scored("exact_match", ["7"], answer=["3 + 4 = 7\n#### 7"]).total == [1.0]
    assert scored("exact_match", ["NYC"], answer=[["New York", "nyc"]]).total == [1.0]
    assert scored("exact_match:column=right", ["7"], right=["7"], gold=["8"]).total == [1.0]


def test_exact_match_of_messages():
    prompts = [[{"role": "user", "content": "1 + 1?"}]]
    assert scored("exact_match", ["It is\n#### 2"], prompts=prompts, gold=["2"]).total == [1.0]


def test_columns_that_are_missing_or_hold_no_answer():
    with pytest.raises(RewardError, match=r"one of the columns gold, .* has level beside"):
        scored("exact_match", ["1"], level=[3])
    with pytest.raises(RewardError, match="the column 'right' of the data"):
        scored("exact_match:column=right", ["1"], gold=["1"])
    for wrong in ([], {"a": 1}, True):
        with pytest.raises(RewardError, match="expected a right answer"):
            scored("exact_match", ["1"], gold=[wrong])


def test_math_verify_knows_algebra():
    pytest.importorskip("math_verify")
    said = [r"\boxed{2(x+1)}", r"\boxed{2x+1}", "The answer is 0.5", "nothing", r"\boxed{7}"]
    found = scored("math_verify", said, gold=["2x+2", "2x+2", r"\frac{1}{2}", "1", None])
    assert found.per_reward["math_verify"] == [1.0, 0.0, 1.0, 0.0, None]
    assert scored("exact_match", said[:1], gold=["2x+2"]).total == [0.0]


def test_exact_match_agrees_with_math_verify_on_gsm8k(shared):
    """Real right answers as models write them, and the answers of other questions."""
    pytest.importorskip("math_verify")
    path = shared / "data/gsm8k/test.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[::20]
    gold = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    thirds = [rf"\boxed{{\frac{{{3 * int(one.replace(',', ''))}}}{{3}}}}" for one in gold]
    forms = [rf"So $\boxed{{{one}}}$." for one in gold] + thirds
    forms += [rf"\boxed{{{one} \text{{ apples}}}}" for one in gold] + [*gold[1:], gold[0]]
    same = [1.0] * (3 * len(gold)) + [
        float(a == b) for a, b in zip(gold, [*gold[1:], gold[0]], strict=True)
    ]
    for name in ("exact_match", "math_verify"):
        assert scored(name, forms, gold=gold * 4).total == same, name


def test_math_verify_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(SetupError, match=r"pip install 'fusedrl\[math\]'"):
        ready_rewards.math_verify(["1"], gold=["1"])


# ---- form ----------------------------------------------------------------------------------------
THINK = "<think>\nI \U0001f914\n</think>\n\u05e9\u05dc\u05d5\u05dd"


@pytest.mark.parametrize(
    "options, text, right",
    [
        ("", THINK, 1),
        ("", "<think>a</think>", 0),  # no answer
        ("", "<think> </think>b", 0),
        ("", "b<think>a</think>c", 0),
        ("", "<think>a</think><think>a</think>b", 0),
        ("", "a</think>b", 0),
        (":opened=true", "a</think>b", 1),
        (":opened=true", "<think>a</think>b", 0),
        (":tags=think+answer", "<think>a</think>\n<answer>b</answer>\n", 1),
        (":tags=think+answer", "<think>a</think> so <answer>b</answer>", 0),
        (":tags=think+answer", "<answer>b</answer><think>a</think>", 0),
        (":tags=think+answer", "<think>a<answer>b</answer></think>", 0),
        (":tags=think+answer", "<think>a</think><answer>b</answer> and more", 0),
        ("", "", 0),
    ],
)
def test_format(options, text, right):
    assert scored(f"format{options}", [text]).total == [float(right)]


def test_regex():
    assert scored(r"regex:pattern=^\d+$", ["12", "a12", "1\n2"]).total == [1.0, 0.0, 0.0]
    assert scored("regex:pattern=a,b=c", ["xa,b=cx", "a"]).total == [1.0, 0.0]
    assert scored("regex:pattern=a.b,whole=true", ["a\nb", "xa\nb"]).total == [1.0, 0.0]
    with pytest.raises(RewardError, match="is no regular expression: missing"):
        scored("regex:pattern=(", ["a"])


def test_length():
    ids = [[1] * n for n in (0, 5, 10, 15, 40)]
    texts = ["x"] * 5
    assert scored("length:target=10", texts, ids).total == [-1.0, -0.5, 0.0, -0.5, -1.0]
    assert scored("length:budget=10", texts, ids).total == [0.0, 0.0, 0.0, -0.5, -1.0]
    assert scored("length:budget=2,unit=words", ["a b", "a b c"]).total == [0.0, -0.5]
    assert scored("length:target=4,unit=characters", ["\u05e9\u05dc\u05d5\u05dd"]).total == [0.0]
    for wrong in ("length", "length:target=3,budget=4", "length:target=-1", "length:unit=words"):
        with pytest.raises(RewardError, match="one of the two"):
            scored(wrong, ["a"])
    with pytest.raises(RewardError, match="unit to be tokens, words or characters, got 'bytes'"):
        scored("length:target=3,unit=bytes", ["a"])


# ---- names and options ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec, message",
    [
        ("length:targt=3", "no option 'targt', did you mean target?"),
        ("length:target", "expected a value, length:target=..."),
        ("length:5", "no option '5'; its options: target=..., budget=..., unit=..."),
        ("length:target=many", "expected target to be a whole number, got 'many'"),
        ("format:opened=maybe", "expected opened to be true or false, got 'maybe'"),
        ("regex", "expected regex:pattern=..., which has no default"),
        ("code:seconds=soon", "expected seconds to be a number"),
        ("judge", "expected judge:model=..., which has no default"),
        ("exact_mach", "or one of exact_match, math_verify"),
        ("exact_mach", "did you mean exact_match?"),
        ("Regex:pattern=a", "did you mean regex:pattern=a?"),
    ],
)
def test_options_that_are_wrong(spec, message):
    with pytest.raises(RewardError) as caught:
        load_reward(spec)
    assert message in str(caught.value)


def test_a_judge_is_checked_without_being_asked(monkeypatch, tmp_path):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reward = load_reward("judge:model=x,base_url=http://localhost:1/v1")
        reward.check(["gold"])
        with pytest.raises(SetupError, match="set OPENAI_API_KEY, or name a server of your own"):
            load_reward("judge:model=x")
        with pytest.raises(RewardError, match="expected rubric to be a file"):
            load_reward(f"judge:model=x,rubric={tmp_path / 'none'}")
        with pytest.raises(RewardError, match="concurrency >= 1"):
            load_reward("judge:model=x,concurrency=0")
        gc.collect()
    assert not [one for one in caught if "never awaited" in str(one.message)]


def test_a_directory_of_that_name_is_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()
    assert scored("length:target=1", ["a"]).total == [0.0]


def test_a_column_that_is_called_like_an_option_does_not_set_it():
    assert scored("length:target=1", ["a"], target=["5"], unit=["words"]).total == [0.0]
    # but exact_match reads its right answers there
    assert scored("exact_match", ["5"], target=["5"]).total == [1.0]


def test_they_are_functions_of_trls_contract():
    assert exact_match(prompts=["p"], completions=["5"], completion_ids=[[1]], gold=["5"]) == [1.0]
    short = functools.partial(length, budget=1)
    found = RewardSet([load_reward(short)]).score(["p"], ["a"], [[1]], [[1, 2]])
    assert found.total == [-1.0]
    assert all(READY[name].__doc__ for name in READY)
    assert ready("owner/name") is None
    assert not math.isnan(scored("regex:pattern=a", ["a"]).total[0])


def test_a_run_is_trained_on_them(tiny_model, write_jsonl, tmp_path, capsys):
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i}", "target": "w3"} for i in range(4)])
    code = main(
        [
            *("train", "grpo", "--model", str(tiny_model), "--data", data, "--steps", "1"),
            *("--reward", "length:target=4", "--reward", "regex:pattern=w[1,2]", "--reward"),
            *("exact_match:find=number", "--prompts_per_step", "2", "--samples_per_prompt", "2"),
            *("--generation.max_new_tokens", "6", "--run.dir", str(tmp_path / "run")),
        ]
    )
    assert code == 0, capsys.readouterr().err
    (row,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert {"rewards/length/mean", "rewards/regex/mean", "rewards/exact_match/mean"} <= set(row)
