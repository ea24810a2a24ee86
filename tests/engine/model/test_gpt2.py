"""GPT-2 end to end: a byte-level tokenizer with one special token, which begins and ends texts and
pads nothing; a table of positions; transposed weights."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import GenerationConfig, OptimConfig, PolicyConfig, RunConfig
from fusedrl.engine.data.tokenize import encode_completion, encode_prompt, end_of_text
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_decoder, save_pretrained
from fusedrl.engine.stages.policy import train_policy

END = "<|endoftext|>"
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 257,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=END, eos_token=END, unk_token=END
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer, device):
    path = tmp_path_factory.mktemp("gpt2") / "model"
    save_pretrained(
        Decoder.random(model_config(CONFIG), 0, device=device), path, tokenizer=tokenizer
    )
    return path


def test_one_token_begins_and_ends_texts(tokenizer):
    assert tokenizer.pad_token_id is None
    assert encode_prompt(tokenizer, "") == [256]
    assert encode_prompt(tokenizer, "ab c") == tokenizer("ab c").input_ids
    assert encode_prompt(tokenizer, "ab" + END) == [*tokenizer("ab").input_ids, 256]
    assert encode_completion(tokenizer, " d", end_of_text(tokenizer, (256,))) == [
        *tokenizer(" d").input_ids,
        256,
    ]


def test_generates_from_text(directory, device):
    actor = HybridActor.from_pretrained(directory, dtype="float32", device=device)
    peer = AutoModelForCausalLM.from_pretrained(directory).to(device)
    for prompt, (out,) in zip(
        ("", "ab"),
        actor.generate(["", "ab"], SamplingParams(max_new_tokens=20, temperature=0.0)),
        strict=True,
    ):
        ids = torch.tensor([encode_prompt(actor.tokenizer, prompt)], device=device)
        theirs = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=256,
        )[0, ids.shape[1] :].tolist()
        assert out.token_ids == theirs
        assert out.text == actor.tokenizer.decode(theirs, skip_special_tokens=True)


def test_what_exceeds_the_table_of_positions_is_refused(directory, device):
    actor = HybridActor.from_pretrained(directory, dtype="float32", device=device)
    ((out,),) = actor.generate([[5] * 35], SamplingParams(max_new_tokens=5, min_new_tokens=5))
    assert len(out.token_ids) == 5  # the last of them stands at the last position
    with pytest.raises(
        ValueError,
        match="prompt 0 has 36 tokens, and with max_new_tokens=5 that exceeds the model's 40 "
        "positions",
    ):
        actor.generate([[5] * 36], SamplingParams(max_new_tokens=5))
    actor.score(PackedBatch.from_sequences([([5], [6] * 39)], device=device))
    with pytest.raises(
        ValueError, match=r"expected sequences of at most 40 tokens, .* got one of 41"
    ):
        actor.score(PackedBatch.from_sequences([([5], [6] * 40)], device=device))


@pytest.mark.parametrize("strict", [False, True])
def test_ppo(directory, tmp_path, write_jsonl, strict, device):
    (tmp_path / "rewards.py").write_text(
        "def length(completions):\n    return [float(len(text)) for text in completions]\n"
    )
    data = write_jsonl(
        "prompts.jsonl", [{"prompt": text} for text in ("z", "a", "bc d", "once", "x" * 30)]
    )
    config = PolicyConfig(
        model=str(directory),
        data=data,
        reward=(f"{tmp_path / 'rewards.py'}:length",),
        device=str(device),
        dtype="float32",
        steps=2,
        prompts_per_step=5,
        samples_per_prompt=2,
        minibatches=2,
        tokens_per_microbatch=60,
        generation=GenerationConfig(max_new_tokens=8),
        strict=strict,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )
    train_policy(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] <= (0.0 if strict else 1e-4)
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
    before, after = (
        load_decoder(directory, dtype="float32", device=device),
        load_decoder(tmp_path / "run/model", dtype="float32", device=device),
    )
    assert all(
        not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)
    ), "every parameter moved, positions and biases too"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


@pytest.mark.parametrize("masks", [".attn.bias", ".attn.masked_bias"])
def test_files_of_the_model_without_its_head(directory, tmp_path, masks, device):
    """The first files on the hub: names without their prefix, and causal masks among the
    tensors."""
    state = {
        name.removeprefix("transformer."): value
        for name, value in load_file(directory / "model.safetensors").items()
    }
    save_file(
        state | {f"h.{i}{masks}": torch.ones(1, 1, 40, 40, device=device) for i in range(2)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            load_decoder(tmp_path, dtype="float32", device=device).parameters(),
            load_decoder(directory, dtype="float32", device=device).parameters(),
            strict=True,
        )
    )
    del state["h.1.ln_2.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"fit its config.json(.*):\n  missing: transformer.h.1.ln_2.bias$"
    ):
        load_decoder(tmp_path, dtype="float32", device=device)


def steps(device, module, fused=True):
    """Three of an optimizer, whatever lies behind the parameters."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    for seed in range(3):
        ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(seed)).to(
            device
        )
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_a_shared_model_is_training_it_alone(device):
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).to(device).eval()
    alone = copy.deepcopy(module)
    actor = HybridActor.from_module(module)
    weight = module.transformer.h[1].mlp.c_fc.weight
    assert weight.shape == (32, 128)
    assert weight.data_ptr() == actor.decoder.layers[1].gate_up_proj.data_ptr()
    for fused in (True, False):
        steps(device, module, fused)
        steps(device, alone, fused)
    assert all(
        torch.equal(p, q) for p, q in zip(module.parameters(), alone.parameters(), strict=True)
    )


def test_gradients_that_a_fused_optimizer_would_misread_are_refused(device):
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).to(device)
    actor = HybridActor.from_module(module)
    for parameter in module.parameters():
        # in another order than the transposed parameters
        parameter.grad = torch.ones(parameter.shape, device=device)
    before = actor.decoder.layers[0].qkv_proj.detach().clone()
    with pytest.raises(
        RuntimeError,
        match=r"gradient of transformer.h.0.attn.c_attn.weight has strides \(96, 1\).* but the "
        r"parameter \(1, 32\)",
    ):
        torch.optim.AdamW(module.parameters(), fused=True).step()
    assert torch.equal(actor.decoder.layers[0].qkv_proj, before)
    torch.optim.AdamW(module.parameters()).step()
