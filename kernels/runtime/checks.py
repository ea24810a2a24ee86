"""Checks of tensor arguments. A pattern names the sizes of a tensor; a name must have the same
value in all tensors of a call. A mismatch prints the whole pattern.

    N, H, V = check("linear_logprob", {"hidden": (hidden, "N H"), "weight": (weight, "V H"),
        "token_ids": (token_ids, "N")})

Callers check dtypes and strides with `check_dtype` and `check_last_contiguous`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


LEAST_TEMPERATURE = 2.0**-126  # below it 1 / T is infinite in float32


def check_temperature(op: str, temperature: float) -> None:
    """Raise ValueError unless logits can be divided by `temperature` in float32."""
    if not temperature >= LEAST_TEMPERATURE:
        least = f" (at least {LEAST_TEMPERATURE:.2g})" if temperature > 0 else ""
        raise ValueError(
            f"{op}: expected a temperature above 0{least}, got {temperature}; for greedy scores "
            "use temperature=1.0"
        )


def describe(tensor: object) -> str:
    """Describe a tensor for an error message."""
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__} {tensor!r}"[:80]
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _parse(pattern: str) -> tuple[str | int, ...]:
    return tuple(int(symbol) if symbol.isdigit() else symbol for symbol in pattern.split())


# a decoding step checks two dozen tensors in a millisecond
_parsed = functools.lru_cache(maxsize=512)(_parse)


def check(op: str, arguments: Mapping[str, tuple[Tensor | None, str]]) -> tuple[int, ...]:
    """Check that the named sizes agree across tensors, and that all tensors are on one device.
    Return the sizes in order of first appearance.

    Args:
        op: name of the op, for error messages.
        arguments: maps a name to (tensor, pattern). A tensor of None is skipped. In a pattern such
            as "N V" or "N 2", a number is a fixed size.
    Raises:
        TypeError: an argument is not a tensor.
        ValueError: sizes or devices do not agree. The message lists every argument with its
            pattern.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    parse = _parse if torch.compiler.is_compiling() else _parsed
    for name, (tensor, pattern) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected a tensor for {name}, got {describe(tensor)}")
        symbols, shape, at = parse(pattern), tensor.shape, tensor.device
        device = device or at
        agrees = len(shape) == len(symbols) and at == device
        if agrees:
            for symbol, size in zip(symbols, shape, strict=True):
                agrees &= size == (
                    sizes.setdefault(symbol, size) if isinstance(symbol, str) else symbol
                )
        if not agrees:
            found = ", ".join(
                f"{n} [{p.replace(' ', ', ')}] = {describe(t)}"
                for n, (t, p) in arguments.items()
                if t is not None
            )
            raise ValueError(
                f"{op}: {name} does not fit its pattern [{pattern.replace(' ', ', ')}] with "
                f"{sizes}; arguments: {found}"
            )
    return tuple(sizes.values())


def check_dtype(op: str, name: str, tensor: Tensor | None, allowed: Iterable[torch.dtype]) -> None:
    """Raise TypeError unless `tensor` (None passes) has one of the `allowed` dtypes."""
    allowed = tuple(allowed)
    if tensor is not None and tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(
            f"{op}: expected {name} of dtype {names}, got {describe(tensor)}; convert it before "
            "the call"
        )


def check_last_contiguous(op: str, name: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless the last dimension of `tensor` has stride 1 (or at most one
    element)."""
    if tensor is not None and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: expected {name} with a contiguous last dimension, got strides "
            f"{tensor.stride()}; call .contiguous() on it"
        )


def refuse_double_backward(op: str) -> None:
    """Raise RuntimeError if a backward runs with create_graph. Call it in a backward whose
    gradients are computed by hand and carry no graph: a double backward would silently treat them
    as constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected one backward pass, got a double backward (create_graph=True), which "
            "this op does not have"
        )
