"""Beside: watches what a module computes with besides its parameters: classes, forwards, hooks,
numbers, buffers, configuration.

A decoder reads a model's parameters, but computes with its own functions, which equal those of
transformers' model with that configuration. If somebody adds something to a module, or changes it,
only the model or only the decoder would compute it. Such changes are:

    refused     another class; another number or function that a module holds (a norm's epsilon,
                attention's scale); another buffer (rotary frequencies); a configuration that makes
                the model compute differently
    adopted     changes of the configuration that do not affect computations: token ids that end a
                completion, what saving writes
    one warning forward hooks, a forward from elsewhere, dropout, autocast: most only observe, or
                are there on purpose

Not seen      functions replaced within a library's module (`modeling_llama.apply_rotary_pos_emb =
              ...`), what a hook or a forward of transformers, accelerate or TRL itself was told to
              do, and torch's global precision switches.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from fusedrl.engine.model.configuration import ModelConfig

# whose forwards compute what a model computes
_OWN = ("torch", "transformers", "accelerate", "trl", "peft", "fusedrl")
_LOOKING_ON = ("transformers", "accelerate", "trl")  # whose forward hooks change no value
_FREE = {
    "training",
    "gradient_checkpointing",
    "padding_idx",
    "layer_idx",
    "inplace",
    "max_seq_len_cached",
    "in_features",
    "out_features",
    "num_embeddings",
    "embedding_dim",
    "scale_grad_by_freq",
    "sparse",
    "norm_type",
    "elementwise_affine",  # change nothing
    "forward",
    "checkpoint_activations",
    "lora",
    "followed",
}  # are looked at elsewhere
_NUMBERS = (bool, int, float, str, tuple, type(None), types.FunctionType, functools.partial)
_GLOBAL_HOOKS = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)

_version = attrgetter("_version")


class Beside:
    """Watch over what the modules of a model (a tree) compute with. `where`: name of the tree in
    messages; `alone`: words in warnings that say which of model and actor does not run a hook."""

    def __init__(self, tree: nn.Module, where: str, alone: str) -> None:
        self._tree, self._where, self._alone = tree, where, alone
        self._classes = classes(tree)
        self._numbers = numbers(tree)
        self._buffers = {name: b.clone() for name, b in floating_buffers(tree)}
        self._warned: set[str] = set()
        self.take()

    def take(self) -> None:
        """Record the present modules of the tree, after checking them.

        Raises:
            RuntimeError: the modules compute with something else than the tree's first modules did.
        """
        self._check()
        parts = list(self._tree.modules())
        self._parts, self._types = parts, list(map(type, parts))
        self._hooks = [
            *_GLOBAL_HOOKS,
            *(hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)),
        ]
        self._hook_ids = list(chain.from_iterable(self._hooks))
        distinct = list(dict.fromkeys(self._types))
        self._calls: list[Callable[[], Any]] = [
            functools.partial(getattr, one, name)
            for one in distinct
            for name in ("forward", "__call__")
        ]
        self._called = [call() for call in self._calls]
        self._tables: list[dict[str, Any]] = [vars(part) for part in parts]
        self._forwards = [table.get("forward") for table in self._tables]
        found = [
            (table, key)
            for part, table in zip(parts, self._tables, strict=True)
            for key in _held(part)
        ]
        self._holders, self._keys = [table for table, _ in found], [key for _, key in found]
        self._held = list(map(getitem, self._holders, self._keys))
        buffers = dict(floating_buffers(self._tree))
        self._live = list(buffers.values())
        self._owners = [
            (self._tree.get_submodule(name.rpartition(".")[0])._buffers, name.rpartition(".")[2])
            for name in buffers
        ]
        self._kept = [self._buffers[name] for name in buffers]
        self._writes = list(map(_version, self._live))

    def look(self, deep: bool = False) -> None:
        """Check whether anything changed since `take`. With `deep`, also compare the memory of the
        buffers. Raise the errors of `take`."""
        if self._same() and not (deep and not all(map(torch.equal, self._live, self._kept))):
            return
        self.take()

    def expect(self) -> None:
        """Accept the present numbers of the modules as the expected ones."""
        self._numbers = numbers(self._tree)
        self.take()

    def _same(self) -> bool:
        try:
            return (
                list(map(type, self._parts)) == self._types
                and list(chain.from_iterable(self._hooks)) == self._hook_ids
                and list(map(getitem, self._holders, self._keys)) == self._held
                and [table.get("forward") for table in self._tables] == self._forwards
                and [call() for call in self._calls] == self._called
                and all(
                    owner[name] is b
                    for (owner, name), b in zip(self._owners, self._live, strict=True)
                )
                and list(map(_version, self._live)) == self._writes
            )
        except (KeyError, AttributeError):  # taken off
            return False

    def _check(self) -> None:
        if changed := differences(self._classes, classes(self._tree)):
            raise RuntimeError(
                f"HybridActor: {', '.join(changed[:4])} of {self._where} came, went or changed its "
                "class, and the actor computes as it did "
                "before; undo it, or build a new actor"
            )
        now = numbers(self._tree)
        for name, expected in self._numbers.items():
            for key, value in expected.items():
                if (found := now[name].get(key, _NONE)) is not value and _computing(
                    found
                ) != _computing(value):
                    raise RuntimeError(
                        f"HybridActor: {_dotted(name, key)} of {self._where} was {_shown(value)} "
                        f"and is {_shown(found)}, and the actor computes "
                        "with the former; set it back, or change the model's configuration, save "
                        "it, and load that"
                    )
        buffers = dict(floating_buffers(self._tree))
        for name, kept in self._buffers.items():
            b = buffers.get(name)
            if b is None or b.dtype != kept.dtype or not torch.equal(b.to(kept.device), kept):
                raise RuntimeError(
                    f"HybridActor: the buffer {name} of {self._where} is not what it was, and the "
                    "actor computes with what it was; restore it "
                    "(model.to(dtype) rounds it: load with dtype=...), or change the model's "
                    "configuration, save it, and load that"
                )
        self._warn()

    def _warn(self) -> None:
        """Warn, once for each, of functions that the model runs but the actor does not."""
        found = [
            ("every module", f"global forward hook {_named(hook)}")
            for hooks in _GLOBAL_HOOKS
            for hook in hooks.values()
            if not _looks_on(hook)
        ]
        found += [
            (name, what) for name, part in self._tree.named_modules() for what in _added(part)
        ]
        new = [
            (name or "the model", what)
            for name, what in found
            if f"{name}: {what}" not in self._warned
        ]
        self._warned |= {f"{name}: {what}" for name, what in found}
        autocast = [name for name, what in new if what == _AUTOCAST]
        if autocast and next(self._tree.parameters()).dtype == torch.float32:
            warnings.warn(
                f"HybridActor: {autocast[0]} computes under autocast (accelerate's mixed "
                "precision) and completions are drawn in float32: their "
                "log-probabilities differ by about 0.02 nats in the mean; load the model in "
                "bfloat16, or train in float32 "
                '(mixed_precision="no"; TRL sets bf16=True by itself, so give it bf16=False)',
                stacklevel=_outside(),
            )
        if new := [(name, what) for name, what in new if what != _AUTOCAST]:
            shown = "; ".join(f"{name}: {what}" for name, what in new[:4]) + (
                f"; and {len(new) - 4} more" if len(new) > 4 else ""
            )
            warnings.warn(
                f"HybridActor: {self._alone} what was added to {self._where}: {shown}. Where it "
                "changes what a module computes, sampler and trainer "
                "differ; take it off (set dropout to 0), or train through actor.forward and "
                "actor.logprobs",
                stacklevel=_outside(),
            )


_NONE, _AUTOCAST = "nothing", "autocast"


# ---- what a tree has -----------------------------------------------------------------------------
def classes(tree: nn.Module) -> dict[str, type]:
    """Return the class of every module by name, without the adapters, which are watched
    elsewhere."""
    return {
        name: type(part)
        for name, part in tree.named_modules(remove_duplicate=False)
        if not name.endswith(".lora")
    }


def differences(before: dict[str, type], now: dict[str, type]) -> list[str]:
    """Return the names of modules that were added or removed, or whose class changed."""
    return sorted(
        name or "the model"
        for name in before.keys() | now.keys()
        if before.get(name) is not now.get(name)
    )


def numbers(tree: nn.Module) -> dict[str, dict[str, Any]]:
    """Collect the numbers and functions that each module holds, except rates of dropout and those
    of adapters."""
    return {
        name: {
            key: vars(part)[key]
            for key in _held(part)
            if "dropout" not in key and not isinstance(part, nn.Dropout)
        }
        for name, part in tree.named_modules(remove_duplicate=False)
        if not name.endswith(".lora")
    }


def _computing(value: Any) -> Any:
    """Return a configuration without entries that do not affect any computation, such as the ids
    that end a completion. Return any other value unchanged."""
    if not isinstance(value, ModelConfig):
        return value
    return replace(
        value,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_ids=(),
        initializer_range=0.0,
        raw={},
        raw_generation=None,
    )


def _held(part: nn.Module) -> Iterator[str]:
    """Yield the names of attributes that a module may compute with. A whole model also has
    attributes for bookkeeping, so only its configuration is used."""
    whole = hasattr(part, "get_input_embeddings")
    for key, value in vars(part).items():
        if key == "config" or (
            not whole
            and not key.startswith("_")
            and key not in _FREE
            and isinstance(value, _NUMBERS)
        ):
            yield key


def floating_buffers(tree: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a model computes with, without masks. The frequencies of a dynamic
    rotary embedding are left out: it replaces them for texts longer than any here, and also keeps
    the original ones."""
    for name, b in tree.named_buffers():
        owner = tree.get_submodule(name.rpartition(".")[0])
        if b.is_floating_point() and not (
            getattr(owner, "rope_type", None) == "dynamic" and name.endswith(".inv_freq")
        ):
            yield name, b


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shown(value: Any) -> str:
    return (
        _named(value)
        if callable(value)
        else repr(value)
        if isinstance(value, _NUMBERS)
        else f"another {type(value).__name__}"
    )


# ---- whose functions they are --------------------------------------------------------------------
def _layers_of(function: Any) -> Iterator[Any]:
    """Yield a callable and the callables that it wraps, as far as its attributes show them."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, types.MethodType):
            function = function.__func__
        elif isinstance(function, functools.partial):
            function = function.func
        else:
            yield function
            attributes = getattr(function, "__dict__", {})
            function = attributes.get("_torchdynamo_orig_callable") or attributes.get("__wrapped__")


def _home(function: Any) -> str:
    """Return the module that contains a function's code, even if `__module__` names another one."""
    return str(getattr(function, "__globals__", {}).get("__name__") or type(function).__module__)


def _of(function: Any, packages: Iterable[str]) -> bool:
    return all(_home(one).partition(".")[0] in packages for one in _layers_of(function))


def _looks_on(hook: Any) -> bool:
    return _of(hook, _LOOKING_ON) and "neftune" not in _named(hook)


def _named(function: Any, packages: Iterable[str] = ()) -> str:
    """Return a function's module and name. If it wraps others, take the first that is not from one
    of these packages."""
    inner = next(
        one for one in _layers_of(function) if _home(one).partition(".")[0] not in packages
    )
    code = getattr(inner, "__code__", None)
    return f"{_home(inner)}.{type(inner).__qualname__ if code is None else code.co_qualname}"


def _added(part: nn.Module) -> Iterator[str]:
    """Yield what a module runs or draws that its class, in transformers or in this package, does
    not."""
    for hooks, what in (
        (part._forward_hooks, "forward hook"),
        (part._forward_pre_hooks, "forward pre-hook"),
    ):
        yield from (f"{what} {_named(hook)}" for hook in hooks.values() if not _looks_on(hook))
    forward = vars(part).get("forward", type(part).forward)
    for call in (forward, type(part).__call__):
        if not _of(call, _OWN):
            yield f"forward {_named(call, _OWN)}"
    if (
        name := getattr(vars(part).get("config"), "_attn_implementation", None)
    ) is not None and hasattr(part, "get_input_embeddings"):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = ALL_ATTENTION_FUNCTIONS.get(name)
        if attention is not None and not _of(attention, _OWN):
            yield f"attention {_named(attention)}"
    theirs = vars(part).get("_hf_hook")
    if theirs is not None and not type(theirs).__module__.startswith("accelerate."):
        yield f"forward by the hook {type(theirs).__module__}.{type(theirs).__qualname__}"
    if not type(part).__module__.startswith("fusedrl.") and any(
        _home(one).startswith("torch.amp") for one in _layers_of(forward)
    ):  # ours turn it off
        yield _AUTOCAST
    rates = (
        {"p": part.p}
        if isinstance(part, nn.Dropout)
        else {key: value for key, value in vars(part).items() if "dropout" in key}
    )
    yield from (
        f"{key} {rate} while it trains"
        for key, rate in rates.items()
        if isinstance(rate, float) and rate > 0
    )


def _outside() -> int:
    """Return the stack level of the code that called this package."""
    import sys

    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("fusedrl."):
        frame, level = frame.f_back, level + 1
    return level


# ---- a model as transformers builds it -----------------------------------------------------------
def plain(cls: type, config: Any) -> Any:
    """Build transformers' model of a configuration, without allocating memory."""
    fresh = copy.deepcopy(config)
    fresh._attn_implementation = "eager"
    with torch.device("meta"):
        return cls(fresh)


def unlike(
    module: nn.Module,
    reference: nn.Module,
    seen: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """List the classes and numbers in which a model differs from transformers' model of its
    configuration. Each entry gives both. `seen` returns what was found by module names without
    modules that are meant to be there."""
    theirs, ours = classes(reference), seen(classes(module))
    names = [name for name in differences(theirs, ours) if name != "the model"]
    if not isinstance(module, type(reference)):
        names.insert(0, "")
    found = [
        f"{name or 'the model'} is {_class(ours.get(name))}, expected {_class(theirs.get(name))}"
        for name in names
    ]
    now = seen(numbers(module))
    for name, expected in numbers(reference).items():
        for key, value in expected.items():
            got = now.get(name, {}).get(key, _NONE)
            if (
                key != "config"
                and not isinstance(value, functools.partial)
                and name not in names
                and got != value
            ):
                found.append(
                    f"{_dotted(name, key)} is {_shown(got)}, and {_shown(value)} by its "
                    "configuration"
                )
    return found


def _class(kind: type | None) -> str:
    return "nothing" if kind is None else f"{kind.__module__}.{kind.__qualname__}"
