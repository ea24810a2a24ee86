"""Loggers: the same rows as metrics.jsonl, whatever they do to themselves; the clients' own files
are read back."""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fusedrl.engine.base.errors import ConfigError, RewardError, SetupError, UserError
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    PolicyConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.runs import loggers
from fusedrl.engine.runs.loggers import Reporter, RunInfo, check_loggers, register_logger
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.sft import train_sft

pytestmark = pytest.mark.cpu_only("what is logged are numbers of the host")
ROOT = Path(__file__).resolve().parents[3]


def needs(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


class Recorder:
    """A user's logger that remembers."""

    made: ClassVar[list["Recorder"]] = []

    def __init__(self, info: RunInfo) -> None:
        self.info, self.rows, self.tables, self.columns, self.closed = info, [], [], [], None
        self.made.append(self)

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def table(self, step, name, rows):
        self.tables.append((step, name, list(rows)))

    def histograms(self, step, columns):
        self.columns.append((step, dict(columns)))

    def close(self, failed):
        self.closed = failed


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(loggers, "_REGISTERED", {})
    register_logger("recorder")(Recorder)
    return Recorder


@pytest.fixture
def info(tmp_path):
    return RunInfo(tmp_path, "grpo", {"optim.lr": 1e-5}, 0, 10)


@pytest.fixture
def policy(tiny_model, tmp_path, write_jsonl):
    (tmp_path / "r.py").write_text(
        "import random\n"
        "def f(prompts, completions, completion_ids, **_):\n"
        "    return [len(set(ids)) + random.random() for ids in completion_ids]\n"
    )
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(4)])

    def config(name: str, log: str, steps: int = 3, resume: bool = False, **options):
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'r.py'}:f",),
            "grpo",
            steps=steps,
            prompts_per_step=2,
            samples_per_prompt=2,
            generation=GenerationConfig(max_new_tokens=4),
            run=RunConfig(str(tmp_path / name), log=log, resume=resume, progress=False),
            **options,
        )

    return config


def _rows(directory) -> list[dict]:
    return [
        json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()
    ]


def _unclocked(rows: list[dict]) -> list[dict]:
    clocks = ("timing/", "tokens_per_s", "mem/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


# ---- what a logger is given ----------------------------------------------------------------------
def test_a_logger_gets_every_row_and_the_run_is_the_same(policy, recorder, tmp_path):
    held = EvaluationConfig(str(tmp_path / "prompts.jsonl"), every=2, prompts=2)
    config = policy("logged", "recorder", evaluation=held)
    train_policy(config)
    (one,) = recorder.made
    rows = _rows(config.run.dir)
    assert [step for step, _ in one.rows] == [row["step"] for row in rows] == [0, 1, 2, 3]
    for (_, values), row in zip(one.rows, rows, strict=True):
        assert values == {k: v for k, v in row.items() if k != "step"}
    assert (one.info.title, one.info.start, one.info.total) == ("grpo", 0, 3)
    assert one.info.config["generation.max_new_tokens"] == 4
    assert one.closed is False
    assert [(step, name) for step, name, _ in one.tables] == [
        *((0, "samples_eval"), (1, "samples"), (2, "samples_eval"), (2, "samples")),
        *((3, "samples_eval"), (3, "samples")),
    ]
    assert one.tables[1][2][0].keys() == {"prompt", "completion", "finish_reason", "score"}
    for step, columns in one.columns:
        row = rows[step]
        assert columns["completions/length"].mean() == pytest.approx(row["completions/mean_length"])
        assert columns["reward"].std(ddof=1) == pytest.approx(row["reward_std"], rel=1e-5)
        assert len(columns["val/ratio"]) == columns["completions/length"].sum()
    alone = policy("alone", "", evaluation=held)
    train_policy(alone)
    assert _unclocked(rows) == _unclocked(_rows(alone.run.dir))


def test_every_stage_logs(tiny_model, tmp_path, write_jsonl, recorder):
    data = write_jsonl("sft.jsonl", [{"prompt": "w1", "completion": "w2 w3"}] * 4)
    run = RunConfig(str(tmp_path / "run"), log="recorder", progress=False)
    train_sft(SFTConfig(str(tiny_model), data, sequences_per_step=2, run=run))
    assert [step for step, _ in recorder.made[0].rows] == [1, 2]
    assert recorder.made[0].rows[1][1]["num_tokens"] == 20


def test_a_resumed_run_tells_its_logger_where_it_begins(policy, recorder):
    train_policy(policy("run", "recorder", steps=2))
    train_policy(policy("run", "recorder", steps=4, resume=True))
    first, second = recorder.made
    assert (second.info.start, second.info.total) == (2, 4)
    assert [step for one in (first, second) for step, _ in one.rows] == [1, 2, 3, 4]
    totals = [values["num_tokens"] for one in (first, second) for _, values in one.rows]
    each = [values["step_tokens"] for one in (first, second) for _, values in one.rows]
    assert totals == list(np.cumsum(each))


def test_a_failed_run_is_closed_as_failed(policy, recorder, tmp_path):
    (tmp_path / "r.py").write_text("def f(**_):\n    raise ValueError('no reward')\n")
    with pytest.raises(RewardError):
        train_policy(policy("run", "recorder"))
    assert recorder.made[0].closed is True


# ---- what a logger may do to itself --------------------------------------------------------------
def test_a_logger_that_raises_is_told_of_once_and_tried_again(info, recorder):
    said, rows = [], []

    @register_logger("bad")
    def bad(step, values):
        rows.append(step)
        if step != 5:
            sys.exit("the disk is full")

    with Reporter(["bad", "recorder"], info, said.append) as reporter:
        for step in range(1, 7):
            reporter.log(step, {"loss": 1.0})
    assert rows == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in recorder.made[0].rows] == rows
    assert len(said) == 2
    assert said[0].startswith("run.log bad: SystemExit: the disk is full; the run goes on")
    assert said[1] == "run.log bad: 5 reports did not reach it"


def test_a_logger_that_never_returns_holds_up_neither_steps_nor_the_end(info, monkeypatch):
    monkeypatch.setattr(loggers, "_MOST_WAITING", 10)
    monkeypatch.setattr(loggers, "_SECONDS_TO_CLOSE", 0.2)
    monkeypatch.setattr(loggers, "_REGISTERED", {})
    stuck, said = threading.Event(), []
    register_logger("stuck")(lambda step, values: stuck.wait())
    began = time.monotonic()
    with Reporter(["stuck"], info, said.append) as reporter:
        for step in range(1, 30):
            reporter.log(step, {})
    assert time.monotonic() - began < 5.0
    stuck.set()
    assert "it is 10 rows behind the run" in said[0]
    assert any("not finished after 0.2 seconds, and left behind" in text for text in said)


def test_a_client_that_fails_as_it_begins_does_not_end_the_run(info, monkeypatch):
    def failing(name, info):
        random.random()  # what a client draws is its own
        raise OSError("the server is down")

    monkeypatch.setattr(loggers, "make_logger", failing)
    before, said = random.getstate(), []
    with Reporter(["wandb"], info, said.append) as reporter:
        reporter.log(1, {})
        assert not reporter
    (told,) = said
    assert told.startswith("run.log wandb: OSError: the server is down; the run goes on without it")
    assert random.getstate() == before


def test_numbers_that_are_not_finite_are_no_histogram(info, recorder):
    with Reporter(["recorder"], info, print) as reporter:
        reporter.histograms(1, {"a": np.array([1.0, math.nan, math.inf]), "b": np.array([])})
    ((_, columns),) = recorder.made[0].columns
    assert columns.keys() == {"a"}
    assert columns["a"].tolist() == [1.0]


# ---- names ---------------------------------------------------------------------------------------
def test_a_file_gives_a_class_a_function_or_an_object(tmp_path, info):
    (tmp_path / "mine.py").write_text(
        "rows = []\n"
        "class Kind:\n"
        "    def __init__(self, info): rows.append(info.title)\n"
        "    def log(self, step, values): rows.append(('Kind', step))\n"
        "class Other:\n"
        "    def __call__(self): pass\n"
        "    def log(self, step, values): rows.append(('one', step))\n"
        "one = Other()\n"
        "def function(step, values): rows.append(('function', step))\n"
    )
    path = tmp_path / "mine.py"
    names = [f"{path}:{name}" for name in ("Kind", "one", "function")]
    for name, expected in zip(
        names, (["grpo", ("Kind", 3)], [("one", 3)], [("function", 3)]), strict=True
    ):
        check_loggers([name])  # imports the file once, for the run as well
        module = sys.modules["fusedrl_reward_mine"]
        with Reporter([name], info, print) as reporter:
            reporter.log(3, {})
        assert sys.modules["fusedrl_reward_mine"] is module
        assert module.rows == expected
        with Reporter([name], info, print):
            assert sys.modules["fusedrl_reward_mine"] is not module  # of another run


@pytest.mark.parametrize(
    "body, words",
    [
        ("class L:\n    def __init__(self): pass\n    def log(self, step, values): pass", "(info)"),
        ("class L:\n    def log(self, step): pass", "(info)"),
        ("class L:\n    def __init__(self, info): pass\n    log = 3", "expected a method log"),
        (
            "class L:\n    def __init__(self, info): pass\n    def log(self, step): pass",
            "(self, step, values)",
        ),
        ("def L(values): pass", "(step, values)"),
        ("L = 3", "expected a function"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("", "the file has no 'L'"),
    ],
)
def test_a_logger_that_cannot_be_called_is_told_before_a_model_is_loaded(tmp_path, body, words):
    (tmp_path / "bad.py").write_text(body + "\n")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        check_loggers([f"{tmp_path / 'bad.py'}:L"])
    assert str(tmp_path / "bad.py") in str(caught.value)


@pytest.mark.parametrize(
    "body, words",
    [
        ("class L:\n    def __init__(self, info): pass", "expected a method log"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("", "the file has no 'L'"),
    ],
)
def test_a_file_that_has_no_logger_is_refused_at_the_start(tmp_path, info, body, words):
    (tmp_path / "bad.py").write_text(body + "\n")
    with pytest.raises((ConfigError, RewardError), match=words):
        Reporter([f"{tmp_path / 'bad.py'}:L"], info, print)


@pytest.mark.parametrize("raised", ["PermissionError('no login')", "SystemExit('no login')"])
def test_a_class_that_raises_as_it_is_made_is_told_of_once_and_left_out(
    tmp_path, info, recorder, raised
):
    (tmp_path / "bad.py").write_text(
        f"class L:\n    def __init__(self, info):\n        raise {raised}\n\n"
        "    def log(self, step, values):\n        pass\n"
    )
    said: list[str] = []
    with Reporter([f"{tmp_path / 'bad.py'}:L", "recorder"], info, said.append) as reporter:
        reporter.log(1, {"loss": 1.0})
        reporter.log(2, {"loss": 1.0})
    (told,) = said
    assert f"raised {raised.partition('(')[0]}: no login ({tmp_path / 'bad.py'}:3)" in told
    assert told.endswith("the run goes on without it; metrics.jsonl has every row")
    assert [step for step, _ in recorder.made[0].rows] == [1, 2]


def test_unknown_names_and_missing_packages_say_what_to_do(monkeypatch, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"did you mean tensorboard\?"):
        check_loggers(["tensorbord"])
    with pytest.raises(RewardError, match="there is no such file"):
        check_loggers([str(tmp_path / "none.py:L")])
    monkeypatch.setitem(loggers.CLIENTS, "wandb", ("no_such_package", "x:y"))
    with pytest.raises(SetupError, match=r"pip install 'fusedrl\[wandb\]'"):
        check_loggers(["wandb"])
    argv = ["train", "sft", "--model", "m", "--data", "d", "--run.log", "wandb"]
    assert main(argv) == 3
    assert "the package no_such_package is not installed" in capsys.readouterr().err
    argv[-1] = "comet"
    assert main(argv) == 2
    argv[-2] = "--report_to"
    assert main(argv) == 2
    assert "which is --run.log here" in capsys.readouterr().err


def test_names_are_separated_by_commas():
    assert RunConfig(log=" wandb, a/b.py:C,,wandb").loggers == ("wandb", "a/b.py:C")
    assert RunConfig(columns="kl, val/*").column_names == ("kl", "val/*")
    assert RunConfig().loggers == RunConfig().column_names == ()


# ---- the clients ---------------------------------------------------------------------------------
@needs("tensorboard")
def test_tensorboard_has_the_rows_and_a_resumed_run_goes_on(policy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_policy(policy("run", "tensorboard", steps=2))
    events = tmp_path / "run" / "tensorboard"
    # steps after the checkpoint that the run is to go on from, as of a run that was killed
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(events)) as writer:
        writer.add_scalar("reward", -1.0, 3)
    time.sleep(1.1)  # files are told apart by their second
    train_policy(policy("run", "tensorboard", steps=4, resume=True))
    found = EventAccumulator(str(events), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    rows = _rows(tmp_path / "run")
    names = {name for row in rows for name in row} - {"step"}
    assert set(found.Tags()["scalars"]) == names
    for name in ("reward", "kl", "learning_rate", "completions/clipped_ratio"):
        logged = [(event.step, event.value) for event in found.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert set(found.Tags()["histograms"]) == {
        f"distribution/{name}" for name in ("completions/length", "reward", "val/ratio")
    }
    assert found.Histograms("distribution/reward")[0].histogram_value.num == 4
    texts = found.Tags()["tensors"]
    assert {"config/text_summary", "samples/text_summary"} <= set(texts)
    table = found.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.startswith("| prompt | completion | finish_reason | score |\n| --- |")


@needs("tensorboard")
def test_tensorboard_keeps_tables_whole(info, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Reporter(["tensorboard"], info, print) as reporter:
        reporter.log(1, {"loss": math.nan})
        reporter.table(1, "samples", [{"prompt": [{"role": "user"}], "text": "a|b\n😀 אב"}])
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    text = found.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[2] == '| [{"role": "user"}] | a\\|b<br>😀 אב |'
    assert math.isnan(found.Scalars("loss")[0].value)


@pytest.fixture
def command(tiny_model, tmp_path, write_jsonl):
    """Run SFT by the command line in a process of its own, whose environment has what is given."""
    data = write_jsonl("sft.jsonl", [{"prompt": "w1", "completion": "w2 w3"}] * 8)

    def run(log: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                *(sys.executable, "-m", "fusedrl.engine.cli", "train", "sft", "--device", "cpu"),
                *("--model", str(tiny_model), "--data", data, "--sequences_per_step", "2"),
                *("--run.dir", str(tmp_path / "run"), "--run.log", log, *options),
            ],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                "HOME": str(tmp_path / "home"),
                "OMP_NUM_THREADS": "1",
                "WANDB_API_KEY": "",
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )

    return run


@pytest.mark.full
@needs("wandb")
def test_wandb_offline_has_the_rows_and_a_resumed_run_is_the_same_run(command, tmp_path):
    done = command("wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    name = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    (first,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    logged = first.read_bytes()
    rows = _rows(tmp_path / "run")
    assert len(rows) == 4
    for metric in rows[0]:
        assert metric == "step" or logged.count(metric.encode()) >= len(rows), metric
    for row in rows:
        assert repr(row["loss"])[:8].encode() in logged
    done = command("wandb", "--epochs", "1", "--run.resume", "true", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))) == 2


@needs("wandb")
def test_wandb_without_a_login_says_how_to_get_one(command, tmp_path):
    done = command("wandb", WANDB_MODE="online")
    assert done.returncode == 3, done.stderr
    assert "nobody is logged in here; run `wandb login` first" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()  # told before a model is loaded


@pytest.mark.full
@needs("trackio")
def test_trackio_has_the_rows(command, tmp_path):
    done = command("trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    import sqlite3

    (path,) = (tmp_path / "trackio").glob("fusedrl*.db")
    with sqlite3.connect(path) as database:
        told = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    found = {step: json.loads(metrics) for step, metrics in told}
    rows = _rows(tmp_path / "run")
    assert {step: row["loss"] for step, row in found.items()} == {
        row["step"]: row["loss"] for row in rows
    }


@pytest.mark.full
def test_of_several_ranks_the_first_logs(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(step, values):\n    print('logged', step, flush=True)\n"
    )
    done = command("mine.py:mine", "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"logged (\d)", done.stdout) == ["1", "2", "3", "4"]
    assert done.stderr.count("sft  model ") == 1
