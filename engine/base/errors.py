"""Errors that a user can correct. The command line prints them as one message; every other
exception keeps its traceback."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path


class UserError(ValueError):
    """A configuration or an input that cannot be used. The message says what was expected, what was
    found and what to do."""


class ConfigError(UserError):
    """An option that is unknown, missing, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data file that cannot be read as asked; lists every bad line as file:line: reason."""


class RewardError(UserError):
    """A reward that cannot be loaded, that raised an error, or that did not return one number or
    None per completion."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or that a run cannot continue from."""


class Stopped(SystemExit):
    """A run ends because a signal or an alarm requested it; `code` is the process's exit code. The
    engine raises no other SystemExit."""


class SetupError(RuntimeError):
    """Something is missing on this machine: a device, a package, a compiler, a right, or a run
    directory that another process holds."""


SAID = "another rank has said so"  # note on an error that an earlier rank has as well


class Elsewhere(Exception):
    """Mark of an error that happened on another rank (process), which has reported it."""


# torch on a GPU and libraries that exchange tensors; torch on a CPU
_SHORT = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out(error: BaseException | None) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU or a GPU, or that of a library which
    exchanges tensors."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, SetupError)
        and any(said in words for said in _SHORT)
    )


def device_failed(error: BaseException | None) -> bool:
    """Whether a device has failed for good, as after a kernel that wrote where it must not: every
    later call on it fails as well, and what its memory holds is not to be trusted."""
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, SetupError)
        and not ran_out(error)
        and (
            any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
            or str(error).startswith(("CUDA error:", "HIP error:"))
        )
    )


def of_the_machine(error: BaseException | None) -> bool:
    """Whether memory ran out or a device failed: no fault of the file that was being read."""
    return ran_out(error) or device_failed(error)


def _first_failure(error: BaseException) -> BaseException:
    """Return the first failure of the device in a chain of errors: what cleans up behind it calls
    the device again, and fails as well."""
    found, seen, one = error, {id(error)}, error.__cause__ or error.__context__
    while one is not None and id(one) not in seen:
        found = one if device_failed(one) else found
        seen.add(id(one))
        one = one.__cause__ or one.__context__
    return found


def as_machine_fault(error: BaseException, where: str = "") -> BaseException:
    """Return the error itself, or, if memory ran out or the device failed for good, a SetupError
    that says so in one line, with a remedy. `where` is the part of the run: "in train", say."""
    where = f" {where}" if where else ""
    told = _first_failure(error) if device_failed(error) else error
    said = (str(told).splitlines() or [type(told).__name__])[0].strip()[:300]
    if ran_out(error):
        return SetupError(
            f"out of memory{where} ({said}); lower tokens_per_microbatch, or set "
            "checkpoint_activations or optim.state int8; fusedrl plan says what would fit"
        )
    if device_failed(error):
        return SetupError(
            f"the device failed{where} ({said}); nothing more is read from it, since its memory is "
            "not to be trusted. Go on from the last checkpoint in a new process; where it fails "
            "again, fusedrl verify tries the kernels on this device, and CUDA_LAUNCH_BLOCKING=1 "
            "names the call"
        )
    return error


_NO_NETWORK = (  # of the hub's client, of the HTTP libraries below it, and of datasets
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "Timeout",
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
    "ProxyError",
    "SSLError",
)


def unreachable(error: BaseException) -> bool:
    """Whether an error, or a cause of it, says that the Hugging Face hub cannot be reached."""
    return any(type(one).__name__ in _NO_NETWORK for one in chain_of(error))


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, at most ten."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


LFS = b"version https://git-lfs"  # how a file begins that stands for one in Git LFS


def check_no_pointer(path: str | Path) -> None:
    """Raise DataError if a file is not the one that was meant, but Git LFS's pointer to it."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise DataError(
                f"{path}: is a pointer of Git LFS, which stands for the file; fetch the file with "
                "git lfs pull, or download it from its page"
            )


def resume_command(run: str | Path) -> str:
    """Return the shell command that goes on with the run in a directory."""
    return shlex.join(["fusedrl", "resume", str(run)])


def no_such(path: str | Path) -> str:
    """Return a message that says that a path does not exist, which part of it is missing first, and
    which existing name is similar."""
    text, path = str(path), Path(path)
    if text.startswith("~"):
        return (
            f"{text} does not exist: a ~ stands for the home directory only where a shell "
            "reads it, as the first letter of a word"
        )
    first = next((part for part in reversed([path, *path.parents]) if not _exists(part)), path)
    names: list[str] = []
    with suppress(OSError):
        names = [entry.name for entry in islice(first.parent.iterdir(), 1000)]
    close = difflib.get_close_matches(first.name, names, 1, 0.75)
    whole = (
        f"{text} does not exist"
        if first == path
        else f"{text} does not exist, since {first} does not"
    )
    return whole + (f"; did you mean {first.parent / close[0]}?" if close else "")


def _exists(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False
