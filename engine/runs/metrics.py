"""Metrics of a run: one JSON line per step in metrics.jsonl.

Names are TRL's (`reward`, `kl`, `entropy`, `completions/clipped_ratio`, ...) plus `timing/<phase>`
in seconds and `sampling/sampling_logp_difference/*`. All of them are listed in docs/metrics.md.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from fusedrl.engine.runs.files import write_file

Written = dict[str, int]


class JsonLines:
    """File of JSON objects, one a line, each with a "step". When a run resumes, a torn last line
    and every line after `resume_step` are removed; with None the file starts empty.

    Attributes:
        last: newest line that was found and kept, or None.
        write: False: write nothing, because another process writes the file.
    """

    def __init__(
        self, path: str | Path, *, resume_step: int | None = None, write: bool = True
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            self.path.read_bytes().splitlines(keepends=True)
            if resume_step is not None and self.path.exists()
            else []
        )
        kept = [
            line
            for line in lines
            if resume_step is not None and (row := _row(line)) and row["step"] <= resume_step
        ]
        self.last: dict[str, Any] | None = json.loads(kept[-1]) if kept else None
        self._steps = array("q", [row["step"] for line in kept if (row := _row(line))])
        self._file: TextIO | None = None
        if write:
            write_file(self.path, b"".join(kept))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line and pass it to the operating system. Raise ValueError for NaN and
        infinity, which JSON does not have."""
        line = json.dumps(row, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            self._steps.append(row["step"])

    def sync(self, step: int) -> Written:
        """Flush the lines to the disk, and return what was written up to this step, which a
        checkpoint keeps."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return self.written(step)

    def written(self, step: int) -> Written:
        """Return the number of lines up to a step, and the last of their steps (-1: none)."""
        steps = [one for one in self._steps if one <= step]
        return {"lines": len(steps), "last": steps[-1] if steps else -1}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the object of a complete line with a step; None for any other line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
        step = row["step"]
        return row if isinstance(step, int) and abs(step) <= sys.maxsize else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSON lines file. A torn last line is skipped, and a missing file has no
    lines."""
    for line in Path(path).read_bytes().splitlines(keepends=True) if Path(path).is_file() else ():
        if (row := _row(line)) is not None:
            yield row


class Metrics:
    """Writer of <run>/metrics.jsonl. A new run starts the file empty; a resumed run removes a torn
    last line and every line after the checkpoint's step.

    Args:
        run_dir: the run directory; created if needed.
        resume_step: the step of the checkpoint that the run continues from, or None for a new run.
        write: False if another process writes the file.
    Attributes:
        lines: the file.
    """

    def __init__(
        self, run_dir: str | Path, *, resume_step: int | None = None, write: bool = True
    ) -> None:
        self.lines = JsonLines(
            Path(run_dir) / "metrics.jsonl", resume_step=resume_step, write=write
        )
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def log(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Append one line: the step, `values`, and the timings since the last line. Return what was
        logged. NaN and infinity are written as null."""
        record = {name: float(value) for name, value in values.items()} | {
            f"timing/{name}": seconds for name, seconds in self._seconds.items()
        }
        self._seconds.clear()
        self.lines.append(
            {"step": step}
            | {name: value if math.isfinite(value) else None for name, value in record.items()}
        )
        return record

    def last(self) -> dict[str, float]:
        """Return the newest line that a resumed run found, without its step; empty for a new
        run."""
        return {
            name: math.nan if value is None else value
            for name, value in (self.lines.last or {}).items()
            if name != "step"
        }

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside the block to `timing/<phase>` of the next line."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.lines.__exit__(*error)
