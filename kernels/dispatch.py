"""Which implementation serves a call: one table per op, resolved in one place.

An op declares what it has, best first for each device type:

    _IMPLS = Implementations("logprob", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))

`choose` returns a name. One asked for by `impl=` or `use_impl` must be able to run or the call raises; nothing falls back silently.
FUSEDRL_IMPL names a preference for a whole run: it applies to the ops that have that implementation, and the others use their default.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from fusedrl.kernels import attention_flash, native, nvrtc

NAMES = ("torch", "cpp", "triton", "cuda", "flash_attn", "torch_varlen")
_preferred = os.environ.get("FUSEDRL_IMPL") or None
if _preferred not in (None, *NAMES):
    raise ValueError(f"FUSEDRL_IMPL: expected one of {', '.join(NAMES)}, got {_preferred!r}; unset it for the default of each device")
_forced: str | None = None


def _why_not_triton(device_type: str) -> str | None:
    try:
        import triton  # noqa: F401  (available means that the import worked)
    except ImportError as error:
        return f"triton is not importable ({error})"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "triton needs a CUDA device, or TRITON_INTERPRET=1 set before it is imported"


# (implementation, device type) -> why it cannot run here, None when it can. Filled once, so that torch.compile sees constants.
_WHY_NOT: dict[tuple[str, str], str | None] = {
    ("torch", "cpu"): None,
    ("torch", "cuda"): None,
    ("cpp", "cpu"): None if native.capability else f"the native extension is not built ({native.reason})",
    ("cpp", "cuda"): "the C++ kernels serve CPU tensors only",
    ("triton", "cpu"): _why_not_triton("cpu"),
    ("triton", "cuda"): _why_not_triton("cuda"),
    ("cuda", "cpu"): "the CUDA C++ kernels serve CUDA tensors only",
    ("cuda", "cuda"): nvrtc.why_not(),
    ("flash_attn", "cpu"): "FlashAttention serves CUDA tensors only",
    ("flash_attn", "cuda"): attention_flash.why_not_flash_attn,
    ("torch_varlen", "cpu"): "FlashAttention serves CUDA tensors only",
    ("torch_varlen", "cuda"): attention_flash.why_not_torch_varlen,
}


def unavailable(name: str, device_type: str) -> str | None:
    """Why implementation `name` cannot run on `device_type` ("cpu" or "cuda") on this machine; None when it can."""
    return _WHY_NOT.get((name, device_type), f"there is no implementation called {name!r} for it")


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Within the block every op of this process uses implementation `name`, or raises CannotServe."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class CannotServe(RuntimeError):
    """The implementation that was asked for does not serve this call, or does not run on this machine."""


@dataclass(frozen=True)
class Implementations:
    """What one op has: implementation names per device type, best first."""

    op: str
    cpu: tuple[str, ...]
    cuda: tuple[str, ...]
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.cpu) | frozenset(self.cuda))

    def choose(self, device: torch.device, impl: str | None = None, refused: Mapping[str, str] = MappingProxyType({})) -> str:
        """Name of the implementation for tensors on `device`. Raises CannotServe when the one asked for cannot run.

        `refused`: implementations that do not serve this very call (its dtype, its sizes), and why.
        """
        kind = "cuda" if device.type == "cuda" else "cpu"
        wanted = impl or _forced

        def why_not(name: str) -> str | None:
            return unavailable(name, kind) or refused.get(name)

        if wanted is None:
            if _preferred in self.names and why_not(_preferred) is None:
                return _preferred
            return next(name for name in (self.cuda if kind == "cuda" else self.cpu) if why_not(name) is None)
        why = why_not(wanted) if wanted in self.names else f"this op has {', '.join(n for n in NAMES if n in self.names)}"
        if why is not None:
            can = [name for name in NAMES if name in self.names and why_not(name) is None]
            raise CannotServe(f"{self.op}: implementation {wanted!r} cannot run on {device.type}: {why}; these can: {', '.join(can)}")
        return wanted
