"""Mixtures: proportions, coverage, and a stream that is a function of the position alone."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.base.ordering import data_order
from fusedrl.engine.data.mixture import Mixture, mix
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.runs.inputs import data_digest, file_digest


def _mixture(sizes, weights=None):
    return Mixture(
        [[(source, row) for row in range(size)] for source, size in enumerate(sizes)], weights
    )


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.data(),
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_any_part_of_the_stream_can_be_drawn_alone(sizes, data, seed, start, length):
    weights = data.draw(
        st.one_of(
            st.none(),
            st.lists(st.sampled_from([1, 2, 0.5, 0.3]), min_size=len(sizes), max_size=len(sizes)),
        )
    )
    mixture = _mixture(sizes, weights)
    whole = mixture.draw(seed, 0, start + length)
    assert mixture.draw(seed, start, start + length) == whole[start:]
    assert _mixture(sizes, weights).draw(seed, 0, start + length) == whole


def test_one_file_and_files_without_weights_keep_the_order_that_they_had():
    for mixture in (_mixture([10]), _mixture([10], [3.0])):
        assert mixture.draw(7, 3, 25) == [(0, row) for row in data_order(10, 7, 3, 25)]
    assert _mixture([4, 6]).draw(7, 3, 25) == [
        ((0, row) if row < 4 else (1, row - 4)) for row in data_order(10, 7, 3, 25)
    ]


@pytest.mark.parametrize(
    "weights, block, places",
    [
        ([2, 1], 3, [2, 1]),
        ([1, 1, 2], 4, [1, 1, 2]),
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([1, 999], 1000, [1, 999]),
        ([2**0.5, 1], 1000, [586, 414]),
        ([1 / 3, 1 / 3, 1 / 3], 3, [1, 1, 1]),
    ],
)
def test_every_block_has_the_proportions_of_the_weights(weights, block, places):
    mixture = _mixture([50, 7, 11][: len(weights)], weights)
    stream = mixture.draw(0, 0, 3 * block)
    for start in range(0, 3 * block, block):
        count = Counter(source for source, _ in stream[start : start + block])
        assert [count[source] for source in range(len(weights))] == places


def test_each_source_goes_through_passes_of_its_own():
    stream = _mixture([5, 8], [1, 3]).draw(3, 0, 96)
    for source, size in ((0, 5), (1, 8)):
        rows = [row for which, row in stream if which == source]
        passes = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        assert all(sorted(part) == list(range(size)) for part in passes)
        assert len({tuple(part) for part in passes}) > 1
    assert stream != _mixture([5, 8], [1, 3]).draw(4, 0, 96)
    same = _mixture([6, 6], [1, 1]).draw(0, 0, 12)
    assert [row for source, row in same if source == 0] != [
        row for source, row in same if source == 1
    ]  # two files of one size are not shuffled alike


def test_splitting_keeps_sources_apart_and_their_weights():
    train, held = _mixture([10, 20], [3, 1]).split(lambda items: (items[2:], items[:2]))
    assert held == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(train) == 26
    assert Counter(source for source, _ in train.draw(0, 0, 400)) == {0: 300, 1: 100}


def test_what_cannot_be_mixed():
    with pytest.raises(DataError, match="non-empty sources"):
        _mixture([3, 0], [1, 1])
    with pytest.raises(DataError, match="non-empty sources"):
        Mixture([])
    with pytest.raises(DataError, match="a weight for each"):
        _mixture([3, 3], [1])
    with pytest.raises(DataError, match="at least a thousandth of their sum"):
        _mixture([3, 3], [1, 10_000])


def test_a_data_option_as_a_mixture(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(4))
        )
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    mixture = mix(f"{a}@2,{b},prompt:{c}@1", load_prompts)
    assert Counter(example.prompt[0] for example in mixture.draw(0, 0, 40)) == {
        "a": 20,
        "b": 10,
        "c": 10,
    }
    assert len(mix(f"{a},{b}", load_prompts)) == 8
    with pytest.raises(DataError, match=r"expected files without weights here"):
        load_prompts(f"{a}@2,{b}")
    assert len(load_prompts(f"{a}@2")) == 4


def test_a_change_of_any_file_is_noticed_on_resume(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("1")
    b.write_text("2")
    before = data_digest(f"{a}@2,{b}")
    assert before == data_digest([f"prompt:{a}", b]) == f"{file_digest(a)} {file_digest(b)}"
    assert data_digest(str(a)) == file_digest(a)
    b.write_text("3")
    assert data_digest(f"{a}@2,{b}") != before
