"""The process's own random generators, torch's, Python's and numpy's: what a reward or a hook may
draw from. Nothing of the engine does; its draws are functions of a seed and a place."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed all three; numpy's takes the seed's low 32 bits."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """Their states, as `set_generator_states` takes them back. torch's is that of the CPU."""
    _, python, python_next = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "torch_cpu": torch.get_rng_state(),
        "python": torch.tensor(python, dtype=torch.int64),
        "python_next": _some(python_next),
        "numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"]]),
        "numpy_next": _some(numpy["gauss"] if numpy["has_gauss"] else None),
    }


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Set those that are there."""
    if "torch_cpu" in states:
        torch.set_rng_state(states["torch_cpu"])
    if "python" in states:
        after = states["python_next"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), after[0] if after else None))
    if "numpy" in states:
        *key, position = states["numpy"].tolist()
        after = states["numpy_next"].tolist()
        words = np.array(key, dtype=np.uint32)
        np.random.set_state(("MT19937", words, position, len(after), after[0] if after else 0.0))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn within the block changes nothing behind it."""
    before = generator_states()
    try:
        yield
    finally:
        set_generator_states(before)


def _some(number: float | None) -> Tensor:
    """The second of a pair of normal numbers, where it waits for the next draw."""
    return torch.tensor([] if number is None else [number], dtype=torch.float64)
