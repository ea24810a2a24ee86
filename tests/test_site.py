"""The documentation as a site, and the habits of the checkout that run tools."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
needs_docs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings", "material")),
    reason="the extra `docs` is not installed: pip install 'fusedrl[docs]', or make venv",
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
    gae = (tmp_path / "reference/kernels/gae.html").read_text(encoding="utf-8")
    assert 'id="fusedrl.kernels.gae.gae"' in gae
    assert 'id="fusedrl.engine.actor.HybridActor.generate"' in (
        tmp_path / "reference/engine.html"
    ).read_text(encoding="utf-8")
    assert 'id="fusedrl.engine.config.policy.PolicyConfig"' in (
        tmp_path / "reference/config.html"
    ).read_text(encoding="utf-8")
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
