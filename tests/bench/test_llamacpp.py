"""The GGUF file that llama.cpp is given has the model's own weights."""

import pytest
import torch
from bench.llamacpp import write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_same_weights_back(tmp_path, dtype):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    ours = LlamaForCausalLM(config)
    ours.save_pretrained(tmp_path)
    write_gguf(tmp_path, dtype, tmp_path / "model.gguf")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    for name, p in ours.state_dict().items():
        want = p.to(dtype).float() if p.dim() == 2 else p
        assert torch.equal(found[name], want), name
