"""The accuracy grid: every op in every implementation against float64 of the same rounded inputs,
within the bounds of the numerical contract.

The whole grid (`make test-full`) is three coverings: in each, every pair of levels of two factors
of an op occurs in a case. Every run draws a few cases from the same levels. What is too large for
torch's reference (it holds several [N, V] in float32) or for Triton's interpreter (milliseconds a
block) is left to "cpp".
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import (
    Bound,
    Entry,
    Problem,
    covering,
    describe,
    excess,
    grid,
    interpreted,
    judge,
    oracle,
    run,
    sample_of_grid,
    verify,
)
from fusedrl.engine.tools.verify.ops import QUICK, WHOLE, budget
from fusedrl.kernels.runtime.dispatch import CannotServe


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered", "ignore:overflow encountered", "ignore:divide by zero"
)  # numpy, under the interpreter
@pytest.mark.each_pair
def test_sample(op, impl, device, small_tiles):
    for case in sample_of_grid(
        CATALOGUE[op],
        impl,
        3 if interpreted(impl, device) else 6,
        budget(QUICK, impl, device),
        device,
    ):
        with contextlib.suppress(CannotServe):  # on a GPU some serve some dtypes
            verify(CATALOGUE[op], case, impl, device)


@pytest.mark.full
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered", "ignore:overflow encountered", "ignore:divide by zero"
)
@pytest.mark.each_pair
def test_whole_grid(op, impl, device, record_property):
    failures, worst = [], {}
    for case in grid(CATALOGUE[op], impl, budget(WHOLE, impl, device), device):
        try:
            for name, value in verify(CATALOGUE[op], case, impl, device).items():
                worst[name] = max(worst.get(name, 0.0), value)
        except CannotServe:
            continue
        except AssertionError as error:
            failures.append(str(error))
    record_property("error / bound", {name: round(value, 2) for name, value in worst.items()})
    assert not failures, "\n".join(failures)


# Element offsets beyond 2^31 in every op that reads rows of logits, on memory that is barely
# touched.
@pytest.mark.each_pair(lambda op, impl: "logits" in CATALOGUE[op].plain() and impl != "torch")
def test_offsets_beyond_int32(op, impl, device):
    entry, far = CATALOGUE[op], 2**31
    near = entry.problem(entry.plain(N=2, V=33), device=device)
    try:
        x = {
            name: torch.empty(far + 33, device=device).as_strided((2, 33), (far, 1)).copy_(t)
            if "logits" in name
            else t
            for name, t in near.x.items()
        }
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of memory: {error}")
    got = (
        run(entry, Problem(x, near.settings, near.upstream), impl)
        if not entry.writes
        else run(
            # (no copy of 8 GiB; the far rows are ours)
            Entry(**{**vars(entry), "writes": ()}),
            Problem(x, near.settings, near.upstream),
            impl,
        )
    )
    assert all(value <= 1 for value in judge(entry, near, got, oracle(entry, near)).values())


def test_covering_meets_every_pair():
    levels = {"a": (1, 2, 3), "b": tuple("wxyz"), "c": (True, False), "d": (0.0, 0.5, 1.0)}
    cases = covering(levels, lambda case: not (case.a == 1 and case.b == "w"))
    met = {((p, c[p]), (q, c[q])) for c in cases for p in levels for q in levels if p < q}
    possible = {
        ((p, i), (q, j))
        for p in levels
        for q in levels
        if p < q
        for i in levels[p]
        for j in levels[q]
    }
    assert possible - met == {(("a", 1), ("b", "w"))}
    assert len(cases) < 20 < math.prod(map(len, levels.values()))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_sample_has_as_many_cases_as_were_asked_for(count):
    assert len(sample_of_grid(CATALOGUE["gae"], "torch", count, 1 << 14)) == count


@pytest.mark.cpu_only("the judge is tried")
def test_excess_sees_what_is_wrong():
    want = torch.tensor([1.0, -2.0, math.inf, math.nan], dtype=torch.float64)
    bound = Bound(rtol=1e-6, atol=1e-6)
    assert excess(want.float(), want, bound) <= 1
    for place, value in (
        (0, 1 + 1e-4),
        (1, 2.0),
        (2, -math.inf),
        (2, 3e38),
        (3, 0.0),
        (0, math.nan),
        (0, math.inf),
    ):
        assert excess(want.float().index_fill(0, torch.tensor(place), value), want, bound) > 1
    assert excess(want[:3].float(), want, bound) == math.inf
    assert (
        excess(torch.tensor([1.0]).bfloat16(), torch.tensor([1.001]).double(), Bound(rounded=True))
        == 0.0
    )


@pytest.mark.cpu_only("the judge is tried")
def test_a_repeated_row_must_repeat_its_bits():
    entry = CATALOGUE["logprob"]
    case = entry.plain(N=33)
    problem = entry.problem(case)
    assert problem.period
    got = run(entry, problem, "torch")
    want = oracle(entry, problem)
    assert all(value <= 1 for value in judge(entry, problem, got, want).values()), describe(case)
    got["logp"][-1] = torch.nextafter(got["logp"][-1], torch.zeros(()))
    assert judge(entry, problem, got, want)["logp"] == math.inf
    assert judge(entry, problem, got, want)["entropy"] <= 1


def test_cases_fit_in_memory():
    """No case holds more than 3 GiB: inputs, gradient and what the oracle needs."""
    for entry in CATALOGUE.values():
        for case in grid(entry, "cpp", WHOLE["cpp"]):
            size = SimpleNamespace(**case)
            if "logits" in case and size.layout != "expanded":
                assert size.N * size.V * 4 * 3 < 3 << 30, describe(case)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return [t for part in parts for t in tensors_of(part)]


@pytest.mark.parametrize("op", CATALOGUE)
def test_a_problem_lies_wholly_on_its_device(op):
    """With its strides, and its offset; and what is drawn does not depend on where it is to lie."""
    entry = CATALOGUE[op]
    changes = {"layout": entry.levels["layout"][-1]} if "layout" in entry.levels else {}
    here, there = (
        entry.problem(entry.plain(**changes), device=device) for device in ("cpu", "meta")
    )
    assert here.to("cpu") is here
    for name in ("x", "settings", "upstream", "hidden"):
        ours, theirs = tensors_of(getattr(here, name)), tensors_of(getattr(there, name))
        assert {t.device.type for t in theirs} <= {"meta"}
        assert [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in ours] == [
            (t.shape, t.stride(), t.storage_offset(), t.dtype) for t in theirs
        ]
        assert [t.untyped_storage().nbytes() for t in ours] == [
            t.untyped_storage().nbytes() for t in theirs
        ]
