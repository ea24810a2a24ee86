"""Choice of the implementation for a call, from one table per op.

An op declares its implementations, best first for each device type:

    _IMPLS = Implementations("logprob", cpu=("cpp", "torch", "triton"), cuda=("triton", "torch"))

`choose` returns the name of an implementation. If `impl=` or `use_impl` names one that cannot run,
the call raises. No fallback is silent: if the default is missing on this machine, one warning gives
the reason and the remedy. The environment variable FUSEDRL_IMPL names a preference for a whole run.
It applies to the ops that have this implementation; the other ops use their default.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from fusedrl.kernels.runtime import flash, native, nvrtc, triton

NAMES = ("torch", "cpp", "triton", "cuda", "flash_attn", "torch_varlen")
_preferred = os.environ.get("FUSEDRL_IMPL") or None
if _preferred not in (None, *NAMES):
    raise ValueError(
        f"FUSEDRL_IMPL: expected one of {', '.join(NAMES)}, got {_preferred!r}; unset it for the "
        "default of each device"
    )
_forced: str | None = None


def _why_not_triton(device_type: str) -> str | None:
    if triton.fault is not None:
        return triton.fault
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "triton needs a CUDA device, or TRITON_INTERPRET=1 set before it is imported"


# (implementation, device type) -> why it cannot run on this machine, or None if it can. Filled
# once, so that torch.compile sees constants.
_WHY_NOT: dict[tuple[str, str], str | None] = {
    ("torch", "cpu"): None,
    ("torch", "cuda"): None,
    ("cpp", "cpu"): None
    if native.capability
    else f"the native extension is not built ({native.reason})",
    ("cpp", "cuda"): "the C++ kernels serve CPU tensors only",
    ("triton", "cpu"): _why_not_triton("cpu"),
    ("triton", "cuda"): _why_not_triton("cuda"),
    ("cuda", "cpu"): "the CUDA C++ kernels serve CUDA tensors only",
    ("cuda", "cuda"): nvrtc.why_not(),
    ("flash_attn", "cpu"): "FlashAttention serves CUDA tensors only",
    ("flash_attn", "cuda"): flash.FLASH_ATTN.why_not,
    ("torch_varlen", "cpu"): "FlashAttention serves CUDA tensors only",
    ("torch_varlen", "cuda"): flash.TORCH_VARLEN.why_not,
}


# The remedy for a missing implementation, if every machine of its kind can have it. FlashAttention
# is optional, so it has no entry.
_REMEDIES = {
    (
        "cpp",
        "cpu",
    ): "ops run on torch alone, 5x to 100x slower; install a C++ compiler (Debian: apt-get install "
    "g++ python3-dev) and reinstall fusedrl, or "
    "see `fusedrl doctor`",
    (
        "triton",
        "cuda",
    ): "ops run on torch alone, several times slower and with more memory; pip install triton, or "
    "see `fusedrl doctor`",
    (
        "cuda",
        "cuda",
    ): "ops that have CUDA C++ run on Triton or torch; pip install 'fusedrl[cuda]', or see "
    "`fusedrl doctor`",
}
_told: set[tuple[str, str]] = set()


def _tell_of_lack(name: str, kind: str) -> None:
    """Warn, once per process, that the default implementation `name` is missing on this machine."""
    if (
        (name, kind) in _REMEDIES
        and (name, kind) not in _told
        and not torch.compiler.is_compiling()
    ):
        _told.add((name, kind))
        warnings.warn(
            f"fusedrl: {unavailable(name, kind)}: {_REMEDIES[name, kind]}",
            RuntimeWarning,
            stacklevel=4,
        )


def unavailable(name: str, device_type: str) -> str | None:
    """Return why implementation `name` cannot run on `device_type` ("cpu" or "cuda") on this
    machine, or None if it can."""
    return _WHY_NOT.get((name, device_type), f"there is no implementation called {name!r} for it")


@contextlib.contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Make every op of this process use implementation `name` within the `with` block. Ops that
    cannot use it raise CannotServe."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class CannotServe(RuntimeError):
    """Error: the requested implementation does not support this call, or does not run on this
    machine."""


@dataclass(frozen=True)
class Implementations:
    """Table of an op's implementations: names per device type, best first."""

    op: str
    cpu: tuple[str, ...]
    cuda: tuple[str, ...]
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(self.cpu) | frozenset(self.cuda))

    def choose(
        self,
        device: torch.device,
        impl: str | None = None,
        refused: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Return the name of the implementation for tensors on `device`. Raise CannotServe if the
        requested one cannot run.

        `refused`: maps implementations that do not support this call (its dtype, its sizes) to the
        reason.
        """
        kind = "cuda" if device.type == "cuda" else "cpu"
        wanted = impl or _forced
        # within torch.func.jvp and dual levels only torch's own operations carry a tangent
        forward_mode = torch.autograd.forward_ad._current_level >= 0

        def why_not(name: str) -> str | None:
            if forward_mode and name != "torch":
                return "it has no forward-mode derivative"
            return unavailable(name, kind) or refused.get(name)

        if wanted is None:
            if _preferred in self.names and why_not(_preferred) is None:
                return _preferred
            for name in self.cuda if kind == "cuda" else self.cpu:
                if why_not(name) is None:
                    return name
                if unavailable(name, kind) is not None:
                    _tell_of_lack(name, kind)
            raise RuntimeError(
                f"{self.op}: nothing serves this call on {device.type}: "
                + "; ".join(f"{n}: {why_not(n)}" for n in sorted(self.names))
            )
        why = (
            why_not(wanted)
            if wanted in self.names
            else f"this op has {', '.join(n for n in NAMES if n in self.names)}"
        )
        if why is not None:
            can = [name for name in NAMES if name in self.names and why_not(name) is None]
            raise CannotServe(
                f"{self.op}: implementation {wanted!r} cannot run on {device.type}: {why}; these "
                f"can: {', '.join(can)}"
            )
        return wanted
