"""Rewards whose functions run in worker processes: they are asked for one completion at a time, as
completions finish, while others are still generated.

What a function sees does not depend on the order in which completions finish, or on the process: it
gets one completion, as lists of one, and its random draws are seeded by the completion's key.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from typing import Any

from fusedrl.engine.base.blame import Invalid, shown
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.functions import FunctionReward, Rollout
from fusedrl.engine.rewards.pool import Workers

Key = Sequence[int | str]
_OTHERS = 2  # completions that one is tried beside
_TRIES = 3
_NEAR = 1e-3  # a batch of another size may round otherwise


class WorkerReward:
    """A reward function that runs in worker processes. Called with a rollout it is asked for each
    completion by itself, and waits for all.

    Attributes:
        reward: the function as it would run in this process.
        tried: whether a completion's value was found not to depend on others.
    """

    def __init__(self, reward: FunctionReward, workers: Workers, spec: str) -> None:
        self.reward, self.name, self.place = reward, reward.name, reward.place
        self.policy_tokenizer = reward.policy_tokenizer
        self.tried = False
        self._workers, self._which = workers, workers.add(spec)

    def ask(self, rollout: Rollout, key: Key) -> Future[dict[str, Any]]:
        """Ask for the values of a few completions in one call.

        Args:
            key: what the function's random draws are seeded by.
        Raises:
            RewardError: a column is missing, or holds what is no JSON value.
        """
        digest = hashlib.sha256(json.dumps([*key, self.name, self._which]).encode()).digest()
        count = len(rollout.completions)
        request = {
            "which": self._which,
            "seed": int.from_bytes(digest[:8]) >> 1,
            "count": count,
            "arguments": self.reward.arguments(rollout),
        }
        try:
            return self._workers.ask("reward", request, together=self.reward.waits, times=count)
        except TypeError as error:
            raise RewardError(
                f"reward {self.name!r} ({self.place}): expected columns of JSON values, which can "
                f"be handed to a worker process ({error}); leave the workers out, or the column"
            ) from error

    def __call__(self, rollout: Rollout) -> list[Any]:
        ahead = Ahead({self.name: self})
        for index in range(len(rollout.completions)):
            ahead.add(index, rollout.part(index, index + 1), (index,))
        return ahead.collect(len(rollout.completions)).values[self.name]


@dataclass(frozen=True)
class Found:
    """Values of rewards by name, one for each index asked for in increasing order; `lost`: how many
    calls raised, were late or lost their process; `waited`: seconds until the last came."""

    indices: list[int]
    values: dict[str, list[Any]]
    lost: int
    waited: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, for other ranks."""
        values = {name: list(map(_told, own)) for name, own in self.values.items()}
        return vars(self) | {"values": values}

    @staticmethod
    def from_json(told: dict[str, Any]) -> Found:
        """Return what `to_json` told."""
        values = {name: list(map(_value, own)) for name, own in told["values"].items()}
        return Found(**(told | {"values": values}))


class Ahead:
    """Calls of several rewards for the completions of a rollout, each begun as soon as its
    completion is known."""

    def __init__(self, rewards: Mapping[str, WorkerReward]) -> None:
        self.rewards = rewards
        self._calls: dict[int, dict[str, Future[dict[str, Any]]]] = {}
        self._asked: dict[int, tuple[Rollout, Key]] = {}

    def add(self, index: int, one: Rollout, key: Key) -> None:
        """Ask for the values of completion number `index`, the only one of the rollout `one`."""
        self._asked[index] = one, key
        self._calls[index] = {name: reward.ask(one, key) for name, reward in self.rewards.items()}

    def collect(self, most: float = math.inf) -> Found:
        """Wait for all values. Errors are those of `Workers.ask`, and:

        Args:
            most: how many completions may have no value.
        Raises:
            RewardError: more have none, or a value depends on the other completions of a call.
        """
        began, lost = time.perf_counter(), dict[int, str]()
        owners = {call: (i, n) for i, calls in self._calls.items() for n, call in calls.items()}
        count = 0
        for call in as_completed(owners):
            index, name = owners[call]
            if (reason := call.result().get("lost")) is not None:
                count += 1
                place = self.rewards[name].place
                lost.setdefault(index, f"sample {index}, by {name} ({place}): {reason}")
            if len(lost) > most:
                raise RewardError(_too_many(lost, len(self._calls)))
        waited = time.perf_counter() - began
        indices = sorted(self._calls)
        found = {
            name: [_values(self._calls[index][name].result(), 1)[0] for index in indices]
            for name in self.rewards
        }
        for name, reward in self.rewards.items():
            reward.tried = reward.tried or self._tried(reward, indices, found[name])
        return Found(indices, found, count, waited)

    def _tried(self, reward: WorkerReward, indices: Sequence[int], values: Sequence[Any]) -> bool:
        """Return whether there were completions to try if the value of one depends on the others of
        a call. Raise RewardError if it does: such a reward wants whole batches."""
        first = next((i for i, v in zip(indices, values, strict=True) if _counts(v)), None)
        if first is None:
            return False
        one, key = self._asked[first]
        others = [
            self._asked[index][0]
            for index in indices
            if self._asked[index][0].completions != one.completions
        ][:_OTHERS]
        if not others:
            return False
        several = _joined([one, *others])

        def alone() -> Any:
            return _values(reward.ask(one, key).result(), 1)[0]

        def beside() -> Any:
            return _values(reward.ask(several, key).result(), len(several.completions))[0]

        value, among = values[list(indices).index(first)], beside()
        if not _counts(among) or _near(value, among):
            return True
        # a judge that never says the same twice is not to blame
        again = [(alone(), beside()) for _ in range(_TRIES)]
        if not all(_near(value, x) and _near(among, y) for x, y in again):
            return True
        raise RewardError(
            f"reward {reward.name!r} ({reward.place}): expected a value that does not depend on "
            f"the other completions of a call, and a completion got {shown(value)} alone and "
            f"{shown(among)} among {len(several.completions)}. Worker processes ask for one "
            "completion at a time; leave the workers out, so that it gets whole batches"
        )


def _joined(ones: Sequence[Rollout]) -> Rollout:
    names = {name for one in ones for name in one.columns}
    return Rollout(
        [x for one in ones for x in one.prompts],
        [x for one in ones for x in one.completions],
        [x for one in ones for x in one.prompt_ids],
        [x for one in ones for x in one.completion_ids],
        {name: [x for one in ones for x in one.columns.get(name, [None])] for name in names},
    )


def _values(answer: dict[str, Any], count: int) -> list[Any]:
    """Return a worker's answer as values of a reward."""
    if "lost" in answer:
        return [Invalid(answer["lost"])] * count
    return [_value(value) for value in answer["value"]]


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Invalid(value["invalid"])
    return [_value(one) for one in value] if isinstance(value, list) else value


def _told(value: Any) -> Any:
    """Return a value as `_value` reads it."""
    if isinstance(value, Invalid):
        return {"invalid": value.reason}
    return list(map(_told, value)) if isinstance(value, list) else value


def _counts(value: Any) -> bool:
    """Whether a value is a number, or a list of them."""
    return isinstance(value, int | float) or (isinstance(value, list) and bool(value))


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_near, one, other))
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return type(one) is type(other)
    return math.isclose(one, other, rel_tol=_NEAR, abs_tol=_NEAR)


def _too_many(lost: Mapping[int, str], samples: int) -> str:
    return (
        f"{len(lost)} of {samples} samples have no valid reward so far, more than "
        f"max_invalid_fraction allows; the first to fail, {next(iter(lost.values()))}"
    )
