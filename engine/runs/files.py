"""Files of a run directory: written atomically, owned by one process. Nothing here needs torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from fusedrl.engine.base.errors import ConfigError, SetupError

_PATIENCE = 0.2  # seconds


class RunLock:
    """Exclusive ownership of a run directory, for as long as this context manager is open; the
    system releases it when the process dies.

    Raises:
        SetupError: another live process owns the directory; the message names its pid and host.
        ConfigError: the path, or a directory on the way to it, is a file.
    """

    def __init__(self, run_dir: str | Path) -> None:
        path = Path(run_dir) / "lock"
        if file := next(
            (
                part
                for part in (path.parent, *path.parent.parents)
                if part.exists() and not part.is_dir()
            ),
            None,
        ):
            raise ConfigError(
                "config: expected run.dir to be the directory of a run, or one to be made, got "
                f"{str(run_dir)!r}, and {file} is a file; choose "
                "another --run.dir"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held open: closing it releases the lock)
        except OSError as error:
            raise SetupError(
                f"{run_dir}: the directory of the run cannot be written ({error.strerror}: "
                f"{error.filename}); choose another --run.dir, or change the rights there"
            ) from error
        if not _locked(self._file):
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise SetupError(
                f"{run_dir}: another run writes here ({holder}); wait for it, stop it, or choose "
                "another --run.dir"
            )
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on host {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let other processes write to the directory. The lock file stays: deleting it would let
        two processes lock two files of the same name."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _locked(file: TextIO) -> bool:
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
        with open(Path(run_dir) / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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
