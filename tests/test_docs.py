"""docs/algorithms.md names functions and tests: each exists, and nothing of the lists is left
out."""

import re
from functools import cache
from pathlib import Path

import pytest

from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
PATH = r"(?:engine|kernels|tests|bench|examples|docs)/[\w/.-]*"
NAMES = sorted(set(re.findall(rf"`({PATH})::(\w+)`", PAGE)))
PATHS = sorted({*re.findall(rf"`({PATH})`", PAGE), *(path for path, _ in NAMES)})


@cache
def source(path: str) -> str:
    found = ROOT / path / "__init__.py" if path.endswith("/") else ROOT / path
    return found.read_text(encoding="utf-8") if found.is_file() else ""


def defines(text: str, name: str) -> bool:
    """As a function, a class, an assignment, or a key of a table."""
    return (
        re.search(
            rf"^\s*(?:async )?(?:def|class) {name}\b|^{name}\b[^=\n]*=|^\s*\"{name}\":",
            text,
            re.MULTILINE,
        )
        is not None
    )


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_there(path):
    assert (ROOT / path).exists(), f"docs/algorithms.md names {path}"


@pytest.mark.parametrize("path, name", NAMES, ids=[f"{path}::{name}" for path, name in NAMES])
def test_every_name_is_there(path, name):
    assert defines(source(path), name), (
        f"docs/algorithms.md names {name} in {path}, which does not define it"
    )


def test_the_check_sees_what_is_missing():
    text = 'def one():\n    return two\nTHREE: int = 3\nTABLE = {\n    "four": 4,\n}\n'
    assert [defines(text, name) for name in ("one", "THREE", "four", "two", "on", "five")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert len(NAMES) > 150
    assert len(PATHS) > 40


def rows(section: str) -> list[str]:
    body = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line for line in body.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    "section, pattern, count",
    [
        ("The checklist", r"\| (\d+) ", 42),
        ("Seed errata", r"\| E(\d+) \|", 15),
        ("Pitfalls", r"\| (\d+) \|", 30),
    ],
)
def test_no_item_is_left_out(section, pattern, count):
    found = [int(match[1]) for row in rows(section) if (match := re.match(pattern, row))]
    assert found == list(range(1, count + 1))
    for row in rows(section):
        if re.match(pattern, row):
            assert "tests/" in row or re.search(r"only|nothing to test", row), (
                f"a row without a test: {row[:80]}"
            )


def test_every_row_of_the_tables_is_spoken_of():
    for name in ALGORITHMS:
        assert f"::{name}`" in PAGE or f"`{name}`" in PAGE, (
            f"docs/algorithms.md does not name the algorithm {name}"
        )
    # those three by their kernels
    spoken = {*re.findall(r"::_(\w+)`", PAGE), "gae", "td0", "k_step"}
    assert set(ADVANTAGES) <= spoken, (
        f"docs/algorithms.md does not name the advantages {sorted(set(ADVANTAGES) - spoken)}"
    )
    missing = [
        name for name in OBJECTIVES if not re.search(rf"\b{name}\b", PAGE) and name != "ppo_clip"
    ]
    assert not missing, f"docs/algorithms.md does not name the objectives {missing}"
