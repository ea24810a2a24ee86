"""Every order in which threads can meet at their locks: `explore` runs a few threads over and over,
one of them at a time, and takes another way at each place where there was a choice.

    def scene(threads: Threads) -> Callable[[], None]:
        thing = Thing()                     # made with threads.lock in place of threading.Lock
        threads.start(lambda: thing.work())
        threads.start(lambda: thing.other())
        return lambda: check(thing)         # after all have ended

A thread pauses before it takes a lock, and with `within=True` after it has it. What lies between
two pauses is done without interruption: that is every order there is, as long as threads share
nothing but what their locks hold apart. A lock that is made with `interrupts=True` has one way more
at each wait: a KeyboardInterrupt in its place, also where the lock had just become free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_Lock, _Thread, _Semaphore = threading.Lock, threading.Thread, threading.Semaphore


class Deadlock(AssertionError):
    """No thread can go on, and not all have ended."""


class _Ended(BaseException):
    """Ends the threads of a run that is given up."""


class Lock:
    """Lock whose takers pause."""

    def __init__(self, threads: Threads, within: bool, gate: bool, interrupts: bool) -> None:
        self._threads, self._within, self.interrupts = threads, within, interrupts
        self._own, self.held = gate, False

    def acquire(self, blocking: bool = True) -> bool:
        if self._own:  # nobody else knows it yet
            self._own, self.held = False, True
            return True
        self._threads.pause(self if blocking else None)
        if self.held:  # not blocking, else it would still pause
            return False
        self.held = True
        if self._within:
            self._threads.pause(None)
        return True

    def release(self) -> None:
        if not self.held:
            raise RuntimeError("release unlocked lock")
        self.held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Threads:
    """The threads of one run. `ways`: which way to take at each choice; the first after those."""

    def __init__(self, ways: list[int]) -> None:
        self._ways, self.choices = ways, list[tuple[int, int]]()  # (taken, of how many)
        self._go: list[threading.Semaphore] = []
        self._back = _Semaphore(0)
        self._waits: list[Lock | None] = []
        self._interrupted: list[bool] = []
        self._ended: list[bool] = []
        self._errors: list[BaseException] = []
        self._giving_up = False
        self._mine = threading.local()

    def lock(self, within: bool = False, gate: bool = False, interrupts: bool = False) -> Any:
        """Return a lock. `gate`: its maker takes it before others know of it, without a pause."""
        return Lock(self, within, gate, interrupts)

    def start(self, work: Callable[[], None]) -> None:
        """Add a thread; it begins when `run` lets it."""
        number = len(self._go)
        self._go.append(_Semaphore(0))
        self._waits.append(None)
        self._interrupted.append(False)
        self._ended.append(False)

        def body() -> None:
            self._mine.number = number
            self._go[number].acquire()
            try:
                if not self._giving_up:
                    work()
            except _Ended:
                pass
            except BaseException as error:
                self._errors.append(error)
            self._ended[number] = True
            self._back.release()

        _Thread(target=body, daemon=True).start()

    def pause(self, lock: Lock | None) -> None:
        """Let others go on; come back when the lock is free, or raise an interrupt."""
        number = getattr(self._mine, "number", None)
        if number is None:
            return
        self._waits[number] = lock
        self._back.release()
        self._go[number].acquire()
        self._waits[number] = None
        if self._giving_up:
            raise _Ended
        if self._interrupted[number]:
            self._interrupted[number] = False
            raise KeyboardInterrupt

    def _step(self, number: int) -> None:
        self._go[number].release()
        self._back.acquire()

    def run(self) -> None:
        """Let the threads go on until all have ended."""
        for number in range(len(self._go)):  # up to their first pause nobody sees the others
            self._step(number)
        while not all(self._ended):
            able = []
            for number, lock in enumerate(self._waits):
                if self._ended[number]:
                    continue
                if lock is None or not lock.held:
                    able.append((number, False))
                if lock is not None and lock.interrupts:
                    able.append((number, True))
            if not able:
                self._give_up()
                raise Deadlock(f"{self._ended.count(False)} threads wait for ever")
            at = len(self.choices)
            way = self._ways[at] if at < len(self._ways) else 0
            self.choices.append((way, len(able)))
            number, interrupted = able[way]
            self._interrupted[number] = interrupted
            self._step(number)
        if self._errors:
            raise self._errors[0]

    def _give_up(self) -> None:
        self._giving_up = True
        for number, ended in enumerate(self._ended):
            if not ended:
                with suppress(RuntimeError):
                    self._step(number)


def explore(scene: Callable[[Threads], Callable[[], None]], most: int = 100_000) -> int:
    """Run a scene in every order. Return how many there were. What a thread or the check at the end
    raises goes through, as does a Deadlock; more than `most` orders are refused."""
    ways: list[int] = []
    for runs in range(1, most + 1):
        threads = Threads(ways)
        check = scene(threads)
        threads.run()
        check()
        taken = threads.choices
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        if not taken:
            return runs
        ways = [way for way, _ in taken]
        ways[-1] += 1
    raise ValueError(f"explore: expected at most {most} orders, got more; take fewer threads")
