"""The command line: start-up, precedence, exit codes, one clear message per mistake, and the
commands themselves on a tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fusedrl.engine
from fusedrl.engine.base.errors import ConfigError, SetupError, Stopped
from fusedrl.engine.cli.main import main, parse_config
from fusedrl.engine.config import PolicyConfig, SFTConfig

PPO = ["--model", "m", "--data", "d", "--reward", "x.py:f"]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "ppo", "--help"],
        ["train", "grpo", "--help"],
        ["generate", "--help"],
        ["train", "ppo", *PPO, "--optim.lrr", "1"],
        ["train", "sft", "--model", "m", "--data", "d", "--optim.lr", "x"],
    ],
)
def test_light_commands_do_not_import_torch(arguments):
    code = (
        f"import sys; from fusedrl.engine.cli.main import main; code = main({arguments!r}); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if {"--help", "--version"} & set(arguments) else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_the_one_that_was_installed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fusedrl {fusedrl.engine.__version__}\n"


def test_help_names_the_options_and_what_they_mean(capsys):
    assert main(["train", "ppo", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr" in shown
    assert "peak learning rate" in shown
    assert "--config" in shown


# ---- configuration -------------------------------------------------------------------------------
def test_options_of_every_kind():
    config = parse_config(
        "ppo",
        [
            *PPO,
            "--optim.lr=1e-6",
            "--optim.betas",
            "[0.9, 0.95]",
            "--loss.dual_clip",
            "3",
            "--loss.value_clip",
            "null",
            "--missing_eos_penalty",
            "-1.5",
            "--run.resume",
            "true",
            "--generation.stop_token_ids",
            "[7, 8]",
            "--kl.target",
            "6",
            "--dtype",
            "float32",
        ],
    )
    assert isinstance(config, PolicyConfig)
    assert (config.optim.lr, config.optim.betas, config.missing_eos_penalty) == (
        1e-6,
        (0.9, 0.95),
        -1.5,
    )
    assert (config.loss.dual_clip, config.loss.value_clip) == (3.0, None)
    assert (
        config.run.resume,
        config.generation.stop_token_ids,
        config.kl.target,
        config.dtype,
        config.reward,
    ) == (True, (7, 8), 6.0, "float32", ("x.py:f",))
    assert config == PolicyConfig(**{**vars(config)})


def test_the_command_line_beats_the_file_wherever_it_stands(yaml_file):
    path = yaml_file(
        "model: m\ndata: d\nepochs: 3\noptim:\n  lr: 1e-6\n  eps: 1e-7\nrun:\n  seed: 5\n"
    )
    for arguments in (
        ["--config", path, "--optim.lr", "1e-3"],
        ["--optim.lr", "1e-3", f"--config={path}"],
    ):
        config = parse_config("sft", arguments)
        assert isinstance(config, SFTConfig)
        assert (config.optim.lr, config.optim.eps, config.epochs, config.run.seed) == (
            1e-3,
            1e-7,
            3,
            5,
        )


def test_rewards_repeat_and_beat_the_file(yaml_file):
    path = yaml_file("model: m\ndata: d\nreward: [a.py:f, judge]\n")
    assert parse_config("ppo", ["--config", path]).reward == ("a.py:f", "judge")
    assert parse_config(
        "ppo", ["--reward", "b.py:g", "--config", path, "--reward=c.py:h"]
    ).reward == ("b.py:g", "c.py:h")
    assert parse_config(
        "ppo", ["--config", path, "--reward", '["b.py:g"]', "--reward", "[odd]"]
    ).reward == ("b.py:g", "[odd]")


MISTAKES = [
    (["--optim.lrr", "1"], "unknown option '--optim.lrr', did you mean --optim.lr?"),
    (["--lr", "1"], "unknown option '--lr', did you mean --optim.lr?"),
    (["--max_new_token=3"], "did you mean --generation.max_new_tokens?"),
    (["--zzz", "1"], "unknown option '--zzz'"),
    (["steps=3"], "options are written --key value"),
    (["--steps"], "expected a value after --steps"),
    (["--steps", "--epochs", "3"], "expected a value after --steps"),
    (["--steps", "many"], '"steps": expected a whole number, got many'),
    (["--steps", "1.5"], '"steps": expected a whole number, got 1.5'),
    (["--steps", "0"], "expected steps >= 1, got 0"),
    (["--dtype", "int8"], '"dtype": expected one of auto, float32, bfloat16, got int8'),
    (["--optim.betas", "[0.9]"], '"optim.betas"'),
    (
        ["--generation.top_p", "0.9", "--loss.objective", "trpo", "--minibatches", "1"],
        "without top_k, top_p and min_p",
    ),
    (["--reward_weights", "[1, 2]"], "reward_weights with as many numbers as there are rewards, 1"),
    (["--minibatches", "65"], "minibatches <= prompts_per_step x samples_per_prompt = 64"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_2(capsys, arguments, message):
    assert main(["train", "ppo", *PPO, *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fusedrl: error: ")
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim:\n  lrr: 1\n", "unknown key 'optim.lrr', did you mean optim.lr?"),
        ("lr: 1\n", "unknown key 'lr', did you mean optim.lr?"),
        ("optim: 3\n", "expected 'optim' to be a mapping"),
        ("- 1\n", "expected a mapping of options to values, got list"),
        ("", "an empty file"),
        ("a: [", "not YAML"),
        ("optim:\n  lr: fast\n", '"optim.lr": expected a number, got fast'),
        ("model: !!python/object/apply:os.system [id]\n", "not YAML"),
        ("steps: 1\n3: 4\n", "unknown key '3'"),
        ("run:\n  keep: 0\n", "run.keep >= 1, got 0"),
        ("reward: {a: 1}\n", '"reward"'),
    ],
)
def test_a_mistake_in_the_file_names_the_file_or_the_key(capsys, yaml_file, text, message):
    assert (
        main(
            [
                "train",
                "ppo",
                "--model",
                "m",
                "--data",
                "d",
                *([] if "reward" in text else ["--reward", "x.py:f"]),
                "--config",
                yaml_file(text),
            ]
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["train"], "usage: fusedrl train STAGE"),
        (["train", "spt"], "unknown stage 'spt', did you mean sft?"),
        (["train", "sft"], "--model and --data"),
        (
            ["train", "sft", "--config", "/none.yaml"],
            "no such configuration file: /none.yaml does not exist",
        ),
        (["generate", "--model", "m"], "--prompt"),
        (["generate", "--model", "/none", "--prompt", "x"], "/none"),
        (["demo", "--sede", "1"], "--sede"),
    ],
)
def test_other_mistakes_exit_with_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is to be missing")
@pytest.mark.parametrize(
    "command", [["train", "sft", "--data", "d"], ["generate", "--prompt", "x"]]
)
def test_devices(capsys, command):
    assert main([*command, "--model", "m", "--device", "cuda"]) == 3
    assert "device 'cuda' is not there" in capsys.readouterr().err
    assert main([*command, "--model", "m", "--device", "gpu"]) == 2
    assert "expected device to be cpu, cuda or cuda:N, got 'gpu'" in capsys.readouterr().err


def test_exit_codes_by_kind_of_error(capsys, monkeypatch):
    def run_with(error):
        def fail(argv):
            raise error

        monkeypatch.setattr("fusedrl.engine.cli.main._run", fail)
        return main([])

    assert run_with(ConfigError("mend this")) == 2
    assert run_with(SetupError("no GPU")) == 3
    assert run_with(PermissionError(13, "Permission denied", "/root/x")) == 3
    assert run_with(KeyboardInterrupt()) == 130
    assert run_with(Stopped(143)) == 143
    assert capsys.readouterr().err.splitlines() == [
        "fusedrl: error: mend this",
        "fusedrl: error: no GPU",
        "fusedrl: error: /root/x: Permission denied",
        "fusedrl: interrupted",
    ]
    for code in (0, None, "a word", 143):  # of something that is none of ours
        assert run_with(SystemExit(code)) == 1
        assert f"ended the process with sys.exit({code!r})" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run_with(RuntimeError("a fault of ours"))
    with pytest.raises(ValueError, match="from a library"):
        # raised outside fusedrl.engine: it keeps its traceback
        run_with(ValueError("from a library"))


# ---- the commands --------------------------------------------------------------------------------
def test_generate_without_a_tokenizer_says_what_is_missing(tiny_model, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny_model) / name, tmp_path / name)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "w1"]) == 2
    told = capsys.readouterr().err
    assert "put its tokenizer.json and tokenizer_config.json" in told
    assert "token ids" not in told


def test_train_then_generate(tiny_model, write_jsonl, tmp_path, capsys):
    data = write_jsonl("data.jsonl", [{"prompt": "w1 w2", "completion": "w3 w4"}] * 4)
    run = tmp_path / "run"
    train = [
        "train",
        "sft",
        "--model",
        str(tiny_model),
        "--data",
        data,
        "--sequences_per_step",
        "2",
        "--device",
        "cpu",
        "--run.dir",
        str(run),
    ]
    assert main([*train, "--run.progress", "false"]) == 0
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]
    assert json.loads((run / "config.json").read_text())["config"]["sequences_per_step"] == 2
    AutoModelForCausalLM.from_pretrained(run / "model")
    capsys.readouterr()

    assert main([*train, "--run.progress", "false"]) == 2  # the directory holds a run
    assert f"continue it with fusedrl resume {run}, or" in capsys.readouterr().err
    assert main([*train, "--run.resume", "true", "--optim.lr", "1"]) == 2
    assert "optim.lr: 1e-05 -> 1.0" in capsys.readouterr().err
    # finished already
    assert main([*train, "--run.resume", "true", "--run.progress", "false"]) == 0
    capsys.readouterr()

    generate = [
        "generate",
        "--model",
        str(run / "model"),
        "--device",
        "cpu",
        "--max_new_tokens",
        "4",
    ]
    assert main([*generate, "--prompt", "w1 w2", "--greedy"]) == 0
    once = capsys.readouterr().out
    assert once.startswith("w1 w2")
    assert main([*generate, "--prompt", "w1 w2", "--greedy"]) == 0
    assert capsys.readouterr().out == once
    assert main([*generate, "--prompt", "w1", "--prompt", "w2", "--n", "2", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert all(
        shown.count(f"[prompt {prompt}, sample {sample}, ") == 1
        for prompt in (1, 2)
        for sample in (1, 2)
    )
    assert main([*generate, "--prompt", "w1", "--top_p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err


def test_bad_data_is_reported_before_any_training(tiny_model, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": \n{"prompt": "w1"}\n')
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "sft",
                "--model",
                str(tiny_model),
                "--data",
                str(path),
                "--device",
                "cpu",
                "--run.dir",
                str(run),
                "--run.progress",
                "false",
            ]
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert f"{path}:2: not JSON" in shown
    assert f"{path}:3: missing column" in shown
    assert not (run / "checkpoints").exists()
    assert not (run / "model").exists()


def test_a_model_directory_without_weights(tmp_path, write_jsonl, capsys):
    (tmp_path / "empty").mkdir()
    data = write_jsonl("data.jsonl", [{"text": "w1"}])
    assert (
        main(
            [
                "train",
                "sft",
                "--model",
                str(tmp_path / "empty"),
                "--data",
                data,
                "--run.dir",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
