"""decode_step: one step of a decoder over the paged KV cache, from token ids to the hidden states that the head reads.

    a = norm(x);   q, k, v = a W_qkv + b;   q, k = rope(norm(q)), rope(norm(k));   k, v of every token -> cache
    x = x + attend(q, cache positions max(0, pos - window + 1) .. pos of the token's row) W_o;   x = x + swiglu(norm(x) W_gate_up) W_down

One call serves decoding (one token a sequence) and chunks of prompts (many tokens of a row), mixed in any way.

Shapes    N tokens, R of them read out, B rows of the block table, M blocks a row, L layers, H hidden, F feed-forward, D head dim, Hq query and
          Hkv key/value heads, S positions a block. k_cache [L, blocks, Hkv, D, S] holds K transposed inside a block, so that the scores of a
          block are vector loads over its positions; v_cache [L, blocks, Hkv, S, D].
Bytes     the weights once, and 2 L Hkv D s bytes a cached position a row: decoding reads, it does not compute.
Triton    composed of the ops of this package: rms_norm, rope, paged_attention, swiglu, and torch's matrix products and cache writes between them. Every
          token of a prompt walks the cached positions before it on its own; no row is gathered. Not run on a card in this project.
Numerics  norms, rotations, softmax and SwiGLU in float32 (float64 for float64), rounded once to the weights' dtype; the RMSNorm rounds before it
          multiplies by its weight, as transformers' does. A slot that was not written, or a block of no row, is never read into a result.
Source    Touvron et al. (2023), LLaMA; Su et al. (2021), RoFormer, in the rotate-half form; Kwon et al. (2023), PagedAttention.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype
from fusedrl.kernels.dispatch import Implementations
from fusedrl.kernels.paged_attention import paged_attention, paged_attention_reference
from fusedrl.kernels.rms_norm import rms_norm
from fusedrl.kernels.rope import rope
from fusedrl.kernels.swiglu import swiglu

_IMPLS = Implementations("decode_step", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_GATHERED_TOKENS = 128  # the reference gathers the whole row of every token: so many tokens at a time bound its memory


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


# ---- reference -------------------------------------------------------------------------------------------------------
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE. x [N, heads, D], cos and sin [N, 1, D / 2] in the wide dtype."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _angles(weights: DecoderWeights, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [N, D / 2]."""
    angles = positions_N.to(dtype)[:, None] * weights.inv_freq.to(dtype)
    return angles.cos() * weights.rope_scale, angles.sin() * weights.rope_scale


def _slots(positions_N: Tensor, blocks_NM: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The block, and the slot in it, of every token."""
    return blocks_NM.gather(1, positions_N[:, None] // size)[:, 0].long(), positions_N % size


def _write(k: Tensor, v: Tensor, at: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
    """The tokens' k and v [N, Hkv, D] into one layer's caches, in place."""
    blocks_N, slots_N = at
    keys[blocks_N, :, :, slots_N] = k
    values[blocks_N, :, slots_N] = v


def decode_step_reference(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, rows_N: Tensor, block_table_BM: Tensor, k_cache: Tensor,
                          v_cache: Tensor, out_slots_R: Tensor | None = None) -> Tensor:
    """The definition, on any device and in any float dtype (float64 is the oracle). Writes the tokens' K and V into the caches."""
    heads, kv_heads, D, eps = weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.norm_eps
    N = token_ids_N.shape[0]
    x_NH = weights.embedding[token_ids_N]
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    cos, sin = (x_ND[:, None] for x_ND in _angles(weights, positions_N, wide))
    blocks_NM = block_table_BM[rows_N]
    written = _slots(positions_N, blocks_NM, v_cache.shape[3])
    for layer, keys, values in zip(weights.layers, k_cache, v_cache, strict=True):
        qkv = F.linear(_rms_norm(x_NH, layer.input_norm, eps), layer.qkv, layer.qkv_bias).view(N, heads + 2 * kv_heads, D)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q = q if layer.q_norm is None else _rms_norm(q, layer.q_norm, eps)
        k = k if layer.k_norm is None else _rms_norm(k, layer.k_norm, eps)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        _write(k, v, written, keys, values)
        parts = zip(q.split(_GATHERED_TOKENS), positions_N.split(_GATHERED_TOKENS), blocks_NM.split(_GATHERED_TOKENS), strict=True)
        attended = torch.cat([paged_attention_reference(part, keys, values, blocks, at + 1, layer.window or None) for part, at, blocks in parts])
        x_NH = x_NH + F.linear(attended.flatten(1), layer.o, layer.o_bias)
        gate, up = F.linear(_rms_norm(x_NH, layer.post_norm, eps), layer.gate_up, layer.gate_up_bias).to(wide).chunk(2, dim=-1)
        x_NH = x_NH + F.linear((F.silu(gate) * up).to(x_NH.dtype), layer.down, layer.down_bias)
    return _rms_norm(x_NH if out_slots_R is None else x_NH[out_slots_R], weights.norm, eps)


# ---- Triton: the ops of this package, one after the other --------------------------------------------------------------------
def _decode_step_triton(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, rows_N: Tensor, block_table_BM: Tensor, k_cache: Tensor,
                        v_cache: Tensor, out_slots_R: Tensor | None) -> Tensor:
    heads, kv_heads, eps = weights.num_heads, weights.num_kv_heads, weights.norm_eps
    impl = "triton" if token_ids_N.device.type == "cpu" else None  # under the interpreter all of it; on a GPU each op has its own best
    cos, sin = _angles(weights, positions_N, torch.float32)
    blocks_NM, lens_N = block_table_BM[rows_N], positions_N + 1
    written = _slots(positions_N, blocks_NM, v_cache.shape[3])
    delta_NH, stream_NH = weights.embedding[token_ids_N], None  # what the layer before adds, and what it adds it to
    for layer, keys, values in zip(weights.layers, k_cache, v_cache, strict=True):
        if stream_NH is None:
            stream_NH, h_NH = delta_NH, rms_norm(delta_NH, layer.input_norm, eps=eps, impl=impl)
        else:
            h_NH, stream_NH = rms_norm(delta_NH, layer.input_norm, eps=eps, residual=stream_NH, impl=impl)
        qkv = F.linear(h_NH, layer.qkv, layer.qkv_bias).unflatten(1, (heads + 2 * kv_heads, weights.head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q = q if layer.q_norm is None else rms_norm(q, layer.q_norm, eps=eps, impl=impl)
        k = k if layer.k_norm is None else rms_norm(k, layer.k_norm, eps=eps, impl=impl)
        q, k = rope(q, k, cos, sin, impl=impl)
        _write(k, v, written, keys, values)
        o = paged_attention(q, keys, values, blocks_NM, lens_N, window=layer.window or None, impl=impl)
        h_NH, stream_NH = rms_norm(F.linear(o.flatten(1), layer.o, layer.o_bias), layer.post_norm, eps=eps, residual=stream_NH, impl=impl)
        delta_NH = F.linear(swiglu(F.linear(h_NH, layer.gate_up, layer.gate_up_bias), impl=impl), layer.down, layer.down_bias)
    x_NH = delta_NH if stream_NH is None else stream_NH + delta_NH
    return rms_norm(x_NH if out_slots_R is None else x_NH[out_slots_R], weights.norm, eps=eps, impl=impl)


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::decode_step")
    def _(token_ids: Tensor, positions: Tensor, rows: Tensor, block_table: Tensor, k_cache: Tensor, v_cache: Tensor, out_slots: Tensor | None,
          embedding: Tensor, norm: Tensor, inv_freq: Tensor, layers: list[Tensor | None], windows: list[int], rope_scale: float, eps: float) -> Tensor:
        return embedding.new_empty((token_ids if out_slots is None else out_slots).shape[0], embedding.shape[1])


# ---- public ------------------------------------------------------------------------------------------------------------
def allocate_cache(weights: DecoderWeights, num_blocks: int, block_size: int = 16) -> tuple[Tensor, Tensor]:
    """An empty paged cache for a decoder, in its dtype and on its device: (k_cache, v_cache), 2 L Hkv D elements a position.

    The memory is not initialised: nothing reads a slot before `decode_step` has written it.
    """
    L, heads, D = len(weights.layers), weights.num_kv_heads, weights.head_dim
    return (weights.embedding.new_empty(L, num_blocks, heads, D, block_size), weights.embedding.new_empty(L, num_blocks, heads, block_size, D))


def copy_blocks(k_cache: Tensor, v_cache: Tensor, pairs: Tensor | Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks in all layers, in place: the copy of copy-on-write.

    pairs: [P, 2] of (source, destination); all sources are read before any destination is written, and no destination comes twice.
    """
    pairs = torch.as_tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(k_cache.device)
    for cache in (k_cache, v_cache):
        cache.index_copy_(1, pairs[:, 1], cache.index_select(1, pairs[:, 0]))


def _check_ranges(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, rows_N: Tensor, block_table_BM: Tensor, blocks: int, size: int,
                  out_slots_R: Tensor | None) -> None:
    """What the cpp op checks itself: torch's indexing would take a negative index from the end."""
    B, M = block_table_BM.shape
    for name, values, end in (("token_ids", token_ids_N, weights.embedding.shape[0]), ("rows", rows_N, B), ("positions", positions_N, M * size),
                              ("out_slots", out_slots_R, token_ids_N.shape[0])):
        if values is not None and bool(((values < 0) | (values >= end)).any()):
            raise IndexError(f"decode_step: expected {name} in [0, {end}), got {values.min()} to {values.max()}")
    reach = max((layer.window or M * size for layer in weights.layers), default=1)
    column, positions_N1 = torch.arange(M, device=rows_N.device), positions_N[:, None]
    needed = block_table_BM[rows_N][(column <= positions_N1 // size) & (column >= (positions_N1 - reach + 1).clamp(min=0) // size)]
    if bool(((needed < 0) | (needed >= blocks)).any()):
        raise IndexError(f"decode_step: expected block_table entries in [0, {blocks}) for every position that a token needs, got {needed.min()} "
                         f"to {needed.max()}")


@torch.no_grad()
def decode_step(weights: DecoderWeights, token_ids: Tensor, positions: Tensor, rows: Tensor, block_table: Tensor, k_cache: Tensor, v_cache: Tensor,
                out_slots: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """Run N tokens through the decoder over the paged cache, writing their keys and values into it. No gradient.

    Args:
        weights: the live parameters, of one dtype; cpp takes float32 and bfloat16.
        token_ids, positions, rows: [N] int64. Token n is at `positions[n]` of the sequence whose blocks are `block_table[rows[n]]`. Every
            position before it in its window is in the cache or among the tokens of this call; no (row, position) comes twice.
        block_table: [B, M] int32. Position p of row b lies in block `block_table[b, p // S]`, slot p % S. Entries that no token needs may
            hold anything.
        k_cache, v_cache: [L, blocks, Hkv, D, S] and [L, blocks, Hkv, S, D] in the weights' dtype (`allocate_cache`); written in place.
        out_slots: [R] int64, the tokens whose hidden state is wanted; None: all.
        impl: "cpp" (CPU), "triton" (not float64) or "torch"; by default the best one for the device.
    Returns:
        [R, H] hidden states after the final norm, in the weights' dtype. The head is `weights.head`.
    Raises:
        ValueError: sizes or devices that do not agree. TypeError: dtypes. RuntimeError: `impl` cannot run here. IndexError: an id, a position or a
        block out of range (on CPU).
    """
    op = "decode_step"
    L, D, Hkv = len(weights.layers), weights.head_dim, weights.num_kv_heads
    check(op, {"token_ids": (token_ids, "N"), "positions": (positions, "N"), "rows": (rows, "N"), "block_table": (block_table, "B M"),
               "k_cache": (k_cache, f"{L} blocks {Hkv} {D} S"), "v_cache": (v_cache, f"{L} blocks {Hkv} S {D}"), "out_slots": (out_slots, "R"),
               "weights.embedding": (weights.embedding, "V H")})
    refused = {"triton": "it computes in float32"} if weights.embedding.dtype == torch.float64 else {}
    chosen = _IMPLS.choose(token_ids.device, impl, refused)
    for name, tensor in (("token_ids", token_ids), ("positions", positions), ("rows", rows), ("out_slots", out_slots)):
        check_dtype(op, name, tensor, (torch.int64,))
    check_dtype(op, "block_table", block_table, (torch.int32,))
    check_dtype(op, "weights.embedding", weights.embedding, (torch.float32, torch.bfloat16) if chosen == "cpp" else FLOATS)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(op, name, tensor, (weights.embedding.dtype,))
    if chosen != "cpp":
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_ranges(weights, token_ids, positions, rows, block_table, k_cache.shape[1], v_cache.shape[3], out_slots)
        function = decode_step_reference if chosen == "torch" else _decode_step_triton
        return function(weights, token_ids, positions, rows, block_table, k_cache, v_cache, out_slots)
    return torch.ops.fusedrl.decode_step(
        token_ids, positions, rows, block_table, k_cache, v_cache, out_slots, weights.embedding, weights.norm, weights.inv_freq,
        [part for layer in weights.layers for part in layer[:-1]], [layer.window for layer in weights.layers], weights.rope_scale, weights.norm_eps)
