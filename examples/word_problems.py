"""Write word problems like those of GSM8K, for models for which GSM8K is too hard: one or two
calculations with small numbers, a question in everyday words, and the answer in the column "gold".

    python examples/word_problems.py DIR --seed 0

writes DIR/train.jsonl (1,200 problems) and DIR/held_out.jsonl (400), as chat messages. No two
problems have the same kind and numbers, so no held-out problem is a training problem with other
names. Train on them with the verifier for GSM8K:

    fusedrl train grpo --model smollm2 --data DIR/train.jsonl
    --reward examples/rewards/gsm8k.py:last_number
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack"),
    *("Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
THINGS = (
    *("apples", "books", "cards", "cookies", "eggs", "flowers", "marbles", "oranges"),
    *("pencils", "shells", "stamps", "stickers"),
)
CONTAINERS = ("bags", "baskets", "boxes", "jars", "shelves", "trays")
PLACES = ("at the market", "in the garden", "at school", "on the beach", "in the attic")

TRIES = 10_000  # draws, before a kind is said to have no other numbers

Problem = tuple[str, int]
Draw = random.Random


def _people(draw: Draw) -> tuple[str, str, str]:
    one, other = draw.sample(NAMES, 2)
    return one, other, draw.choice(THINGS)


def gift(draw: Draw) -> Problem:
    (a, b, things), x, y = _people(draw), draw.randint(3, 40), draw.randint(2, 30)
    return (
        f"{a} has {x} {things}. {b} gives {a} {y} more. How many {things} does {a} have now?",
        x + y,
    )


def loss(draw: Draw) -> Problem:
    (a, b, things), x = _people(draw), draw.randint(10, 60)
    y = draw.randint(2, x - 2)
    return (
        f"{a} had {x} {things} and gave {y} of them to {b}. How many {things} does {a} have left?",
        x - y,
    )


def groups(draw: Draw) -> Problem:
    (a, _, things), x, y = _people(draw), draw.randint(2, 15), draw.randint(2, 20)
    what = draw.choice(CONTAINERS)
    return (
        f"{a} has {x} {what}. There are {y} {things} in each of the {what}. How many {things} does "
        f"{a} have in total?",
        x * y,
    )


def share(draw: Draw) -> Problem:
    (a, _, things), x, y = _people(draw), draw.randint(2, 12), draw.randint(2, 25)
    return (
        f"{a} shares {x * y} {things} equally among {x} friends. How many {things} does each "
        "friend get?",
        y,
    )


def price(draw: Draw) -> Problem:
    (a, _, things), x, y = _people(draw), draw.randint(2, 20), draw.randint(2, 15)
    return f"{a} buys {x} {things} for {y} dollars each. How many dollars does {a} spend?", x * y


def more_than(draw: Draw) -> Problem:
    (a, b, things), x, y = _people(draw), draw.randint(5, 50), draw.randint(2, 20)
    return (
        f"{a} found {x} {things} {draw.choice(PLACES)}. {b} found {y} more than {a}. How many "
        f"{things} did {b} find?",
        x + y,
    )


def altogether(draw: Draw) -> Problem:
    (a, b, things), x, y = _people(draw), draw.randint(3, 50), draw.randint(3, 50)
    return (
        f"{a} has {x} {things} and {b} has {y} {things}. How many {things} do they have "
        "altogether?",
        x + y,
    )


def twice(draw: Draw) -> Problem:
    (a, b, things), x = _people(draw), draw.randint(3, 300)
    return (
        f"{a} has {x} {things}. {b} has twice as many {things} as {a}. How many {things} does {b} "
        "have?",
        2 * x,
    )


def packed_and_eaten(draw: Draw) -> Problem:
    (a, _, things), x, y = _people(draw), draw.randint(2, 8), draw.randint(3, 10)
    z = draw.randint(2, x * y - 1)
    return (
        f"{a} buys {x} bags with {y} {things} in each. {a} gives {z} of the {things} away. How "
        f"many {things} are left?",
        x * y - z,
    )


def change(draw: Draw) -> Problem:
    (a, _, things), x, y = _people(draw), draw.randint(2, 8), draw.randint(2, 9)
    z = x * y + draw.randint(1, 20)
    return (
        f"{a} has {z} dollars and buys {x} {things} for {y} dollars each. How many dollars does "
        f"{a} have left?",
        z - x * y,
    )


KINDS: tuple[Callable[[Draw], Problem], ...] = (
    *(gift, loss, groups, share, price, more_than, altogether, twice),
    *(packed_and_eaten, change),
)


def problems(seed: int) -> Iterator[dict[str, object]]:
    """Rows of a file of prompts, the kinds in turn; no two are of one kind and the same numbers.
    They end where a kind has no more."""
    draw, seen = random.Random(seed), set()
    for kind in itertools.cycle(KINDS):
        for _ in range(TRIES):
            question, answer = kind(draw)
            numbers = (kind, *re.findall(r"\d+", question))
            if numbers not in seen:
                break
        else:
            return
        seen.add(numbers)
        yield {
            "prompt": [{"role": "user", "content": question}],
            "gold": str(answer),
            "kind": kind.__name__,
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = problems(options.seed)
    for name, count in (("train", 1200), ("held_out", 400)):
        path = options.directory / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps(next(rows)) + "\n" for _ in range(count)), encoding="utf-8"
        )
        print(f"{path}: {count} problems")


if __name__ == "__main__":
    main()
