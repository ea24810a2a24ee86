"""Pool of parallel worker processes. If a worker dies or takes too long, the task's answer says so,
and the next task gets a new worker."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

Task = dict[str, Any]
_START = 120.0  # seconds in which a process must have begun


class Worker:
    """Worker process that runs worker.py; it starts with the first task."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said: Any = None
        self._late = False

    def __call__(self, task: Task, timeout: float) -> dict[str, Any]:
        """Return the answer to a task; {"state": "FAIL", "why": [...]} if there is none within
        `timeout` seconds, not counting the start of the process."""
        if self._process is None or self._process.poll() is not None:
            self._start()
            if not self._line(max(timeout, _START)):
                return {"state": "FAIL", "why": [self._last_words(max(timeout, _START))]}
        line = self._line(timeout, task)
        if not line.endswith("\n"):
            return {"state": "FAIL", "why": [self._last_words(timeout)]}
        found: dict[str, Any] = json.loads(line)
        if found.get("fatal"):
            self.stop()
        return found

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fusedrl.engine.tools.verify.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def _line(self, timeout: float, task: Task | None = None) -> str:
        """Send a task to the process and return the next line that it prints; "" if it died or was
        too slow."""
        process, self._late = self._process, False
        if process is None or process.stdin is None or process.stdout is None:
            return ""
        clock = threading.Timer(timeout, self._stop_late)
        clock.start()
        try:
            if task is not None:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            clock.cancel()

    def _stop_late(self) -> None:
        self._late = True
        if self._process is not None:
            self._process.kill()

    def _last_words(self, timeout: float) -> str:
        """Describe why there was no answer: how the process ended, and the last lines of its
        standard error."""
        process, self._process = self._process, None
        status = process.wait() if process is not None else 0
        try:
            how = (
                f"died of {signal.Signals(-status).name}"
                if status < 0
                else f"ended with exit status {status}"
            )
        except ValueError:
            how = f"died of signal {-status}"
        if self._late:
            how = f"took longer than {timeout:g} s (--timeout) and was stopped"
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 1500))
        said = " | ".join(
            line.strip()
            for line in self._said.read().decode("utf-8", "replace").splitlines()
            if line.strip()
        )
        return f"the process {how}{': ' + said[-600:] if said and not self._late else ''}"

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


class Pool:
    """Pool of workers that are kept for all tasks. A context manager: at its end all workers are
    stopped."""

    def __init__(self, jobs: int) -> None:
        self._workers = [Worker() for _ in range(max(1, jobs))]
        self._closing = threading.Event()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        for worker in self._workers:
            worker.stop()

    def answers(
        self, tasks: Sequence[Task], timeout: float, alone: bool = False
    ) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Yield (task, answer) of all tasks, as answers arrive. With `alone`, run one task at a
        time."""
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[Task, dict[str, Any]]] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)

        def drive(worker: Worker) -> None:
            while not self._closing.is_set():
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    found = worker(task, timeout)
                except Exception as error:  # such as: no process can be started
                    found = {"state": "FAIL", "why": [f"{type(error).__name__}: {error}"]}
                done.put((task, found))

        for worker in self._workers[: 1 if alone else len(tasks)]:
            threading.Thread(target=drive, args=(worker,), daemon=True).start()
        for _ in tasks:
            yield done.get()
