"""A proxy that is easy to hack: cheerful words, counted. What it is meant to measure is whether a
story is a pleasant one.

    fusedrl train grpo --model MODEL --data examples/prompts/stories.jsonl --reward
    examples/rewards/cheerful.py:cheerful \\
        --monitor_reward examples/rewards/stories.py:fable

Without a KL (--kl.coef 0) the policy learns to say the words again and again; the gold reward,
which is not trained on, falls, and the alarm says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WORDS = frozenset(
    {
        "cheerful",
        "fun",
        "glad",
        "happily",
        "happy",
        "joy",
        "laughed",
        "love",
        "loved",
        "nice",
        "proud",
        "smile",
        "smiled",
        "smiling",
    }
)


def cheerful(completions: Sequence[str], **columns: Any) -> list[float]:
    """Cheerful words in each completion, however often each comes."""
    return [
        float(sum(word in WORDS for word in re.findall(r"[a-z]+", completion.lower())))
        for completion in completions
    ]
