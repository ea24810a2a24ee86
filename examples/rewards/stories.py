"""Reward for short stories that a reader can check by eye. It looks for fables, in which animals
appear and someone speaks.

    fusedrl train ppo --model MODEL --data examples/prompts/stories.jsonl --reward
    examples/rewards/stories.py:fable

`fable` requires whole sentences and speech, so a list of animals earns nothing. Text that repeats
itself loses more than it can earn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ANIMALS = frozenset(
    {
        "ant",
        "bear",
        "bee",
        "bird",
        "bunny",
        "butterfly",
        "cat",
        "chicken",
        "cow",
        "deer",
        "dog",
        "dolphin",
        "donkey",
        "duck",
        "elephant",
        "fish",
        "fox",
        "frog",
        "giraffe",
        "goat",
        "goose",
        "hen",
        "horse",
        "kitten",
        "kitty",
        "lamb",
        "lion",
        "lizard",
        "monkey",
        "mouse",
        "owl",
        "parrot",
        "penguin",
        "pig",
        "pony",
        "puppy",
        "rabbit",
        "rat",
        "sheep",
        "snail",
        "snake",
        "spider",
        "squirrel",
        "tiger",
        "turtle",
        "whale",
        "wolf",
        "worm",
        "zebra",
    }
)
SENTENCE = 5  # words that make a sentence
SPEECH = 3  # words that make a speech
MOST_ANIMALS, MOST_SPEECHES = 3, 2


def fable(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> list[float]:
    """Score each completion from -5 to 5:

    +1  each sentence of at least five words with an animal that neither the prompt nor an earlier
        sentence named; three at the most
    +1  each different speech "..." of at least three words; two at the most
    -5 x the share of word triples that occurred before (fresh text is near 0; a loop is near 1)
    """
    return [
        _fable(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _fable(prompt: str, completion: str) -> float:
    known, animals = _animals(_words(prompt)), 0
    for sentence in re.split(r"[.!?]", completion):
        words = _words(sentence)
        new = _animals(words) - known
        if new and len(words) >= SENTENCE:
            known |= new
            animals += 1
    speeches = {
        tuple(words)
        for words in map(_words, re.findall(r'"([^"]*)"', completion))
        if len(words) >= SPEECH
    }
    words = _words(completion)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(triples)) / len(triples) if triples else 0.0
    return min(animals, MOST_ANIMALS) + min(len(speeches), MOST_SPEECHES) - 5.0 * repeated


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _animals(words: list[str]) -> set[str]:
    """Return the animals among the words; a plural counts as its singular."""
    return {name for word in words for name in (word, word.removesuffix("s")) if name in ANIMALS}
