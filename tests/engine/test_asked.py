"""What people bring along, and what they are told: other trainers' options, spellings, devices, models and data of another kind, stop strings."""
import gzip
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.cli import STAGES, _keys, main, parse_config
from fusedrl.engine.cli_names import ELSEWHERE
from fusedrl.engine.errors import ConfigError
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import model_config
from fusedrl.engine.model.heads import RewardModel, save_reward_model
from fusedrl.engine.model.weights import load_tokenizer, resolve_device

from .conftest import CONFIG, WORDS

PPO = ["--model", "m", "--data", "d", "--reward", "r.py:f"]


def told(capsys, *argv):
    code = main([str(word) for word in argv])
    return code, capsys.readouterr().err


# ---- options ----------------------------------------------------------------------------------------------------------------------
def test_every_name_that_is_told_exists():
    known = {key for cls, *_ in STAGES.values() for key, _ in _keys(cls)} | {"max_new_tokens", "temperature", "stop_token_ids"}
    assert not {ours for names in ELSEWHERE.values() for ours in names} - known


@pytest.mark.parametrize("stage, theirs, ours", [
    ("grpo", "per_device_train_batch_size", "prompts_per_step"), ("sft", "per_device_train_batch_size", "sequences_per_step"),
    ("grpo", "num_generations", "samples_per_prompt"), ("grpo", "max_completion_length", "generation.max_new_tokens"), ("ppo", "beta", "kl.coef"),
    ("ppo", "learning_rate", "optim.lr"), ("ppo", "learning-rate", "optim.lr"), ("ppo", "actor_rollout_ref.actor.optim.lr", "optim.lr"),
    ("ppo", "actor.optim.lr", "optim.lr"), ("ppo", "kl_coef", "kl.coef"), ("ppo", "init_kl_coef", "kl.coef"), ("ppo", "algorithm.kl_ctrl.kl_coef", "kl.coef"),
    ("grpo", "n_samples_per_prompt", "samples_per_prompt"), ("grpo", "rollout.n", "samples_per_prompt"), ("dpo", "micro_train_batch_size",
                                                                                                          "tokens_per_microbatch"),
    ("ppo", "cliprange", "loss.clip_low"), ("ppo", "output_dir", "run.dir"), ("ppo", "lora_r", "lora.rank"), ("dpo", "output-dir", "run.dir")])
def test_names_of_other_trainers(stage, theirs, ours, tmp_path):
    with pytest.raises(ConfigError, match=rf"unknown option '--{theirs}', which is --{ours} here"):
        parse_config(stage, [f"--{theirs}", "1"])
    (tmp_path / "run.yaml").write_text(f"{theirs}: 1\n")
    with pytest.raises(ConfigError, match=rf"unknown key '{theirs}', which is {ours} here"):
        parse_config(stage, ["--config", str(tmp_path / "run.yaml")])


def test_dashes_and_underscores_mean_the_same(tmp_path, tiny_model, capsys):
    usual = parse_config("grpo", [*PPO, "--samples_per_prompt", "3", "--run.save_every", "2", "--generation.max_new_tokens=5"])
    assert parse_config("grpo", [*PPO, "--samples-per-prompt", "3", "--run.save-every", "2", "--generation.max-new-tokens=5"]) == usual
    (tmp_path / "run.yaml").write_text("samples-per-prompt: 3\nrun: {save-every: 2}\ngeneration:\n  max-new_tokens: 5\n")
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
    assert main(["plan", "sft", "--model", str(tiny_model), "--output_json", "-", "--tokens-per-microbatch", "100"]) == 0
    assert main(["bench", "latency", "--batch_size", "0", "--model", "m"]) == 2
    assert "--batch-size: expected a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("option, message", [
    (["--max_prompt_length", "abc"], '"max_prompt_length": expected int or null, got abc'),
    (["--kl.target", "x"], '"kl.target": expected float or null, got x'),
    (["--lora", "5"], '"lora": expected options of its own, such as --lora.rank or null, got 5'), (["--kl", "5"], "such as --kl.coef, got 5"),
    (["--reward_weights", "x"], '"reward_weights": expected a list in brackets, such as [1,0.5] or null, got x'),
    (["--lora.targets", "q_proj"], '"lora.targets": expected a list, such as ["a","b"], got q_proj'),
    (["--optim.betas", "0.9"], '"optim.betas": expected a list in brackets, such as [1,0.5], got 0.9'),
    (["--critic.model", "m", "--critic.optim.lr", "fast"], '"critic.optim.lr": expected float, got fast'),
    (["--replay.fraction", "lots"], '"replay.fraction": expected float, got lots'), (["--loss.value_clip", "[1]"], "expected float or null, got [1]")])
def test_no_option_is_answered_in_the_parsers_words(capsys, option, message):
    code, text = told(capsys, "train", "ppo", *PPO, *option)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1
    assert not [word for word in ("Union", "Subtypes", "NoneType", "class_path", "NestedArg", "typing", "dot import") if word in text]


# ---- devices, models, data ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mps", "xpu", "hpu", "meta", "gpu", "vulkan", "mps:0", ""])
@pytest.mark.parametrize("command", [["train", "sft", "--data", "d"], ["generate", "--prompt", "x"], ["plan", "sft", "--memory", "8GiB"]])
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
    code, text = told(capsys, "train", "ppo", "--model", tiny_model, "--data", data, "--reward", tiny_model, "--run.dir", tmp_path / "run")
    assert code == 2
    assert "is a language model (LlamaForCausalLM), and a reward model is expected here" in text
    for command in (["train", "sft", "--data", data, "--run.dir", tmp_path / "run"], ["generate", "--prompt", "w1"]):
        code, text = told(capsys, *command, "--model", judge)
        assert code == 2
        assert "is a reward model (LlamaForSequenceClassification), and a language model is expected here" in text
    assert not (tmp_path / "run").exists()


def test_a_run_where_its_model_is_meant(capsys, tiny_model, write_jsonl, tmp_path):
    run, data = tmp_path / "runs/x", write_jsonl("data.jsonl", [{"prompt": "w1", "completion": "w2"}])
    assert main(["train", "sft", "--model", str(tiny_model), "--data", data, "--run.dir", str(run)]) == 0
    ppo = ["train", "ppo", "--model", tiny_model, "--data", data, "--run.dir", tmp_path / "run"]
    for command in (["generate", "--prompt", "w1", "--model", run], ["plan", "sft", "--model", run], [*ppo, "--reward", run],
                    ["judge", "--a", run, "--b", run, "--data", data, "--reward", tiny_model]):
        code, text = told(capsys, *command)
        assert code == 2
        assert f"{run} is the directory of a run, and its model lies in it: use {run}/model" in text
    shutil.rmtree(run / "model")
    code, text = told(capsys, "generate", "--prompt", "w1", "--model", run)
    assert code == 2
    assert "is the directory of a run that has no model yet" in text


def test_data_of_another_kind(capsys, tiny_model, tmp_path):
    def answer(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        code, text = told(capsys, "train", "sft", "--model", tiny_model, "--data", path if content is not None else name, "--run.dir", tmp_path / "run")
        assert code == 2
        assert not (tmp_path / "run").exists()
        return text

    assert "got a CSV file; convert it, for instance by pandas: read_csv('train.csv').to_json('train.jsonl'" in answer("train.csv", b"prompt,completion\na,b\n")
    assert "got a CSV file" in answer("train.csv.gz", gzip.compress(b"prompt,completion\na,b\n"))
    assert "sep=chr(9)" in answer("train.tsv", b"prompt\tcompletion\na\tb\n")
    assert "got a Parquet file" in answer("train", b"PAR1 and more")
    assert "got an Arrow file" in answer("data.arrow", b"ARROW1\0\0")
    assert "got an Excel file" in answer("table.xlsx", b"PK\x03\x04")
    for name in ("openai/gsm8k", "gsm8k", "trl-lib/tldr"):
        assert f"{name} is no file here; if it is a data set of a hub, save it as JSONL" in answer(name)
    assert "no such data file" in answer("none.jsonl")
    assert "expected a JSONL file, got a directory; name the file in it" in told(
        capsys, "train", "sft", "--model", tiny_model, "--data", tmp_path, "--run.dir", tmp_path / "run")[1]


# ---- stop strings ------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def chat(tmp_path):
    """A tokenizer with a chat template whose turns end with <|im_end|>, which is not its EOS; w9 to w12 are added, one of them special by name alone."""
    words = [*WORDS[:30], "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
                                   additional_special_tokens=["<|im_start|>", "<|im_end|>"],
                                   chat_template="{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}")
    fast.save_pretrained(tmp_path / "tokenizer")
    return HybridActor(Decoder.random(model_config(CONFIG), seed=0), load_tokenizer(tmp_path / "tokenizer"))


def test_a_stop_string_that_is_a_special_token(chat):
    params = SamplingParams(max_new_tokens=40, temperature=1.5, n=8, seed=3)
    by_id = chat.generate(["w1 w2"], SamplingParams(**vars(params) | {"stop_token_ids": (31,)}))[0]
    by_name = chat.generate(["w1 w2"], SamplingParams(**vars(params) | {"stop": ("<|im_end|>",)}))[0]
    assert [c.token_ids for c in by_name] == [c.token_ids for c in by_id]
    ended = [c for c in by_name if c.token_ids[-1] == 31]
    assert len(ended) >= 3
    assert all(c.finish_reason == "stop" and "<|im_end|>" not in c.text for c in ended)
    assert all(31 not in c.token_ids[:-1] for c in by_name)
    both = chat.generate(["w1 w2"], SamplingParams(**vars(params) | {"stop": ("w7", "<|im_end|>", "</s>")}))[0]
    assert all(31 not in c.token_ids[:-1] and "w7" not in c.text for c in both)
    assert all(2 not in c.token_ids[:-1] for c in both)


@pytest.mark.parametrize("text", ["w1 <|im_end|>", "<|im_end|><|im_start|>", "<|im_end|> "])
def test_a_stop_string_with_a_special_token_in_it_is_refused(chat, text):
    with pytest.raises(ValueError, match=r"holds the special token '<\|im_.*\|>', which a completion's text never does; give that token"):
        chat.generate(["w1"], SamplingParams(max_new_tokens=4, stop=(text,)))
