"""Loggers: where a run's metrics go besides metrics.jsonl and the terminal.

A logger is a class that `run.log` names. It is made with a `RunInfo` and has a method `log`; the
others of `Logger` are optional. A function is a logger as well: it is called as `log` is.

All loggers of a run work on one thread, so that a slow one holds nothing up. A logger that raises
is reported once and tried again with the next row; the run goes on.
"""

from __future__ import annotations

import difflib
import inspect
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, cast

from fusedrl.engine.base.blame import blame, check_call, place_of, told
from fusedrl.engine.base.errors import ConfigError, SetupError, UserError
from fusedrl.engine.rewards.functions import import_function

if TYPE_CHECKING:
    import numpy as np

CLIENTS = {  # name -> (package that it needs, class)
    "wandb": ("wandb", "fusedrl.engine.runs.trackers:WandB"),
    "tensorboard": ("tensorboard", "fusedrl.engine.runs.trackers:TensorBoard"),
    "trackio": ("trackio", "fusedrl.engine.runs.trackers:Trackio"),
}
TABLES_EVERY = 10  # steps between tables of samples and histograms; evaluations have them, too
_MOST_WAITING = 1000  # rows; a logger that falls this far behind loses the newest
_SECONDS_TO_CLOSE = 30.0  # a logger that takes longer to finish is left behind
_REGISTERED: dict[str, Any] = {}
_IMPORTED: dict[str, Any] = {}  # by check_loggers, until a run makes it
_WITHOUT = "the run goes on without it; metrics.jsonl has every row"
_NO_LOG = "expected a method log(step, values), and {} has none"
L = TypeVar("L")


class _Unmade(ConfigError):
    """A logger of a user that could not be made."""


@dataclass(frozen=True)
class RunInfo:
    """Run that a logger reports.

    Attributes:
        directory: the run directory.
        title: name of the stage or algorithm.
        config: all options of the run by their dotted names.
        start: steps done before, if the run is resumed. The run repeats those that come after.
        total: steps of the whole run.
    """

    directory: Path
    title: str
    config: Mapping[str, Any]
    start: int
    total: int


class Logger(Protocol):
    """Receiver of a run's reports. Only `log` is required. Steps count from 1; step 0 is an
    evaluation before the first. Several calls may come for one step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step, as in metrics.jsonl. Values may be NaN."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take completions with their prompts and scores, every `TABLES_EVERY` steps and at
        evaluations. Values are JSON values."""

    def histograms(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Take numbers of all completions or tokens of a step, finite ones, every `TABLES_EVERY`
        steps."""

    def close(self, failed: bool) -> None:
        """Finish. `failed`: whether the run ended by an error."""


def register_logger(name: str) -> Callable[[L], L]:
    """Register a class, a function or an object with a method `log` under the name that `run.log`
    refers to."""

    def register(logger: L) -> L:
        _REGISTERED[name] = logger
        return logger

    return register


def check_loggers(names: Sequence[str]) -> None:
    """Import the loggers that are files, and look for wandb's login, so that what is wrong with one
    is told before a model is loaded. `make_logger` takes what was imported.

    Raises:
        ConfigError: a name is no logger, or a class or function takes other arguments.
        SetupError: the package of a logger is not installed, or its login is missing.
        RewardError: no such file, nothing of that name in it, or importing it failed.
    """
    _IMPORTED.clear()
    for name in names:
        found = _find(name)
        if name not in _REGISTERED and not isinstance(found, str):
            _IMPORTED[name] = found
        _check(name, found)
        if found == "wandb":
            import_module("fusedrl.engine.runs.trackers").logged_in()


def _check(name: str, found: Any) -> None:
    """Raise ConfigError unless this is a client's name, or can be called as a logger is."""
    what = f"run.log {name}"
    if isinstance(found, str):
        return
    if inspect.isclass(found):
        check_call(what, found, ConfigError, "info")
    log = getattr(found, "log", None)
    if inspect.isclass(found) and not callable(log):
        raise ConfigError(f"{what}: {_NO_LOG.format(place_of(found))}")
    if inspect.isclass(found):
        check_call(what, log, ConfigError, "self", "step", "values")
    elif not callable(log) and not callable(found):
        raise ConfigError(f"{what}: {_NO_LOG.format(type(found).__name__)}")
    else:
        check_call(what, found if log is None else log, ConfigError, "step", "values")


def _find(name: str) -> Any:
    """Return what `run.log` names: a class, a function or an object; of the clients a name."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _IMPORTED:
        return _IMPORTED.pop(name)  # of this run; another imports its file anew
    if name in CLIENTS:
        if find_spec(CLIENTS[name][0]) is None:
            raise SetupError(
                f"run.log {name}: the package {CLIENTS[name][0]} is not installed; pip install "
                f"'fusedrl[{name}]', or leave it out (metrics.jsonl is always written)"
            )
        return name
    path, colon, inside = name.rpartition(":")
    if colon and path.endswith(".py"):
        return import_function(Path(path), inside, "run.log", classes=True)
    known = [*CLIENTS, *_REGISTERED]
    close = difflib.get_close_matches(name, known, 1)
    raise ConfigError(
        f"config: expected run.log to be of {', '.join(known)} or file.py:NAME"
        f"{f' (did you mean {close[0]}?)' if close else ''}, got {name!r}"
    )


class _Function:
    """Function as a logger."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], Any]) -> None:
        self.log = function


def make_logger(name: str, info: RunInfo) -> Logger:
    """Make the logger that `run.log` names. Errors are those of `check_loggers`, and a ConfigError
    where a user's class raises. A client raises its own errors, and SetupError without a login.
    `Reporter` goes on without a logger that raises here."""
    found = _find(name)
    if isinstance(found, str):
        module, _, inside = CLIENTS[found][1].partition(":")
        return cast(Logger, getattr(import_module(module), inside)(info))
    if inspect.isclass(found):
        made: Any = found
        found = blame(f"run.log {name}", lambda: made(info), _Unmade, made)
    elif not hasattr(found, "log"):
        found = _Function(found)
    if not callable(getattr(found, "log", None)):
        raise ConfigError(f"run.log {name}: {_NO_LOG.format(type(found).__name__)}")
    return cast(Logger, found)


class Reporter:
    """All loggers of a run, on a thread of their own.

    Args:
        names: the loggers, as in `run.log`.
        info: the run that they report.
        tell: prints a message.
    Raises:
        ConfigError, SetupError, RewardError: a logger does not exist, lacks its package or its
            login, or is no logger.
    """

    def __init__(self, names: Sequence[str], info: RunInfo, tell: Callable[[str], None]) -> None:
        from fusedrl.engine.base.draws import generators_kept  # which needs torch

        self._tell, self._lost = tell, Counter[str]()
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                with generators_kept():  # what a client draws does not change the run
                    self._loggers[name] = make_logger(name, info)
            except _Unmade as error:
                tell(f"{error}; {_WITHOUT}")
            except (UserError, SetupError):
                raise
            except Exception as error:
                tell(f"run.log {name}: {told(error)}; {_WITHOUT}")
        self._jobs: queue.Queue[tuple[Any, ...] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="fusedrl loggers", daemon=True)
        if self._loggers:
            self._thread.start()

    def __bool__(self) -> bool:
        """Whether there is a logger."""
        return bool(self._loggers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand a step's metrics to every logger."""
        self._put("log", step, values)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand completions to the loggers that take them."""
        self._put("table", step, name, rows)

    def histograms(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Hand distributions to the loggers that take them, without numbers that are not finite."""
        import numpy as np  # here, since names are checked before anything is loaded

        finite = {name: x[np.isfinite(x)] for name, x in columns.items()}
        self._put("histograms", step, {name: x for name, x in finite.items() if len(x)})

    def _put(self, *job: Any) -> None:
        if not self._loggers:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            for name in self._loggers:
                self._failed(name, f"it is {_MOST_WAITING} rows behind the run")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            method, *arguments = job
            for name, logger in self._loggers.items():
                try:
                    if (function := getattr(logger, method, None)) is not None:
                        function(*arguments)
                except BaseException as error:  # sys.exit in a user's logger is one
                    self._failed(name, told(error))

    def _failed(self, name: str, why: str) -> None:
        self._lost[name] += 1
        if self._lost[name] == 1:
            self._tell(
                f"run.log {name}: {why}; the run goes on, and so does this logger with the next "
                "row; metrics.jsonl has them all"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._loggers:
            return
        failed = kind is not None and issubclass(kind, Exception)
        end = time.monotonic() + _SECONDS_TO_CLOSE
        with suppress(queue.Full):  # of what a logger that never returns has before it
            for job in (("close", failed), None):
                self._jobs.put(job, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._tell(
                f"run.log {', '.join(self._loggers)}: not finished after {_SECONDS_TO_CLOSE:g} "
                "seconds, and left behind; metrics.jsonl has every row"
            )
        for name, count in self._lost.items():
            if count > 1:
                self._tell(f"run.log {name}: {count} reports did not reach it")
