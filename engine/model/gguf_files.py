"""GGUF files, which llama.cpp and programs made of it read: the weights of a decoder, its sizes,
its tokenizer and its chat template, in one file. Needs the package gguf.

Llama, Qwen2 and Qwen3 are written, with a byte-level BPE tokenizer. llama.cpp cuts texts before it
merges, by rules that a file can only name; where the tokenizer's own rules have no name there, the
file would tokenise otherwise than the model was trained, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora import merging
from fusedrl.engine.model.weights import hf_views

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # ours -> the package's
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # what the two patterns share
_CUTS = {  # patterns of tokenizer.json -> llama.cpp's name
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return GGUF's name of a dtype; F32 for those that it does not have."""
    return next((name for name, own in DTYPES.items() if own == dtype), "F32")


def write_gguf(
    decoder: Decoder,
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str = "F32",
    name: str | None = None,
) -> None:
    """Write a decoder as one GGUF file. Matrices are written in `dtype`, norms and biases in
    float32. An adapter is merged, one tensor at a time.

    Args:
        tokenizer: a transformers tokenizer with a chat template or without; None writes a file
            without vocabulary, whose inputs are token ids.
        dtype: F32, F16 or BF16.
        name: name of the model in the file.
    Raises:
        SetupError: the package gguf is not installed.
        ConfigError: the family, its options, the tokenizer or a weight cannot be written to GGUF
            without changing what the model computes.
    """
    gguf = _package()
    config = decoder.config
    if dtype not in DTYPES:
        raise ConfigError(f"gguf: expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    _check(config)
    kind = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    vocabulary = None if tokenizer is None else _vocabulary(gguf, config, tokenizer)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    _write_sizes(gguf, writer, config, dtype, name)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _write_vocabulary(writer, config, tokenizer, vocabulary)
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    tensors = list(_tensors(decoder, names, dtype))
    for own, shape, stored, _ in tensors:
        size = int(np.prod(shape)) * stored.itemsize
        bf16 = gguf.GGMLQuantizationType.BF16 if stored == torch.bfloat16 else None
        plain = np.dtype(np.float16 if stored == torch.float16 else np.float32)
        writer.add_tensor_info(own, list(shape), plain, size, raw_dtype=bf16)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, _, stored, make in tensors:
            writer.write_tensor_data(_array(own, make(), stored))
    except BaseException:
        writer.close()
        Path(path).unlink(missing_ok=True)
        raise
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise SetupError(
            "gguf: the package gguf is not installed: pip install 'fusedrl[gguf]'"
        ) from None
    return gguf


def _check(config: ModelConfig) -> None:
    """Raise ConfigError for a model that llama.cpp would compute otherwise."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"gguf: expected a model of {', '.join(ARCHITECTURES)}, got {config.model_type!r}; "
            "export it with --format merged, and convert that with llama.cpp's own "
            "convert_hf_to_gguf.py"
        )
    raw = config.raw
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if any(config.windows) or scaling not in ("default", "linear"):
        what = "a sliding window" if any(config.windows) else f"RoPE scaling {scaling!r}"
        raise ConfigError(
            f"gguf: {what} is not written here; export with --format merged, and convert that with "
            "llama.cpp's own convert_hf_to_gguf.py"
        )


def _write_sizes(gguf: Any, writer: Any, config: ModelConfig, dtype: str, name: str | None) -> None:
    raw = config.raw
    rope = {**dict(raw.get("rope_scaling") or {}), **dict(raw.get("rope_parameters") or {})}
    if name:
        writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0))
    if rope.get("rope_type", rope.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {"F32": kinds.ALL_F32, "F16": kinds.MOSTLY_F16, "BF16": kinds.MOSTLY_BF16}[dtype]
    )


# ---- weights -------------------------------------------------------------------------------------
def _tensors(
    decoder: Decoder, names: Any, dtype: str
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    """Yield (GGUF's name, shape, dtype, a function that makes the tensor) of every parameter."""
    config, merge = decoder.config, merging(decoder)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, view in hf_views(decoder).items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ConfigError(f"gguf: expected a tensor that GGUF has a name for, got {name}")
        turned = heads.get(name.split(".")[-2], 0) if config.model_type == "llama" else 0

        def make(name: str = name, view: Tensor = view, turned: int = turned) -> Tensor:
            tensor = merge(name, view)
            return _paired(tensor, turned) if turned else tensor

        yield own, tuple(view.shape), DTYPES[dtype] if view.dim() == 2 else torch.float32, make


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a Llama's query or key projection as llama.cpp rotates them: the two values
    of a pair side by side, where transformers has the first half of a head before the second."""
    rows = weight.shape[0]
    return weight.unflatten(0, (heads, 2, rows // heads // 2)).transpose(1, 2).reshape_as(weight)


def _array(name: str, tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    stored = tensor.detach().cpu().to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ConfigError(
            f"gguf: {name} has values that are not finite in {str(dtype).removeprefix('torch.')}"
            + ("; take --dtype BF16 or F32" if dtype == torch.float16 else "")
        )
    if dtype == torch.bfloat16:  # numpy has no such type: its bytes
        return stored.contiguous().view(torch.int16).numpy().view(np.uint8)
    return stored.contiguous().numpy()


# ---- tokenizer -----------------------------------------------------------------------------------
def _vocabulary(gguf: Any, config: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """Return what GGUF keeps of a tokenizer: tokens, types, merges and the name of its cuts.

    Raises:
        ConfigError: it is not a byte-level BPE, or llama.cpp has no name for how it cuts texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "gguf: expected a tokenizer with a tokenizer.json, got "
            f"{type(tokenizer).__name__}; leave the tokenizer to llama.cpp's own converter"
        )
    raw = json.loads(backend.to_str())
    model = raw["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        raise ConfigError(
            f"gguf: expected a byte-level BPE tokenizer, got {kind}; export with --format merged, "
            "and convert that with llama.cpp's own convert_hf_to_gguf.py"
        )
    cuts = _cuts(raw)
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in raw["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {"pre": cuts, "tokens": tokens, "types": types, "merges": merges}


def _cuts(raw: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rules by which a tokenizer cuts texts before it merges."""
    first = raw.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1] if kinds[-1] == "ByteLevel" else {}
    normal = (raw.get("normalizer") or {}).get("type")
    found = None
    if byte_level and not byte_level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and byte_level.get("use_regex") and normal is None:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and byte_level.get("use_regex") and normal is None:
            found = "smollm" if steps[0].get("individual_digits") else None
        elif kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex"):
            pattern = steps[0].get("pattern", {}).get("Regex", "")
            found = _CUTS.get(pattern) if steps[0].get("behavior") == "Isolated" else None
            if normal not in ((None, "NFC") if found == "qwen2" else (None,)):
                found = None
    if found is None:
        raise ConfigError(
            f"gguf: llama.cpp has no name that is known here for how this tokenizer cuts texts "
            f"({', '.join(map(str, kinds))}); expected the cuts of GPT-2, SmolLM, Qwen2 or Llama 3."
            " Export with --format merged, and convert that with llama.cpp's own "
            "convert_hf_to_gguf.py"
        )
    return found


def _write_vocabulary(
    writer: Any, config: ModelConfig, tokenizer: Any, vocabulary: dict[str, Any]
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    end = tokenizer.eos_token_id
    if end is None:
        end = next(iter(config.eos_token_ids), None)
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (end, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None:
            add(int(index))
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
