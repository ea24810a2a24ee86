"""Definitions of the layers and the decoder: matrix products, softmax and rotation written out."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.tools.verify.definitions.common import Columns

HEAD_NORM_EPS = 1e-6


# ---- layers --------------------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute (offset + weight) x / sqrt(mean of x^2 + eps). Zhang and Sennrich (2019), eq. 4."""
    return (offset + weight) * (x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute weight (x - mean) / sqrt(variance + eps) + bias. Ba, Kiros and Hinton (2016)."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return (
        weight
        * (centred / torch.sqrt((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps))
        + bias
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + P]) of each head: as complex numbers, times cos + i sin [N, P].
    Dimensions from 2 P on stay the same.

    Su et al. (2021), eq. 34, in the layout of GPT-NeoX."""
    P = cos.shape[-1]
    turned = torch.complex(x[..., :P], x[..., P : 2 * P]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * P :]), -1)


def activation(x: Tensor, name: str) -> Tensor:
    """Apply an activation: silu x sigmoid(x), gelu x Phi(x), or gelu_tanh, its approximation.
    Hendrycks and Gimpel (2016)."""
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return x * torch.erfc(-x / math.sqrt(2)) / 2
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mlp_hidden(x: Tensor, name: str, gated: bool) -> Tensor:
    """Compute activation(gate) up, where x holds the gates before the ups; if not gated,
    activation(x). Shazeer (2020), eq. 6."""
    half = x.shape[-1] // 2
    return activation(x[..., :half], name) * x[..., half:] if gated else activation(x, name)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b."""
    return x @ weight.T if bias is None else x @ weight.T + bias


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Compute softmax(scale q . k) v for q [T, Hq, D] and k [U, Hkv, D]; the mask [T, U] says which
    k each q attends to. Vaswani et al. (2017), eq. 1."""
    # each query head's key/value head
    own = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    scores = scale * torch.einsum("thd,uhd->htu", q, k[:, own])
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    e = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return torch.einsum("htu,uhd->thd", e / e.sum(-1, keepdim=True), v[:, own])


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None
) -> Tensor:
    """Attend within each sequence: token i to tokens j <= i if causal, with |i - j| < window."""
    bounds, parts = cu_seqlens.tolist(), [q[:0] + k[:0].sum() + v[:0].sum()]
    for start, end in pairwise(bounds):
        if end > start:
            at = torch.arange(end - start, device=q.device)
            behind = at[:, None] - at
            seen = (behind >= 0) | (not causal)
            seen = seen if window is None else seen & (behind.abs() < window)
            parts.append(
                _attend(q[start:end], k[start:end], v[start:end], seen, q.shape[2] ** -0.5, None)
            )
    return torch.cat(parts)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float | None = None,
) -> Tensor:
    """Attend from one query per row to the last `window` of the row's cached positions. Position p
    is in block table[p // S], slot p % S.

    Kwon et al. (2023)."""
    rows, size, scale = [q[:0]], v_cache.shape[2], q.shape[2] ** -0.5 if scale is None else scale
    for b, length in enumerate(context_lens.tolist()):
        seen = torch.arange(max(0, length - (window or length)), length, device=q.device)
        if length == 0:
            rows.append(torch.zeros_like(q[b : b + 1]))
            continue
        blocks, slots = block_table[b, seen // size].long(), seen % size
        k, v, whole = (
            k_cache[blocks, :, :, slots],
            v_cache[blocks, :, slots],
            torch.ones_like(seen, dtype=torch.bool),
        )
        rows.append(_attend(q[b : b + 1], k, v, whole[None], scale, softcap))
    return torch.cat(rows)


def _cache(k: Tensor, v: Tensor, slots: list[int], k_cache: Tensor, v_cache: Tensor) -> None:
    """Write token n's k and v into slot `slots[n]` of the cache, in place. Slots are numbered
    through all blocks; a number outside them writes nothing."""
    size = v_cache.shape[2]
    for n, slot in enumerate(slots):
        if 0 <= slot < len(k_cache) * size:
            k_cache[slot // size, :, :, slot % size], v_cache[slot // size, :, slot % size] = (
                k[n],
                v[n],
            )


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Columns:
    """Split each token's heads into q, k and v, normalise q and k if there is a weight, rotate both
    (RoPE), and write k and v into the caches."""
    D = k_cache.shape[2]
    heads = qkv.reshape(len(qkv), qkv.shape[1] // D, D)
    q, k, v = heads.split((num_heads, k_cache.shape[1], k_cache.shape[1]), 1)
    q, k = (
        x if weight is None else rms_norm(x, weight, HEAD_NORM_EPS)
        for x, weight in ((q, q_norm), (k, k_norm))
    )
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    _cache(rope(k, cos, sin), v, slots.tolist(), k_cache, v_cache)
    return {"q": rope(q, cos, sin), "k_cache": k_cache, "v_cache": v_cache}


# ---- the decoder ---------------------------------------------------------------------------------
def decode_step(
    weights: Any,
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_slots: Tensor,
) -> Columns:
    """Run one step of a decoder in the dtype of the caches: Touvron et al. (2023), with the changes
    of other model families.

    Every token's k and v are cached before any token attends. A token then attends to its row's
    positions up to its own."""
    w, o, dtype, size = weights, weights.options, k_cache.dtype, v_cache.shape[3]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    tables = block_table[rows]
    slots = [int(tables[n, p // size]) * size + p % size for n, p in enumerate(positions.tolist())]

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        if weight is None:
            return x
        if bias is None:
            return rms_norm(x, weight.to(dtype), w.norm_eps, o.norm_offset)
        return layer_norm(x, weight.to(dtype), bias.to(dtype), w.norm_eps)

    def heads_norm(x: Tensor, weight: Tensor | None) -> Tensor:
        by_head = weight is None or len(weight) == w.head_dim
        return norm(x, weight) if by_head else norm(x.flatten(1), weight).view(x.shape)

    x = w.embedding.to(dtype)[token_ids] * o.embedding_scale
    if w.position_embedding is not None:
        x = x + w.position_embedding.to(dtype)[positions]
    for index, layer in enumerate(w.layers):
        before = x
        h = norm(x, layer.input_norm, layer.input_norm_bias)
        heads = _projected(w, index, 0, h, layer.qkv, layer.qkv_bias).unflatten(1, (-1, w.head_dim))
        q, k, v = heads.split((w.num_heads, w.num_kv_heads, w.num_kv_heads), 1)
        q, k = heads_norm(q, layer.q_norm), heads_norm(k, layer.k_norm)
        if layer.rope >= 0:
            angles = positions.double()[:, None] * w.rope_table.inv_freq[layer.rope].double()
            cos, sin = (
                (w.rope_table.scale * turn).to(dtype) for turn in (angles.cos(), angles.sin())
            )
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        keys, values = k_cache[index], v_cache[index]
        _cache(k, v, slots, keys, values)
        attended = paged_attention(
            q,
            keys,
            values,
            tables,
            positions + 1,
            layer.window or None,
            o.attention_softcap,
            o.attention_scale,
        )
        x = x + norm(
            _projected(w, index, 1, attended.flatten(1), layer.o, layer.o_bias),
            layer.attention_out_norm,
        )
        h = norm(before if o.parallel else x, layer.post_norm, layer.post_norm_bias)
        up = _projected(w, index, 2, h, layer.gate_up, layer.gate_up_bias)
        hidden = mlp_hidden(up, o.activation, gated=up.shape[1] != layer.down.shape[1])
        x = x + norm(
            _projected(w, index, 3, hidden, layer.down, layer.down_bias), layer.mlp_out_norm
        )
    return {
        "hidden": norm(x[out_slots], w.norm, w.norm_bias),
        "k_cache": k_cache,
        "v_cache": v_cache,
    }


def _projected(
    weights: Any, layer: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute one of a layer's four products, plus scale B (A x) in the slices that the adapter
    covers. Hu et al. (2021), eq. 3."""
    y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if weights.adapter is None or weights.adapter.layers[layer][2 * product] is None:
        return y
    a, b = (
        part.to(x.dtype) for part in weights.adapter.layers[layer][2 * product : 2 * product + 2]
    )
    rank, done = b.shape[1], 0
    added = torch.zeros_like(y)
    slices = [(start, count) for of, start, count in weights.adapter.slices if of == product]
    for index, (start, count) in enumerate(slices):
        added[:, start : start + count] += (
            x @ a[index * rank : (index + 1) * rank].T @ b[done : done + count].T
        )
        done += count
    return y + weights.adapter.scale * added
