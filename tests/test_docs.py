"""The pages name files, functions and tests: each exists, and nothing of their lists is left
out."""

import re
from functools import cache
from pathlib import Path

import pytest

from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS, OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
ALL = "\n".join(PAGES.values())
METHODS, ORIGINS = PAGES["docs/algorithms.md"], PAGES["docs/origins.md"]
PATH = r"(?:engine|kernels|csrc|tests|bench|examples|docs)/[\w/.-]*"
NAMES = sorted(set(re.findall(rf"`({PATH})::(\w+)`", ALL)))
PATHS = sorted({*re.findall(rf"`({PATH})`", ALL), *(path for path, _ in NAMES)})


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
    assert (ROOT / path).exists(), (
        f"{[page for page, text in PAGES.items() if path in text]} name {path}"
    )


@pytest.mark.parametrize("path, name", NAMES, ids=[f"{path}::{name}" for path, name in NAMES])
def test_every_name_is_there(path, name):
    assert defines(source(path), name), (
        f"{[page for page, text in PAGES.items() if name in text]} name {name} in {path}, which "
        "does not define it"
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


def rows(page: str, section: str) -> list[str]:
    body = page.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line for line in body.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(
    "page, section, pattern, count",
    [
        (ORIGINS, "The checklist", r"\| (\d+) ", 42),
        (ORIGINS, "Errata", r"\| E(\d+) \|", 15),
        (METHODS, "Pitfalls", r"\| (\d+) \|", 30),
    ],
    ids=["checklist", "errata", "pitfalls"],
)
def test_no_item_is_left_out(page, section, pattern, count):
    found = [int(match[1]) for row in rows(page, section) if (match := re.match(pattern, row))]
    assert found == list(range(1, count + 1))
    for row in rows(page, section):
        if re.match(pattern, row):
            assert "tests/" in row or re.search(r"only|nothing to test", row), (
                f"a row without a test: {row[:80]}"
            )


def test_every_row_of_the_tables_is_spoken_of():
    spoken = METHODS.replace("\n".join(rows(METHODS, "The rows")), "") + ORIGINS
    for name in ALGORITHMS:
        assert f"::{name}`" in spoken or f"`{name}`" in spoken, (
            f"docs/algorithms.md and docs/origins.md have {name} in the table of rows alone"
        )
    # those three by their kernels
    advantages = {*re.findall(r"::_(\w+)`", spoken), "gae", "td0", "k_step"}
    assert set(ADVANTAGES) <= advantages, (
        f"docs/origins.md does not name the advantages {sorted(set(ADVANTAGES) - advantages)}"
    )
    missing = [
        name for name in OBJECTIVES if not re.search(rf"\b{name}\b", spoken) and name != "ppo_clip"
    ]
    assert not missing, f"docs/origins.md does not name the objectives {missing}"


# ---- links ---------------------------------------------------------------------------------------
def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.is_file(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page} links to {target}"
