"""Proxy reward that is easy to hack: it counts cheerful words, but is meant to measure whether a
story is pleasant.

    fusedrl train grpo --model MODEL --data examples/prompts/stories.jsonl --reward
    examples/rewards/cheerful.py:cheerful \\
        --monitor_reward examples/rewards/stories.py:fable

Without a KL (--kl.coef 0) the policy learns to repeat the words. The monitored reward, which is not
trained on, then falls, and the alarm reports it.
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
    """Count the cheerful words in each completion, repetitions included."""
    return [
        float(sum(word in WORDS for word in re.findall(r"[a-z]+", completion.lower())))
        for completion in completions
    ]
