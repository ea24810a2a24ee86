"""The processes of --devices, seen from the one that starts them: signals forwarded, and an end for
all of them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fusedrl.engine.base.errors import resume_command
from fusedrl.engine.runs.files import is_locked
from fusedrl.engine.runs.status import read_status, run_state, write_status
from fusedrl.engine.runs.terminal import say

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
GRACE = 30.0  # seconds in which the other ranks end by themselves, once one has failed
ENOUGH, LAST = 3, 5.0  # so many signals, and a rank that does not end in so many seconds is killed
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_STATES = {"T": "stopped", "t": "held by a debugger", "D": "waiting for a disk or a device"}


class Processes:
    """Processes that train together, each in a process group of its own.

    The third signal is the last word: what runs `LAST` seconds later is killed with all that it
    started. A rank that waits for one that was stopped, or that waits for a disk, hears no signal.

    Args:
        signals: names of signals to forward besides those that end a program.

    Attributes:
        first: number of the first signal that came; 0 before.
        killed: what is to be said of those that had to be killed; empty where there are none.
    """

    def __init__(self, signals: Sequence[str] = ()) -> None:
        self.first, self.killed = 0, ""
        self._count = self._heard = 0
        self._signals = tuple(dict.fromkeys((*FORWARDED, *signals)))
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # those that run, by rank
        self._started = False
        self._waiting: deque[int] = deque()  # signals that are not forwarded yet
        self._due, self._ways = math.inf, [self._ask, self._kill, self._give_up]

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Forward signals that this process receives within the block to the processes, and stop
        them where it is stopped from the terminal (Ctrl-Z)."""
        handlers = dict.fromkeys(self._signals, self._forward) | {"SIGTSTP": self._pause}
        before = {}
        for number, handler in ((signal.Signals[name], to) for name, to in handlers.items()):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, to in before.items():
                signal.signal(number, to)

    def start(self, commands: Sequence[Sequence[str]], env: Mapping[str, str]) -> None:
        """Start a process for each command, in the order of the ranks. A signal that comes while
        they start reaches all of them."""
        self._count = len(commands)
        for rank, words in enumerate(commands):
            # a group of its own: a terminal's Ctrl-C comes through here, once
            self._children[rank] = subprocess.Popen(words, env=env, process_group=0)
        self._started = True
        self._pass_on()

    def wait(self) -> int:
        """Wait for all processes; return the exit code of the first that failed, or 0. The others
        are ended where they do not end by themselves."""
        code = 0
        while self._children:
            for rank, child in list(self._children.items()):
                if (ended := child.poll()) is None:
                    continue
                del self._children[rank]
                if ended < 0 and not self.killed:
                    said = signal.Signals(-ended).name
                    say(f"fusedrl: rank {rank} of {self._count} was ended by {said}")
                if ended and not code:
                    code = self._code(ended)
                    self._due = min(self._due, time.monotonic() + GRACE)
            if self._children and time.monotonic() > self._due:
                self._due = math.inf
                self._ways.pop(0)()
            time.sleep(0.05)
        return code

    def _code(self, ended: int) -> int:
        if ended < 0 and self.killed and self.first:
            return 128 + self.first
        return 128 - ended if ended < 0 else ended

    # ---- signals ---------------------------------------------------------------------------------
    def _forward(self, number: int, _: object) -> None:
        self.first = self.first or number
        self._heard += 1
        self._waiting.append(number)
        if self._started:
            self._pass_on()
        if self._heard == ENOUGH:
            say(
                f"fusedrl: {signal.Signals(number).name}: the processes end at once; what still "
                f"runs in {LAST:g} s is killed"
            )
            self._due, self._ways = time.monotonic() + LAST, [self._kill, self._give_up]

    def _pass_on(self) -> None:
        while self._waiting:
            with contextlib.suppress(IndexError):  # a signal came here in between
                self._send(self._waiting.popleft())

    def _send(self, number: int) -> None:
        for child in list(self._children.values()):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def _send_groups(self, number: int) -> None:
        for child in list(self._children.values()):
            if child.poll() is None:  # else its number may be another's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)

    def _pause(self, *_: object) -> None:
        self._send_groups(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send_groups(signal.SIGCONT)

    # ---- the end of those that do not end --------------------------------------------------------
    def _ask(self) -> None:
        self._send(signal.SIGTERM)
        self._due = time.monotonic() + GRACE

    def _kill(self) -> None:
        left = self._named()
        why = f"{self._heard} signals" if self._heard >= ENOUGH else "the end of another rank"
        self.killed = f"what did not end after {why} was killed: {left}"
        say(f"fusedrl: {self.killed}")
        self._send_groups(signal.SIGKILL)
        self._due = time.monotonic() + LAST

    def _give_up(self) -> None:
        self.killed += f"; runs on all the same: {self._named()}"
        say(f"fusedrl: SIGKILL was sent, and the system has not ended {self._named()} yet")
        self._children.clear()

    def _named(self) -> str:
        """Return the ranks that run, and what keeps each."""
        return ", ".join(
            f"rank {rank} of {self._count} (pid {child.pid}{_state(child.pid)})"
            for rank, child in self._children.items()
        )


def _state(pid: int) -> str:
    """Return what keeps a process, as far as the system tells."""
    with contextlib.suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f", {_STATES[letter]}" if letter in _STATES else ""
    return ""


def tell_killed(processes: Processes, run_dir: str, named: str) -> None:
    """Write into a run's status.json that its processes had to be killed and how to go on with it,
    and say it. Neither is done where the run itself has said how it ended.

    Args:
        named: the run directory as the person who started the run names it.
    """
    state, told = run_state(run_dir), read_status(root := Path(run_dir))
    if state is None or told.get("state") in ("finished", "failed"):
        return
    next_ = (
        f"go on with: {resume_command(named)}"
        if state.resumes
        else "it has no checkpoint; begin anew with --run.restart true"
    )
    told |= {
        "state": "interrupted" if processes.first else "failed",
        "message": f"{processes.killed}; {next_}",
    }
    if not is_locked(root):  # else a rank runs on all the same, or it was another's directory
        with contextlib.suppress(OSError):  # no reason to end otherwise
            write_status(root, told)
    say(f"fusedrl: {next_}")
