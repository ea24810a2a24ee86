"""Random orders that are functions of a seed, so that a resumed run needs only its step number."""

from __future__ import annotations

import random


def data_order(size: int, seed: int | str, start: int, stop: int) -> list[int]:
    """Return items start .. stop of the endless stream of shuffled passes over `size` items. The
    result depends on the arguments alone, so that a resumed run needs only its step number."""
    order: list[int] = []
    for epoch in range(start // size, (stop - 1) // size + 1) if stop > start else ():
        first, last = max(start, epoch * size), min(stop, (epoch + 1) * size)
        order += shuffled(size, seed, "epoch", epoch)[first - epoch * size : last - epoch * size]
    return order


def shuffled(size: int, *key: int | str) -> list[int]:
    """Return 0 .. size - 1 in a random order that depends on the key alone. (torch's CPU generator
    keeps 32 bits of a seed, too few for a key of several numbers.)"""
    return random.Random(repr(key)).sample(range(size), size)
