"""Parquet, Arrow, CSV and data sets of the hub beside JSON lines: the same rows make the same
records, and what cannot be read is named."""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from fusedrl.engine.base.errors import ConfigError, DataError, SetupError
from fusedrl.engine.config import SFTConfig
from fusedrl.engine.config.base import data_text
from fusedrl.engine.config.parts import PtxConfig
from fusedrl.engine.data import hub
from fusedrl.engine.data.lines import BadRow
from fusedrl.engine.data.plain import plain
from fusedrl.engine.data.readers import (
    Demonstration,
    Source,
    load_demonstrations,
    load_dialogues,
    load_pairs,
    load_prompts,
    load_ranked,
    load_steps,
    load_unpaired,
    parse_data,
)
from fusedrl.engine.data.rows import source_digest

pytestmark = pytest.mark.cpu_only("files are read on no device")

ROWS = [
    {"prompt": "a, “b”\nc", "completion": "007"},
    {"prompt": '"quoted"', "completion": " שלום 😀\r\nx"},
    {"prompt": "", "completion": "\ttab;semicolon|pipe"},
]


def write(path, rows, kind):
    """Write rows in one of the formats, and return what a data option calls that."""
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    elif kind in ("file", "stream"):
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "hub":
        datasets.Dataset.from_list(rows).save_to_disk(path)
        return f"hf:{path}"
    else:
        separator = {"csv": ",", "csv.gz": ",", "tsv": "\t"}[kind]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if kind == "csv.gz" else data)
    return str(path)


NAMES = {
    "jsonl": "d.jsonl",
    "parquet": "d.parquet",
    "feather": "d.feather",
    "file": "d.arrow",
    "stream": "d.arrow",
    "csv": "d.csv",
    "csv.gz": "d.csv.gz",
    "tsv": "d.TSV",
    "hub": "d",
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_same_rows_are_the_same_records(tmp_path, kind):
    data = write(tmp_path / NAMES[kind], ROWS, kind)
    assert load_demonstrations(data) == [Demonstration(**row) for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "file", "hub"])
def test_nested_rows_of_every_kind(tmp_path, kind):
    user, other = {"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}

    def source(name, rows):
        return write(tmp_path / f"{name}.{kind}", rows, kind)

    tools = [{"name": "f", "parameters": {"x": 1}}, {"name": "g", "parameters": {"y": "z"}}]
    rows = [{"messages": [user, call, {"role": "tool", "content": "1"}, other], "tools": tools}]
    (dialogue,), _ = load_dialogues(source("m", rows))
    # a table gives every struct the members of all; null ones are left out again
    assert dialogue.messages == rows[0]["messages"]
    assert dialogue.tools == tools
    rows = [{"prompt": [user], "completions": ["a", "b"], "ranks": [2, 1]}]
    (ranked,), _ = load_ranked(source("r", rows))
    assert (ranked.prompt, ranked.completions, ranked.ranks) == ([user], ("a", "b"), (2, 1))
    (unpaired,), _ = load_unpaired(source("u", [{"prompt": "p", "completion": "c", "label": True}]))
    assert unpaired.label is True
    (steps,), _ = load_steps(
        source("s", [{"prompt": "p", "completions": ["a"], "labels": [False]}])
    )
    assert steps.labels == (False,)
    pairs, _ = load_pairs(
        source(
            "p", [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": m} for m in (0.5, None)]
        )
    )
    assert [pair.margin for pair in pairs] == [0.5, 0.0]


# ---- values of tables ----------------------------------------------------------------------------
def test_values_of_tables_become_plain(tmp_path):
    when = datetime.datetime(2024, 2, 29, 1, 2, 3)
    table = pa.table(
        {
            "prompt": ["a"],
            "number": pa.array([1.5], pa.float16()),
            "missing": pa.array([float("nan")]),
            "when": pa.array([when]),
            "day": pa.array([when.date()]),
            "took": pa.array([datetime.timedelta(seconds=90)]),
            "whole": pa.array([decimal.Decimal("3.00")]),
            "part": pa.array([decimal.Decimal("2.50")]),
            "bytes": pa.array(["ü".encode()]),
            "word": pa.array(["w"]).dictionary_encode(),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "vector": pa.array([[1.0, float("nan")]]),
            "list": pa.array([["x", None]]),
            "struct": pa.array([{"a": None, "b": [{"c": 1}]}]),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    (example,) = load_prompts(tmp_path / "t.parquet")
    assert example.columns == {
        "number": 1.5,
        "missing": None,
        "when": "2024-02-29T01:02:03",
        "day": "2024-02-29",
        "took": 90.0,
        "whole": 3,
        "part": 2.5,
        "bytes": "ü",
        "word": "w",
        "map": {"k": 1},
        "vector": [1.0, None],
        "list": ["x", None],
        "struct": {"b": [{"c": 1}]},
    }
    json.dumps(example.columns)


@pytest.mark.parametrize(
    "value, found",
    [
        (np.array([[1, 2]]), [[1, 2]]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(["a", None], dtype=object), ["a", None]),
    ],
    ids=str,
)
def test_values_of_numpy_become_plain(value, found):
    assert plain(value, "x") == found
    json.dumps(plain(value, "x"))


def test_values_that_have_no_counterpart_name_column_and_row(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c", "d"],
            "image": [b"\xff\xd8", b"text", None, None],
            "score": [1.0, 2.0, float("inf"), 1.0],
            "deep": [[{"raw": b"x"}], [{"raw": b"x"}], [], [{"raw": b"\xff"}]],
        }
    )
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, row_group_size=2)
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    said = str(caught.value)
    assert f'{path}:1: column "image" holds 2 bytes that are not UTF-8' in said
    assert "leave the column out with FILE:image=" in said
    assert f'{path}:3: column "score" is infinite' in said
    assert f'{path}:4: column "deep[0].raw" holds 1 bytes' in said
    assert "leave the column out with FILE:deep=" in said
    assert "3 bad lines, 1 good" in said
    rejects = tmp_path / "rejects.jsonl"
    assert [e.prompt for e in load_prompts(path, skip_bad_lines=True, rejects=rejects)] == ["b"]
    assert [json.loads(line)["line"] for line in rejects.read_text().splitlines()] == [1, 3, 4]
    assert [e.prompt for e in load_prompts(f"{path}:image=:score=:deep=")] == list("abcd")
    with pytest.raises(BadRow, match='column "x" holds a value of type object'):
        plain(object(), "x")
    with pytest.raises(BadRow, match="keys are not texts"):
        plain([(1, 2)], "x")


def test_a_time_beyond_pythons_range_names_its_row(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "when": pa.array([0, 2**62], pa.timestamp("s"))})
    feather.write_feather(table, tmp_path / "t.arrow")
    with pytest.raises(DataError, match=r't.arrow:2: column "when" cannot be read'):
        load_prompts(tmp_path / "t.arrow")


def test_tables_that_cannot_be_read(tmp_path):
    whole = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"prompt": ["a" * 50] * 5000}), whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.parquet"
    for content in (
        data[:-20],
        data[: len(data) // 2],
        b"PAR1",
        data[:10] + b"\0" * 30 + data[40:],
    ):
        cut.write_bytes(content)
        with pytest.raises(DataError, match="expected a whole Parquet file"):
            load_prompts(cut)
    arrow = tmp_path / "cut.arrow"
    arrow.write_bytes(b"ARROW1\0\0 and no more")
    with pytest.raises(DataError, match="expected a whole Arrow file"):
        load_prompts(arrow)
    with pa.OSFile(str(arrow), "wb") as file:
        twice = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
        with pa.ipc.new_file(file, twice.schema) as writer:
            writer.write_table(twice)
    with pytest.raises(DataError, match="two columns have the name 'prompt'"):
        load_prompts(arrow)
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), cut)
    with pytest.raises(DataError, match=r"no usable row \(the file is empty\); expected rows"):
        load_prompts(cut)
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match="unpack it with gunzip"):
        load_prompts(tmp_path / "t.parquet.gz")


def test_without_the_packages_the_message_says_what_to_install(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"prompt": ["a"]}), tmp_path / "t.parquet")
    for package, data in (("pyarrow", tmp_path / "t.parquet"), ("datasets", f"hf:{tmp_path}")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SetupError, match=rf"needs the package {package}.*fusedrl\[data\]"):
                load_prompts(data)
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(SetupError, match="expected datasets 4 or later"):
        load_prompts(f"hf:{tmp_path}")


# ---- CSV -----------------------------------------------------------------------------------------
_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(_text, _text.filter(lambda text: text.strip())), min_size=1, max_size=5))
@settings(max_examples=50)
def test_whatever_csv_can_hold_is_read_as_it_stands(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "hypothesis.csv"
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    write(path, rows, "csv")
    assert load_demonstrations(path) == [Demonstration(**row) for row in rows]


def read(tmp_path, content, load=load_demonstrations, name="d.csv", words=""):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(f"{path}{words}")


@pytest.mark.parametrize(
    "content, words",
    [
        ("\ufeffprompt,completion\r\na,b\r\n", ""),
        ("\n\nprompt,completion\n\n\na,b\n\n", ""),
        (",prompt,completion\n0,a,b\n", ""),  # with the index that pandas writes
        (" prompt , completion \na,b", ""),
        ("prompt;completion\na;b\n", ":separator=;"),
        ("prompt;completion\na;b\n", ":separator=semicolon"),
        ("prompt|completion\na|b\n", ":separator=pipe"),
        ("prompt\tcompletion\na\tb\n", ":separator=tab"),
        ("a,b\n", ":header=prompt+completion"),
        ("b,a\n", ":header=completion+prompt"),
        ("question,answer\na,b\n", ":prompt=question:completion=answer"),
        ("prompt,completion,x\na,b,c\n", ":x="),
    ],
)
def test_csv_as_people_write_it(tmp_path, content, words):
    assert read(tmp_path, content, words=words) == [Demonstration("a", "b")]


def test_numbers_stay_texts_where_text_is_wanted(tmp_path):
    rows = read(tmp_path, "prompt,completion\n1e5,007\nTrue,null\n", words="")
    assert rows == [Demonstration("1e5", "007"), Demonstration("True", "null")]
    (example,) = read(tmp_path, "prompt,gold\n2+2?,004\n", load_prompts)
    assert example.columns == {"gold": "004"}


def test_values_of_csv_that_are_no_texts(tmp_path):
    content = "prompt,chosen,rejected,margin\np,a,b,0.5\np,c,d,\n"
    assert [pair.margin for pair in read(tmp_path, content, load_pairs)[0]] == [0.5, 0.0]
    content = "prompt,completion,label\np,a,True\np,b,false\n"
    assert [one.label for one in read(tmp_path, content, load_unpaired)[0]] == [True, False]
    content = 'prompt,completions,ranks\np,"[""a"", ""b""]","[1, 2]"\n'
    assert read(tmp_path, content, load_ranked)[0][0].completions == ("a", "b")
    message = json.dumps([{"role": "user", "content": "u"}]).replace('"', '""')
    (example,) = read(tmp_path, f'prompt\n"{message}"\n', load_prompts)
    assert example.prompt == [{"role": "user", "content": "u"}]
    (example,) = read(tmp_path, 'prompt\n"[{1}]"\n', load_prompts)
    assert example.prompt == "[{1}]"
    with pytest.raises(DataError, match="as Python prints it, which is not JSON"):
        read(tmp_path, "messages\n\"[{'role': 'user'}]\"\n")


@pytest.mark.parametrize(
    "content, words, said",
    [
        ("", "", r"no usable row \(the file is empty\); expected the names of columns"),
        ("prompt,completion\n", "", "no usable row"),
        ("prompt,prompt\na,b\n", "", "two columns have the name 'prompt'; rename one"),
        (",,\na,b,c\n", "", "expected the names of columns in the first line, got none"),
        ("prompt,completion\na\n", "", "d.csv:2: expected 2 fields, as the header has, got 1"),
        ("prompt,completion\na,b,c\n", "", "d.csv:2: expected 2 fields, as the header has, got 3"),
        ('prompt,completion\nx,y\n"a,b\n', "", "d.csv:3: not CSV: a quote is opened"),
        ('prompt,completion\n"a"b,c\n', "", "d.csv:2: not CSV: .* is written twice"),
        ("prompt;completion\na;b\n", "", "which holds ';': add :separator=semicolon"),
        ("prompt\tcompletion\na\tb\n", "", "add :separator=tab"),
        ("hello,world\nx,y\n", "", "the first line was taken for the names"),
        (b"prompt,completion\na,\xe9\n", "", 'd.csv:2: not UTF-8: column "completion"'),
        ("prompt,completion\na,b\n".encode("utf-16"), "", "spreadsheet wrote as UTF-16"),
        ("prompt,completion\na,b\0\n", "", "d.csv:2: a NUL byte"),
        ('prompt,completion\n"a\nb",c\nd\n', "", "d.csv:4: expected 2 fields"),
        ("prompt,completion\na,b\n", ":separator=ab", "expected separator to be one character"),
        ("prompt,completion\na,b\n", ":prompt=question", 'missing column "question"'),
        ("prompt,completion\na,b\n", ":split=test", "split belongs to a data set of the hub"),
        ("prompt,completion\na,b\n", ":=x", "expected NAME=COLUMN"),
        ("prompt,completion\na,b\n", ":prompt=x:prompt=y", "prompt stands twice"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, content, words, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, content, words=words)


def test_gzip_that_is_cut(tmp_path):
    rows = [{"prompt": os.urandom(40).hex(), "completion": "b"} for _ in range(500)]
    path = tmp_path / "d.csv.gz"
    write(path, rows, "csv.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="gzip stream is cut or damaged"):
        load_demonstrations(path)


def test_long_fields(tmp_path):
    rows = [{"prompt": "x" * 300_000, "completion": "b"}]
    write(tmp_path / "d.csv", rows, "csv")
    assert load_demonstrations(tmp_path / "d.csv") == [Demonstration(**rows[0])]


# ---- what a data option says ---------------------------------------------------------------------
def test_words_of_a_source(tmp_path):
    odd = tmp_path / "a:b=c.jsonl"
    odd.write_text("")
    assert parse_data("a.csv:prompt=question:x=@2,hf:o/n:test[:10%]:config=main:prompt=q.a") == [
        Source("a.csv", columns={"prompt": "question", "x": ""}, weight=2.0),
        Source("hf:o/n", split="test[:10%]", config="main", columns={"prompt": "q.a"}),
    ]
    assert parse_data("gsm8k/chat:hf:openai/gsm8k:revision=refs/convert/parquet") == [
        Source("hf:openai/gsm8k", "gsm8k", "chat", revision="refs/convert/parquet")
    ]
    assert parse_data(str(odd)) == [Source(str(odd))]
    assert parse_data(f"{odd}:prompt=q@3") == [
        Source(str(odd), columns={"prompt": "q"}, weight=3.0)
    ]
    assert parse_data("a.csv:header=p+q:separator=tab") == [
        Source("a.csv", header=("p", "q"), separator="\t")
    ]
    for wrong, said in (
        ("hf:", "expected hf:ORGANISATION/NAME"),
        ("hf:o/n:a:b", "expected hf:ORGANISATION/NAME"),
        ("hf:o/n:separator=tab", "separator belongs to a CSV file"),
        ({"path": "a", "wieght": 2}, "unknown key 'wieght', did you mean 'weight'"),
        ({"path": "a", "weight": "2"}, "expected weight to be a number"),
        ({"path": "a", "weight": 0}, "expected weight to be a positive number"),
        ({"weight": 2}, "a mapping with the key path"),
    ):
        with pytest.raises(DataError, match=said):
            parse_data(wrong)


MAPPING = {"path": "a,b.csv", "columns": {"prompt": "question", "x": None}, "weight": 2}
SOURCE = Source("a,b.csv", columns={"prompt": "question", "x": ""}, weight=2.0)


def test_mappings_from_python_and_yaml_are_one_text(tmp_path):
    for data, found in (
        (MAPPING, [SOURCE]),
        ([MAPPING, "c.jsonl@3"], [SOURCE, Source("c.jsonl", weight=3.0)]),
        (SOURCE, [SOURCE]),
        (tmp_path / "x.csv", [Source(str(tmp_path / "x.csv"))]),
    ):
        config = SFTConfig(model="m", data=data)
        assert isinstance(config.data, str)
        assert parse_data(config.data) == found
        assert parse_data(PtxConfig(data=data).data) == found
    with pytest.raises(ConfigError, match="expected data a file, a mapping or a list"):
        SFTConfig(model="m", data=3)
    with pytest.raises(ConfigError, match="expected data a file"):
        SFTConfig(model="m", data=[])
    assert data_text("a") == "a"


def test_columns_under_other_names(tmp_path):
    row = {"question": {"text": "q"}, "answer": "a", "prompt": "old", "gold": 1}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = load_prompts(f"{path}:prompt=question.text:answer=")
    # what another name leads to is gone under its own; what lies around a nested one stays
    assert (example.prompt, example.columns) == ("q", {"question": {"text": "q"}, "gold": 1})
    (example,) = load_demonstrations({"path": path, "columns": {"completion": "answer"}})
    assert example == Demonstration("old", "a")
    with pytest.raises(DataError, match='if "response" holds it, add :completion=response behind'):
        path.write_text('{"prompt": "a", "response": "b"}\n')
        load_demonstrations(path)


# ---- data sets of the hub ------------------------------------------------------------------------
def test_a_directory_that_datasets_reads(tmp_path):
    rows = [{"prompt": str(i), "completion": "b"} for i in range(3000)]
    whole = datasets.Dataset.from_list(rows)
    whole.select(range(2999, -1, -1)).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([5])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.parquet", rows[:2], "parquet")
    read = load_demonstrations
    assert [e.prompt for e in read(f"hf:{tmp_path}/one")] == [str(i) for i in range(2999, -1, -1)]
    assert len(read(f"hf:{tmp_path}/two")) == 3000
    assert [e.prompt for e in read(f"hf:{tmp_path}/two:test")] == ["5"]
    assert [e.prompt for e in read(f"hf:{tmp_path}/files:train[1:]")] == ["1"]
    for words, said in (
        (
            f"hf:{tmp_path}/two:tests",
            f"expected one of the splits train, test, got 'tests'; write hf:{tmp_path}/two:test$",
        ),
        (f"hf:{tmp_path}/files:dev", "expected one of the splits train, got 'dev'"),
        (f"hf:{tmp_path}/one:train", "holds one split without a name"),
        (f"hf:{tmp_path}/none", "expected a directory behind hf:, and there is none"),
        (
            f"hf:{tmp_path}/files:config=other",
            "expected one of the configurations default, got 'other'; add :config=default",
        ),
    ):
        with pytest.raises(DataError, match=said):
            read(words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet, CSV, JSON or Arrow files are there"):
        read(f"hf:{tmp_path}/empty")


def test_a_script_of_a_data_set_is_never_run(tmp_path):
    ran = tmp_path / "ran"
    script = tmp_path / "evil"
    script.mkdir()
    (script / "evil.py").write_text(f"open({str(ran)!r}, 'w').write('x')\n")
    with pytest.raises(DataError, match="is a script, and scripts of others are never run") as said:
        load_prompts(f"hf:{script}")
    assert "revision=refs/convert/parquet" in str(said.value)
    assert not ran.exists()


def test_without_a_network_the_message_says_what_to_do():
    code = (
        "from fusedrl.engine.data.readers import load_prompts\n"
        "try:\n    load_prompts('hf:openai/gsm8k:train:config=main')\n"
        "except RuntimeError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "SetupError hf:openai/gsm8k:main:train: the hub cannot be reached"
    )
    assert "HF_HOME" in done.stdout
    assert "name a directory" in done.stdout


_PICK = "Config name is missing.\nPlease pick one among the available configs: ['main', 'other']"
_errors = datasets.exceptions
ERRORS = (
    (ConnectionError("no route"), SetupError, "the hub cannot be reached"),
    (
        ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."),
        DataError,
        "splits train, test, got 'dev'",
    ),
    (ValueError(_PICK), DataError, "configurations main, other, got none; add :config=main"),
    (
        _errors.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub"),
        DataError,
        "has no such data set, or it is private",
    ),
    (
        _errors.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."),
        DataError,
        "is gated: accept its terms",
    ),
    (_errors.DatasetGenerationError("broken"), DataError, "datasets cannot read it"),
)


@pytest.mark.parametrize("error, kind, said", ERRORS)
def test_errors_of_datasets_in_our_words(monkeypatch, error, kind, said):
    def load_dataset(*args, trust_remote_code, **kwargs):
        assert trust_remote_code is False
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match=said):
        load_prompts("hf:o/n")


def test_what_is_read_is_told_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    load_demonstrations(f"hf:{tmp_path}/d")
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is False


def test_the_digest_of_a_data_set_is_that_of_its_rows(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(one)
    whole.save_to_disk(two, num_shards=3)
    first, second = (source_digest(Source(f"hf:{path}")) for path in (one, two))
    assert first == second
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(two / "other")
    assert source_digest(Source(f"hf:{two}/other")) != first
    assert hub.digest(Source(f"hf:{one}")) == first
