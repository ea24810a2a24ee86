"""The process's own generators: saved, set back, and left as they were."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fusedrl.engine.base.draws import (
    generator_states,
    generators_kept,
    seed_generators,
    set_generator_states,
)

pytestmark = pytest.mark.cpu_only("the host's generators")


def drawn():
    return (
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(2).tolist(),
        np.random.randn(),
    )


@pytest.mark.parametrize("before", [0, 1, 2])
def test_states_go_through_a_file_and_back(before):
    """Also where one of a pair of normal numbers is still to come."""
    seed_generators(5)
    for _ in range(before):
        random.gauss(0, 1)
        np.random.randn()
    states = load(save(generator_states()))
    expected = [drawn() for _ in range(3)]
    seed_generators(6)
    assert drawn() != expected[0]
    set_generator_states(states)
    assert [drawn() for _ in range(3)] == expected


def test_a_seed_of_64_bits_and_what_an_older_checkpoint_lacks():
    seed_generators(2**63 - 1)
    first = drawn()
    seed_generators(-(2**63))
    assert drawn() != first
    seed_generators(2**63 - 1)
    assert drawn() == first
    random.seed(1)
    expected = random.Random(1).random()
    set_generator_states({"torch_cpu": torch.get_rng_state()})
    assert random.random() == expected


def test_draws_within_a_block_change_nothing_behind_it():
    seed_generators(1)
    expected = drawn()
    seed_generators(1)
    with generators_kept():
        drawn()
    assert drawn() == expected
    with pytest.raises(KeyError), generators_kept():
        drawn()
        raise KeyError
