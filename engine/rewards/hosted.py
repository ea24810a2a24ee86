"""Environments of one process: users' objects that answer the policy's turns.

    class Game:                       # one object for each trajectory
        def reset(self, row):         # row: the prompt and the other columns of its data row
            return messages           # or a text, for a model that continues texts
        def step(self, completion):   # the text of the policy's turn
            return observation, reward, done

Both may be `async def`. An observation is messages, one message, or a text; it is not looked at if
`done`. A fourth value, {name: number}, is reported as environment/<name>. If `reset` returns None,
the prompt is that of the data. A parameter `seed` of `reset` gets a number that is the same for
all trajectories of a prompt.

An object lives in its process as long as its trajectory. If the process is lost by another's fault,
a new object in another process gets the same calls again; it has to give the same answers. So no
state is copied, and results do not depend on processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fusedrl.engine.base.blame import place_of, shown
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.functions import import_function, number_of, own_copies
from fusedrl.engine.rewards.pool import named

Answer = dict[str, Any]
_ROLES = ("user", "tool", "system", "developer")


class Wrong(Exception):
    """An environment returned what its contract does not have; the text says what and what was
    expected."""


class Host:
    """The environments of one process.

    Args:
        spec: {"environment": "file.py:Class"}, or {"tools": ..., "schemas": ..., "parser": ...} of
            an environment that calls tools.
    Attributes:
        waits: whether the environments are asynchronous, so that many may be asked at once.
        places: absolute paths of the users' files.
    Raises:
        RewardError: a file, a class or a function cannot be used; the message says why.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        if "tools" in spec:
            from fusedrl.engine.rewards.tools import tool_environment

            self._make, functions = tool_environment(spec)
        else:
            self._make = _maker(str(spec["environment"]))
            methods = (getattr(self._make, name, None) for name in ("reset", "step"))
            functions = [one for one in methods if one is not None]
        self.waits = any(map(inspect.iscoroutinefunction, functions))
        self.places = [os.path.abspath(one.rpartition(":")[0]) for one in named(spec)]
        self._live: dict[str, _Live] = {}

    def calls(self, request: Mapping[str, Any]) -> int:
        """Return how many calls of users' functions a request takes: one, or all of its trajectory
        so far if its environment is not here."""
        one = self._live.get(request["trajectory"])
        count = len(request["texts"]) + 1
        return 1 if one is not None and one.calls == count - 1 else count

    async def answer(self, request: Mapping[str, Any], seed: Callable[[int], None]) -> Answer:
        """Return the environment's answer to the last of the policy's turns, or to none: the
        prompt.

        Args:
            request: {"trajectory": its name, "row": the data row, "texts": the policy's turns so
                far, "seeds": one for each call, "answers": digests of the earlier answers}.
            seed: seeds the process's random generators, before each call.
        Returns:
            {"prompt"} of `reset`, or {"observation", "reward", "done", "info"} of `step`, and its
            {"digest"}.
        Raises:
            Wrong: the environment returned something else, or answers its calls otherwise when
                they are repeated.
        """
        key, texts = request["trajectory"], request["texts"]
        one = self._live.get(key)
        if one is None or one.calls != len(texts):
            one = self._live[key] = _Live(self._make)
        answer: Answer = {}
        try:
            for number in range(one.calls, len(texts) + 1):
                seed(request["seeds"][number])
                answer = await one.call(request, number)
                answer["digest"] = digest(answer)
                if number < len(texts) and answer["digest"] != request["answers"][number]:
                    raise Wrong(
                        "expected the same answers when its calls are repeated, since its process "
                        f"was lost; call {number} was answered otherwise (draw from generators "
                        "that reset seeds)"
                    )
        except BaseException:
            self.end(key)
            raise
        if answer.get("done"):
            self.end(key)
        return answer

    def end(self, trajectory: str) -> None:
        """Drop the environment of a trajectory, after its `close` if it has one."""
        one = self._live.pop(trajectory, None)
        if one is not None:
            one.close()


class _Live:
    """One environment, and the number of calls that it has answered."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._object: Any = None
        self.calls = 0

    async def call(self, request: Mapping[str, Any], number: int) -> Answer:
        if number == 0:
            self._object = self._make()
            (row,) = own_copies([request["row"]])
            named = inspect.signature(self._object.reset).parameters
            seeded = {"seed": request["seeds"][0]} if "seed" in named else {}
            found = self._object.reset(row, **seeded)
        else:
            found = self._object.step(request["texts"][number - 1])
        if inspect.isawaitable(found):
            found = await found
        self.calls = number + 1
        return step_answer(found) if number else reset_answer(found, request["row"])

    def close(self) -> None:
        close = getattr(self._object, "close", None)
        if callable(close):
            try:
                found = close()
                if inspect.iscoroutine(found):
                    found.close()  # nobody waits for it
            except Exception as error:  # its trajectory is over: nothing is lost
                print(f"an environment's close raised {type(error).__name__}", flush=True)


def at_once(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine that waits for nothing, without an event loop. Return {"lost": reason} if it
    waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return dict(done.value)
    coroutine.close()
    return {"lost": "expected an answer, got something to wait for; write `async def`"}


async def in_time(coroutine: Coroutine[Any, Any, Answer], seconds: float) -> Answer:
    """Wait for an answer. Return {"lost": reason} if it takes longer than so many seconds."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await coroutine
    except TimeoutError:
        if limit.expired():
            return {"lost": f"took longer than {seconds:g} s"}
        raise


def digest(answer: Mapping[str, Any]) -> str:
    """Return a digest of an answer."""
    text = json.dumps({k: v for k, v in answer.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _maker(spec: str) -> Callable[[], Any]:
    """Return what makes an environment: the class, or the function, at file.py:NAME."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise RewardError(
            f"environment {spec!r}: expected file.py:NAME of a class with reset and step, or of a "
            "function that returns such an object"
        )
    found = import_function(Path(path), name, "environment", classes=True)
    for method, takes in (("reset", "row"), ("step", "completion")):
        if inspect.isclass(found) and not callable(getattr(found, method, None)):
            raise RewardError(
                f"environment {spec}: expected the class to have reset(self, row) and step(self, "
                f"completion), got {place_of(found)} without {method}"
            )
        if inspect.isclass(found):
            signature = inspect.signature(getattr(found, method))
            seeded = {"seed": 0} if method == "reset" and "seed" in signature.parameters else {}
            try:
                signature.bind(None, takes, **seeded)
            except TypeError as error:
                raise RewardError(
                    f"environment {spec}: expected {method} to take one argument, {takes}: {error}"
                ) from error
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"environment {spec}: expected it to be made without arguments: {error}"
        ) from error
    return found


# ---- answers -------------------------------------------------------------------------------------
def reset_answer(found: Any, row: Mapping[str, Any]) -> Answer:
    """Return what `reset` returned as an answer: {"prompt": text or messages}.

    Raises:
        Wrong: it is neither.
    """
    if found is None:
        found = row["prompt"]
    if isinstance(found, str):
        return {"prompt": found}
    prompt = _messages(found, "reset", (*_ROLES, "assistant"))
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Wrong(
            "expected reset to return messages whose last is not the assistant's, got "
            f"{shown(found)}"
        )
    return {"prompt": prompt}


def step_answer(found: Any) -> Answer:
    """Return what `step` returned as an answer: {"observation": text, messages or None, "reward",
    "done", "info": {name: number}}.

    Raises:
        Wrong: it is not such a tuple.
    """
    if not isinstance(found, tuple | list) or len(found) not in (3, 4):
        raise Wrong(
            "expected step to return (observation, reward, done), or these and {name: number}, "
            f"got {shown(found)}"
        )
    observation, reward, done, *more = found
    if type(done).__name__ not in ("bool", "bool_"):
        raise Wrong(f"expected step's done to be True or False, got {shown(done)}")
    number, reason = number_of(reward)
    if reason:
        raise Wrong(f"step's reward: {reason}")
    if bool(done):
        observation = None
    elif isinstance(observation, Mapping):
        observation = [observation]
    if observation is not None and not isinstance(observation, str):
        observation = _messages(observation, "step", _ROLES)
    if not done and not observation and observation != "":
        raise Wrong("expected an observation to go on from where done is False, got none")
    return {
        "observation": observation,
        "reward": number or 0.0,
        "done": bool(done),
        "info": _info(more[0]) if more else {},
    }


def _messages(found: Any, method: str, roles: tuple[str, ...]) -> list[dict[str, Any]]:
    if isinstance(found, list | tuple) and all(isinstance(one, Mapping) for one in found):
        messages = [dict(one) for one in found]
        try:
            json.dumps(messages)
        except (TypeError, ValueError) as error:
            raise Wrong(f"expected {method}'s messages to be JSON values: {error}") from None
        wrong = [
            one
            for one in messages
            if one.get("role") not in roles or not isinstance(one.get("content"), str)
        ]
        if not wrong:
            return messages
        found = wrong[0]
    raise Wrong(
        f"expected {method} to return a text, or messages of {', '.join(roles)} with a content, "
        f"got {shown(found)}"
    )


def _info(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise Wrong(f"expected step's fourth value to be {{name: number}}, got {shown(found)}")
    numbers = {}
    for name, value in found.items():
        number, reason = number_of(value)
        if not isinstance(name, str) or not name or reason or number is None:
            raise Wrong(
                f"expected step's fourth value to be {{name: number}}, got {shown(name)}: "
                f"{shown(value)}"
            )
        numbers[name] = number
    return numbers
