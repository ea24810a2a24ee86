"""llama.cpp as a contestant. `pip install llama-cpp-python gguf` builds it for the processor of the
machine.

The weights come from a directory in the Hugging Face layout, in float32 or bfloat16, and are
written to a GGUF file without a vocabulary: inputs and outputs are token ids. Keys and values are
float16, the default of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _name_of(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp rotates them: pairs side by side, where
    transformers has the first half of a head beside the second."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape_as(weight)


def write_gguf(directory: Path, dtype: torch.dtype, to: Path) -> Path:
    """Write the weights of a Llama in `dtype`; norms are float32, as llama.cpp wants them."""
    import gguf

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(to, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    for name, found in load_file(directory / "model.safetensors").items():
        weight = found.float()
        if "q_proj" in name or "k_proj" in name:
            weight = _rotated(weight, heads if "q_proj" in name else kv_heads)
        if dtype == torch.bfloat16 and weight.dim() == 2:
            raw = weight.to(dtype).view(torch.int16).numpy().view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_name_of(name), raw, raw_dtype=kind)
        else:
            writer.add_tensor(_name_of(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


class LlamaCpp:
    """A model of llama.cpp on one thread, and a context for so many sequences of so many tokens."""

    def __init__(self, file: Path, sequences: int, tokens: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model)
        if not self._model:
            raise ValueError(f"llama.cpp: expected a model that it reads, got {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = sequences * -(-tokens // 256) * 256
        context.n_batch = context.n_ubatch = max(512, sequences * tokens)
        context.n_seq_max = sequences
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(sequences * tokens, 0, 1)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether it is drawn from), and draw greedily."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, drawn) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, drawn
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp: expected a step, got status {status}")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                pointer = self._api.llama_get_logits_ith(self._context, i)
                found.append(int(np.ctypeslib.as_array(pointer, (self._vocab,)).argmax()))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy completions, all sequences in one batch."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        completions = [[token] for token in self._decode(rows)]
        for step in range(new - 1):
            rows = [
                (completion[-1], len(prompt) + step, sequence, True)
                for sequence, (prompt, completion) in enumerate(
                    zip(prompts, completions, strict=True)
                )
            ]
            for completion, token in zip(completions, self._decode(rows), strict=True):
                completion.append(token)
        return completions

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def contestant(
    directory: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], new: int, scratch: Path
) -> Callable[[], list[list[int]]]:
    """Greedy completions of the prompts by llama.cpp; the file is written to `scratch`."""
    file = scratch / f"{str(dtype).removeprefix('torch.')}.gguf"
    if not file.is_file():
        write_gguf(directory, dtype, file)
    model = LlamaCpp(file, len(prompts), max(map(len, prompts)) + new)
    return lambda: model.generate(prompts, new)
