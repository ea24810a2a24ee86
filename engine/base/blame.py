"""Calls of functions that users provide: errors and wrong results are reported with the function's
name.

Writing about a user's object may run the user's code (__str__, __repr__), which may raise an error
as well. `told` and `shown` return a text even then.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError, RewardError, Stopped, UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Invalid:
    """Placeholder for the value of a sample that cannot be scored, with the reason."""

    reason: str


def told(error: BaseException) -> str:
    """Return the type of an exception, and its text if it can be read."""
    return f"{type(error).__name__}: {_text(lambda: str(error), '<its text cannot be shown>')}"


def shown(value: Any) -> str:
    """Return the first 80 characters of a value's repr, or its type if the repr fails."""
    return _text(lambda: repr(value)[:80], f"a {type(value).__name__} that cannot be shown")


def _text(make: Callable[[], str], otherwise: str) -> str:
    try:
        return make()
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException:  # of a user's code; SystemExit is one
        return otherwise


def blame(what: str, call: Callable[[], Any], kind: type[UserError] = RewardError) -> Any:
    """Call a user's function and return its result. Whatever the function raises, even sys.exit,
    raise an error of this kind instead, which names `what` and where it happened. An error that is
    of this kind already, KeyboardInterrupt and `Stopped` (someone asked for the run to end) are
    passed on unchanged."""
    try:
        return call()
    except (kind, KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise kind(f"{what} raised {told(error)} ({frame.filename}:{frame.lineno})") from error


def place_of(function: Any) -> str:
    """Name a function and where it is written: "name (file:line)", or its name alone if the place
    is not known."""
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def per_token(what: str, returned: Any, noun: str, like_N: Tensor, hint: str = "") -> Tensor:
    """Return `returned` if it is a floating-point number for each token, of the shape and on the
    device of `like_N`; else raise ConfigError."""
    import torch  # here, since configurations import this module and start without

    if not isinstance(returned, torch.Tensor):
        got = type(returned).__name__
    elif returned.shape != like_N.shape:
        got = f"{list(returned.shape)}{hint}"
    elif not returned.is_floating_point():
        got = f"numbers of {returned.dtype}; make them floating-point ones"
    elif returned.device != like_N.device:
        got = f"a tensor on {returned.device}, and the batch is on {like_N.device}"
    else:
        return returned
    raise ConfigError(
        f"{what}: expected it to return [{len(like_N)}] {noun}, one per token, got {got}"
    )
