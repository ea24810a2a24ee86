"""The engine: one weight copy that trains and generates. The names below are loaded when first used."""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "HybridActor": "fusedrl.engine.actor",
    "LoRAConfig": "fusedrl.engine.config",
    "PackedBatch": "fusedrl.engine.packing",
    "SamplingParams": "fusedrl.engine.generation.sampler",
    "Completion": "fusedrl.engine.generation.generator",
    "CacheConfig": "fusedrl.engine.generation.cache",
}
__all__ = ["CacheConfig", "Completion", "HybridActor", "LoRAConfig", "PackedBatch", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.config import LoRAConfig
    from fusedrl.engine.generation.cache import CacheConfig
    from fusedrl.engine.generation.generator import Completion
    from fusedrl.engine.generation.sampler import SamplingParams
    from fusedrl.engine.packing import PackedBatch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusedrl.engine' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
