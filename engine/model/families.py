"""Table of the model families, with one entry each.

A family's entry holds what `config.json` does not state: which projections have a bias, what is
normalised, which layers have a window or another rotation of q and k, and the defaults of keys that
older files omit. All else is the same for every decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class Family:
    """One entry of the table. A bias is True, False, or the name of the config key that decides
    it."""

    name: str  # as in transformers' class names
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: str | None  # of q and k: "head": of each head; "projection": of all heads together
    # "none"; "every": sliding_window in all layers; else by layer_types, or "some": from
    # max_window_layers on, "nope": in the layers without
    windows: str
    #               RoPE, "pattern": in all but every sliding_window_pattern-th
    defaults: Mapping[str, Any]  # what transformers assumes where a key is missing
    # before attention and MLP; "post": of what they add instead; "sandwich": both
    norms: str = "pre"
    fused: bool = False  # q, k and v are one tensor in the files, and so are gate and up
    # "partial": turns a part of each head; "some": not in every layer; "two": layers with a window
    # have frequencies of their own;
    rope: str = "all"
    #                    "none": a table of positions is learned instead
    rope_kinds: tuple[str, ...] = tuple(ROPE_KINDS)
    # transformers' class of a reward model, by the name
    classifier: str = "{}ForSequenceClassification"
    language_model: str = "{}ForCausalLM"  # and of a language model
    # norms multiply by 1 + weight, the embedding is scaled, scores and logits may be capped
    gemma: bool = False
    # of the MLP; the first where config.json names none
    activations: tuple[str, ...] = ("silu", "swish")
    gated: bool = True  # the MLP multiplies the activation of one product by another product
    layer_norm: bool = False  # norms subtract the mean and add a bias
    # attention and MLP read the same stream, and both are added to it; or the config key that
    # decides
    parallel: bool | str = False
    keys: Mapping[str, str] = field(default_factory=dict)  # config keys that are called otherwise


_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_MLP: dict[str, Any] = {
    "gemma": True,
    "activations": ("gelu_pytorch_tanh",),
    "keys": {"hidden_act": "hidden_activation"},
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_NEOX_KEYS = {
    "num_key_value_heads": "num_attention_heads",
    "rms_norm_eps": "layer_norm_eps",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama",
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        None,
        "none",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family(
        "Mistral",
        False,
        False,
        False,
        None,
        "every",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Family("Qwen2", True, False, False, None, "some", _QWEN),
    "qwen3": Family(
        "Qwen3",
        "attention_bias",
        "attention_bias",
        False,
        "head",
        "some",
        {**_QWEN, "head_dim": 128},
    ),
    "phi3": Family(
        "Phi3",
        False,
        False,
        False,
        None,
        "every",
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        fused=True,
        rope="partial",
        rope_kinds=("default",),
    ),
    "smollm3": Family(
        "SmolLM3",
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        None,
        "nope",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "no_rope_layer_interval": 4,
        },
        rope="some",
    ),
    "olmo2": Family(
        "Olmo2",
        "attention_bias",
        "attention_bias",
        False,
        "projection",
        "none",
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        norms="post",
    ),
    "gemma2": Family(
        "Gemma2",
        "attention_bias",
        "attention_bias",
        False,
        None,
        "pattern",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norms="sandwich",
        **_GEMMA_MLP,
    ),
    "gemma3_text": Family(
        "Gemma3",
        "attention_bias",
        "attention_bias",
        False,
        "head",
        "pattern",
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        norms="sandwich",
        rope="two",
        classifier="{}TextForSequenceClassification",
        **_GEMMA_MLP,
    ),
    "gpt2": Family(
        "GPT2",
        True,
        True,
        True,
        None,
        "none",
        {
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        rope="none",
        language_model="{}LMHeadModel",
        activations=("gelu_new", "gelu_pytorch_tanh", "gelu"),
        gated=False,
        layer_norm=True,
        keys=_GPT2_KEYS,
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        "attention_bias",
        "attention_bias",
        True,
        None,
        "none",
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
        },
        rope="partial",
        rope_kinds=("default",),
        activations=("gelu", "gelu_new", "gelu_pytorch_tanh"),
        gated=False,
        layer_norm=True,
        parallel="use_parallel_residual",
        keys=_NEOX_KEYS,
    ),
}
