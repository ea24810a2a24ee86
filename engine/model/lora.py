"""LoRA on a decoder: give it adapters, see them under their Hugging Face names, merge them. The
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
    """Freeze a decoder's parameters and give it adapters, which alone are trained from now on. It
    computes what it did before, until B moves from zero.

    A is uniform in +- 1 / sqrt(inputs), drawn on the CPU in float32, so alike everywhere. Make the
    optimizer afterwards.

    Raises:
        ConfigError: a target that the family does not have, or a rank above both sides of a
            projection.
        ValueError: the decoder has an adapter already.
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
    """Every A and B under its Hugging Face module, as PEFT names them:
    model.layers.0.self_attn.q_proj.lora_A.weight; views without gradient."""
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
    """(Hugging Face name, tensor) -> W + s B A where the name is of an adapted weight and the
    adapter is on; else the tensor itself."""
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
