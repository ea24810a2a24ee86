"""Reward for short, complete chat answers. An answer of at most 30 words that ends like a sentence
gets 1; every other answer gets minus a hundredth for each of its words."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 30  # words


def _text(completion: str | Sequence[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def concise(prompts: Sequence, completions: Sequence, **columns: object) -> list[float]:
    """Return 1.0 for a short, complete answer, else minus a hundredth of its number of words."""
    texts = [_text(completion).strip() for completion in completions]
    return [
        1.0
        if text and text[-1] in ".!?" and len(text.split()) <= MOST
        else -len(text.split()) / 100
        for text in texts
    ]


def whole_and_short(prompts: Sequence, completions: Sequence, **columns: object) -> list[float]:
    """Return 1.0 if the answer is short and complete, else 0.0. Its mean is the share of such
    answers."""
    return [max(0.0, score) for score in concise(prompts, completions)]
