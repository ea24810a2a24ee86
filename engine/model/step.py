"""One step of a decoder over the paged KV cache: from token ids to the hidden states, the input of
the head.

    x = embedding[ids]
    for each layer: k, v of every token -> cache, attention over the cache positions
    max(0, pos - window + 1) .. pos of the token's row, the rest as in layer.py;   norm(x)

One call may mix decoding (one token of a sequence) and chunks of prompts (many tokens of a
sequence) in any way.

Shapes    N tokens, R of them read out, B rows (sequences) of the block table, M blocks per row, L
          layers, H hidden, D head dim, Hq query and Hkv key/value heads, S positions per block.
          k_cache [L, blocks, Hkv, D, S] holds K transposed inside a block, so that the scores of a
          block are vector loads over its positions; v_cache [L, blocks, Hkv, S, D].
cpp       one native op computes everything (kernels/decode_step.py).
triton    `layer` over the ops of kernels: rms_norm, rope_and_cache, paged_attention, swiglu, with
          matrix products between them. The products are split_linear's for bfloat16 weights, three
          launches each; torch's for other dtypes; or `fixed_linear`'s, whose rows do not depend on
          one another, one launch each. A layer of a Llama that decodes is then 17 launches, or 9,
          and one more where contexts pass the 256 positions of one split of attention. If
          a family rotates q and k in part or not at all, or norms all heads together, rope (if any)
          is a separate op and torch writes the cache. Tiles of a prompt's tokens read the cached
          positions before them together (paged_prefill), or, if the numerics are fixed, every token
          by itself; no row is gathered.
torch     `layer` over plain torch, in any float dtype.
Numerics  norms, rotations, softmax and SwiGLU in float32 (float64 for float64), rounded once to the
          weights' dtype; the RMSNorm rounds before it multiplies by its weight (with an offset,
          after), as transformers' does. With a float32 cache and bfloat16 weights only the result
          is rounded (in cpp also with another cache, except for the cache itself). Between bfloat16
          weights, Triton keeps everything in float32 except q, k, v and the output of attention.
          These have the cache's dtype: float16, which has 11 bits where bfloat16 has 8
          (`cache_dtype`). A slot that was not written, or a block of no row, never affects a
          result.
Source    Kwon et al. (2023), PagedAttention; and layer.py's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.engine.model.layer import LayerWeights, Linear, Ops, Options, add_adapter_, layer
from fusedrl.kernels import decode_step as native_step
from fusedrl.kernels.fixed_linear import fixed_linear
from fusedrl.kernels.kv_cache import rope_and_cache
from fusedrl.kernels.paged_attention import (
    LARGEST_HEAD,
    paged_attention,
    paged_attention_reference,
)
from fusedrl.kernels.paged_prefill import paged_prefill, prefill_tiles, queries_of_a_tile
from fusedrl.kernels.rms_norm import rms_norm_reference
from fusedrl.kernels.rope import RopeTable, rope_reference
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.split_linear import split_linear
from fusedrl.kernels.swiglu import activate, activate_rows

_IMPLS = Implementations("decode_step", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))
# what the ops of the composition are on a CPU: under the interpreter all of it
_INTERPRETED: str | None = "triton"
# the reference gathers the whole row of every token: so many tokens at a time bound its memory
_GATHERED_TOKENS = 128


class Adapter(NamedTuple):
    """LoRA on the four products of every layer: y += scale B (A x) for each adapted slice of a
    product's rows.

    Each of the P adapted slices of a product has A [r, in] and B [rows, r]. They are stacked as a
    [P r, in] and b [all their rows, r].
    """

    # per layer a and b of qkv, of o, of gate_up, of down; None twice where nothing is adapted
    layers: tuple[tuple[Tensor | None, ...], ...]
    # (product 0 to 3, first row, rows), in the order in which they lie in a and b; alike in all
    # layers
    slices: tuple[tuple[int, int, int], ...]
    scale: float

    def add_(
        self, y_NO: Tensor, x_NK: Tensor, layer: int, product: int, linear: Linear | None = None
    ) -> Tensor:
        """Add the adapter's output to a product's result, in place; do nothing if the product is
        not adapted. `linear` computes the adapter's two products; None uses torch, in x's dtype."""
        a, b = self.layers[layer][2 * product : 2 * product + 2]
        if a is not None and b is not None:
            u_NR = F.linear(x_NK, a.to(x_NK.dtype)) if linear is None else linear(x_NK, a, None)
            b = b.to(x_NK.dtype) if linear is None else b
            add_adapter_(
                y_NO,
                u_NR,
                b,
                [(start, rows) for at, start, rows in self.slices if at == product],
                self.scale,
                linear,
            )
        return y_NO


class DecoderWeights(NamedTuple):
    """Parameters of a decoder, and the numbers that its arithmetic depends on."""

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


# ---- dtypes --------------------------------------------------------------------------------------
def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of activations for weights of this dtype: float32 for bfloat16 weights; else
    the weights' own dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def on_tensor_cores(device: torch.device) -> bool:
    """Whether matrix products on this device take two-byte numbers: on a GPU, and if Triton's
    interpreter replaces one. Float32 is then split in two (kernels/split_linear.py), and attention
    is computed in `cache_dtype`."""
    return _IMPLS.choose(device) == "triton"


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the KV cache and of attention for a decoder of this dtype. It is float16
    for bfloat16 on tensor cores, since float16 has three bits more; else `activation_dtype`."""
    return (
        torch.float16
        if dtype == torch.bfloat16 and on_tensor_cores(device)
        else activation_dtype(dtype)
    )


def rows_alone(device: torch.device) -> bool:
    """Whether the bits of a token of `decode_step` never depend on the other tokens of a call."""
    return _IMPLS.choose(device) == "cpp"


def weight_dtypes(device: torch.device, impl: str | None = None) -> tuple[torch.dtype, ...]:
    """Return the dtypes of weights that an implementation supports. If `impl` is None, take the
    best implementation for the device."""
    return (torch.float32, torch.bfloat16) if _IMPLS.choose(device, impl) == "cpp" else FLOATS


# ---- the operations of a layer over the cache ----------------------------------------------------
class _Paged(Ops):
    """Common part of the reference and the composition: positions of every token's keys and values
    in the cache, and activations of `dtype`."""

    def __init__(
        self,
        weights: DecoderWeights,
        positions_N: Tensor,
        rows_N: Tensor,
        block_table_BM: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        dtype: torch.dtype,
        impl: str | None = None,
    ) -> None:
        size = v_cache.shape[3]
        angles = weights.rope_table.at(
            positions_N, block_table_BM.shape[1] * size, torch.promote_types(dtype, torch.float32)
        )
        super().__init__(
            (weights.num_heads, weights.num_kv_heads, weights.head_dim),
            weights.norm_eps,
            weights.options,
            angles,
            impl,
        )
        self.adapter, self.dtype, self.size = weights.adapter, dtype, size
        self.keys, self.values = k_cache.unbind(), v_cache.unbind()
        self.table_BM, self.rows_N, self.lens_N = block_table_BM, rows_N, positions_N + 1
        self.block_N = block_table_BM[rows_N, positions_N // size].long()
        self.slot_N = positions_N % size  # in the block

    def rows(self, ids_N: Tensor, table: Tensor) -> Tensor:
        return table[ids_N].to(self.dtype)

    def write(self, index: int, k: Tensor, v: Tensor) -> None:
        """Write the tokens' k and v [N, Hkv, D] into one layer's caches, in place."""
        keys, values = self.keys[index], self.values[index]
        keys[self.block_N, :, :, self.slot_N] = k.to(keys.dtype)
        values[self.block_N, :, self.slot_N] = v.to(values.dtype)


def _plain_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
    impl: None = None,
) -> Any:
    y, total = rms_norm_reference(x, weight, eps, residual, offset)
    return y if residual is None else (y, total)


def _plain_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: None = None
) -> tuple[Tensor, Tensor]:
    return rope_reference(q, k, cos, sin)


class _Reference(_Paged):
    """Operations in plain torch, on any device and in any float dtype (float64 is the reference for
    tests)."""

    rms_norm, rope = staticmethod(_plain_rms_norm), staticmethod(_plain_rope)

    def linear(
        self, index: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if self.adapter is None else self.adapter.add_(y, x, index, product)

    def attention(self, index: int, weights: LayerWeights, qkv: Tensor) -> Tensor:
        q, k, v = self.heads(weights, qkv)
        self.write(index, k, v)
        parts = zip(
            *(x.split(_GATHERED_TOKENS) for x in (q, self.rows_N, self.lens_N)), strict=True
        )
        return torch.cat(
            [
                paged_attention_reference(
                    part,
                    self.keys[index],
                    self.values[index],
                    self.table_BM[rows],
                    lens,
                    weights.window or None,
                    self.options.attention_softcap,
                    self.options.attention_scale,
                )
                for part, rows, lens in parts
            ]
        )

    def activate(self, weights: LayerWeights, up: Tensor) -> Tensor:
        wide = up.to(torch.promote_types(self.dtype, torch.float32))
        return activate(wide, self.options.activation, gated=weights.gated, impl="torch").to(
            self.dtype
        )


class _Composition(_Paged):
    """Operations composed of the ops in kernels. `product`: computes activations times weights;
    `fixed`: the bits of a token are those that it has alone; `prompts`: sequences may have
    several tokens, as they do wherever not all tokens are read out."""

    def __init__(self, *where: Any, product: Linear, fixed: bool, prompts: bool) -> None:
        super().__init__(*where)
        self.product, self.fixed = product, fixed
        self.slots_N = self.block_N * self.size + self.slot_N  # in the cache
        self.tiles = self.blocks_NM = None
        if prompts and not fixed and self.head_dim <= LARGEST_HEAD:
            group, held = self.num_heads // self.num_kv_heads, self.keys[0]
            queries = queries_of_a_tile(group, self.head_dim, held.element_size(), held.device)
            self.tiles = prefill_tiles(self.rows_N, self.lens_N, queries)
        else:
            self.blocks_NM = self.table_BM[self.rows_N]

    def _norm_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight if dtype == torch.float32 else weight.to(dtype)  # widened in the kernel

    def linear(
        self, index: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        y = self.product(x, weight, bias)
        return y if self.adapter is None else self.adapter.add_(y, x, index, product, self.product)

    def attention(self, index: int, weights: LayerWeights, qkv: Tensor) -> Tensor:
        options, keys, values = self.options, self.keys[index], self.values[index]
        if self._in_one(weights):
            q_norm, k_norm = (
                None if weight is None else weight.to(self.dtype)
                for weight in (weights.q_norm, weights.k_norm)
            )
            q = rope_and_cache(
                qkv,
                *self.angles[weights.rope],
                keys,
                values,
                self.slots_N,
                num_heads=self.num_heads,
                q_norm=q_norm,
                k_norm=k_norm,
                eps=self.eps,
                impl=self.impl,
            )
        else:
            q, k, v = self.heads(weights, qkv)
            self.write(index, k, v)
        how: dict[str, Any] = {
            "window": weights.window or None,
            "softcap": options.attention_softcap,
            "scale": options.attention_scale,
            "impl": self.impl,
        }
        q = q.to(keys.dtype)
        if self.blocks_NM is None:
            where = (self.table_BM, self.rows_N, self.lens_N)
            return paged_prefill(q, keys, values, *where, tiles=self.tiles, **how)
        return paged_attention(q, keys, values, self.blocks_NM, self.lens_N, **how)

    def _in_one(self, weights: LayerWeights) -> bool:
        """Whether the op rope_and_cache can be used: all of a head is rotated, and norms are per
        head and multiply by the weight alone."""
        if weights.rope < 0 or 2 * self.angles[weights.rope][0].shape[-1] != self.head_dim:
            return False
        norms = [weight for weight in (weights.q_norm, weights.k_norm) if weight is not None]
        return not norms or (
            self.options.norm_offset == 0
            and all(weight.shape[0] == self.head_dim for weight in norms)
        )

    def activate(self, weights: LayerWeights, up: Tensor) -> Tensor:
        if self.fixed:
            return activate_rows(up, self.options.activation, gated=weights.gated)
        return activate(up, self.options.activation, gated=weights.gated, impl=self.impl)


def _product_of(dtype: torch.dtype, fixed: bool, impl: str | None) -> Linear:
    """Return the function that multiplies with weights of `dtype`."""
    if fixed:
        return partial(fixed_linear, impl="triton")
    return partial(split_linear, impl=impl) if dtype == torch.bfloat16 else F.linear


def _composed(
    ops: Ops,
    weights: DecoderWeights,
    token_ids_N: Tensor,
    positions_N: Tensor,
    out_slots_R: Tensor | None,
) -> Tensor:
    """Compute the step, layer by layer."""
    delta_NH, stream_NH = (
        ops.embed(token_ids_N, positions_N, weights.embedding, weights.position_embedding),
        None,
    )
    for index, layer_weights in enumerate(weights.layers):
        delta_NH, stream_NH = layer(ops, index, layer_weights, delta_NH, stream_NH)
    return ops.end(delta_NH, stream_NH, weights.norm, weights.norm_bias, out_slots_R).to(
        weights.embedding.dtype
    )


def _native(
    weights: DecoderWeights,
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots: Tensor | None,
) -> Tensor:
    options, adapter = weights.options, weights.adapter
    return native_step.decode_step(
        token_ids,
        positions,
        rows,
        block_table,
        k_cache,
        v_cache,
        out_slots,
        weights.embedding,
        weights.position_embedding,
        weights.norm,
        weights.norm_bias,
        *weights.rope_table.upto(block_table.shape[1] * v_cache.shape[3]),
        [part for layer in weights.layers for part in layer.parts()],
        [layer.window for layer in weights.layers],
        [layer.rope for layer in weights.layers],
        weights.norm_eps,
        weights.head_dim**-0.5 if options.attention_scale is None else options.attention_scale,
        options.attention_softcap or 0.0,
        options.embedding_scale,
        options.norm_offset,
        options.activation,
        options.parallel,
        [] if adapter is None else [part for layer in adapter.layers for part in layer],
        [] if adapter is None else [number for found in adapter.slices for number in found],
        1.0 if adapter is None else adapter.scale,
    )


# ---- public --------------------------------------------------------------------------------------
def allocate_cache(
    weights: DecoderWeights,
    num_blocks: int,
    block_size: int = 16,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Allocate an empty paged cache for a decoder, on its device: (k_cache, v_cache), 2 L Hkv D
    elements per position. Its dtype is `dtype`, or by default that of the weights.

    The memory is not initialised: `decode_step` writes every slot before anything reads it.
    """
    L, heads, D = len(weights.layers), weights.num_kv_heads, weights.head_dim
    return (
        weights.embedding.new_empty(L, num_blocks, heads, D, block_size, dtype=dtype),
        weights.embedding.new_empty(L, num_blocks, heads, block_size, D, dtype=dtype),
    )


def _check_ranges(
    weights: DecoderWeights,
    token_ids_N: Tensor,
    positions_N: Tensor,
    rows_N: Tensor,
    block_table_BM: Tensor,
    blocks: int,
    size: int,
    out_slots_R: Tensor | None,
) -> None:
    """Check that indices are in range, as the cpp op does itself: torch would count a negative
    index from the end."""
    B, M = block_table_BM.shape
    positions = (
        M * size
        if weights.position_embedding is None
        else min(M * size, weights.position_embedding.shape[0])
    )
    for name, values, end in (
        ("token_ids", token_ids_N, weights.embedding.shape[0]),
        ("rows", rows_N, B),
        ("positions", positions_N, positions),
        ("out_slots", out_slots_R, token_ids_N.shape[0]),
    ):
        if values is not None and bool(((values < 0) | (values >= end)).any()):
            raise IndexError(
                f"decode_step: expected {name} in [0, {end}), got {values.min()} to {values.max()}"
            )
    reach = max((layer.window or M * size for layer in weights.layers), default=1)
    column, positions_N1 = torch.arange(M, device=rows_N.device), positions_N[:, None]
    needed = block_table_BM[rows_N][
        (column <= positions_N1 // size)
        & (column >= (positions_N1 - reach + 1).clamp(min=0) // size)
    ]
    if bool(((needed < 0) | (needed >= blocks)).any()):
        raise IndexError(
            f"decode_step: expected block_table entries in [0, {blocks}) for every position that a "
            f"token needs, got {needed.min()} "
            f"to {needed.max()}"
        )


def _chosen(
    weights: DecoderWeights,
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots: Tensor | None,
    fixed: bool,
    impl: str | None,
) -> str:
    """Check that sizes, devices and dtypes agree, and return the implementation of a call."""
    op, dtype = "decode_step", weights.embedding.dtype
    L, D, Hkv = len(weights.layers), weights.head_dim, weights.num_kv_heads
    check(
        op,
        {
            "token_ids": (token_ids, "N"),
            "positions": (positions, "N"),
            "rows": (rows, "N"),
            "block_table": (block_table, "B M"),
            "k_cache": (k_cache, f"{L} blocks {Hkv} {D} S"),
            "v_cache": (v_cache, f"{L} blocks {Hkv} S {D}"),
            "out_slots": (out_slots, "R"),
            "weights.embedding": (weights.embedding, "V H"),
        },
    )
    refused = {"triton": "it computes in float32"} if dtype == torch.float64 else {}
    if fixed:
        refused["torch"] = "its sums follow the number of tokens"
        if dtype == torch.float16:
            refused["triton"] = "its products of a fixed order take float32 and bfloat16"
    chosen = _IMPLS.choose(token_ids.device, impl, refused)
    for name, tensor in (
        ("token_ids", token_ids),
        ("positions", positions),
        ("rows", rows),
        ("out_slots", out_slots),
    ):
        check_dtype(op, name, tensor, (torch.int64,))
    check_dtype(op, "block_table", block_table, (torch.int32,))
    check_dtype(op, "weights.embedding", weights.embedding, weight_dtypes(token_ids.device, chosen))
    halves = {torch.float16} if dtype == torch.bfloat16 and chosen != "cpp" else set()
    cached = {torch.float32} if chosen != "triton" or dtype == torch.bfloat16 else set()
    check_dtype(op, "k_cache", k_cache, {dtype} | cached | halves)
    check_dtype(op, "v_cache", v_cache, (k_cache.dtype,))
    return chosen


@torch.no_grad()
def decode_step(
    weights: DecoderWeights,
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots: Tensor | None = None,
    *,
    fixed: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Run N tokens through the decoder over the paged cache, writing their keys and values into it.
    No gradient.

    Args:
        weights: the live parameters, all of one dtype; cpp supports float32 and bfloat16.
        token_ids, positions, rows: [N] int64. Token n is at `positions[n]` of the sequence whose
            blocks are `block_table[rows[n]]`. Every earlier position in token n's window must be in
            the cache or among the tokens of this call. No (row, position) may occur twice.
        block_table: [B, M] int32. Position p of row b lies in block `block_table[b, p // S]`, slot
            p % S. Entries that no token needs may have any value.
        k_cache, v_cache: [L, blocks, Hkv, D, S] and [L, blocks, Hkv, S, D] in the weights' dtype
            (`allocate_cache`), in float32, or for triton and torch in float16 beside bfloat16
            weights (`cache_dtype`); written in place.
        out_slots: [R] int64, the tokens whose hidden states to return; None returns all.
        fixed: make the bits of a token independent of the other tokens of the call. In cpp they
            always are; triton then uses `fixed_linear` for its products (float32 and bfloat16);
            torch cannot do this.
        impl: "cpp" (CPU), "triton" (not float64) or "torch"; by default the best one for the
            device.
    Returns:
        [R, H] hidden states after the final norm, in the weights' dtype. The head is
        `weights.head`.
    Raises:
        ValueError: sizes or devices do not agree.
        TypeError: dtypes are not supported or do not agree.
        RuntimeError: `impl` cannot run here.
        IndexError: an id, a position or a block is out of range (on CPU).
    """
    chosen = _chosen(
        weights, token_ids, positions, rows, block_table, k_cache, v_cache, out_slots, fixed, impl
    )
    if chosen == "cpp":
        return _native(
            weights, token_ids, positions, rows, block_table, k_cache, v_cache, out_slots
        )
    device, dtype = token_ids.device, weights.embedding.dtype
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ranges(
            weights,
            token_ids,
            positions,
            rows,
            block_table,
            k_cache.shape[1],
            v_cache.shape[3],
            out_slots,
        )
    where = (weights, positions, rows, block_table, k_cache, v_cache)
    ops: Ops
    if chosen == "torch":
        ops = _Reference(*where, torch.promote_types(dtype, k_cache.dtype))
    else:
        each = _INTERPRETED if device.type == "cpu" else None  # on a GPU each op has its own best
        ops = _Composition(
            *where,
            activation_dtype(dtype),
            each,
            product=_product_of(dtype, fixed, each),
            fixed=fixed,
            prompts=out_slots is not None or len(token_ids) > len(block_table),
        )
    return _composed(ops, weights, token_ids, positions, out_slots)
