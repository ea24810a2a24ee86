"""Exact verifier: 1 if the completion is the answer and nothing else, else 0.
examples/arithmetic.py writes the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str],
    **columns: Any,
) -> list[float]:
    """Compare the column `answer` with the whole completion."""
    return [
        float(completion.strip() == right)
        for completion, right in zip(completions, answer, strict=True)
    ]
