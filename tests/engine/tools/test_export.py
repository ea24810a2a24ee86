"""fusedrl export: whole models, adapters, GGUF files and checkpoints, with a card that is filled
in; refusals; and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.support.chat import write_chat_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fusedrl.engine.cli.main import main
from fusedrl.engine.runs.checkpoint import saved_steps
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.tools import export as module

pytestmark = pytest.mark.cpu_only("files are written from the CPU")
WORDS = ("yes", "no", "\u0645\u0631\u062d\u0628\u0627", "the end", "an ant", "7", "x", "\U0001f642")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with three runs: SFT with LoRA, a reward model, GRPO with the best kept."""
    root = tmp_path_factory.mktemp("export")
    write_chat_model(root / "base", "llama")
    rows = [{"prompt": f"Say {word}", "completion": f" {word}"} for word in WORDS] * 2
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w"} for row in rows
    ]
    for name, data in (("t", rows), ("pairs", pairs), ("p", [{"prompt": w} for w in WORDS])):
        text = "".join(json.dumps(row) + "\n" for row in data)
        (root / f"{name}.jsonl").write_text(text)
    (root / "rule.py").write_text(
        "def f(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    base = ["--model", str(root / "base"), "--run.progress", "false", "--optim.lr", "0.01"]
    runs = {
        "sft": ["--data", str(root / "t.jsonl"), "--lora.rank", "2", "--sequences_per_step", "4"],
        "reward": ["--data", str(root / "pairs.jsonl"), "--pairs_per_step", "8"],
        "grpo": [
            *("--data", str(root / "p.jsonl"), "--reward", f"{root / 'rule.py'}:f"),
            *("--steps", "4", "--prompts_per_step", "4", "--samples_per_prompt", "2"),
            *("--generation.max_new_tokens", "6", "--run.keep_best", "min:reward"),
            *("--run.keep", "1"),
        ],
    }
    for stage, options in runs.items():
        assert main(["train", stage, *base, *options, "--run.dir", str(root / stage)]) == 0
    return root


def exported(place: Path, tmp_path: Path, *argv: str) -> Path:
    target = tmp_path / "out"
    assert main(["export", str(place / argv[0]), str(target), *argv[1:]]) == 0
    return target


def card(directory: Path) -> tuple[dict, str]:
    text = (directory / "README.md").read_text(encoding="utf-8")
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()


def test_a_run_becomes_a_directory_for_transformers(place, tmp_path, capsys):
    out = exported(place, tmp_path, "sft")
    assert "README.md" in capsys.readouterr().out
    ours = (place / "sft" / "model" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == ours
    assert AutoTokenizer.from_pretrained(out).chat_template
    front, text = card(out)
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["fusedrl", "sft"]
    rows = [row for row in read_rows(place / "sft" / "metrics.jsonl") if row["step"]]
    assert f"| loss | {rows[0]['loss']:.4g} | {rows[-1]['loss']:.4g} |" in text
    assert f"| steps | {len(rows)} of {len(rows)} |" in text
    saved = json.loads((place / "sft" / "config.json").read_bytes())
    assert saved["data_sha256"] in text
    assert saved["model_sha256"] in text
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert options["lora.rank"] == 2
    assert options["optim.lr"] == 0.01
    assert "epochs" not in options
    assert str(place) not in text, "a card tells no one's folders"


def _runs(code, directory):
    """Run the code of a card, beside the directory that it is of."""
    assert "from transformers import" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_cards_code_runs(place, tmp_path):
    out = exported(place, tmp_path, "sft")
    code = re.search(r"```python\n(.*?)```", card(out)[1], re.DOTALL)[1]
    assert "generated_text" in _runs(code, tmp_path)
    assert "fusedrl chat out" in card(out)[1], "its tokenizer has a chat template"


def test_the_adapter_alone(place, tmp_path):
    peft = pytest.importorskip("peft")
    out = exported(place, tmp_path, "sft", "--format", "adapter")
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    theirs = weights(place / "sft" / "model")
    assert all(torch.allclose(merged[name], theirs[name], atol=1e-6) for name in theirs)
    (code,) = re.findall(r"```python\n(.*?)```", card(out)[1], re.DOTALL)
    _runs(code, tmp_path)
    assert card(out)[0]["library_name"] == "peft"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_gguf(dtype, place, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = exported(place, tmp_path, "sft", "--format", "gguf", "--dtype", dtype)
    (file,) = out.glob("*.gguf")
    name = {"auto": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert file.name == f"sft-{name}.gguf"
    found = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32)
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[name]
    for key, want in weights(place / "sft" / "model").items():
        exact = want.to(stored).float() if want.dim() == 2 else want
        assert torch.equal(found.state_dict()[key], exact), key
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.chat_template"].contents()
    assert card(out)[0]["tags"] == ["fusedrl", "sft", "gguf"]


def test_another_dtype(place, tmp_path):
    out = exported(place, tmp_path, "grpo", "--dtype", "bfloat16")
    wide, narrow = weights(place / "grpo" / "model"), weights(out)
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_a_reward_model(place, tmp_path):
    out = exported(place, tmp_path, "reward")
    AutoModelForSequenceClassification.from_pretrained(out)
    assert card(out)[0]["pipeline_tag"] == "text-classification"
    assert main(["export", str(place / "reward"), str(tmp_path / "g"), "--format", "gguf"]) == 2


@pytest.mark.parametrize("run", ["sft", "grpo", "reward"])
def test_the_last_checkpoint_is_the_model_of_the_run(run, place, tmp_path):
    last = max(saved_steps(place / run))
    out = exported(place, tmp_path, run, "--step", str(last))
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (out, place / run / "model")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_checkpoint(place, tmp_path):
    rewards = [row["reward"] for row in read_rows(place / "grpo" / "metrics.jsonl")]
    best = rewards.index(min(rewards)) + 1
    out = exported(place, tmp_path, "grpo", "--step", "best")
    assert f"the checkpoint of step {best}" in card(out)[1]
    saved = saved_steps(place / "grpo")[best] / "model.safetensors"
    tensors = load_file(saved)
    norm = tensors["decoder.norm"]
    assert torch.equal(weights(out)["model.norm.weight"], norm)


def test_a_models_own_directory(place, tmp_path):
    out = exported(place, tmp_path, "base")
    assert "how it was trained is not known here" in card(out)[1]
    target = tmp_path / "of_run"
    assert main(["export", str(place / "sft" / "model"), str(target)]) == 0
    assert "supervised fine-tuning" in card(target)[1]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["grpo", "--format", "adapter"], "was trained without LoRA"),
        (["sft", "--format", "adapter", "--dtype", "bfloat16"], "leave --dtype out"),
        (["sft", "--dtype", "float16"], "float16 is for --format gguf"),
        (["sft", "--step", "best"], "keeps no best checkpoint"),
        (["sft", "--step", "99"], "has no checkpoint of step 99"),
        (["sft", "--step", "two"], "expected the number of a step, or best"),
        (["base", "--step", "1"], "--step is of a run"),
        (["base", "--format", "adapter"], "expected the directory of a run"),
        (["nowhere/at/all"], "does not exist"),
    ],
)
def test_what_cannot_be_exported_is_told_and_nothing_is_left(argv, said, place, tmp_path, capsys):
    assert main(["export", str(place / argv[0]), str(tmp_path / "out"), *argv[1:]]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(place, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["export", str(place / "sft"), str(tmp_path / "out")]) == 2
    assert "nothing is written over" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main(["export", str(place / "sft"), str(tmp_path / "file")]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]
    (tmp_path / "empty").mkdir()
    assert main(["export", str(place / "sft"), str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "README.md").is_file()


def test_a_failure_leaves_nothing(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "card", full)
    assert main(["export", str(place / "sft"), str(tmp_path / "out")]) == 3
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_says_what_to_do(place, tmp_path, capsys):
    shutil.copytree(place / "grpo", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    assert main(["export", str(tmp_path / "cut"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"fusedrl resume {tmp_path / 'cut'}" in said
    assert "--step N" in said
