"""The system's memory, on a CPU: huge pages for what lives long, and what was freed given back."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

_WORTH_IT = 256 << 20
_HUGE_PAGE = 2 << 20


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        return None


def give_back(freed: int) -> None:
    """Give free pages of the heap back to the system; `freed`: bytes that the caller has just let
    go of. Fewer than 256 MiB are kept: using such pages again is cheaper than getting them anew.
    glibc keeps blocks of up to 32 MiB when they are freed, such as gradients and moments made
    between them: a rollout that follows training would run beside a gigabyte that nobody uses. On
    CUDA torch's allocator has them for whoever asks next."""
    trim = _malloc_trim() if freed >= _WORTH_IT else None
    if trim is not None:
        trim(0)


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a CPU tensor that nobody has written yet: what is read here and
    there in many megabytes, such as a KV cache, is then found without a walk through the page
    tables. Advice: where a system has none, nothing is lost but time."""
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
