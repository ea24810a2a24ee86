"""Storage shared by a transformers model and a decoder: training the model trains the decoder, and
nothing is copied again.

`share` copies the model's weights once, a layer at a time, into fused storage, and points the
model's own parameters at slices of it (the views of `weights.hf_views`). The model keeps working as
before: its parameters are the same objects, also for its optimizer. Each parameter has its own
torch storage over its part of that memory. Programs that save the model (safetensors, accelerate,
torch.save) therefore see tensors that share no storage, and write them all. watch.py checks that
the parameters stay in that memory. A and B of PEFT's LoRA adapter are shared in the same way
(peft_adapters.py).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusedrl.engine.model.beside import floating_buffers, plain, unlike
from fusedrl.engine.model.configuration import ModelConfig, model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.peft_adapters import PeftAdapter, peft_adapter, shared_views


def shared_config(module: nn.Module) -> ModelConfig:
    """Return the configuration of a transformers model, from its present config and
    generation_config. Raise the errors of `share`."""
    config = getattr(module, "config", None)
    if not isinstance(module, nn.Module) or not hasattr(config, "to_json_string"):
        raise TypeError(
            "from_module: expected a transformers model such as AutoModelForCausalLM gives, got "
            f"{type(module).__name__}"
        )
    raw = json.loads(cast(Any, config).to_json_string(use_diff=False))
    generation = getattr(module, "generation_config", None)
    return model_config(
        {
            key: value
            for key, value in raw.items()
            if key not in ("_name_or_path", "transformers_version")
        },
        json.loads(generation.to_json_string()) if generation is not None else None,
    )


def _with_its_frequencies(module: nn.Module, config: ModelConfig) -> ModelConfig:
    """Return the configuration with the rotary frequencies that the model holds. They must be those
    of its configuration, or these rounded, as `model.to(torch.bfloat16)` does.

    Raises:
        ValueError: the model's frequencies are not those of its configuration.
    """
    found: dict[str, Any] = {}
    for name, b in floating_buffers(module):
        if not name.endswith(("inv_freq", "embed_scale")):
            continue
        field = (
            "embedding_scale"
            if name.endswith("embed_scale")
            else "local_inv_freq"
            if "sliding_attention" in name
            else "inv_freq"
        )
        expected = torch.tensor(getattr(config, field)).flatten()
        held = b.detach().float().cpu().flatten()
        if held.shape != expected.shape or not torch.allclose(
            held, expected, rtol=max(1e-5, torch.finfo(b.dtype).eps), atol=0.0
        ):
            same = held.shape == expected.shape
            by = float((held - expected).abs().max()) if same else "of shape"
            raise ValueError(
                f"from_module: the buffer {name} is not what the model's configuration says (the "
                f"largest difference is {by}); set it in the configuration, save the model, and "
                "load that"
            )
        if b.dtype.itemsize < 4 and field != "embedding_scale" and "original" not in name:
            found[field] = tuple(held.tolist())
    if found:
        warnings.warn(
            "from_module: model.to(dtype) has rounded the model's rotary frequencies, so it "
            "computes otherwise than a model that is loaded in that "
            "dtype, at late positions above all; the actor follows. Load it by "
            "from_pretrained(..., dtype=...) instead",
            stacklevel=4,
        )
    return replace(config, **found)


def _check_plain(module: nn.Module, decoder: Decoder, followed: PeftAdapter | None) -> None:
    """Raise ValueError, with a list of differences, unless a model has the decoder's parameters and
    computes like transformers' unmodified model."""
    import transformers

    config, parameters = decoder.config, _parameters(module, followed)
    wanted = shared_views(decoder)
    if reordered := [name for name, view in wanted.items() if view.ndim > 2]:
        raise ValueError(
            f"from_module: {config.family.name} orders the rows of {reordered[0]} as no view of "
            "the fused projection can; load its directory with "
            "from_pretrained, and train the actor's own parameters"
        )
    problems = [f"missing: {name}" for name in wanted if name not in parameters] + [
        f"unexpected: {name}" for name in parameters if name not in wanted
    ]
    problems += [
        f"shape of {name}: expected {list(view.shape)}, got {list(parameters[name].shape)}"
        for name, view in wanted.items()
        if name in parameters and parameters[name].shape != view.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise ValueError(
            f"from_module: the parameters are not those of a plain {config.family.name} language "
            f"model:\n  {shown}"
        )
    if problems := unlike(
        module,
        plain(
            getattr(transformers, config.family.language_model.format(config.family.name)),
            module.config,
        ),
        dict if followed is None else followed.unwrapped,
    ):
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise ValueError(
            f"from_module: the model does not compute as transformers' {config.family.name} of its "
            "configuration, which is what the actor "
            f"computes:\n  {shown}\n  undo it, or set it in the configuration, save the model, and "
            "load that"
        )


def _parameters(module: nn.Module, followed: PeftAdapter | None) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, without those of other adapters than the followed."""
    return {
        name: p
        for name, p in module.named_parameters()
        if followed is None or not followed.another(name)
    }


def share(module: nn.Module) -> Decoder:
    """Create a decoder for a transformers causal language model, on storage that both use from now
    on. If PEFT has put a LoRA adapter into the model, the decoder has it, too, on or off as PEFT
    says.

    In addition to the model, this needs the memory of one layer (or of the embeddings, if they are
    larger).

    Raises:
        TypeError: `module` is not a transformers model, or its parameters are sharded, or of
            several dtypes or on several devices.
        ValueError: the decoder does not support the model's family or a feature, or the model has
            parameters that its family does not (a head of another task), or an adapter that is not
            plain LoRA; the message lists them. The model is then unchanged.
    """
    parsed = shared_config(module)
    followed = peft_adapter(module, parsed)
    parameters = _parameters(module, followed)
    kinds = {(p.dtype, p.device) for p in parameters.values()}
    if len(kinds) != 1:
        remedy = (
            "; PEFT makes adapters of a low-precision model float32: load the model in float32, or "
            "get_peft_model(..., autocast_adapter_dtype=False)"
        )
        raise TypeError(
            "from_module: expected parameters of one dtype on one device, got "
            f"{', '.join(sorted(f'{d} on {where}' for d, where in kinds))}"
            f"{remedy if followed is not None else ''}"
        )
    ((dtype, device),) = kinds
    if device.type == "meta" or any(type(p.data) is not Tensor for p in parameters.values()):
        raise TypeError(
            "from_module: expected ordinary tensors in memory; shard, quantise or off-load after "
            "from_module, or not at all"
        )
    parsed = _with_its_frequencies(module, parsed)
    decoder = Decoder(parsed, dtype=dtype, device="meta")
    if followed is not None:
        add_adapter(decoder, followed.lora)
        decoder.followed = followed
    _check_plain(module, decoder, followed)
    moved: set[str] = set()
    for part in (decoder, *decoder.layers):
        part.to_empty(device=device, recurse=part is not decoder)
        for name, view in shared_views(decoder).items():
            if view.device.type != "meta" and name not in moved:
                view.copy_(parameters[name].detach())
                # keeps the fused memory alive; the parameter's old memory goes
                parameters[name].data = torch.from_dlpack(view)
                moved.add(name)
    return decoder
