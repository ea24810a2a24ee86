"""Turns: a lock that threads get in the order in which they asked for it. A thread that generates
never waits for more than one step of each other thread."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """Lock that is handed out in order: `with turns:` waits for its turn. A thread that already has
    the turn is refused a second one. `try_enter` never waits, and may be called anywhere."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # held for a few instructions at a time
        self._holder: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        me, gate = threading.get_ident(), threading.Lock()
        gate.acquire()
        with self._mutex:
            if self._holder == me:
                raise RuntimeError(
                    "Generator: called from within one of its own steps, such as by a signal "
                    "handler; let the step come to its end first"
                )
            if self._holder is None:
                self._holder = me
                return
            self._waiting.append((me, gate))
        try:
            gate.acquire()
        except BaseException:  # an interrupt, while it waited or just as its turn came
            with self._mutex:
                waits = (me, gate) in self._waiting
                if waits:
                    self._waiting.remove((me, gate))
            if not waits:
                self.leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def try_enter(self) -> bool:
        """Take the turn if nobody has it. `leave` gives it back."""
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            if self._holder is not None:
                return False
            self._holder = threading.get_ident()
            return True
        finally:
            self._mutex.release()

    def leave(self) -> None:
        """Give the turn to the thread that has waited longest."""
        with self._mutex:
            self._holder = None
            if self._waiting:
                self._holder, gate = self._waiting.popleft()
                gate.release()
