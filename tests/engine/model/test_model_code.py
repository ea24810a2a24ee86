"""Code that lies in a model's directory is never run, whatever file names it, whoever loads it, and
whatever stands on standard input."""

import io
import json
import shutil
import subprocess
import sys
import warnings

import pytest
from tests.engine.conftest import CONFIG

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.cli.main import main
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, load_reward_model, save_reward_model
from fusedrl.engine.model.weights import load_decoder, load_tokenizer, read_model_config
from fusedrl.engine.policy.critic import load_critic
from fusedrl.engine.rewards.rewards import load_reward
from fusedrl.engine.tools.bench import Subject

CODE = "open({marker!r}, 'w').write('it ran')\n" + "".join(
    f"class {name}:\n    from_pretrained = from_config = classmethod(lambda *args, **kwargs: "
    "None)\n"
    for name in ("Tokenizer", "Config", "Model")
)
MAP = {
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoModel": "evil.Model",
}
PLANTS = {
    "tokenizer": {"tokenizer_config.json": {"auto_map": MAP}},
    "tokenizer, a list": {
        "tokenizer_config.json": {"auto_map": ["evil.Tokenizer", "evil.Tokenizer"]}
    },
    "its class": {"tokenizer_config.json": {"tokenizer_class": "Tokenizer", "auto_map": MAP}},
    "configuration": {"config.json": {"auto_map": MAP, "model_type": "llama"}},
    "all of them": {
        name: {"auto_map": MAP, "trust_remote_code": True}
        for name in (
            "config.json",
            "tokenizer_config.json",
            "processor_config.json",
            "preprocessor_config.json",
            "generation_config.json",
        )
    },
    "another repository's": {
        name: {
            "auto_map": {
                key: f"owner/name--{v[0] if isinstance(v, list) else v}" for key, v in MAP.items()
            }
        }
        for name in ("config.json", "tokenizer_config.json")
    },
}


@pytest.fixture
def plant(tmp_path, tiny_model, monkeypatch):
    """A model directory with code in it, as `kind` of PLANTS; fails at the end where any of it
    ran."""
    marker = tmp_path / "ran"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))

    def make(kind, source=tiny_model):
        directory = tmp_path / f"planted {len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, directory)
        code = CODE.format(marker=str(marker))
        for name in (
            "evil.py",
            "tokenizer.py",
            "modeling_llama.py",
            "tokenization_llama.py",
            "__init__.py",
            "sitecustomize.py",
        ):
            (directory / name).write_text(code)
        (directory / "custom_generate").mkdir()
        (directory / "custom_generate/generate.py").write_text(code)
        for name, change in PLANTS[kind].items():
            before = (
                json.loads((directory / name).read_text()) if (directory / name).exists() else {}
            )
            (directory / name).write_text(json.dumps(before | change))
        return directory

    yield make
    assert not marker.exists(), "code that came with a model was run"


@pytest.mark.parametrize("kind", PLANTS)
def test_the_tokenizer_is_the_same_without_its_code(plant, kind, tiny_model, tmp_path):
    directory = plant(kind)
    with pytest.warns(UserWarning, match=r"auto_map.* is ignored; code that comes with a model"):
        found = load_tokenizer(directory)
    usual = load_tokenizer(tiny_model)
    assert found.get_vocab() == usual.get_vocab()
    assert encode_prompt(found, "w1 w2 w3") == encode_prompt(usual, "w1 w2 w3") == [1, 5, 6, 7]
    assert found.eos_token_id == usual.eos_token_id
    assert found.name_or_path == str(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a file
        load_tokenizer(directory)
    found.save_pretrained(tmp_path / "saved")
    assert not [
        p
        for p in (tmp_path / "saved").iterdir()
        if p.suffix == ".py" or "auto_map" in p.read_text()
    ]


@pytest.mark.parametrize("kind", ["all of them", "another repository's"])
@pytest.mark.filterwarnings("ignore:.*is ignored")
def test_every_loader(plant, kind, tmp_path):
    directory = plant(kind)
    actor = HybridActor.from_pretrained(directory)
    actor.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        assert "evil" not in path.read_text(), path
    load_decoder(directory)
    load_critic(directory)
    read_model_config(str(directory))
    Subject(str(directory), None, "float32", "cpu").peer()
    save_reward_model(
        RewardModel.from_decoder(Decoder.random(model_config(CONFIG), seed=0), seed=0),
        tmp_path / "judge",
        tokenizer=actor.tokenizer,
    )
    judge = plant(kind, tmp_path / "judge")
    load_reward_model(judge)
    load_reward(str(judge))
    load_critic(judge)


@pytest.mark.filterwarnings("ignore:.*is ignored")
def test_commands(plant, capsys, write_jsonl, tmp_path):
    directory = str(plant("all of them"))
    data = write_jsonl("prompts.jsonl", [{"prompt": "w1 w2"}] * 4)
    reward = tmp_path / "reward.py"
    reward.write_text("def same(completions, **_):\n    return [0.5] * len(completions)\n")
    assert main(["generate", "--model", directory, "--prompt", "w1", "--max_new_tokens", "2"]) == 0
    assert (
        main(
            [
                "judge",
                "--a",
                directory,
                "--b",
                directory,
                "--data",
                data,
                "--reward",
                f"{reward}:same",
                "--max_new_tokens",
                "2",
            ]
        )
        == 0
    )
    assert main(["plan", "sft", "--model", directory]) == 0
    assert (
        main(
            [
                "train",
                "ppo",
                "--model",
                directory,
                "--data",
                data,
                "--reward",
                f"{reward}:same",
                "--critic.model",
                directory,
                "--steps",
                "1",
                "--prompts_per_step",
                "2",
                "--generation.max_new_tokens",
                "2",
                "--run.dir",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert not list((tmp_path / "run/model").glob("*.py"))
    capsys.readouterr()


@pytest.mark.parametrize("answer", ["y\n" * 20, ""])
def test_whatever_stands_on_standard_input(plant, answer):
    command = [
        sys.executable,
        "-m",
        "fusedrl.engine.cli",
        "generate",
        "--model",
        str(plant("its class")),
        "--prompt",
        "w1",
        "--max_new_tokens",
        "2",
    ]
    done = subprocess.run(command, input=answer, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("is ignored; code that comes with a model") == 1


def test_a_tokenizer_that_is_code_alone_is_refused_with_the_remedy(plant, capsys):
    directory = plant("its class")
    (directory / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="is ignored"):
        assert main(["generate", "--model", str(directory), "--prompt", "w1"]) == 2
    assert "expected a tokenizer that transformers itself has" in capsys.readouterr().err
