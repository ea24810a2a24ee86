"""Run directories as they are on the disk: whole, half there, broken, growing."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from tests.support.runs import CONFIG, metrics, samples, write_lines, write_run

from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.runs.files import RunLock, is_locked
from fusedrl.engine.runs.status import write_status
from fusedrl.engine.watch.run_files import RunFiles, config_differences, open_runs

pytestmark = pytest.mark.cpu_only("files alone")


def test_a_whole_run(tmp_path):
    run = RunFiles(write_run(tmp_path / "run")).read()
    assert (run.name, run.stage, run.status) == (
        "run",
        "PPO: a clipped ratio and a critic",
        "stopped",
    )
    assert (run.steps, run.total, run.seconds) == (40, 40, pytest.approx(60.0))
    assert run.config["kl.target"] == 6.0
    assert list(run.series["eval_reward"].steps) == [0, 10, 20, 30, 40]
    assert run.samples[1].scores == {"reward": 0.5}
    (alarm,) = run.alarms
    assert (alarm.step, alarm.metrics) == (20, ("reward", "gold/g/mean"))
    assert "fell from 1 to 0.2" in alarm.text
    assert run.calibration["accuracy"] == 0.7
    assert run.notes == []
    (tmp_path / "run" / "model").mkdir()
    assert RunFiles(tmp_path / "run").read().status == "finished"


def test_values_that_are_not_finite_and_steps_out_of_order(tmp_path):
    rows = [
        {"step": 3, "reward": 3.0, "kl": None},
        {"step": 1, "reward": 1.0, "kl": math.nan},
        {"step": 2, "reward": 2.0, "kl": math.inf, "text": "x", "flag": True, "list": [1]},
        {"step": 3, "reward": 30.0, "huge": 10**400},
        {"step": 5, "reward": 5.0, "kl": 7.0},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = RunFiles(tmp_path).read()
    assert list(run.series["reward"].steps) == [1, 2, 3, 5]
    assert list(run.series["reward"].values) == [1, 2, 30, 5]
    assert np.isnan(run.series["kl"].values).tolist() == [True, True, True, False]
    assert np.isnan(run.series["huge"].values).all()
    assert set(run.series) == {"reward", "kl", "huge"}
    assert any("4 values are not finite" in note for note in run.notes)
    assert any("3 values are no numbers" in note for note in run.notes)
    assert any("step 4 missing" in note for note in run.notes)
    more = [*rows, *({"step": n, "reward": 1.0} for n in (9, 10, 20))]
    write_lines(tmp_path / "metrics.jsonl", more)
    assert any("step 4, and 12 more missing" in note for note in RunFiles(tmp_path).read().notes)


def test_a_run_that_failed_says_why(tmp_path):
    directory = write_run(tmp_path / "run")
    write_status(directory, {"state": "failed", "message": "RewardError: no reward"})
    run = RunFiles(directory).read()
    assert run.status == "failed"
    assert "it failed: RewardError: no reward" in run.notes


BROKEN = [
    b"no json\n",
    b"[1, 2]\n",
    b'{"reward": 1}\n',
    b'{"step": "1"}\n',
    b'{"step": true}\n',
    b'{"step": null}\n',
    b'{"step": NaN}\n',
    b'{"step": 1e400}\n',
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b"\n",
]


def test_broken_lines_are_counted_and_a_torn_one_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(BROKEN) + b'{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    files = RunFiles(tmp_path)
    run = files.read()
    assert list(run.series["reward"].values) == [0.5]
    assert f"metrics.jsonl: {len(BROKEN)} lines are not readable and left out" in run.notes
    assert "metrics.jsonl: the last line is torn and left out" in run.notes
    with open(path, "ab") as file:  # its writer goes on
        file.write(b'ard": 0.75}\n')
    run = files.read()
    assert list(run.series["reward"].values) == [0.5, 0.75]
    assert not any("torn" in note for note in run.notes)


def test_a_run_that_grows_and_one_that_is_cut_back(tmp_path):
    rows = metrics(30)
    path = tmp_path / "metrics.jsonl"
    write_lines(path, rows[:11])
    files = RunFiles(tmp_path)
    assert files.read().steps == 10
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[11:]))
    grown = files.read()
    fresh = RunFiles(tmp_path).read()
    assert grown.steps == 30
    for name, series in fresh.series.items():
        assert series.values.tolist() == grown.series[name].values.tolist()
    write_lines(path, rows[:6])  # resumed from an earlier checkpoint
    assert files.read().steps == 5
    path.unlink()
    assert files.read().series == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "samples_eval.jsonl"])
def test_one_file_alone_is_a_run(tmp_path, name):
    write_run(tmp_path / "whole")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    run = RunFiles(tmp_path / "half").read()
    assert bool(run.series) == (name == "metrics.jsonl")
    assert bool(run.config) == (name == "config.json")
    assert bool(run.samples) == (name == "samples_eval.jsonl")
    assert ("no metrics.jsonl" in run.notes) == (name != "metrics.jsonl")
    assert any("config.json" in note for note in run.notes) == (name != "config.json")


def test_samples_alarms_and_reports_that_are_not_what_they_should_be(tmp_path):
    write_run(tmp_path)
    good = samples(["fine"], [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    bad = [
        {"step": 1},
        {"step": 1, "prompt": 3, "completion": "x", "scores": {}},
        {"step": 1, "prompt": [], "completion": "x", "scores": {}},
        {"step": 1, "prompt": "p", "completion": None, "scores": {}},
        {"step": 1, "prompt": "p", "completion": "x", "scores": None},
    ]
    write_lines(tmp_path / "samples_eval.jsonl", [*bad, *good])
    write_lines(
        tmp_path / "alarms.jsonl",
        [{"step": 1}, {"step": 2, "evidence": [{"no": 1}]}, {"step": 3, "evidence": []}],
    )
    (tmp_path / "report.json").write_text('{"bins": [{"low": 1}]}')
    (tmp_path / "config.json").write_text('{"config": ')
    run = RunFiles(tmp_path).read()
    assert [sample.prompt for sample in run.samples] == ["system: S\n\nuser: U"]
    assert run.alarms == []
    assert run.calibration is None
    assert run.config is None
    text = "; ".join(run.notes)
    for said in (
        "samples_eval.jsonl: 5 lines are not readable",
        "alarms.jsonl: 3 lines are not readable",
        "report.json: expected the report of a reward model",
        "config.json cannot be read",
    ):
        assert said in text


def test_what_is_no_run(tmp_path):
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("x")
    for path, said in (
        (tmp_path / "runs", f"runs there: {tmp_path / 'runs' / 'a'}"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=said):
            RunFiles(path)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a/ppo", "b/ppo", "b/grpo", "c/x/ppo")]
    found = open_runs([*paths, tmp_path / "a" / ".." / "a" / "ppo"])
    assert [files.name for files in found] == ["a/ppo", "b/ppo", "grpo", "x/ppo"]


def test_options_that_differ(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", options={"optim": {"lr": 0.002}, "lora": {"rank": 8}})
    (tmp_path / "c").mkdir()
    write_lines(tmp_path / "c" / "metrics.jsonl", metrics(3))
    (tmp_path / "d").mkdir()
    other = {"stage": "SFTConfig", "config": {"optim": {"lr": 0.001}, "every_turn": False}}
    (tmp_path / "d" / "config.json").write_text(json.dumps(other))

    def between(*names):
        return config_differences([RunFiles(tmp_path / name).read() for name in names])

    assert between("a", "b") == {"optim.lr": ["0.001", "0.002"], "lora.rank": [None, "8"]}
    assert between("a", "c", "a") == {}
    assert between("a", "d") == {}  # options that only one of two stages has
    assert between("d", "b", "c")["optim.lr"] == ["0.001", "0.002", None]
    assert CONFIG["config"]["optim"] == {"lr": 0.001}


def test_a_run_is_running_while_its_process_owns_it(tmp_path):
    write_run(tmp_path)
    assert not is_locked(tmp_path)
    hold = (
        "import sys; from fusedrl.engine.runs.files import RunLock\n"
        f"with RunLock({str(tmp_path)!r}): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert RunFiles(tmp_path).read().status == "running"
        with pytest.raises(SetupError, match=f"pid {process.pid}"):
            RunLock(tmp_path)
        process.stdin.close()
        process.wait()
    assert RunFiles(tmp_path).read().status == "stopped"
    with RunLock(tmp_path):
        pass


def test_looking_takes_the_run_from_nobody(tmp_path):
    """A look holds the lock for an instant, and a run that begins then waits for it."""
    import fcntl
    import threading

    (tmp_path / "lock").write_text("")
    looking = open(tmp_path / "lock", "rb")  # noqa: SIM115 (closed by the timer)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.02, looking.close).start()
    with RunLock(tmp_path):
        assert is_locked(tmp_path)
