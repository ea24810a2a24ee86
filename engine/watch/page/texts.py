"""Completions of the same prompts over time, with what changed from one to the next."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

from fusedrl.engine.watch.run_files import RunRecord, Sample
from fusedrl.engine.watch.run_report import LONGEST, spread

COLUMNS, MOST_PROMPTS = 4, 16
ALIKE = 0.3  # texts with a smaller share of common words are not compared word by word
_PUNCTUATION = r"""!-/:-@\[-`{-~"""
# Words with the blanks behind them, and punctuation marks. Chinese, Japanese and Korean characters
# are words of their own.
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"(?:[{_PUNCTUATION}{_WIDE}]|[^\s{_PUNCTUATION}{_WIDE}]+)\s*|\s+")


@dataclass(frozen=True)
class Piece:
    """Part of a text: kept ("same"), new ("new"), or gone since the text before ("gone")."""

    kind: str
    text: str


@dataclass(frozen=True)
class Card:
    """Completion after a step.

    Attributes:
        scores: (name, value as text, change since the card before as text or "").
        pieces: the text, against that of the card before.
        rewritten: whether too little of the text before is left for a comparison.
        cut: characters of the completion if not all of them are shown, else 0.
    """

    step: int
    scores: list[tuple[str, str, str]]
    pieces: list[Piece]
    rewritten: bool
    cut: int


@dataclass(frozen=True)
class Prompt:
    """A prompt and, for each run by its place, what came of it at some evaluations."""

    text: str
    cut: int
    rows: list[tuple[int, list[Card]]]


def word_difference(before: str, after: str) -> list[Piece] | None:
    """Compare two texts word by word. Return the pieces of both in order, or None if less than
    ALIKE of their words are common. In texts of 200 words and more, words that are frequent there
    count only beside others that are common (difflib's autojunk): without that, long repetitions
    take seconds."""
    if before == after:
        return [Piece("same", after)] if after else []
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    a, b = ([word.strip() for word in words] for words in (old, new))
    matcher = SequenceMatcher(None, a, b)
    if matcher.ratio() < ALIKE:
        return None
    pieces = []
    for kind, i, j, k, l in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(new[k:l])))
        else:
            pieces += [
                Piece(name, text)
                for name, text in (("gone", "".join(old[i:j])), ("new", "".join(new[k:l])))
                if text
            ]
    return pieces


def prompts_of(runs: Sequence[RunRecord]) -> tuple[list[Prompt], int]:
    """Return at most MOST_PROMPTS prompts with at most COLUMNS evaluations of each run, and how
    many prompts there are."""
    texts = list(dict.fromkeys(sample.prompt for run in runs for sample in run.samples))
    found = []
    for text in texts[:MOST_PROMPTS]:
        rows = []
        for index, run in enumerate(runs):
            by_step = {s.step: s for s in run.samples if s.prompt == text}
            if by_step:
                steps = spread(sorted(by_step), COLUMNS)
                rows.append((index, _cards([by_step[step] for step in steps])))
        shown = text.strip()
        found.append(Prompt(shown[:LONGEST], len(shown) if len(shown) > LONGEST else 0, rows))
    return found, len(texts)


def _cards(samples: list[Sample]) -> list[Card]:
    cards = [_card(samples[0], None)]
    return cards + [_card(after, before) for before, after in pairwise(samples)]


def _card(sample: Sample, before: Sample | None) -> Card:
    text = sample.completion.strip()
    shown = text[:LONGEST]
    pieces = None if before is None else word_difference(before.completion.strip()[:LONGEST], shown)
    scores = []
    for name, value in sample.scores.items():
        earlier = None if before is None else before.scores.get(name)
        change = (
            f"{value - earlier:+.3g}"
            if value is not None and earlier is not None and not math.isclose(value, earlier)
            else ""
        )
        scores.append((name, "invalid" if value is None else f"{value:.3g}", change))
    return Card(
        sample.step,
        scores,
        [Piece("same", shown)] if pieces is None else pieces,
        before is not None and pieces is None and bool(text),
        len(text) if len(text) > LONGEST else 0,
    )
