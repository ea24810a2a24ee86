"""decode_step: one step of a decoder over the paged KV cache, from token ids to the hidden states that the head reads.

    a = norm(x);   q, k, v = a W_qkv + b;   q, k = rope(norm(q)), rope(norm(k));   k, v of every token -> cache
    x = x + attend(q, cache positions max(0, pos - window + 1) .. pos of the token's row) W_o;   x = x + swiglu(norm(x) W_gate_up) W_down

LoRA (Hu et al., 2021): a slice of the rows of any of the four products may have s B (A x) added to it, unmerged (`Adapter`).
Families differ: what attention and the MLP add may be normalised too, or instead; q and k may be left unturned, or turned in part; a norm with a bias is a
LayerNorm; positions may be learned; the MLP may lack its gate, and read the stream that attention read; `Options` has the rest.

One call serves decoding (one token a sequence) and chunks of prompts (many tokens of a row), mixed in any way.

Shapes    N tokens, R of them read out, B rows of the block table, M blocks a row, L layers, H hidden, F feed-forward, D head dim, Hq query and
          Hkv key/value heads, S positions a block. k_cache [L, blocks, Hkv, D, S] holds K transposed inside a block, so that the scores of a
          block are vector loads over its positions; v_cache [L, blocks, Hkv, S, D].
Bytes     the weights once, and 2 L Hkv D s bytes a cached position a row: decoding reads, it does not compute.
Triton    composed of the ops of this package: rms_norm, rope_and_cache, paged_attention, swiglu, and matrix products between them: split_linear's of
          bfloat16 weights, torch's of others, or `fixed_linear`'s, whose rows do not depend on one another. A family
          that turns q and k in part, not at all, or norms all their heads together has rope or nothing, and torch's cache write. Every token of a
          prompt walks the cached positions before it on its own; no row is gathered. Not run on a card in this project.
Numerics  norms, rotations, softmax and SwiGLU in float32 (float64 for float64), rounded once to the weights' dtype; the RMSNorm rounds before it
          multiplies by its weight (with an offset, after), as transformers' does. With a float32 cache beside bfloat16 weights nothing is rounded but the
          result (cpp: without one, too, but for the cache).
          Triton keeps everything between bfloat16 weights in float32, but for q, k, v and what
          attention
          gives, which are of the cache's dtype: float16, which has 11 bits where bfloat16 has 8 (`cache_dtype`). A slot that was not written, or a
          block of no row, is never read into a result.
Source    Touvron et al. (2023), LLaMA; Su et al. (2021), RoFormer, in the rotate-half form; Kwon et al. (2023), PagedAttention.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels import native
from fusedrl.kernels.checks import FLOATS, check, check_dtype
from fusedrl.kernels.dispatch import Implementations
from fusedrl.kernels.fixed_linear import fixed_linear
from fusedrl.kernels.kv_cache import rope_and_cache
from fusedrl.kernels.paged_attention import paged_attention, paged_attention_reference
from fusedrl.kernels.rms_norm import rms_norm, rms_norm_reference
from fusedrl.kernels.rope import RopeTable, rope, rope_reference
from fusedrl.kernels.split_linear import split_linear
from fusedrl.kernels.swiglu import activate, activate_rows

_IMPLS = Implementations("decode_step", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
_INTERPRETED: str | None = "triton"  # what the ops of the Triton composition are on a CPU: under the interpreter all of it
_GATHERED_TOKENS = 128  # the reference gathers the whole row of every token: so many tokens at a time bound its memory


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> x W^T + b


class LayerWeights(NamedTuple):
    """One layer's parameters, live (never copies). D head dim, Hq query heads, Hkv key/value heads, H hidden, F feed-forward width."""

    input_norm: Tensor | None  # [H]; None: attention reads the residual stream as it is
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D], of each head, or [Hq D], of all heads together
    k_norm: Tensor | None  # [D] or [Hkv D]
    o: Tensor  # [H, Hq D]
    o_bias: Tensor | None  # [H]
    post_norm: Tensor | None  # [H]; None: the MLP reads the residual stream as it is
    gate_up: Tensor  # [2 F, H]; [F, H]: the MLP has no gate
    gate_up_bias: Tensor | None  # [2 F] or [F]
    down: Tensor  # [H, F]
    down_bias: Tensor | None  # [H]
    window: int  # a token sees itself and window - 1 tokens before it; 0: all
    attention_out_norm: Tensor | None = None  # [H], of what attention adds
    mlp_out_norm: Tensor | None = None  # [H], of what the MLP adds
    rope: int = 0  # which of the rotary tables turns q and k; -1: none does
    input_norm_bias: Tensor | None = None  # [H]; with it input_norm is a LayerNorm, without it an RMSNorm
    post_norm_bias: Tensor | None = None  # [H]; likewise

    def parts(self) -> list[Tensor | None]:
        """The tensors in the order of the C++ op."""
        return [*self[:12], self.attention_out_norm, self.mlp_out_norm, self.input_norm_bias, self.post_norm_bias]


class Options(NamedTuple):
    """What the arithmetic of most families leaves at its default."""

    attention_scale: float | None = None  # multiplies q . k; None: D ** -0.5
    attention_softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    logit_softcap: float | None = None  # likewise the logits; for who applies the head
    embedding_scale: float = 1.0  # multiplies the embedding, rounded to its dtype
    norm_offset: float = 0.0  # RMSNorms multiply by this + their weight
    activation: str = "silu"  # of the MLP, or of its gate: "silu", "gelu_tanh" or "gelu"
    parallel: bool = False  # the MLP reads the residual stream before attention is added to it


class Adapter(NamedTuple):
    """LoRA on the four products of every layer: of each adapted slice of a product's rows, y += scale B (A x).

    P adapted slices of a product have A [r, in] and B [rows, r] each, held one below the other: a [P r, in], b [all their rows, r].
    """

    layers: tuple[tuple[Tensor | None, ...], ...]  # per layer a and b of qkv, of o, of gate_up, of down; None twice where nothing is adapted
    slices: tuple[tuple[int, int, int], ...]  # (product 0 to 3, first row, rows), in the order in which they lie in a and b; alike in all layers
    scale: float

    def add_(self, y_NO: Tensor, x_NK: Tensor, layer: int, product: int, linear: Linear | None = None) -> Tensor:
        """Add its part to a product's result, in place; nothing where it has none. `linear` makes both of its products; None: torch, in x's dtype."""
        a, b = self.layers[layer][2 * product : 2 * product + 2]
        if a is not None and b is not None:
            u_NR = F.linear(x_NK, a.to(x_NK.dtype)) if linear is None else linear(x_NK, a, None)
            b = b.to(x_NK.dtype) if linear is None else b
            add_adapter_(y_NO, u_NR, b, [(start, rows) for at, start, rows in self.slices if at == product], self.scale, linear)
        return y_NO


class DecoderWeights(NamedTuple):
    """A decoder's parameters and the numbers that shape its arithmetic."""

    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]; the embedding itself where they are tied
    rope_table: RopeTable  # as many tables as layers turn differently; without pairs no layer turns
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    options: Options = Options()
    position_embedding: Tensor | None = None  # [positions, H], added to the embedding
    norm_bias: Tensor | None = None  # [H], of the last norm: as those of the layers
    adapter: Adapter | None = None


def add_adapter_(y_NO: Tensor, u_NR: Tensor, b: Tensor, slices: Sequence[tuple[int, int]], scale: float, linear: Linear | None = None) -> None:
    """y += scale B u in each slice (first row, rows) of y's columns, in place; of u = A x [N, P r] and b [all rows, r] each slice has its part."""
    r, done = b.shape[1], 0
    for index, (start, rows) in enumerate(slices):
        u, part, y = u_NR[:, index * r : (index + 1) * r], b[done : done + rows], y_NO[:, start : start + rows]
        if linear is None:
            y.addmm_(u, part.T, alpha=scale)
        else:
            y.add_(linear(u, part, None), alpha=scale)
        done += rows


def head_norm(x_NHD: Tensor, weight: Tensor, norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`norm` of each head, or of all heads together where the weight is as long as they."""
    return norm(x_NHD, weight) if weight.shape[0] == x_NHD.shape[2] else norm(x_NHD.flatten(1), weight).view(x_NHD.shape)


def partial_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
                 ) -> tuple[Tensor, Tensor]:
    """`turn` of the first values of each head, as many as there are angles for; the rest of a head stays as it is."""
    turned = 2 * cos.shape[-1]
    if turned == q.shape[2]:
        return turn(q, k, cos, sin)
    q_turned, k_turned = turn(q[..., :turned], k[..., :turned], cos, sin)
    return torch.cat((q_turned, q[..., turned:]), -1), torch.cat((k_turned, k[..., turned:]), -1)


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in between the weights of a decoder of this dtype: float32 between bfloat16 weights; else their own dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def on_tensor_cores(device: torch.device) -> bool:
    """Whether products take numbers of two bytes there: on a GPU, and where Triton's interpreter stands for one. Float32 is then split in two
    (split_linear.py), and attention is of `cache_dtype`."""
    return _IMPLS.choose(device) == "triton"


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to cache keys and values in, and to attend in, for a decoder of this dtype: float16 for bfloat16 on tensor cores, which has three bits more; else
    `activation_dtype`."""
    return torch.float16 if dtype == torch.bfloat16 and on_tensor_cores(device) else activation_dtype(dtype, device)


def weight_dtypes(device: torch.device, impl: str | None = None) -> tuple[torch.dtype, ...]:
    """The dtypes of weights that an implementation takes; None: the best one for the device."""
    return (torch.float32, torch.bfloat16) if _IMPLS.choose(device, impl) == "cpp" else FLOATS


# ---- reference -------------------------------------------------------------------------------------------------------
def _gated(layer: LayerWeights) -> bool:
    return layer.gate_up.shape[0] != layer.down.shape[1]


def _embed(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    x_NH, scale = weights.embedding[token_ids_N].to(dtype or weights.embedding.dtype), weights.options.embedding_scale
    x_NH = x_NH if scale == 1 else x_NH * scale
    return x_NH if weights.position_embedding is None else x_NH + weights.position_embedding[positions_N]


def _project(weights: DecoderWeights, layer: int, product: int, x_NK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One of a layer's four products, with what an adapter adds to it."""
    y_NO = F.linear(x_NK, weight.to(x_NK.dtype), None if bias is None else bias.to(x_NK.dtype))
    return y_NO if weights.adapter is None else weights.adapter.add_(y_NO, x_NK, layer, product)


def _slots(positions_N: Tensor, blocks_NM: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The block, and the slot in it, of every token."""
    return blocks_NM.gather(1, positions_N[:, None] // size)[:, 0].long(), positions_N % size


def _write(k: Tensor, v: Tensor, at: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
    """The tokens' k and v [N, Hkv, D] into one layer's caches, in place."""
    blocks_N, slots_N = at
    keys[blocks_N, :, :, slots_N] = k.to(keys.dtype)
    values[blocks_N, :, slots_N] = v.to(values.dtype)


def decode_step_reference(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, rows_N: Tensor, block_table_BM: Tensor, k_cache: Tensor,
                          v_cache: Tensor, out_slots_R: Tensor | None = None) -> Tensor:
    """The definition, on any device and in any float dtype (float64 is the oracle): that of the weights or of the caches, whichever is wider. Writes the
    tokens' K and V into the caches."""
    heads, kv_heads, D, options = weights.num_heads, weights.num_kv_heads, weights.head_dim, weights.options
    N = token_ids_N.shape[0]
    x_NH = _embed(weights, token_ids_N, positions_N, torch.promote_types(weights.embedding.dtype, k_cache.dtype))
    wide = torch.promote_types(x_NH.dtype, torch.float32)
    angles = weights.rope_table.at(positions_N, block_table_BM.shape[1] * v_cache.shape[3], wide)
    blocks_NM = block_table_BM[rows_N]
    written = _slots(positions_N, blocks_NM, v_cache.shape[3])

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (rms_norm_reference(x, weight, weights.norm_eps, offset=options.norm_offset)[0] if bias is None
                else F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), weights.norm_eps))

    def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        return x if weight is None else norm(x, weight, bias)

    for index, (layer, keys, values) in enumerate(zip(weights.layers, k_cache, v_cache, strict=True)):
        h_NH = normed(x_NH, layer.input_norm, layer.input_norm_bias)
        qkv = _project(weights, index, 0, h_NH, layer.qkv, layer.qkv_bias).view(N, heads + 2 * kv_heads, D)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q = q if layer.q_norm is None else head_norm(q, layer.q_norm, norm)
        k = k if layer.k_norm is None else head_norm(k, layer.k_norm, norm)
        if layer.rope >= 0:
            q, k = partial_rope(q, k, *angles[layer.rope], rope_reference)
        _write(k, v, written, keys, values)
        parts = zip(q.split(_GATHERED_TOKENS), positions_N.split(_GATHERED_TOKENS), blocks_NM.split(_GATHERED_TOKENS), strict=True)
        attended = torch.cat([paged_attention_reference(part, keys, values, blocks, at + 1, layer.window or None, options.attention_softcap,
                                                        options.attention_scale) for part, at, blocks in parts])
        before_NH = x_NH
        x_NH = x_NH + normed(_project(weights, index, 1, attended.flatten(1), layer.o, layer.o_bias), layer.attention_out_norm)
        h_NH = normed(before_NH if options.parallel else x_NH, layer.post_norm, layer.post_norm_bias)
        up = _project(weights, index, 2, h_NH, layer.gate_up, layer.gate_up_bias).to(wide)
        h_NF = activate(up, options.activation, gated=_gated(layer), impl="torch").to(x_NH.dtype)
        x_NH = x_NH + normed(_project(weights, index, 3, h_NF, layer.down, layer.down_bias), layer.mlp_out_norm)
    return norm(x_NH if out_slots_R is None else x_NH[out_slots_R], weights.norm, weights.norm_bias).to(weights.embedding.dtype)


# ---- Triton: the ops of this package, one after the other --------------------------------------------------------------------
def _linear_of(dtype: torch.dtype, fixed: bool) -> Linear:
    """The products with weights of `dtype`."""
    if fixed:
        return partial(fixed_linear, impl="triton")
    return split_linear if dtype == torch.bfloat16 else F.linear


def _decode_step_triton(weights: DecoderWeights, token_ids_N: Tensor, positions_N: Tensor, rows_N: Tensor, block_table_BM: Tensor, k_cache: Tensor,
                        v_cache: Tensor, out_slots_R: Tensor | None, fixed: bool) -> Tensor:
    heads, kv_heads, eps, options = weights.num_heads, weights.num_kv_heads, weights.norm_eps, weights.options
    impl = _INTERPRETED if token_ids_N.device.type == "cpu" else None  # on a GPU each op has its own best
    angles = weights.rope_table.at(positions_N, block_table_BM.shape[1] * v_cache.shape[3], torch.float32)
    blocks_NM, lens_N = block_table_BM[rows_N], positions_N + 1
    written = _slots(positions_N, blocks_NM, v_cache.shape[3])
    slots_N = written[0] * v_cache.shape[3] + written[1]
    dtype, linear = activation_dtype(weights.embedding.dtype, token_ids_N.device), _linear_of(weights.embedding.dtype, fixed)

    def project(index: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = linear(x, weight, bias)
        return y if weights.adapter is None else weights.adapter.add_(y, x, index, product, linear)

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = weight.to(x.dtype)
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias.to(x.dtype), eps)
        return rms_norm(x, weight, eps=eps, offset=options.norm_offset, impl=impl)

    def add_norm(delta_NH: Tensor, stream_NH: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None or stream_NH is None or bias is not None:
            sum_NH = delta_NH if stream_NH is None else stream_NH + delta_NH
            return sum_NH if weight is None else norm(sum_NH, weight, bias), sum_NH
        return rms_norm(delta_NH, weight.to(dtype), eps=eps, residual=stream_NH, offset=options.norm_offset, impl=impl)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, cos, sin, impl=impl)

    def turn_and_cache(layer: LayerWeights, qkv_NC: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The queries, with norm and rotation; k and v go into the layer's caches."""
        D = weights.head_dim
        norms = (layer.q_norm, layer.k_norm)
        plain = all(weight is None or (weight.shape[0] == D and not options.norm_offset) for weight in norms)  # of each head, by the weight alone
        if layer.rope >= 0 and 2 * weights.rope_table.pairs == D and plain:
            q_norm, k_norm = (None if weight is None else weight.to(dtype) for weight in norms)
            return rope_and_cache(qkv_NC, *angles[layer.rope], keys, values, slots_N, num_heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps, impl=impl)
        q, k, v = qkv_NC.unflatten(1, (heads + 2 * kv_heads, D)).split((heads, kv_heads, kv_heads), dim=1)
        q = q if layer.q_norm is None else head_norm(q, layer.q_norm, norm)
        k = k if layer.k_norm is None else head_norm(k, layer.k_norm, norm)
        if layer.rope >= 0:
            q, k = partial_rope(q, k, *angles[layer.rope], turn)
        _write(k, v, written, keys, values)
        return q.to(keys.dtype)

    delta_NH, stream_NH = _embed(weights, token_ids_N, positions_N, dtype), None  # what the layer before adds, and what it adds it to
    for index, (layer, keys, values) in enumerate(zip(weights.layers, k_cache, v_cache, strict=True)):
        h_NH, stream_NH = add_norm(delta_NH, stream_NH, layer.input_norm, layer.input_norm_bias)
        q = turn_and_cache(layer, project(index, 0, h_NH, layer.qkv, layer.qkv_bias), keys, values)
        o = paged_attention(q, keys, values, blocks_NM, lens_N, window=layer.window or None, softcap=options.attention_softcap,
                            scale=options.attention_scale, impl=impl)
        delta_NH = project(index, 1, o.flatten(1), layer.o, layer.o_bias)
        delta_NH = delta_NH if layer.attention_out_norm is None else norm(delta_NH, layer.attention_out_norm)
        attended_NH = delta_NH
        if options.parallel:
            h_NH, _ = add_norm(stream_NH, None, layer.post_norm, layer.post_norm_bias)
        else:
            h_NH, stream_NH = add_norm(delta_NH, stream_NH, layer.post_norm, layer.post_norm_bias)
        up = project(index, 2, h_NH, layer.gate_up, layer.gate_up_bias)
        h_NF = (activate_rows if fixed else partial(activate, impl=impl))(up, options.activation, gated=_gated(layer))
        delta_NH = project(index, 3, h_NF, layer.down, layer.down_bias)
        delta_NH = delta_NH + attended_NH if options.parallel else delta_NH
        delta_NH = delta_NH if layer.mlp_out_norm is None else norm(delta_NH, layer.mlp_out_norm)
    x_NH = delta_NH if stream_NH is None else stream_NH + delta_NH
    return norm(x_NH if out_slots_R is None else x_NH[out_slots_R], weights.norm, weights.norm_bias).to(weights.embedding.dtype)


# ---- custom op: what torch.compile sees --------------------------------------------------------------------------------
if native.capability:
    @torch.library.register_fake("fusedrl::decode_step")
    def _(token_ids: Tensor, positions: Tensor, rows: Tensor, block_table: Tensor, k_cache: Tensor, v_cache: Tensor, out_slots: Tensor | None,
          embedding: Tensor, position_embedding: Tensor | None, norm: Tensor, norm_bias: Tensor | None, cos: Tensor, sin: Tensor,
          layers: list[Tensor | None], windows: list[int], ropes: list[int], eps: float, attention_scale: float, attention_softcap: float,
          embedding_scale: float, norm_offset: float, activation: str, parallel: bool, adapters: list[Tensor | None], slices: list[int],
          adapter_scale: float) -> Tensor:
        return embedding.new_empty((token_ids if out_slots is None else out_slots).shape[0], embedding.shape[1])


# ---- public ------------------------------------------------------------------------------------------------------------
def allocate_cache(weights: DecoderWeights, num_blocks: int, block_size: int = 16, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """An empty paged cache for a decoder, on its device: (k_cache, v_cache), 2 L Hkv D elements a position; in `dtype`, or in the weights'.

    The memory is not initialised: nothing reads a slot before `decode_step` has written it.
    """
    L, heads, D = len(weights.layers), weights.num_kv_heads, weights.head_dim
    return (weights.embedding.new_empty(L, num_blocks, heads, D, block_size, dtype=dtype),
            weights.embedding.new_empty(L, num_blocks, heads, block_size, D, dtype=dtype))


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
    positions = M * size if weights.position_embedding is None else min(M * size, weights.position_embedding.shape[0])
    for name, values, end in (("token_ids", token_ids_N, weights.embedding.shape[0]), ("rows", rows_N, B), ("positions", positions_N, positions),
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
                out_slots: Tensor | None = None, *, fixed: bool = False, impl: str | None = None) -> Tensor:
    """Run N tokens through the decoder over the paged cache, writing their keys and values into it. No gradient.

    Args:
        weights: the live parameters, of one dtype; cpp takes float32 and bfloat16.
        token_ids, positions, rows: [N] int64. Token n is at `positions[n]` of the sequence whose blocks are `block_table[rows[n]]`. Every
            position before it in its window is in the cache or among the tokens of this call; no (row, position) comes twice.
        block_table: [B, M] int32. Position p of row b lies in block `block_table[b, p // S]`, slot p % S. Entries that no token needs may
            hold anything.
        k_cache, v_cache: [L, blocks, Hkv, D, S] and [L, blocks, Hkv, S, D] in the weights' dtype (`allocate_cache`), in float32, or for triton and torch
            in float16 beside bfloat16 weights (`cache_dtype`); written in place.
        out_slots: [R] int64, the tokens whose hidden state is wanted; None: all.
        fixed: the bits of a token do not depend on the other tokens of the call. They never do in cpp; triton then takes `fixed_linear` for its products
            (float32 and bfloat16); torch cannot.
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
    if fixed:
        refused["torch"] = "its sums follow the number of tokens"
        if weights.embedding.dtype == torch.float16:
            refused["triton"] = "its products of a fixed order take float32 and bfloat16"
    chosen = _IMPLS.choose(token_ids.device, impl, refused)
    for name, tensor in (("token_ids", token_ids), ("positions", positions), ("rows", rows), ("out_slots", out_slots)):
        check_dtype(op, name, tensor, (torch.int64,))
    check_dtype(op, "block_table", block_table, (torch.int32,))
    check_dtype(op, "weights.embedding", weights.embedding, weight_dtypes(token_ids.device, chosen))
    halves = {torch.float16} if weights.embedding.dtype == torch.bfloat16 and chosen != "cpp" else set()
    cached = {torch.float32} if chosen != "triton" or weights.embedding.dtype == torch.bfloat16 else set()
    check_dtype(op, "k_cache", k_cache, {weights.embedding.dtype} | cached | halves)
    check_dtype(op, "v_cache", v_cache, (k_cache.dtype,))
    if chosen != "cpp":
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_ranges(weights, token_ids, positions, rows, block_table, k_cache.shape[1], v_cache.shape[3], out_slots)
        arguments = (weights, token_ids, positions, rows, block_table, k_cache, v_cache, out_slots)
        return decode_step_reference(*arguments) if chosen == "torch" else _decode_step_triton(*arguments, fixed)
    options, adapter = weights.options, weights.adapter
    return torch.ops.fusedrl.decode_step(
        token_ids, positions, rows, block_table, k_cache, v_cache, out_slots, weights.embedding, weights.position_embedding, weights.norm,
        weights.norm_bias, *weights.rope_table.upto(block_table.shape[1] * v_cache.shape[3]),
        [part for layer in weights.layers for part in layer.parts()], [layer.window for layer in weights.layers], [layer.rope for layer in weights.layers],
        weights.norm_eps, D**-0.5 if options.attention_scale is None else options.attention_scale, options.attention_softcap or 0.0,
        options.embedding_scale, options.norm_offset, options.activation, options.parallel,
        [] if adapter is None else [part for layer in adapter.layers for part in layer],
        [] if adapter is None else [number for found in adapter.slices for number in found], 1.0 if adapter is None else adapter.scale)
