"""Configuration of a model, read from its config.json: shapes, positions and rotations, for every
family.

One file: what is read of one JSON object, and what may stand in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedrl.engine.base.errors import of_the_machine
from fusedrl.engine.model.directories import no_model
from fusedrl.engine.model.families import FAMILIES, ROPE_KINDS, Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}  # theirs: kernels/swiglu.py's
_LARGEST_NUMBER = 1e30
_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_LARGEST_JSON = 100_000_000  # bytes; an index of all tensors may have some of them
_MOST = {"num_hidden_layers": 10_000}  # of other sizes 2^31 - 1, which kernels count to
_REFUSED = {
    "use_bidirectional_attention": "a decoder's tokens see those before them",
    "add_cross_attention": "there is no encoder to attend to",
    "scale_attn_by_inverse_layer_idx": "attention scales alike in all layers",
    "reorder_and_upcast_attn": "scores are float32 here whatever it says, so set it to false",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and numbers of a decoder. `inv_freq` holds the float32 rotary frequencies, with their
    scaling, one for each pair of values that is rotated."""

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
    qk_norm: str | None  # "head", "projection" or none
    norms: str  # "pre", "post" or "sandwich"
    norm_offset: float  # norms multiply by this + their weight
    layer_norm: bool  # norms subtract the mean and add a bias
    # per layer; a token sees itself and window - 1 tokens before it; 0: all
    windows: tuple[int, ...]
    inv_freq: tuple[float, ...]
    local_inv_freq: tuple[float, ...]  # of the layers that turn otherwise; empty: there are none
    # per layer; 0: inv_freq, 1: local_inv_freq, -1: q and k stay as they are
    ropes: tuple[int, ...]
    rope_scale: float  # multiplies cos and sin
    attention_scale: float  # multiplies q . k
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float  # multiplies the embedding, rounded to its dtype
    activation: str  # of the MLP: "silu", "gelu_tanh" or "gelu"
    gated: bool  # the MLP multiplies the activation of one product by another product
    parallel: bool  # attention and MLP read the same stream
    learned_positions: bool  # a vector of each of max_positions is added to the embedding
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json together
    pad_token_id: int | None
    # config.json as it was read: what saving writes back
    raw: dict[str, Any] = field(repr=False, compare=False)
    # generation_config.json
    raw_generation: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def family(self) -> Family:
        """Family of the model."""
        return FAMILIES[self.model_type]

    @property
    def least_parameters(self) -> int:
        """Number of parameters in the matrices of the model, without biases, norms and a head."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        mlp = (3 if self.gated else 2) * self.intermediate_size
        positions = self.max_positions if self.learned_positions else 0
        return self.hidden_size * (self.vocab_size + positions + self.num_layers * (heads + mlp))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise ValueError, with the file's name, if the file holds
    anything else."""
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and at most {_LARGEST_JSON:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, no JSON, a number of thousands of digits
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON object: {error}; copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def model_config(
    source: str | Path | Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Read the configuration of a model from its directory (config.json, generation_config.json),
    or from two dicts: `source` and `generation`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the model_type is unknown, a key is missing, a size does not fit, or the decoder
            lacks a feature; the message names it.
    """
    if isinstance(source, Mapping):
        where, raw = "the configuration", dict(source)
        raw_generation = None if generation is None else dict(generation)
    else:
        path = Path(source) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(no_model(Path(source)))
        beside = path.with_name("generation_config.json")
        where, raw = str(path), read_json(path)
        raw_generation = read_json(beside) if beside.is_file() else None
    try:
        return _parse(raw, raw_generation, where)
    # what no check foresaw: an entry of a type or a size that the arithmetic of its family does
    # not take
    except (TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        if of_the_machine(error):
            raise
        raise ValueError(
            f"{where}: cannot be read as the configuration of a {raw.get('model_type')!r:.80} "
            f"({type(error).__name__}: {error}); an entry is of a type or a size that it cannot "
            "have: copy or download the file again"
        ) from error


class _Keys:
    """Entries of a config.json, with the family's defaults for missing ones. `where`: name of the
    file in messages."""

    def __init__(self, raw: dict[str, Any], family: Family, where: str) -> None:
        self.raw, self.family, self.where = raw, family, where

    def theirs(self, key: str) -> str:
        """Return the name that the family uses for a key."""
        return self.family.keys.get(key, key)

    def get(self, key: str, default: Any = None) -> Any:
        found = self.theirs(key)
        return self.raw[found] if found in self.raw else self.family.defaults.get(key, default)

    def size(self, key: str, default: Any = None) -> int:
        value = default if (found := self.get(key)) is None else found
        most = _MOST.get(key, 2**31 - 1)
        if type(value) is not int or not 1 <= value <= most:
            huge = f", and at most {most:,}" if type(value) is int and value > most else ""
            raise ValueError(
                f"{self.where}: expected a positive whole number for {self.theirs(key)!r}{huge}, "
                f"got {value!r:.80}"
            )
        return value

    def flag(self, rule: bool | str, default: bool = False) -> bool:
        """Return a rule of the family if it is a boolean; else the value of the key that the rule
        names."""
        if not isinstance(rule, str):
            return rule
        value = default if (found := self.get(rule)) is None else found
        if not isinstance(value, bool):
            raise ValueError(
                f"{self.where}: expected true or false for {self.theirs(rule)!r}, got {value!r:.80}"
            )
        return value

    def number(self, key: str, *, zero: bool = False) -> float | None:
        """Return a number above 0 (`zero`: or 0), or None."""
        value = self.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not (
            0 < value < _LARGEST_NUMBER or (zero and value == 0)
        ):
            raise ValueError(
                f"{self.where}: expected a number {'of at least' if zero else 'above'} 0 for "
                f"{self.theirs(key)!r}, got {value!r:.80}"
            )
        return float(value)

    def check_rope(self) -> None:
        """Raise ValueError unless the entries about rotations are numbers above 0, or objects and
        lists of these; which of them there must be is checked where they are used."""
        for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
            self.number(key)
        for key in ("rope_scaling", "rope_parameters"):
            value = self.get(key)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{self.where}: expected an object for {key!r}, got {value!r:.80}")
            self._check_numbers(key, value or {})

    def _check_numbers(self, key: str, value: Any) -> None:
        if isinstance(value, dict | list):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for name, inner in entries:
                self._check_numbers(f"{key}.{name}", inner)
        elif type(value) in (int, float) and not 0 <= value < _LARGEST_NUMBER:
            raise ValueError(
                f"{self.where}: expected a number of at least 0 for {key!r}, got {value!r:.80}"
            )


def _activation(keys: _Keys) -> str:
    """Return the kernels' name of the activation. Raise ValueError for an unknown activation, and
    for other features that the decoder lacks."""
    family, where = keys.family, keys.where
    if (activation := keys.get("hidden_act") or family.activations[0]) not in family.activations:
        raise ValueError(
            f"{where}: expected {keys.theirs('hidden_act')} {family.activations[0]!r}, got "
            f"{activation!r}; no other activation is "
            f"implemented for {family.name}"
        )
    for key, why in _REFUSED.items():
        if keys.get(key):
            raise ValueError(f"{where}: {key} is not implemented: {why}")
    if family is FAMILIES["gemma3_text"] and keys.get("attn_logit_softcapping") is not None:
        raise ValueError(
            f"{where}: attn_logit_softcapping is not implemented for Gemma 3 (transformers' "
            "ignores it); set it to null"
        )
    if keys.get("quantization_config") is not None:
        raise ValueError(
            f"{where}: quantised weights (quantization_config) are not supported; use the "
            "unquantised model"
        )
    return _ACTIVATIONS[activation]


def _heads(keys: _Keys, hidden_size: int, num_heads: int) -> tuple[int, int]:
    """Return (number of key/value heads, head dim)."""
    where, num_kv_heads = keys.where, keys.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    if keys.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"{where}: {keys.theirs('hidden_size')} {hidden_size} is not a multiple of "
            f"{keys.theirs('num_attention_heads')} {num_heads}, and "
            "there is no head_dim"
        )
    head_dim = keys.size("head_dim", hidden_size // num_heads)
    if head_dim % 2 and keys.family.rope != "none":
        raise ValueError(
            f"{where}: expected an even head_dim (rotary embeddings turn pairs), got {head_dim}"
        )
    return num_kv_heads, head_dim


def _positions(keys: _Keys, num_layers: int, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Return the fields for each layer's attention window and for the encoding of positions."""
    family, get, where = keys.family, keys.get, keys.where
    ropes = _ropes(family, get, num_layers, where)
    kinds = _layer_kinds(family, get, num_layers, ropes, where)
    if family.rope == "two":
        ropes = tuple(int(kind == "sliding_attention") for kind in kinds)
    inv_freq, rope_scale, local_inv_freq = _rotations(family, get, head_dim, max_positions, where)
    return {
        "windows": _windows(family, get, kinds, where),
        "ropes": ropes,
        "inv_freq": inv_freq,
        "local_inv_freq": local_inv_freq,
        "rope_scale": rope_scale,
    }


def _special_ids(keys: _Keys, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of special token ids, from config.json and generation_config.json
    together."""
    beside = str(Path(keys.where).with_name("generation_config.json"))
    bos, pad, eos = (
        (
            _ids(keys.where, key, keys.get(key)),
            _ids(beside, key, generation.get(key)),
        )
        for key in ("bos_token_id", "pad_token_id", "eos_token_id")
    )
    return {
        "bos_token_id": next(iter(bos[0] or bos[1]), None),
        "pad_token_id": next(iter(pad[0] or pad[1]), None),
        "eos_token_ids": tuple(dict.fromkeys([*eos[0], *eos[1]])),
    }


def _parse(raw: dict[str, Any], raw_generation: dict[str, Any] | None, where: str) -> ModelConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: unknown model_type {model_type!r:.80}; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    keys = _Keys(raw, family, where)
    size, flag, number = keys.size, keys.flag, keys.number
    keys.check_rope()
    activation = _activation(keys)
    num_layers, num_heads, hidden_size, max_positions = (
        size(key)
        for key in (
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_size",
            "max_position_embeddings",
        )
    )
    num_kv_heads, head_dim = _heads(keys, hidden_size, num_heads)
    return ModelConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size", None if family.gated else 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=_or(number("rms_norm_eps", zero=True), 1e-6),
        max_positions=max_positions,
        tie_embeddings=flag("tie_word_embeddings"),
        qkv_bias=flag(family.qkv_bias),
        o_bias=flag(family.o_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        norms=family.norms,
        norm_offset=float(family.gemma),
        layer_norm=family.layer_norm,
        attention_scale=((number("query_pre_attn_scalar") if family.gemma else None) or head_dim)
        ** -0.5
        if flag("scale_attn_weights", True)
        else 1.0,
        attention_softcap=number("attn_logit_softcapping") if family.gemma else None,
        logit_softcap=number("final_logit_softcapping") if family.gemma else None,
        embedding_scale=hidden_size**0.5 if family.gemma else 1.0,
        activation=activation,
        gated=family.gated,
        parallel=flag(family.parallel),
        learned_positions=family.rope == "none",
        initializer_range=_or(number("initializer_range", zero=True), 0.02),
        **_positions(keys, num_layers, head_dim, max_positions),
        **_special_ids(keys, raw_generation or {}),
        raw=raw,
        raw_generation=raw_generation,
    )


def _or(value: float | None, usual: float) -> float:
    return usual if value is None else value


def _ids(where: str, key: str, value: Any) -> list[int]:
    """Return the token ids of an entry, which holds one, a list of them, or null."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(one) is int and -(2**31) <= one < 2**31 for one in found):
        raise ValueError(
            f"{where}: expected a token id, a list of token ids or null for {key!r}, got "
            f"{value!r:.80}"
        )
    return found


def _ropes(family: Family, get: Any, num_layers: int, where: str) -> tuple[int, ...]:
    if family.rope != "some":
        return (-1 if family.rope == "none" else 0,) * num_layers
    interval, turned = get("no_rope_layer_interval"), get("no_rope_layers")
    if turned is None and type(interval) is int and interval > 0:
        turned = [(i + 1) % interval for i in range(num_layers)]
    if (
        not isinstance(turned, list)
        or len(turned) < num_layers
        or not all(isinstance(kind, int) for kind in turned)
    ):
        raise ValueError(
            f"{where}: expected no_rope_layers for {num_layers} layers (a list of 0 and 1), or a "
            f"no_rope_layer_interval above 0, got {turned!r:.80} and {interval!r:.80}"
        )
    return tuple(0 if kind else -1 for kind in turned[:num_layers])


def _layer_kinds(
    family: Family, get: Any, num_layers: int, ropes: tuple[int, ...], where: str
) -> list[str]:
    if family.windows in ("none", "every"):
        return [
            {"none": "full_attention", "every": "sliding_attention"}[family.windows]
        ] * num_layers
    for key in ("max_window_layers", "sliding_window_pattern"):
        if (value := get(key)) is not None and (type(value) is not int or value < 0):
            raise ValueError(
                f"{where}: expected a whole number of at least 0 for {key!r}, got {value!r:.80}"
            )
    if not (kinds := get("layer_types")):
        rule = {
            "some": lambda i: i >= get("max_window_layers"),
            "nope": lambda i: ropes[i] < 0,
            "pattern": lambda i: (i + 1) % get("sliding_window_pattern"),
        }
        kinds = [
            "sliding_attention" if rule[family.windows](i) else "full_attention"
            for i in range(num_layers)
        ]
    known = ("sliding_attention", "full_attention")
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in known for kind in kinds)
    ):
        raise ValueError(
            f"{where}: expected {num_layers} layer_types, each 'sliding_attention' or "
            f"'full_attention', got {kinds!r:.200}"
        )
    return list(kinds)


def _windows(family: Family, get: Any, kinds: list[str], where: str) -> tuple[int, ...]:
    window = get("sliding_window") if family.windows != "none" else None
    used = get("use_sliding_window", False)
    if used is not None and not isinstance(used, bool):
        raise ValueError(
            f"{where}: expected true or false for 'use_sliding_window', got {used!r:.80}"
        )
    if family.windows in ("some", "nope") and not used:
        window = None
    if window is None:
        return (0,) * len(kinds)
    if type(window) is not int or not 1 <= window < 2**31:
        raise ValueError(f"{where}: expected a positive sliding_window, got {window!r:.80}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rotations(
    family: Family, get: Any, head_dim: int, max_positions: int, where: str
) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Return (inv_freq, rope_scale, local_inv_freq). They are read from `rope_parameters`
    (transformers >= 5) or the older `rope_theta` with `rope_scaling`."""
    if family.rope == "none":
        return (), 1.0, ()
    rope = dict(get("rope_scaling") or get("rope_parameters") or {})
    original = get("original_max_position_embeddings") if family.rope != "two" else None
    if family.rope != "two":
        return (
            *_inv_freq(
                family,
                rope,
                get("rope_theta"),
                get("partial_rotary_factor"),
                original,
                head_dim,
                max_positions,
                where,
            ),
            (),
        )
    nested = "full_attention" in rope or "sliding_attention" in rope
    full, local = (
        (rope.get(kind) or {}) if nested else {} for kind in ("full_attention", "sliding_attention")
    )
    found, scale = _inv_freq(
        family,
        full if nested else rope,
        get("rope_theta"),
        None,
        None,
        head_dim,
        max_positions,
        where,
    )
    theirs, local_scale = _inv_freq(
        family, local, get("rope_local_base_freq"), None, None, head_dim, max_positions, where
    )
    if scale != local_scale:
        raise ValueError(
            f"{where}: RoPE {rope} is not implemented: its kinds scale attention alike in all "
            "layers, or not at all"
        )
    return found, scale, theirs


def _inv_freq(
    family: Family,
    rope: dict[str, Any],
    theta: float | None,
    partial: float | None,
    original: int | None,
    head_dim: int,
    max_positions: int,
    where: str,
) -> tuple[tuple[float, ...], float]:
    """Return the frequencies theta^(-2i / D) of the values that are rotated, with scaling, and the
    factor of cos and sin. Scalings: linear divides by the factor; dynamic changes nothing up to
    max_position_embeddings, and no sequence here is longer. llama3 divides the frequencies of long
    waves, keeps those of short ones, and blends between (the rule of Llama 3.1). yarn does the same
    by the number of turns of a wave within the trained length (Peng et al., 2023, YaRN, eq. 17 to
    22)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", partial) or 1.0
    turned = int(head_dim * partial)
    if (
        not isinstance(kind, str)
        or kind not in family.rope_kinds
        or any(isinstance(value, dict) for value in rope.values())
        or (turned != head_dim and family.rope != "partial")
    ):
        shown = {key: value for key, value in rope.items() if not isinstance(value, list)} | (
            {} if partial == 1 else {"partial_rotary_factor": partial}
        )
        raise ValueError(
            f"{where}: RoPE {shown} is not implemented for {family.name}; supported kinds: "
            f"{', '.join(family.rope_kinds)}, "
            + ("" if family.rope == "partial" else "on whole heads, ")
            + "alike in all layers"
        )
    if not 0 < turned <= head_dim or turned % 2:
        raise ValueError(
            f"{where}: expected a partial_rotary_factor that leaves an even number of a head's "
            f"{head_dim} values to turn, got {partial}"
        )
    theta = rope.get("rope_theta") or theta or 10000.0
    if missing := [key for key in ROPE_KINDS[kind] if key not in rope]:
        raise ValueError(f"{where}: RoPE kind {kind!r} needs {', '.join(missing)}; got {rope}")
    _check_rope_numbers(rope, kind, where)
    inv_freq = 1.0 / (theta ** (torch.arange(0, turned, 2, dtype=torch.int64).float() / turned))
    original = original or rope.get("original_max_position_embeddings") or max_positions
    scale = 1.0
    if kind == "linear":
        inv_freq = inv_freq / rope["factor"]
    elif kind == "llama3":
        inv_freq = _blended(inv_freq, rope, original, where)
    elif kind == "yarn":
        factor = rope.get("factor") or max_positions / original
        # the pair that makes so many turns
        ends = [
            turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        ]
        if rope.get("truncate", True):
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        first, last = max(ends[0], 0), min(ends[1], turned - 1)
        kept = 1 - ((torch.arange(turned // 2).float() - first) / (last - first or 0.001)).clamp(
            0, 1
        )
        inv_freq = inv_freq / factor * (1 - kept) + inv_freq * kept
        scale = _yarn_scale(rope, factor)
    if not (bool(torch.isfinite(inv_freq).all()) and math.isfinite(scale)):
        raise ValueError(
            f"{where}: expected rotations whose frequencies are finite, got those of theta {theta} "
            f"and {rope}"
        )
    return tuple(inv_freq.tolist()), scale


def _check_rope_numbers(rope: dict[str, Any], kind: str, where: str) -> None:
    """Raise ValueError unless the entries that a kind of RoPE computes with are numbers above 0."""
    wrong = {
        key: value
        for key, value in rope.items()
        if key in _ROPE_NUMBERS
        and value is not None
        and (type(value) not in (int, float) or (key in ROPE_KINDS[kind] and value == 0))
    }
    if wrong:
        raise ValueError(
            f"{where}: expected numbers above 0 in the entries about rotations, got {wrong!r:.200}"
        )


def _blended(
    inv_freq: torch.Tensor, rope: dict[str, Any], original: int, where: str
) -> torch.Tensor:
    """Return the frequencies of the kind llama3."""
    low, high, wavelength = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        2 * math.pi / inv_freq,
    )
    if low == high:
        raise ValueError(
            f"{where}: expected a high_freq_factor above low_freq_factor, got {high} and {low}"
        )
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / rope["factor"] + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / rope["factor"], inv_freq)
    return torch.where(
        (wavelength <= original / low) & (wavelength >= original / high), blended, scaled
    )


def _yarn_scale(rope: dict[str, Any], factor: float) -> float:
    """Return attention_factor, or 0.1 log(factor) + 1; with mscale and mscale_all_dim the quotient
    of two such numbers."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)
