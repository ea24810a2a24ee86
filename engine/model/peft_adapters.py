"""PEFT's LoRA adapter of a transformers model that shares its storage with a decoder.

`peft_adapter` finds the one adapter that is active and checks that the decoder computes the same.
sharing.py then lets PEFT's A and B be slices of the decoder's, as it does with all weights. PEFT
may switch that adapter off or merge it; `PeftAdapter` follows both whenever it is asked:

    active                     the decoder adds the adapter, too
    disable_adapter()          the decoder leaves it out
    merge_adapter()            the base weights hold it, and the decoder leaves it out
    anything else              another active adapter, another scale, some layers off and others on:
                               a RuntimeError

Other adapters of the model, such as TRL's "ref", keep their own memory and are never generated
from. Nothing of PEFT is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor, nn

from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.adapters import slices
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora import adapter_views
from fusedrl.engine.model.weights import hf_views

_T = TypeVar("_T")
_REMEDY = "merge it first (merge_and_unload), or train fusedrl's own (actor.add_adapter)"


class PeftAdapter:
    """Adapter of a model, which is on or off as PEFT says when this object is called.

    Attributes:
        name: PEFT's name of the adapter.
        lora: its settings.
        wrapped: names of all linear layers that PEFT wraps, also for other adapters.
    """

    def __init__(self, name: str, lora: LoRAConfig, layers: Mapping[str, Any]) -> None:
        self.name, self.lora, self.wrapped = name, lora, frozenset(layers)
        self._layers = [layer for layer in layers.values() if name in layer.lora_A]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied decoder has weights of its own and follows nobody."""

    def __call__(self) -> bool:
        """Whether the adapter is on.

        Raises:
            RuntimeError: the model computes with the adapter in a way that is neither on nor off.
        """
        off = {layer.disable_adapters for layer in self._layers}
        merged = {tuple(layer.merged_adapters) for layer in self._layers}
        active = {tuple(layer.active_adapters) for layer in self._layers}
        scales = {layer.scaling.get(self.name) for layer in self._layers}
        if off == {True} and merged == {()}:
            return False
        if off == {False} and merged == {(self.name,)}:
            return False
        if (off, merged, active) == ({False}, {()}, {(self.name,)}) and all(
            _near(scale, self.lora.scale) for scale in scales
        ):
            return True
        raise RuntimeError(
            f"HybridActor: the shared model's adapter {self.name!r} is neither on, off nor merged "
            f"as a whole: active {sorted(active)}, merged {sorted(merged)}, disabled "
            f"{sorted(off)}, scale {', '.join(sorted(map(str, scales)))} and {self.lora.scale} "
            "when it was shared; set it back (set_adapter, unmerge_adapter), or build a new actor "
            "with from_module"
        )

    def parameter(self, name: str) -> str:
        """Return the model's name of what is called `name` without PEFT."""
        at, _, kind = name.rpartition(".")
        if at.endswith((".lora_A", ".lora_B")):
            return f"{at}.{self.name}.{kind}"
        return f"{at}.base_layer.{kind}" if at in self.wrapped else name

    def another(self, name: str) -> bool:
        """Whether a parameter belongs to another adapter of the model."""
        at = name.split(".")
        return any(part.startswith("lora_") for part in at) and at[-2] != self.name

    def unwrapped(self, found: Mapping[str, _T]) -> dict[str, _T]:
        """Return what is found by module names, under the names without PEFT's wrappers."""
        inside = tuple(f"{name}." for name in self.wrapped)
        bases = {f"{name}.base_layer": name for name in self.wrapped}
        return {
            bases.get(name, name): value
            for name, value in found.items()
            if name in bases or (name not in self.wrapped and not name.startswith(inside))
        }


def shared_views(decoder: Decoder) -> dict[str, Tensor]:
    """Return every parameter that a decoder shares with a transformers model, as views, under the
    model's names."""
    views, followed = hf_views(decoder), cast("PeftAdapter | None", decoder.followed)
    if followed is None:
        return views
    return {followed.parameter(name): x for name, x in (views | adapter_views(decoder)).items()}


def inner_model(module: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's wrapper; any other module itself.

    Raises:
        ValueError: the wrapper is of another method than LoRA, such as prompts that are trained.
    """
    if type(module).__module__.partition(".")[0] != "peft" or not hasattr(module, "peft_config"):
        return module
    kinds = {str(getattr(one.peft_type, "value", one.peft_type)) for one in _configs(module)}
    if kinds != {"LORA"} or not hasattr(module, "get_base_model"):
        raise ValueError(
            f"from_module: expected a PEFT model with LoRA, got {type(module).__name__} with "
            f"{', '.join(sorted(kinds))}; {_REMEDY}"
        )
    return cast(nn.Module, cast(Any, module).get_base_model())


def _configs(module: Any) -> Iterable[Any]:
    return cast(Iterable[Any], module.peft_config.values())


def peft_adapter(module: nn.Module, config: ModelConfig) -> PeftAdapter | None:
    """Return the active adapter of a transformers model; None if it has no LoRA layers.

    Raises:
        ValueError: the decoder cannot compute what the adapter does; the message says why.
    """
    layers: dict[str, Any] = {
        name: part for name, part in module.named_modules() if hasattr(part, "lora_A")
    }
    if not layers:
        return None
    active = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(active) != 1 or len(name_of := next(iter(active))) != 1:
        _refuse(f"expected one active adapter, got {sorted(active)}; choose one with set_adapter")
    name = name_of[0]
    mine = {at: layer for at, layer in layers.items() if name in layer.lora_A}
    for at, layer in layers.items():
        _check_layer(at, layer, name)
    known = slices(config)
    targets = {at.rpartition(".")[2] for at in mine}
    expected = {
        f"model.layers.{index}.{known[target].module}"
        for index in range(config.num_layers)
        for target in targets & known.keys()
    }
    if strange := sorted(expected ^ mine.keys()):
        _refuse(
            f"expected it on the same linear layers of every decoder layer, and on "
            f"{', '.join(known)} alone; different: {', '.join(strange[:4])}"
            + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        )
    return PeftAdapter(name, _settings(mine, name), layers)


def _check_layer(at: str, layer: Any, name: str) -> None:
    kind, base = type(layer), type(layer.base_layer)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        _refuse(f"{at} is {kind.__module__}.{kind.__name__}, expected PEFT's plain LoRA Linear")
    if base is not nn.Linear or layer.fan_in_fan_out:
        _refuse(f"{at} adapts {base.__module__}.{base.__name__}, expected torch.nn.Linear")
    if layer.lora_variant.get(name) is not None or layer.lora_bias.get(name):
        variant = layer.lora_variant.get(name)
        what = "a bias of its own" if variant is None else type(variant).__name__
        _refuse(f"{at} has {what}, expected W x + s B A x")
    if layer.merged or layer.disable_adapters:
        state = "merged" if layer.merged else "disabled"
        _refuse(f"it is {state} at {at}; unmerge or enable it before the model is shared")


def _settings(layers: Mapping[str, Any], name: str) -> LoRAConfig:
    found = {
        (layer.r[name], float(layer.lora_alpha[name]), layer.scaling[name])
        for layer in layers.values()
    }
    if len(found) != 1:
        _refuse(
            "expected one rank, alpha and scale for all layers (no rank_pattern or alpha_pattern), "
            f"got {sorted(found)}"
        )
    ((rank, alpha, scale),) = found
    rslora = not _near(scale, alpha / rank)
    if rslora and not _near(scale, alpha / math.sqrt(rank)):
        _refuse(f"its scale {scale} is neither alpha / r nor alpha / sqrt(r)")
    return LoRAConfig(rank, alpha, tuple(sorted({at.rpartition(".")[2] for at in layers})), rslora)


def _near(a: float | None, b: float) -> bool:
    return a is not None and math.isclose(a, b, rel_tol=1e-9)


def _refuse(why: str) -> NoReturn:
    raise ValueError(
        f"from_module: the model has a PEFT adapter that cannot be shared: {why}. Or {_REMEDY}"
    )
