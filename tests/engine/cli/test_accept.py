"""What a user sees where a run is resumed with something else, or cannot be resumed at all."""

import json
import shutil
from pathlib import Path

import pytest

from fusedrl.engine.cli.main import main
from fusedrl.engine.runs.metrics import read_rows

pytestmark = pytest.mark.cpu_only("the command line")


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "model")
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(8)))
    Path("r.py").write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
    return tmp_path


def train(*more):
    return main(
        [
            *("train", "rloo", "--model=model", "--data=p.jsonl", "--reward=r.py:f", "--steps=2"),
            *("--prompts_per_step=2", "--samples_per_prompt=2", "--generation.max_new_tokens=2"),
            *("--run.dir=run", "--run.progress=false", "--run.save_every=1", *more),
        ]
    )


def test_changes_are_refused_told_of_and_recorded(place, capsys):
    assert train() == 0
    path = Path("model/config.json")
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"rms_norm_eps": 0.5}))
    capsys.readouterr()
    assert main(["resume", "run", "--steps", "3"]) == 2
    told = capsys.readouterr().err
    assert "model: config.json holds something else than before" in told
    assert "--run.accept_changes true" in told
    assert main(["resume", "run", "--steps", "3", "--run.accept_changes", "true"]) == 0
    told = capsys.readouterr().err
    assert "from step 3 on, model: config.json holds something else" in told
    assert "steps: 2 -> 3, and optim.schedule is linear to zero at the last step" in told
    Path("r.py").write_text("def f(completions, **_):\n    return [2.0] * len(completions)\n")
    assert main(["resume", "run", "--steps", "4"]) == 0
    assert "from step 4 on, reward r.py:f: r.py holds something else" in capsys.readouterr().err
    steps = [
        json.loads(line)["step"] for line in Path("run/changes.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 3]
    assert [row["step"] for row in read_rows("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_without_a_checkpoint_begins_anew(place, capsys):
    assert train() == 0
    shutil.rmtree("run/checkpoints")
    kept = Path("run/metrics.jsonl").read_bytes()
    for more in ([], ["--run.resume=true"]):
        assert train(*more) == 2
        assert "--run.restart true moves them into a directory in it" in capsys.readouterr().err
    assert train("--run.restart=true") == 0
    assert "moved to run/aside-1; beginning anew" in capsys.readouterr().err
    assert Path("run/aside-1/metrics.jsonl").read_bytes() == kept
    assert Path("run/model/model.safetensors").is_file()
    assert main(["runs", "."]) == 0  # what was set aside is no run of its own
    assert "aside" not in capsys.readouterr().out
