"""The model families, one row each, and the configuration that the decoder reads.

A family is what its `config.json` leaves unsaid: which projections carry a bias, whether q and k are normalised, which layers
have a window, and the defaults of keys that older files omit. Everything else is the same decoder.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """One row of the table. A bias is True, False, or the name of the config key that decides."""

    name: str  # as in transformers' class names
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    windows: str  # "none"; "every": sliding_window in all layers; "some": by layer_types, or from max_window_layers on
    defaults: Mapping[str, Any]  # what transformers assumes where a key is missing


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "attention_bias", "attention_bias", "mlp_bias", False, "none",
                    {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}),
    "mistral": Family("Mistral", False, False, False, False, "every",
                      {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": Family("Qwen2", True, False, False, False, "some", _QWEN),
    "qwen3": Family("Qwen3", "attention_bias", "attention_bias", False, True, "some", {**_QWEN, "head_dim": 128}),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and numbers. `inv_freq` [head_dim / 2] are the float32 rotary frequencies, scaling included."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer; a token sees itself and window - 1 tokens before it; 0: all
    inv_freq: tuple[float, ...]
    rope_scale: float  # multiplies cos and sin
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json together
    pad_token_id: int | None
    raw: dict[str, Any] = field(repr=False, compare=False)  # config.json as it was read: what saving writes back
    raw_generation: dict[str, Any] | None = field(default=None, repr=False, compare=False)  # generation_config.json

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def model_config(source: str | Path | Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read the configuration of a model from its directory (config.json, generation_config.json), or from a dict with the generation config beside it.

    Raises:
        FileNotFoundError: no config.json. ValueError: an unknown model_type, a missing key, a size that does not fit, or a feature
        that the decoder does not have; the message names it.
    """
    if isinstance(source, Mapping):
        return _parse(dict(source), None if generation is None else dict(generation), "the configuration")
    path = Path(source) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a model directory with a config.json, found none at {path}")
    beside = path.with_name("generation_config.json")
    return _parse(read_json(path), read_json(beside) if beside.is_file() else None, str(path))


def _parse(raw: dict[str, Any], raw_generation: dict[str, Any] | None, where: str) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]

    def get(key: str, default: Any = None) -> Any:
        return raw[key] if key in raw else family.defaults.get(key, default)

    def size(key: str, default: Any = None) -> int:
        value = default if (found := get(key)) is None else found
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: expected a positive whole number for {key!r}, got {value!r}")
        return value

    def flag(rule: bool | str) -> bool:
        return bool(get(rule, False)) if isinstance(rule, str) else rule

    if get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{where}: expected hidden_act 'silu', got {raw['hidden_act']!r}; no other activation is implemented")
    if get("quantization_config") is not None:
        raise ValueError(f"{where}: quantised weights (quantization_config) are not supported; use the unquantised model")
    num_layers, num_heads, hidden_size, max_positions = (
        size(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"))
    num_kv_heads = size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim")
    head_dim = size("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"{where}: expected an even head_dim (rotary embeddings turn pairs), got {head_dim}")
    generation = raw_generation or {}
    bos, pad = (raw_id if (raw_id := get(key)) is not None else generation.get(key) for key in ("bos_token_id", "pad_token_id"))
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=float(get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        tie_embeddings=bool(get("tie_word_embeddings", False)),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        windows=_windows(family, get, num_layers, where),
        inv_freq=_inv_freq(get, head_dim, max_positions, where),
        rope_scale=1.0,
        initializer_range=float(get("initializer_range", 0.02)),
        bos_token_id=bos[0] if isinstance(bos, list) else bos,
        eos_token_ids=tuple(dict.fromkeys([*_ids(get("eos_token_id")), *_ids(generation.get("eos_token_id"))])),
        pad_token_id=pad,
        raw=raw,
        raw_generation=raw_generation,
    )


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _windows(family: Family, get: Any, num_layers: int, where: str) -> tuple[int, ...]:
    window = get("sliding_window") if family.windows != "none" else None
    if family.windows == "some" and not get("use_sliding_window", False):
        window = None
    if window is None:
        return (0,) * num_layers
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"{where}: expected a positive sliding_window, got {window!r}")
    if family.windows == "every":
        return (window,) * num_layers
    kinds = get("layer_types") or ["sliding_attention" if i >= get("max_window_layers") else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"{where}: expected {num_layers} layer_types, each 'sliding_attention' or 'full_attention', got {kinds}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _inv_freq(get: Any, head_dim: int, max_positions: int, where: str) -> tuple[float, ...]:
    """theta^(-2i / D), then the scaling: linear divides by the factor; llama3 divides the long waves and blends into the short ones
    (Llama 3.1's rule). Reads `rope_parameters` (transformers >= 5) and the older `rope_theta` with `rope_scaling`."""
    rope = dict(get("rope_scaling") or get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", get("partial_rotary_factor", 1.0))
    if kind not in _ROPE_KINDS or any(isinstance(value, dict) for value in rope.values()) or partial not in (None, 1, 1.0):
        raise ValueError(f"{where}: RoPE {rope} is not implemented; supported kinds: {', '.join(_ROPE_KINDS)}, on whole heads, alike in all layers")
    theta = rope.get("rope_theta") or get("rope_theta") or 10000.0
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    if missing := [key for key in needed if key not in rope]:
        raise ValueError(f"{where}: RoPE kind {kind!r} needs {', '.join(missing)}; got {rope}")
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if kind == "linear":
        inv_freq = inv_freq / rope["factor"]
    elif kind == "llama3":
        original = get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or max_positions
        low, high, wavelength = rope["low_freq_factor"], rope["high_freq_factor"], 2 * math.pi / inv_freq
        blend = (original / wavelength - low) / (high - low)
        blended = (1 - blend) * inv_freq / rope["factor"] + blend * inv_freq
        scaled = torch.where(wavelength > original / low, inv_freq / rope["factor"], inv_freq)
        inv_freq = torch.where((wavelength <= original / low) & (wavelength >= original / high), blended, scaled)
    return tuple(inv_freq.tolist())
