"""Worker process of a run: it calls users' functions, so that what they do to their process costs
the run nothing. `python -m fusedrl.engine.rewards.worker REQUESTS ANSWERS TRACE`, which `pool`
starts.

The process divides in two before anything of a user's is loaded:

    keeper    waits for the worker to end, or to be told that it shall, which is when its standard
              input ends (the run closed it, or is gone). It then kills the worker and all that
              descends from it, and writes the worker's exit status to standard output. Orphans fall
              to it (Linux), so none is left
    worker    reads requests, a line of JSON each, from the pipe REQUESTS, and writes an answer to
              each to ANSWERS. When it is killed or crashes, where it was goes to TRACE

A request has an "id" and a "kind": "load" names the functions and the environment; "reward" calls
one of the functions; "environment" asks the environment of a trajectory, and "end" drops it
(`hosted`). What is printed goes to standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

from fusedrl.engine.rewards.confined import DEATH_SIGNAL, SUBREAPER, kill_all, prctl

_LAST = 0.5  # seconds that a worker has to say where it was, before it is killed
_LONGEST = 1 << 24  # characters of an answer
_LIBRARIES = ("numpy", "torch")  # with random generators of their own


def main(requests: int, answers: int, trace: int) -> None:
    """Divide into keeper and worker."""
    prctl(SUBREAPER)
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    prctl(DEATH_SIGNAL, signal.SIGTERM)
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        for pipe in (requests, answers, trace):
            os.close(pipe)
        keep(pid, wakes)
        return
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(0)
    for pipe in (wakes, woken):
        os.close(pipe)
    _become_worker(requests, answers, trace)


# ---- the keeper ----------------------------------------------------------------------------------
def keep(pid: int, wakes: int) -> None:
    """Wait for the worker's end, or bring it about; then end its descendants and tell its exit
    status."""
    status, last = _reaped(pid), float("inf")
    watched = [0, wakes]
    while status is None:
        left = None if last == float("inf") else max(0.0, last - time.monotonic())
        ready, _, _ = select.select(watched, [], [], left)
        asked = 0 in ready or (wakes in ready and signal.SIGTERM in os.read(wakes, 4096))
        if asked and last == float("inf"):
            watched.remove(0)
            last = time.monotonic() + _LAST
            _send(pid, signal.SIGABRT)  # faulthandler writes down where it is, whatever it does
        if time.monotonic() >= last:
            _send(pid, signal.SIGKILL)
        status = _reaped(pid)
    kill_all(pid)
    with contextlib.suppress(OSError):  # the run is gone
        os.write(1, json.dumps(status).encode())


def _reaped(pid: int) -> int | None:
    """Return the worker's exit status (negative: a signal) once it has ended; take leave of
    orphans."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                return os.waitstatus_to_exitcode(ended[1])
    return None


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# ---- the worker ----------------------------------------------------------------------------------
def _become_worker(requests: int, answers: int, trace: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(file=trace)
    worker = Worker(answers)
    with open(requests, encoding="utf-8") as lines:
        for line in lines:
            worker.take(line)
    os._exit(0)  # threads of users' may never end


class Worker:
    """Answers requests. Functions are called one at a time, in the main thread; those that are
    `async def` run together in an event loop."""

    def __init__(self, answers: int) -> None:
        self._answers, self._writing = answers, threading.Lock()
        self._process = os.getpid()
        self._rewards: list[Any] = []
        self._files: set[str] = set()
        self._loop: Any = None
        self._host: Any = None

    def take(self, line: str) -> None:
        """Do what a request asks for, and answer it, now or when its function has come to an
        end."""
        request = json.loads(line)
        try:
            kinds = {
                "load": self._load,
                "reward": self._reward,
                "environment": self._environment,
                "end": self._end,
            }
            answer = kinds[request["kind"]](request, line)
        except BaseException as error:  # sys.exit in a user's function is one
            answer = self._failure(error)
        if answer is not None:
            self._answer(request, answer)

    def _answer(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        if os.getpid() != self._process:  # a function forked, and its child came back from it
            os._exit(0)
        text = json.dumps(answer | {"id": request["id"]})
        if len(text) > _LONGEST:
            said = f"returned {len(text):,} characters of JSON, and {_LONGEST:,} are the most"
            text = json.dumps({"id": request["id"], "lost": said})
        left = memoryview(f"{text}\n".encode())
        with self._writing:
            while left:
                left = left[os.write(self._answers, left) :]

    def _failure(self, error: BaseException) -> dict[str, Any]:
        """Return the answer to a request whose function raised. Errors that say that no other call
        can do better end the run."""
        from fusedrl.engine.base.blame import told
        from fusedrl.engine.base.errors import RewardError, SetupError

        if isinstance(error, RewardError | SetupError):
            return {"fatal": [type(error).__name__, str(error)]}
        return {"lost": f"raised {told(error)}{self._where(error)}"}

    def _where(self, error: BaseException) -> str:
        """Return the last line in a file of rewards that an exception passed through; if there is
        none, where it was raised."""
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        frame = next((one for one in reversed(frames) if one.filename in self._files), frames[-1])
        return f" ({frame.filename}:{frame.lineno})"

    # ---- kinds of requests
    def _load(self, request: dict[str, Any], line: str) -> dict[str, Any]:
        from fusedrl.engine.rewards.functions import load_function

        self._files = {os.path.abspath(spec.rpartition(":")[0]) for spec in request["rewards"]}
        self._rewards = [load_function(spec) for spec in request["rewards"]]
        if request["environment"] is not None:
            from fusedrl.engine.rewards.hosted import Host

            self._host = Host(request["environment"])
            self._files.update(self._host.places)
        return {"value": None}

    def _environment(self, request: dict[str, Any], line: str) -> dict[str, Any] | None:
        from fusedrl.engine.rewards.hosted import Wrong, at_once, in_time

        async def answered(coroutine: Any) -> dict[str, Any]:
            try:
                found = await coroutine
            except Wrong as error:
                return {"lost": str(error)}
            return found if "lost" in found else {"value": found}

        asked = self._host.answer(request, seed_libraries)
        if not self._host.waits:
            return at_once(answered(asked))
        limit = request["seconds"] * self._host.calls(request)
        self._later(request, answered(in_time(asked, limit)))
        return None

    def _end(self, request: dict[str, Any], line: str) -> dict[str, Any]:
        self._host.end(request["trajectory"])
        return {"value": None}

    def _reward(self, request: dict[str, Any], line: str) -> dict[str, Any] | None:
        import inspect

        function = self._rewards[request["which"]]
        before = _loaded()
        seed_libraries(request["seed"])
        returned = function(**request["arguments"])
        if inspect.isawaitable(returned):
            from fusedrl.engine.rewards.hosted import in_time

            self._later(request, in_time(_valued(request, returned), request["seconds"]))
            return None
        if _loaded() != before:
            # the generators of a library that this call has loaded were not seeded, and another
            # worker's are, if it has loaded the library before
            seed_libraries(request["seed"])
            returned = function(**json.loads(line)["arguments"])
        return _values(returned, request)

    def _later(self, request: dict[str, Any], awaitable: Any) -> None:
        """Answer a request when this, which gives the answer, has come to its end."""
        import asyncio

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def run() -> None:
            try:
                answer = await awaitable
            except BaseException as error:
                answer = self._failure(error)
            self._answer(request, answer)

        asyncio.run_coroutine_threadsafe(run(), self._loop)


async def _valued(request: dict[str, Any], awaitable: Any) -> dict[str, Any]:
    """Wait for what a function returns, and return it as an answer."""
    seed_libraries(request["seed"])  # up to its first await the function is alone
    return _values(await awaitable, request)


def _loaded() -> list[bool]:
    return [name in sys.modules for name in _LIBRARIES]


def seed_libraries(seed: int) -> None:
    """Seed the random generators of this process, as far as their libraries are loaded."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


def _values(returned: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return what a function returned as an answer."""
    from fusedrl.engine.base.errors import RewardError
    from fusedrl.engine.rewards.functions import values_of

    try:
        values = values_of("", returned, request["count"])
    except RewardError as error:  # not a list, or one of another length
        return {"lost": str(error).removeprefix(": ")}
    return {"value": [_plain(value) for value in values]}


def _plain(value: Any) -> Any:
    """Return one value as JSON; `remote` reads it."""
    from fusedrl.engine.rewards.functions import is_tensor, number_of

    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) < 2**63):
        return value
    if is_tensor(value) and value.numel() != 1:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    number, reason = number_of(value)
    return {"invalid": reason} if reason else number


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
