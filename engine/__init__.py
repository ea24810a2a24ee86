"""The engine: one weight copy that trains and generates. The names below are loaded when first
used."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _check_one_install() -> None:
    """Raise ImportError where `fusedrl.kernels` is not the one that was installed with this engine:
    `fusedrl` is a namespace, in which Python may take the engine of one install and the kernels of
    another."""
    spec = importlib.util.find_spec("fusedrl.kernels")
    places = spec.submodule_search_locations or () if spec is not None else ()
    # (some installs add hooks that are no folders)
    found = sorted({str(Path(place).resolve()) for place in places if Path(place).is_dir()})
    ours = str((Path(__file__).parent.parent / "kernels").resolve())
    if found != [ours]:
        raise ImportError(
            f"fusedrl: expected the kernels of this install, {ours}, got "
            f"{', '.join(found) or 'none'}: several "
            "installs of fusedrl lie on one path, and their parts would be mixed; remove the "
            "others (pip uninstall fusedrl "
            "until none is left, and look at PYTHONPATH), then install the one you want"
        )


_check_one_install()

_HOMES = {
    "HybridActor": "fusedrl.engine.actor",
    "LoRAConfig": "fusedrl.engine.config",
    "PackedBatch": "fusedrl.engine.base.packing",
    "SamplingParams": "fusedrl.engine.generation.sampler",
    "Completion": "fusedrl.engine.base.completion",
    "CacheConfig": "fusedrl.engine.generation.cache",
    "Drafts": "fusedrl.engine.generation.drafts",
}
__all__ = [
    "CacheConfig",
    "Completion",
    "Drafts",
    "HybridActor",
    "LoRAConfig",
    "PackedBatch",
    "SamplingParams",
    "__version__",
]

if TYPE_CHECKING:
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.base.completion import Completion
    from fusedrl.engine.base.packing import PackedBatch
    from fusedrl.engine.config import LoRAConfig
    from fusedrl.engine.generation.cache import CacheConfig
    from fusedrl.engine.generation.drafts import Drafts
    from fusedrl.engine.generation.sampler import SamplingParams


if not TYPE_CHECKING:  # else a checker would believe in every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(
                f"module 'fusedrl.engine' has no attribute {name!r}; it has {', '.join(__all__)}"
            )
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
