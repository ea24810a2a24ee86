import dataclasses

import numpy as np
import pytest

from fusedrl.engine.generation.sampler import SamplingParams, SamplingTable


@pytest.mark.parametrize(
    "field,value,error,message",
    [
        ("max_new_tokens", 0, ValueError, "max_new_tokens >= 1, got 0"),
        ("max_new_tokens", 2.0, TypeError, "max_new_tokens to be an integer, got 2.0"),
        ("n", 0, ValueError, "n >= 1"),
        ("n", True, TypeError, "n to be an integer"),
        (
            "temperature",
            -0.1,
            ValueError,
            r"temperature 0 \(greedy\) or from 1.2e-38 on.* got -0.1",
        ),
        ("temperature", 1e-39, ValueError, "got 1e-39"),
        ("temperature", 5e-324, ValueError, "got 5e-324"),
        ("logit_bias", {5: 1e39}, TypeError, "finite in float32, got .5, 1e"),
        ("logit_bias", {5: -float("inf")}, TypeError, "banned_token_ids bans a token"),
        ("temperature", float("nan"), ValueError, "temperature"),
        ("temperature", float("inf"), ValueError, "temperature"),
        ("temperature", "1", TypeError, "temperature to be a number"),
        ("top_p", 0.0, ValueError, r"top_p in \(0, 1\], got 0.0"),
        ("top_p", 1.1, ValueError, "top_p"),
        ("top_k", -1, ValueError, "top_k >= 0"),
        ("min_p", 1.5, ValueError, r"min_p in \[0, 1\]"),
        ("seed", 2**63, ValueError, "seed"),
        ("stop_token_ids", "ab", TypeError, "stop_token_ids to be token ids"),
        ("stop_token_ids", (1, -1), TypeError, "stop_token_ids"),
        ("min_new_tokens", 300, ValueError, "min_new_tokens <= max_new_tokens, got 300 > 256"),
    ],
)
def test_params_are_checked(field, value, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**{field: value})


def test_params_are_frozen_hashable_and_take_lists():
    params = SamplingParams(stop_token_ids=[3, np.int64(5)], top_k=np.int32(4))
    assert params.stop_token_ids == (3, 5)
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


@pytest.mark.parametrize(
    "field,value", [("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("min_new_tokens", 3)]
)
def test_truncates(field, value):
    assert not SamplingParams().truncates
    assert SamplingParams(**{field: value}).truncates
    assert not SamplingParams(temperature=0.0, **{field: value}).truncates


def test_table_speaks_for_each_slot():
    table = SamplingTable(4)
    table.put(2, SamplingParams(temperature=0.5, seed=-7), 10, 1, frozenset({5}), 3)
    table.put(
        0,
        SamplingParams(temperature=0.5, top_k=3, min_new_tokens=2),
        11,
        0,
        frozenset({1, 6, 2}),
        4,
    )
    slots = np.array([2, 0])
    columns, numbers = table.arguments(slots, fixed=False)
    assert numbers == {"temperature": 0.5, "top_p": 1.0, "min_p": 0.0}
    assert {name: column.tolist() for name, column in columns.items()} == {"top_k": [0, 3]}
    # the numbers of a captured step are no request's
    columns, numbers = table.arguments(slots, fixed=True)
    assert numbers == {"top_p": 1.0, "min_p": 0.0}
    assert columns["temperature"].tolist() == [0.5, 0.5]
    assert table.keys(slots, np.array([9, 4])).tolist() == [[-7, 10, 1, 9], [0, 11, 0, 4]]
    assert table.biases(slots) == {}
    assert table.is_stop(slots, np.array([5, 5])).tolist() == [True, False]
    assert table.is_stop(slots, np.array([6, 2])).tolist() == [False, True]
    assert table.is_stop(slots, np.array([[5, 5], [6, 2]])).tolist() == [
        [True, False],
        [False, True],
    ]
    table.put(2, SamplingParams(logit_bias={0: 1.0, 4: -1.0, 6: 0.5}), 10, 1, frozenset({5}), 3)
    assert {name: column.tolist() for name, column in table.biases(slots).items()} == {
        "bias_ids": [[0, 4, 6, 0], [0] * 4],
        "bias_values": [[1.0, -1.0, 0.5, 0.0], [0.0] * 4],
    }


def mask(table, slots, lengths, vocab_size):
    """What a `DecodeState` makes of the columns; an id that comes twice in a row has to have one
    length."""
    columns = table.suppressed(slots, lengths)
    assert bool(columns) == table.suppresses(slots, lengths)
    if not columns:
        return None
    out = np.zeros((len(slots), vocab_size), dtype=int)
    for row, (ids, until) in enumerate(
        zip(columns["suppress_ids"].tolist(), columns["suppress_until"].tolist(), strict=True)
    ):
        for token in set(ids):
            (out[row, token],) = {
                length > lengths[row] for i, length in zip(ids, until, strict=True) if i == token
            }
    return out.tolist()


def test_stop_tokens_are_suppressed_until_min_new_tokens():
    table = SamplingTable(3)
    table.put(0, SamplingParams(min_new_tokens=2), 0, 0, frozenset({1, 3}), 4)
    table.put(1, SamplingParams(), 1, 0, frozenset({2}), 4)
    table.put(2, SamplingParams(), 1, 0, frozenset(), 4)
    slots = np.array([1, 0, 2])
    assert mask(table, slots, np.array([4, 6, 9]), 5) is None
    assert mask(table, slots, np.array([4, 5, 9]), 5) == [[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0] * 5]
    # one of them a stop token too
    for banned, row in (((4,), [0, 0, 0, 0, 1]), ((2, 0, 4), [1, 0, 1, 0, 1])):
        table.put(1, SamplingParams(banned_token_ids=banned), 1, 0, frozenset({2}), 4)
        assert mask(table, slots, np.array([4, 5, 9]), 5) == [row, [0, 1, 0, 1, 0], [0] * 5]
        assert mask(table, slots, np.array([4, 6, 9]), 5) == [row, [0, 0, 0, 0, 0], [0] * 5]


def test_a_slot_forgets_the_stops_of_its_last_owner():
    table = SamplingTable(1)
    table.put(0, SamplingParams(), 0, 0, frozenset({1, 2, 3}), 1)
    table.put(0, SamplingParams(), 1, 0, frozenset({4}), 1)
    assert table.is_stop(np.array([0, 0, 0]), np.array([1, 4, 3])).tolist() == [False, True, False]
