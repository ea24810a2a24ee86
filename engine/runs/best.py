"""The best step of a run by one of its metrics (run.keep_best), whose checkpoint is kept beside the
newest ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fusedrl.engine.base.errors import ConfigError

_SMALLER = ("loss", "perplexity")  # parts of names whose smallest value is the best


class Best:
    """The best value of a metric so far, and its step.

    Args:
        wanted: name of a metric; min:NAME or max:NAME says which end is the best. Without it the
            smallest is, if the name has loss or perplexity in it, and the largest otherwise. An
            empty text keeps nothing.
    Attributes:
        name: name of the metric.
        step: number of the best step so far (1 is the first); None if there is none.
        value: its value.
    """

    def __init__(self, wanted: str) -> None:
        end, colon, name = wanted.partition(":")
        if not colon or end not in ("min", "max"):
            name = wanted
            end = "min" if any(part in wanted for part in _SMALLER) else "max"
        self.name, self._end = name, end
        self.step: int | None = None
        self.value = math.nan

    def offer(self, step: int, values: Mapping[str, Any]) -> bool:
        """Compare the metrics of a step with the best so far, and return whether they are better.
        Of equal values the earlier step stays the best; a metric that is absent or not finite is
        ignored."""
        value = values.get(self.name)
        if not self.name or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        sign = -1 if self._end == "min" else 1
        if self.step is not None and sign * value <= sign * self.value:
            return False
        self.step, self.value = step, float(value)
        return True

    def recall(self, rows: Iterable[Mapping[str, Any]], kept: Collection[int]) -> None:
        """Take up a run again: offer the lines of its metrics.jsonl whose checkpoints are still
        there."""
        for row in rows:
            if row.get("step") in kept:
                self.offer(int(row["step"]), row)

    def check(self, known: Collection[str]) -> None:
        """Raise ConfigError if the metric is not among those that the run has reported. Names of
        evaluations pass: they may come later."""
        if self.name and self.name not in known and not self.name.startswith("eval"):
            close = difflib.get_close_matches(self.name, known, 1, 0.5)
            raise ConfigError(
                f"config: expected run.keep_best to be a metric of this run, got {self.name!r}"
                f"{f', did you mean {close[0]}?' if close else ''}; the first step has "
                f"{', '.join(sorted(known))}"
            )
