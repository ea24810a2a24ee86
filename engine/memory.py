"""Memory that the process has freed, given back to the system."""
from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_WORTH_IT = 256 << 20


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError):
        return None


def give_back(freed: int) -> None:
    """Give free pages of the heap back to the system; `freed`: bytes that the caller has just let go of. Fewer than 256 MiB are kept: using such pages again is
    cheaper than getting them anew. glibc keeps blocks of up to 32 MiB when they are freed, such as gradients and moments made between them: a rollout that
    follows training would run beside a gigabyte that nobody uses. On CUDA torch's allocator has them for whoever asks next."""
    trim = _malloc_trim() if freed >= _WORTH_IT else None
    if trim is not None:
        trim(0)
