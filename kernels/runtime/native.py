"""The compiled CPU kernels: the build that was loaded, or the reason why none was.

`setup.py` builds the same sources once per vector capability: for all capabilities in a wheel, for
only that of this machine in an install in place. The build for torch's own capability is loaded
(`torch.backends.cpu.get_cpu_capability()`, which honours ATEN_CPU_CAPABILITY), or else a narrower
one.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch  # (the extension links against libtorch, which must be loaded first)

from fusedrl.kernels.runtime.sources import expected

_KERNELS = Path(__file__).parent.parent
_ORDER = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


def _load() -> tuple[str | None, str]:
    reasons, here, wanted = [], torch.backends.cpu.get_cpu_capability(), expected(_KERNELS)
    for name in (fitting := _ORDER.get(here, ("default",))):
        try:
            built = importlib.import_module(f"fusedrl.kernels._C_{name}")
        except ImportError as error:
            reasons.append(f"_C_{name}: {error}")
            continue
        if wanted is None or getattr(built, "sources", None) == wanted:
            return name, ""
        reasons.append(
            f"_C_{name}: {built.__file__} was built from other C++ sources than those of "
            f"{_KERNELS}: an older build, or another "
            "install of fusedrl on the same path; rebuild (`make venv`, or `python setup.py "
            "build_ext --inplace`), or remove the other one"
        )
    wider = [
        name
        for name in _ORDER["AVX512"]
        if name not in fitting and importlib.util.find_spec(f"fusedrl.kernels._C_{name}")
    ]
    if wider:
        reasons.append(
            f"there is one for {' and '.join(wider)}, and torch finds {here} here; reinstall "
            "fusedrl on this machine"
        )
    return None, "; ".join(reasons)


capability, reason = _load()
"""`capability` is "avx512", "avx2", "default" or None; `reason` says why it is None."""
