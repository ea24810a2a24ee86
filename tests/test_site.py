"""The documentation as a site, and the habits of the checkout that run tools."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
needs_docs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings", "material")),
    reason="the extra `docs` is not installed: pip install 'fusedrl[docs]', or make venv",
)


def public_names() -> set[str]:
    """Every public function and class with a docstring, and every public method that has one, of
    kernels and engine; without the command line and what implements `fusedrl verify`."""
    found = set()
    for room in ("engine", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            at = path.relative_to(ROOT).with_suffix("")
            parts = [part for part in at.parts if part != "__init__"]
            hidden = any(part[0] == "_" for part in parts) or parts[1:2] in (["cli"], ["runtime"])
            if hidden or parts[1:3] == ["tools", "verify"]:
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                found |= documented(node, ".".join(["fusedrl", *parts]))
    return found


def documented(node: ast.stmt, within: str) -> set[str]:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[0] == "_":
        return set()
    inner = node.body if isinstance(node, ast.ClassDef) else ()
    name = f"{within}.{node.name}"
    return ({name} if ast.get_docstring(node) else set()).union(
        *(documented(method, name) for method in inner)
    )


@needs_docs
def test_the_site_builds_without_a_warning(tmp_path):
    told = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert told.returncode == 0, told.stdout + told.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in tmp_path.glob("*.html")}
    linked = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not [
        page for page in pages if f'href="{page}.html"' not in linked and page != "index"
    ], "mkdocs.yml does not list every page"
    reference = {
        path: path.read_text(encoding="utf-8") for path in (tmp_path / "reference").rglob("*.html")
    }
    shown = [
        name for page in reference.values() for name in re.findall(r'id="(fusedrl\.[^"]+)"', page)
    ]
    assert "fusedrl.engine.actor.HybridActor.generate" in shown
    assert "fusedrl.kernels.gae.gae" in shown
    missing = public_names() - set(shown)
    assert not missing, f"the API reference lacks {sorted(missing)}"
    twice = sorted(name for name, count in Counter(shown).items() if count > 1)
    assert not twice, f"the API reference has {twice} more than once"
    gae = reference[tmp_path / "reference/kernels/gae.html"]
    loaded = [
        line
        for line in gae.splitlines()
        if ("<script" in line or 'rel="stylesheet"' in line)
        and ('src="http' in line or 'href="http' in line)
    ]
    assert not loaded, "a page loads from elsewhere"


def test_commit_hooks_run_what_make_runs():
    """ruff and mypy of the same environment, with the arguments of the Makefile."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))[
        "repos"
    ]
    assert repo["repo"] == "local"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    for hook in repo["hooks"]:
        tool, arguments = hook["entry"].split(maxsplit=1)
        assert hook["language"] == "system"
        assert f"{tool} {arguments.replace(' --force-exclude', '')}" in makefile
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff", "ruff-format", "mypy"]
