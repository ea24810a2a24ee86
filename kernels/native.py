"""The compiled CPU kernels: which build was loaded, or why none was.

`setup.py` builds the same sources once per vector capability. The choice follows torch's own
(`torch.backends.cpu.get_cpu_capability()`, which honours ATEN_CPU_CAPABILITY), falling back to narrower builds.
"""
from __future__ import annotations

import importlib

import torch  # (the extension links against libtorch, which must be loaded first)

_ORDER = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


def _load() -> tuple[str | None, str]:
    reasons = []
    for name in _ORDER.get(torch.backends.cpu.get_cpu_capability(), ("default",)):
        try:
            importlib.import_module(f"fusedrl.kernels._C_{name}")
            return name, ""
        except ImportError as error:
            reasons.append(f"_C_{name}: {error}")
    return None, "; ".join(reasons)


capability, reason = _load()
"""`capability` is "avx512", "avx2", "default" or None; `reason` says why it is None."""
