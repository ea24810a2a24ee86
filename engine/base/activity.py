"""What a run is doing right now, for whoever shows it."""

from __future__ import annotations

import time


class Activity:
    """Counts of the work in progress. Loops write them at coarse points (a window of decoding
    steps, a micro-batch), and the terminal reads them from a thread of its own, so that a loop
    never waits.

    Attributes:
        phase: part of the step, as in the metric `timing/<phase>`; "" between two parts.
        name: what a loop within that part does, such as "generating"; "" if none has said.
        unit: what `done` and `total` count.
        tokens: tokens generated since `began`, in seconds of `time.perf_counter`.
        update: (number from 1, number of all) of the optimizer step in progress; None between two.
    """

    __slots__ = ("began", "done", "name", "phase", "tokens", "total", "unit", "update")

    def __init__(self) -> None:
        self.phase = ""
        self.update: tuple[int, int] | None = None
        self.begin("")

    def begin(self, name: str, unit: str = "", total: int = 0) -> None:
        """Begin to count `total` units of what `name` says."""
        self.name, self.unit, self.done, self.total, self.tokens = name, unit, 0, total, 0
        self.began = time.perf_counter()

    def enter(self, phase: str) -> str:
        """Begin a part of the step, and return the part that was in progress."""
        before, self.phase = self.phase, phase
        self.begin("")
        return before
