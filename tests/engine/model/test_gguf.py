"""GGUF files: transformers, the repository's own reader of SmolLM2 and, where it is installed,
llama.cpp read what was written."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.chat import QWEN_CUT, chat_tokenizer, write_chat_model
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model import gguf_files
from fusedrl.engine.model.gguf_files import DTYPES, write_gguf
from fusedrl.engine.model.weights import hf_views, load_decoder, load_tokenizer

pytestmark = pytest.mark.cpu_only("files are written from the CPU")
gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
TEXTS = (
    "Hello, the ant's 123 hats\r\n\n  and   more ",
    "\U0001f642\U0001f469\u200d\U0001f680 w\u00f6rld na\u00efve",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd 42",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = write_chat_model(tmp_path_factory.mktemp("gguf") / family, family)
        return made[family]

    return make


def own_reader():
    path = Path(__file__).resolve().parents[3] / "examples" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_reader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights_back(family, dtype, directory, tmp_path):
    decoder = load_decoder(directory(family), dtype="float32", device="cpu")
    write_gguf(
        decoder, tmp_path / "m.gguf", tokenizer=load_tokenizer(directory(family)), dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    for name, view in hf_views(decoder).items():
        want = view.to(DTYPES[dtype]).float() if view.dim() == 2 else view
        assert torch.equal(theirs[name], want), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_tokenizer_and_the_template_come_along(family, directory, tmp_path):
    ours = load_tokenizer(directory(family))
    decoder = load_decoder(directory(family), dtype="float32", device="cpu")
    write_gguf(decoder, tmp_path / "m.gguf", tokenizer=ours, name="a name")
    if family == "llama":
        theirs = own_reader().read(tmp_path / "m.gguf")[1]
    else:
        theirs = AutoTokenizer.from_pretrained(
            tmp_path, gguf_file="m.gguf", trust_remote_code=False
        )
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert theirs.chat_template == ours.chat_template
    assert (theirs.eos_token, theirs.bos_token) == (ours.eos_token, ours.bos_token)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["tokenizer.ggml.pre"] == {"llama": "smollm", "qwen2": "qwen2"}[family]
    assert said["general.name"] == "a name"
    assert said["tokenizer.ggml.add_bos_token"] is False
    kinds = said["tokenizer.ggml.token_type"]
    assert [kinds[0], kinds[10], kinds[-1]] == [3, 1, 5]  # control, normal, unused
    assert said["tokenizer.ggml.tokens"][-1] == f"[PAD{len(kinds) - 1}]"


def test_an_adapter_is_merged(directory, tmp_path):
    actor = HybridActor.from_pretrained(directory("llama"), dtype="float32", device="cpu")
    actor.add_adapter(LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in actor.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    actor.save_pretrained(tmp_path / "merged")
    write_gguf(actor.decoder, tmp_path / "m.gguf", tokenizer=actor.tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in merged.items())
    plain = load_decoder(directory("llama"), dtype="float32", device="cpu")
    assert not torch.equal(theirs["model.embed_tokens.weight"], plain.layers[0].o_proj[:1])


def test_llama_cpp_draws_the_same_greedy_tokens(directory, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from bench.llamacpp import LlamaCpp

    for family in ("llama", "qwen2", "qwen3"):
        actor = HybridActor.from_pretrained(directory(family), dtype="float32", device="cpu")
        write_gguf(actor.decoder, tmp_path / f"{family}.gguf", tokenizer=actor.tokenizer)
        prompts = [actor.tokenizer.encode(text) for text in TEXTS]
        params = SamplingParams(max_new_tokens=16, temperature=0.0)
        outs = actor.generate(prompts, params)
        theirs = LlamaCpp(tmp_path / f"{family}.gguf", len(prompts), 160)
        for (out,), tokens in zip(outs, theirs.generate(prompts, 16), strict=True):
            assert out.token_ids == tokens[: len(out.token_ids)]
        theirs.close()


@pytest.mark.real
def test_smollm2_comes_back_from_its_own_reader(smollm2, tmp_path):
    decoder, ours = load_decoder(smollm2, dtype="float32", device="cpu"), load_tokenizer(smollm2)
    write_gguf(decoder, tmp_path / "m.gguf", tokenizer=ours, dtype="BF16")
    model, theirs = own_reader().read(tmp_path / "m.gguf")
    found = model.state_dict()
    for name, view in hf_views(decoder).items():
        assert torch.equal(found[name], view.bfloat16().float() if view.dim() == 2 else view), name
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.chat_template == ours.chat_template


# ---- what is refused -----------------------------------------------------------------------------
def refused(decoder, path, match, **options):
    with pytest.raises(ConfigError, match=match):
        write_gguf(decoder, path, **options)
    assert not path.exists()


def test_what_llama_cpp_would_compute_otherwise_is_refused(directory, tmp_path):
    path = tmp_path / "m.gguf"
    windowed = write_chat_model(
        tmp_path / "w", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0
    )
    refused(load_decoder(windowed, device="cpu"), path, "a sliding window is not written here")
    scaled = write_chat_model(
        tmp_path / "s", "llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    )
    refused(load_decoder(scaled, device="cpu"), path, "RoPE scaling 'dynamic'")
    decoder = load_decoder(directory("llama"), dtype="float32", device="cpu")
    refused(decoder, path, "expected a dtype of F32, F16, BF16", dtype="Q4_K")


def test_tokenizers_without_a_name_are_refused(directory, tmp_path):
    decoder = load_decoder(directory("llama"), dtype="float32", device="cpu")
    strange = chat_tokenizer("qwen2")
    strange.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_CUT + "|x"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    refused(decoder, tmp_path / "m.gguf", "how this tokenizer cuts texts", tokenizer=strange)
    prefixed = chat_tokenizer("llama")
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused(decoder, tmp_path / "m.gguf", "how this tokenizer cuts texts", tokenizer=prefixed)


def test_a_word_level_tokenizer_is_refused(tiny_model, tmp_path):
    decoder, tokenizer = load_decoder(tiny_model, device="cpu"), load_tokenizer(tiny_model)
    refused(decoder, tmp_path / "m.gguf", "byte-level BPE.*WordLevel", tokenizer=tokenizer)


@pytest.mark.parametrize("value, dtype", [(float("nan"), "F32"), (1e6, "F16")])
def test_values_that_would_not_be_finite_are_refused(value, dtype, directory, tmp_path):
    decoder = load_decoder(directory("llama"), dtype="float32", device="cpu")
    with torch.no_grad():
        decoder.layers[1].down_proj[3, 5] = value
    with pytest.raises(ConfigError, match=r"blk.1.ffn_down.weight has values that are not finite"):
        write_gguf(decoder, tmp_path / "m.gguf", dtype=dtype)
    assert not (tmp_path / "m.gguf").exists()


def test_without_the_package_it_is_named(directory, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    decoder = load_decoder(directory("llama"), dtype="float32", device="cpu")
    with pytest.raises(SetupError, match=r"pip install 'fusedrl\[gguf\]'"):
        write_gguf(decoder, tmp_path / "m.gguf")


def test_pairs_are_turned_as_a_hand_computed_head():
    weight = torch.arange(8.0, device="cpu").reshape(8, 1)  # two heads of four rows
    assert gguf_files._paired(weight, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(gguf_files._paired(weight[:, 0], 2).numpy(), [0, 2, 1, 3, 4, 6, 5, 7])
