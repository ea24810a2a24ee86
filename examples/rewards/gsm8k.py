"""Exact verifier of grade-school mathematics (GSM8K): compares the last "#### number" of the
completion with the right answer, in the column "gold".

    fusedrl train ppo --model MODEL --data gsm8k/chat:train.jsonl --reward
    examples/rewards/gsm8k.py:exact

Reading a file of GSM8K adds the column "gold" to its prompts. `exact` requires the form of the
demonstrations, "#### number". `last_number` accepts every answer whose last number is right, for
models that were not trained on this form.

A number is 18, 1,200, $5, .5, -3, 1.5e3 or a fraction, 1/2; the number in "gold" is read by the
same rule. A minus (- or U+2212) is a sign unless a letter, a digit or another dash stands before
it: in "the result-18" it is a hyphen. Numbers joined by +, -, *, / or ^, as in 10-4 and 3^2, are a
calculation without a result, so an answer that ends with one is wrong; 10-4=6 ends with 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from fusedrl.engine.rewards.answers import SUM, value_of

MARK = re.compile(r"####\s*(?:\$\s+)?")


def exact(completions: Sequence[Any], gold: Sequence[Any], **columns: Any) -> list[float | None]:
    """Return 1 if the last "#### number" equals the number in "gold", else 0; None for rows without
    "gold"."""
    return _agree(_marked, completions, gold)


def last_number(
    completions: Sequence[Any], gold: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Return 1 if the last number of the completion equals the number in "gold", else 0; None for
    rows without "gold"."""
    return _agree(SUM.finditer, completions, gold)


def _agree(
    find: Callable[[str], Iterator[re.Match[str]]], completions: Sequence[Any], gold: Sequence[Any]
) -> list[float | None]:
    right = [None if number is None else _gold(row, number) for row, number in enumerate(gold)]
    scores: list[float | None] = []
    for completion, number in zip(completions, right, strict=True):
        *_, last = (None, *find(_text(completion)))
        value = None if last is None else value_of(last)
        scores.append(None if number is None else float(value == number))
    return scores


def _text(completion: Any) -> str:
    """Return a completion's text. If the prompt is chat messages, the completion is one message of
    the assistant."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _marked(text: str) -> Iterator[re.Match[str]]:
    for mark in MARK.finditer(text):
        found = SUM.match(text, mark.end())
        if found and not re.match(r",*\d", text[found.end() :]):  # 1,04 is no number
            yield found


def _gold(row: int, number: Any) -> Fraction:
    found = SUM.fullmatch(str(number).strip())
    value = None if found is None else value_of(found)
    if value is None:
        raise ValueError(
            f"row {row}: expected a number in the column gold, as 18, 1,200, $5 or 1/2, got "
            f"{number!r:.80}; null leaves a row to other rewards"
        )
    return value
