"""Writing a page again and again while runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fusedrl.engine.watch.page.page import write_page
from fusedrl.engine.watch.run_files import RunFiles, RunRecord

SHARE = 0.05  # of the time, at most, goes into making pages


def follow(files: Sequence[RunFiles], path: Path, every: float, say: Callable[[str], None]) -> str:
    """Write the page of some runs every `every` seconds until none of them is running, or until
    Ctrl-C. The page loads itself again; the last one does not.

    A page that takes long to make is made less often, so that it takes at most SHARE of one core
    from the runs.

    Args:
        say: called with a message once the first page is there.
    Returns:
        How it ended, in words.
    Raises:
        ConfigError, OSError: those of `write_page`.
    """
    first = True
    try:
        while True:
            began = time.perf_counter()
            runs = [one.read() for one in files]
            if not any(run.status == "running" for run in runs):
                write_page(runs, path)
                return _ended(runs, first)
            write_page(runs, path, live=every)
            if first:
                say(f"watch: {path} is there, and is written every {every:g} s; Ctrl-C ends this")
            first = False
            time.sleep(max(every, (time.perf_counter() - began) * (1 / SHARE - 1)))
    except KeyboardInterrupt:
        runs = [one.read() for one in files]
        write_page(runs, path)
        return f"ended at step {max(run.steps for run in runs):,}"


def _ended(runs: Sequence[RunRecord], at_once: bool) -> str:
    names = ", ".join(f"{run.name} {run.status} at step {run.steps:,}" for run in runs)
    return f"nothing is running: {names}" if at_once else names
