"""Peak memory of the parts of a step."""

import mmap
import sys

import numpy as np
import pytest

from fusedrl.engine.runs import peaks
from fusedrl.engine.runs.peaks import Peaks

pytestmark = [
    pytest.mark.cpu_only("the memory of the process"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the marks are those of Linux"),
]
MIB = 64


def held(mib: int) -> np.ndarray:
    """So much memory, written to. It comes from the system, not from what other tests have freed
    and malloc has kept."""
    found = np.frombuffer(mmap.mmap(-1, mib << 20), dtype=np.float64)
    found[:] = 1.0
    return found


def use(mib: int) -> None:
    """Hold so much for a moment."""
    held(mib).sum()


def test_a_part_has_its_own_peak_and_one_around_it_has_it_as_well():
    found = Peaks()
    if found._system is None or found._system._reset < 0:
        pytest.skip("this system does not set the mark back")
    found.enter()
    use(2 * MIB)
    found.enter()
    found.leave("small")
    found.enter()
    use(MIB)
    found.leave("middle")
    found.leave("large")
    found.enter()
    found.leave("after")
    parts = found.take()
    least = parts["mem/small_gib"]
    assert parts["mem/after_gib"] == pytest.approx(least, abs=0.01)
    assert parts["mem/middle_gib"] - least == pytest.approx(MIB / 1024, abs=0.01)
    assert parts["mem/large_gib"] - least == pytest.approx(2 * MIB / 1024, abs=0.01)
    assert found.most == parts["mem/large_gib"]
    assert found.take() == {}
    for _ in range(2):
        found.enter()
        use(MIB)
        found.leave("twice")
    assert found.take()["mem/twice_gib"] - least == pytest.approx(MIB / 1024, abs=0.01)
    assert found.most == parts["mem/large_gib"]


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_the_mark_cannot_be_set_back_the_borders_count(refused, monkeypatch):
    real = getattr(peaks.os, refused)

    def refuse(what, *rest):
        if refused == "write" or "clear_refs" in str(what):
            raise PermissionError
        return real(what, *rest)

    monkeypatch.setattr(peaks.os, refused, refuse)
    found = Peaks()
    found.enter()
    kept = held(MIB)
    found.leave("held")
    found.enter()
    del kept
    found.leave("freed")
    found.enter()
    found.leave("after")
    parts = found.take()
    assert parts["mem/held_gib"] - parts["mem/after_gib"] == pytest.approx(MIB / 1024, abs=0.02)
    assert parts["mem/freed_gib"] == pytest.approx(parts["mem/held_gib"], abs=0.02)


def test_a_system_that_says_nothing_gives_no_parts(monkeypatch):
    monkeypatch.setattr(peaks.os, "open", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    found = Peaks()
    found.enter()
    found.leave("part")
    assert found.take() == {}
    assert found.most == 0.0
