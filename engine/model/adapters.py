"""LoRA adapters of one layer: y = W x + s B (A x) on its fused projections, with W frozen.

Shapes    N tokens, K inputs and O outputs of a projection, r rank, P adapted slices of a projection
          (q, k and v of qkv_proj), R = P r.
Held      fused like the projections: a [P r, K] and b [rows of the slices, r], so that one product
          gives A x of all slices. Each slice has an A of its own, like PEFT's adapters of q_proj,
          k_proj and v_proj.
Numerics  adapters have the model's dtype, so that sampler and trainer read the same bits without a
          cast. Like all low-precision parameters, low-precision adapters have float32 masters in
          the optimizer. With B = 0 or the adapter off, the outputs are bitwise those of W.
          `merging` computes in float32 and rounds once.
Source    Hu et al. (2021), LoRA; initialised as PEFT does: A kaiming-uniform, B zero. rslora:
          Kalajdzievski (2023), A rank stabilization scaling factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.layer import DOWN, GATE_UP, OUT, QKV, add_adapter_
from fusedrl.engine.model.wide import input_grad, kept, linear, product, weight_grad

_NAMES = ("qkv", "o", "gate_up", "down")


class Slice(NamedTuple):
    """Rows of a fused projection that form a separately named layer in the Hugging Face layout."""

    module: str  # below model.layers.N
    product: int
    first: int
    rows: int


def inputs(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return the number of inputs K of each of the four projections."""
    return (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.hidden_size,
        config.intermediate_size,
    )


def slices(config: ModelConfig) -> dict[str, Slice]:
    """Return the linear layers that can be adapted, by their names as PEFT's targets (the Hugging
    Face layout). Raise ConfigError if the family's projections have a layout that adapters do not
    support."""
    c = config
    if not c.gated:
        raise ConfigError(
            f"lora: {c.family.name} lays out its projections in a way that adapters do not know "
            "yet; train it without lora"
        )
    q, kv, f = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    fused = {
        "qkv_proj": ("self_attn", QKV, 0, q + 2 * kv),
        "gate_up_proj": ("mlp", GATE_UP, 0, 2 * f),
    }
    apart = {
        "q_proj": ("self_attn", QKV, 0, q),
        "k_proj": ("self_attn", QKV, q, kv),
        "v_proj": ("self_attn", QKV, q + kv, kv),
        "gate_proj": ("mlp", GATE_UP, 0, f),
        "up_proj": ("mlp", GATE_UP, f, f),
    }
    both = {
        "o_proj": ("self_attn", OUT, 0, c.hidden_size),
        "down_proj": ("mlp", DOWN, 0, c.hidden_size),
    }
    found = {
        name: Slice(f"{at}.{name}", *rest)
        for name, (at, *rest) in ((fused if c.family.fused else apart) | both).items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1][1:]))


def targets(config: ModelConfig, lora: LoRAConfig) -> dict[str, Slice]:
    """Return the slices that a LoRA setting names, in the order of the parameters.

    Raises:
        ConfigError: the family does not have one of the targets.
    """
    known = slices(config)
    if "all-linear" in lora.targets:
        return known
    if absent := [name for name in lora.targets if name not in known]:
        raise ConfigError(
            f"lora.targets: {config.family.name} has no {', '.join(absent)}; it has "
            f"{', '.join(known)}"
        )
    return {name: found for name, found in known.items() if name in lora.targets}


class _AdaptedLinear(torch.autograd.Function):
    """Compute W x + b, with s B (A x) added in place to slices of the result. Only A x is saved for
    the backward pass, in addition to the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight_OK: Tensor,
        bias_O: Tensor | None,
        a_RK: Tensor,
        b: Tensor,
        rows: Sequence[tuple[int, int]],
        scale: float,
    ) -> Tensor:
        y_NO, u_NR = product(x_NK, weight_OK, bias_O), product(x_NK, a_RK)
        add_adapter_(y_NO, u_NR, b.to(x_NK.dtype), rows, scale)
        ctx.save_for_backward(kept(x_NK, weight_OK), weight_OK, a_RK, b, u_NR)
        ctx.save_for_forward(x_NK, weight_OK, a_RK, b, u_NR)
        ctx.rows, ctx.scale = rows, scale
        return y_NO

    @staticmethod
    def jvp(
        ctx: Any,
        x_NK: Tensor | None,
        weight_OK: Tensor | None,
        bias_O: Tensor | None,
        a_RK: Tensor | None,
        b: Tensor | None,
        *_: None,
    ) -> Tensor:
        """Compute the forward-mode derivative. The arguments are tangents, or None."""
        at_x_NK, at_weight_OK, at_a_RK, at_b, at_u_NR = ctx.saved_tensors
        y_NO = (
            at_x_NK.new_zeros(len(at_x_NK), len(at_weight_OK))
            if x_NK is None
            else product(x_NK, at_weight_OK)
        )
        y_NO = y_NO if weight_OK is None else y_NO + product(at_x_NK, weight_OK)
        y_NO = y_NO if bias_O is None else y_NO + bias_O
        u_NR = torch.zeros_like(at_u_NR) if x_NK is None else product(x_NK, at_a_RK)
        u_NR = u_NR if a_RK is None else u_NR + product(at_x_NK, a_RK)
        add_adapter_(y_NO, u_NR, at_b, ctx.rows, ctx.scale)
        if b is not None:
            add_adapter_(y_NO, at_u_NR, b, ctx.rows, ctx.scale)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_OK, a_RK, b, u_NR = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad[:5]
        r, done, wide_b = b.shape[1], 0, b.to(grad_NO.dtype)
        u_grad_NR, b_grad = torch.empty_like(u_NR), torch.empty_like(b) if for_b else None
        for index, (first, rows) in enumerate(ctx.rows):
            grad, part, mine = (
                grad_NO[:, first : first + rows],
                slice(index * r, (index + 1) * r),
                slice(done, done + rows),
            )
            u_grad_NR[:, part] = grad @ wide_b[mine] * ctx.scale
            if b_grad is not None:
                b_grad[mine] = grad.T @ u_NR[:, part] * ctx.scale
            done += rows
        x_grad = (
            input_grad(grad_NO, weight_OK).addmm_(u_grad_NR, a_RK.to(grad_NO.dtype))
            if for_x
            else None
        )
        dtype = weight_OK.dtype
        return (
            x_grad,
            weight_grad(grad_NO, x_NK, dtype) if for_weight else None,
            grad_NO.sum(0).to(dtype) if for_bias else None,
            weight_grad(u_grad_NR, x_NK, dtype) if for_a else None,
            b_grad,
            None,
            None,
        )


class LayerAdapter(nn.Module):
    """Adapters of one layer: parameters `qkv_a`, `qkv_b`, ... for each projection that has an
    adapted slice."""

    def __init__(
        self,
        found: Sequence[Slice],
        widths: Sequence[int],
        lora: LoRAConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.rank, self._scale = lora.rank, lora.scale
        self.rows = tuple(
            tuple((s.first, s.rows) for s in found if s.product == product) for product in range(4)
        )
        for name, rows, K in zip(_NAMES, self.rows, widths, strict=True):
            shapes = {
                "a": (len(rows) * lora.rank, K),
                "b": (sum(count for _, count in rows), lora.rank),
            }
            for part, shape in shapes.items():
                self.register_parameter(
                    f"{name}_{part}",
                    nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) if rows else None,
                )

    @property
    def scale(self) -> float:
        """Scale s from the LoRA settings. The sampler reads the settings, so s cannot be set
        here."""
        return self._scale

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the adapter's parameters."""
        return {name: p.shape for name, p in self.named_parameters()}

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return a and b of each of the projections qkv, o, gate_up and down."""
        return tuple(getattr(self, f"{name}_{part}") for name in _NAMES for part in ("a", "b"))

    def parts(self, found: Slice) -> tuple[Tensor, Tensor]:
        """Return A and B of one slice, as views."""
        a, b = (
            getattr(self, f"{_NAMES[found.product]}_a"),
            getattr(self, f"{_NAMES[found.product]}_b"),
        )
        rows = self.rows[found.product]
        index = rows.index((found.first, found.rows))
        done = sum(count for _, count in rows[:index])
        return a[index * self.rank : (index + 1) * self.rank], b[done : done + found.rows]

    def forward(
        self, product: int, x_NK: Tensor, weight_OK: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        """Return the output of a projection, with that of the adapter added."""
        a, b = self.tensors()[2 * product : 2 * product + 2]
        return (
            linear(x_NK, weight_OK, bias_O)
            if a is None
            else _AdaptedLinear.apply(x_NK, weight_OK, bias_O, a, b, self.rows[product], self.scale)
        )


def adapted_linear(
    adapter: LayerAdapter | None,
    product: int,
    x_NK: Tensor,
    weight_OK: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """Return the output of a layer's projection, with that of its adapter if there is one."""
    return (
        linear(x_NK, weight_OK, bias_O)
        if adapter is None
        else adapter(product, x_NK, weight_OK, bias_O)
    )
