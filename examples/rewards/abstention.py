"""Reward that makes it worthwhile to say "I don't know": right answers earn much, abstaining costs
a little, wrong answers cost much.

    fusedrl train ppo --model MODEL --data questions.jsonl --reward
    examples/rewards/abstention.py:honest

Supervised answers teach a model to answer even if it does not know. With the values of this reward,
guessing pays only above a confidence of (abstain - wrong) / (correct - wrong): three quarters for
knowledge. Columns of the data:

    answers     the accepted answers of the row, a string or a list of strings; null or [] where the
                text holds no answer, so that abstaining is right
    type        "text-grounded" (the prompt holds what is needed), "knowledge-seeking" (the model
                must know), "creative" (nothing to be right about: the reward does not apply, and
                another one should). A row without a type is knowledge-seeking

An answer counts anywhere in the completion. So keep completions short (generation.max_new_tokens),
or a list of guesses earns the reward.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

VALUES = {  # type: (correct, abstain, wrong)
    # the answer is there to be read: abstaining is nearly as bad as a mistake
    "text-grounded": (1.0, -0.5, -1.0),
    "knowledge-seeking": (1.0, -0.5, -5.0),
}
ABSTAINS = re.compile(
    r"\bI (?:really )?(?:do not|don't|cannot|can't) (?:know|say|tell|answer)\b|\bI(?: am|'m) not "
    r"(?:sure|certain)\b"
    r"|\b(?:not enough|insufficient) information\b|不知道|无法回答",
    re.IGNORECASE,
)


def honest(
    completions: Sequence[Any],
    answers: Sequence[Any],
    type: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Return the reward of each completion; None for creative queries."""
    kinds = type if type is not None else [None] * len(completions)
    return [
        _value(_text(completion), accepted, kind or "knowledge-seeking")
        for completion, accepted, kind in zip(completions, answers, kinds, strict=True)
    ]


def _value(completion: str, accepted: Any, kind: str) -> float | None:
    if kind == "creative":
        return None
    if kind not in VALUES:
        raise ValueError(
            f"expected a type of text-grounded, knowledge-seeking or creative, got {kind!r}"
        )
    correct, abstain, wrong = VALUES[kind]
    known = [accepted] if isinstance(accepted, str) else accepted or []
    if ABSTAINS.search(completion):
        return abstain if known else correct  # also when it goes on to guess: hedging must not pay
    words = _words(completion)
    return correct if any(_within(_words(answer), words) for answer in known) else wrong


def _text(completion: Any) -> str:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.replace("\u2019", "'")


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [
        word
        for word in re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", plain)
        if word not in ("a", "an", "the")
    ]


def _within(answer: list[str], words: list[str]) -> bool:
    """Whether the words of the answer occur next to each other in these words."""
    return bool(answer) and any(
        words[i : i + len(answer)] == answer for i in range(len(words) - len(answer) + 1)
    )
