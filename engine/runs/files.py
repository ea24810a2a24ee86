"""Files of a run directory: written atomically, owned by one process. Nothing here needs torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import stat
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fusedrl.engine.base.errors import ConfigError, SetupError, resume_command

_WRITTEN = (  # files that a run writes, beside metrics.jsonl
    "config.json",
    "samples.jsonl",
    "samples_eval.jsonl",
    "alarms.jsonl",
    "rejects.jsonl",
    "rejects_eval.jsonl",
    "changes.jsonl",
)
RESULTS = ("model", "adapter", "critic")  # directories that a run writes at its end
_PATIENCE = 0.2  # seconds


class RunLock:
    """Exclusive ownership of a run directory, for as long as this context manager is open; the
    system releases it when the process dies.

    Raises:
        SetupError: another live process owns the directory; the message names its pid and host.
        ConfigError: the path, or a directory on the way to it, is a file; or the lock is a link or
            a special file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = path = Path(run_dir).absolute() / "lock"
        _check_no_file(path.parent)
        try:
            make_directory(path.parent)
            self._file = _open_lock(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise SetupError(
                f"{run_dir}: the directory of the run cannot be written ({error.strerror}: "
                f"{error.filename}); choose another --run.dir, or change the rights there"
            ) from error
        if not _locked(self._file):
            holder = self._file.read(1000)
            self._file.close()
            raise _held_by(run_dir, holder)
        _held.add(self)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on host {platform.node()}\n".encode())

    def release(self) -> None:
        """Let other processes write to the directory. The lock file stays: deleting it would let
        two processes lock two files of the same name."""
        _held.discard(self)
        self._file.close()

    def check(self) -> None:
        """Raise SetupError if the directory was removed or renamed since, so that another run may
        own one of its name."""
        own = os.fstat(self._file.fileno())
        with suppress(OSError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return
        raise SetupError(
            f"{self.path.parent}: the directory of this run was removed, renamed or replaced while "
            "it ran; nothing more is written there. Go on from where its checkpoints are now, or "
            "begin again"
        )

    def forget(self) -> None:
        """Close this process's copy of the lock, in a child that was forked. The parent still holds
        it, and the child no longer keeps it when the parent dies."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _check_no_file(run_dir: Path) -> None:
    for part in (run_dir, *run_dir.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(
                "config: expected run.dir to be the directory of a run, or one to be made, got "
                f"{str(run_dir)!r}, and {part} is a file; choose another --run.dir"
            )


def _held_by(run_dir: str | Path, holder: bytes) -> SetupError:
    who = holder.decode("utf-8", "replace").strip() or "an unknown process"
    return SetupError(
        f"{run_dir}: another run writes here ({who}); wait for it, stop it, or choose another "
        "--run.dir"
    )


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def check_held(run_dir: str | Path) -> None:
    """Raise SetupError if this process has the lock of a run directory, and it is another one
    now."""
    path = Path(run_dir).absolute() / "lock"
    for lock in _held:
        if lock.path == path:
            lock.check()


def _forget() -> None:
    for lock in list(_held):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _open_lock(path: Path, flags: int) -> BinaryIO:
    """Open a lock without following a link, and without waiting for the other end of a pipe.

    Raises:
        ConfigError: it is a link or no regular file, so that writing to it would change another.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file: BinaryIO = os.fdopen(
            os.open(path, flags, 0o666), "r+b" if flags & os.O_RDWR else "rb", buffering=0
        )
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
    raise ConfigError(
        f"{path}: expected a regular file, which a run locks and writes to, got "
        f"{'a symbolic link' if path.is_symlink() else 'a special file'}; delete it, or choose "
        "another --run.dir"
    )


def _locked(file: BinaryIO) -> bool:
    """Lock a file unless another process has locked it. Who only looks at the lock (`is_locked`)
    holds it for an instant, so this tries again for a while."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - began > _PATIENCE:
                return False
        time.sleep(0.01)


def is_locked(run_dir: str | Path) -> bool:
    """Whether a live process owns the run directory."""
    try:
        with _open_lock(Path(run_dir) / "lock", os.O_RDONLY) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ConfigError):
        return False
    return False


# ---- what an earlier run left --------------------------------------------------------------------
def check_new_run(run_dir: str | Path, *, resume: bool, restart: bool) -> None:
    """Raise the error with which a run would end that begins in this directory, as far as names of
    files tell; nothing is read, written or locked.

    Args:
        resume: whether the run goes on with one that is there.
        restart: whether the records of a run without a checkpoint are moved aside.
    Raises:
        ConfigError: the path, or a directory on the way to it, is a file; or the directory holds a
            run.
    """
    root = Path(run_dir)
    _check_no_file(root)
    if not root.is_dir():
        return
    whole = [step for step, path in steps_in(root) if (path / "MANIFEST.json").is_file()]
    if whole and not resume:
        raise holds_a_run(root, whole[0])
    if not whole and not restart and (found := records_of(root)):
        raise holds_records(root, found)


def check_unlocked(run_dir: str | Path) -> None:
    """Raise SetupError if another live process writes to the directory of a run."""
    if is_locked(run_dir):
        with _open_lock(Path(run_dir) / "lock", os.O_RDONLY) as file:
            raise _held_by(run_dir, file.read(1000))


def holds_a_run(run_dir: Path, step: int) -> ConfigError:
    """Return the error for a directory with a run whose newest checkpoint is that of a step."""
    return ConfigError(
        f"{run_dir}: holds a run (step {step}); continue it with {resume_command(run_dir)}, or "
        "choose another --run.dir"
    )


def holds_records(run_dir: Path, found: Iterable[str]) -> ConfigError:
    """Return the error for a directory with records of a run that has no checkpoint."""
    return ConfigError(
        f"{run_dir}: holds records of a run ({', '.join(found)}) and no checkpoint to "
        f"continue it from; expected an empty directory or a run. Choose another --run.dir, or "
        f"move {run_dir} away if the records may go; --run.restart true moves them into a "
        "directory in it, and begins anew"
    )


def records_of(run_dir: Path) -> list[str]:
    """Return the remains of an earlier run that a new one would overwrite: steps in metrics.jsonl,
    checkpoints that do not verify, a model."""
    names = {entry.name for entry in os.scandir(run_dir)}
    for name in sorted(names & {"metrics.jsonl", *_WRITTEN}):
        if not (run_dir / name).is_file():
            raise ConfigError(
                f"{run_dir / name}: expected a file of a run, got a directory, a pipe or a device; "
                "remove it, or choose another --run.dir"
            )
    lines = (
        (run_dir / "metrics.jsonl").read_bytes().splitlines() if "metrics.jsonl" in names else []
    )
    # lines of step 0 precede the first training step, so nothing is lost with them
    found = ["metrics.jsonl"] if any(not line.startswith(b'{"step": 0,') for line in lines) else []
    found += [f"checkpoints/{path.name}" for _, path in steps_in(run_dir)]
    if not _is_of_a_run(run_dir / "config.json"):  # of someone else, then
        found += [n for n in _WRITTEN if n in names and (run_dir / n).stat().st_size]
    return found + [name for name in RESULTS if name in names]


def _is_of_a_run(path: Path) -> bool:
    """Whether a file is the config.json that a run writes, not a model's."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("config"), dict)


def steps_in(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the steps of a run whose checkpoints are there, and their directories, newest first;
    they are not verified. Raise OSError if the directory cannot be read."""
    root = run_dir / "checkpoints"
    if not _is_directory(root):
        return []
    found = [
        (int(match[1]), path)
        for path in root.iterdir()
        if (match := re.fullmatch(r"step_(\d{8})", path.name)) and not path.is_symlink()
    ]
    return sorted(found, reverse=True)


def _is_directory(path: Path) -> bool:
    """Whether a path is a directory. Unlike Path.is_dir, raise OSError if that cannot be told."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def set_aside(run_dir: Path) -> Path:
    """Move everything in a run directory but the lock into a new directory in it, aside-1 or the
    next number that is free, and return that directory. Earlier ones stay where they are."""
    number = next(n for n in itertools.count(1) if not (run_dir / f"aside-{n}").exists())
    target = run_dir / f"aside-{number}"
    target.mkdir()
    for path in sorted(run_dir.iterdir()):
        if path.name != "lock" and not path.name.startswith("aside-"):
            path.rename(target / path.name)
    sync_directory(target)
    sync_directory(run_dir)
    return target


def write_new(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file that is not there yet, flush it to the disk, and return its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it that are missing. The name of each new one is flushed to
    the disk, so that a power loss does not take it with everything that was flushed in it."""
    made = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for one in reversed(made):
        sync_directory(one.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: readers see either the old bytes or the new ones, even after a
    crash."""
    temporary = path.with_name(f".tmp_{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        write_new(temporary, [data])
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return found
