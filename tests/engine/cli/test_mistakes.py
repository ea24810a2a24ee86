"""Likely mistakes, one command each (mistakes.txt): the exit code, and a message that names what is
wrong and what to do. No traceback, no long wait, and nothing left behind."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.support.tiny import write_model

from fusedrl.engine.cli.main import main
from fusedrl.engine.model.weights import load_tokenizer
from fusedrl.engine.runs.checkpoint import RunLock

pytestmark = pytest.mark.cpu_only("nothing reaches a device")

PPO = "--model model --data prompts.jsonl --generation.max_new_tokens 8 --prompts_per_step 4"
SECONDS = 2.0  # of the processor
EMPTY = ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")  # opened, and nothing written yet


def _cases():
    """(group, command, exit code, what is said) of each mistake."""
    found, group, command = [], "", ""
    for line in (Path(__file__).parent / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            group = line[3:]
        elif line.startswith("$ "):
            command = line[2:].replace(" PPO ", f" {PPO} ")
        elif command:
            code, _, said = line.partition(" ")
            found.append((group, command, int(code), said.split(" | ")))
            command = ""
    return found


CASES = _cases()


# ---- the folder that the commands stand in -------------------------------------------------------
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ROW = {"prompt": "w1", "completion": "w2"}
ROWS = {
    "sft": [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(8)],
    "prompts": [{"prompt": f"w{i}", "gold": i} for i in range(8)],
    "pairs": [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "w3"} for i in range(8)],
    "chat": [{"messages": [{"role": r, "content": "w1"} for r in ("user", "assistant")]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "w1"}]}],
    "qa": [{"question": "w1", "response": "w2"}],
    "questions": [{"question": "w1", "answer": "w2"}],
    "query": [{"query": "w1"}],
    "long": [{"prompt": "w1 " * 100, "completion": "w2"}] * 3,
    "blank": [{"prompt": "w1", "completion": " "}] * 3,
    "same": [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}] * 3,
    "unknown": [{"prompt": "w1", "chosen": "foo", "rejected": "bar"}] * 3,
    "null": [ROW | {"completion": None}],
    "number": [ROW | {"completion": 5}],
    "mixed": [ROW, {"text": "w1"}],
    "clash": [{"prompt": "w1", "completions": "x"}],
    "ranks": [{"prompt": "w1", "completions": ["w1", "w2"], "ranks": [1]}],
    "empty": [],
    "talks": [{"prompt": [{"role": "user", "content": "w1"}]}] * 8,
    "hollow": [{"prompt": ""}],
    "silent": [{"prompt": [{"role": "user", "content": " "}]}],
}
FILES = {
    "story.txt": "Once upon a time\nthere was\n",
    "pretty.json": json.dumps(ROW, indent=2),
    "wrapped.json": json.dumps({"data": [ROW]}),
    "indented.json": json.dumps({"data": [ROW]}, indent=1),
    "printed.jsonl": f"{ROW}\n",
    "page.jsonl": "<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "lfs.jsonl": LFS,
    "lfs.parquet": LFS,
    "utf16.jsonl": json.dumps(ROW).encode("utf-16"),
    "latin.jsonl": '{"prompt":"é","completion":"w"}\n'.encode("latin-1"),
    "cut.jsonl": json.dumps(ROW) + '\n{"prompt":"w1","comp',
    "nan.jsonl": '{"prompt":"w1","chosen":"a","rejected":"b","margin":NaN}\n',
    "cut.gz": gzip.compress(json.dumps(ROW).encode() + b"\n" + b"\n" * 999)[:-6],
    "book.xlsx": b"PK\x03\x04",
    "data.zip": b"PK\x03\x04",
    "data.pkl": b"\x80\x04",
    "picture.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    "semi.csv": "prompt;completion\nw1;w2\n",
    "ragged.csv": "prompt,completion\nw1,w2,w3\n",
    "nohead.csv": "w1,w2\nw3,w4\n",
    "twice.csv": "prompt,prompt\nw1,w2\n",
    "open.csv": 'prompt,completion\n"w1,w2\n',
    "tab.yaml": "model: m\n\tdata: d\n",
    "typo.yaml": "optm:\n  lr: 1\n",
    "list.yaml": "- a\n",
    "empty.yaml": "",
    "dup.yaml": "model: a\nmodel: b\n",
    "colon.yaml": "model: a: b\n",
    "scalar.yaml": "optim: 3\n",
    "text.yaml": "epochs: many\n",
    "equals.yaml": "model=m\n",
    "nested.yaml": "model: {path: m}\n",
    "datakey.yaml": "model: model\ndata: {file: sft.jsonl}\n",
    "python.yaml": "model: !!python/object/apply:os.system [id]\n",
    "bool.yaml": "strict: maybe\nmodel: m\ndata: d\nreward: [a.py:f]\n",
    "syntax.py": "def f(:\n",
    "importing.py": "import no_such_package\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "raising.py": "def f(completions, **_):\n    return [1 / 0 for _ in completions]\n",
    "short.py": "def f(completions, **_):\n    return [1.0]\n",
    "nothing.py": "def f(completions, **_):\n    pass\n",
    "words.py": "def f(completions, **_):\n    return ['good'] * len(completions)\n",
    "nans.py": "def f(completions, **_):\n    return [float('nan')] * len(completions)\n",
    "wants.py": "def f(completions, answer, **_):\n    return [1.0] * len(completions)\n",
    "judges.py": "def odd(a, b, **_):\n    return ['first'] * len(a)\n\n\n"
    "def short(a, b, **_):\n    return ['a']\n\n\n"
    "def other(prompt, first, second):\n    return ['a']\n\n\n"
    "def placed(prompts, a, b, /):\n    return ['a'] * len(a)\n",
    "loggers.py": "class Bare:\n    def __init__(self):\n        pass\n\n"
    "    def log(self, step, values):\n        pass\n\n\ndef mute(values):\n    pass\n",
    "split.csv": "question;answer\nw1;w2\n",
    "half.jsonl": json.dumps(ROW) + '\n{"prompt": "w1\n',
    "singular.py": "def prompted(prompt, completion):\n    return [1.0]\n\n\n"
    "def completed(prompts, completion):\n    return [1.0]\n\n\n"
    "def ids(prompts, completion_id):\n    return [1.0]\n\n\n"
    "def text(text):\n    return [1.0]\n\n\n"
    "def short(completions, **_):\n    return [-len(c.split()) for c in completions]\n",
    "good.py": "number = 3\n\n\nclass Judge:\n    pass\n\n\n"
    "def f(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
    "def better(a, b, **_):\n    return ['a'] * len(a)\n",
}
CONFIGS = {  # model directories with another config.json
    "no_layers": {"num_hidden_layers": None},
    "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "more_layers": {"num_hidden_layers": 3},
    "small_vocab": {"vocab_size": 20},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}
INDEX = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
MODELS = {  # model directories with other files; None: without the file
    "no_weights": {"model.safetensors": None},
    "no_config": {"config.json": None},
    "no_tokenizer": {"tokenizer.json": None, "tokenizer_config.json": None},
    "zeros": {"model.safetensors": ""},
    "lfs": {"model.safetensors": LFS},
    "bad_config": {"config.json": "{not json"},
    "bad_tokenizer": {"tokenizer.json": "{}"},
    "sharded": {"model.safetensors": None, "model.safetensors.index.json": json.dumps(INDEX)},
    "pickled": {"model.safetensors": None, "pytorch_model.bin": "x"},
}


def _models(root: Path) -> None:
    write_model(root / "model")
    write_model(root / "other", seed=1)
    for name, changes in CONFIGS.items():
        shutil.copytree(root / "model", root / name)
        config = json.loads((root / name / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (root / name / "config.json").write_text(json.dumps(kept))
    for name, changes in MODELS.items():
        shutil.copytree(root / "model", root / name)
        for file, content in changes.items():
            if content is None:
                (root / name / file).unlink()
            else:
                (root / name / file).write_text(content)
    shutil.copytree(root / "model", root / "cut")
    weights = (root / "model/model.safetensors").read_bytes()
    (root / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    shutil.copytree(root / "model", root / "many_tokens")
    tokenizer = load_tokenizer(root / "many_tokens")
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(root / "many_tokens")
    for name, template in {
        "bad_template": "{{ ... }",
        "templated": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }.items():
        shutil.copytree(root / "model", root / name)
        tokenizer = load_tokenizer(root / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "o/b"}')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands stand: good files and bad ones, models, a finished run, one that runs."""
    root = tmp_path_factory.mktemp("mistakes")
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in FILES.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    parquet.write_table(pa.table({"q": ["w1"], "image": [b"\xff"]}), root / "picture.parquet")
    whole = (root / "picture.parquet").read_bytes()
    (root / "cut.parquet").write_bytes(whole[:-9])
    _models(root)
    (root / "empty_dir").mkdir()
    (root / "remains/model").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, RunLock(root / "held"):
        patch.chdir(root)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        sft = "train sft --model model --data sft.jsonl --run.dir done --sequences_per_step 4"
        assert main([*shlex.split(sft), "--run.progress", "false"]) == 0
        for name, told in {
            "failed": {"state": "failed", "message": "reward 'f' raised ValueError: no"},
            "gone": {"state": "finished"},
        }.items():
            (root / name).mkdir()
            shutil.copyfile(root / "done/config.json", root / name / "config.json")
            (root / name / "status.json").write_text(json.dumps(told))
        yield root


@pytest.fixture
def answer(folder, capsys):
    """Run a command in the folder: (exit code, what is said, processor seconds)."""

    def run(command):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        began = time.process_time()
        code = main(shlex.split(command))
        return code, capsys.readouterr().err, time.process_time() - began

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case[1])[:70])
def test_each_mistake_is_named_with_its_remedy(answer, folder, case):
    _, command, expected, phrases = case
    code, said, seconds = answer(command)
    assert code == expected, said
    for phrase in phrases:
        assert phrase in said, said
    assert "Traceback" not in said
    assert said.count("fusedrl: error: ") == 1
    assert max(map(len, said.splitlines())) < 1000  # a screenful is not read
    assert seconds < SECONDS
    # at most a lock and a configuration, over which the mended command runs
    left = {path.name for path in (folder / "runs/latest").glob("*")} - {"rejects.jsonl"}
    assert left <= {"config.json", "status.json", "lock", "checkpoints", *EMPTY}
    assert not any((folder / "runs/latest/checkpoints").glob("*"))


@pytest.mark.parametrize(
    "wrong, right",
    [
        (
            "train sft --model model --data null.jsonl",
            "train sft --model model --data sft.jsonl",
        ),
        (
            f"train ppo {PPO} --reward raising.py:f",
            f"train ppo {PPO} --reward good.py:f --steps 1",
        ),
    ],
)
def test_the_mended_command_runs_where_the_wrong_one_ended(answer, folder, wrong, right, capsys):
    assert answer(wrong)[0] == 2
    assert main([*shlex.split(right), "--run.progress", "false"]) == 0, capsys.readouterr().err
    assert (folder / "runs/latest/model").is_dir()


def test_the_catalogue_covers_what_goes_wrong():
    assert len(CASES) >= 310
    assert len({command for _, command, *_ in CASES}) == len(CASES)
    counts = {group: sum(one[0] == group for one in CASES) for group, *_ in CASES}
    assert len(counts) >= 12
    assert min(counts.values()) >= 8
    commands = {command.split()[0] for _, command, *_ in CASES}
    assert {"train", "generate", "judge", "report", "plan", "data", "bench", "verify"} <= commands


@pytest.mark.parametrize(
    "command",
    [
        "train sft --model model --data printed.jsonl",
        "train grpo --model model --data prompts.jsonl --reward good.py:f --evaluation.every 5",
        "report done/model",
    ],
)
def test_a_process_says_the_same(answer, folder, command):
    code, said, _ = answer(command)
    done = subprocess.run(
        [sys.executable, "-m", "fusedrl.engine.cli", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "")


LIGHT = """
import sys
from fusedrl.engine.cli.main import main
code = main(sys.argv[1:])
print(code, sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "command",
    [
        f"train grpo {PPO} --reward good.py:oks",
        f"train grpo {PPO} --reward exactmatch",
        f"train grpo {PPO} --reward wants.py:f",
        f"train grpo {PPO} --reward good.py:f --device gpu",
        f"train grpo {PPO} --reward good.py:f --run.log wanb",
        f"train grpo {PPO} --reward good.py:f --run.columns nosuch",
        f"train grpo {PPO} --reward good.py:f --run.dir done",
        "train sft --model model --data sft.jsonl --run.dir done",
        "train sft --model model --data sft.jsonl --run.dir sft.jsonl",
        "train sft --model modle --data sft.jsonl",
        "train reward --model model --data none.jsonl",
        "train dpo --model no_config --data pairs.jsonl",
        "train rejection --model sft.jsonl --data model --reward good.py:f",
        "plan grpo --model model --memory lots",
        "export done done",
        "export failed out",
        "generate --model modle --prompt w1",
        "judge --a model --b modle --data prompts.jsonl --reward good.py:f",
        "eval model --data none.jsonl --reward good.py:f",
        "reward-check good.py:oks --data prompts.jsonl",
        "chat modle",
        "data sft.jsonl --model modle",
        "bench latency --model modle",
    ],
)
def test_what_names_and_files_tell_is_told_before_torch_is_loaded(folder, command):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "2 []\n", done.stderr
    assert done.stderr.count("fusedrl: error: ") == 1
    assert "Warning" not in done.stderr
