"""The answers of a file, with the columns that a reward gets in training."""

import json

import pytest

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.answered import load_answered
from fusedrl.engine.data.readers import load_prompts

pytestmark = pytest.mark.cpu_only("texts alone")

ASKED = [{"role": "user", "content": "1 + 1?"}]
SAID = [{"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    "row, prompt, completions, ranks, columns",
    [
        ({"prompt": "p", "completion": "c", "gold": "g"}, "p", ("c",), (), {"gold": "g"}),
        ({"prompt": "p", "completion": ""}, "p", ("",), (), {}),
        ({"prompt": ASKED, "completion": SAID}, ASKED, ("2",), (), {}),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "x": 1},
            "p",
            ("a", "b"),
            (1, 2),
            {"x": 1},
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
            "p",
            ("a", "b", "c"),
            (2, 1, 2),
            {},
        ),
        ({"prompt": "p", "completion": "c", "label": False}, "p", ("c",), (), {"label": False}),
        ({"messages": [*ASKED, *SAID], "gold": "2"}, ASKED, ("2",), (), {"gold": "2"}),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "\n\nHuman: q\n\nAssistant:",
            (" a", " b"),
            (1, 2),
            {},
        ),
    ],
)
def test_formats(write_jsonl, row, prompt, completions, ranks, columns):
    (found,) = load_answered(write_jsonl("rows.jsonl", [row]))
    assert (found.prompt, found.completions, found.ranks) == (prompt, completions, ranks)
    assert columns.items() <= found.columns.items()
    assert "completions" not in found.columns


def test_the_columns_are_those_of_training(write_jsonl):
    data = write_jsonl("gsm8k.jsonl", [{"question": "q", "answer": "so\n#### 1,200", "level": 3}])
    (found,) = load_answered(data)
    assert found.columns == load_prompts(data)[0].columns
    assert found.columns["gold"] == "1200"
    assert found.completions[0].endswith("#### 1,200")


def test_a_column_that_a_row_lacks_is_none(write_jsonl):
    rows = [{"prompt": "p", "completion": "c", "gold": 1}, {"prompt": "p", "completion": "c"}]
    assert [one.columns["gold"] for one in load_answered(write_jsonl("rows.jsonl", rows))] == [
        1,
        None,
    ]


def test_files_that_hold_no_answers(write_jsonl, tmp_path):
    with pytest.raises(DataError, match=r"rows with answers.*found 'prompt'. Give --model"):
        load_answered(write_jsonl("rows.jsonl", [{"prompt": "p"}]))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"no usable row .the file is empty"):
        load_answered(str(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError):
        load_answered(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": 3\n[]\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: not JSON.*\n.*:3: .*\n2 bad lines, 1 good"):
        load_answered(str(tmp_path / "bad.jsonl"))
    tie = {"prompt": "p", "chosen": "a", "rejected": "a"}
    with pytest.raises(DataError, match="1 dropped: the answers are equal"):
        load_answered(write_jsonl("tie.jsonl", [json.loads(json.dumps(tie))]))
