"""FlashAttention of other packages: whether the package flash-attn, or the one inside torch, is
installed and takes the arguments used here."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch


class Found(NamedTuple):
    """Function of another package. `knows`: the names of its parameters. `why_not`: why it is not
    available, or None."""

    function: Any
    knows: frozenset[str]
    why_not: str | None


def probe(module: str, function: str, needed: set[str]) -> Found:
    """Look for `function` in `module`, and check that it has parameters of all the `needed`
    names."""
    if torch.version.cuda is None and torch.version.hip is None:
        return Found(None, frozenset(), "this torch was built without CUDA")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return Found(None, frozenset(), f"{module}.{function} is not importable ({error})")
    known = frozenset(inspect.signature(found).parameters)
    missing = ", ".join(sorted(needed - known))
    why_not = (
        f"{module}.{function} of this version does not take {missing}; install a newer one"
        if missing
        else None
    )
    return Found(found, known, why_not)


FLASH_ATTN = probe(
    "flash_attn",
    "flash_attn_varlen_func",
    {"window_size", "softcap", "softmax_scale", "deterministic"},
)
TORCH_VARLEN = probe("torch.nn.attention.varlen", "varlen_attn", {"window_size", "scale"})
