"""decode_step: one step of a decoder over the paged KV cache as one native op, from token ids to
what the head reads.

    a = norm(x);   q, k, v = a W_qkv + b;   q, k = rope(norm(q)), rope(norm(k))
    k, v of every token -> cache
    x = x + attend(q, cache positions max(0, pos - window + 1) .. pos of the token's row) W_o
    x = x + activate(norm(x) W_gate_up) W_down

LoRA (Hu et al., 2021): a slice of the rows of any of the four products may have s B (A x) added to
it, unmerged.

Shapes    N tokens, R of them read out, B rows of the block table, M blocks a row, L layers, H
          hidden, D head dim, Hq query and Hkv key/value heads, S positions a block, P pairs of a
          head that turn. k_cache [L, blocks, Hkv, D, S] holds K transposed inside a block, so that
          the scores of a block are vector loads over its positions; v_cache [L, blocks, Hkv, S, D].
Bytes     the weights once a 64 tokens, 2 L Hkv D s a cached position a row: decoding reads, it does
          not compute.
Numerics  float32 from the embedding to the last norm, rounded only into the cache and the result. A
          token's bits do not depend on the other tokens of a call.
C++       csrc/cpu/ops/decode_step.cpp, for CPU tensors. The same step out of other ops, on any
          device: engine/model/step.py.
Source    Touvron et al. (2023), LLaMA; Su et al. (2021), RoFormer; Kwon et al. (2023),
          PagedAttention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.runtime import native

# ---- custom op: what torch.compile sees ----------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::decode_step")
    def _(
        token_ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        block_table: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out_slots: Tensor | None,
        embedding: Tensor,
        *rest: Any,
    ) -> Tensor:
        return embedding.new_empty(
            (token_ids if out_slots is None else out_slots).shape[0], embedding.shape[1]
        )


# ---- public --------------------------------------------------------------------------------------
def decode_step(
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots: Tensor | None,
    embedding: Tensor,
    position_embedding: Tensor | None,
    norm: Tensor,
    norm_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layers: list[Tensor | None],
    windows: list[int],
    ropes: list[int],
    eps: float,
    attention_scale: float,
    attention_softcap: float,
    embedding_scale: float,
    norm_offset: float,
    activation: str,
    parallel: bool,
    adapters: list[Tensor | None],
    slices: list[int],
    adapter_scale: float,
) -> Tensor:
    """Run N tokens through a decoder's layers, writing their keys and values into the cache. CPU
    tensors; no gradient.

    Args:
        token_ids, positions, rows: [N] int64. Token n is at `positions[n]` of the sequence whose
            blocks are `block_table[rows[n]]`.
        block_table: [B, M] int32.
        k_cache, v_cache: [L, blocks, Hkv, D, S] and [L, blocks, Hkv, S, D] in the parameters'
            dtype, or in float32.
        out_slots: [R] int64, the tokens whose hidden state is wanted; None: all.
        embedding: [V, H]; like all parameters float32 or bfloat16.
        embedding_scale: multiplies its rows.
        position_embedding: [positions, H], added to them.
        norm, norm_bias: [H], of the last norm; every norm that has a bias is a LayerNorm, the
            others are RMSNorms that multiply by norm_offset + their weight.
        eps: of all of them.
        cos, sin: [tables, positions, P] float32.
        layers: sixteen a layer: input_norm, qkv, qkv_bias, q_norm, k_norm, o, o_bias, post_norm,
            gate_up, gate_up_bias, down, down_bias, attention_out_norm, mlp_out_norm,
            input_norm_bias, post_norm_bias; None where there is none.
        windows: a layer each: a token sees itself and window - 1 tokens before it; 0: all.
        ropes: a layer each: the rotary table that turns q and k; -1: none.
        attention_scale: multiplies q . k.
        attention_softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
        activation: "silu", "gelu_tanh" or "gelu".
        parallel: the MLP reads what attention read.
        adapters: eight a layer, a [P' r, in] and b [rows, r] of qkv, o, gate_up and down, or None.
        empty: no adapter.
        slices: (product, first row, rows) of each, one after the other.
        adapter_scale: multiplies what they add.
    Returns:
        [R, H] hidden states after the last norm, in the parameters' dtype.
    Raises:
        ValueError: parameters that do not fit.
        TypeError: dtypes.
        IndexError: an id, a position or a block out of range.
        AttributeError: the native extension is not built.
    """
    return torch.ops.fusedrl.decode_step(
        token_ids,
        positions,
        rows,
        block_table,
        k_cache,
        v_cache,
        out_slots,
        embedding,
        position_embedding,
        norm,
        norm_bias,
        cos,
        sin,
        layers,
        windows,
        ropes,
        eps,
        attention_scale,
        attention_softcap,
        embedding_scale,
        norm_offset,
        activation,
        parallel,
        adapters,
        slices,
        adapter_scale,
    )
