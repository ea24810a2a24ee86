import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.config import OptimConfig, RunConfig, SFTConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.data.tokenize import end_of_text
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.stages.sft import train_sft

ROWS = [
    {
        "prompt": f"w{i % 7} w{i % 5}",
        "completion": " ".join(f"w{(i + j) % 28}" for j in range(1 + i % 6)),
    }
    for i in range(20)
]


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl, device):
    return SFTConfig(
        model=str(tiny_model),
        device=str(device),
        dtype="float32",
        data=write_jsonl("sft.jsonl", ROWS),
        epochs=2,
        sequences_per_step=8,
        tokens_per_microbatch=40,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )


def _metrics(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def test_first_loss_is_the_cross_entropy_of_the_completions(config, device):
    whole = replace(config, epochs=1, sequences_per_step=len(ROWS))
    train_sft(whole)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(config.model).to(device),
        AutoTokenizer.from_pretrained(config.model),
    )
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [
            *tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        logp = (
            model(torch.tensor([prompt + completion], device=device))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        total -= sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))
        count += len(completion)
    assert _metrics(whole)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_micro_batch_split_does_not_change_the_gradient(config):
    norms = []
    for name, tokens in (("a", 10_000), ("b", 12)):
        one = replace(
            config,
            epochs=1,
            sequences_per_step=len(ROWS),
            tokens_per_microbatch=tokens,
            run=replace(config.run, dir=config.run.dir + name),
        )
        train_sft(one)
        norms.append(_metrics(one)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_loss_falls_and_is_evaluated_on_what_was_held_out(config):
    train_sft(replace(config, epochs=12, eval_fraction=0.2))
    rows = _metrics(config)
    assert len(rows) == 24  # 16 examples x 12 epochs / 8
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert "eval_loss" in rows[-1]
    assert "eval_loss" not in rows[0]


def test_held_out_loss_while_training(config):
    plain = replace(
        config, eval_fraction=0.2, run=replace(config.run, dir=config.run.dir + "_plain")
    )
    train_sft(plain)
    watched = replace(config, eval_fraction=0.2, eval_every=3)
    train_sft(watched)
    rows = _metrics(watched)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 4]
    assert rows[0].keys() == {"step", "eval_loss", "timing/evaluate"}
    kept = ("loss", "grad_norm", "learning_rate", "step_tokens")
    assert [[row[name] for name in kept] for row in rows[1:]] == [
        [row[name] for name in kept] for row in _metrics(plain)
    ]  # and nothing else changes
    assert rows[-1]["eval_loss"] == _metrics(plain)[-1]["eval_loss"] < rows[0]["eval_loss"]
    with pytest.raises(ConfigError, match="eval_every"):
        replace(config, eval_every=3)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize("data", ["{}", "{}@3,prompt-completion:{}@1"])
def test_resume_continues_bitwise(config, monkeypatch, data, device):
    whole = replace(
        config, data=data.format(*[config.data] * 2), run=replace(config.run, save_every=2)
    )
    train_sft(whole)
    parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + "_parts"))
    original, calls = Mixture.draw, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            Mixture,
            "draw",
            lambda *a: (
                original(*a) if next(calls) < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            train_sft(parts)
    assert len(_metrics(parts)) == 3  # one step past the checkpoint: it is cut and done again
    train_sft(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = (
        dict(
            load_decoder(
                Path(c.run.dir) / "model", dtype="float32", device=device
            ).named_parameters()
        )
        for c in (whole, parts)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r["loss"] for r in _metrics(whole)] == [r["loss"] for r in _metrics(parts)]


def test_holding_everything_out_is_refused(config):
    # It used to save the untrained model and say nothing.
    with pytest.raises(ConfigError, match="holds out all of the 20 examples"):
        train_sft(replace(config, eval_fraction=0.99))
    assert not (Path(config.run.dir) / "model").exists()


def test_a_model_without_a_tokenizer_says_so(config, tiny_model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(DataError, match="the model's directory has none"):
        train_sft(replace(config, model=str(bare)))


def test_end_of_text_is_the_models_or_the_tokenizers(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert end_of_text(tokenizer, (7, 8)) == 7
    assert end_of_text(tokenizer, ()) == tokenizer.eos_token_id
    with pytest.raises(DataError, match="set eos_token_id"):
        end_of_text(None, ())


def test_every_turn_of_a_conversation_is_learnt_where_asked_for(
    config, tiny_model, tmp_path, write_jsonl, device
):
    chat = tmp_path / "chat"
    shutil.copytree(tiny_model, chat)
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ (' w1 ' if m['role'] == 'user' else ' w2 ') + m['content'] + ' "
        "</s>' }}{% endfor %}"
        "{% if add_generation_prompt %} w2 {% endif %}"
    )
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "w3"),
            ("assistant", "w4 w5"),
            ("user", "w6"),
            ("assistant", "w7"),
        )
    ]
    config = replace(
        config,
        model=str(chat),
        data=write_jsonl("chat.jsonl", [{"messages": turns}]),
        epochs=1,
        every_turn=True,
        optim=OptimConfig(lr=1e-9),
    )
    train_sft(config)
    words = {
        name: i
        for i, name in enumerate(
            AutoTokenizer.from_pretrained(chat).convert_ids_to_tokens(range(32))
        )
    }
    text = "w1 w3 </s> w2 w4 w5 </s> w1 w6 </s> w2 w7 </s>"
    ids = [words[word] for word in text.split()]
    learnt = [4, 5, 6, 11, 12]
    with torch.no_grad():
        logp = (
            AutoModelForCausalLM.from_pretrained(chat)
            .to(device)(torch.tensor([ids], device=device))
            .logits.log_softmax(-1)[0]
        )
    assert _metrics(config)[0]["loss"] == pytest.approx(
        -sum(logp[i - 1, ids[i]].item() for i in learnt) / len(learnt), rel=1e-5
    )
