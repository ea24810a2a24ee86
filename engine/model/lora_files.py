"""Adapters in PEFT's files: adapter_config.json, and adapter_model.safetensors with names such as
base_model.model.model.layers.0.mlp.up_proj.lora_A.weight.

PEFT adapts the un-fused projections such as q_proj. Each adapter slice of this engine (lora.py)
corresponds to one of these, so tensors are copied without any computation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fusedrl.engine.base.errors import no_such
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.adapters import inputs, slices, targets
from fusedrl.engine.model.configuration import read_json
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora import adapter_views, add_adapter
from fusedrl.engine.model.weights import opened, replacing, write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What of a PEFT configuration changes the arithmetic and is not here, and the values that leave it
# as it is.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # the other ways to begin change the base as well
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


def _strange(key: str, value: Any) -> bool:
    """Whether an entry of adapter_config.json asks for more than W + s B A."""
    if key in _PLAIN:
        return value not in _PLAIN[key]
    return (
        bool(value) and key != "use_rslora" and (key.startswith("use_") or key.endswith("_config"))
    )  # variants: use_dora, corda_config, ...


def save_adapter(decoder: Decoder, directory: str | Path, *, base_model: str | None = None) -> None:
    """Write a decoder's adapter as PEFT reads it, in the decoder's dtype. If the directory holds an
    earlier save, it is replaced as a whole.

    Args:
        base_model: directory or id of the model without the adapter, for PEFT's
            base_model_name_or_path.
    Raises:
        ValueError: the decoder has no adapter.
        FileExistsError: `directory` holds something that is not part of a saved model.
    """
    lora = decoder.lora
    if lora is None:
        raise ValueError(
            "save_adapter: the decoder has no adapter; give it one with add_adapter, or save the "
            "model with save_pretrained"
        )
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(targets(decoder.config, lora)),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with replacing(directory) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        save_file(
            {_PREFIX + name: view.contiguous() for name, view in adapter_views(decoder).items()},
            temporary / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )


def _no_adapter(directory: Path, lacking: str) -> str:
    """Return a message that tells what a path is that does not hold both files of an adapter."""
    if not directory.is_dir():
        return f"{directory} is a file" if directory.exists() else no_such(directory)
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    return f"{directory} has no {lacking}" + (
        f", and an adapter lies in {inside[0]}"
        if inside
        else " (it is a model)"
        if lacking == CONFIG_FILE and (directory / "config.json").is_file()
        else ""
    )


def _numbers(path: Path, raw: dict[str, Any]) -> tuple[int, float, bool]:
    """Return (rank, alpha, rslora) of an adapter_config.json. Raise ValueError if one is not of its
    type or range."""
    rank: Any = raw.get("r")
    alpha: Any = raw.get("lora_alpha")
    rslora = raw.get("use_rslora") or False
    if (
        type(rank) is not int
        or not 1 <= rank < 2**31
        or type(alpha) not in (int, float)
        or not 0 < alpha < 1e30
        or not isinstance(rslora, bool)
    ):
        raise ValueError(
            f"{path}: expected numbers for r and lora_alpha (above 0, and r whole), and true or "
            f"false for use_rslora, got {rank!r:.80}, {alpha!r:.80} and {rslora!r:.80}"
        )
    return rank, float(alpha), rslora


def load_adapter(decoder: Decoder, directory: str | Path) -> None:
    """Load the LoRA adapter of a PEFT directory into a decoder without an adapter, in the decoder's
    dtype; the base is frozen.

    Raises:
        FileNotFoundError: the files do not exist.
        ValueError: the adapter is of another kind, a file is damaged, or tensors do not fit this
            model's linear layers.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{_no_adapter(directory, name)}; expected a directory with the two files that "
                "PEFT's save_pretrained writes"
            )
    raw = read_json(directory / CONFIG_FILE)
    if strange := {key: value for key, value in raw.items() if _strange(key, value)}:
        raise ValueError(
            f"{directory / CONFIG_FILE}: expected plain LoRA on linear layers, got "
            f"{strange!s:.500}; merge it with PEFT and load the model"
        )
    with opened(directory / WEIGHTS_FILE) as file:
        names = list(file.keys())
        of = {
            match[1]
            for name in names
            if (match := re.fullmatch(r".*\.(\w+)\.lora_[AB]\.weight", name))
        }
        found = tuple(name for name in slices(decoder.config) if name in of)
        rank, alpha, rslora = _numbers(directory / CONFIG_FILE, raw)
        lora = LoRAConfig(rank, alpha, found or ("all-linear",), rslora)
        shapes: dict[str, list[int]] = {}
        for index in range(decoder.config.num_layers):
            for module, product, _, rows in targets(decoder.config, lora).values():
                at = f"model.layers.{index}.{module}"
                shapes |= {
                    f"{at}.lora_A.weight": [rank, inputs(decoder.config)[product]],
                    f"{at}.lora_B.weight": [rows, rank],
                }
        problems = [f"missing: {_PREFIX}{name}" for name in shapes if _PREFIX + name not in names]
        problems += [
            f"unexpected: {name}" for name in names if name.removeprefix(_PREFIX) not in shapes
        ]
        problems += [
            f"shape of {_PREFIX}{name}: expected {shape}, got {got}"
            for name, shape in shapes.items()
            if _PREFIX + name in names
            and (got := file.get_slice(_PREFIX + name).get_shape()) != shape
        ]
        if problems:
            shown = "\n  ".join(problems[:20]) + (
                f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            )
            raise ValueError(
                f"{directory}: the adapter is not one of this {decoder.config.family.name}:\n  "
                f"{shown}"
            )
        add_adapter(decoder, lora)
        with torch.no_grad():
            for name, view in adapter_views(decoder).items():
                view.copy_(file.get_tensor(_PREFIX + name))
