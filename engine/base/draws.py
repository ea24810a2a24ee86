"""Global random generators of the process, those of torch, Python and numpy, which a user's reward
or hook may draw from. The engine itself does not use them: its draws are functions of a seed and a
position."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, Python and numpy; numpy's takes the seed's low 32 bits."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """Return the generators' states, for `set_generator_states`. torch's is that of the CPU."""
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
    """Restore the generators whose states are given."""
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
    """Restore the generators after the block, so that draws within it have no effect afterwards."""
    before = generator_states()
    try:
        yield
    finally:
        set_generator_states(before)


def seed_on_cpu(seed: int) -> None:
    """Seed the generators as `seed_generators` does, without those of GPUs, which takes a
    hundredth of the time."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def generators_apart() -> Iterator[None]:
    """Do what `generators_kept` does, without making tensors of the states; for many short
    blocks."""
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _some(number: float | None) -> Tensor:
    """Return the stored second number of a pair of normal draws, or nothing if none is stored."""
    return torch.tensor([] if number is None else [number], dtype=torch.float64)
