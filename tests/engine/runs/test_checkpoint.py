"""Checkpoints: whatever happens to a save, the newest complete one loads and none that was
acknowledged is lost."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusedrl.engine.base.errors import CheckpointError, ConfigError, SetupError
from fusedrl.engine.config import RunConfig, SFTConfig
from fusedrl.engine.runs.checkpoint import (
    MANIFEST,
    RunDirectory,
    RunLock,
    config_diff,
    config_to_dict,
    latest_checkpoint,
    save_checkpoint,
)

IO_CALLS = {
    "open",
    "write",
    "flush",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "rmdir",
    "close",
    "scandir",
}


def _tensors(device, step: int):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 6, generator=generator).to(device)
    return {
        "model": {
            "a": weight[:, :3],
            "b": weight[:, 3:],
            "bf16": weight.bfloat16(),
            "scalar": torch.tensor(0.1 * step, device=device),
            "none": torch.zeros(0, 5, device=device),
        },
        "optimizer": {
            "step": torch.tensor(step, device=device),
            "m.a": weight.double(),
            "mask": weight > 0,
        },
        "rng": {"cpu": torch.get_rng_state()},
    }


def _state(step: int):
    return {
        "kl_coef": 0.1 + step,
        "cursor": {"epoch": step, "index": None},
        "flags": [True, "x", 1e-300],
    }


def _save(device, run, step, keep=2):
    return save_checkpoint(run, step, _tensors(device, step), _state(step), keep=keep)


def _same(device, checkpoint, step):
    assert checkpoint is not None
    assert checkpoint.step == step
    expected = _tensors(device, step)
    assert checkpoint.tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            found = checkpoint.tensors[group][name]
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name
    assert checkpoint.state == _state(step)


def _entries(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _in_child(work) -> tuple[int, str]:
    """Run `work` in a fork: (wait status, what it printed or raised)."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(readable)
            message = str(work() or "")
            status = 0
        except BaseException:
            message = traceback.format_exc()
        sys.setprofile(None)
        os.write(writable, message[-4000:].encode())
        os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    return os.waitpid(child, 0)[1], text


def _at_io_call(k: int, event: str, act) -> None:
    """Call `act` before ("c_call") or after ("c_return") the k-th I/O call of what runs next."""
    count = 0

    def profile(frame, found, function):
        nonlocal count
        if found == event and getattr(function, "__name__", "") in IO_CALLS:
            count += 1
            if count == k:
                act()

    sys.setprofile(profile)


def test_round_trip_is_bitwise(tmp_path, device):
    path = _save(device, tmp_path, 12)
    assert path == tmp_path / "checkpoints/step_00000012"
    _same(device, latest_checkpoint(tmp_path), 12)
    # the library's own reader agrees
    assert load_file(path / "model.safetensors")["bf16"].dtype == torch.bfloat16
    assert sorted(p.name for p in path.iterdir()) == [
        MANIFEST,
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_rotation_keeps_the_newest(tmp_path, device):
    for step in (1, 2, 30, 4_000):
        _save(device, tmp_path, step)
    assert _entries(tmp_path) == ["step_00000030", "step_00004000"]
    _same(device, latest_checkpoint(tmp_path), 4_000)


def test_saving_a_saved_step_again_changes_nothing(tmp_path, device):
    path = _save(device, tmp_path, 3)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    _save(device, tmp_path, 3)
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


# ---- a save that is interrupted ------------------------------------------------------------------
@pytest.mark.parametrize("event", ["c_call", "c_return"])
def test_killed_at_every_io_call_the_newest_complete_one_loads(tmp_path, event, device):
    template = tmp_path / "template"
    _save(device, template, 1)
    _save(device, template, 2)
    outcomes = []
    for k in range(1, 400):
        run = tmp_path / "run"
        shutil.copytree(template, run)

        def work(run=run, k=k):
            _at_io_call(k, event, lambda: os.kill(os.getpid(), signal.SIGKILL))
            _save(device, run, 3)

        status, text = _in_child(work)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, text
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None
        _same(device, checkpoint, checkpoint.step if killed else 3)
        assert checkpoint.step in (2, 3)
        outcomes.append(checkpoint.step)
        assert not [name for name in _entries(run) if not name.startswith("step_")]
        _save(device, run, 3)
        _same(device, latest_checkpoint(run), 3)
        shutil.rmtree(run)
        if not killed:
            break
    assert outcomes[-1] == 3
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 30
    assert outcomes.count(2) > 20


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_failure_of_every_io_call_leaves_the_old_one_and_no_temporary(tmp_path, number, device):
    template = tmp_path / "template"
    _save(device, template, 1)
    for k in range(1, 400):
        run = tmp_path / "run"
        shutil.copytree(template, run)

        def work(run=run, k=k):
            def fail():
                raise OSError(number, os.strerror(number))

            _at_io_call(k, "c_call", fail)
            _save(device, run, 2, keep=1)
            finished = sys.getprofile() is not None
            sys.setprofile(None)
            return "untouched" if finished else "survived"

        status, text = _in_child(work)
        if status:
            assert os.strerror(number) in text or "CheckpointError" in text, text
            assert not [name for name in _entries(run) if name.startswith(".tmp_step")], (k, text)
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None
        _same(device, checkpoint, 2 if status == 0 else checkpoint.step)
        shutil.rmtree(run)
        if text == "untouched":
            break
    assert k > 30


@pytest.mark.parametrize("limit", [0, 1, 100, 1_000, 5_000])
def test_a_full_disk_names_needed_and_free_bytes(tmp_path, limit, device):
    _save(device, tmp_path, 1)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        _save(device, tmp_path, 2)

    status, text = _in_child(work)
    assert status != 0
    assert re.search(
        r"this checkpoint needs [\d,]+ bytes and [\d,]+ are free; earlier checkpoints are intact",
        text,
    ), text
    assert _entries(tmp_path) == ["step_00000001"]
    _same(device, latest_checkpoint(tmp_path), 1)


def test_everything_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch, device):
    trace = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            trace.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)),
            fsync(fd),
        ),
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (trace.append(("rename", Path(b).name)), rename(a, b))
    )
    _save(device, tmp_path, 7)
    files = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}
    assert trace[0] == ("fsync", tmp_path.name)  # the name of the new directory checkpoints
    assert set(trace[1:5]) == {("fsync", name) for name in files}
    assert trace[5:] == [
        ("fsync", MANIFEST),
        ("fsync", ".tmp_step_00000007"),
        ("rename", "step_00000007"),
        ("fsync", "checkpoints"),
    ]


def test_older_ones_go_only_after_the_new_one_verifies(tmp_path, monkeypatch, device):
    _save(device, tmp_path, 1, keep=1)
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: (_flip(Path(a) / "model.safetensors", -1), rename(a, b))
    )  # a disk that lies
    with pytest.raises(CheckpointError, match="damaged after it was written"):
        _save(device, tmp_path, 2, keep=1)
    monkeypatch.undo()
    _same(device, latest_checkpoint(tmp_path), 1)


# ---- damage --------------------------------------------------------------------------------------
def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit flip in the tensors": (
        lambda d: _flip(d / "model.safetensors", -3),
        "model.safetensors: its SHA-256",
    ),
    "bit flip in the header": (
        lambda d: _flip(d / "optimizer.safetensors", 3),
        "optimizer.safetensors: its SHA-256",
    ),
    "bit flip in the state": (lambda d: _flip(d / "state.json", 10), "state.json: its SHA-256"),
    "truncation": (
        lambda d: os.truncate(d / "model.safetensors", 100),
        "model.safetensors: expected 48",
    ),
    "emptied": (lambda d: os.truncate(d / "state.json", 0), "state.json: expected"),
    "missing file": (lambda d: (d / "rng.safetensors").unlink(), "rng.safetensors: missing"),
    "missing manifest": (lambda d: (d / MANIFEST).unlink(), "its save never finished"),
    "manifest is no JSON": (lambda d: (d / MANIFEST).write_text("{"), "cannot be read"),
    "manifest is no object": (lambda d: (d / MANIFEST).write_text("[]"), "cannot be read"),
    "manifest without files": (
        lambda d: (d / MANIFEST).write_text('{"format": 1, "step": 2, "files": {}}'),
        "does not list state.json",
    ),
    "format of the future": (
        lambda d: (d / MANIFEST).write_text('{"format": 2}'),
        "expected format 1, got 2",
    ),
    "link out of the directory": (
        lambda d: (
            (d / "state.json").rename(d.parent / "x"),
            (d / "state.json").symlink_to(d.parent / "x"),
        ),
        "no plain file",
    ),
    "another step": (lambda d: d.rename(d.with_name("step_00000003")), "is of step 2"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, caplog, what, device):
    damage, reason = DAMAGE[what]
    _save(device, tmp_path, 1)
    damage(_save(device, tmp_path, 2))
    _same(device, latest_checkpoint(tmp_path), 1)
    assert reason.replace("48", "") in caplog.text
    assert "checkpoint skipped" in caplog.text
    _save(device, tmp_path, 2)  # the continued run reaches the step again
    _same(device, latest_checkpoint(tmp_path), 2)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "..", "a\\b", "a/b"])
def test_a_manifest_cannot_point_elsewhere(tmp_path, caplog, name, device):
    path = _save(device, tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert latest_checkpoint(tmp_path) is None
    assert "no plain file of this directory" in caplog.text


def test_a_broken_later_checkpoint_never_costs_an_earlier_one(tmp_path, device):
    _save(device, tmp_path, 1, keep=1)
    shutil.copytree(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints/step_00000009")
    (tmp_path / "checkpoints/step_00000009" / MANIFEST).unlink()
    _save(device, tmp_path, 2, keep=1)
    _same(device, latest_checkpoint(tmp_path), 2)
    assert _entries(tmp_path) == ["step_00000002", "step_00000009"]


def test_stale_temporaries_are_cleaned(tmp_path, device):
    _save(device, tmp_path, 1)
    for name in (".tmp_step_00000002", ".tmp_old_step_00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    _same(device, latest_checkpoint(tmp_path), 1)
    assert _entries(tmp_path) == ["step_00000001"]


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value, dtype, device):
    _save(device, tmp_path, 1)
    tensors = _tensors(device, 2)
    tensors["optimizer"]["bad"] = torch.tensor([0.0, value], dtype=dtype, device=device)
    with pytest.raises(CheckpointError, match="optimizer/bad at step 2 is not finite"):
        save_checkpoint(tmp_path, 2, tensors, {}, keep=2)
    assert _entries(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 1, 4096])
def test_numbers_are_looked_at_one_by_one_where_their_sum_overflows(tmp_path, dtype, place, device):
    large = torch.full((4097,), torch.finfo(dtype).max, dtype=dtype, device=device)
    for fine in (large, large * torch.tensor([1.0, -1.0], device=device).repeat(2049)[:4097]):
        save_checkpoint(tmp_path, 1, {"model": {"w": fine.to(dtype)}}, {}, keep=1)
        for value in (float("nan"), float("inf"), -float("inf")):
            bad = fine.to(dtype)
            bad[place] = value
            with pytest.raises(CheckpointError, match="model/w at step 2 is not finite"):
                save_checkpoint(tmp_path, 2, {"model": {"w": bad}}, {}, keep=1)


@pytest.mark.parametrize("group", ["../x", "a/b", "", ".hidden", "a b", "..", "a\n"])
def test_group_names_cannot_traverse(tmp_path, group):
    with pytest.raises(CheckpointError, match="group name"):
        save_checkpoint(tmp_path, 1, {group: {}}, {}, keep=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "state",
    [
        {"a": {1: 2}},
        {"a": float("nan")},
        {"a": [float("inf")]},
        {"a": torch.tensor(1.0)},
        {"a": {1, 2}},
        {"a": Path("x")},
    ],
)
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"state\.a|state"):
        save_checkpoint(tmp_path, 1, {}, state, keep=1)


@pytest.mark.parametrize("step", [-1, 10**8])
def test_steps_out_of_range(tmp_path, step):
    with pytest.raises(CheckpointError, match="expected a step"):
        save_checkpoint(tmp_path, step, {}, {}, keep=1)


def test_types_that_cannot_be_stored(tmp_path, device):
    with pytest.raises(CheckpointError, match="complex64"):
        save_checkpoint(
            tmp_path,
            1,
            {"model": {"z": torch.zeros(2, dtype=torch.complex64, device=device)}},
            {},
            keep=1,
        )


# ---- the lock ------------------------------------------------------------------------------------
HOLD = (
    "import sys, time; from fusedrl.engine.runs.checkpoint import RunLock; lock = "
    "RunLock(sys.argv[1]); print('held', flush=True); time.sleep(600)"
)


def test_a_second_writer_is_refused_until_the_first_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            SetupError,
            match=rf"another run writes here \(pid {holder.pid} on host {os.uname().nodename}\)",
        ):
            RunLock(tmp_path)
        holder.kill()
    with RunLock(tmp_path), pytest.raises(SetupError, match=f"pid {os.getpid()}"):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


# ---- the run directory ---------------------------------------------------------------------------
@pytest.fixture
def config(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return SFTConfig(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        run=RunConfig(dir=str(tmp_path / "run")),
    )


def test_a_run_is_continued_only_unchanged(config, tmp_path, device):
    with RunDirectory(config) as run:
        assert run.checkpoint is None
        assert run.dir == tmp_path / "run"
        _save(device, run.dir, 5)
        with pytest.raises(SetupError):
            RunDirectory(config)
    with pytest.raises(ConfigError, match=r"holds a run \(step 5\)"):
        RunDirectory(config)
    resumed = replace(
        config, run=replace(config.run, resume=True, keep=7, save_every=3, progress=False)
    )
    with RunDirectory(resumed) as run:
        _same(device, run.checkpoint, 5)
    changed = replace(resumed, epochs=3, optim=replace(config.optim, lr=1e-3, betas=(0.5, 0.9)))
    with pytest.raises(ConfigError) as caught:
        RunDirectory(changed)
    assert str(caught.value).splitlines()[1:] == [
        "  epochs: 1 -> 3",
        "  optim.lr: 1e-05 -> 0.001",
        "  optim.betas: [0.9, 0.999] -> [0.5, 0.9]",
    ]
    Path(config.data).write_text("{ }\n")
    with pytest.raises(ConfigError, match="holds other data than before: data_sha256"):
        RunDirectory(resumed)
    Path(config.data).write_text("{}\n")
    Path(config.model, "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ConfigError, match="holds other weights than before: model_sha256"):
        RunDirectory(resumed)


def test_without_its_configuration_a_run_is_not_continued(config, tmp_path, device):
    with RunDirectory(config) as run:
        _save(device, run.dir, 5)
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        RunDirectory(replace(config, run=replace(config.run, resume=True)))


def test_resuming_nothing_starts_from_the_beginning(config, caplog):
    with RunDirectory(replace(config, run=replace(config.run, resume=True))) as run:
        assert run.checkpoint is None
    assert "starts from the beginning" in caplog.text


def test_a_missing_data_file_leaves_nothing_behind(config, tmp_path):
    with pytest.raises(FileNotFoundError):
        RunDirectory(replace(config, data=str(tmp_path / "none")))
    assert not (tmp_path / "run").exists()


def test_config_diff_sees_keys_that_come_and_go(config):
    saved, current = config_to_dict(config), config_to_dict(config)
    assert config_diff(saved, current) == []
    del saved["max_length"]
    current["run"]["seed"] = 4
    current["run"]["dir"] = "elsewhere"
    assert config_diff(saved, current) == ["run.seed: 0 -> 4", "max_length: 'absent' -> None"]
