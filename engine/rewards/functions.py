"""Functions that users name by a file: how one is loaded, what it is given, and how what it returns
is read. Nothing here needs torch, so that a worker process starts in a moment."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusedrl.engine.base.blame import Invalid, Parameters, place_of, shown, told
from fusedrl.engine.base.errors import RewardError, Stopped, no_such
from fusedrl.engine.data.records import Messages, Prompt
from fusedrl.engine.rewards.ready import READY, Ready, ready

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusedrl.engine.data.sources import Data

ARGUMENTS = ("prompts", "completions", "completion_ids")  # of every reward
SINGULAR = {  # what a function may call its arguments -> what they are called
    "prompt": "prompts",
    "prompt_ids": "prompts",
    "completion": "completions",
    "completions_ids": "completion_ids",
    "completion_id": "completion_ids",
    "response": "completions",
    "responses": "completions",
    "output": "completions",
    "outputs": "completions",
    "text": "completions",
    "texts": "completions",
    "token_ids": "completion_ids",
}
LISTS = (
    "prompts are messages here, and so is each completion c: a list with one message, whose text "
    'is c[-1]["content"]'
)
_AHEAD: dict[str, Callable[..., Any]] = {}  # by load_ahead, until a run takes them
LARGEST = 1e15  # largest absolute value of a reward


@dataclass(frozen=True)
class Rollout:
    """Input of a reward, with one entry per completion: prompts and completions, both as text (or
    messages) and as token ids, and the other columns of the data. `earned`: of trajectories, what
    their environment gave at each token (`EnvironmentReward`)."""

    prompts: Sequence[Prompt]
    completions: Sequence[str | Messages]
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    earned: Sequence[Any] | None = None

    def part(self, start: int, stop: int) -> Rollout:
        """Return the completions from `start` up to, not including, `stop`."""
        return Rollout(
            self.prompts[start:stop],
            self.completions[start:stop],
            self.prompt_ids[start:stop],
            self.completion_ids[start:stop],
            {name: column[start:stop] for name, column in self.columns.items()},
            None if self.earned is None else self.earned[start:stop],
        )


class Reward(Protocol):
    """Object with a name that, when called, returns one value per completion, or an awaitable of
    such a list."""

    name: str

    def __call__(self, rollout: Rollout) -> Any: ...


class FunctionReward:
    """Function with TRL's contract. The policy's tokenizer is used for rewards of steps only."""

    def __init__(
        self, function: Callable[..., Any], policy_tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.function = function
        self.policy_tokenizer = policy_tokenizer
        self.name = getattr(function, "__name__", type(function).__name__)
        self._parameters = Parameters(f"reward {self.name!r}", function)

    def check(self, columns: Collection[str]) -> None:
        """Raise RewardError if the function needs a column of the data that is not among these."""
        self._check_named(columns)
        if isinstance(self.function, Ready):  # it names the column that it looks for
            self.function.try_columns(columns)

    def _check_named(self, columns: Collection[str]) -> None:
        missing = self._parameters.lacking({*ARGUMENTS, *columns})
        if missing in SINGULAR:
            raise RewardError(
                f"reward {self.name!r}, {place_of(self.function)}: expected its arguments to be "
                f"called {', '.join(ARGUMENTS)} or as a column of the data, got {missing!r}; write "
                f"{SINGULAR[missing]}, a list with one entry per completion, and return a list"
                + (" (ids are given of completions alone)" if missing == "prompt_ids" else "")
            )
        if missing:
            raise RewardError(
                f"reward {self.name!r} needs the column {missing!r} of the data, which has "
                f"{', '.join(sorted(columns)) or 'none'} beside the prompt; add it there, or give "
                f"the argument a default in {place_of(self.function)}"
            )

    @property
    def place(self) -> str:
        """File and line where the function is written; its name if they are not known."""
        inner = self._inner
        code = getattr(inner, "__code__", getattr(type(inner).__call__, "__code__", None))
        return self.name if code is None else f"{code.co_filename}:{code.co_firstlineno}"

    @property
    def waits(self) -> bool:
        """Whether the function is an `async def`, which leaves the processor to others while it
        waits."""
        inner = self._inner
        return any(map(inspect.iscoroutinefunction, (inner, type(inner).__call__)))

    @property
    def _inner(self) -> Any:
        """The function itself, of a ready reward or a functools.partial too."""
        inner: Any = self.function
        while isinstance(inner, Ready | functools.partial):
            inner = inner.function if isinstance(inner, Ready) else inner.func
        return inner

    def __call__(self, rollout: Rollout) -> list[Any] | Awaitable[list[Any]]:
        return self.function(**self.arguments(rollout))

    def explained(self, error: Exception, rollout: Rollout) -> Exception:
        """Return what the function raised, with what its arguments are if it took the messages of
        a conversation for a text."""
        cause = error.__cause__
        mistaken = isinstance(cause, AttributeError | TypeError | KeyError | ValueError)
        if (
            not mistaken
            or "list" not in str(cause)
            or all(isinstance(prompt, str) for prompt in rollout.prompts)
        ):
            return error
        return type(error)(f"{error}; {LISTS}")

    def arguments(self, rollout: Rollout) -> dict[str, Any]:
        """Return what the function is called with, as copies that it may write to.

        Raises:
            RewardError: it needs a column that the data does not have.
        """
        completions = [
            [{"role": "assistant", "content": one}]
            if isinstance(one, str) and not isinstance(prompt, str)
            else one
            for prompt, one in zip(rollout.prompts, own_copies(rollout.completions), strict=True)
        ]
        arguments = {
            "prompts": own_copies(rollout.prompts),
            "completions": completions,
            "completion_ids": [list(ids) for ids in rollout.completion_ids],
        }
        arguments |= {
            name: own_copies(column)
            for name, column in rollout.columns.items()
            if name not in arguments
        }
        self._check_named(rollout.columns)
        return self._parameters.chosen(arguments)


def load_function(spec: str) -> Callable[..., Any] | None:
    """Load the reward function that `file.py:function`, or the name of a ready reward with its
    options, names. Return None for a directory, which may be that of a reward model.

    Raises:
        RewardError: no such file, no such function, a failed import, an option that a ready reward
            does not have, or none of all these.
    """
    if spec in _AHEAD:
        return _AHEAD.pop(spec)  # of this run; another imports its file anew
    if (found := ready(spec)) is not None:
        return found
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return import_function(Path(path), function)
    if spec and Path(spec).is_dir():
        return None
    raise RewardError(
        f"reward {spec!r}: expected file.py:function, the directory of a reward model, or one "
        f"of {', '.join(READY)}; {_no_reward(spec)}"
    )


def load_ahead(specs: Sequence[str], *data: Data) -> None:
    """Load the functions that rewards name, so that what is wrong with one is told before torch is
    loaded; `load_function` hands each out once. What was left over from an earlier call is
    dropped. Arguments and errors are those of `check_columns` and `load_function`."""
    _AHEAD.clear()
    for spec in specs:
        if (found := load_function(spec)) is not None:
            check_columns(FunctionReward(found), *data)
            _AHEAD[spec] = found


def check_columns(reward: FunctionReward, *data: Data) -> None:
    """Raise RewardError if a reward needs a column that no row of one of the data has."""
    from fusedrl.engine.data.readers import prompt_columns  # which a worker process has no use for

    for one in data:
        try:
            reward.check(prompt_columns(one, whole=False))
        except RewardError:
            reward.check(prompt_columns(one, whole=True))


def _no_reward(spec: str) -> str:
    """Describe a specification that is neither a function nor a directory."""
    path, colon, function = spec.rpartition(":")
    if not spec:
        return "got nothing"
    if spec.endswith(".py"):
        return f"name the function, {spec}:NAME" + (
            "" if Path(spec).is_file() else f"; and {no_such(spec)}"
        )
    if "://" in spec:
        return (
            "nothing is downloaded from an address, and none is asked for a score: a function "
            "may ask one"
        )
    if Path(spec).exists():
        return f"{spec} is a file"
    name = spec.partition(":")[0]
    if close := difflib.get_close_matches(name.lower().replace("-", "_"), READY, 1, 0.75):
        return f"did you mean {close[0]}{spec.removeprefix(name)}?"
    if colon and function.isidentifier():
        return f"the function's file ends in .py, got {path!r}"
    hub = spec.count("/") == 1 and spec[0] not in "./~"
    fetched = (
        f"; if it is a reward model of the Hugging Face hub, fetch it: hf download {spec} "
        "--local-dir DIR"
        if hub
        else ""
    )
    return f"there is no such directory: {no_such(spec)}{fetched}"


def import_function(
    path: Path, function: str, what: str = "reward", *, classes: bool = False
) -> Callable[..., Any]:
    """Import a function from a Python file that is not part of a package. `what` names the
    function's role in error messages. `classes`: a class serves as well.

    Raises:
        RewardError: no such file, no such function, a failed import.
    """
    if not path.is_file():
        raise RewardError(
            f"{what} {path}:{function}: there is no such file: "
            + (
                f"{path} is a directory"
                if path.is_dir()
                else no_such(path) + "; of several each is given by itself" * ("," in str(path))
            )
        )
    name = f"fusedrl_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{what} {path}:{function}: Python cannot load this file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # sys.exit at the end of a script is one
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = error.lineno if isinstance(error, SyntaxError) else frame.lineno
        raise RewardError(
            f"{what} {path}:{function}: importing the file raised {told(error)} (line {line})"
        ) from error
    found = getattr(module, function, None)
    if found is None:
        known = [
            key
            for key, value in vars(module).items()
            if (inspect.isfunction(value) or (classes and inspect.isclass(value)))
            and value.__module__ == name
            and not key.startswith("_")
        ]
        close = difflib.get_close_matches(function, known, 1)
        noun = "functions and classes" if classes else "functions"
        raise RewardError(
            f"{what} {path}:{function}: the file has no {function!r}"
            f"{f', did you mean {close[0]}?' if close else ''}; its {noun}: "
            f"{', '.join(known) or 'none'}"
        )
    if inspect.isclass(found) and not classes:
        raise RewardError(
            f"{what} {path}:{function}: expected a function, got a class; name a function, or an "
            f"object of that class in the file: {function.lower()} = {function}()"
        )
    if not callable(found):
        raise RewardError(
            f"{what} {path}:{function}: expected a function, got {type(found).__name__}"
        )
    return found


def own_copies(values: Sequence[Any]) -> list[Any]:
    """Return the values as copies that a function may write to. Lists and objects are copied one by
    one, because the data passes the originals on to the next sample, reward and step."""
    fixed = (str, int, float, bool, type(None))
    return [value if isinstance(value, fixed) else copy.deepcopy(value) for value in values]


def values_of(
    what: str, returned: Any, count: int, noun: str = "value", subject: str = "completion"
) -> list[Any]:
    """Return a function's answer as a list of `count` values. Raise RewardError if it is not such a
    list."""
    if is_tensor(returned) or type(returned).__module__ == "numpy":
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise RewardError(
            f"{what}: expected a list of {count} {noun}s, one per {subject}, got "
            f"{type(returned).__name__}"
        )
    if len(returned) != count:
        raise RewardError(
            f"{what}: expected {count} {noun}s, one per {subject}, got {len(returned)}"
        )
    return list(returned)


def number_of(value: Any) -> tuple[float | None, str]:
    """Return (value as a number, reason if it is not a valid number)."""
    if value is None:
        return None, ""
    if isinstance(value, Invalid):
        return math.nan, value.reason
    if is_tensor(value) and value.numel() == 1:
        value = value.item()
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # a user's __float__ may raise anything
        return math.nan, f"expected a number or None, got {shown(value)}"
    if not math.isfinite(number):
        return math.nan, f"expected a finite number or None, got {shown(value)}"
    if abs(number) > LARGEST:
        return (
            math.nan,
            f"expected a number of at most {LARGEST:g} (squares are summed in float32), got "
            f"{shown(value)}",
        )
    return number, ""


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, which is not loaded to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
