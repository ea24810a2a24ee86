"""Code shared by the benches of rms_norm, swiglu and rope: their sizes, and a contest of an op,
forward alone or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from bench.harness import Random, agree, compiled, gradients, no_grad, on
from torch import Tensor


class Size(NamedTuple):
    N: int  # tokens
    H: int  # hidden
    F: int  # feed-forward
    Hq: int  # query heads
    Hkv: int  # key/value heads
    D: int  # head dim


# The sizes of stories260k and of models of 1.5 and 8 billion parameters.
SIZES = {
    "tiny": Size(4096, 64, 172, 8, 4, 8),
    "large": Size(2048, 1536, 8960, 12, 2, 128),
    "8b": Size(16384, 4096, 14336, 32, 8, 128),
}
F32, BF16 = torch.float32, torch.bfloat16
CASES = on(
    cpu=[(name, dtype) for name in ("tiny", "large") for dtype in (F32, BF16)],
    cuda=[("8b", BF16), ("large", BF16)],
)


def layer_cases(bench: Callable) -> Callable:
    """Runs `bench` for every size, dtype and direction."""
    return pytest.mark.parametrize("direction", ["forward", "forward+backward"])(
        pytest.mark.parametrize("size, dtype", CASES)(bench)
    )


def layer_contest(
    contest: Callable,
    name: str,
    shape: str,
    direction: str,
    ours: Mapping[str, Callable],
    eager: Callable,
    leaves: Sequence[Tensor],
    rest: tuple[Any, ...],
    forward_bytes: int,
    backward_bytes: int,
    others: Mapping[str, Callable] | None = None,
) -> None:
    """Every contestant maps (*leaves, *rest) to a tuple of tensors."""
    dtype = leaves[0].dtype
    contestants = {**ours, "eager": eager, "torch.compile": compiled(eager), **(others or {})}
    for leaf in leaves:
        leaf.requires_grad_()
    if direction == "forward":
        called = {who: no_grad(f, *leaves, *rest) for who, f in contestants.items()}
    else:
        with torch.no_grad():
            upstream = [Random(1).normal(*y.shape, dtype=y.dtype) for y in eager(*leaves, *rest)]
        called = {who: gradients(f, leaves, upstream, *rest) for who, f in contestants.items()}
    tolerance = 1e-5 if dtype == F32 else 5e-2
    contest(
        f"{name}, {direction}",
        shape,
        dtype,
        called,
        bytes_moved=forward_bytes + (backward_bytes if direction != "forward" else 0),
        same=agree(rtol=tolerance, of_max=tolerance),
    )
