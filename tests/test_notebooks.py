"""The notebooks of examples/ run from top to bottom, and are stored without outputs."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "own_trainer"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len(cells) - len(code) >= len(code) / 3, "a reader wants words between the code"


SMALL = {  # the same cells with less to do, for make test; make test-full runs them as they are
    "first_steps": {
        "stories=4096": "stories=256",
        "pairs=6144": "pairs=256",
        "epochs=3": "epochs=1",
        "steps=30": "steps=2",
        "prompts_per_step=16": "prompts_per_step=4",
        'assert last["reward"] > first["reward"]': "",  # it has hardly learned
    },
    "own_trainer": {
        "N, H, V = 1024, 256, 32000": "N, H, V = 128, 64, 4096",
        "steps: int = 6": "steps: int = 2",
    },
}


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, small, tmp_path, monkeypatch):
    nbclient = pytest.importorskip(
        "nbclient", reason="nbclient is not installed: pip install nbclient"
    )
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install ipykernel")
    import nbformat

    paths = [str(ROOT / "src"), str(ROOT), *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = path.read_text(encoding="utf-8")
    for there, less in (SMALL[path.stem] if small else {}).items():
        there, less = (json.dumps(one)[1:-1] for one in (there, less))
        assert text.count(there) == 1, f"{path.name} does not hold {there} once"
        text = text.replace(there, less)
    notebook = nbformat.reads(text, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    ]
    assert printed, "nothing was shown"
    if path.stem == "own_trainer":
        assert "fused:" in "".join(printed)
    print("".join(printed))
