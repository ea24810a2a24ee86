"""Calls of functions that users provide: errors and wrong results are reported with the function's
name.

Writing about a user's object may run the user's code (__str__, __repr__), which may raise an error
as well. `told` and `shown` return a text even then.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
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


def blame(
    what: str,
    call: Callable[[], Any],
    kind: type[UserError] = RewardError,
    function: Any = None,
) -> Any:
    """Call a user's function and return its result. Whatever the function raises, even sys.exit,
    raise an error of this kind instead, which names `what` and where it happened. An error that is
    of this kind already, KeyboardInterrupt and `Stopped` (someone asked for the run to end) are
    passed on unchanged.

    Args:
        function: what `call` calls. Where the call itself fails, since the function takes other
            arguments, the error names the place of the function.
    """
    try:
        return call()
    except (kind, KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if function is not None and Path(frame.filename).is_relative_to(_OURS):
            raise kind(f"{what}, {place_of(function)}: {told(error)}") from error
        raise kind(f"{what} raised {told(error)} ({frame.filename}:{frame.lineno})") from error


_OURS = Path(__file__).parents[1]


def place_of(function: Any) -> str:
    """Name a function and where it is written: "name (file:line)", or its name alone if the place
    is not known."""
    name = getattr(function, "__qualname__", type(function).__name__)
    made = getattr(function, "__init__" if inspect.isclass(function) else "__call__", None)
    code = getattr(function, "__code__", getattr(made, "__code__", None))
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def check_call(what: str, function: Any, kind: type[UserError], *names: str) -> None:
    """Raise an error of this kind, with the function's place, unless it can be called with so many
    positional arguments, which are called `names`."""
    try:
        inspect.signature(function).bind(*names)
    except ValueError:  # it has no signature
        return
    except TypeError as error:
        raise kind(
            f"{what}, {place_of(function)}: expected it to take ({', '.join(names)}): {error}"
        ) from error


class Parameters:
    """Parameters of a user's function that is called with arguments by name.

    Attributes:
        needs: names of those without a default.

    Raises:
        RewardError: a parameter cannot be given by name.
    """

    def __init__(self, what: str, function: Any) -> None:
        found = inspect.signature(function).parameters.values()
        named = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        for p in found:
            if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
                raise RewardError(
                    f"{what}, {place_of(function)}: its parameter {p.name!r} cannot be given by "
                    "name; leave the / among its parameters out"
                )
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in found) else named
        self.needs = [p.name for p in found if p.name in named and p.default is p.empty]

    def lacking(self, names: Collection[str]) -> str | None:
        """Return the first parameter that needs a value and is not among these names, or None."""
        return next((name for name in self.needs if name not in names), None)

    def chosen(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that the function takes."""
        return {
            name: value
            for name, value in arguments.items()
            if self._takes is None or name in self._takes
        }


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
