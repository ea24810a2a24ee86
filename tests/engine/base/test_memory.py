"""The process's memory: huge pages where they are asked for, and freed memory given back."""

import re
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.memory import advise_huge_pages, give_back

SMAPS = Path("/proc/self/smaps")


def flags_of(address: int) -> set[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc")
def test_huge_pages_are_asked_for_and_change_nothing():
    pool = torch.empty(48 << 20, dtype=torch.uint8)
    middle = pool.data_ptr() + pool.nbytes // 2
    assert "hg" not in flags_of(middle), "the control"
    advise_huge_pages(pool)
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages to ask for")
    assert "hg" in flags_of(middle)
    pool.copy_((torch.arange(pool.numel()) % 251).byte())
    assert torch.equal(pool[-251:], ((torch.arange(pool.numel() - 251, pool.numel())) % 251).byte())


def test_what_is_small_is_left_alone():
    for size in (0, 1, 4096):
        advise_huge_pages(torch.empty(size))
    advise_huge_pages(torch.empty(1 << 22, device="meta"))


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc")
def test_little_is_kept_and_much_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fusedrl.engine.base.memory._malloc_trim", lambda: lambda pad: calls.append(pad)
    )
    give_back((256 << 20) - 1)
    assert not calls
    give_back(256 << 20)
    assert calls == [0]
