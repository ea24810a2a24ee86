"""Decoder with one set of fused parameters, which training, scoring and generation all read.

Shapes    N tokens, H hidden, Hq query heads, Hkv key/value heads, D head dim, F feed-forward width,
          V vocabulary.
Rounding  the same as in the sampler's `decode_step`. Between bfloat16 weights, activations are
          float32 (`Decoder.activation_dtype`). Only the result is rounded, and on tensor cores also
          q, k, v and the output of attention (`Decoder.cache_dtype`; see wide.py). With other
          weights, activations have the parameters' dtype: norms as in transformers' Llama, in
          float32, rounded before their weight (Gemma's multiply by 1 + weight before they round);
          RoPE and SwiGLU in float32, rounded once (transformers rounds each product); LayerNorm is
          torch's: float32 inside, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.adapters import LayerAdapter, adapted_linear
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.layer import LayerWeights, Ops, Options, layer
from fusedrl.engine.model.step import Adapter, DecoderWeights, activation_dtype, cache_dtype
from fusedrl.engine.model.wide import activated, attend, embed, linear
from fusedrl.kernels.rope import RopeTable

_set: ContextVar[Mapping[int, bool]] = ContextVar(
    "decoders whose adapter was set on or off in this thread", default=MappingProxyType({})
)


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off within the block, so that the code in it computes in its own dtypes, as
    the sampler does, whoever calls it."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _Training(Ops):
    """Differentiable operations over packed sequences; between bfloat16 parameters, those described
    in wide.py."""

    def __init__(
        self, decoder: Decoder, positions_N: Tensor, cu_seqlens_B1: Tensor, max_length: int
    ) -> None:
        c, self.dtype = decoder.config, decoder.activation_dtype
        angles = decoder._rope_table.at(positions_N, max_length, self.dtype)
        super().__init__(
            (c.num_heads, c.num_kv_heads, c.head_dim), c.norm_eps, decoder._options, angles
        )
        self.cu_seqlens_B1, self.max_length, self.cache_dtype = (
            cu_seqlens_B1,
            max_length,
            decoder.cache_dtype,
        )
        self.adapters = (
            [cast(Layer, each).lora for each in decoder.layers] if decoder.adapter_enabled else None
        )

    def rows(self, ids_N: Tensor, table: Tensor) -> Tensor:
        return embed(ids_N, table, self.dtype)

    def linear(
        self, index: int, product: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return (
            linear(x, weight, bias)
            if self.adapters is None
            else adapted_linear(self.adapters[index], product, x, weight, bias)
        )

    def attention(self, index: int, weights: LayerWeights, qkv: Tensor) -> Tensor:
        q, k, v = self.heads(weights, qkv)
        return attend(
            q,
            k,
            v,
            self.cu_seqlens_B1,
            self.cache_dtype,
            max_length=self.max_length,
            window=weights.window or None,
            softcap=self.options.attention_softcap,
            scale=self.options.attention_scale,
        )

    def activate(self, weights: LayerWeights, up: Tensor) -> Tensor:
        return activated(
            up, self.options.activation, gated=weights.gated, wide=up.dtype != weights.gate_up.dtype
        )


class Layer(nn.Module):
    """Fused parameters of one layer. The rows of qkv_proj are q's heads, then k's, then v's. Those
    of gate_up_proj are gate, then up; without a gate, only the input of the MLP's activation.

    input_norm and post_norm come before attention and MLP, attention_out_norm and mlp_out_norm
    after them.
    """

    input_norm: Tensor | None
    post_norm: Tensor | None
    attention_out_norm: Tensor | None
    mlp_out_norm: Tensor | None
    input_norm_bias: Tensor | None
    post_norm_bias: Tensor | None

    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    lora: LayerAdapter | None

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        c = config
        self.config, self.window, self.rope = c, c.windows[index], c.ropes[index]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        def optional(present: bool, size: int) -> nn.Parameter | None:
            return parameter(size) if present else None

        qkv, up = (
            (c.num_heads + 2 * c.num_kv_heads) * c.head_dim,
            (2 if c.gated else 1) * c.intermediate_size,
        )
        before, behind = c.norms != "post", c.norms != "pre"
        self.register_parameter("input_norm", optional(before, c.hidden_size))
        self.qkv_proj = parameter(qkv, c.hidden_size)
        self.o_proj = parameter(c.hidden_size, c.num_heads * c.head_dim)
        self.register_parameter("post_norm", optional(before, c.hidden_size))
        self.gate_up_proj = parameter(up, c.hidden_size)
        self.down_proj = parameter(c.hidden_size, c.intermediate_size)
        self.register_parameter("qkv_bias", optional(c.qkv_bias, qkv))
        q_heads, kv_heads = (c.num_heads, c.num_kv_heads) if c.qk_norm == "projection" else (1, 1)
        self.register_parameter("q_norm", optional(c.qk_norm is not None, q_heads * c.head_dim))
        self.register_parameter("k_norm", optional(c.qk_norm is not None, kv_heads * c.head_dim))
        self.register_parameter("o_bias", optional(c.o_bias, c.hidden_size))
        self.register_parameter("gate_up_bias", optional(c.mlp_bias, up))
        self.register_parameter("down_bias", optional(c.mlp_bias, c.hidden_size))
        self.register_parameter("attention_out_norm", optional(behind, c.hidden_size))
        self.register_parameter("mlp_out_norm", optional(behind, c.hidden_size))
        self.register_parameter("input_norm_bias", optional(c.layer_norm, c.hidden_size))
        self.register_parameter("post_norm_bias", optional(c.layer_norm, c.hidden_size))
        self.register_module("lora", None)

    def forward(
        self, ops: Ops, index: int, delta_NH: Tensor, stream_NH: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run `layer` with these parameters, as the decoder's layer `index`. Return (delta,
        stream): the layer's output, and the residual stream to add it to; the arguments are those
        of the layer before."""
        return layer(ops, index, self.weights(), delta_NH, stream_NH)

    def weights(self) -> LayerWeights:
        """Return the parameters in the form that `layer` and the native step take."""
        return LayerWeights(
            self.input_norm,
            self.qkv_proj,
            self.qkv_bias,
            self.q_norm,
            self.k_norm,
            self.o_proj,
            self.o_bias,
            self.post_norm,
            self.gate_up_proj,
            self.gate_up_bias,
            self.down_proj,
            self.down_bias,
            self.window,
            self.attention_out_norm,
            self.mlp_out_norm,
            self.rope,
            self.input_norm_bias,
            self.post_norm_bias,
        )


class Decoder(nn.Module):
    """Decoder of any family in `families.FAMILIES`, for packed sequences.

    The constructor allocates the parameters without initialising them: `load_decoder` fills them
    from a directory, `Decoder.random` with random numbers. Their storage never moves afterwards: an
    optimizer step changes it in place, so that an earlier result of `weights()` shows the change.

    `checkpoint_activations` may be set at any time. A training forward then keeps only the input
    and output of each layer, and the backward pass computes the rest again, layer by layer (Chen et
    al., 2016, Training deep nets with sublinear memory cost). On CPU the gradients are the same
    bits.

    `lora`: settings of the decoder's adapter (`lora.add_adapter`), or None if there is no adapter.
    `followed`: a function that says whether the adapter is on where no `with` block sets it,
    because it belongs to another model as well; None: it is on.
    """

    head: Tensor | None
    position_embedding: Tensor | None
    norm_bias: Tensor | None
    checkpoint_activations = False
    lora: LoRAConfig | None = None
    followed: Callable[[], bool] | None = None

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )
        self.layers = nn.ModuleList(
            Layer(config, i, dtype, device) for i in range(config.num_layers)
        )
        self.norm = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype, device=device))
        positions = (
            nn.Parameter(self.embedding.new_empty(config.max_positions, config.hidden_size))
            if config.learned_positions
            else None
        )
        self.register_parameter("position_embedding", positions)
        self.register_parameter(
            "norm_bias", nn.Parameter(torch.empty_like(self.norm)) if config.layer_norm else None
        )
        self.register_parameter(
            "head",
            None if config.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding)),
        )
        self._settle()

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Decoder:
        """Create a decoder with normal(0, initializer_range) matrices, norms that multiply by 1,
        and biases 0. A GPU draws its numbers itself, so they are others than those of a CPU. For
        the same numbers on every device, create the decoder on a CPU and move it."""
        decoder = cls(config, dtype=dtype, device=device)
        where = "cpu" if decoder.embedding.device.type == "cpu" else decoder.embedding.device
        generator = torch.Generator(where).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.ndim > 1:
                    # in float32, so that other dtypes have the same numbers, rounded
                    drawn = parameter if where != "cpu" else torch.empty(parameter.shape)
                    drawn.normal_(0.0, config.initializer_range, generator=generator)
                    if drawn is not parameter:
                        parameter.copy_(drawn)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0 - config.norm_offset)
        return decoder

    def _settle(self) -> None:
        # Not a buffer: `.to(torch.bfloat16)` would round the angles.
        frequencies = [
            self.config.inv_freq,
            *([self.config.local_inv_freq] if self.config.local_inv_freq else []),
        ]
        self._rope_table = RopeTable(
            frequencies, self.config.rope_scale, device=self.embedding.device
        )
        c, scale = self.config, torch.tensor(self.config.embedding_scale).to(self.dtype).item()
        self._options = Options(
            c.attention_scale,
            c.attention_softcap,
            c.logit_softcap,
            scale,
            c.norm_offset,
            c.activation,
            c.parallel,
        )
        self._weights: DecoderWeights | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Decoder:
        super()._apply(*args, **kwargs)
        self._settle()
        return self

    @property
    def head_weight(self) -> Tensor:
        """Matrix [V, H] that maps hidden states to logits; the embedding itself if the two are
        tied."""
        return self.embedding if self.head is None else self.head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embedding.dtype

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype that the training forward computes in, the same as the sampler's on this device."""
        return activation_dtype(self.dtype)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the KV cache, and of attention in the training forward."""
        return cache_dtype(self.dtype, self.device)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.device

    def forward(
        self, token_ids_N: Tensor, positions_N: Tensor, cu_seqlens_B1: Tensor, max_length: int
    ) -> Tensor:
        """Return the hidden states of packed sequences, after the final norm.

        Args:
            token_ids_N: [N] int64.
            positions_N: [N] int64, from 0 in every sequence.
            cu_seqlens_B1: [B+1] int32.
            max_length: length of the longest sequence.
        Returns:
            [N, H] in the parameters' dtype, also under autocast. Differentiable in the parameters.
        """
        with own_precision(self.device):
            return self._hidden(token_ids_N, positions_N, cu_seqlens_B1, max_length)

    def _hidden(
        self, token_ids_N: Tensor, positions_N: Tensor, cu_seqlens_B1: Tensor, max_length: int
    ) -> Tensor:
        if self.position_embedding is not None and max_length > len(self.position_embedding):
            raise ValueError(
                f"expected sequences of at most {len(self.position_embedding)} tokens, the "
                "positions that the model has learned, got one of "
                f"{max_length}; shorten it"
            )
        ops = _Training(self, positions_N, cu_seqlens_B1, max_length)
        delta_NH, stream_NH = (
            ops.embed(token_ids_N, positions_N, self.embedding, self.position_embedding),
            None,
        )
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for index, each in enumerate(self.layers):
            arguments = (ops, index, delta_NH, stream_NH)
            # Nothing in a layer draws, so there is no generator's state to keep.
            delta_NH, stream_NH = (
                checkpoint(each, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else each(*arguments)
            )
        return ops.end(delta_NH, stream_NH, self.norm, self.norm_bias).to(self.dtype)

    # ---- the adapter -----------------------------------------------------------------------------
    @property
    def adapter_enabled(self) -> bool:
        """Whether there is an adapter that is switched on in this thread."""
        return self.lora is not None and self._adapted

    @property
    def _adapted(self) -> bool:
        on = _set.get().get(id(self))
        return on if on is not None else self.followed is None or self.followed()

    def set_adapter(self, lora: LoRAConfig) -> None:
        """Record the settings of adapters that were added to the layers."""
        self.lora = lora
        self._settle()

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Switch the adapter off within the block, in training and in generation. The outputs are
        then bitwise those of the weights without an adapter."""
        return self.adapter(enabled=False)

    @contextmanager
    def adapter(self, *, enabled: bool) -> Iterator[None]:
        """Switch the adapter on or off within the block, for the thread that runs the block. A
        backward pass inside the block uses the setting of its forward pass."""
        before = _set.get().get(id(self))
        self._switch(enabled)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool | None) -> None:
        others = {key: value for key, value in _set.get().items() if key != id(self)}
        _set.set(others if on is None else others | {id(self): on})

    def weights(self, adapted: bool | None = None) -> DecoderWeights:
        """Return the live parameters for `decode_step`: the same tensors, never copies. `adapted`:
        include the adapter or not; None follows the present setting."""
        if self._weights is None:
            c = self.config
            layers = tuple(layer.weights() for layer in self.layers)  # type: ignore[operator]
            self._weights = DecoderWeights(
                self.embedding,
                layers,
                self.norm,
                self.head_weight,
                self._rope_table,
                c.num_heads,
                c.num_kv_heads,
                c.head_dim,
                c.norm_eps,
                self._options,
                self.position_embedding,
                self.norm_bias,
                self._adapter(),
            )
        return (
            self._weights
            if (self._adapted if adapted is None else adapted)
            else self._weights._replace(adapter=None)
        )

    def _adapter(self) -> Adapter | None:
        adapters = [cast(LayerAdapter, layer.lora) for layer in self.layers]
        if self.lora is None or not adapters:
            return None
        slices = tuple(
            (product, first, rows)
            for product, found in enumerate(adapters[0].rows)
            for first, rows in found
        )
        return Adapter(tuple(adapter.tensors() for adapter in adapters), slices, self.lora.scale)
