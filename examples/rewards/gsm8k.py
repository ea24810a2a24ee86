"""An exact verifier of grade-school mathematics (GSM8K): the last "#### number" of the completion
against the gold one.

    fusedrl train ppo --model MODEL --data gsm8k/chat:train.jsonl --reward
    examples/rewards/gsm8k.py:exact

Reading a file of GSM8K adds the column "gold" to its prompts. `exact` asks for the form that the
demonstrations have; `last_number` takes any answer whose last number is right, for models that were
not trained on that form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
MARKED = re.compile(rf"####\s*\$?\s*({NUMBER})(?![\d,]*\d)")
ANY = re.compile(rf"(?<![\d.])({NUMBER})(?<=\d)")


def exact(
    completions: Sequence[Any], gold: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """1 where the last "#### number" is the gold number, else 0; None for rows without one."""
    return _agree(MARKED, completions, gold)


def last_number(
    completions: Sequence[Any], gold: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """1 where the last number of all is the gold one, else 0; None for rows without one."""
    return _agree(ANY, completions, gold)


def _agree(
    pattern: re.Pattern[str], completions: Sequence[Any], gold: Sequence[str | None]
) -> list[float | None]:
    return [
        None if number is None else float(_last(pattern, _text(completion)) == Decimal(number))
        for completion, number in zip(completions, gold, strict=True)
    ]


def _text(completion: Any) -> str:
    """A completion is a text, or one message of the assistant where the prompt is messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _last(pattern: re.Pattern[str], text: str) -> Decimal | None:
    found = [number for number in pattern.findall(text) if any(c.isdigit() for c in number)]
    return Decimal(found[-1].replace(",", "")) if found else None
