"""A run on the terminal: what it is, a row a step, and what it is doing right now.

On a terminal the rows scroll, and two lines below them move: how far the run is, and how far the
step is. Anywhere else there are plain lines. A terminal that is closed ends the display and nothing
else. The cursor is never hidden, so that a process that is killed cannot leave it so.
"""

from __future__ import annotations

import difflib
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.runs.columns import (
    GAP,
    PLAIN,
    POLICY,
    Column,
    cell,
    fitting,
    name_in,
    named,
    width_of,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

SECONDS_BETWEEN_LINES = 5.0  # of plain lines
SECONDS_BETWEEN_ROWS = 0.25  # a row takes half a millisecond; steps that are faster share one
SECONDS_BETWEEN_DRAWS = 0.5
STEPS_OF_ESTIMATE = 20  # the time left follows the newest steps, since completions grow longer
_SHORTEST_BAR = 10
_SPREADS = ("_stderr", "_low", "_high")  # of metrics that stand beside their mean
_PHASES = {
    "generate_and_reward": "generating",
    "score": "scoring",
    "advantage": "estimating advantages",
    "train": "training",
    "evaluate": "evaluating",
    "reference": "scoring by the reference",
    "normalize": "centring the scores",
    "save": "saving a checkpoint",
}
Facts = Sequence[tuple[str, str]]


def say(text: str) -> None:
    """Print a line on standard error. If the terminal or the reader is gone, do nothing and raise
    no error."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Live progress of a run, shown from `with progress:` to the end of the block.

    Args:
        total: steps of the run.
        enabled: False shows nothing.
        start: steps already done, when resumed.
        title: name of the run.
        columns: the metrics to show, the most important first; on a terminal as many as fit.
        names: metrics to show by their whole names instead, `*` standing for any characters. They
            take as many lines as they need.
        activity: what the run is doing, which the moving lines show.
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
        columns: Sequence[Column] = POLICY,
        names: Sequence[str] = (),
        activity: Activity | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._title, self._enabled, self._done = total, title, enabled, start
        self._columns, self._names = tuple(columns), tuple(names)
        self._activity = activity or Activity()
        self._stream = stream if stream is not None else sys.stderr
        self._began = time.monotonic()
        self._ends = deque([self._began], maxlen=1 + STEPS_OF_ESTIMATE)
        self._last = -math.inf
        self._heading: tuple[str, ...] = ()
        self._rows = 0  # since the heading
        self._told = False
        self._met: set[Column] = set()
        self._over = threading.Event()
        self._live: Any = None
        self._console = _console(self._stream) if enabled and self._stream.isatty() else None

    # ---- what is written -------------------------------------------------------------------------
    def header(self, facts: Facts) -> None:
        """Show what the run is: pairs of a name and a text."""
        width = max((len(name) for name, _ in facts), default=0)
        for name, text in facts:
            self._write(f"{self._title}  {name:{width}}  {text}")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` steps are done, and the metrics of the last one. Step 0 is an evaluation
        before the first."""
        if not self._enabled:
            return
        now, last = time.monotonic(), step >= self._total
        if step:
            self._done = step
            self._ends.append(now)
        held_out = _held_out(values)
        wait = SECONDS_BETWEEN_LINES if self._console is None else SECONDS_BETWEEN_ROWS
        if not (last or held_out) and now - self._last < wait:
            return
        self._last = now
        if self._names or self._console is None:
            self._plain(step, values)
            return
        if step:
            self._row(step, values)
        if held_out:
            self._write(f"  step {step}, held out: {', '.join(held_out)}")

    def _plain(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line with the metrics' own names."""
        names = named(values, self._names)
        self._tell_of_unknown(step, values)
        if not self._names:
            names = [name for c in self._columns if (name := name_in(c, values))][:PLAIN]
            names += [name for name in values if name.startswith("eval_")]
            names = [name for name in names if not name.endswith(_SPREADS)]
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in names)
        self._write(f"{self._title} {step}/{self._total}  {shown}")

    def _tell_of_unknown(self, step: int, values: Mapping[str, float]) -> None:
        """Say once, at the first step, which names no metric has."""
        told, self._told = self._told or not step, self._told or bool(step)
        for name in () if told else self._names:
            if not named(values, [name]):
                close = difflib.get_close_matches(name, values, 1)
                self._write(
                    f"{self._title}: run.columns: no metric of step {step} is called {name!r}"
                    f"{f'; did you mean {close[0]}?' if close else ''}"
                )

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row of the table, and its heading where that is new or has scrolled away."""
        width, height = self._size()
        first = 2 * len(str(self._total)) + 1
        # a metric that a step has not leaves a dash, and the heading as it is
        self._met.update(column for column in self._columns if name_in(column, values))
        columns = fitting([c for c in self._columns if c in self._met], width, first)
        heading = (
            f"{'step':>{first}}",
            *(f"{column.heading:>{width_of(column)}}" for column in columns),
        )
        if heading != self._heading or self._rows >= max(5, height - 6):
            self._heading, self._rows = heading, 0
            units = (" " * first, *(f"{c.unit:>{width_of(c)}}" for c in columns))
            for line in (heading, units):
                self._write((" " * GAP).join(line).rstrip(), "bold", cut=True)
        self._rows += 1
        cells = [
            f"{cell(c, None if (name := name_in(c, values)) is None else values[name]):>{w}}"
            for c, w in ((column, width_of(column)) for column in columns)
        ]
        row = (" " * GAP).join([f"{step}/{self._total}".rjust(first), *cells])
        self._write(row, cut=True)

    def _write(self, text: str, style: str = "", cut: bool = False) -> None:
        """Write a text; on a terminal it breaks at the width unless it is `cut` to fit."""
        if not self._enabled:
            return
        if not self._stream_speaks(text):
            text = text.encode("ascii", "replace").decode()
        try:
            if self._console is None:
                print(text, file=self._stream, flush=True)
            elif not self._over.is_set():
                self._console.print(_Lines([text], style) if cut else text, markup=False)
        except (OSError, ValueError):  # the reader has gone; the run has not
            self._over.set()

    # ---- what moves ------------------------------------------------------------------------------
    def lines(self, width: int) -> list[str]:
        """Return the two moving lines, at most `width` characters each."""
        now = time.monotonic()
        text = f"{self._done}/{self._total} steps  {_clock(now - self._began)}"
        if (left := self.left(now)) is not None:
            text += f"  about {_clock(left)} left"
        room = width - len(self._title) - len(text) - 2
        bar = ""
        if room >= _SHORTEST_BAR:
            filled = room * self._done // max(1, self._total)
            full, empty = ("━", "╌") if self._stream_speaks("━╌") else ("=", "-")
            bar = f"{full * filled}{empty * (room - filled)} "
        return [f"{self._title} {bar}{text}"[:width], f"  {self._doing()}"[:width]]

    def left(self, now: float) -> float | None:
        """Return about how many seconds the rest of the run takes; None before the first step."""
        if len(self._ends) < 2:
            return None
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, each * (self._total - self._done) - (now - self._ends[-1]))

    def _doing(self) -> str:
        """Describe what the run is doing."""
        a = self._activity
        phase = _PHASES.get(a.phase, a.phase)
        text = f"{phase}, {a.name}" if a.name and a.phase == "evaluate" else a.name or phase
        if a.total:
            text += f": {min(a.done, a.total):,}/{a.total:,} {a.unit}"
        if a.tokens:
            speed = a.tokens / max(1e-9, time.perf_counter() - a.began)
            text += f", {a.tokens:,} tokens, {speed:,.0f} tokens/s"
        update = a.update
        if update is not None and update[1] != self._total:
            text += f", optimizer step {update[0]:,}/{update[1]:,}"
        return text

    def _stream_speaks(self, text: str) -> bool:
        with suppress(UnicodeEncodeError, LookupError):
            text.encode(getattr(self._stream, "encoding", None) or "ascii")
            return True
        return False

    def _size(self) -> tuple[int, int]:
        width, height = (80, 25) if self._console is None else self._console.size
        return max(1, width - 1), height  # in its last column some terminals break the line

    def __enter__(self) -> Progress:
        if self._console is None:
            return self
        from rich.live import Live

        self._live = Live(
            console=self._console,
            get_renderable=lambda: _Lines(self.lines(self._size()[0])),
            auto_refresh=False,  # ours survives a terminal that is closed
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a file gets what is printed for it
        )
        with suppress(OSError, ValueError):
            self._live.start(refresh=True)
        threading.Thread(target=self._draw, name="fusedrl terminal", daemon=True).start()
        return self

    def _draw(self) -> None:
        """Draw the moving lines again and again, until the run or the terminal is over."""
        while not self._over.wait(SECONDS_BETWEEN_DRAWS):
            try:
                self._live.refresh()
            except (OSError, ValueError):
                self._over.set()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live is not None:
            with suppress(OSError, ValueError):  # the terminal has gone
                self._live.stop()


class _Lines:
    """Lines that fit, in one style: cheaper to draw than rich's texts, which look for breaks."""

    def __init__(self, lines: Sequence[str], style: str = "") -> None:
        self._lines, self._style = lines, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        style = console.get_style(self._style) if self._style else None
        for line in self._lines:
            yield Segment(line, style)
            yield Segment.line()


def _console(stream: TextIO) -> Console | None:
    """Return a console that neither hides the cursor nor ends the process; None for a terminal that
    cannot move its cursor."""
    from rich.console import Console

    class Kept(Console):
        """Console that leaves the cursor alone, and raises where the reader is gone."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Kept(file=stream, highlight=False, emoji=False)
    return None if console.is_dumb_terminal else console


def _held_out(values: Mapping[str, float]) -> list[str]:
    """List an evaluation's metrics, each with its standard error if it has one."""
    found = []
    for name, value in values.items():
        if name.startswith("eval_") and not name.endswith(_SPREADS):
            error = values.get(f"{name}_stderr", math.nan)
            spread = f" ± {error:.2g}" if math.isfinite(error) else ""
            found.append(f"{name.removeprefix('eval_')} {value:.4g}{spread}")
    return found


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
