"""Worker processes that call users' functions while the run goes on. A request gets its answer, or
the reason why it has none: its function raised, took too long, or ended its process. A process that
was lost is replaced.

    workers = Workers(4, seconds=60.0)
    which = workers.add("my_rewards.py:helpful")
    with workers:
        future = workers.ask("reward", {"which": which, ...})
        ...
        future.result()    {"value": ...} or {"lost": reason}

Each process (`worker`) has a pipe for requests and one for answers, lines of JSON. A thread of this
process hands out requests, one to a process at a time; of functions that are `async def` many. The
order in which answers come depends on the processes, and what they are does not.

Requests with a home, those of one trajectory, go to one process, which has its environment. If that
process is lost, another takes its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from fusedrl.engine.base.errors import RewardError, SetupError

AT_ONCE = 32  # requests of async functions that a process works on together
_START = 300.0  # seconds in which a process must have loaded its functions
_GRACE = 1.0  # seconds that an async function has beyond its time, which its own process watches
_LAST = 6.0  # seconds that a process has to end in, once it is to
_READ = 1 << 16
_LINE = 400  # characters of a line that a function prints
_FATAL = {"RewardError": RewardError, "SetupError": SetupError}


@dataclass(eq=False)
class _Request:
    """A request on its way. `together`: whether it may run beside others in a process; `home`: name
    of what lives in one process, if any; `calls`: how many calls it takes in a process without
    that; `ends`: whether it is the last for its home; `alone`: a process was lost that had it and
    others, so it gets one of its own."""

    number: int
    line: bytes
    seconds: float
    together: bool
    future: Future[dict[str, Any]]
    home: str = ""
    calls: int = 1
    ends: bool = False
    alone: bool = False
    deadline: float = 0.0


class Workers:
    """Pool of worker processes, started by `with` or with the first request. At the end of the
    block all are gone, with all that they have started; so they are when this process dies.

    Args:
        processes: number of processes; 0: nothing is added, and none is started.
        seconds: longest time of a call.
        say: takes a line for a person: what functions print, and which processes are lost.
    """

    def __init__(
        self, processes: int, seconds: float, say: Callable[[str], None] | None = None
    ) -> None:
        self.processes, self.seconds = processes, seconds
        self._say = say or _to_standard_error
        self._rewards: list[str] = []
        self._environment: Mapping[str, Any] | None = None
        self._lock = threading.Lock()
        self._new: deque[_Request] = deque()
        self._numbers = count(1)
        self._thread: threading.Thread | None = None
        self._wake: int | None = None
        self._closing = False
        self._error: BaseException | None = None

    def add(self, spec: str) -> int:
        """Have the processes load a function, and return its number."""
        if self._thread is not None:
            raise RuntimeError("Workers.add: the processes have started")
        self._rewards.append(spec)
        return len(self._rewards) - 1

    def add_environment(self, spec: Mapping[str, Any]) -> None:
        """Have the processes load the environment that `hosted.Host` makes of `spec`."""
        if self._thread is not None:
            raise RuntimeError("Workers.add_environment: the processes have started")
        self._environment = spec

    def __enter__(self) -> Workers:
        if self._rewards or self._environment is not None:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        with self._lock:  # several threads may ask first
            if self._thread is not None:
                return
            reads, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            thread = threading.Thread(target=self._serve, args=(reads,), daemon=True)
            thread.start()
            self._thread = thread

    def ask(
        self,
        kind: str,
        request: dict[str, Any],
        *,
        together: bool = False,
        times: int = 1,
        home: str = "",
        calls: int = 1,
    ) -> Future[dict[str, Any]]:
        """Hand in a request. Its answer is {"value": ...}, or {"lost": reason}.

        Args:
            request: JSON values.
            together: whether its function is `async def`.
            times: the request may take so many times as long as others.
            home: requests with the same name go to the same process, up to one of the kind "end".
            calls: with a home, the request may take so many times as long in a process that has
                not had the earlier ones.
        Raises:
            RewardError, SetupError: no request can be answered any more. A future that waits
                raises the same.
        """
        number, seconds = next(self._numbers), self.seconds * times
        message = request | {"id": number, "kind": kind, "seconds": seconds}
        line = f"{json.dumps(message)}\n".encode()
        future: Future[dict[str, Any]] = Future()
        self._start()
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise RuntimeError("Workers.ask: the processes have been ended")
            ends = kind == "end"
            self._new.append(_Request(number, line, seconds, together, future, home, calls, ends))
        self._notify()
        return future

    def close(self) -> None:
        """End all processes. Requests without an answer are cancelled."""
        with self._lock:
            self._closing = True
        if self._thread is not None:
            self._notify()
            self._thread.join(2 * _LAST)
        with self._lock:
            wake, self._wake = self._wake, None
        if wake is not None:
            os.close(wake)

    def _notify(self) -> None:
        # full: the thread is awake anyway
        with self._lock, contextlib.suppress(BlockingIOError, OSError):
            if self._wake is not None:
                os.write(self._wake, b".")

    # ---- the thread ------------------------------------------------------------------------------
    def _serve(self, reads: int) -> None:
        hub = _Hub(self._rewards, self._environment, self._say)
        hub.selector.register(reads, selectors.EVENT_READ, lambda: os.read(reads, _READ))
        try:
            while not self._closing:
                with self._lock:
                    hub.take(self._new)
                    self._new.clear()
                hub.fill(self.processes)
                hub.hand_out()
                hub.wait()
        except BaseException as error:
            # of the pool as well as of its functions; whoever waits raises it
            self._fail(error, hub)
        finally:
            hub.close()
            os.close(reads)
            self._fail(None, hub)

    def _fail(self, error: BaseException | None, hub: _Hub) -> None:
        """Let nobody wait for an answer any more."""
        with self._lock:
            self._error = self._error or error
            self._closing = True
            hub.take(self._new)
            self._new.clear()
        for request in hub.unanswered():
            if error is None:
                request.future.cancel()
            elif not request.future.done():
                request.future.set_exception(error)


def named(environment: Mapping[str, Any] | None) -> list[str]:
    """Return the users' files and names in the specification of an environment, file.py:NAME."""
    if environment is None:
        return []
    return list(environment["tools"]) if "tools" in environment else [environment["environment"]]


def _to_standard_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class _Hub:
    """All processes of a pool, and the requests that wait; its thread's alone."""

    def __init__(
        self,
        rewards: list[str],
        environment: Mapping[str, Any] | None,
        say: Callable[[str], None],
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self._load = {"rewards": rewards, "environment": environment}
        self._names = [*rewards, *named(environment)]
        self._say = say
        self._processes: list[_Process] = []
        self._single: deque[_Request] = deque()
        self._many: deque[_Request] = deque()
        self._places = count(1)

    def take(self, new: deque[_Request]) -> None:
        """Queue requests."""
        for request in new:
            (self._many if request.together else self._single).append(request)

    def unanswered(self) -> list[_Request]:
        """Return all requests that have no answer."""
        flying = [one for process in self._processes for one in process.requests.values()]
        return [*flying, *self._single, *self._many]

    def fill(self, processes: int) -> None:
        """Start processes until there are so many."""
        while len(self._processes) < processes:
            one = _Process(next(self._places), self.selector, self._load, self._names)
            self._processes.append(one)

    def hand_out(self) -> None:
        """Give requests to processes that have room for them."""
        kept = []
        while self._single and (free := [one for one in self._processes if one.idle]):
            request = self._single.popleft()
            if not self._give(request, free):
                kept.append(request)
        self._single.extendleft(reversed(kept))
        kept = []
        while self._many:
            alone = self._many[0].alone
            fitting = [p for p in self._processes if (p.idle if alone else p.takes_more)]
            if not fitting:
                break
            request = self._many.popleft()
            if not self._give(request, fitting):
                kept.append(request)
        self._many.extendleft(reversed(kept))

    def _give(self, request: _Request, fitting: list[_Process]) -> bool:
        """Send a request to one of these processes, to its home if it has one. Return False if that
        is not among them."""
        if not request.home:
            min(fitting, key=lambda one: len(one.requests)).send(request)
            return True
        home = next((one for one in self._processes if request.home in one.homes), None)
        if home is None and request.ends:  # lost with its process
            request.future.set_result({"value": None})
            return True
        if home is None and not all(one.ready for one in self._processes):
            return False  # homes are spread over all processes
        if home is not None and home not in fitting:
            return False
        calls = 1 if home is not None else request.calls
        home = home or min(fitting, key=lambda one: (len(one.homes), len(one.requests)))
        home.homes.add(request.home)
        if request.ends:
            home.homes.discard(request.home)
        home.send(request, calls)
        return True

    def wait(self) -> None:
        """Wait until a process has something to say, or one is late."""
        deadlines = [process.deadline for process in self._processes]
        left = min(deadlines, default=float("inf")) - time.monotonic()
        ready = self.selector.select(None if left == float("inf") else max(0.0, left))
        for key, _ in ready:
            key.data()
        for process in list(self._processes):
            if process.deadline <= time.monotonic():
                process.expire()
            if process.ended:
                self._lost(process)
            for line in process.printed():
                self._say(f"fusedrl: reward worker {process.place} prints: {line}")

    def _lost(self, process: _Process) -> None:
        """Let a process go. The request that it had is lost; of several each is tried again by
        itself, since one of them is to blame."""
        self._processes.remove(process)
        reason, requests = process.reason(), list(process.requests.values())
        process.close()
        if not process.ready:
            raise RewardError(
                f"rewards: expected a worker process to load {', '.join(self._names)}, and {reason}"
            )
        self._say(f"fusedrl: reward worker {process.place} is replaced: {reason}")
        if len(requests) == 1:
            requests[0].future.set_result({"lost": reason})
            return
        for request in requests:
            request.alone = True
            self._many.appendleft(request)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.end()
        last = time.monotonic() + _LAST
        while (left := last - time.monotonic()) > 0 and any(
            not process.ended for process in self._processes
        ):
            for key, _ in self.selector.select(left):
                key.data()
        for process in self._processes:
            process.close()
        self.selector.close()


class _Process:
    """One worker process.

    Attributes:
        requests: those that it has, by number.
        homes: names of what lives in it.
        ready: whether it has loaded its functions.
        ended: whether it is gone.
    """

    def __init__(
        self,
        place: int,
        selector: selectors.BaseSelector,
        load: Mapping[str, Any],
        names: list[str],
    ) -> None:
        self.place, self._selector = place, selector
        self.requests: dict[int, _Request] = {}
        self.homes: set[str] = set()
        self.ready = self.ended = False
        self._files = [os.path.abspath(spec.rpartition(":")[0]) for spec in names]
        self._ending: float | None = None  # when it is killed the hard way
        self._load_by, self._late = time.monotonic() + _START, ""
        self._status, self._answers, self._said, self._out = (bytearray() for _ in range(4))
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        theirs, self._requests_fd = os.pipe()
        self._answers_fd, answers = os.pipe()
        self._said_fd, said = os.pipe()
        try:
            self._keeper = self._launch(theirs, answers, said)
        finally:
            for pipe in (theirs, answers, said):
                os.close(pipe)
        life, status = self._keeper.stdin, self._keeper.stdout
        if life is None or status is None:
            raise RuntimeError("rewards: a worker process has no pipes")
        self._life = life
        self._status_fd = status.fileno()
        for pipe, taken in (
            (self._answers_fd, self._answers),
            (self._said_fd, self._said),
            (self._status_fd, self._status),
        ):
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ, partial(self._read, pipe, taken))
        os.set_blocking(self._requests_fd, False)
        self._write(f"{json.dumps({'id': 0, 'kind': 'load', **load})}\n".encode())

    def _launch(self, requests: int, answers: int, said: int) -> subprocess.Popen[bytes]:
        passed = (requests, answers, self._trace.fileno())
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fusedrl.engine.rewards.worker", *map(str, passed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            pass_fds=passed,
            # what `import` finds here, one order of sets in all, and no threads that spin
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # a terminal's Ctrl-C is for the run alone
        )

    # ---- requests
    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self.ready and self._ending is None and not self.requests

    @property
    def takes_more(self) -> bool:
        """Whether it has room for one more request of an async function."""
        return (
            self.ready
            and self._ending is None
            and len(self.requests) < AT_ONCE
            and all(one.together and not one.alone for one in self.requests.values())
        )

    def send(self, request: _Request, calls: int = 1) -> None:
        """Hand it a request, which takes so many calls there."""
        seconds = request.seconds * calls
        request.deadline = time.monotonic() + seconds + _GRACE * request.together
        self.requests[request.number] = request
        self._write(request.line)

    def _write(self, data: bytes) -> None:
        self._out += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self._requests_fd, self._out)]
        except BlockingIOError:
            if self._requests_fd not in self._selector.get_map():
                self._selector.register(self._requests_fd, selectors.EVENT_WRITE, self._flush)
            return
        except BrokenPipeError:  # it has ended, which its keeper tells
            self._out.clear()
        if self._requests_fd in self._selector.get_map():
            self._selector.unregister(self._requests_fd)

    # ---- answers
    def _read(self, pipe: int, taken: bytearray) -> bool:
        """Take what a pipe holds; return whether there may be more."""
        try:
            data = os.read(pipe, _READ)
        except BlockingIOError:
            return False
        taken += data
        if not data:
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            if pipe == self._status_fd:
                self._last_words()
                self.ended = True
        elif taken is self._answers and b"\n" in data:
            *lines, rest = bytes(taken).split(b"\n")
            taken[:] = rest
            for line in lines:
                self._answer(line)
        return bool(data)

    def _last_words(self) -> None:
        """Take what it had written before it ended."""
        for pipe, taken in ((self._answers_fd, self._answers), (self._said_fd, self._said)):
            while pipe in self._selector.get_map() and self._read(pipe, taken):
                pass

    def _answer(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            number = answer.pop("id")
        except (ValueError, KeyError, AttributeError):  # a function wrote into the pipe
            self.end("it wrote into the pipe of its answers")
            return
        if "fatal" in answer:
            kind, message = answer["fatal"]
            raise _FATAL[kind](message)
        if number == 0:
            if "lost" in answer:
                raise RewardError(f"rewards: a worker process could not load: {answer['lost']}")
            self.ready = True
        elif (request := self.requests.pop(number, None)) is not None:
            request.future.set_result(answer)

    def printed(self) -> Iterator[str]:
        """Yield the lines that functions have printed."""
        if b"\n" not in self._said and len(self._said) < _READ and not self.ended:
            return
        *lines, rest = bytes(self._said).split(b"\n")
        if len(rest) >= _READ or self.ended:
            lines, rest = [*lines, rest], b""
        self._said[:] = rest
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                yield text if len(text) <= _LINE else f"{text[:_LINE]} ... ({len(text):,} in all)"

    # ---- its end
    @property
    def deadline(self) -> float:
        """Time at which it is late: with a request, with loading, or with its end."""
        if self._ending is not None:
            return self._ending
        times = [request.deadline for request in self.requests.values()]
        return min(times, default=float("inf")) if self.ready else self._load_by

    def expire(self) -> None:
        """End it, since it is late; the hard way if it was to end already."""
        if self._ending is not None:
            self._ending = float("inf")
            self._keeper.kill()
            return
        late = min(self.requests.values(), key=lambda one: one.deadline, default=None)
        self.end(f"took longer than {_START if late is None else late.seconds:g} s")

    def end(self, why: str = "") -> None:
        """Have it and all that it started killed."""
        if self._ending is None:
            self._late, self._ending = why, time.monotonic() + _LAST
            with contextlib.suppress(BrokenPipeError):
                self._life.close()

    def reason(self) -> str:
        """Say why it has ended, and where it was if it was lost in Python."""
        if self._late:
            return self._late + self._where()
        if not self._status:
            return "its process was killed"
        status = int(self._status)
        if status >= 0:
            return f"its process ended with exit status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"its process was ended by {name}{self._where()}"

    def _where(self) -> str:
        """Return the innermost line of the functions' files at which it was."""
        self._trace.seek(0)
        text = self._trace.read().decode("utf-8", "replace")
        for file, line in re.findall(r'File "(.+)", line (\d+) in ', text):
            if file in self._files:
                return f" ({file}:{line})"
        return ""

    def close(self) -> None:
        """Close its pipes."""
        if not self.ended:
            self._keeper.kill()
        pipes = (self._answers_fd, self._said_fd, self._status_fd, self._requests_fd)
        for pipe in pipes:
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
        for pipe in (self._answers_fd, self._said_fd, self._requests_fd):
            os.close(pipe)
        with contextlib.suppress(BrokenPipeError):
            self._life.close()
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()
        self._trace.close()
        self._keeper.wait()
