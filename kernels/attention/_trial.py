"""Test whether an implementation of attention is correct on this GPU. Each is tried on a small
problem before its first call, once per process and device.

The problem: two sequences of unlike length, grouped heads; causal, with a window, not causal, and
with a softcap if the implementation supports one; forward and backward, in bfloat16. The bound: no
element may be farther from float64 than four times the worst element of the reference in the same
dtype. FlashAttention's own tests allow two and three times. A missing mask, a wrong row or a window
off by one exceeds the bound by far, and NaN exceeds every bound. The test runs in a separate
thread, because gradient mode, autocast, the hooks of checkpointing and the tracer of torch.compile
belong to a thread. So a backend's first call may come from inside any of these.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Form = tuple[bool, int | None, float | None]  # causal, window, softcap
Route = Callable[
    [Tensor, Tensor, Tensor, Tensor, int, bool, int | None, float | None, float], Tensor
]  # q, k, v, cu_seqlens, max_length, form, scale
_LENGTHS, _HEADS, _HEAD_DIM, _SCALE, _WITHIN = (37, 70), (4, 2), 32, 0.25, 4.0
_FORMS: tuple[Form, ...] = (
    (True, None, None),
    (True, 9, None),
    (False, None, None),
    (True, None, 4.0),
)
_found: dict[tuple[str, str], str | None] = {}  # (backend, device) -> what is wrong with it there
_lock = threading.Lock()


def fault(
    name: str, device: str, route: Route, reference: Callable[..., Tensor], capped: bool
) -> str | None:
    """Test a backend on `device`, once. Return None if it agrees with `reference`
    (`varlen_attention_reference`). Otherwise warn once, and return why it must not be used there.

    Args:
        capped: True if the backend supports a softcap.
    """
    with _lock:
        if (name, device) not in _found:
            if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
                return (
                    "it was not tried on this device yet, and a CUDA graph is being captured: "
                    "make a call before"
                )
            _found[name, device] = why = _in_a_thread(
                device, route, reference, [form for form in _FORMS if form[2] is None or capped]
            )
            if why is not None:
                warnings.warn(
                    f"varlen_attention: {name} is not used on {device}: {why}",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return _found[name, device]


def _in_a_thread(*arguments: Any) -> str | None:
    outcome: list[str | None] = ["trying it did not come to an end"]

    def run() -> None:
        outcome[0] = _fault(*arguments)

    thread = threading.Thread(target=run, name="fusedrl-try-attention")
    thread.start()
    thread.join()
    return outcome[0]


def _fault(
    device: str, route: Route, reference: Callable[..., Tensor], forms: list[Form]
) -> str | None:
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(_LENGTHS), heads, _HEAD_DIM, generator=draw).bfloat16()
        for heads in (_HEADS[0], _HEADS[1], _HEADS[1], _HEADS[0])
    ]
    ends = torch.tensor([0, *_LENGTHS]).cumsum(0).int()
    for causal, window, softcap in forms:
        options = {"causal": causal, "window": window, "softcap": softcap, "scale": _SCALE}
        try:
            with (
                torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext()
            ):
                arguments = (ends.to(device), max(_LENGTHS), causal, window, softcap, _SCALE)
                got = _passes(route, inputs, torch.bfloat16, device, *arguments)
        except Exception as error:  # an error of any kind in a backend: do not use it
            return (
                f"on a small problem, {options}, it raised {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            )
        exact, naive = (
            _passes(reference, inputs, dtype, "cpu", ends, **options)
            for dtype in (torch.float64, torch.bfloat16)
        )
        for what, ours, want, other in zip(
            ("the output", "the gradient of q", "the gradient of k", "the gradient of v"),
            got,
            exact,
            naive,
            strict=True,
        ):
            off, allowed = (
                (ours - want).abs().max().item(),
                _WITHIN * (other - want).abs().max().item(),
            )
            if not off <= allowed:
                return (
                    f"on a small problem, {options}, {what} is off by {off:.3g}, where "
                    f"{allowed:.3g} is allowed"
                )
    return None


def _passes(
    attention: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    device: str,
    *rest: Any,
    **options: Any,
) -> list[Tensor]:
    """Run `attention` and return its output and the gradients of q, k and v, in float64 on the
    CPU."""
    *leaves, upstream = (x.to(device, dtype).detach() for x in inputs)
    for x in leaves:
        x.requires_grad_()
    o = attention(*leaves, *rest, **options)
    if not isinstance(o, Tensor) or o.shape != upstream.shape or o.dtype != dtype:
        raise TypeError(
            f"expected {dtype} {list(upstream.shape)}, got "
            f"{f'{o.dtype} {list(o.shape)}' if isinstance(o, Tensor) else type(o).__name__}"
        )
    return [x.detach().cpu().double() for x in (o, *torch.autograd.grad(o, leaves, upstream))]
