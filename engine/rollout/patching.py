"""Functions of this package under the names of another library: put in place, counted, checked in
the first optimizer step, and taken away again."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Name(NamedTuple):
    """A function of the library, and what takes its place."""

    theirs: Any
    ours: Callable[..., Any]


class Patched:
    """Names of a library that this package serves until `undo`, or until the `with` block ends.

    Every module of the library that holds one of the functions gets ours, and so do modules that
    are imported later from those. If an optimizer takes a step before any of ours was called, the
    step is refused: something else computes what was to be replaced.

    Attributes:
        calls: how often each name was called.

    Args:
        library: name of its package.
        names: the functions by name.
        tables: dictionaries of the library that hold its functions by other keys.
        remedy: what to do if none of ours is called, for the message.
        calls: counter that the functions of this package add to; by default a new one, to which
            each of them adds a call.
    """

    def __init__(
        self,
        library: str,
        names: Mapping[str, Name],
        *,
        tables: Sequence[MutableMapping[str, Any]] = (),
        remedy: str,
        calls: Counter[str] | None = None,
    ) -> None:
        self.calls = Counter[str]() if calls is None else calls
        if calls is None:
            names = {
                name: Name(one.theirs, self._counted(name, one.ours)) for name, one in names.items()
            }
        self._library, self._names, self._tables, self._remedy = library, names, tables, remedy
        self._swap({id(one.theirs): one.ours for one in names.values()})
        self._hook = register_optimizer_step_pre_hook(self._check)

    def undo(self) -> None:
        """Give every name its own function again."""
        self._hook.remove()
        self._swap({id(one.ours): one.theirs for one in self._names.values()})

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def _swap(self, new: Mapping[int, Any]) -> None:
        for space in self._spaces():
            for key, value in [*space.items()]:
                if id(value) in new:
                    space[key] = new[id(value)]

    def _spaces(self) -> Iterator[MutableMapping[str, Any]]:
        yield from self._tables
        for name, module in [*sys.modules.items()]:
            if module is not None and name.partition(".")[0] == self._library:
                yield vars(module)

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.calls:
            raise RuntimeError(
                f"{self._library}: none of {', '.join(self._names)} was called before the first "
                f"optimizer step, so fusedrl would compute nothing of it: {self._remedy}"
            )
