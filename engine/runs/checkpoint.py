"""The run directory: a single writer, a saved configuration, and checkpoints that are either
complete or absent. Tensors are stored as safetensors, the rest as JSON.

    <run>/config.json, lock, metrics.jsonl, checkpoints/step_00000012/{<group>.safetensors,
        state.json, MANIFEST.json}

A checkpoint is written into a hidden directory next to its final place. Each file is flushed to the
disk, then the directory; then the directory is renamed, and its parent flushed. So after a crash at
any point, the checkpoint either does not exist or is whole. The manifest holds size and SHA-256 of
every file, and loading verifies them.

One file: writing, reading and verifying must agree on one format.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusedrl.engine.base.errors import CheckpointError, ConfigError, SetupError
from fusedrl.engine.model.weights import check_replaceable, clear_remains
from fusedrl.engine.parallel.ranks import ALONE, Ranks
from fusedrl.engine.runs.files import (
    RESULTS,
    RunLock,
    flat,
    holds_a_run,
    holds_records,
    make_directory,
    records_of,
    set_aside,
    steps_in,
    sync_directory,
    write_file,
    write_new,
)
from fusedrl.engine.runs.inputs import (
    all_data,
    changed_files,
    file_digest,
    files_of,
    model_digest,
    told_of,
)

MANIFEST, STATE, FORMAT = "MANIFEST.json", "state.json", 1
CHANGES = "changes.jsonl"
FREE_KEYS = (
    "run.dir",
    "run.resume",
    "run.restart",
    "run.accept_changes",
    "run.progress",
    "run.columns",
    "run.log",
    "run.keep",
    "run.keep_best",
    "run.save_every",
    "run.save_minutes",
    "run.signals",
    "steps",
    # keys that a continued run may change; the name of a group stands for all its keys
    "checkpoint_activations",
    "eval_every",
    "evaluation",
    "alarm",
    "monitor_reward",
    "reward_timeout",
    "generation.speculate",
)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a group of tensors, and of a file in a checkpoint
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Complete, verified checkpoint: `tensors` {group: {name: CPU tensor}} and `state`, as given to
    `save_checkpoint`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


# ---- saving --------------------------------------------------------------------------------------
def save_checkpoint(
    run_dir: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    spare: Collection[int] = (),
    shares: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Save `tensors` {group: {name: tensor}} (a file per group) and `state` (JSON values) as the
    checkpoint of `step`.

    Once it is verified, all but the `keep` newest checkpoints and those of `spare` are deleted. A
    step whose checkpoint
    exists and verifies is not written again.

    Args:
        spare: steps whose checkpoints are kept whatever their age.
        shares: further groups, of which each rank holds a part and writes it to a separate file.
        ranks: ranks that all call this function; the first writes `tensors` and `state`.
    Raises:
        CheckpointError: a tensor that is not finite, a name that is not a plain file name, a state
            that JSON would not restore exactly, or a failed verification.
        OSError: the write failed (no space, no permission, a bad disk). Earlier checkpoints are
            untouched, and no half-written one is left.
    """
    root = Path(run_dir) / "checkpoints"
    target = root / f"step_{step:08d}"
    temporary = root / f".tmp_{target.name}"
    if ranks.size == 1:
        tensors = {**tensors, **(shares or {})}
    _check(step, tensors if ranks.first else {}, state)
    if ranks.size > 1:
        _check(step, shares or {}, {})
    there = ranks.first and _room_for(target, temporary)
    if ranks.gather("checkpoint", there)[0]:
        return target
    try:
        files = _parts_of_ranks(temporary, shares or {}, ranks)
        if not ranks.first:
            ranks.meet("the end of a checkpoint")
            return target
        files |= {
            f"{group}.safetensors": write_new(
                temporary / f"{group}.safetensors", _safetensors(named)
            )
            for group, named in tensors.items()
        }
        files[STATE] = write_new(temporary / STATE, [_json(state)])
        write_new(temporary / MANIFEST, [_json({"format": FORMAT, "step": step, "files": files})])
        sync_directory(temporary)
        os.rename(temporary, target)
        sync_directory(root)
    except OSError as error:
        if ranks.first:  # others may write there still, and would tell of what is gone
            shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed = sum(t.nbytes for named in tensors.values() for t in named.values())
            raise _full(error, target, needed) from error
        raise
    except BaseException:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    _verify(target)
    # later ones are broken, or this step could not be new
    for number, old in [found for found in steps_in(root.parent) if found[0] <= step][keep:]:
        if number not in spare:
            _remove(old)
    ranks.meet("the end of a checkpoint")
    return target


def _parts_of_ranks(
    directory: Path, shares: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> dict[str, Any]:
    """Write this rank's parts of groups. Return the files of all ranks, or nothing if there is a
    single rank."""
    if ranks.size == 1:
        return {}
    mine = {}
    for group, named in shares.items():
        name = f"{group}.{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
        mine[name] = write_new(directory / name, _safetensors(named))
    return {name: f for part in ranks.gather("its files", mine) for name, f in part.items()}


def _full(error: OSError, target: Path, needed: int) -> OSError:
    """Return the error of a full disk with the space that a checkpoint needs, and a remedy."""
    root = target.parent
    free = shutil.disk_usage(root).free
    earlier = root.is_dir() and any(
        path.is_dir() and path.name.startswith("step_") for path in root.iterdir()
    )
    then = (
        "earlier checkpoints are intact: free some space, then resume"
        if earlier
        else "there is no earlier one: free some space, delete the run directory, and begin again"
    )
    return OSError(
        error.errno,
        f"{os.strerror(error.errno or 0)}: this checkpoint needs {needed:,} bytes and {free:,} are "
        f"free; {then}",
        str(target),
    )


def _room_for(target: Path, temporary: Path) -> bool:
    """Return whether the checkpoint exists and verifies. If not, make the directory that it is
    written in."""
    if target.is_dir():
        try:
            _verify(target)
            return True
        except CheckpointError:
            _remove(target)  # it could never be loaded, and is in the new checkpoint's place
    make_directory(temporary.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return False


def _check(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    if not 0 <= step < 10**8:
        raise CheckpointError(f"checkpoint: expected a step in [0, 10^8), got {step}")
    for group, named in tensors.items():
        if not re.fullmatch(_NAME, group):
            raise CheckpointError(
                "checkpoint: expected a group name of letters, digits, '_', '.' and '-', got "
                f"{group!r}"
            )
        for name, tensor in named.items():
            if name == "__metadata__" or tensor.dtype not in _DTYPES:
                raise CheckpointError(
                    f"checkpoint: {group}/{name} of {tensor.dtype} cannot be stored; known types: "
                    f"{', '.join(map(str, _DTYPES))}"
                )
            if tensor.is_floating_point() and not _finite(tensor):
                raise CheckpointError(
                    f"checkpoint: {group}/{name} at step {step} is not finite, and a run cannot go "
                    "on from it; nothing was saved. "
                    "Resume from the checkpoint before with a lower optim.lr"
                )
    _check_state(state, "state")


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite. One that is not makes the sum so, too, which takes a twentieth
    of the time; a sum that only overflows is looked into."""
    return bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite()) or (
        bool(torch.isfinite(tensor).all())
    )


def _check_state(value: Any, where: str) -> None:
    """Raise CheckpointError for values that JSON would change silently: numbers as keys, NaN,
    objects."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"checkpoint: expected string keys in {where}, got {key!r}")
            _check_state(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    elif (
        type(value) not in (str, int, float, bool, type(None))
        or value != value
        or value in (float("inf"), float("-inf"))
    ):
        raise CheckpointError(
            f"checkpoint: expected a JSON value in {where}, got {value!r} ({type(value).__name__})"
        )


def _safetensors(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the file's bytes, a tensor at a time, so neither views of shared storage nor the size
    of a group matter. Wide types come first, so that all tensors are aligned."""
    header: dict[str, Any] = {}
    end = 0
    ordered = sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _remove(path: Path) -> None:
    """Rename a checkpoint and then delete it, so that a half-deleted one is never taken for a
    broken one."""
    doomed = path.with_name(f".tmp_old_{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# ---- loading -------------------------------------------------------------------------------------
def latest_checkpoint(run_dir: str | Path) -> Checkpoint | None:
    """Return the newest complete checkpoint that verifies, or None. A broken checkpoint is skipped,
    with a warning that names file and reason. Remains of an interrupted save are deleted, so only
    the owner of the run (`RunLock`) may call this.

    Raises:
        SetupError: a checkpoint cannot be read now, which tells nothing about what is in it (a bad
            disk or network, too many open files). Nothing is skipped or deleted for that.
    """
    root = Path(run_dir) / "checkpoints"
    try:
        for stale in root.glob(".tmp_*"):
            shutil.rmtree(stale, ignore_errors=True)
        for step, path in steps_in(Path(run_dir)):
            try:
                manifest = _verify(path)
                if manifest["step"] != step:
                    raise CheckpointError(f"{path / MANIFEST}: is of step {manifest['step']}")
                return read_checkpoint(path, step, manifest["files"])
            except (CheckpointError, SafetensorError, ValueError, RecursionError) as error:
                _log.warning("checkpoint skipped: %s", error)
    except OSError as error:
        raise SetupError(
            f"{error.filename or root}: cannot be read now ({error.strerror or error}), which does "
            "not mean that there is no checkpoint, so nothing was begun or changed; try again "
            "where the disk, the network or the limit of open files (ulimit -n) is well. To go on "
            "from an earlier checkpoint for good, move the one that cannot be read elsewhere"
        ) from error
    return None


def read_checkpoint(path: Path, step: int, files: Iterable[str]) -> Checkpoint:
    """Read the files of a verified checkpoint. Groups that the ranks wrote in parts are put
    together. The files are mapped into memory: a tensor that nobody touches stays on the disk."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in sorted(name for name in files if name.endswith(".safetensors")):
        group = re.sub(r"(\.\d{5}-of-\d{5})?\.safetensors$", "", name)
        tensors[group] = tensors.get(group, {}) | _mapped(path / name)
    return Checkpoint(path, step, tensors, json.loads((path / STATE).read_bytes()))


def _mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory. What torch says in words alone, such as too
    many open files, is an OSError."""
    try:
        return load_file(path)
    except RuntimeError as error:
        told = re.search(r"^unable to .*\((\d+)\)", str(error))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error


def saved_steps(run_dir: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a run by their steps, newest first; they are not verified."""
    return dict(steps_in(Path(run_dir)))


def checkpoint_of(run_dir: str | Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step.

    Raises:
        CheckpointError: it does not exist, or does not verify.
    """
    steps = saved_steps(run_dir)
    if step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"{run_dir}: has no checkpoint of step {step}; it has {there}")
    return read_checkpoint(steps[step], step, _verify(steps[step])["files"])


def _verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking the size and digest of every file.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
        OSError: a file cannot be read now.
    """
    manifest, files = _manifest(path)
    if STATE not in files:
        raise CheckpointError(f"{path / MANIFEST}: does not list {STATE}")
    for name, (size, digest) in files.items():
        file = path / name
        if not re.fullmatch(_NAME, name) or len(name) > 200 or file.is_symlink():
            raise CheckpointError(
                f"{path / MANIFEST}: lists {name!r:.80}, which is no plain file of this directory"
            )
        try:
            found = os.stat(file)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{file}: expected a file, got something else of that name")
        if found.st_size != size:
            raise CheckpointError(f"{file}: expected {size} bytes, got {found.st_size}")
        if file_digest(file) != digest:
            raise CheckpointError(
                f"{file}: its SHA-256 is not the recorded one; the file was damaged after it was "
                "written"
            )
    return manifest


def _manifest(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """Return a checkpoint's manifest, and from it the size and the digest of each file. Errors are
    those of `_verify`."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path / MANIFEST}: expected format {FORMAT}, got {manifest['format']!r:.80}; a "
                "newer fusedrl wrote it"
            )
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
        manifest["step"] = int(manifest["step"])
        return manifest, files
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: has no {MANIFEST}, so its save never finished") from None
    # whatever else stands there: 1e999, nested a thousand times, another type, no UTF-8
    except (
        IsADirectoryError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def identity(config: Any) -> dict[str, Any]:
    """Return, as JSON values, everything that determines a run's result: its configuration, and
    digests of all files that it reads (inputs.py). Errors are those of `check_source`."""
    return {
        "stage": type(config).__name__,
        "config": config_to_dict(config),
        "data_sha256": all_data(config),
        "model_sha256": model_digest(config.model),
        "files": files_of(config),
        "told": told_of(config),
    }


# ---- the run directory ---------------------------------------------------------------------------
class RunDirectory:
    """Run directory that this process owns: `dir`, and the `checkpoint` to continue from (None at
    the beginning). A context manager.

    A new run needs a directory without checkpoints. A resumed run needs the configuration that it
    was started with, except for options that do not change the result (`FREE_KEYS`), and the same
    bytes of everything that it reads (inputs.py). `run.accept_changes` goes on with what differs;
    it is written to changes.jsonl. `run.restart` moves the records of a run without a checkpoint
    into a directory aside-N, and begins anew.

    Attributes:
        notes: what to say of how the run was opened.
    Raises:
        ConfigError: the directory holds another run, or something that the run reads changed; the
            message lists the differences. Or model, adapter or critic holds a file of another
            origin, which writing the result would delete.
        SetupError: another live process writes to the directory, or a checkpoint cannot be read
            now.
    """

    def __init__(self, config: Any) -> None:
        self.dir = Path(config.run.dir)
        self.notes: list[str] = []
        current = identity(config)
        self._lock = RunLock(self.dir)
        try:
            self.checkpoint = latest_checkpoint(self.dir)
            if self.checkpoint is not None and not config.run.resume:
                raise holds_a_run(self.dir, self.checkpoint.step)
            if self.checkpoint is not None:
                self._check_unchanged(self.checkpoint.step, current, config)
            elif found := records_of(self.dir):
                self._restart(found, config.run.restart)
            elif config.run.resume:
                _log.warning(
                    "%s: no complete checkpoint to resume from, so the run starts from the "
                    "beginning",
                    self.dir,
                )
            for name in RESULTS:
                clear_remains(self.dir / name)
                check_replaceable(self.dir / name)
            once = {"restart": False, "accept_changes": False}  # each is for one start alone
            current["config"]["run"] |= once
            write_file(self.dir / "config.json", _json(current))
        except BaseException:
            self._lock.release()
            raise

    def _restart(self, found: list[str], wanted: bool) -> None:
        """Move the records of a run that cannot be continued out of the way, if that is wanted."""
        if not wanted:
            raise holds_records(self.dir, found)
        self.notes.append(
            f"{', '.join(found)} of a run without a checkpoint to continue from: moved to "
            f"{set_aside(self.dir)}; beginning anew"
        )

    def _check_unchanged(self, step: int, current: dict[str, Any], config: Any) -> None:
        """Compare what the run was started with and what it is resumed with.

        Raises:
            ConfigError: what decides the result differs, and changes are not accepted.
        """
        saved, differences, told = self._differences(current, config)
        if differences and not config.run.accept_changes:
            heading = (
                f"{self.dir}: resumed with another configuration or other files; undo these "
                "changes, or start in another --run.dir; --run.accept_changes true goes on with "
                "them"
            )
            raise ConfigError("\n  ".join([heading, *differences]))
        if changed := [*differences, *told]:
            path = self.dir / CHANGES
            before = path.read_bytes() if path.is_file() else b""
            line = json.dumps({"step": step, "changed": changed}) + "\n"
            write_file(path, before + line.encode())
            self.notes += [f"from step {step + 1} on, {one}" for one in changed]
        if note := _schedules(saved["config"], current["config"]):
            self.notes.append(note)

    def _differences(
        self, current: dict[str, Any], config: Any
    ) -> tuple[dict[str, Any], list[str], list[str]]:
        """Return config.json, what in it differs from the current run, and what of that is only
        told of."""
        path = self.dir / "config.json"
        read = {
            "data_sha256": f"{config.data} holds other data than before: ",
            "model_sha256": f"{config.model} holds other weights than before: ",
        }
        try:
            saved = _upgraded(json.loads(path.read_bytes()), type(config))
            if saved["stage"] != current["stage"]:
                raise ConfigError(
                    f"{self.dir}: holds a run of another stage ({saved['stage']}, and this one is "
                    f"{current['stage']}); choose another --run.dir"
                )
            differences = config_diff(saved["config"], current["config"])
            differences += [
                f"{read[key]}{key}: {saved[key]} -> {current[key]}"
                for key in read
                if saved[key] != current[key]
            ]
            # older versions wrote no digests of these
            differences += changed_files(saved.get("files", {}), current["files"])
            return saved, differences, changed_files(saved.get("told", {}), current["told"])
        except ConfigError:
            raise
        except OSError as error:
            raise SetupError(
                f"{path}: cannot be read ({error.strerror or error}), so what the run was started "
                "with is not known; mend that, or start in another --run.dir"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}), so what the "
                "run was started with is not known; "
                "start in another --run.dir"
            ) from error

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _schedules(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return what to say if the number of steps changed and a schedule depends on it."""
    old, new = flat(saved), flat(current)
    before, now = old.get("steps"), new.get("steps")
    objective = new.get("loss.objective") or new.get("algorithm")
    falling = [
        key
        for key, value in new.items()
        if value == "linear"
        and (key == "optim.schedule" or (key == "trpo.schedule" and objective == "trpo"))
    ]
    if before == now or before is None or not falling:
        return ""
    return (
        f"steps: {before} -> {now}, and {', '.join(falling)} is linear to zero at the last step, "
        f"so that from here on it is that of a run of {now} steps, and the run is not the same as "
        f"one that was started with {now}"
    )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _upgraded(saved: dict[str, Any], cls: type) -> dict[str, Any]:
    """Return the contents of config.json for the current version: options that did not exist when
    it was written get their default values."""
    stage = {"PPOConfig": "PolicyConfig"}.get(saved["stage"], saved["stage"])
    if stage != cls.__name__:
        return saved
    missing = dataclasses.MISSING
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is missing and f.default_factory is missing
    ]
    usual = config_to_dict(
        cls(
            **{
                name: saved["config"][name]
                for name in [*needed, "algorithm", "environment"]
                if name in saved["config"]
            }
        )
    )
    config = dict(saved["config"])
    if isinstance(config.get("normalize"), bool):
        config["normalize"] = "mean" if config["normalize"] else "none"
    return saved | {"stage": stage, "config": _merged(usual, config)}


def _merged(usual: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(usual[key], value)
        if isinstance(value, Mapping) and isinstance(usual.get(key), Mapping)
        else value
        for key, value in saved.items()
    }
    return {**usual, **both}


def config_diff(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return `key: saved -> current` for every dotted key that differs, except for keys that a
    continued run may change (`FREE_KEYS`)."""
    old, new = flat(saved), flat(current)
    keys = [
        key
        for key in {**old, **new}
        if key not in FREE_KEYS and key.partition(".")[0] not in FREE_KEYS
    ]
    if old.get("reward_workers") and new.get("reward_workers"):
        keys.remove("reward_workers")  # how many there are changes nothing
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in keys
        if old.get(key, "absent") != new.get(key, "absent")
    ]
