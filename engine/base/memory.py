"""Memory of the system, on a CPU: huge pages for long-lived tensors, and freed memory given back.
Amounts of memory, as text."""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedrl.engine.base.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_WORTH_IT = 256 << 20
_HUGE_PAGE = 2 << 20
_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        return None


def give_back(freed: int) -> None:
    """Give free pages of the heap back to the system. `freed` is the number of bytes that the
    caller has just freed; below 256 MiB nothing is given back, since using such pages again is
    cheaper than getting new ones.

    glibc keeps blocks of up to 32 MiB when they are freed, such as gradients and optimizer moments.
    Without this call, up to a gigabyte of unused memory would stay allocated during the rollout
    that follows training. On CUDA torch's allocator reuses freed memory itself."""
    trim = _malloc_trim() if freed >= _WORTH_IT else None
    if trim is not None:
        trim(0)


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask the system to use huge pages for a CPU tensor that has not been written yet. Scattered
    reads from a large tensor, such as a KV cache, then need fewer lookups in the page tables. A
    system without huge pages ignores the request, and reads are only slower."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or tensor.device.type != "cpu":
        return
    begin, end = (
        -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE,
        (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE,
    )
    if end > begin:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice)
        )


def format_bytes(count: int) -> str:
    """Write a number of bytes in GiB, or in MiB below 0.1 GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"


def parse_memory(text: str) -> int:
    """Convert an amount such as "8GiB", "512 MiB", "16GB" or a plain number to bytes.

    Raises:
        ConfigError: `text` is not such an amount, or is not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None or not (amount := int(float(match[1]) * unit)):
        raise ConfigError(
            "plan: expected an amount of memory above 0 such as 8GiB, 512MiB, 16GB or a number of "
            f"bytes, got {text!r}"
        )
    return amount
