"""A reward, tried on completions before a run is started with it: how its values are distributed,
what fails, how long it takes, whether it says the same twice, and whether it tells the completions
of a prompt apart.

    ties            share of the prompts, of those with several valid values, whose values are all
                    equal: a method that compares completions of a prompt learns nothing from those
    determinism     the same calls are made twice
    with length     Spearman's rank correlation of value and length
    agreement       with another reward: rank correlations over all completions, and the share of
                    the pairs of a prompt that both order, which they order alike
    ranks           where the data compares answers: the share of the pairs whose better answer has
                    the higher value; a tie is a half
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from fusedrl.engine.base.association import agreement, kendall, spearman
from fusedrl.engine.base.blame import shown
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.base.estimates import Interval
from fusedrl.engine.base.printable import printable
from fusedrl.engine.data.records import Prompt
from fusedrl.engine.rewards.rewards import Reward, RewardSet

_BINS, _WIDTH = 10, 30
_FEW = 12  # distinct values that are counted one by one
_ALIKE = 4  # completions that fail alike, one after the other, before the rest of a call is left
_EXAMPLE = 160  # characters


@dataclass(frozen=True)
class Sample:
    """One completion to try a reward on.

    Attributes:
        group: number of the prompt.
        rank: rank among the answers of its row, 1 is best; None if the data does not compare them.
        row: number of the row, within which ranks compare.
    """

    prompt: Prompt
    prompt_ids: Sequence[int]
    completion: str
    completion_ids: Sequence[int]
    columns: dict[str, Any]
    group: int
    rank: int | None = None
    row: int = 0


@dataclass
class Tried:
    """Results of one pass over the samples, with one entry per sample: its value (nan where there
    is none), and the kind of its failure ("" where there is none).

    Attributes:
        examples: kind of failure -> (index of the first such sample, the message).
        seconds: of all calls, and of the longest.
    """

    values: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0
    longest: float = 0.0

    @property
    def hung(self) -> bool:
        """Whether some call was late."""
        return any(name.startswith("took longer") for name in self.examples)


class _Late(RewardError):
    """A call that took longer than it may."""


def try_reward(
    reward: Reward, samples: Sequence[Sample], *, batch: int = 64, limit: float = 0.0
) -> Tried:
    """Call the reward on the samples, `batch` at a time, as a run would. Of a call that raises, its
    completions are tried one by one, to find those that make it raise.

    Args:
        limit: seconds that a call may take; 0: any. It needs the main thread, and cannot end a call
            that is inside a library which does not return to Python.
    """
    rewards, found = RewardSet([reward]), Tried()
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        began = time.perf_counter()
        try:
            values, failures = _called(rewards, part, limit)
        except RewardError as error:
            values, failures = _one_by_one(rewards, part, limit, error)
        took = time.perf_counter() - began
        found.seconds, found.longest = found.seconds + took, max(found.longest, took)
        for index, (kind, said) in enumerate(failures, start):
            found.failures.append(kind)
            if kind:
                found.examples.setdefault(kind, (index, said))
        found.values += values
    return found


Outcome = tuple[list[float], list[tuple[str, str]]]  # values; (kind of failure, message)


def _called(rewards: RewardSet, part: Sequence[Sample], limit: float) -> Outcome:
    names = sorted({name for one in part for name in one.columns})
    with _limited(limit, len(part)):
        scores = rewards.score(
            [one.prompt for one in part],
            [one.completion for one in part],
            [one.prompt_ids for one in part],
            [one.completion_ids for one in part],
            {name: [one.columns.get(name) for one in part] for name in names},
        )
    reasons = {index: reason for index, _, reason in reversed(scores.invalid)}
    return scores.total, [
        (_kind(reasons[index]), reasons[index]) if index in reasons else ("", "")
        for index in range(len(part))
    ]


def _one_by_one(
    rewards: RewardSet, part: Sequence[Sample], limit: float, error: RewardError
) -> Outcome:
    values: list[float] = []
    failures: list[tuple[str, str]] = []
    if len(part) == 1:
        return [math.nan], [(_raised(error), str(error))]
    for one in part:
        last = {kind for kind, _ in failures[-_ALIKE:]}
        if len(failures) >= _ALIKE and len(last) == 1 and "" not in last:
            failures.append(failures[-1])  # each would fail alike, perhaps after a long wait
            values.append(math.nan)
            continue
        try:
            value, failure = _called(rewards, [one], limit)
        except RewardError as failed:
            value, failure = [math.nan], [(_raised(failed), str(failed))]
        values += value
        failures += failure
    if not any(kind for kind, _ in failures):  # it raises only for several at once
        failures = [(_raised(error), str(error))] * len(part)
        values = [math.nan] * len(part)
    return values, failures


def _raised(error: RewardError) -> str:
    """Return the kind of a failed call."""
    if isinstance(error, _Late):
        return str(error).partition(",")[0]
    if error.__cause__ is not None:
        return f"raised {type(error.__cause__).__name__}"
    said = re.sub(r"^reward '[^']*':? ?", "", str(error))
    if match := re.match(r"expected (a list of )?\d+ values, one per completion, got", said):
        return "returned no list" if match[1] else "returned a list of another length"
    return "refused: " + said.partition(";")[0][:80]


def _kind(reason: str) -> str:
    """Return the kind of an invalid value."""
    head, _, got = reason.partition(", got ")
    if head.startswith("no reward applies"):
        return "None: does not apply"
    if head.startswith("expected a finite number"):
        return {"nan": "NaN", "inf": "infinite", "-inf": "infinite"}.get(got, "no number")
    if head.startswith("expected a number of at most"):
        return "too large"
    if head.startswith("expected a number"):
        return "no number"
    if head.startswith("expected 1 values, one per completion"):
        return "returned a list of another length"
    if head.startswith("expected a list of 1 values"):
        return "returned no list"
    if head.startswith("raised "):
        return head.partition(":")[0]
    return head.partition(" (")[0][:80]  # of a worker process: without the line where it was


@contextlib.contextmanager
def _limited(seconds: float, count: int) -> Iterator[None]:
    """Raise an error in the block once it has taken so many seconds, and again every second."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise _Late(f"took longer than {seconds:g} s, for a call with {count} completions")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# ---- the report ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Agreement:
    """Agreement of two rewards: rank correlations over the completions with both values, and the
    share of the pairs of a prompt ordered alike, of those that both order."""

    name: str
    completions: int
    spearman: float
    kendall: float
    pairs: int
    ordered_alike: Interval


@dataclass(frozen=True)
class RewardCheck:
    """Report on a reward; see the top of this file.

    Attributes:
        failures: kind -> number of completions, and an example: the prompt, the completion and the
            message.
        histogram: (low, high, number of values); low = high for a single value.
        ties: None if no prompt has several valid values.
        changed: number of completions with another value the second time, and the largest
            difference; None if there was no second time.
        ranked: None if the data does not compare answers.
    """

    name: str
    completions: int
    prompts: int
    valid: int
    mean: float
    deviation: float
    quantiles: dict[str, float]
    distinct: int
    histogram: list[tuple[float, float, int]]
    seconds_per_completion: float
    seconds_longest_call: float
    failures: dict[str, dict[str, Any]]
    ties: Interval | None
    several: int
    changed: tuple[int, float] | None
    with_length: float
    ranked: Interval | None
    against: Agreement | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; what is not finite becomes null."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Interval):
                value = value.to_json()
            elif isinstance(value, Agreement):
                value = vars(value) | {"ordered_alike": value.ordered_alike.to_json()}
            found[name] = value
        if self.changed is not None:
            found["changed"] = {"completions": self.changed[0], "largest": self.changed[1]}
        return json.loads(json.dumps(_finite(found)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_reward(
    reward: Reward,
    samples: Sequence[Sample],
    *,
    against: Reward | None = None,
    batch: int = 64,
    limit: float = 0.0,
) -> RewardCheck:
    """Try a reward on samples, twice, and report on it.

    Args:
        against: another reward, to compare with.
        batch: completions of one call.
        limit: seconds that a call may take (`try_reward`).
    Raises:
        RewardError: there are no samples.
    """
    if not samples:
        raise RewardError("reward-check: expected at least one completion, got none")
    first = try_reward(reward, samples, batch=batch, limit=limit)
    again = None if first.hung else try_reward(reward, samples, batch=batch, limit=limit)
    other = None if against is None else try_reward(against, samples, batch=batch, limit=limit)
    good = [i for i, value in enumerate(first.values) if math.isfinite(value)]
    values = sorted(first.values[i] for i in good)
    mean = math.fsum(values) / len(values) if values else math.nan
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values)) if values else 0.0
    ties = _ties(first.values, samples, good)
    lengths = [len(samples[i].completion_ids) or len(samples[i].completion) for i in good]
    return RewardCheck(
        reward.name,
        len(samples),
        len({one.group for one in samples}),
        len(good),
        mean,
        spread if values else math.nan,
        {name: values[round(q * (len(values) - 1))] for name, q in _QUANTILES if values},
        len(set(values)),
        _histogram(values),
        first.seconds / len(samples),
        first.longest,
        _failures(first, samples),
        Interval.share(ties) if ties else None,
        len(ties),
        None if again is None else _changed(first.values, again.values),
        spearman([first.values[i] for i in good], lengths),
        _ranked(first.values, samples),
        None
        if against is None or other is None
        else _agreement(against.name, first, other, samples),
    )


_QUANTILES = (("min", 0.0), ("5%", 0.05), ("50%", 0.5), ("95%", 0.95), ("max", 1.0))


def _failures(tried: Tried, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    counts = Counter(kind for kind in tried.failures if kind)
    return {
        kind: {
            "completions": count,
            "prompt": shown(samples[tried.examples[kind][0]].prompt),
            "completion": samples[tried.examples[kind][0]].completion[:_EXAMPLE],
            "message": tried.examples[kind][1],
        }
        for kind, count in counts.most_common()
    }


def _ties(values: Sequence[float], samples: Sequence[Sample], good: Sequence[int]) -> list[float]:
    """Return for each prompt with several valid values whether they are all equal."""
    groups: dict[int, list[float]] = {}
    for i in good:
        groups.setdefault(samples[i].group, []).append(values[i])
    return [float(len(set(group)) == 1) for group in groups.values() if len(group) > 1]


def _changed(first: Sequence[float], again: Sequence[float]) -> tuple[int, float]:
    apart = [
        abs(x - y) if math.isfinite(x) and math.isfinite(y) else math.inf
        for x, y in zip(first, again, strict=True)
        if x != y and not (math.isnan(x) and math.isnan(y))
    ]
    return len(apart), max(apart, default=0.0)


def _ranked(values: Sequence[float], samples: Sequence[Sample]) -> Interval | None:
    rows: dict[int, list[int]] = {}
    for i, one in enumerate(samples):
        if one.rank is not None and math.isfinite(values[i]):
            rows.setdefault(one.row, []).append(i)
    found = []
    for members in rows.values():
        pairs = [
            (values[i] > values[j]) + 0.5 * (values[i] == values[j])
            for i in members
            for j in members
            if (samples[i].rank or 0) < (samples[j].rank or 0)
        ]
        if pairs:
            found.append(math.fsum(pairs) / len(pairs))
    return Interval.share(found) if found else None


def _agreement(name: str, ours: Tried, theirs: Tried, samples: Sequence[Sample]) -> Agreement:
    both = [
        i
        for i, (x, y) in enumerate(zip(ours.values, theirs.values, strict=True))
        if math.isfinite(x) and math.isfinite(y)
    ]
    x, y = [ours.values[i] for i in both], [theirs.values[i] for i in both]
    pairs = agreement(x, y, [samples[i].group for i in both])
    by_group: dict[int, list[float]] = {}
    for group, alike in pairs:
        by_group.setdefault(group, []).append(alike)
    means = [math.fsum(group) / len(group) for group in by_group.values()]
    return Agreement(
        name, len(both), spearman(x, y), kendall(x, y), len(pairs), Interval.share(means)
    )


def _histogram(values: Sequence[float]) -> list[tuple[float, float, int]]:
    counts = Counter(values)
    if len(counts) <= _FEW:
        return [(value, value, counts[value]) for value in sorted(counts)]
    low, high = values[0], values[-1]
    edges = [low + (high - low) * i / _BINS for i in range(_BINS)] + [high]
    found = [0] * _BINS
    for value in values:
        found[min(_BINS - 1, int((value - low) / (high - low) * _BINS))] += 1
    return [(edges[i], edges[i + 1], found[i]) for i in range(_BINS)]


def check_tables(check: RewardCheck) -> list[Table]:
    """Return the report as tables for the terminal."""
    tables = [_figures(check), _bars(check)]
    if check.failures:
        table = Table(title="Without a value", title_justify="left")
        for name in ("kind", "completions", "the first"):
            table.add_column(name)
        for kind, one in check.failures.items():
            said = printable(f"{one['message']}\nfor {one['prompt']} -> {one['completion']!r}")
            table.add_row(kind, str(one["completions"]), said)
        tables.append(table)
    return tables


def _figures(check: RewardCheck) -> Table:
    table = Table(
        title=f"{check.name}: {check.completions} completions of {check.prompts} prompts",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("valid", f"{check.valid} ({check.valid / check.completions:.1%})")
    table.add_row("mean, standard deviation", f"{check.mean:.4g}, {check.deviation:.4g}")
    table.add_row(
        ", ".join(check.quantiles), ", ".join(f"{value:.4g}" for value in check.quantiles.values())
    )
    table.add_row(
        "prompts without a signal: all values equal",
        "no prompt has several"
        if check.ties is None
        else f"{_percent(check.ties)} of {check.several}",
    )
    table.add_row(
        "another value the second time",
        "not tried: a call was late"
        if check.changed is None
        else f"{check.changed[0]}, by {check.changed[1]:.3g} at most"
        if check.changed[0]
        else "none",
    )
    table.add_row(
        "rank correlation with length", _or_none(check.with_length, "all rewards or lengths equal")
    )
    if check.ranked is not None:
        table.add_row("the better answer has the higher value", _percent(check.ranked))
    table.add_row(
        "seconds per completion, of the longest call",
        f"{check.seconds_per_completion:.3g}, {check.seconds_longest_call:.3g}",
    )
    if (other := check.against) is not None:
        table.add_row(
            f"with {other.name}: Spearman, Kendall",
            f"{_or_none(other.spearman)}, {_or_none(other.kendall)}",
        )
        table.add_row(
            f"with {other.name}: pairs of a prompt ordered alike",
            f"{_percent(other.ordered_alike)} of {other.pairs}" if other.pairs else "no such pair",
        )
    return table


def _bars(check: RewardCheck) -> Table:
    table = Table(title="Values", title_justify="left", show_header=False)
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    table.add_column("", no_wrap=True)
    most = max((count for _, _, count in check.histogram), default=1)
    for low, high, count in check.histogram:
        name = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        table.add_row(name, str(count), "█" * round(_WIDTH * count / most) or "▏" * bool(count))
    return table


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _or_none(value: float, otherwise: str = "one of them is constant") -> str:
    return f"{value:.2f}" if math.isfinite(value) else otherwise
