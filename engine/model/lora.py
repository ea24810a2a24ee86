"""LoRA on a decoder: add adapters, view them under their Hugging Face names, merge them. The
mathematics is in adapters.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.adapters import LayerAdapter, inputs, targets
from fusedrl.engine.model.decoder import Decoder


def add_adapter(decoder: Decoder, lora: LoRAConfig, *, seed: int = 0) -> None:
    """Freeze a decoder's parameters and add adapters; only these are trained from now on. The
    decoder's outputs stay the same until B changes from zero.

    A is uniform in +- 1 / sqrt(inputs), drawn on the CPU in float32, so it is the same on every
    device. Create the optimizer afterwards.

    Raises:
        ConfigError: the family does not have one of the targets, or the rank is above both sides of
            a projection.
        ValueError: the decoder already has an adapter.
    """
    if decoder.lora is not None:
        raise ValueError(
            f"add_adapter: the decoder has an adapter already ({decoder.lora}); a decoder has one, "
            "so load the model again for another"
        )
    found = tuple(targets(decoder.config, lora).values())
    for one in found:
        rows, columns = one.rows, inputs(decoder.config)[one.product]
        if lora.rank > max(rows, columns):
            raise ConfigError(
                f"lora.rank: expected at most {max(rows, columns)} on {one.module}, a projection "
                f"of {rows} x {columns}, got {lora.rank}; lower it, or leave that one out of "
                "lora.targets"
            )
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    for layer in decoder.layers:
        adapter = LayerAdapter(found, inputs(decoder.config), lora, decoder.dtype, decoder.device)
        with torch.no_grad():
            for a in adapter.tensors()[::2]:
                if a is not None:
                    bound = 1 / math.sqrt(a.shape[1])
                    a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        cast(Any, layer).lora = adapter
    decoder.set_adapter(lora)


def adapter_views(decoder: Decoder) -> dict[str, Tensor]:
    """Return every A and B, as views without gradient, under the names that PEFT uses, such as
    model.layers.0.self_attn.q_proj.lora_A.weight."""
    if decoder.lora is None:
        return {}
    views: dict[str, Tensor] = {}
    found = targets(decoder.config, decoder.lora).values()
    for index, layer in enumerate(decoder.layers):
        for one in found:
            a, b = cast(LayerAdapter, layer.lora).parts(one)
            views |= {
                f"model.layers.{index}.{one.module}.lora_{kind}.weight": x.detach()
                for kind, x in (("A", a), ("B", b))
            }
    return views


def merging(decoder: Decoder) -> Callable[[str, Tensor], Tensor]:
    """Return a function (Hugging Face name, tensor) -> tensor. It returns W + s B A if the name is
    that of an adapted weight and the adapter is on; else the tensor itself."""
    views = adapter_views(decoder) if decoder.adapter_enabled else {}

    @torch.no_grad()
    def merge(name: str, weight: Tensor) -> Tensor:
        at = name.removesuffix(".weight")
        if f"{at}.lora_A.weight" not in views or decoder.lora is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (views[f"{at}.lora_{kind}.weight"].to(wide) for kind in "AB")
        return torch.addmm(weight.to(wide), b, a, alpha=decoder.lora.scale).to(weight.dtype)

    return merge
