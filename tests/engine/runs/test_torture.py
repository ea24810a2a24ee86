"""A sample of `make torture`: whole runs in which one file call goes wrong, and a check that it
sees what it is there for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.torture import restored, state_of, told, without_clocks

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.cpu_only("files")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the shim with")
def test_calls_that_go_wrong_lose_nothing():
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.torture", "--stages", "sft", "--sample", "8"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    counts = json.loads(found.stdout[found.stdout.index("{") :])
    assert counts["faults"] == {}
    assert counts["survived"] == counts["tried"] == 8
    assert counts["calls"]["sft"] > 100


def test_what_power_leaves(tmp_path):
    """Of a file what its last fsync saw, of a directory the names that its last fsync saw."""
    run, durable = tmp_path / "run", tmp_path / "durable"
    run.mkdir()
    durable.mkdir()
    (run / "lost").write_text("never flushed")
    (durable / "1").write_text(".\t1\t1\nkept\t2\t0\nempty\t3\t0\nsub\t4\t1\n")
    (durable / "2").write_text("flushed")
    restored(run, durable, 1)
    assert {path.name: path.is_dir() for path in run.iterdir()} == {
        "kept": False,
        "empty": False,
        "sub": True,
    }
    assert (run / "kept").read_text() == "flushed"
    assert (run / "empty").read_bytes() == b""
    assert list((run / "sub").iterdir()) == []


def test_states_are_told_apart_and_clocks_are_not(tmp_path):
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 1, "loss": 2.0, "timing/step": 0.1}\n')
    one = state_of(tmp_path)
    lines.write_text('{"step": 1, "loss": 2.0, "timing/step": 0.2}\n')
    assert state_of(tmp_path) == one
    lines.write_text('{"step": 1, "loss": 2.0, "timing/step": 0.2}\n{"st')
    assert state_of(tmp_path) != one
    assert without_clocks(b'{"step": 1, "mem/x": 2}\n{"st') == [{"step": 1}, b'{"st']
    assert told("OSError: x")
    assert not told("KeyError: 1\nOSError")
