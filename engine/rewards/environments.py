"""The environments of a run, asked from the process of the run: in worker processes, or in this
one.

What an environment sees does not depend on where it runs: before each of its calls the random
generators are seeded by the trajectory and the call.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from fusedrl.engine.base.blame import Invalid, told
from fusedrl.engine.base.draws import generators_apart, seed_on_cpu
from fusedrl.engine.base.errors import RewardError, SetupError, Stopped
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.rewards.functions import Rollout
from fusedrl.engine.rewards.hosted import Answer, Host, Wrong, at_once
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.tools import schemas_of


class Environments:
    """The environments of a run's trajectories, asked many at once.

    Args:
        environment: file.py:NAME of a class with `reset` and `step`, or of a function that makes
            such an object (`hosted`); None with tools.
        tools: file.py:NAME of functions that the policy may call (`tools`).
        parser: how their calls are found in the text of a turn.
        workers: processes to run in, if there are any; they end a call that takes too long. In
            this process nothing does.
    Attributes:
        name: name of the environment, under which its rewards are reported.
        schemas: JSON schemas of the tools, for the chat template; None without tools.
        place: where it is written.
    Raises:
        RewardError: a file, a class or a function cannot be used.
    """

    def __init__(
        self,
        environment: str | None,
        tools: Sequence[str] = (),
        parser: str = "hermes",
        workers: Workers | None = None,
    ) -> None:
        self.schemas: list[dict[str, Any]] | None = None
        spec: dict[str, Any] = {"environment": environment}
        self.name, self.place = str(environment).rpartition(":")[2], str(environment)
        if environment is None:
            self.schemas = schemas_of(tools)
            spec = {"tools": list(tools), "schemas": self.schemas, "parser": parser}
            self.name, self.place = "tools", ", ".join(tools)
        self._host = Host(spec)
        self._workers = workers if workers is not None and workers.processes else None
        if self._workers is not None:
            self._workers.add_environment(spec)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in worker processes."""
        return self._workers is not None

    def ask(self, request: dict[str, Any]) -> Future[Answer]:
        """Ask for the answer to a trajectory's last turn (`hosted.Host.answer`). The future gives
        {"value": answer}, or {"lost": reason}.

        Raises:
            RewardError, SetupError: nothing can be asked any more. The future may raise the same.
        """
        if self._workers is not None:
            home, calls = request["trajectory"], len(request["texts"]) + 1
            try:
                return self._workers.ask(
                    "environment", request, together=self._host.waits, home=home, calls=calls
                )
            except TypeError as error:
                raise RewardError(
                    f"environment {self.name!r}: expected rows of JSON values, which can be handed "
                    f"to a worker process ({error}); leave the workers out, or the column"
                ) from error
        asked = self._answer(request)
        if self._host.waits:
            return asyncio.run_coroutine_threadsafe(asked, self._events())
        future: Future[Answer] = Future()
        with generators_apart():
            future.set_result(at_once(asked))
        return future

    def end(self, trajectory: str) -> None:
        """Drop the environment of a trajectory that was ended from outside."""
        if self._workers is None:
            self._host.end(trajectory)
            return
        request = {"trajectory": trajectory}
        self._workers.ask("end", request, together=self._host.waits, home=trajectory)

    async def _answer(self, request: dict[str, Any]) -> Answer:
        try:
            return {"value": await self._host.answer(request, seed_on_cpu)}
        except Wrong as error:
            return {"lost": str(error)}
        except (KeyboardInterrupt, Stopped, RewardError, SetupError):
            raise
        except BaseException as error:  # of a user's code; sys.exit is one
            return {"lost": f"raised {told(error)}{_where(error, self._host.places)}"}

    def _events(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


def environments_of(config: PolicyConfig, workers: Workers) -> Environments | None:
    """Return the environments that a configuration names; None if it names none. Errors are those
    of `Environments`."""
    if not config.plays:
        return None
    return Environments(config.environment, config.tools, config.turns.tool_parser, workers)


class EnvironmentReward:
    """Reward that trajectories have earned in their environment, as a member of a RewardSet. Its
    values are those in the rollout: one number for each token, or Invalid. Of tools, which reward
    nothing, it only tells which trajectories are invalid.

    Args:
        environments: what they were earned in.
    """

    def __init__(self, environments: Environments) -> None:
        self.name, self.place = environments.name, environments.place
        self._rewards = environments.schemas is None

    def __call__(self, rollout: Rollout) -> list[Any]:
        if rollout.earned is None:
            raise RewardError(f"reward {self.name!r}: expected trajectories of its environment")
        return [
            one if self._rewards or isinstance(one, Invalid) else None for one in rollout.earned
        ]


def key_of(*parts: int | str) -> int:
    """Return a seed of 63 bits that these parts determine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _where(error: BaseException, files: Sequence[str]) -> str:
    """Return the last line in the user's files that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((one for one in reversed(frames) if one.filename in files), frames[-1])
    return f" ({frame.filename}:{frame.lineno})"
