"""Workers side by side. A task whose worker dies or takes too long has that for its answer, and the next task finds a new worker."""
from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Task = dict[str, Any]


class Worker:
    """One process of worker.py; it is started when the first task comes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said: Any = None
        self._late = False

    def __call__(self, task: Task, timeout: float) -> dict[str, Any]:
        """The answer to a task; {"state": "FAIL", "why": [...]} where there came none within `timeout` seconds."""
        process = self._start()
        self._late = False
        clock = threading.Timer(timeout, self._stop_late)
        clock.start()
        try:
            line = ""
            if process.stdin is not None and process.stdout is not None:
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        if not line.endswith("\n"):
            return {"state": "FAIL", "why": [self._last_words(timeout)]}
        found: dict[str, Any] = json.loads(line)
        if found.get("fatal"):
            self.stop()
        return found

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen([sys.executable, "-m", "fusedrl.engine.verify.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=self._said, text=True, encoding="utf-8", env=environment)
        return self._process

    def _stop_late(self) -> None:
        self._late = True
        if self._process is not None:
            self._process.kill()

    def _last_words(self, timeout: float) -> str:
        """Why there was no answer: what the process died of, and the end of what it wrote to standard error."""
        process, self._process = self._process, None
        status = process.wait() if process is not None else 0
        try:
            how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        except ValueError:
            how = f"died of signal {-status}"
        if self._late:
            how = f"took longer than {timeout:g} s (--timeout) and was stopped"
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 1500))
        said = " | ".join(line.strip() for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip())
        return f"the process {how}{': ' + said[-600:] if said and not self._late else ''}"

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def answers(tasks: Sequence[Task], jobs: int, timeout: float, make: Callable[[], Worker] = Worker) -> Iterator[tuple[Task, dict[str, Any]]]:
    """(task, answer) of all tasks as they come, from `jobs` workers; none is left behind when the iterator is closed."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Task, dict[str, Any]]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    workers = [make() for _ in range(max(1, min(jobs, len(tasks))))]
    closing = threading.Event()

    def drive(worker: Worker) -> None:
        while not closing.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                found = worker(task, timeout)
            except Exception as error:  # such as: no process can be started
                found = {"state": "FAIL", "why": [f"{type(error).__name__}: {error}"]}
            done.put((task, found))
        worker.stop()

    threads = [threading.Thread(target=drive, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            yield done.get()
    finally:
        closing.set()
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
