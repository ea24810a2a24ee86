"""Helpers for the ops with a head over a vocabulary: products in float32, the memory for a chunk of
logits, and the loop over tiles of the gradient of the logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusedrl.kernels.runtime.checks import FLOATS, check_dtype, check_temperature

_MEBI = 1 << 20


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 or float64."""
    if (narrow := _narrow(a, b)) is not None:
        return torch.mm(a.to(narrow), b.to(narrow), out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) @ b.to(wide)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the float32 tensor `into`, without a second tensor of its size."""
    if (narrow := _narrow(a, b)) is not None:
        torch.addmm(into, a.to(narrow), b.to(narrow), out_dtype=torch.float32, out=into)
    else:
        into.addmm_(a.to(into.dtype), b.to(into.dtype))


def _narrow(a: Tensor, b: Tensor) -> torch.dtype | None:
    """Return the two-byte dtype to use on tensor cores if `a` or `b` has one on CUDA, else None."""
    dtype = b.dtype if b.dtype.itemsize < a.dtype.itemsize else a.dtype
    return dtype if a.is_cuda and dtype.itemsize == 2 else None


ROWS = (
    1024  # of logits a chunk has on a GPU; with fewer, reading weight takes longer than a product
)


def workspace(
    workspace_bytes: int | None,
    N: int,
    V: int,
    device: torch.device | None = None,
    of_row: int = 4,
    gradients: int = 0,
) -> int:
    """Return the bytes for a chunk's logits: `workspace_bytes` if given.

    By default, on a CPU: the smaller of 256 MiB and an eighth of the full float32 logits, but at
    least 4 MiB. On a GPU (`device`): 1,024 rows of `of_row` bytes a logit, and 2,048 rows of
    `gradients` bytes a logit; fewer rows if N is smaller.
    """
    if workspace_bytes is not None:
        return workspace_bytes
    if device is None or device.type == "cpu":
        return max(4 * _MEBI, min(256 * _MEBI, N * V * 4 // 8))
    columns = -(-V // 64) * 64
    return max(4 * _MEBI, columns * (min(N, ROWS) * of_row + min(N, 2 * ROWS) * gradients))


def largest_workspace(N: int, V: int, itemsize: int) -> int:
    """Return the bytes for the logits of N rows and all their gradients, of `itemsize` bytes."""
    return N * (-(-V // 64) * 64) * (4 + itemsize)


KEPT_BYTES = 64 * _MEBI


def keeps_logits(workspace_bytes: int | None, kept_bytes: int) -> bool:
    """Whether the C++ implementations store `kept_bytes` of logits for the backward pass instead of
    computing them again. They do so if all logits fit into `workspace_bytes` (64 MiB if None)."""
    return kept_bytes <= (KEPT_BYTES if workspace_bytes is None else workspace_bytes)


def tile_of(elements: int, A: int, V: int) -> tuple[int, int]:
    """Return the rows and columns of a tile of at most `elements` logits (at least one). The tile
    is as square as A and V allow, and its columns fill whole cache lines."""
    R = max(1, min(A, math.isqrt(elements)))
    C = max(1, min(V, elements // R))
    C -= C % 64 if 64 < C < V else 0
    return max(1, min(A, elements // C)), C


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    index_A: Tensor,
    tile: tuple[int, int],
    of_rows: Callable[[Tensor, Tensor], Callable[[slice], Tensor]],
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of hidden, weight and bias from those of the logits, one tile of logits
    at a time. Rows not in `index_A` have no gradient.

    `of_rows(index_R, hidden_RH)` prepares some rows. It returns a function that maps a slice of the
    vocabulary to the gradient [R, C] of the rows' logits there. Sums over tiles are float32. A
    square tile is best: the sums for hidden pass through memory V / C times, those for weight A / R
    times. Gradients that are not requested are empty.
    """
    (R, C), A, V = tile, index_A.numel(), weight.shape[0]
    # with one block of rows there is no sum over blocks
    wide = torch.float32 if A > R else weight.dtype
    hidden_grad = (
        torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if for_hidden
        else hidden.new_empty(0)
    )
    weight_grad = weight.new_empty(weight.shape if for_weight else 0, dtype=wide)
    bias_grad = weight.new_empty(V if for_bias else 0, dtype=wide)
    if A == 0:
        weight_grad.zero_()
        bias_grad.zero_()
    for begin in range(0, A, R):
        index_R = index_A[begin : begin + R]
        hidden_RH = hidden[index_R]
        grad_RH = hidden.new_zeros(hidden_RH.shape if for_hidden else 0, dtype=torch.float32)
        gradient_of = of_rows(index_R, hidden_RH)
        for first in range(0, V, C):
            columns = slice(first, min(first + C, V))
            dz_RC = gradient_of(columns)
            if for_hidden:
                add_product(grad_RH, dz_RC, weight[columns])
            if for_weight and begin == 0:
                weight_grad[columns] = product(dz_RC.t(), hidden_RH)
            elif for_weight:
                add_product(weight_grad[columns], dz_RC.t(), hidden_RH)
            if for_bias and begin == 0:
                bias_grad[columns] = dz_RC.sum(0, dtype=torch.float32)
            elif for_bias:
                bias_grad[columns] += dz_RC.sum(0, dtype=torch.float32)
            del dz_RC  # before the next one is made
        if for_hidden:
            hidden_grad[index_R] = grad_RH.to(hidden.dtype)
    return hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype)


def check_head(
    op: str,
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    workspace_bytes: int | None,
) -> None:
    """Raise TypeError or ValueError for dtypes and numbers that no op with a head supports."""
    check_dtype(op, "hidden", hidden, FLOATS if impl == "torch" else FLOATS[:3])
    check_dtype(op, "weight", weight, (hidden.dtype,))
    check_dtype(op, "bias", bias, (hidden.dtype,))
    check_dtype(op, "token_ids", token_ids, (torch.int64, torch.int32))
    if isinstance(temperature, Tensor):
        check_dtype(op, "temperature", temperature, FLOATS)
    else:
        check_temperature(op, temperature)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: expected a softcap above 0 or None, got {softcap}")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"{op}: expected workspace_bytes above 0 or None, got {workspace_bytes}")
