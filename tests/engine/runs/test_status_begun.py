"""How a run stands that was interrupted before its first step."""

import json

import pytest

from fusedrl.engine.base.errors import Stopped
from fusedrl.engine.config import RunConfig, SFTConfig
from fusedrl.engine.runs import run as module
from fusedrl.engine.runs.run import Run

pytestmark = pytest.mark.cpu_only("files of a run")


def test_a_run_that_is_stopped_while_it_begins_is_not_running(tmp_path, monkeypatch, tiny_model):
    def stopped(*_, **__):
        raise Stopped(130)

    monkeypatch.setattr(module, "Metrics", stopped)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "w1", "completion": "w2"}\n')
    run = RunConfig(str(tmp_path / "run"), progress=False)
    with pytest.raises(Stopped), Run(SFTConfig(str(tiny_model), str(data), run=run), 3):
        pass
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
