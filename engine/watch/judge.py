"""Pairwise judging: which model's completions are better, and how much of the verdict is the
judge's bias.

    judge(prompts, a, b, **columns) -> list[str | float]

A judge returns one verdict per pair: "a", "b" or "tie", or the probability in [0, 1] that a is
better. It receives those arguments and prompt columns that it has parameters for. Every pair is
judged in both orders, because people and language models alike tend to prefer a position (Wang et
al., 2023, "Large Language Models are not Fair Evaluators"). Let p1 be the verdict on (A, B) and p2
the verdict on (B, A), each as the probability that the first answer is better:

    preference of a pair    (p1 + 1 - p2) / 2
    A wins                  p1 > 1/2 and 1 - p2 > 1/2: in both orders. B likewise; else it is a tie
    first                   (p1 + p2) / 2: how much of the verdict goes to the first answer; 1/2
                            for a judge without that bias

Means are over prompts. Intervals are Wilson's, with one trial per prompt. They are wide enough for
verdicts that are probabilities, and for several pairs of one prompt.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from fusedrl.engine.base.blame import Parameters, blame, place_of, shown
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.data.records import Prompt
from fusedrl.engine.rewards.functions import import_function, own_copies, values_of
from fusedrl.engine.rewards.rewards import RewardSet

VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Answers:
    """One side of the pairs: texts and token ids, one entry per pair."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Pairs:
    """Input of a judge, one entry per pair."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    first: Answers
    second: Answers
    columns: Mapping[str, Sequence[Any]]

    def swapped(self) -> Pairs:
        """Return the pairs with first and second answers swapped."""
        return Pairs(self.prompts, self.prompt_ids, self.second, self.first, self.columns)


class Judge(Protocol):
    """Judge with a name, which returns one verdict per pair when called."""

    name: str

    def __call__(self, pairs: Pairs) -> Any: ...


class FunctionJudge:
    """Judge that calls a function of the form at the top of this file."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self._parameters = Parameters(f"judge {self.name!r}", function)

    def check(self, columns: Collection[str]) -> None:
        """Raise RewardError if the function needs an argument that is neither of a judge nor one of
        these columns of the data."""
        if missing := self._parameters.lacking({"prompts", "a", "b", *columns}):
            raise RewardError(
                f"judge {self.name!r} needs the argument {missing!r}; a judge is given prompts, a, "
                "b and the columns of the data, which has "
                f"{', '.join(sorted(columns)) or 'none'} beside the prompt; rename it, or give it "
                f"a default in {place_of(self.function)}"
            )

    def __call__(self, pairs: Pairs) -> Any:
        arguments = {
            "prompts": own_copies(pairs.prompts),
            "a": list(pairs.first.texts),
            "b": list(pairs.second.texts),
        }
        arguments |= {
            name: own_copies(column)
            for name, column in pairs.columns.items()
            if name not in arguments
        }
        self.check(pairs.columns)
        return self.function(**self._parameters.chosen(arguments))


class RewardJudge:
    """Judge by reward: the answer with the higher reward wins, and equal rewards tie. An answer
    whose reward is invalid loses; if both are invalid, they tie."""

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards, self.name = rewards, " + ".join(rewards.names)

    def __call__(self, pairs: Pairs) -> list[str]:
        ours, theirs = (
            self.rewards.score(
                pairs.prompts, side.texts, pairs.prompt_ids, side.ids, pairs.columns
            ).total
            for side in (pairs.first, pairs.second)
        )
        keys = [
            [-math.inf if math.isnan(total) else total for total in totals]
            for totals in (ours, theirs)
        ]
        return ["a" if x > y else "b" if x < y else "tie" for x, y in zip(*keys, strict=True)]


def load_judge(spec: str | Path | Callable[..., Any]) -> FunctionJudge:
    """Make a judge from `file.py:function` or from a function.

    Raises:
        RewardError: the file or the function is missing, the import fails, or `spec` names
            something that is not a function.
    """
    if callable(spec):
        return FunctionJudge(spec)
    path, colon, function = str(spec).rpartition(":")
    if colon and path.endswith(".py"):
        return FunctionJudge(import_function(Path(path), function, "judge"))
    raise RewardError(f"judge {str(spec)!r}: expected file.py:function")


# ---- judging -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Share:
    """Share in [0, 1] with its 95% interval (Wilson)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], groups: Sequence[int]) -> Share:
        """Average `values`, each in [0, 1], first within each group and then over the groups. If
        there are no values, return nan with the interval [0, 1]."""
        members: dict[int, list[float]] = defaultdict(list)
        for value, group in zip(values, groups, strict=True):
            members[group].append(value)
        total = math.fsum(math.fsum(group) / len(group) for group in members.values())
        return cls(
            total / len(members) if members else math.nan, *wilson_interval(total, len(members))
        )

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class JudgeReport:
    """Report of a judge's verdicts on the answers of A and B.

    Attributes:
        judge: name of the judge.
        win_rate: the mean preference for A; a tie counts as a half.
        wins, losses, ties: number of pairs that A wins, loses and ties.
        inconsistent: share of the pairs whose winner depends on the order.
        first_wins: how much of the verdicts goes to the first answer; 1/2 without bias.
        longer_wins: the mean preference for the longer text (in characters), over the pairs whose
            lengths differ.
        pairs, prompts: number of pairs, and of prompts.
        preferences: the preference for A in every pair.
    """

    judge: str
    win_rate: Share
    wins: int
    losses: int
    ties: int
    inconsistent: Share
    first_wins: Share
    longer_wins: Share
    pairs: int
    prompts: int
    preferences: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; nan becomes null."""
        found = asdict(self)
        for name in ("win_rate", "inconsistent", "first_wins", "longer_wins"):
            found[name] = {
                key: value if math.isfinite(value) else None for key, value in found[name].items()
            }
        return found


def judge_pairs(judge: Judge, pairs: Pairs, groups: Sequence[int] | None = None) -> JudgeReport:
    """Judge every pair in both orders; `pairs.first` are A's answers.

    Args:
        groups: a number for each pair, equal for pairs of the same prompt. If None, every pair has
            a prompt of its own.
    Raises:
        RewardError: there is no pair, or the judge raised an error or did not return one verdict
            per pair; the message names the judge and the pair.
    """
    count = len(pairs.prompts)
    if count == 0:
        raise RewardError(f"judge {judge.name!r}: expected at least one pair, got none")
    orders = [_verdicts(judge, one) for one in (pairs, pairs.swapped())]
    # probability that A is better: given as the first answer, and as the second
    ours = [(p1, 1.0 - p2) for p1, p2 in zip(*orders, strict=True)]
    preferences = [(p + q) / 2 for p, q in ours]
    signs = [(_sign(p), _sign(q)) for p, q in ours]
    groups = list(range(count)) if groups is None else list(groups)
    lengths = [(len(a), len(b)) for a, b in zip(pairs.first.texts, pairs.second.texts, strict=True)]
    unequal = [index for index, (a, b) in enumerate(lengths) if a != b]
    longer = [
        preferences[index] if lengths[index][0] > lengths[index][1] else 1.0 - preferences[index]
        for index in unequal
    ]
    wins, losses = signs.count((1, 1)), signs.count((-1, -1))
    return JudgeReport(
        judge.name,
        Share.of(preferences, groups),
        wins,
        losses,
        count - wins - losses,
        Share.of([float(p != q) for p, q in signs], groups),
        Share.of([(p + 1.0 - q) / 2 for p, q in ours], groups),
        Share.of(longer, [groups[index] for index in unequal]),
        count,
        len(set(groups)),
        preferences,
    )


def _sign(probability: float) -> int:
    return (probability > 0.5) - (probability < 0.5)


def _verdicts(judge: Judge, pairs: Pairs) -> list[float]:
    what = f"judge {judge.name!r}"
    found = []
    returned = blame(what, partial(judge, pairs), function=getattr(judge, "function", None))
    for index, value in enumerate(values_of(what, returned, len(pairs.prompts), "verdict", "pair")):
        number = VERDICTS.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
            raise RewardError(
                f'{what}: expected "a", "b", "tie" or a probability within 0 and 1 for pair '
                f"{index}, got {shown(value)}"
            )
        found.append(float(number))
    return found


def report_table(report: JudgeReport, labels: tuple[str, str] = ("A", "B")) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(
        title=f"{labels[0]} (A) against {labels[1]} (B), by {report.judge}: {report.pairs} pairs "
        f"of {report.prompts} prompts, both orders each",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("win rate of A, ties a half (95% interval)", str(report.win_rate))
    table.add_row(
        "A wins / ties / B wins, in both orders", f"{report.wins} / {report.ties} / {report.losses}"
    )
    table.add_row("what stands first wins (50%: no bias)", str(report.first_wins))
    table.add_row("the winner depends on the order", str(report.inconsistent))
    table.add_row(
        "the longer text wins",
        str(report.longer_wins) if math.isfinite(report.longer_wins.value) else "none is longer",
    )
    return table
