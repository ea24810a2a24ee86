"""Reports of a run: one JSON line per step in metrics.jsonl, and live progress on the terminal.

Names are TRL's (`reward`, `kl`, `entropy`, `completions/clipped_ratio`, ...) plus `timing/<phase>`
in seconds and `sampling/logp_diff_*`. All of them are listed in docs/metrics.md.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from fusedrl.engine.runs.files import write_file

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

KEY_METRICS = (
    "loss",
    "reward",
    "kl",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "policy/clipfrac_avg",
    "accuracy",
    "margin",
    "rewards/accuracies",
    "rewards/margins",
    "kept/reward",
    "eval_loss",
    "eval_accuracy",
    "grad_norm",
    "lr",
)
SECONDS_BETWEEN_LINES = 5.0


def say(text: str) -> None:
    """Print a line on standard error. If the terminal or the reader is gone, do nothing and raise
    no error."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the object of a complete line with a step; None for any other line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
        return row if row["step"] <= sys.maxsize else None
    except (ValueError, KeyError, TypeError):
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
    """

    def __init__(
        self, run_dir: str | Path, *, resume_step: int | None = None, write: bool = True
    ) -> None:
        self._lines = JsonLines(
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
        self._lines.append(
            {"step": step}
            | {name: value if math.isfinite(value) else None for name, value in record.items()}
        )
        return record

    def last(self) -> dict[str, float]:
        """Return the newest line that a resumed run found, without its step; empty for a new
        run."""
        return {
            name: math.nan if value is None else value
            for name, value in (self._lines.last or {}).items()
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
        self._lines.__exit__(*error)


class Progress:
    """Live progress. On a terminal it is a bar with a table of the key metrics; elsewhere a plain
    line every few seconds and one for the last step.

    Args:
        total: steps of the run.
        enabled: False shows nothing.
        start: steps already done, when resumed.
        title: text in front of the bar.
        keys: names of the metrics to show, if they are reported.
        stream: where to write; standard error by default, so that standard output stays free for
            results.
    """

    def __init__(
        self,
        total: int,
        enabled: bool = True,
        *,
        start: int = 0,
        title: str = "train",
        keys: Sequence[str] = KEY_METRICS,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._title, self._keys, self._enabled = total, title, tuple(keys), enabled
        self._stream = stream if stream is not None else sys.stderr
        self._live: Live | None = None
        self._last_line = -math.inf
        if not enabled or not self._stream.isatty():
            return
        from rich import live
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(title, total=total, completed=start)
        self._live = live.Live(
            self._view({}), console=Console(file=self._stream), refresh_per_second=8
        )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` steps are done, and the metrics of the last one."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._live.update(self._view(values))
        elif self._enabled and (
            step >= self._total or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in self._keys if name in values)
            with suppress(OSError, ValueError):  # the reader has gone; the run has not
                print(f"{self._title} {step}/{self._total}  {shown}", file=self._stream, flush=True)

    def _view(self, values: Mapping[str, float]) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        names = [name for name in self._keys if name in values]
        if not names:
            return self._bar
        table = Table(*names, box=None, pad_edge=False, header_style="dim")
        table.add_row(*(f"{values[name]:.4g}" for name in names))
        return Group(self._bar, table)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with suppress(OSError, ValueError):  # the terminal has gone
                self._live.stop()
