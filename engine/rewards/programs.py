"""The reward `code`: programs that completions hold are run against tests, each in a process of its
own within limits (`confined`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards import confined
from fusedrl.engine.rewards.texts import column_of, text_of

TESTS = ("tests", "test_list", "test")  # columns of tests
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_OUTPUT, _FILE = 1 << 20, 16 << 20  # bytes of output, and of a file that the program writes
_LATE = 15.0  # seconds that the limits may take beyond the program's own


class Ran(NamedTuple):
    """Result of a program: its exit code (negative: the signal that ended it), why it ended
    ("itself", "time" or "output"), and what it wrote."""

    code: int
    ended: str
    stdout: str
    stderr: str


def code(
    completions: Sequence[Any],
    *,
    column: str = "",
    seconds: float = 5.0,
    memory: int = 1024,
    jobs: int = 0,
    partial_credit: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Return 1 if the Python program in the completion passes all its tests, else 0; None for rows
    without tests.

    The program is the last fenced block of the completion that is not of another language, or the
    whole completion if there is none. The tests of a row are

        "assert f(1) == 2"                   Python that is run behind the program, and raises
        ["assert f(1) == 2", ...]            the same, several (MBPP's test_list)
        [{"input": "1\\n", "output": "2"}]   what the program reads, and what it must print; spaces
                                             at the ends of lines do not count

    A program that ends before its tests have run, with exit code 0 or not, fails. Each runs in an
    empty directory with no more environment than PATH and HOME. It may take `seconds` of CPU and of
    time, `memory` of address space in each process, print 1 MiB, and write 16 MiB to a file; then
    it and all its processes are killed, and it fails. It runs as the user who trains, who can read
    files and reach the network: on a machine where that matters, train in a container.

    Args:
        column: column of the tests; by default the first there is of tests, test_list and test.
        seconds: of one run.
        memory: MiB.
        jobs: programs at once; 0: one for each processor.
        partial_credit: return the share of the tests that pass, each of which is run by itself.
    Raises:
        RewardError: there is no such column, or tests of another form.

    Source: the functional correctness of Chen et al. (2021), "Evaluating Large Language Models
    Trained on Code".
    """
    if not seconds > 0 or memory < 1 or jobs < 0:
        raise RewardError(
            "reward 'code': expected seconds > 0, memory >= 1 and jobs >= 0, got "
            f"seconds={seconds}, memory={memory}, jobs={jobs}"
        )
    name, tests = column_of("code", columns, column, TESTS)
    cases = [None if one is None else _cases(name, one, partial_credit) for one in tests]
    run = partial(run_program, seconds=seconds, memory=memory << 20)
    work = [
        (row, program_of(text_of(said)), case)
        for row, (said, those) in enumerate(zip(completions, cases, strict=True))
        for case in those or []
    ]
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        passed = list(pool.map(lambda one: _passes(one[1], one[2], run), work))
    by_row: dict[int, list[bool]] = {}
    for (row, _, _), right in zip(work, passed, strict=True):
        by_row.setdefault(row, []).append(right)
    return [
        None
        if those is None
        else sum(by_row[row]) / len(by_row[row])
        if partial_credit
        else float(all(by_row[row]))
        for row, those in enumerate(cases)
    ]


def program_of(text: str) -> str:
    """Return the program that a completion holds."""
    text = text.rpartition("</think>")[2]
    blocks = [
        body
        for kind, body in _FENCE.findall(text)
        if kind.lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else text


def _cases(name: str, tests: Any, each: bool) -> list[str | dict[str, str]]:
    """Return the runs that the tests of a row need."""
    listed = [tests] if isinstance(tests, str | dict) else tests
    texts = isinstance(listed, list) and bool(listed) and all(isinstance(t, str) for t in listed)
    pairs = (
        isinstance(listed, list)
        and bool(listed)
        and all(
            isinstance(t, dict)
            and isinstance(t.get("input", ""), str)
            and isinstance(t.get("output"), str)
            for t in listed
        )
    )
    if not texts and not pairs:
        raise RewardError(
            "reward 'code': expected tests to be Python, a list of Python, or a list of "
            f'{{"input": "...", "output": "..."}} in the column {name!r}, got {tests!r:.80}; null '
            "leaves a row to other rewards"
        )
    return listed if pairs or each else ["\n".join(map(str, listed))]


def _passes(program: str, test: str | dict[str, str], run: Any) -> bool:
    if isinstance(test, dict):
        ran = run(program, test.get("input", ""))
        return (
            ran.code == 0 and ran.ended == "itself" and _lines(ran.stdout) == _lines(test["output"])
        )
    word = secrets.token_hex(16)  # says that the tests were reached; sys.exit(0) does not
    ran = run(f"{program}\n{test}\nprint({word!r})\n", "")
    return ran.code == 0 and ran.ended == "itself" and word in ran.stdout.split()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_program(program: str, stdin: str, *, seconds: float, memory: int) -> Ran:
    """Run a Python program within limits, in an empty directory that is removed afterwards.

    Args:
        program: its text.
        stdin: what it reads.
        seconds: of CPU time and of time.
        memory: bytes of address space of each process.
    """
    with tempfile.TemporaryDirectory(prefix="fusedrl-", ignore_cleanup_errors=True) as directory:
        file = Path(directory) / "program.py"
        file.write_text(program, encoding="utf-8", errors="replace")
        job = {
            "argv": [sys.executable, "-I", "-B", str(file)],
            "directory": directory,
            "environment": {
                "PATH": os.defpath,
                "HOME": directory,
                "LANG": "C.UTF-8",
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
            "stdin": stdin,
            "seconds": seconds,
            "cpu_seconds": seconds,
            "memory_bytes": memory,
            "file_bytes": _FILE,
            "output_bytes": _OUTPUT,
        }
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", confined.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            out, err = keeper.communicate(json.dumps(job).encode(), timeout=seconds + _LATE)
        finally:
            if keeper.poll() is None:  # late, or this process was told to stop
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(keeper.pid, signal.SIGKILL)
                keeper.wait()
    if keeper.returncode:
        raise RewardError(
            "reward 'code': the process that holds programs to their limits failed: "
            f"{err.decode('utf-8', 'replace').strip()[-300:]}"
        )
    return Ran(**json.loads(out))
