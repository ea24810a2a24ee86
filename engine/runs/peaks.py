"""Peak memory of the parts of a step: of torch on a GPU, of the process on a CPU."""

from __future__ import annotations

import os
from contextlib import suppress

import torch


class Peaks:
    """Peak memory of the parts of a step, in GiB. Parts may lie in one another.

    On a GPU and on Linux the mark of the most is set back at each border, so that nothing in
    between is missed. Where Linux refuses that, as in some containers, the memory at the borders
    counts. On other systems a CPU's parts are not measured.

    Attributes:
        most: the most so far, of all parts.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._open: list[float] = []
        self._found: dict[str, float] = {}
        self._system = None if torch.cuda.is_available() else _System()

    def enter(self) -> None:
        """Begin a part."""
        now = self._mark()
        keeps_mark = self._system is None or self._system.keeps_mark
        self._open.append(0.0 if keeps_mark else now)

    def leave(self, name: str) -> None:
        """End the part that began last."""
        self._mark()
        peak = self._open.pop()
        if self._open:
            self._open[-1] = max(self._open[-1], peak)
        if peak:
            self._found[name] = max(peak, self._found.get(name, 0.0))

    def take(self) -> dict[str, float]:
        """Return the peaks of the parts since the last call, as metrics."""
        found, self._found = self._found, {}
        return {f"mem/{name}_gib": peak for name, peak in found.items()}

    def _mark(self) -> float:
        """Note and return the most since the last mark."""
        if self._system is not None:
            peak = self._system.peak() / 2**30
        else:
            peak = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        self.most = max(self.most, peak)
        if self._open:
            self._open[-1] = max(self._open[-1], peak)
        return peak


class _System:
    """Memory of this process by the system's own count."""

    def __init__(self) -> None:
        self._status = self._reset = -1
        with suppress(OSError):
            self._status = os.open("/proc/self/status", os.O_RDONLY)
            self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY)
            self.peak()

    @property
    def keeps_mark(self) -> bool:
        """Whether the system keeps a mark of the most that can be set back."""
        return self._reset >= 0

    def peak(self) -> int:
        """Return the bytes at the peak since the last call, or now where the system keeps no such
        mark; 0 where it says neither."""
        if self._status < 0:
            return 0
        text = os.pread(self._status, 4096, 0)
        name = b"VmHWM:" if self._reset >= 0 else b"VmRSS:"
        begin = text.find(name)
        if begin < 0:
            return 0
        if self._reset >= 0:
            try:
                os.write(self._reset, b"5")  # the peak begins anew from what is held now
            except OSError:
                os.close(self._reset)
                self._reset = -1
        return int(text[begin + len(name) :].split(None, 1)[0]) * 1024

    def __del__(self) -> None:
        for number in (self._status, self._reset):
            if number >= 0:
                os.close(number)
