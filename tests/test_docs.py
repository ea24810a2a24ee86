"""Pages, docstrings and comments name files, functions and tests: each exists, and nothing of the
pages' lists is left out."""

import ast
import io
import re
import tokenize
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
    explained = METHODS
    for row in rows(METHODS, "The rows"):
        assert row in explained
        explained = explained.replace(row, "")
    unsaid = [name for name in ALGORITHMS if f"`{name}`" not in explained]
    assert not unsaid, f"docs/algorithms.md has {unsaid} in the table of rows alone"
    unsaid = [name for name in ALGORITHMS if not re.search(f"(`|::){name}`", ORIGINS)]
    assert not unsaid, f"docs/origins.md does not say where {unsaid} are from"
    spoken = explained + ORIGINS
    # those three by their kernels
    advantages = {*re.findall(r"::_(\w+)`", spoken), "gae", "td0", "k_step"}
    assert set(ADVANTAGES) <= advantages, (
        f"docs/origins.md does not name the advantages {sorted(set(ADVANTAGES) - advantages)}"
    )
    missing = [
        name for name in OBJECTIVES if not re.search(rf"\b{name}\b", spoken) and name != "ppo_clip"
    ]
    assert not missing, f"docs/origins.md does not name the objectives {missing}"


# ---- files that docstrings and comments name -----------------------------------------------------
SOURCES = sorted(
    path
    for room in ("engine", "kernels", "csrc")
    for path in (ROOT / room).rglob("*")
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
)
# neither a user's file.py:function nor what is included in angle brackets
FILE = re.compile(r"(?<![\w./<-])((?:\w+/)*\w+\.(?:py|cpp|cuh?|h))\b(?!:\w)")
OTHERS = re.compile(
    r"(?:verl|liger_kernel|trl)/|x\.cu$|llama\.cpp$"
)  # of other projects; an example


def said(path: Path, text: str) -> list[str]:
    """The docstrings and comments of a file."""
    if path.suffix != ".py":
        return re.findall(r"//.*", text)
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return comments + [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    ]


def absent(path: Path, text: str) -> list[str]:
    """Files that are named in this one and found from none of the folders around it. C++ sources
    go by their name alone, as where they are included."""
    names = FILE.findall("\n".join(said(path, text)))
    folders = path.parents[: len(path.relative_to(ROOT).parts)]
    return [
        name
        for name in names
        if not OTHERS.match(name)
        and not any((folder / name).is_file() for folder in folders)
        and (name.endswith(".py") or not any((ROOT / "csrc").rglob(name)))
    ]


def test_docstrings_and_comments_name_files_that_are_there():
    found = {
        path.relative_to(ROOT).as_posix(): missing
        for path in SOURCES
        if (missing := absent(path, path.read_text(encoding="utf-8")))
    }
    assert not found


def test_a_planted_name_of_a_file_is_found():
    python = '''
"""The mathematics is in kl.py, the table in full_kl/_triton.py, both of kernels/objective.py."""
# the order of _reference.py, and of normalize/reference.py, in kl.h
def f(x):
    """Take file.py:function (tests/gone.py shows one)."""
    return "nowhere.py"
'''
    assert sorted(absent(ROOT / "kernels" / "kl" / "_triton.py", python)) == [
        "kl.py",
        "normalize/reference.py",
        "tests/gone.py",
    ]
    cpp = '#include <ATen/ATen.h>\n#include "no.h"\n// kl.h, gone.h and csrc/shared/gone.h'
    assert absent(ROOT / "csrc" / "cpu" / "ops" / "kl.cpp", cpp) == [
        "gone.h",
        "csrc/shared/gone.h",
    ]
    assert len(SOURCES) > 200


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
