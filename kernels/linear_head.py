"""What the heads over a vocabulary share: products in float32, and how much room a chunk of logits may take."""
from __future__ import annotations

import torch
from torch import Tensor

_MEBI = 1 << 20


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 at least."""
    if (narrow := _narrow(a, b)) is not None:
        return torch.mm(a.to(narrow), b.to(narrow), out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) @ b.to(wide)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b for a float32 `into`, in one product: there is no second tensor of its size."""
    if (narrow := _narrow(a, b)) is not None:
        torch.addmm(into, a.to(narrow), b.to(narrow), out_dtype=torch.float32, out=into)
    else:
        into.addmm_(a.to(into.dtype), b.to(into.dtype))


def _narrow(a: Tensor, b: Tensor) -> torch.dtype | None:
    """The dtype of two bytes that tensor cores take, where one of the two has it."""
    dtype = b.dtype if b.dtype.itemsize < a.dtype.itemsize else a.dtype
    return dtype if a.is_cuda and dtype.itemsize == 2 else None


def workspace(workspace_bytes: int | None, N: int, V: int) -> int:
    """Bytes for the chunk's float32 logits: those asked for, or the smaller of 256 MiB and an eighth of the full logits, but at least 4 MiB."""
    return max(4 * _MEBI, min(256 * _MEBI, N * V * 4 // 8)) if workspace_bytes is None else workspace_bytes
