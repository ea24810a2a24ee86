"""A machine that is short of something: memory, descriptors, disk, a home, shared memory, rights,
a clock that goes one way. Each ends in a message that names what is missing, or does not matter;
what was saved before is there."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support import torture
from tests.support.behaviour import furnish
from tests.support.tiny import write_model

from fusedrl.engine.base.errors import SetupError
from fusedrl.engine.runs.checkpoint import latest_checkpoint

pytestmark = pytest.mark.cpu_only("the machine around a run")


@pytest.fixture
def config(tmp_path):
    furnish(tmp_path)
    return lambda stage="sft", name="run": torture.config_of(stage, tmp_path, tmp_path / name)


def in_child(tmp_path, work):
    """(exit status, what was raised) of `work` in a fork."""
    return torture.in_child(work, tmp_path / "out")


def step_of(config):
    found = latest_checkpoint(config.run.dir)
    return 0 if found is None else found.step


def bitwise_as_ever(config, make, stage="sft"):
    """Go on with the run, and compare it with one that had all it wanted."""
    torture.train(replace(config, run=replace(config.run, resume=True)))
    whole = make(stage, "whole")
    torture.train(whole)
    ours, theirs = (torture.left_by(Path(c.run.dir)) for c in (config, whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


# ---- disk ----------------------------------------------------------------------------------------
def test_a_disk_of_three_megabytes(config, tmp_path):
    """A file system of that size, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    told = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(told, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        one = config()
        one = replace(one, run=replace(one.run, dir=str(disk / "run"), keep=1))
        (disk / "filler").write_bytes(b"x" * (2_700_000))
        status, said = in_child(tmp_path, lambda: torture.train(one))
        assert status == 1
        assert "No space left on device" in said
        assert "free some space" in said
        step = step_of(one)
        (disk / "filler").unlink()
        again = {"resume": True} if step else {"restart": True}
        torture.train(replace(one, run=replace(one.run, **again)))
        whole = config(name="whole")
        torture.train(whole)
        assert torture.left_by(disk / "run") == torture.left_by(Path(whole.run.dir))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ESTALE, errno.EACCES, errno.EROFS])
def test_renames_that_fail_as_on_a_network_disk(config, tmp_path, number, monkeypatch):
    one, rename = config(), os.rename
    calls = []

    def fails(old, new, **options):
        if Path(new).name == "step_00000002":
            calls.append(1)
            raise OSError(number, os.strerror(number), str(old))
        return rename(old, new, **options)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        torture.train(one)
    monkeypatch.undo()
    assert calls
    assert step_of(one) == 1
    assert not list(Path(one.run.dir).glob("checkpoints/.tmp*"))
    bitwise_as_ever(one, config)


def test_a_directory_that_cannot_be_written(config):
    """In places where root may not write either."""
    for place in ("/proc/self/nowhere/run", "/sys/run"):
        one = config()
        with pytest.raises(SetupError, match=r"cannot be written .*choose another --run\.dir"):
            torture.train(replace(one, run=replace(one.run, dir=place)))


# ---- memory and descriptors ----------------------------------------------------------------------
@pytest.mark.parametrize("spare", [1, 15, 30])
def test_memory_that_ends(config, tmp_path, spare):
    """So many MiB of address space more than the process has when the run begins; weights,
    gradients and moments of this model take 80."""
    large = tmp_path / "large"
    write_model(large, hidden_size=256, intermediate_size=1024, num_hidden_layers=5, head_dim=64)
    one = replace(config(), model=str(large))

    def work():
        torture.train(config(name="before"))  # what is imported is there
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (spare << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        torture.train(one)

    status, said = in_child(tmp_path, work)
    assert status == 1, f"exit status {status}"
    assert any(word in said for word in ("memory", "MemoryError", "allocate")), said
    again = {"resume": True} if step_of(one) else {"restart": True}
    torture.train(replace(one, run=replace(one.run, **again)))


def test_python_memory_that_ends_while_it_saves(config, monkeypatch):
    from fusedrl.engine.runs import checkpoint

    original, calls = checkpoint._safetensors, []

    def short(named):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError
        return original(named)

    monkeypatch.setattr(checkpoint, "_safetensors", short)
    one = config()
    with pytest.raises((MemoryError, RuntimeError)) as told:
        torture.train(one)
    monkeypatch.undo()
    assert "step 1 is in" in " ".join(getattr(told.value, "__notes__", [])) + str(told.value)
    assert step_of(one) == 1
    bitwise_as_ever(one, config)


def test_descriptors_that_end(config, tmp_path):
    def work():
        torture.train(config(name="before"))
        most = max(map(int, os.listdir("/proc/self/fd")))
        while (last := os.open(os.devnull, os.O_RDONLY)) < most:
            pass  # no number below is free
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))  # one file at a time
        torture.train(config())

    status, said = in_child(tmp_path, work)
    assert status == 1
    assert "Too many open files" in said or "ulimit -n" in said
    one = config()
    again = {"resume": True} if step_of(one) else {"restart": True}
    torture.train(replace(one, run=replace(one.run, **again)))


# ---- what a run should not need ------------------------------------------------------------------
@pytest.mark.parametrize("step", [-1e6, 1e6])
def test_a_clock_that_jumps(config, monkeypatch, step):
    one, real, calls = config("grpo"), time.time, []

    def jumps():
        calls.append(1)
        return real() + step * (len(calls) % 2)

    monkeypatch.setattr(time, "time", jumps)
    torture.train(one)
    monkeypatch.undo()
    whole = config("grpo", "whole")
    torture.train(whole)
    assert torture.left_by(Path(one.run.dir)) == torture.left_by(Path(whole.run.dir))
    rows = map(json.loads, (Path(one.run.dir) / "metrics.jsonl").read_text().splitlines())
    times = [value for row in rows for key, value in row.items() if key.startswith("timing/")]
    assert times
    assert all(0 <= value < 1000 for value in times), "durations come of a clock that may jump"


def test_neither_a_home_nor_shared_memory_is_needed(config, tmp_path):
    """HOME is a file, and /dev/shm an empty file system that takes nothing, where this process may
    have one of its own."""
    (tmp_path / "home").write_text("no directory")
    one = config()
    words = ["train", "sft", "--model", one.model, "--data", one.data, "--device", "cpu"]
    words += ["--run.dir", str(tmp_path / "alone"), "--run.progress", "false"]
    command = [sys.executable, "-m", "fusedrl.engine.cli", *words]
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=0,ro none /dev/shm && "$@"', "sh"]
    may = (
        shutil.which("unshare")
        and not subprocess.run([*hide, "true"], capture_output=True).returncode
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG")}
    found = subprocess.run(
        [*(hide if may else []), *command],
        env=environment | {"HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "alone/model/model.safetensors").is_file()
