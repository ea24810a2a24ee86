"""decode_step: one step of a decoder over the paged KV cache, from token ids to the hidden states that the head reads."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerWeights(NamedTuple):
    """One layer's parameters, live (never copies). D head dim, Hq query heads, Hkv key/value heads, H hidden, F feed-forward width."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [H, Hq D]
    o_bias: Tensor | None  # [H]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [2 F, H]
    gate_up_bias: Tensor | None  # [2 F]
    down: Tensor  # [H, F]
    down_bias: Tensor | None  # [H]
    window: int  # a token sees itself and window - 1 tokens before it; 0: all


class DecoderWeights(NamedTuple):
    """A decoder's parameters and the numbers that shape its arithmetic."""

    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]; the embedding itself where they are tied
    inv_freq: Tensor  # [D / 2] float32
    rope_scale: float  # multiplies cos and sin (1.0 but for some scaled RoPE kinds)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
