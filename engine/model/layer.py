"""One layer of a decoder: its mathematics, written once over a small set of operations.

    h = norm(x);   q, k, v = h W_qkv + b;   q, k = rope(norm(q)), rope(norm(k))
    x = x + attend(q, k, v) W_o + b;   x = x + activate(norm(x) W_gate_up + b) W_down + b

`layer` computes this with the operations of an `Ops`. There are three kinds of `Ops`: training over
packed sequences, with gradients (decoder.py), and over the paged cache the composition for a GPU
and the reference in plain torch (step.py). The C++ step (csrc/cpu/ops/decode_step.cpp) is separate
and is tested against them.

Families differ in several ways. The outputs of attention and MLP may be normalised, in addition to
their inputs or instead; q and k may be rotated in part or not at all. A norm with a bias is a
LayerNorm, one without an RMSNorm. The MLP may lack its gate, and may read the same stream as
attention. Only this file handles these variants, by the tensors that are present (`LayerWeights`)
and by `Options`.

Shapes    N tokens, H hidden, Hq query heads, Hkv key/value heads, D head dim, F feed-forward width,
          P pairs of a head that turn.
Stream    the residual stream x is stored in two parts: the output added last, and the stream to add
          it to (None before the first layer). The next norm adds them, in one pass if it is an
          RMSNorm.
Source    Touvron et al. (2023), LLaMA; Su et al. (2021), RoFormer, in the rotate-half form;
          Hu et al. (2021), LoRA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.kernels.rms_norm import rms_norm
from fusedrl.kernels.rope import rope

# the products of a layer, numbered as in csrc/cpu/ops/decode_step.cpp
QKV, OUT, GATE_UP, DOWN = range(4)

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> x W^T + b


class LayerWeights(NamedTuple):
    """Parameters of one layer, the live tensors (never copies)."""

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
    input_norm_bias: Tensor | None = None  # [H]; with it input_norm is a LayerNorm
    post_norm_bias: Tensor | None = None  # [H]; likewise

    def parts(self) -> list[Tensor | None]:
        """Return the tensors in the order of the C++ op."""
        behind = (self.attention_out_norm, self.mlp_out_norm)
        return [*self[:12], *behind, self.input_norm_bias, self.post_norm_bias]

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies the activation of one product by another product."""
        return self.gate_up.size(0) != self.down.size(1)


class Options(NamedTuple):
    """Options of the arithmetic, which most families leave at their defaults."""

    attention_scale: float | None = None  # multiplies q . k; None: D ** -0.5
    attention_softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    logit_softcap: float | None = None  # likewise the logits; for who applies the head
    embedding_scale: float = 1.0  # multiplies the embedding, rounded to its dtype
    norm_offset: float = 0.0  # RMSNorms multiply by this + their weight
    activation: str = "silu"  # of the MLP, or of its gate: "silu", "gelu_tanh" or "gelu"
    parallel: bool = False  # the MLP reads the residual stream before attention is added to it


class Ops(ABC):
    """Operations of a decoder's layers.

    heads: (Hq, Hkv, D). eps: of the norms. angles: (cos, sin), [N, P] each, of every rotary table.
    impl: the implementation of the ops in kernels; None: the best one for the device.
    """

    rms_norm: ClassVar[Any] = staticmethod(rms_norm)
    rope: ClassVar[Any] = staticmethod(rope)

    def __init__(
        self,
        heads: tuple[int, int, int],
        eps: float,
        options: Options,
        angles: Sequence[tuple[Tensor, Tensor]],
        impl: str | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.eps, self.options, self.angles, self.impl = eps, options, angles, impl

    # ---- what differs ------------------------------------------------------------------------
    @abstractmethod
    def rows(self, ids_N: Tensor, table: Tensor) -> Tensor:
        """Return [N, H], rows of a table of embeddings, in the activations' dtype."""

    @abstractmethod
    def linear(
        self, index: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return x W^T + b, one of the four products of layer `index`, with the adapter's output
        added if there is one."""

    @abstractmethod
    def attention(self, index: int, weights: LayerWeights, qkv: Tensor) -> Tensor:
        """Return the outputs of attention [N, Hq, D], given qkv [N, (Hq + 2 Hkv) D]."""

    @abstractmethod
    def activate(self, weights: LayerWeights, up: Tensor) -> Tensor:
        """Return [N, F], the input of the MLP's second product, computed from the output of its
        first."""

    def _norm_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight of an RMSNorm as `rms_norm` takes it beside activations of `dtype`."""
        return weight.to(dtype)

    # ---- what is alike -----------------------------------------------------------------------
    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the LayerNorm of x if there is a bias, else the RMSNorm."""
        if bias is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        weight = self._norm_weight(weight, x.dtype)
        y: Tensor = self.rms_norm(
            x, weight, eps=self.eps, offset=self.options.norm_offset, impl=self.impl
        )
        return y

    def add_norm(
        self,
        delta: Tensor,
        stream: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (the norm of the sum, the sum), or the sum twice if there is no weight."""
        if weight is None or stream is None or bias is not None:
            total = delta if stream is None else delta + stream
            return (total if weight is None else self.norm(total, weight, bias)), total
        y, total = self.rms_norm(
            delta,
            self._norm_weight(weight, delta.dtype),
            eps=self.eps,
            residual=stream,
            offset=self.options.norm_offset,
            impl=self.impl,
        )
        return y, total

    def heads(self, weights: LayerWeights, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a projection into q [N, Hq, D], k and v [N, Hkv, D], and return them; q and k are
        normalised and rotated."""
        kv_heads = self.num_kv_heads
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * kv_heads, self.head_dim)
        q, k, v = heads.split((self.num_heads, kv_heads, kv_heads), dim=1)
        if weights.q_norm is not None:
            q = self._head_norm(q, weights.q_norm)
        if weights.k_norm is not None:
            k = self._head_norm(k, weights.k_norm)
        if weights.rope >= 0:
            q, k = self._turn(q, k, *self.angles[weights.rope])
        return q, k, v

    def _head_norm(self, x_NHD: Tensor, weight: Tensor) -> Tensor:
        """Return the norm of each head, or of all heads together if the weight is as long as they
        are."""
        if weight.shape[0] == self.head_dim:
            return self.norm(x_NHD, weight)
        return self.norm(x_NHD.flatten(1), weight).view(x_NHD.shape)

    def _turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first values of each head, as many as there are angles for; the rest stay
        unchanged."""
        turned = 2 * cos.shape[-1]
        if turned == self.head_dim:
            q, k = self.rope(q, k, cos, sin, impl=self.impl)
            return q, k
        q_turned, k_turned = self.rope(q[..., :turned], k[..., :turned], cos, sin, impl=self.impl)
        return torch.cat((q_turned, q[..., turned:]), -1), torch.cat(
            (k_turned, k[..., turned:]), -1
        )

    def embed(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        embedding: Tensor,
        position_embedding: Tensor | None,
    ) -> Tensor:
        """Return [N, H], the input of the first layer."""
        x_NH, scale = self.rows(ids_N, embedding), self.options.embedding_scale
        x_NH = x_NH if scale == 1.0 else x_NH * scale
        return (
            x_NH
            if position_embedding is None
            else x_NH + self.rows(positions_N, position_embedding)
        )

    def end(
        self,
        delta_NH: Tensor,
        stream_NH: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        out_slots_R: Tensor | None = None,
    ) -> Tensor:
        """Return [R, H], the final norm of the stream of these tokens, or of all tokens."""
        if out_slots_R is not None:
            delta_NH, stream_NH = (
                delta_NH[out_slots_R],
                None if stream_NH is None else stream_NH[out_slots_R],
            )
        return self.add_norm(delta_NH, stream_NH, weight, bias)[0]


def layer(
    ops: Ops, index: int, weights: LayerWeights, delta_NH: Tensor, stream_NH: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run layer `index`. The residual stream comes as two tensors that are not added yet.

    Args:
        delta_NH: output of the layer before (of the embedding, for the first layer).
        stream_NH: the stream to add `delta_NH` to; None before the first layer.
    Returns:
        (this layer's output, the stream to add it to), [N, H] each.
    """
    w, parallel = weights, ops.options.parallel
    h_NH, stream_NH = ops.add_norm(delta_NH, stream_NH, w.input_norm, w.input_norm_bias)
    o = ops.attention(index, w, ops.linear(index, QKV, h_NH, w.qkv, w.qkv_bias))
    attended_NH = ops.linear(index, OUT, o.flatten(1), w.o, w.o_bias)
    if w.attention_out_norm is not None:
        attended_NH = ops.norm(attended_NH, w.attention_out_norm)
    if parallel:
        h_NH, _ = ops.add_norm(stream_NH, None, w.post_norm, w.post_norm_bias)
    else:
        h_NH, stream_NH = ops.add_norm(attended_NH, stream_NH, w.post_norm, w.post_norm_bias)
    h_NF = ops.activate(w, ops.linear(index, GATE_UP, h_NH, w.gate_up, w.gate_up_bias))
    delta_NH = ops.linear(index, DOWN, h_NF, w.down, w.down_bias)
    if w.mlp_out_norm is not None:
        delta_NH = ops.norm(delta_NH, w.mlp_out_norm)
    return (delta_NH + attended_NH if parallel else delta_NH), stream_NH


def add_adapter_(
    y_NO: Tensor,
    u_NR: Tensor,
    b: Tensor,
    slices: Sequence[tuple[int, int]],
    scale: float,
    linear: Linear | None = None,
) -> None:
    """Add scale B u, in place, to each slice of y's columns. A slice is (first row of the weight,
    number of rows). u = A x [N, P r] and b [all rows, r] hold the parts of all slices."""
    r, done = b.shape[1], 0
    for index, (start, rows) in enumerate(slices):
        u, part, y = (
            u_NR[:, index * r : (index + 1) * r],
            b[done : done + rows],
            y_NO[:, start : start + rows],
        )
        if linear is None:
            y.addmm_(u, part.T, alpha=scale)
        else:
            y.add_(linear(u, part, None), alpha=scale)
        done += rows
