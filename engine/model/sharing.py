"""A transformers model and a decoder on one storage: whoever trains the model trains the decoder, and nothing is copied again.

`share` copies the model's weights once, a layer at a time, into fused storage, and points the model's own parameters at slices of it (the views of
`weights.hf_views`). The model goes on working as before: its parameters are the same objects, for its optimizer too. Each has a torch storage of its own
over its part of that memory, so that whoever saves the model (safetensors, accelerate, torch.save) sees tensors that share nothing and writes them all.
"""
from __future__ import annotations

import json
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import model_config
from fusedrl.engine.model.weights import hf_views


class Sharing:
    """Watches a model that lives in a decoder's storage."""

    def __init__(self, module: nn.Module, decoder: Decoder) -> None:
        self._module, self._decoder = module, decoder
        self._seen, self._steps = self._versions(), 0
        # Fused optimizers write without autograd's count, so optimizer steps are listened for.
        reference = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            sharing = reference()
            if sharing is not None:
                sharing._stepped(optimizer)

        def stepping(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            sharing = reference()
            if sharing is not None:
                sharing._check_gradients(optimizer)

        for hook in (register_optimizer_step_post_hook(stepped), register_optimizer_step_pre_hook(stepping)):
            weakref.finalize(self, hook.remove)

    def changed(self) -> bool:
        """Whether the weights were written to since the last call: by a `torch.optim` optimizer, or by an in-place operation that autograd counts
        (writes through `.data` are neither; `HybridActor.mark_updated` tells of those).

        Raises:
            RuntimeError: a parameter of the model no longer lies in the shared storage.
        """
        now = self._versions() + self._steps
        seen, self._seen = self._seen, now
        return now != seen

    def _stepped(self, optimizer: Optimizer) -> None:
        ours = {id(parameter) for parameter in self._module.parameters()}
        self._steps += any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """Fused optimizers pair values by their place in memory. Autograd lays a gradient out as its parameter; who assigns one may not, and a parameter
        of [in, out] is a transposed view here."""
        fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
        for name, p in self._module.named_parameters() if fused else ():
            if id(p) in fused and p.grad is not None and any(a != b for a, b, size in zip(p.grad.stride(), p.stride(), p.shape, strict=True) if size > 1):
                raise RuntimeError(f"HybridActor: the gradient of {name} has strides {p.grad.stride()} but the parameter {p.stride()}, and a fused optimizer "
                                   "would pair the wrong values; write gradients with p.grad.copy_, or use fused=False")

    def _versions(self) -> int:
        found, views = dict(self._module.named_parameters()), hf_views(self._decoder)
        for name, view in views.items():
            parameter = found.get(name)
            if parameter is None or parameter.data_ptr() != view.data_ptr() or parameter.stride() != view.stride() or parameter.shape != view.shape \
                    or parameter.dtype != view.dtype:
                raise RuntimeError(f"HybridActor: {name} of the shared model no longer lies in the storage that it generates from (the model was cast, moved, "
                                   "wrapped, or loaded with assign=True); change weights in place, or build a new actor with from_module")
        return sum(found[name]._version for name in views)


def share(module: nn.Module) -> tuple[Decoder, Sharing]:
    """A decoder for a transformers causal language model, on storage that both use from now on.

    Beyond the model itself this takes the memory of one layer (of the embeddings, if they are larger).

    Raises:
        TypeError: no transformers model, or parameters of several dtypes or devices, or sharded ones. ValueError: a family or feature that the decoder
        does not have, or parameters that the family does not have (an adapter, a head of another task); the message lists them. Nothing is changed then.
    """
    config = getattr(module, "config", None)
    if not isinstance(module, nn.Module) or not hasattr(config, "to_json_string"):
        raise TypeError(f"from_module: expected a transformers model such as AutoModelForCausalLM gives, got {type(module).__name__}")
    raw = json.loads(cast(Any, config).to_json_string(use_diff=False))
    generation = getattr(module, "generation_config", None)
    parsed = model_config({key: value for key, value in raw.items() if key not in ("_name_or_path", "transformers_version")},
                          json.loads(generation.to_json_string()) if generation is not None else None)
    parameters = dict(module.named_parameters())
    kinds = {(p.dtype, p.device) for p in parameters.values()}
    if len(kinds) != 1:
        raise TypeError(f"from_module: expected parameters of one dtype on one device, got {', '.join(sorted(f'{d} on {where}' for d, where in kinds))}")
    (dtype, device), = kinds
    if device.type == "meta" or any(type(p.data) is not Tensor for p in parameters.values()):
        raise TypeError("from_module: expected ordinary tensors in memory; shard, quantise or off-load after from_module, or not at all")
    decoder = Decoder(parsed, dtype=dtype, device="meta")
    wanted = hf_views(decoder)
    if reordered := [name for name, view in wanted.items() if view.ndim > 2]:
        raise ValueError(f"from_module: {parsed.family.name} orders the rows of {reordered[0]} as no view of the fused projection can; load its directory with "
                         "from_pretrained, and train the actor's own parameters")
    problems = [f"missing: {name}" for name in wanted if name not in parameters] + [f"unexpected: {name}" for name in parameters if name not in wanted]
    problems += [f"shape of {name}: expected {list(view.shape)}, got {list(parameters[name].shape)}" for name, view in wanted.items()
                 if name in parameters and parameters[name].shape != view.shape]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"from_module: the parameters are not those of a plain {parsed.family.name} language model:\n  {shown}")
    moved: set[str] = set()
    for part in (decoder, *decoder.layers):
        part.to_empty(device=device, recurse=part is not decoder)
        for name, view in hf_views(decoder).items():
            if view.device.type != "meta" and name not in moved:
                view.copy_(parameters[name].detach())
                parameters[name].data = torch.from_dlpack(view)  # keeps the fused memory alive; the parameter's old memory goes
                moved.add(name)
    return decoder, Sharing(module, decoder)
