"""What people bring along, and what they are told: other trainers' options, spellings, devices,
models and data of another kind, stop strings.

One file: each case is a few lines, and a new one is looked for among the others.
"""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
from tests.engine.conftest import CONFIG, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, DataError, RewardError
from fusedrl.engine.cli.common import plain_warnings
from fusedrl.engine.cli.main import STAGES, main, parse_config
from fusedrl.engine.cli.names import (
    ELSEWHERE,
    OF_OTHER_STAGES,
    STAGES_ELSEWHERE,
    nearest_names,
    slips,
)
from fusedrl.engine.cli.values import keys_of
from fusedrl.engine.data.readers import parse_data
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, save_reward_model
from fusedrl.engine.model.weights import load_tokenizer, resolve_device
from fusedrl.engine.rewards.rewards import load_reward

PPO = ["--model", "m", "--data", "d", "--reward", "r.py:f"]


def told(capsys, *argv):
    code = main([str(word) for word in argv])
    return code, capsys.readouterr().err


# ---- options -------------------------------------------------------------------------------------
def test_every_name_that_is_told_exists():
    known = {key for cls, *_ in STAGES.values() for key, _ in keys_of(cls)} | {
        "max_new_tokens",
        "temperature",
        "stop_token_ids",
        "rows",
    }
    assert not {ours for names in (ELSEWHERE | OF_OTHER_STAGES).values() for ours in names} - known
    assert set(OF_OTHER_STAGES) <= known
    assert set(STAGES_ELSEWHERE.values()) <= set(STAGES)
    assert not set(STAGES_ELSEWHERE) & set(STAGES)


@pytest.mark.parametrize(
    "stage, theirs, ours",
    [
        ("grpo", "per_device_train_batch_size", "prompts_per_step"),
        ("sft", "per_device_train_batch_size", "sequences_per_step"),
        ("grpo", "num_generations", "samples_per_prompt"),
        ("grpo", "max_completion_length", "generation.max_new_tokens"),
        ("ppo", "beta", "kl.coef"),
        ("ppo", "learning_rate", "optim.lr"),
        ("ppo", "learning-rate", "optim.lr"),
        ("ppo", "actor_rollout_ref.actor.optim.lr", "optim.lr"),
        ("ppo", "actor.optim.lr", "optim.lr"),
        ("ppo", "kl_coef", "kl.coef"),
        ("ppo", "init_kl_coef", "kl.coef"),
        ("ppo", "algorithm.kl_ctrl.kl_coef", "kl.coef"),
        ("grpo", "n_samples_per_prompt", "samples_per_prompt"),
        ("grpo", "rollout.n", "samples_per_prompt"),
        ("dpo", "micro_train_batch_size", "tokens_per_microbatch"),
        ("ppo", "cliprange", "loss.clip_low"),
        ("ppo", "output_dir", "run.dir"),
        ("ppo", "lora_r", "lora.rank"),
        ("dpo", "output-dir", "run.dir"),
    ],
)
def test_names_of_other_trainers(stage, theirs, ours, tmp_path):
    with pytest.raises(ConfigError, match=rf"unknown option '--{theirs}', which is --{ours} here"):
        parse_config(stage, [f"--{theirs}", "1"])
    (tmp_path / "run.yaml").write_text(f"{theirs}: 1\n")
    with pytest.raises(ConfigError, match=rf"unknown key '{theirs}', which is {ours} here"):
        parse_config(stage, ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "stage, option, told",
    [
        (
            "sft",
            "--steps",
            "is one of rejection, ppo, grpo and the other policy methods, not of sft; the nearest "
            "here is --epochs",
        ),
        (
            "ppo",
            "--pairs_per_step",
            "is one of reward, dpo, not of ppo; the nearest here is --prompts_per_step",
        ),
        (
            "dpo",
            "--kl.coef",
            "is one of ppo, grpo and the other policy methods, not of dpo; the nearest here is "
            "--beta",
        ),
        (
            "dpo",
            "--reward",
            "is one of rejection, ppo, grpo and the other policy methods, not of dpo",
        ),
        ("ppo", "--deepspeed", ""),
        ("ppo", "--zzz", ""),
        ("ppo", "--gpus", ""),
        ("ppo", "--correction.cap", ""),
        ("sft", "--top", ""),
        ("ppo", "--n_epoch", ""),
        ("ppo", "--modle", "did you mean --model?"),
        ("ppo", "--Optim.LR", "did you mean --optim.lr?"),
        ("ppo", "--optim_lr", "did you mean --optim.lr?"),
        ("ppo", "--optin.lr", "did you mean --optim.lr?"),
        ("ppo", "-steps", "did you mean --steps?"),
        ("ppo", "—steps", "did you mean --steps?"),
        ("ppo", "--samples_per_promt", "did you mean --samples_per_prompt?"),
        ("ppo", "--run.directory", "did you mean --run.dir?"),
        ("ppo", "--temp", "did you mean --generation.temperature?"),
        ("ppo", "--save", "did you mean --run.save_every or --run.save_minutes?"),
        ("ppo", "--lerning-rate", "did you mean --optim.lr (learning_rate elsewhere)?"),
        ("ppo", "--no_progress", "which is --run.progress false here"),
        ("sft", "--lora.r", "which is --lora.rank here"),
    ],
)
def test_what_an_unknown_option_may_be(stage, option, told):
    """A near name, one elsewhere, one of another stage; and nothing where all names are far."""
    with pytest.raises(ConfigError) as caught:
        parse_config(stage, [*PPO[: 2 if stage in ("sft", "dpo") else 6], option, "3"])
    message = (
        str(caught.value)
        .removeprefix(f"config: unknown option {option!r}")
        .removesuffix("; options are written --key value")
    )
    assert message == (
        f", which {told}" if told.startswith("is one of") else f", {told}" if told else ""
    )


def test_near_names():
    assert [
        slips(a, b)
        for a, b in (
            ("steps", "steps"),
            ("steps", "step"),
            ("setps", "steps"),
            ("steps", "eps"),
            ("", "ab"),
        )
    ] == [0, 1, 1, 2, 2]
    assert nearest_names("pop", STAGES) == ["ppo"]
    assert (
        nearest_names("eps", {"steps": 0})
        == nearest_names("seed", {"deepspeed": 0})
        == nearest_names("xyz", STAGES)
        == []
    )
    for cls, *_ in STAGES.values():
        known = dict(keys_of(cls))
        assert all(nearest_names(key, known) == [key] for key in known), (
            "a name is nearest to itself"
        )


@pytest.mark.parametrize(
    "text, flag",
    [
        ("1", True),
        ("yes", True),
        ("on", True),
        ("True", True),
        ("TRUE", True),
        ("0", False),
        ("no", False),
        ("Off", False),
    ],
)
def test_booleans_as_people_write_them(text, flag, tmp_path):
    assert parse_config("ppo", [*PPO, "--strict", text, "--run.progress", text]).strict is flag
    for written in (text, f'"{text}"'):
        (tmp_path / "run.yaml").write_text(f"strict: {written}\n")
        assert parse_config("ppo", [*PPO, "--config", str(tmp_path / "run.yaml")]).strict is flag


def test_values_as_people_write_them(tmp_path):
    """A flag without a value, Python's None, lists without brackets; in YAML as on the command
    line."""
    config = parse_config(
        "ppo",
        [
            *PPO,
            "--strict",
            "--lora.targets",
            "q_proj,v_proj",
            "--optim.betas",
            "0.8, 0.9",
            "--generation.stop_token_ids",
            "7",
            "--loss.value_clip",
            "None",
            "--device",
            "none",
            "--reward_weights",
            "2",
            "--run.resume",
        ],
    )
    assert (config.strict, config.run.resume, config.lora.targets, config.optim.betas) == (
        True,
        True,
        ("q_proj", "v_proj"),
        (0.8, 0.9),
    )
    assert (
        config.generation.stop_token_ids,
        config.loss.value_clip,
        config.device,
        config.reward_weights,
    ) == ((7,), None, None, (2.0,))
    (tmp_path / "run.yaml").write_text(
        'reward: a,b.py:f\nmonitor_reward: c.py:g\nlora: {targets: "q_proj, v_proj"}\noptim: '
        '{betas: "0.8 0.9"}\n'
        "generation: {stop_token_ids: 7}\nloss: {value_clip: None}\ndevice: None\nreplay: None\n"
    )
    config = parse_config("ppo", [*PPO[:4], "--config", str(tmp_path / "run.yaml")])
    assert (config.reward, config.monitor_reward, config.lora.targets, config.optim.betas) == (
        ("a,b.py:f",),
        ("c.py:g",),
        ("q_proj", "v_proj"),
        (0.8, 0.9),
    )
    assert (
        config.generation.stop_token_ids,
        config.loss.value_clip,
        config.device,
        config.replay,
    ) == ((7,), None, None, None)
    assert (
        parse_config(
            "ppo", ["--model", "1", "--data", "None", "--reward", "r.py:f", "--run.dir", "2024"]
        ).run.dir
        == "2024"
    ), "texts stay what they are"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a:\n  b: 1\n c: 2\n", ":3: not YAML: "),
        (b"steps: 1\nsteps: 2\n", ":2: 'steps' stands there twice, first in line 1"),
        (b"optim: {lr: 1, lr: 2}\n", ":1: 'lr' stands there twice"),
        (b"\xff\xfe", "not YAML: byte 0 is not UTF-8"),
        (b"model: 2001-99-99\n", "not YAML: month must be"),
        (b"", "an empty file"),
        (b"optim: {lr: .inf}\n", "expected a number, got Infinity"),
        (b"a: &a [*a]\n", ":1: expected options, got an alias that stands for itself"),
        (b"optim: [1]\n", "got list"),
    ],
)
def test_files_of_options_that_are_wrong(tmp_path, capsys, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    code, text = told(capsys, "train", "ppo", *PPO, "--config", tmp_path / "run.yaml")
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "invalid choice: 'trian', did you mean train?"),
        (["train", "--model", "m"], "expected a stage before the options, got '--model'"),
        (["train", "rm"], "unknown stage 'rm', which is reward here"),
        (["train", "PPO"], "did you mean ppo?"),
        (["train", "nash"], "unknown stage 'nash'; expected"),
        (["train", "sft"], "expected --model and --data, which cannot be left out"),
        (["generate", "--model", "m"], "one of the arguments --prompt --data is required; fusedrl"),
        (
            ["generate", "--model", "m", "--prompt", "x", "--max_tokens", "5"],
            "generate: unknown option '--max_tokens', which is --max_new_tokens here",
        ),
        (
            ["generate", "--model", "m", "--prompt", "x", "--n", "x"],
            "--n: expected a whole number above 0, got 'x'",
        ),
        (["demo", "--sede", "1"], "did you mean --seed?"),
        (
            ["generate", "--model", "m", "--prompt", "x", "--top_p", "x"],
            "--top_p: expected a number, got 'x'",
        ),
        (["samples", "a", "b"], "unknown argument 'b'"),
        (
            ["bench", "latency", "--model", "m", "--output-json", "/none/x.json"],
            "--output-json: expected a file to write or -, got '/none/x.json': /none does not",
        ),
        (["plan", "sft", "--model", "m", "--output_json", "/"], "'/' is a directory"),
        (["verify", "--cases", "-1"], "expected a whole number from 0 on, got '-1'"),
        (["verify", "--cases", "some"], "expected a whole number from 0 on, got 'some'"),
        (["report", "/none"], "expected the directory of a run, and /none does not"),
        (["bench", "kernels", "gea"], "unknown op 'gea', did you mean gae?"),
    ],
)
def test_commands_answer_in_one_line(capsys, argv, message):
    code, text = told(capsys, *argv)
    assert code == 2
    assert message in text
    assert text.startswith("fusedrl: error: ")
    assert text.count("\n") == 1


def test_dashes_and_underscores_mean_the_same(tmp_path, tiny_model, capsys):
    usual = parse_config(
        "grpo",
        [
            *PPO,
            "--samples_per_prompt",
            "3",
            "--run.save_every",
            "2",
            "--generation.max_new_tokens=5",
        ],
    )
    assert (
        parse_config(
            "grpo",
            [
                *PPO,
                "--samples-per-prompt",
                "3",
                "--run.save-every",
                "2",
                "--generation.max-new-tokens=5",
            ],
        )
        == usual
    )
    (tmp_path / "run.yaml").write_text(
        "samples-per-prompt: 3\nrun: {save-every: 2}\ngeneration:\n  max-new_tokens: 5\n"
    )
    assert parse_config("grpo", ["--config", str(tmp_path / "run.yaml"), *PPO]) == usual
    (tmp_path / "run.yaml").write_text("samples-per-prompt: 3\nsamples_per_prompt: 4\n")
    with pytest.raises(ConfigError, match="stands there twice"):
        parse_config("grpo", ["--config", str(tmp_path / "run.yaml"), *PPO])
    shown = []
    for options in (["--max-new-tokens", "3", "--top-k=2"], ["--max_new_tokens", "3", "--top_k=2"]):
        assert main(["generate", "--model", str(tiny_model), "--prompt", "w1", *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert main(["doctor", "--output_json", "-"]) in (0, 3)
    assert (
        main(
            [
                "plan",
                "sft",
                "--model",
                str(tiny_model),
                "--output_json",
                "-",
                "--tokens-per-microbatch",
                "100",
            ]
        )
        == 0
    )
    assert main(["bench", "latency", "--batch_size", "0", "--model", "m"]) == 2
    assert "--batch-size: expected a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, message",
    [
        (
            ["--max_prompt_length", "abc"],
            '"max_prompt_length": expected a whole number or null, got abc',
        ),
        (["--kl.target", "x"], '"kl.target": expected a number or null, got x'),
        (
            ["--lora", "5"],
            '"lora": expected options of its own, such as --lora.rank or null, got 5',
        ),
        (["--kl", "5"], "such as --kl.coef, got 5"),
        (
            ["--reward_weights", "x"],
            '"reward_weights": expected a list in brackets, such as [1,0.5] or null, got x',
        ),
        (
            ["--optim.betas", "0.9"],
            '"optim.betas": expected a list in brackets, such as [1,0.5] with 2 elements, got '
            "[0.9]",
        ),
        (
            ["--optim.betas", "fast"],
            '"optim.betas": expected a list in brackets, such as [1,0.5], got fast',
        ),
        (
            ["--optim.betas", "0.9", "0.95"],
            "expected one value after --optim.betas, and got '0.95' behind it; several are written "
            "with commas",
        ),
        (["--reward", "a.py:f", "b.py:g"], "got 'b.py:g' behind it; write --reward before each"),
        (
            ["--critic.model", "m", "--critic.optim.lr", "fast"],
            '"critic.optim.lr": expected a number, got fast',
        ),
        (["--replay.fraction", "lots"], '"replay.fraction": expected a number, got lots'),
        (["--loss.value_clip", "[1]"], "expected a number or null, got [1]"),
        (["--strict", "maybe"], '"strict": expected true or false, got maybe'),
        (["--strict", "2"], '"strict": expected true or false, got 2'),
        (["--dtype", "bf16"], '"dtype": expected one of auto, float32, bfloat16, got bf16'),
        (["--steps", ""], '"steps": expected a whole number, got nothing'),
        (["--optim.lr", "1e400"], "expected optim.lr to be finite, got inf"),
        (["--optim.lr", "nan"], '"optim.lr": expected a number, got nan'),
        (["--optim.betas", "1e400,0"], '"optim.betas": expected a number, got Infinity'),
        (["--optim.weight_decay", "-1"], "optim.weight_decay >= 0, got -1.0"),
        (["--generation.top_p", "2"], "generation.top_p in (0, 1]"),
        (["--model", ""], "expected model a directory or id"),
        (["--data="], "expected data a file"),
    ],
)
def test_no_option_is_answered_in_the_parsers_words(capsys, option, message):
    code, text = told(capsys, "train", "ppo", *PPO, *option)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1
    assert not [
        word
        for word in (
            "Union",
            "Subtypes",
            "NoneType",
            "class_path",
            "NestedArg",
            "typing",
            "dot import",
        )
        if word in text
    ]


# ---- devices, models, data -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mps", "xpu", "hpu", "meta", "gpu", "vulkan", "mps:0", ""])
@pytest.mark.parametrize(
    "command",
    [
        ["train", "sft", "--data", "d"],
        ["generate", "--prompt", "x"],
        ["plan", "sft", "--memory", "8GiB"],
    ],
)
def test_devices_that_have_no_kernels(capsys, name, command):
    code, text = told(capsys, *command, "--model", "m", "--device", name)
    assert code == 2
    assert f"expected device to be cpu, cuda or cuda:N, got {name!r}" in text


def test_devices_by_the_api():
    with pytest.raises(ValueError, match="expected device cpu, cuda or cuda:N, got 'mps'"):
        resolve_device("mps")


@pytest.fixture
def judge(tmp_path, tiny_model):
    model = RewardModel.from_decoder(Decoder.random(model_config(CONFIG), seed=0), seed=0)
    save_reward_model(model, tmp_path / "judge", tokenizer=load_tokenizer(tiny_model))
    return tmp_path / "judge"


def test_models_of_another_kind(capsys, judge, tiny_model, write_jsonl, tmp_path):
    data = write_jsonl("data.jsonl", [{"prompt": "w1", "completion": "w2"}])
    code, text = told(
        capsys,
        "train",
        "ppo",
        "--model",
        tiny_model,
        "--data",
        data,
        "--reward",
        tiny_model,
        "--run.dir",
        tmp_path / "run",
    )
    assert code == 2
    assert "is a language model (LlamaForCausalLM), and a reward model is expected here" in text
    for command in (
        ["train", "sft", "--data", data, "--run.dir", tmp_path / "run"],
        ["generate", "--prompt", "w1"],
    ):
        code, text = told(capsys, *command, "--model", judge)
        assert code == 2
        assert (
            "is a reward model (LlamaForSequenceClassification), and a language model is expected "
            "here" in text
        )
    assert not (tmp_path / "run").exists()


def test_a_run_where_its_model_is_meant(capsys, tiny_model, write_jsonl, tmp_path):
    run, data = (
        tmp_path / "runs/x",
        write_jsonl("data.jsonl", [{"prompt": "w1", "completion": "w2"}]),
    )
    assert (
        main(["train", "sft", "--model", str(tiny_model), "--data", data, "--run.dir", str(run)])
        == 0
    )
    ppo = ["train", "ppo", "--model", tiny_model, "--data", data, "--run.dir", tmp_path / "run"]
    for command in (
        ["generate", "--prompt", "w1", "--model", run],
        ["plan", "sft", "--model", run],
        [*ppo, "--reward", run],
        ["judge", "--a", run, "--b", run, "--data", data, "--reward", "length:target=4"],
    ):
        code, text = told(capsys, *command)
        assert code == 2
        assert f"{run} is the directory of a run, and its model lies in it: use {run}/model" in text
    shutil.rmtree(run / "model")
    code, text = told(capsys, "generate", "--prompt", "w1", "--model", run)
    assert code == 2
    assert "is the directory of a run that has no model yet" in text


def no_models(tiny_model, tmp_path):
    """Path -> what a message says of it; all made in tmp_path, the working directory."""

    def made(name, *files):
        (tmp_path / name).mkdir()
        for file, content in files:
            (tmp_path / name / file).write_bytes(content)
        return name

    config = (tiny_model / "config.json").read_bytes()
    lora = b'{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}'
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "weights.pt").write_bytes(b"PK")
    made("Work"), made("mixed")
    shutil.copytree(tiny_model, tmp_path / "mixed" / "step-500")
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000003/state.json").write_text("{}")
    wrong = {
        "./nope": "./nope does not exist; expected a model directory or a Hugging Face id",
        "none/a/b": "none/a/b does not exist, since none does not",
        "Wrok/model/x": "does not exist, since Wrok does not; did you mean Work?",
        "~/m": "a ~ stands for the home directory only where a shell reads it",
        "https://huggingface.co/owner/name/tree/main": "use the id: owner/name",
        "s3://bucket/m": "from which nothing is downloaded",
        made("empty"): "empty is empty",
        made(
            "adapter", ("adapter_config.json", lora), ("adapter_model.safetensors", b"")
        ): "is a LoRA adapter of owner/base",
        made(
            "binary", ("config.json", config), ("pytorch_model.bin", b"")
        ): "has pickled weights only",
        made("bare", ("x.pth", b"")): "has pickled weights only",
        made("gguf", ("m.Q4.gguf", b"GGUF")): "as a GGUF file; convert it with transformers",
        "m.gguf": "m.gguf is a GGUF file",
        "data.jsonl": "is a file",
        "weights.pt": "weights.pt is a file of pickled weights",
        made("onnx", ("m.onnx", b"")): "an ONNX graph",
        made("meta", ("params.json", b"{}")): "Meta's",
        made("tokens", ("tokenizer.json", b"{}")): "a tokenizer and no model",
        made("other", ("a.txt", b""), ("b.txt", b"")): "it has a.txt, b.txt",
        made(
            "lacking", ("config.json", config), ("notes.txt", b"")
        ): "lacking has no weights: expected model.safetensors",
        "mixed": "use mixed/step-500",
        f"{tiny_model}/config.json": f"use {tiny_model}",
        f"{tiny_model}/model.safetensors": f"use {tiny_model}",
        "run/model": "a run that has no model yet",
        "run/checkpoints": "is a checkpoint of the run run",
        "run/checkpoints/step_00000003": "go on with fusedrl resume run",
    }
    return wrong


def test_what_is_no_model(capsys, tiny_model, tmp_path, write_jsonl, monkeypatch):
    """Each is named for what it is, wherever a model is expected."""
    monkeypatch.chdir(tmp_path)
    data, reward = (
        write_jsonl("data.jsonl", [{"prompt": "w1", "completion": "w2"}]),
        tmp_path / "r.py",
    )
    reward.write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
    wrong = no_models(tiny_model, tmp_path)
    for path, message in wrong.items():
        code, text = told(capsys, "generate", "--model", path, "--prompt", "w1")
        assert (code, message in text, text.count("\n")) == (2, True, 1), text
    ppo = ["train", "ppo", "--data", data, "--run.dir", tmp_path / "out", "--model"]
    for path in ("adapter", "run/checkpoints/step_00000003"):  # every option that takes a model
        for command in (
            ["train", "sft", "--data", data, "--model", path],
            [*ppo, path, "--reward", f"{reward}:f"],
            [*ppo, tiny_model, "--reward", path],
            [*ppo, tiny_model, "--reward", f"{reward}:f", "--critic.model", path],
            ["bench", "latency", "--model", path],
            ["judge", "--a", tiny_model, "--b", path, "--data", data, "--reward", f"{reward}:f"],
            ["plan", "sft", "--model", path],
            ["plan", "ppo", "--model", tiny_model, "--reward", path],
        ):
            code, text = told(capsys, *command)
            assert (code, wrong[path] in text) == (2, True), (command, text)
    for path, message in (
        ("none", "none does not exist"),
        (tiny_model, "has no adapter_config.json (it is a model)"),
        ("data.jsonl", "data.jsonl is a file"),
    ):
        code, text = told(
            capsys, "generate", "--model", tiny_model, "--prompt", "w1", "--adapter", path
        )
        assert (code, message in text) == (2, True), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "owner/judge",
            "if it is a reward model of the Hugging Face hub, fetch it: hf download owner/judge",
        ),
        ("r.py", "name the function, r.py:NAME"),
        ("", "got nothing"),
        ("nope.py:f", "there is no such file: nope.py does not exist"),
        ("http://localhost:5000", "none is asked for a score"),
        ("r.txt:f", "the function's file ends in .py"),
        ("a.py:f,b.py:g", "of several each is given by itself"),
        ("r.txt", "r.txt is a file"),
        ("here.py:f", "here.py is a directory"),
    ],
)
def test_what_is_no_reward(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for name in ("r.py", "r.txt"):
        (tmp_path / name).touch()
    (tmp_path / "here.py").mkdir()
    with pytest.raises(RewardError) as caught:
        load_reward(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "address, how",
    [
        ("https://x.org/a.jsonl", "curl -LO https://x.org/a.jsonl;"),
        ("gsm8k:https://x.org/a.jsonl", "curl -LO https://x.org/a.jsonl;"),
        ("s3://b/a.jsonl", "the tool that s3:// belongs to"),
        (
            "https://huggingface.co/datasets/o/n/resolve/main/a.jsonl",
            "curl -LO https://huggingface.co/datasets/o/n/resolve/main/a.jsonl;",
        ),
    ],
)
def test_data_at_an_address(address, how):
    with pytest.raises(
        DataError, match=r"Files are not downloaded here: fetch it with .*; then name the file\.$"
    ) as caught:
        parse_data(address)
    assert how in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/datasets/o/n", "hf://datasets/o/n", "https://hf.co/datasets/o/n/"],
)
def test_a_data_set_at_an_address(address):
    with pytest.raises(DataError, match=r"(write|written) hf:o/n$"):
        parse_data(address)


def test_a_run_directory_that_is_a_file(capsys, tiny_model, tmp_path, write_jsonl):
    data = write_jsonl("data.jsonl", [{"prompt": "w1", "completion": "w2"}])
    for path in (data, f"{data}/deep/er"):
        code, text = told(
            capsys, "train", "sft", "--model", tiny_model, "--data", data, "--run.dir", path
        )
        assert code == 2
        assert f"got {path!r}, and {data} is a file; choose another --run.dir" in text


def test_warnings_are_lines(tiny_model, tmp_path):
    """Without the place in the source; and no traceback where Python is told to raise them."""
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        path = tmp_path / "model" / name
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}})
        )
    command = [
        "-m",
        "fusedrl.engine.cli",
        "generate",
        "--model",
        str(tmp_path / "model"),
        "--prompt",
        "w1",
        "--max_new_tokens",
        "1",
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert [line.partition(": auto_map is ignored")[0] for line in done.stderr.splitlines()] == [
        f"fusedrl: warning: {tmp_path}/model/{name}"
        for name in ("config.json", "tokenizer_config.json")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="auto_map is ignored"), plain_warnings():
            warnings.warn("config.json: auto_map is ignored", stacklevel=1)
        text = warnings.formatwarning("a\n  b", UserWarning, __file__, 1)
        assert ".py" in text, "as it was before"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "fusedrl: error: a warning, and Python was told to stop at those: "
    )
    assert done.stderr.count("\n") == 1


def test_data_of_another_kind(capsys, tiny_model, tmp_path):
    def answer(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        code, text = told(
            capsys,
            "train",
            "sft",
            "--model",
            tiny_model,
            "--data",
            path if content is not None else name,
            "--run.dir",
            tmp_path / "run",
        )
        assert code == 2
        assert not (tmp_path / "run").exists()
        return text

    assert "got a spreadsheet; save it as CSV" in answer("table.xlsx", b"PK\x03\x04")
    assert "got an archive; unpack it" in answer("train.zip", b"PK\x03\x04")
    assert "got an archive; unpack it" in answer("train", b"PK\x03\x04")
    assert "got an archive; unpack it" in answer("train.jsonl.zst", b"\x28\xb5\x2f\xfd")
    assert "got a pickle, which can run code" in answer("train.pkl", b"\x80\x04")
    assert "got YAML; options of a run are given with --config" in answer("run.yaml", b"a: 1\n")
    assert "got weights" in answer("model.safetensors", b"\0\0\0\0")
    for name in ("openai/gsm8k", "gsm8k", "trl-lib/tldr"):
        assert (
            f"{name} is no file here; if it is a data set of the Hugging Face hub, write hf:{name}"
            in answer(name)
        )
    assert "no such data file" in answer("none.jsonl")
    assert (
        "expected a file, got a directory; name the file in it, or write hf:"
        in told(
            capsys,
            "train",
            "sft",
            "--model",
            tiny_model,
            "--data",
            tmp_path,
            "--run.dir",
            tmp_path / "run",
        )[1]
    )


# ---- stop strings --------------------------------------------------------------------------------
@pytest.fixture
def chat(tmp_path):
    """A tokenizer with a chat template whose turns end with <|im_end|>, which is not its EOS; w9 to
    w12 are added, one of them special by name alone."""
    words = [*WORDS[:30], "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> "
        "{% endfor %}",
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return HybridActor(
        Decoder.random(model_config(CONFIG), seed=0), load_tokenizer(tmp_path / "tokenizer")
    )


def test_a_stop_string_that_is_a_special_token(chat):
    params = SamplingParams(max_new_tokens=40, temperature=1.5, n=8, seed=3)
    by_id = chat.generate(["w1 w2"], SamplingParams(**vars(params) | {"stop_token_ids": (31,)}))[0]
    by_name = chat.generate(["w1 w2"], SamplingParams(**vars(params) | {"stop": ("<|im_end|>",)}))[
        0
    ]
    assert [c.token_ids for c in by_name] == [c.token_ids for c in by_id]
    ended = [c for c in by_name if c.token_ids[-1] == 31]
    assert len(ended) >= 3
    assert all(c.finish_reason == "stop" and "<|im_end|>" not in c.text for c in ended)
    assert all(31 not in c.token_ids[:-1] for c in by_name)
    both = chat.generate(
        ["w1 w2"], SamplingParams(**vars(params) | {"stop": ("w7", "<|im_end|>", "</s>")})
    )[0]
    assert all(31 not in c.token_ids[:-1] and "w7" not in c.text for c in both)
    assert all(2 not in c.token_ids[:-1] for c in both)


@pytest.mark.parametrize("text", ["w1 <|im_end|>", "<|im_end|><|im_start|>", "<|im_end|> "])
def test_a_stop_string_with_a_special_token_in_it_is_refused(chat, text):
    with pytest.raises(
        ValueError,
        match=r"holds the special token '<\|im_.*\|>', which a completion's text never does; give "
        r"that token",
    ):
        chat.generate(["w1"], SamplingParams(max_new_tokens=4, stop=(text,)))
