"""fusedrl data, and data options as they are written on the command line and in YAML."""

import datetime
import io
import json
import re

import datasets
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from rich.console import Console

from fusedrl.engine.cli.main import STAGES as COMMANDS
from fusedrl.engine.cli.main import main, parse_config
from fusedrl.engine.data.readers import Source, parse_data
from fusedrl.engine.model.weights import load_tokenizer
from fusedrl.engine.preference.pairs import read_pairs
from fusedrl.engine.tools.preview import STAGES, print_preview, segments_of, summary

pytestmark = pytest.mark.cpu_only("the command line chooses the device")

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    """The tiny model with a chat template."""
    directory = tmp_path / "chat"
    directory.mkdir()
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def answer(capsys, *argv):
    code = main(["data", *map(str, argv)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def as_json(capsys, *argv):
    code, out, err = answer(capsys, *argv, "--output-json", "-")
    assert code == 0, err
    return json.loads(out)


def text(line):
    return "".join(segment["text"] for segment in line["segments"])


def roles(line):
    return [(segment["role"], segment["text"].strip()) for segment in line["segments"]]


# ---- records of every kind -----------------------------------------------------------------------
def test_demonstrations(capsys, tiny_model, write_jsonl):
    rows = [{"prompt": "w1 w2", "completion": "w3"}] * 3
    rows += [{"prompt": "w1", "completion": " "}, {"prompt": "w1", "completion": "w2 " * 80}]
    data = write_jsonl("d.jsonl", rows)
    (found,) = as_json(capsys, data, "--model", tiny_model)
    assert (found["format"], found["records"], found["unit"]) == (
        "prompt-completion",
        "demonstrations",
        "tokens",
    )
    assert found["why"] == "the first row has the columns prompt, completion"
    assert (found["rows"], found["used"], found["limit"]) == (5, 3, 64)
    assert found["dropped"] == {"the completion is empty": 1, "longer than 64 tokens": 1}
    whole = found["lengths"]["whole"]
    # <s> and two words, then a word and </s>
    assert (whole["min"], whole["median"], whole["max"]) == (5, 5.0, 2 + 80 + 1)
    assert sum(count for *_, count in whole["histogram"]) == 4
    line = found["examples"][0][0]
    assert roles(line) == [
        ("prompt", "<s>"),
        ("prompt", "w1 w2"),
        ("trained", "w3"),
        ("trained", "</s>"),
    ]
    assert [segment["special"] for segment in line["segments"]] == [True, False, False, True]


def test_dialogues_render_the_chat_template(capsys, chat_model, write_jsonl):
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    data = write_jsonl(
        "d.jsonl", [{"messages": [{"role": role, "content": said} for role, said in turns]}]
    )
    (found,) = as_json(capsys, data, "--model", chat_model, "--every_turn")
    line = found["examples"][0][0]
    trained = [said for role, said in roles(line) if role == "trained" and said]
    assert trained == ["w2", "</s>", "w4", "</s>"]
    assert "w1" in text(line)
    assert found["lengths"]["trained"]["max"] == 4
    (last,) = as_json(capsys, data, "--model", chat_model, "--stage", "sft")
    assert [said for role, said in roles(last["examples"][0][0]) if role == "trained"] == [
        "w4",
        "</s>",
    ]
    grpo = ("--stage", "grpo", "--max_new_tokens", "8")
    (prompts,) = as_json(capsys, data, "--model", chat_model, *grpo)
    assert {role for role, _ in roles(prompts["examples"][0][0])} == {"prompt"}
    assert text(prompts["examples"][0][0]).split()[-1] == "<unk>"  # "assistant", where it goes on
    assert prompts["told"] == ""


def test_texts_for_a_chat_model_are_told_of(capsys, chat_model, tiny_model, write_jsonl):
    rows = [{"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w2"}]}]
    data, grpo = write_jsonl("prompts.jsonl", rows), ("--stage", "grpo", "--max_new_tokens", "8")
    (found,) = as_json(capsys, data, "--model", chat_model, *grpo)
    assert found["told"].startswith("prompts: 1 of 2 are texts, to which the model's chat template")
    texts = write_jsonl("texts.jsonl", rows[:1])
    (found,) = as_json(capsys, texts, "--model", tiny_model, *grpo)
    assert found["told"] == "", "a model without a template"


@pytest.mark.real
def test_a_real_chat_template(capsys, smollm2, write_jsonl):
    turns = [("user", "Ahoj 😀 שלום"), ("assistant", "Hi."), ("user", "?"), ("assistant", "Bye")]
    messages = [{"role": role, "content": said} for role, said in turns]
    data = write_jsonl("d.jsonl", [{"messages": messages}])
    (found,) = as_json(capsys, data, "--model", smollm2, "--every_turn")
    (line,) = found["examples"][0]
    trained = [one["text"] for one in line["segments"] if one["role"] == "trained"]
    assert trained == ["Hi.", "<|im_end|>", "Bye", "<|im_end|>"]
    assert "<|im_start|>user\nAhoj 😀 שלום<|im_end|>\n<|im_start|>assistant\nHi." in text(line)
    assert {one["text"] for one in line["segments"] if one["special"]} == {
        "<|im_start|>",
        "<|im_end|>",
    }


def test_pairs_and_ranked_lists(capsys, tiny_model, write_jsonl):
    pairs = write_jsonl(
        "p.jsonl",
        [
            {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
            {"prompt": "w1", "chosen": "a", "rejected": "b"},  # both unknown words
            {"prompt": "w1", "chosen": "w2", "rejected": "w2"},
        ],
    )
    (found,) = as_json(capsys, pairs, "--model", tiny_model, "--stage", "dpo")
    assert (found["records"], found["used"]) == ("pairs", 1)
    assert found["dropped"] == {
        "the answers are equal": 1,
        "the answers are equal in tokens": 1,
    }
    assert [line["name"] for line in found["examples"][0]] == ["chosen", "rejected"]
    told = []
    read_pairs(
        Source(pairs),
        load_tokenizer(tiny_model),
        [2],
        64,
        skip_bad_lines=False,
        rejects=None,
        tell=told.append,
    )
    assert any("1 of 2 are not used: the answers are equal in tokens" in line for line in told)
    ranked = write_jsonl(
        "r.jsonl", [{"prompt": "w1", "completions": ["w2", "w3"], "ranks": [2, 1]}]
    )
    (found,) = as_json(capsys, ranked, "--model", tiny_model, "--stage", "reward")
    assert found["records"] == "ranked answers"
    assert [line["name"] for line in found["examples"][0]] == ["rank 2", "rank 1"]
    (found,) = as_json(capsys, ranked, "--model", tiny_model, "--stage", "dpo")
    assert found["records"] == "pairs"
    (found,) = as_json(capsys, pairs, "--stage", "reward")
    assert found["records"] == "pairs"
    (found,) = as_json(capsys, pairs, "--model", tiny_model, "--stage", "kto")
    assert found["records"] == "pairs"


def test_labelled_answers(capsys, tiny_model, write_jsonl):
    rows = [{"prompt": "w1", "completion": f"w{i}", "label": i == 2} for i in (2, 3)]
    data = write_jsonl("l.jsonl", rows)
    for options in ((), ("--model", tiny_model)):
        (found,) = as_json(capsys, data, "--stage", "kto", *options)
        assert (found["records"], found["used"]) == ("labelled answers", 2)
        assert [line["name"] for one in found["examples"] for line in one] == ["wanted", "unwanted"]


def test_prompts_leave_room_for_completions(capsys, tiny_model, write_jsonl):
    data = write_jsonl("d.jsonl", [{"prompt": "w1 " * n, "gold": n} for n in (1, 10, 40)])
    (found,) = as_json(capsys, data, "--model", tiny_model, "--max_new_tokens", "40")
    assert (found["records"], found["limit"], found["used"]) == ("prompts", 24, 2)
    assert found["dropped"] == {"longer than 24 tokens": 1}
    code, _, err = answer(capsys, data, "--model", tiny_model, "--max_new_tokens", "64")
    assert code == 2
    assert "expected --max_new_tokens below the model's 64 positions" in err


# ---- what a person sees --------------------------------------------------------------------------
def test_what_is_shown(capsys, tiny_model, write_jsonl):
    data = write_jsonl(
        "d.jsonl",
        [{"prompt": "w1", "completion": f"w{n} \x1b[31m"} for n in range(9)] + [{"prompt": 3}],
    )
    code, out, _ = answer(capsys, data, "--model", tiny_model)
    assert code == 0
    assert "format prompt-completion (the first row has the columns prompt, completion)" in out
    assert "read as demonstrations by sft <- shown here" in out
    assert "read as prompts by rejection, ppo" in out
    assert "rows read: 10; demonstrations used: 9" in out
    assert "1 bad; a run stops at them or, with skip_bad_lines, skips them" in out
    assert 'd.jsonl:10: missing column "completion"' in " ".join(out.split())
    assert re.search(r"tokens, at most 64 +min +median +p95 +max", out)
    assert "<s> w1⟦ w0 <unk> </s>⟧" in out
    assert "\x1b" not in out
    code, out, _ = answer(capsys, data, "--rows", "4")
    assert "rows read: 4 (the first; --rows 0 reads all)" in out
    assert "characters" in out
    assert "␛[31m" in out


def test_colours_say_what_is_trained_on(tiny_model, write_jsonl, capsys):
    from fusedrl.engine.tools.preview import Wanted, load_model, preview

    data = write_jsonl("d.jsonl", [{"prompt": "w1", "completion": "w2"}])
    found = preview(Source(data), Wanted(), load_model(str(tiny_model)))
    stream = io.StringIO()
    print_preview(found, Console(file=stream, force_terminal=True, color_system="standard"))
    assert "\x1b[32m" in stream.getvalue()  # green


def test_no_space_is_lost_between_segments():
    class Tokenizer:
        """Decodes as sentencepiece does: the first space of a text is lost."""

        all_special_ids = (0,)

        def decode(self, ids, **_):
            return "".join("<s>" if i == 0 else f" w{i}" for i in ids).lstrip(" ")

    runs = [([0, 1, 2], "prompt"), ([3, 0], "trained")]
    found = list(segments_of(Tokenizer(), runs))
    assert "".join(one.text for one in found) == "<s> w1 w2 w3<s>"
    assert [one.special for one in found] == [True, False, False, True]


def test_summaries():
    assert summary([5]).histogram == ((5, 5, 1),)
    found = summary(list(range(1, 101)))
    assert (found.min, found.median, found.p95, found.max) == (1, 50.5, 95, 100)
    assert sum(count for *_, count in found.histogram) == 100
    assert found.histogram[0][0] == 1
    assert found.histogram[-1][1] == 100


def test_every_stage_reads_some_kind():
    stages = {name.split()[0] for names in STAGES.values() for name in names}
    assert stages == set(COMMANDS)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["none.jsonl"], "no such data file: none.jsonl does not exist"),
        ([], "the following arguments are required: FILE"),
        (["D", "--max_length", "5"], "--max_length counts tokens, which needs a tokenizer"),
        (["D", "--every_turn", "--stage", "dpo"], "--every_turn is one of sft, not of dpo"),
        (["D", "--stage", "ppoo"], "did you mean ppo?"),
        (["D", "--map", "prompt"], "expected --map OURS=THEIRS, such as prompt=question"),
        (["D", "--map", "prompt=question"], 'missing column "question"'),
        (["D", "--stage", "dpo"], "and no pairs"),
        (["D", "--model", "./nowhere"], "nowhere does not exist"),
        (["D", "--rows", "-1"], "expected a whole number from 0 on"),
        (["D", "--output-json", "no/such/x.json"], "expected a file to write or -"),
        (["D", "--modle", "m"], "did you mean --model?"),
        (["E"], "no usable row (the file is empty)"),
        (["S"], "no stage reads labelled steps, which the format stepwise holds"),
    ],
)
def test_mistakes(capsys, write_jsonl, argv, said):
    files = {
        "D": write_jsonl("d.jsonl", [{"prompt": "a", "completion": "b"}]),
        "E": write_jsonl("e.jsonl", []),
        "S": write_jsonl("s.jsonl", [{"prompt": "p", "completions": ["a"], "labels": [True]}]),
    }
    code, out, err = answer(capsys, *(files.get(word, word) for word in argv))
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("fusedrl: error: ")


# ---- data of every kind, in every place ----------------------------------------------------------
def test_tables_and_data_sets_are_previewed(capsys, tmp_path, tiny_model):
    table = pa.table(
        {
            "question": ["w1", "w2"],
            "answer": ["w3", "w4"],
            "when": [datetime.datetime(2024, 1, 1)] * 2,
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    (tmp_path / "files").mkdir()
    parquet.write_table(table, tmp_path / "files" / "train.parquet")
    for data, file in (
        (tmp_path / "d.parquet", "Parquet"),
        (f"hf:{tmp_path}/set", "a data set"),
        (f"hf:{tmp_path}/files", "a data set"),
    ):
        (found,) = as_json(
            capsys, data, "--map", "prompt=question", "--map", "completion=answer", "--rows", "1"
        )
        assert (found["file"], found["rows"], found["whole"]) == (file, 1, False)
        assert found["columns"] == ["prompt", "completion", "when"]
    both = f"{tmp_path}/d.parquet:prompt=question,hf:{tmp_path}/set:prompt=question"
    assert len(as_json(capsys, both, "--map", "completion=answer")) == 2


def test_data_on_the_command_line_and_in_yaml(tmp_path):
    words = "a.parquet:prompt=question@2,hf:o/n:test:config=main"
    sources = [
        Source("a.parquet", columns={"prompt": "question"}, weight=2.0),
        Source("hf:o/n", split="test", config="main"),
    ]
    mappings = [
        {"path": "a.parquet", "columns": {"prompt": "question"}, "weight": 2.0},
        {"path": "hf:o/n", "split": "test", "config": "main"},
    ]
    listed = ["a.parquet:prompt=question@2", "hf:o/n:test:config=main"]
    for data in (words, mappings, listed, json.dumps(mappings)):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"model": "m", "data": data, "ptx": {"data": data}}))
        config = parse_config("ppo", [f"--config={file}", "--reward", "r.py:f"])
        assert parse_data(config.data) == parse_data(config.ptx.data) == sources
    argv = ["--model", "m", "--reward", "r.py:f"]
    for data in (words, json.dumps(mappings)):
        for option in (["--data", data], [f"--data={data}"]):
            config = parse_config("grpo", [*argv, *option, f"--evaluation.data={data}"])
            assert parse_data(config.data) == parse_data(config.evaluation.data) == sources


REWARD = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize("kind", ["parquet", "csv", "hub"])
def test_a_run_resumes_from_every_kind_of_data(capsys, tmp_path, tiny_model, kind):
    """Bit for bit; and a changed file is refused, as is another column."""
    rows = [{"q": f"w{i} w{i + 1}", "a": f"w{i + 2}"} for i in range(12)]
    table = pa.Table.from_pylist(rows)

    def save(table):
        if kind == "parquet":
            parquet.write_table(table, tmp_path / "d.parquet")
            return f"{tmp_path}/d.parquet"
        if kind == "hub":
            datasets.Dataset(table).save_to_disk(tmp_path / "set")
            return f"hf:{tmp_path}/set"
        lines = ["q,a", *(f"{row['q']},{row['a']}" for row in table.to_pylist())]
        (tmp_path / "d.csv").write_text("\n".join(lines))
        return f"{tmp_path}/d.csv"

    data = save(table) + ":prompt=q:completion=a"
    argv = ["train", "sft", "--model", str(tiny_model), "--run.progress", "false"]
    argv += ["--sequences_per_step", "4", "--run.save_every", "1", "--optim.lr", "0.01"]

    def train(name, *more, data=data, epochs="2"):
        code = main(
            [*argv, "--data", data, "--run.dir", str(tmp_path / name), "--epochs", epochs, *more]
        )
        return code, capsys.readouterr().err

    assert train("whole")[0] == 0
    assert train("cut", "--run.keep", "9")[0] == 0
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > 2:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    code, said = train("cut", "--run.resume", "true", "--run.keep", "9")
    assert (code, "continuing after step 2 of 6" in said) == (0, True)
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    code, said = train(
        "cut", "--run.resume", "true", data=data.replace("completion=a", "completion=q")
    )
    assert (code, "resumed with another configuration" in said) == (2, True)
    save(table.slice(0, 11))
    code, said = train("cut", "--run.resume", "true")
    assert code == 2
    assert "data_sha256: " in said


def test_prompts_of_a_table_for_policies_and_judges(capsys, tmp_path, tiny_model):
    table = pa.table({"q": ["w1", "w2"], "gold": [1, None]})
    parquet.write_table(table, tmp_path / "d.parquet")
    data = f"{tmp_path}/d.parquet:prompt=q"
    (tmp_path / "r.py").write_text(
        REWARD
        + "def judge(prompts, a, b, gold, **columns):\n"
        + "    assert set(gold) == {1, None}\n    return ['tie'] * len(a)\n"
    )
    argv = ["train", "grpo", "--model", tiny_model, "--data", data, "--steps", "1"]
    argv += ["--reward", f"{tmp_path}/r.py:length", "--prompts_per_step", "2"]
    argv += ["--samples_per_prompt", "2", "--generation.max_new_tokens", "4"]
    argv += ["--evaluation.data", data, "--run.dir", tmp_path / "run", "--run.progress", "false"]
    assert main([*map(str, argv)]) == 0, capsys.readouterr().err
    argv = ["judge", "--a", tiny_model, "--b", tiny_model, "--data", data]
    argv += ["--judge", f"{tmp_path}/r.py:judge", "--max_new_tokens", "4"]
    assert main([*map(str, argv)]) == 0, capsys.readouterr().err
    argv = ["plan", "grpo", "--model", tiny_model, "--data", data, "--memory", "8GiB"]
    argv += ["--reward", f"{tmp_path}/r.py:length", "--generation.max_new_tokens", "4"]
    assert main([*map(str, argv)]) == 0
    capsys.readouterr()
