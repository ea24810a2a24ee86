"""Standing of a model, or of two beside each other: rewards, pass@k, win rate, KL to a reference,
perplexity, length, each with its 95% interval over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fusedrl.engine.base.estimates import Interval, pass_at_k
from fusedrl.engine.rollout.repetition import ends_in_loop, repeated_share
from fusedrl.engine.watch.evaluate import Measured

SHARES = (  # beginnings of names
    "pass_at_",
    "win_rate",
    "completions/clipped_ratio",
    "completions/repeated_trigrams",
    "completions/loop_fraction",
)
LABELS = {
    "reward": "reward",
    "invalid": "completions without a valid reward",
    "win_rate": "wins against the other, ties a half",
    "kl": "KL to the reference, nats per completion",
    "perplexity_ref": "perplexity under the reference",
    "perplexity": "perplexity under itself",
    "completions/mean_length": "length, tokens",
    "completions/clipped_ratio": "cut off at max_new_tokens",
    "completions/repeated_trigrams": "repeated trigrams",
    "completions/loop_fraction": "end in a loop",
}


@dataclass(frozen=True)
class Standing:
    """Figures of one model.

    Attributes:
        rows: name -> estimate with its interval. Names are those of docs/metrics.md where it has
            them.
        invalid: number of completions without a valid reward, which no row of a reward counts.
    """

    rows: dict[str, Interval]
    invalid: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {name: row.to_json() for name, row in self.rows.items()} | {"invalid": self.invalid}


def standing(found: Measured, samples: int, *, threshold: float | None = None) -> Standing:
    """Return the figures of a model's completions.

    Args:
        samples: completions of each prompt, which are next to one another.
        threshold: the reward from which on a completion is right, for pass@k; None: there is pass@k
            if every reward is 0 or 1.
    """
    total = next(iter(found.scores.values()))
    rows = {"reward": Interval.mean(total, samples)}
    for name, values in list(found.scores.items())[1:]:
        rows[f"rewards/{name.rpartition('/')[2]}/mean"] = Interval.mean(values, samples)
    rows |= _pass_at(total, samples, threshold)
    if found.kl is not None and found.loss is not None:
        rows["kl"] = Interval.mean(found.kl, samples)
        rows["perplexity_ref"] = _perplexity(found.loss, found.lengths, samples)
    rows["perplexity"] = _perplexity(found.own_loss, found.lengths, samples)
    rows["completions/mean_length"] = Interval.mean(found.lengths, samples)
    rows["completions/clipped_ratio"] = Interval.share([1 - one for one in found.ended], samples)
    rows["completions/repeated_trigrams"] = Interval.share(
        [repeated_share(tokens) for tokens in found.written], samples
    )
    rows["completions/loop_fraction"] = Interval.share(
        [float(ends_in_loop(tokens)) for tokens in found.written], samples
    )
    return Standing(rows, sum(math.isnan(value) for value in total))


def win_rate(ours: Sequence[float], theirs: Sequence[float], samples: int) -> Interval:
    """Return the share of the pairs, the i-th completion of each model, that ours wins by its
    score; equal scores are a half. A completion without a valid score loses."""
    own, other = (
        [-math.inf if math.isnan(score) else score for score in scores] for scores in (ours, theirs)
    )
    wins = [(x > y) + 0.5 * (x == y) for x, y in zip(own, other, strict=True)]
    return Interval.share(wins, samples)


def _pass_at(total: Sequence[float], samples: int, threshold: float | None) -> dict[str, Interval]:
    """Estimate pass@k for k = 1, 2, 4, ... and `samples`. A completion without a valid reward is
    not right."""
    if threshold is None:
        if not set(total) <= {0.0, 1.0}:
            return {}
        threshold = 1.0
    right = [
        sum(value >= threshold for value in total[start : start + samples])
        for start in range(0, len(total), samples)
    ]
    counts = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return {
        f"pass_at_{k}": Interval.share([pass_at_k(c, samples, k) for c in right]) for k in counts
    }


def _perplexity(losses: Sequence[float], lengths: Sequence[float], samples: int) -> Interval:
    mean = Interval.ratio(losses, lengths, samples)
    return Interval(*(math.exp(min(80.0, x)) for x in (mean.value, mean.low, mean.high)))


def standing_table(names: Sequence[str], found: Sequence[Standing], title: str) -> Table:
    """Return the figures of one model, or of several side by side, as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("95% intervals over prompts")
    for name in names:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(name for one in found for name in one.rows):
        label = LABELS.get(row, row.replace("pass_at_", "pass@"))
        table.add_row(label, *(_cell(row, one.rows.get(row)) for one in found))
    if any(one.invalid for one in found):
        table.add_row(LABELS["invalid"], *(str(one.invalid) for one in found))
    return table


def _cell(name: str, row: Interval | None) -> str:
    if row is None or math.isnan(row.value):
        return ""
    form = "{:.1%}" if name.startswith(SHARES) else "{:.4g}"
    if math.isnan(row.low):
        return form.format(row.value)
    return f"{form.format(row.value)} ({form.format(row.low)} to {form.format(row.high)})"
