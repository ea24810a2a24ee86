"""The studies' machinery: rows saved as they come and not computed twice, means over seeds, charts
that hold their points."""

import itertools
import json
import math
import re
from xml.etree import ElementTree

import pytest
from bench.drawing import Dot, chart
from bench.validation import study
from bench.validation.word_problems import HELD_OUT, TRIED
from examples.arithmetic import write_task
from examples.rewards.arithmetic import exact
from examples.word_problems import KINDS, problems
from examples.word_problems import main as write_problems

from fusedrl.engine.data.readers import load_demonstrations, load_prompts


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "describe_machine", lambda device: {"commit": "abc"})


def test_rows_are_kept_and_only_missing_ones_computed(tmp_path):
    asked = []

    def run(spec, directory):
        asked.append(spec["seed"])
        assert directory.is_dir()
        return {"reward": 2.0 * spec["seed"]}

    specs = [{"method": "a, b", "seed": seed} for seed in (0, 1)]
    first = study.run_grid("s", run, specs[:1], tmp_path / "work", 0)
    both = study.run_grid("s", run, specs, tmp_path / "work", 0)
    assert asked == [0, 1]
    assert [row["reward"] for row in both] == [0.0, 2.0]
    assert both[0] == first[0]
    assert study.read_rows("s") == both


def test_rows_of_another_commit_are_computed_again(tmp_path, monkeypatch):
    study.run_grid("s", lambda spec, directory: {"x": 1.0}, [{"seed": 0}], tmp_path, 0)
    monkeypatch.setattr(study, "describe_machine", lambda device: {"commit": "def"})
    assert (
        study.run_grid("s", lambda spec, directory: {"x": 2.0}, [{"seed": 0}], tmp_path, 0)[0]["x"]
        == 2.0
    )


def test_over_seeds_by_hand():
    mean, error = study.over_seeds([{"x": 1.0}, {"x": 2.0}, {"x": 6.0}], "x")
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7.0 / 3.0))
    assert study.plus_minus((mean, error), 1) == "3.0 ± 1.5"
    assert study.plus_minus(study.over_seeds([{"x": 1.0}], "x")) == "1.00"


@pytest.mark.parametrize(
    "points",
    [[(0.0, 0.0), (10.0, 3.5)], [(1.0, -2.0)], [(0.001, 5e3), (0.002, 7e3), (0.0015, 6e3)]],
)
def test_a_chart_holds_its_points(points):
    pytest.importorskip("matplotlib", reason="the extra `docs` is not installed")
    dots = {"a & b": [Dot(x, y, 0.1) for x, y in points]}
    drawing = chart("t < u", "x", "y", dots)
    root = ElementTree.fromstring(drawing)
    _, _, width, height = map(float, root.get("viewBox").split())
    marks = root.findall(".//*[@id='series a & b']//{http://www.w3.org/2000/svg}use")
    assert len(marks) == len(points)
    for mark in marks:
        assert 0 < float(mark.get("x")) < width
        assert 0 < float(mark.get("y")) < height
    assert {"t < u", "a & b", "x", "y"} <= set(root.itertext())
    assert chart("t < u", "x", "y", dots) == drawing
    with pytest.raises(ValueError, match="points"):
        chart("t", "x", "y", {})


def answer_of(prompt: str) -> int:
    a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", prompt).groups()
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def test_the_arithmetic_task(tmp_path):
    task = write_task(tmp_path / "a", 3, demonstrations=50, prompts=40, held_out=30)
    again = write_task(tmp_path / "b", 3, demonstrations=50, prompts=40, held_out=30)
    for name in ("sft.jsonl", "prompts.jsonl", "held_out.jsonl", "model/model.safetensors"):
        assert (task / name).read_bytes() == (again / name).read_bytes()
    held, prompts = (
        load_prompts(str(task / "held_out.jsonl")),
        load_prompts(str(task / "prompts.jsonl")),
    )
    assert not {row.prompt for row in held} & (
        {row.prompt for row in prompts}
        | {row.prompt for row in load_demonstrations(str(task / "sft.jsonl"))}
    )
    shown = [
        (answer_of(row.prompt), int(row.completion[::-1]))
        for row in load_demonstrations(str(task / "sft.jsonl"))
    ]
    assert 0.2 < sum(answer != given for answer, given in shown) / len(shown) < 0.8
    assert all(abs(answer - given) <= 9 for answer, given in shown)
    for row in prompts:
        right = str(answer_of(row.prompt))[::-1]
        assert row.columns["answer"] == right
        assert exact(
            [row.prompt] * 3, [right, right + "0", ""], answer=[row.columns["answer"]] * 3
        ) == [1.0, 0.0, 0.0]


def test_word_problems_have_the_answers_that_their_numbers_give():
    """Each kind's own sum, from the numbers as the question has them."""
    answers = {
        "gift": lambda x, y: x + y,
        "loss": lambda x, y: x - y,
        "groups": lambda x, y: x * y,
        "share": lambda x, y: x // y,
        "price": lambda x, y: x * y,
        "more_than": lambda x, y: x + y,
        "altogether": lambda x, y: x + y,
        "twice": lambda x: 2 * x,
        "packed_and_eaten": lambda x, y, z: x * y - z,
        "change": lambda x, y, z: x - y * z,
    }
    rows = list(itertools.islice(problems(3), 600))
    assert {row["kind"] for row in rows} == set(answers) == {kind.__name__ for kind in KINDS}
    assert len({row["prompt"][0]["content"] for row in rows}) == 600
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["prompt"][0]["content"])]
        assert answers[row["kind"]](*numbers) == int(row["gold"]) > 0
    assert [row["kind"] for row in rows[:20]] == 2 * [kind.__name__ for kind in KINDS]
    assert (
        rows[:50]
        == list(itertools.islice(problems(3), 50))
        != list(itertools.islice(problems(4), 50))
    )


def _kinds_and_numbers(rows):
    return [
        (row["kind"], *re.findall(r"\d+", row["prompt"][0]["content"]), row["gold"]) for row in rows
    ]


@pytest.mark.parametrize("seed", range(3))
def test_no_word_problem_is_another_with_other_names(seed, tmp_path):
    """Neither in the files of the example nor in those of the study, which draws both of its own
    from one stream."""
    assert HELD_OUT + TRIED <= 1600
    rows = list(itertools.islice(problems(seed), 1600))
    assert len(set(_kinds_and_numbers(rows))) == 1600
    write_problems([str(tmp_path), "--seed", str(seed)])
    train, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    assert (train, held_out) == (rows[:1200], rows[1200:])
    assert not set(_kinds_and_numbers(train)) & set(_kinds_and_numbers(held_out))


def test_word_problems_end_where_a_kind_has_no_more():
    assert 1600 < sum(1 for _ in problems(0)) < 10_000
