"""decode_step: one step of a decoder over the paged KV cache as one native op, from token ids to
the hidden states that the head reads.

    a = norm(x);   q, k, v = a W_qkv + b;   q, k = rope(norm(q)), rope(norm(k))
    k, v of every token -> cache
    x = x + attend(q, cache positions max(0, pos - window + 1) .. pos of the token's row) W_o
    x = x + activate(norm(x) W_gate_up) W_down

LoRA (Hu et al., 2021): s B (A x) may be added, unmerged, to a slice of the outputs of each of the
four products.

Shapes    N tokens, of which R have their hidden state returned; B rows of the block table, M blocks
          per row, L layers, H hidden size, D head dim, Hq query and Hkv key/value heads, S
          positions per block, P rotated pairs per head. k_cache [L, blocks, Hkv, D, S] holds K
          transposed inside a block, so that the scores of a block are vector loads over its
          positions; v_cache [L, blocks, Hkv, S, D].
Bytes     the weights once per 64 tokens, and 2 L Hkv D s per cached position and row. The reads,
          not the arithmetic, dominate the time of decoding.
Numerics  float32 from the embedding to the last norm, rounded only into the cache and the result.
          The bits of a token's result do not depend on the other tokens of a call.
C++       csrc/cpu/ops/decode_step.cpp, for CPU tensors. engine/model/step.py builds the same step
          from other ops, on any device.
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
    """Run N tokens through a decoder's layers, and write their keys and values into the cache. All
    tensors are on the CPU; no gradient.

    Args:
        token_ids, positions, rows: [N] int64. Token n is at `positions[n]` of the sequence whose
            blocks are `block_table[rows[n]]`.
        block_table: [B, M] int32, the cache blocks of each sequence in order.
        k_cache, v_cache: [L, blocks, Hkv, D, S] and [L, blocks, Hkv, S, D] in the parameters'
            dtype, or in float32.
        out_slots: [R] int64, indices of the tokens whose hidden state is returned. If None, all
            tokens.
        embedding: [V, H]; float32 or bfloat16, like all parameters.
        embedding_scale: multiplies the rows of `embedding`.
        position_embedding: [positions, H], added to the token embeddings, or None.
        norm, norm_bias: [H], weight and bias of the last norm. Every norm with a bias is a
            LayerNorm; a norm without one is an RMSNorm that multiplies by norm_offset + weight.
        eps: epsilon of all norms.
        cos, sin: [tables, positions, P] float32, the rotary tables.
        layers: sixteen tensors per layer: input_norm, qkv, qkv_bias, q_norm, k_norm, o, o_bias,
            post_norm, gate_up, gate_up_bias, down, down_bias, attention_out_norm, mlp_out_norm,
            input_norm_bias, post_norm_bias; None for each that the layer does not have.
        windows: one number per layer. A token sees itself and window - 1 tokens before it; 0 means
            all.
        ropes: one number per layer, the index of the rotary table for q and k; -1 means no
            rotation.
        attention_scale: multiplies q . k.
        attention_softcap: replaces the scores by softcap * tanh(scores / softcap); 0 leaves them
            unchanged.
        activation: "silu", "gelu_tanh" or "gelu".
        parallel: True gives the MLP the same input as attention, not the result of attention.
        adapters: eight tensors per layer, a [P' r, in] and b [rows, r] for each of qkv, o, gate_up
            and down, or None. An empty list means no adapter.
        slices: (product, first row, rows) of each adapted slice, as one flat list.
        adapter_scale: multiplies the output of the adapters.
    Returns:
        [R, H] hidden states after the last norm, in the parameters' dtype.
    Raises:
        ValueError: parameters do not fit together.
        TypeError: a dtype is not supported.
        IndexError: an id, a position or a block is out of range.
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
