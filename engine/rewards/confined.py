"""One program, run within limits: a script of its own, which `programs` starts as
`python -I -S confined.py`. It reads a job as JSON from standard input, and writes what came of it
as JSON to standard output.

Limits    of each process: CPU seconds, address space, bytes of a file, open files, no core dumps;
          of the program: wall-clock seconds, and bytes of output, after which it is killed
After it  every process that it started is killed, also one that left its process group: orphans
          fall to this script (Linux), which kills until none is left

It is no wall against malice. The program runs as the same user, reads what that user may read, and
may use the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SUBREAPER, DEATH_SIGNAL = 36, 1  # of prctl
_FILES = 64
_PROCESSES = 64  # that the program may add to those of the user; root is not held to it
_LAST = 5.0  # seconds in which what is left is killed


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run job["argv"] in the directory job["directory"] with job["stdin"] as its input. Return its
    exit code (negative: the signal), its output, and "ended": "itself", "time" or "output"."""
    prctl(SUBREAPER)
    pipes = os.pipe(), os.pipe()
    with tempfile.TemporaryFile() as source:
        source.write(job["stdin"].encode(errors="replace"))
        source.seek(0)
        pid = os.fork()
        if not pid:
            _become(job, source.fileno(), pipes)
    for _, writes in pipes:
        os.close(writes)
    taken: dict[int, bytearray] = {reads: bytearray() for reads, _ in pipes}
    code, ended = _watch(pid, taken, time.monotonic() + job["seconds"], job["output_bytes"])
    kill_all(pid)
    out, err = (bytes(text).decode("utf-8", "replace") for text in taken.values())
    return {"code": code, "ended": ended, "stdout": out, "stderr": err}


def _become(job: dict[str, Any], source: int, pipes: Any) -> None:
    """Turn this process, just forked, into the program."""
    try:
        os.setsid()
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        os.dup2(source, 0)
        for target, (_, writes) in enumerate(pipes, 1):
            os.dup2(writes, target)
        os.closerange(3, 256)
        os.chdir(job["directory"])
        seconds = int(job["cpu_seconds"]) + 1
        for name, limit in {
            "RLIMIT_CPU": seconds,
            "RLIMIT_AS": job["memory_bytes"],
            "RLIMIT_FSIZE": job["file_bytes"],
            "RLIMIT_NOFILE": _FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": _tasks() + _PROCESSES,
        }.items():
            with contextlib.suppress(ValueError, OSError):  # no limit is raised, here or elsewhere
                resource.setrlimit(getattr(resource, name), (limit, limit))
        os.execve(job["argv"][0], job["argv"], job["environment"])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    os._exit(127)


def _watch(pid: int, taken: dict[int, bytearray], deadline: float, most: int) -> tuple[int, str]:
    """Collect the program's output until it ends, or its time or its output has come to an end."""
    reading = set(taken)
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select(list(reading), [], [], max(0.0, min(left, 0.02)))
        for pipe in ready:
            got = os.read(pipe, 65536)
            taken[pipe] += got
            if not got:
                reading.discard(pipe)
        if sum(map(len, taken.values())) > most:
            return -signal.SIGKILL, "output"
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and not ready:
            return os.waitstatus_to_exitcode(status), "itself"
        if ended:
            _drain(reading, taken, most)
            return os.waitstatus_to_exitcode(status), "itself"
        if left <= 0:
            return -signal.SIGKILL, "time"


def _drain(reading: set[int], taken: dict[int, bytearray], most: int) -> None:
    """Take what the program had written before it ended; processes it left may hold the pipe."""
    while reading and sum(map(len, taken.values())) <= most:
        ready, _, _ = select.select(list(reading), [], [], 0.0)
        if not ready:
            return
        for pipe in ready:
            got = os.read(pipe, 65536)
            taken[pipe] += got
            if not got:
                reading.discard(pipe)


def kill_all(pid: int) -> None:
    """Kill the program's group and all that descends from this process, until none is left."""
    last = time.monotonic() + _LAST
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    while time.monotonic() < last:
        for child in _descendants():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _descendants() -> list[int]:
    """Return the processes that descend from this one, as /proc knows them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = list(parents.get(os.getpid(), []))
    for one in found:
        found += parents.get(one, [])
    return found


def _tasks() -> int:
    """Return how many processes and threads this user has."""
    count, user = 0, os.getuid()
    for entry in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == user:
                count += sum(1 for _ in entry.iterdir())
    return count


def prctl(option: int, value: int = 1) -> None:
    """Set an attribute of this process, where the system is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
