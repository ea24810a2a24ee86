"""Operations of RLHF. Each has a module of its own: `from fusedrl.kernels.gae import gae`.

`dir(fusedrl.kernels)` names the modules; a module is imported when it is first used. The docstring
of a module (`help(fusedrl.kernels.gae)`) gives the formulas and their source, the shapes, and the
bytes read and written. `fusedrl doctor` lists the implementations of each operation that run on
this machine.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _modules() -> set[str]:
    return {
        found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")
    }


if not TYPE_CHECKING:  # else a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _modules():
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; it has "
                f"{', '.join(sorted(_modules()))}"
            )
        return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(_modules())


def _step_aside() -> None:
    """Let `import kernels` find Hugging Face's package `kernels`, which transformers imports. This
    folder hides that package when Python runs in the root of a checkout. If that package is not
    installed, look like a folder without code."""
    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(
        __name__, [place for place in sys.path if Path(place).resolve() != root]
    )
    if spec is None or spec.loader is None or not spec.has_location:
        del globals()["__file__"]  # transformers recognises a package by this attribute
        return
    sys.modules[__name__] = meant = module_from_spec(spec)
    spec.loader.exec_module(meant)


if __name__ == "kernels":
    _step_aside()
