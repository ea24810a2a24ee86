"""What a user can put right. The command line prints these as one message; every other exception
keeps its traceback."""

from __future__ import annotations

import difflib
from contextlib import suppress
from itertools import islice
from pathlib import Path


class UserError(ValueError):
    """A configuration or an input that cannot be used; the message says what was expected, what
    came and what to do."""


class ConfigError(UserError):
    """An option that is unknown, missing, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data file that cannot be read as asked; lists every bad line as file:line: reason."""


class RewardError(UserError):
    """A reward that cannot be loaded, raised, or returned something that is not one number or None
    per completion."""


class CheckpointError(UserError):
    """State that cannot be saved or continued from."""


class Stopped(SystemExit):
    """A run ends because it was asked to, by a signal or an alarm; `code` is the process's exit
    code. No other SystemExit is one of ours."""


class SetupError(RuntimeError):
    """Something is missing on this machine: a device, a package, a compiler, a right, or a run
    directory that another process holds."""


SAID = "another rank has said so"  # a note on an error that an earlier rank has, too


class Elsewhere(Exception):
    """Marks an error that happened on another rank, which has told of it."""


def no_such(path: str | Path) -> str:
    """Says that a path does not exist, from which part on, and what stands there under nearly that
    name."""
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
