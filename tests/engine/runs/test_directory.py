"""How a run directory is opened: what changed since, what cannot be read now, what an earlier
process left, and who holds it.

One file: the run that reads everything one can, of which each test changes a part.
"""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.config import (
    CriticConfig,
    EvaluationConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.config.policy import LossConfig
from fusedrl.engine.model import weights
from fusedrl.engine.model.weights import clear_remains, replacing
from fusedrl.engine.runs import checkpoint as checkpoints
from fusedrl.engine.runs.checkpoint import (
    CHANGES,
    MANIFEST,
    RunDirectory,
    latest_checkpoint,
    save_checkpoint,
)
from fusedrl.engine.runs.files import RunLock, check_held, is_locked
from fusedrl.engine.runs.inputs import files_of, told_of

pytestmark = pytest.mark.cpu_only("files")


def save(run, step):
    return save_checkpoint(run, step, {"model": {"a": torch.ones(3)}}, {"step": step}, keep=9)


@pytest.fixture
def config(tmp_path):
    """A policy run that reads everything that one can."""
    for name in ("model", "judge", "critic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "config.json").write_text('{"rms_norm_eps": 1e-5}')
        (tmp_path / name / "tokenizer.json").write_text("{}")
    for name in ("data", "texts", "held"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [1.0]\n")
    return PolicyConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        reward=(f"{tmp_path / 'mine.py'}:f", str(tmp_path / "judge"), "length:target=3"),
        monitor_reward=(f"{tmp_path / 'mine.py'}:f",),
        critic=CriticConfig(model=str(tmp_path / "critic")),
        evaluation=EvaluationConfig(data=str(tmp_path / "held.jsonl")),
        optim=OptimConfig(schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run")),
    )


def resumed(config, **run):
    return replace(config, run=replace(config.run, resume=True, **run))


def begin(config, step=5):
    with RunDirectory(config) as run:
        save(run.dir, step)


# ---- what changed --------------------------------------------------------------------------------
REFUSED = {
    "model/config.json": "model: config.json",
    "model/tokenizer.json": "model: tokenizer.json",
    "model/model.safetensors": "other weights",
    "judge/model.safetensors": "judge: model.safetensors",
    "judge/config.json": "judge: config.json",
    "judge/tokenizer.json": "judge: tokenizer.json",
    "critic/model.safetensors": "critic.model: model.safetensors",
    "critic/config.json": "critic.model: config.json",
    "data.jsonl": "other data",
}


@pytest.mark.parametrize("file", REFUSED)
def test_a_file_that_decides_the_result_may_not_change_unseen(config, tmp_path, file):
    begin(config)
    with RunDirectory(resumed(config)) as run:
        assert run.notes == []
    path = tmp_path / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ConfigError, match=r"--run\.accept_changes true") as told:
        RunDirectory(resumed(config))
    assert REFUSED[file] in str(told.value)
    assert not (tmp_path / "run" / CHANGES).exists()
    with RunDirectory(resumed(config, accept_changes=True)) as run:
        assert run.checkpoint is not None
        (note,) = run.notes
        assert note.startswith("from step 6 on, ")
        assert REFUSED[file] in note
    (line,) = map(json.loads, (tmp_path / "run" / CHANGES).read_text().splitlines())
    assert line["step"] == 5
    assert REFUSED[file] in line["changed"][0]
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]["run"]
    assert not saved["accept_changes"]  # one start is accepted, and not all that follow
    with RunDirectory(resumed(config)) as run:  # it is what the run goes on with now
        assert run.notes == []


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "special_tokens_map.json", "tokenizer.model", "vocab.json"]
)
@pytest.mark.parametrize("comes", [True, False])
def test_files_that_come_or_go_are_changes(config, tmp_path, file, comes):
    path = tmp_path / "model" / file
    if not comes:
        path.write_text("x")
    begin(config)
    path.write_text("x") if comes else path.unlink()
    with pytest.raises(ConfigError, match=f"model: {file} holds something else.*absent"):
        RunDirectory(resumed(config))


def test_what_is_no_part_of_a_model_may_change(config, tmp_path):
    begin(config)
    (tmp_path / "model/README.md").write_text("x")
    with RunDirectory(resumed(config)) as run:
        assert run.notes == []


@pytest.mark.parametrize("file", ["mine.py", "held.jsonl"])
def test_code_of_rewards_and_what_is_only_measured_are_told_of(config, tmp_path, file):
    begin(config)
    (tmp_path / file).write_text("other\n")
    with RunDirectory(resumed(config)) as run:
        assert run.notes
        assert all(note.startswith("from step 6 on, ") for note in run.notes)
    (line,) = map(json.loads, (tmp_path / "run" / CHANGES).read_text().splitlines())
    assert all("mine.py" in one or "rows" in one for one in line["changed"])
    with RunDirectory(resumed(config)) as run:
        assert run.notes == []


def test_modules_that_a_reward_imports_are_told_of(config, tmp_path, monkeypatch):
    beside = {
        "mine.py": "import json, torch\nfrom told_pack.deep import two\nimport told_one\n",
        "told_one.py": "import told_two, missing_anywhere\n",
        "told_two.py": "import told_one\n",
        "told_pack/__init__.py": "",
        "told_pack/deep.py": "two = 2\n",
        "told_pack/other.py": "",
        "told_three.py": "this is no Python",
    }
    for name, text in beside.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    read = {"mine.py", "told_one.py", "told_two.py", "told_pack/__init__.py", "told_pack/deep.py"}
    assert set(told_of(config)[f"reward {config.reward[0]}"]) == read
    assert not {"told_one", "told_two", "told_pack"} & set(sys.modules)
    begin(config)
    (tmp_path / "told_two.py").write_text("import told_three\n")
    with RunDirectory(resumed(config)) as run:
        told = " ".join(run.notes)
    assert re.search(r"told_two\.py holds something else .*told_three\.py .*absent -> ", told)
    (tmp_path / "told_pack/other.py").write_text("unread = 1\n")
    with RunDirectory(resumed(config)) as run:
        assert run.notes == []


def test_the_code_of_an_objective_is_told_of(config, tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text("def f(*_): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = replace(config, loss=LossConfig(objective="own_objective.f"))
    assert "loss.objective" not in told_of(own)
    __import__("own_objective")
    try:
        assert list(told_of(own)["loss.objective"]) == ["own_objective.py"]
    finally:
        del sys.modules["own_objective"]


def test_what_is_digested(config):
    assert set(files_of(config)) == {"model", f"reward {config.reward[1]}", "critic.model"}
    assert "model.safetensors" not in files_of(config)["model"]  # model_sha256 is of those
    assert files_of(replace(config, critic=CriticConfig())).keys() & {"critic.model"} == set()
    assert files_of(replace(config, model="owner/not-there-0"))  # nothing is downloaded


def test_options_may_be_accepted_too_and_a_run_of_an_older_version_goes_on(config, tmp_path):
    begin(config)
    faster = replace(config, optim=replace(config.optim, lr=1e-3))
    with pytest.raises(ConfigError, match=r"optim\.lr: 1e-05 -> 0\.001"):
        RunDirectory(resumed(faster))
    with RunDirectory(resumed(faster, accept_changes=True)) as run:
        assert run.notes == ["from step 6 on, optim.lr: 1e-05 -> 0.001"]
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    del saved["files"], saved["told"]
    path.write_text(json.dumps(saved))
    with RunDirectory(resumed(faster)) as run:
        assert run.notes == []


def test_more_steps_under_a_schedule_that_depends_on_them(config):
    linear = replace(config, optim=OptimConfig(schedule="linear"))
    begin(linear)
    with RunDirectory(resumed(replace(linear, steps=200))) as run:
        (note,) = run.notes
        assert note.startswith("steps: 100 -> 200, and optim.schedule is linear to zero")
    with RunDirectory(resumed(replace(linear, steps=200))) as run:
        assert run.notes == []


def test_more_steps_under_a_constant_schedule_are_no_news(config):
    begin(config)
    with RunDirectory(resumed(replace(config, steps=200))) as run:
        assert run.notes == []


BROKEN = {
    "cut": b'{"stage": "Pol',
    "empty": b"",
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "no stage": b"{}",
    "a stage that is a list": b'{"stage": [1], "config": {}}',
    "config a list": b'{"stage": "PolicyConfig", "config": [1]}',
    "config empty": b'{"stage": "PolicyConfig", "config": {}}',
    "files a list": None,
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_configuration_of_a_run_is_named(config, tmp_path, what):
    begin(config)
    path = tmp_path / "run/config.json"
    content = BROKEN[what]
    if content is None:
        content = json.dumps(json.loads(path.read_text()) | {"files": [1]}).encode()
    path.write_bytes(content)
    with pytest.raises(
        (ConfigError, ValueError), match=r"config\.json: cannot be read|another"
    ) as told:
        RunDirectory(resumed(config))
    assert str(tmp_path / "run") in str(told.value)
    assert path.read_bytes() == content
    assert not is_locked(tmp_path / "run")


# ---- a run without a checkpoint ------------------------------------------------------------------
LEFT = ["metrics alone", "a broken checkpoint", "a model"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", LEFT)
def test_restart_sets_records_aside(config, tmp_path, left, resume):
    root = tmp_path / "run"
    begin(config)
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (root / "samples.jsonl").write_text('{"step": 1}\n')
    if left == "a broken checkpoint":
        (root / "checkpoints/step_00000005" / MANIFEST).unlink()
    else:
        shutil.rmtree(root / "checkpoints")
    if left == "a model":
        (root / "model").mkdir()
        (root / "model/config.json").write_text("{}")
    before = contents(root)
    anew = replace(config, run=replace(config.run, resume=resume, restart=True))
    with pytest.raises(ConfigError, match=r"--run\.restart true moves them"):
        RunDirectory(replace(anew, run=replace(anew.run, restart=False)))
    assert contents(root) == before
    with RunDirectory(anew) as run:
        assert run.checkpoint is None
        assert f"moved to {root / 'aside-1'}" in run.notes[0]
        assert contents(root / "aside-1") == before
        save(root, 2)
    with pytest.raises(ConfigError, match=r"holds a run \(step 2\)"):  # what can go on is kept
        RunDirectory(replace(anew, run=replace(anew.run, resume=False)))
    with RunDirectory(replace(anew, run=replace(anew.run, resume=True))) as run:
        assert run.checkpoint is not None
        assert run.notes == []
    shutil.rmtree(root / "checkpoints")
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with RunDirectory(anew) as run:
        assert f"moved to {root / 'aside-2'}" in run.notes[0]
    assert contents(root / "aside-1") == before
    saved = json.loads((root / "config.json").read_text())["config"]["run"]
    assert not saved["restart"]


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "stat", "scandir", "read"])
def test_what_cannot_be_read_now_is_not_taken_for_nothing(
    config, tmp_path, monkeypatch, call, number
):
    root = tmp_path / "run"
    begin(config)
    with RunDirectory(resumed(config)) as run:
        save(run.dir, 6)
    before = contents(root)

    def fails(path, *rest, **options):
        if "checkpoints" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return usual(path, *rest, **options)

    where, name = {
        "open": (checkpoints, "file_digest"),
        "stat": (os, "stat"),
        "scandir": (Path, "iterdir"),
        "read": (Path, "read_bytes"),
    }[call]
    usual = getattr(where, name)
    again = resumed(config, restart=True)  # not even then
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails)
        with pytest.raises(SetupError, match="cannot be read now") as told:
            RunDirectory(again)
    assert os.strerror(number) in str(told.value)
    assert "checkpoints" in str(told.value)
    assert contents(root) == before
    with RunDirectory(again) as run:
        assert run.checkpoint.step == 6


def in_child(work) -> tuple[int, list[str]]:
    """Run `work` in a fork: (wait status, what it wrote by the function that it is given)."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda *words: os.write(writable, (" ".join(map(str, words)) + "\n").encode()))
            os._exit(0)
        except BaseException as error:
            os.write(writable, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read().splitlines()
    return os.waitpid(child, 0)[1], said


def test_too_many_open_files_is_not_no_checkpoint(config):
    begin(config)
    assert latest_checkpoint(config.run.dir).step == 5

    def work(tell):
        kept = []
        most = len(os.listdir("/proc/self/fd")) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with contextlib.suppress(OSError):
            while True:
                kept.append(os.open("/dev/null", os.O_RDONLY))
        for freed in range(6):
            try:
                tell(freed, latest_checkpoint(config.run.dir).step)
            except Exception as error:
                tell(freed, type(error).__name__, "cannot be read now" in str(error))
            os.close(kept.pop())

    status, said = in_child(work)
    assert status == 0, said
    assert said[0] == "0 SetupError True", said
    assert said[-1] == "5 5", said
    assert all(line.endswith(("SetupError True", " 5")) for line in said), said


def test_a_save_that_meets_a_bad_disk_deletes_no_good_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "file_digest", fails)
        with pytest.raises(OSError):
            save(tmp_path, 5)
    assert latest_checkpoint(tmp_path).step == 5


ABSURD = {
    "an infinite step": {"step": float("inf")},
    "an infinite size": {"files": {"state.json": {"bytes": float("inf"), "sha256": "0"}}},
    "a negative size": {"files": {"state.json": {"bytes": -1, "sha256": "0"}}},
    "a size that is NaN": {"files": {"state.json": {"bytes": float("nan"), "sha256": "0"}}},
    "a size of a text": {"files": {"state.json": {"bytes": "x", "sha256": "0"}}},
    "a huge size": {"files": {"state.json": {"bytes": 10**400, "sha256": "0"}}},
    "files a list": {"files": [1]},
    "files a text": {"files": "all"},
    "an entry that is none": {"files": {"state.json": None}},
    "a long name": {"files": {"x" * 5000: {"bytes": 1, "sha256": "0"}}},
    "a lone surrogate": {"files": {"\ud800": {"bytes": 1, "sha256": "0"}}},
    "a format that is a list": {"format": [1]},
    "no step": {"step": None},
    "a step of 10,000 digits": "digits",
    "nested": "nested",
    "no UTF-8": "bytes",
    "a directory": "directory",
    "huge": "huge",
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_manifest_is_passed_over(tmp_path, what, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / MANIFEST
    usual = json.loads(path.read_text())
    change = ABSURD[what]
    path.unlink()
    if isinstance(change, dict):
        files = change.get("files")
        if isinstance(files, dict):
            change = {"files": usual["files"] | files}
        path.write_text(json.dumps(usual | change))
    elif change == "directory":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "nested": b'{"files": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                "digits": b'{"format": 1, "files": {}, "step": ' + b"9" * 10_000 + b"}",
                "bytes": b'{"format": 1, "\xff": 1}',
                "huge": b'{"format": 1, "step": 1e999, "files": {}}',
            }[change]
        )
    assert latest_checkpoint(tmp_path).step == 1
    assert "checkpoint skipped: " + str(path.parent) in caplog.text
    assert len(caplog.text) < 3000
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).step == 2


# ---- what a killed process left ------------------------------------------------------------------
FILES = {"config.json": "{}", "model.safetensors": "w"}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(target: Path, at: str) -> None:
    """Save a model, and be killed at this point of it."""
    rename, count = Path.rename, itertools.count(1)

    def counted(path, to):
        if at == f"rename {next(count)}":
            die()
        return rename(path, to)

    Path.rename = counted
    if at == "sync":
        weights._sync = die
    if at == "rmtree":
        shutil.rmtree = die
    with replacing(target) as temporary:
        (temporary / "config.json").write_text("new")
        (temporary / "model.safetensors").write_text("x" * 1000)
        if at == "writing":
            die()


@pytest.mark.parametrize("at", ["writing", "sync", "rename 1", "rename 2", "rmtree"])
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_in_the_final_save_leaves_no_litter_behind(config, tmp_path, at, there):
    begin(config)
    target = tmp_path / "run/model"
    if there:
        target.mkdir()
        for name, text in FILES.items():
            (target / name).write_text(text)
    status, said = in_child(lambda tell: save_and_die(target, at))
    if not there and at == "rename 2":
        assert status == 0, said  # there is none
        return
    assert os.WIFSIGNALED(status), said
    if not there and at == "rmtree":  # what deletes the temporary directory, if it were there
        assert sorted(path.name for path in target.iterdir()) == sorted(FILES)
        return
    assert [path for path in target.parent.iterdir() if path.name.startswith(".model.")]
    with RunDirectory(resumed(config)):
        assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]
    if there:  # the model is there, the old one or the new one, and whole
        texts = {path.name: path.read_text() for path in target.iterdir()}
        assert texts == (
            {"config.json": "new", "model.safetensors": "x" * 1000} if at == "rmtree" else FILES
        )
    else:
        assert not target.exists()


def test_a_save_that_is_going_on_is_no_litter(tmp_path):
    with replacing(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}")
        clear_remains(tmp_path / "model")
        assert (temporary / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_names_that_only_look_alike_stay(tmp_path):
    for name in (".model.tmp", ".model.12345678.bak", ".other.12345678.tmp", "model.12345678.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.0123abcd.tmp").symlink_to(tmp_path / ".model.tmp")
    clear_remains(tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("name", ["model", "adapter", "critic"])
@pytest.mark.parametrize("stray", ["notes.txt", "evil.py", "inner", ".hidden"])
def test_a_stray_file_is_found_before_the_first_step(config, tmp_path, name, stray):
    begin(config)
    (tmp_path / "run" / name).mkdir()
    path = tmp_path / "run" / name / stray
    path.mkdir() if stray == "inner" else path.write_text("x")
    with pytest.raises(FileExistsError, match=rf"run/{name} exists and holds.*{stray}"):
        RunDirectory(resumed(config))
    assert path.exists()


# ---- the lock ------------------------------------------------------------------------------------
def test_a_lock_that_is_a_link_is_not_followed(config, tmp_path):
    other = tmp_path / "precious"
    other.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(other)
    with pytest.raises(ConfigError, match=r"run/lock: expected a regular file.* symbolic link"):
        RunDirectory(config)
    assert other.read_text() == "precious"
    assert not is_locked(tmp_path / "run")
    (tmp_path / "run/lock").unlink()
    (tmp_path / "run/lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        RunDirectory(config)
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_that_is_a_pipe_blocks_nothing(config, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/lock")
    with pytest.raises(ConfigError, match="special file"):
        RunDirectory(config)
    assert not is_locked(tmp_path / "run")
    assert stat.S_ISFIFO((tmp_path / "run/lock").stat().st_mode)


FORKS = """
import os, sys, time
from fusedrl.engine.runs.files import RunLock
lock = RunLock(sys.argv[1])
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""


def test_a_worker_that_was_forked_does_not_keep_the_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        child = int(holder.stdout.readline())
        try:
            assert is_locked(tmp_path)
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            with RunLock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def _ends() -> None:
    time.sleep(0.01)


def test_a_worker_that_ends_does_not_give_the_lock_away(tmp_path):
    with RunLock(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=_ends)
        worker.start()
        worker.join()
        with pytest.raises(SetupError, match="another run writes here"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_sft_reads_a_model_and_data_alone(tmp_path, config):
    plain = SFTConfig(model=config.model, data=config.data, run=config.run)
    assert list(files_of(plain)) == ["model"]
    assert told_of(plain) == {}


# ---- directories that are someone else's, or become so -------------------------------------------
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", "no JSON"),
        ("samples.jsonl", '{"prompt": "w1"}\n'),
        ("samples_eval.jsonl", "x"),
        ("alarms.jsonl", "x"),
        ("rejects.jsonl", "x"),
    ],
)
def test_files_of_others_are_never_written_over(name, text, config):
    one = config
    directory = Path(one.run.dir)
    directory.mkdir(parents=True)
    (directory / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        RunDirectory(one)
    assert (directory / name).read_text() == text
    assert {path.name for path in directory.iterdir()} <= {name, "lock"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.json"])
def test_a_pipe_in_place_of_a_file_is_named(name, config):
    one = config
    Path(one.run.dir).mkdir(parents=True)
    os.mkfifo(Path(one.run.dir) / name)
    with pytest.raises(ConfigError, match=rf"{name}: expected a file of a run"):
        RunDirectory(one)


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_directory_that_goes_away_under_its_run_is_told_of(how, tmp_path):
    directory = tmp_path / "run"
    with RunLock(directory):
        check_held(directory)
        shutil.rmtree(directory) if how == "removed" else directory.rename(tmp_path / "elsewhere")
        second = RunLock(directory) if how == "replaced" else None
        with pytest.raises(SetupError, match="removed, renamed or replaced while it ran"):
            check_held(directory)
        if second is not None:
            second.release()
