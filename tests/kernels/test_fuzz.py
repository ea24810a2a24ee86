"""Bent calls of every op in C++: each returns or raises. `make sanitize` makes many more, under
sanitizers, where a call that reads beside its arguments is seen; here it has to crash."""

import collections
import warnings

import pytest
from tests.support.fuzz_ops import NATIVE, attempt, recorded_steps

from fusedrl.kernels.runtime import native

pytestmark = [
    pytest.mark.skipif(native.capability is None, reason=native.reason),
    pytest.mark.cpu_only("the C++ kernels"),
]


def test_bent_calls_return_or_raise():
    found, recorded = collections.Counter(), recorded_steps()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(400):
            found[attempt(number, 1, recorded)] += 1
    assert {what.partition(":")[0] for what in found} >= {"decode_step", *NATIVE}
    returned = sum(count for what, count in found.items() if what.endswith("returned"))
    assert 100 < returned < 300  # both happen: what is bent is neither nothing nor everything


def test_a_call_is_the_same_whenever_it_is_made():
    recorded = recorded_steps()
    numbers = [*range(30), *range(30)]
    found = [attempt(number, 2, recorded) for number in numbers]
    assert found[:30] == found[30:]


@pytest.mark.parametrize("name", ["positions", "rows", "v_cache", "block_table", "out_slots"])
def test_shapes_of_a_step_that_do_not_fit_are_refused(name):
    """The fuzzer found each of these read beside its memory."""
    from fusedrl.kernels.decode_step import decode_step

    given = next(one for one in recorded_steps() if one["out_slots"] is not None)
    wrong = {
        "positions": given["positions"][:2],
        "rows": given["rows"][:1],
        "v_cache": given["v_cache"][:, :1],
        "block_table": given["block_table"][0],
        "out_slots": given["out_slots"][:, None],
    }[name]
    with_it = given | {name: wrong}
    with pytest.raises(ValueError, match=f"decode_step: expected .*{name}"):
        decode_step(**with_it)
