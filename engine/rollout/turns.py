"""Trajectories: prompts, the policy's turns, and what an environment answers, as one sequence each.

    prompt        turn 1      observation   turn 2
    <------------><---------><------------><-------->
    . . . . . . .  x x x x x  . . . . . . .  x x x x     action_mask

A turn is sampled as the continuation of all tokens before it, whose keys and values are found in
the cache. The policy's tokens stay as they were drawn; only observations are tokenised (`encode_
turn`). So what the sampler read is what is trained on.

All trajectories begin a turn together, when each has its environment's answer: environments answer
while other turns are still generated, and which sequences are computed side by side depends on the
tokens alone. With `strict`, where that changes no bit, each goes on as soon as it has its answer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from typing import Any

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.blame import Invalid
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.errors import DataError
from fusedrl.engine.config.turns import TurnsConfig
from fusedrl.engine.data.records import Messages
from fusedrl.engine.data.tokenize import encode_prompt, encode_turn
from fusedrl.engine.generation.divided import gathered
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.environments import Environments, key_of


@dataclass(frozen=True)
class Episode:
    """One trajectory that has come to its end.

    Attributes:
        prompt: the text or the messages that it began with.
        completion: all tokens behind the prompt; its action_mask is False at observations. Its
            finish_reason is "stop" if the environment ended the trajectory, "length" if a limit
            did.
        messages: what followed the prompt, if that is messages.
        rewards: reward of each turn.
        ends: index of each turn's last token in the completion.
        states: number of the observation that each turn answers; equal observations have equal
            numbers.
        invalid: why the trajectory cannot be used; "" if it can.
        info: sums of the numbers that the environment reported.
    """

    prompt: str | Messages
    completion: Completion
    messages: Messages
    rewards: list[float]
    ends: list[int]
    states: list[int]
    invalid: str
    info: dict[str, float]

    @property
    def shown(self) -> str | Messages:
        """The trajectory behind its prompt, as rewards are given it: messages, or a text."""
        if isinstance(self.prompt, str):
            return self.completion.text
        return self.messages or [{"role": "assistant", "content": ""}]

    @property
    def earned(self) -> list[float] | Invalid:
        """Reward of each token of the completion: that of a turn at its last token."""
        if self.invalid:
            return Invalid(self.invalid)
        found = [0.0] * len(self.completion.token_ids)
        for end, reward in zip(self.ends, self.rewards, strict=True):
            found[end] += reward
        return found

    @property
    def observed(self) -> int:
        """Number of tokens of observations."""
        return len(self.completion.token_ids) - len(self.completion.actions)

    @property
    def turn_states(self) -> list[int]:
        """The turn's number in `states` at each of its tokens; 0 at observations and the prompt."""
        found = [0] * (len(self.completion.prompt_ids) + len(self.completion.token_ids))
        mask = self.completion.action_mask or [True] * len(self.completion.token_ids)
        turn = 0
        for index, chosen in enumerate(mask):
            if chosen:
                found[len(self.completion.prompt_ids) + index] = self.states[turn]
            turn += turn < len(self.ends) and index == self.ends[turn]
        return found


@dataclass(frozen=True)
class Played:
    """The trajectories of a call, those of a prompt together; `waited`: seconds in which nothing
    but environments was waited for."""

    groups: list[list[Episode]]
    waited: float


def play(
    actor: HybridActor,
    rows: Sequence[Mapping[str, Any]],
    environments: Environments,
    limits: TurnsConfig,
    params: SamplingParams,
    request_ids: Sequence[int],
    ended: Callable[[int, int, Episode], None] | None = None,
) -> Played:
    """Play `params.n` trajectories of each data row.

    Args:
        actor: the policy. Its ranks divide the rows, and each gets all trajectories.
        rows: the prompt and the other columns of each row.
        limits: how long trajectories may be; `params.max_new_tokens` limits one turn.
        request_ids: number of each row, by which draws are keyed, those of environments too.
        ended: called with the index of the row, the number of the sample and the trajectory, as
            soon as it has ended; of several ranks each calls it with its own.
    Raises:
        RewardError, SetupError: no environment can be asked any more.
        TypeError, ValueError: as `HybridActor.generate`.
    """
    ranks = actor.ranks
    mine = range(ranks.rank, len(rows), ranks.size)
    table = _Table(actor, environments, limits, params, ended)
    for index in mine:
        for sample in range(params.n):
            table.begin(_Trajectory(index, sample, request_ids[index], dict(rows[index])))
    own = table.play()
    if ranks.size == 1:
        return Played([own[i] for i in mine], table.waited)
    outs = [[one.completion for one in own[index]] for index in mine]
    told = [[asdict(replace(one, completion=None)) for one in own[index]] for index in mine]  # type: ignore[arg-type]
    groups: list[list[Episode]] = [[] for _ in rows]
    for rank, (completions, theirs) in enumerate(
        zip(gathered(ranks, outs), ranks.gather("trajectories", told), strict=True)
    ):
        for index, group, facts in zip(
            range(rank, len(rows), ranks.size), completions, theirs, strict=True
        ):
            groups[index] = [
                Episode(**(fact | {"completion": completion}))
                for completion, fact in zip(group, facts, strict=True)
            ]
            ranks.drawn[rank] += sum(len(completion.actions) for completion in group)
    return Played(groups, table.waited)


class _Trajectory:
    """One trajectory on its way."""

    def __init__(self, index: int, sample: int, request_id: int, row: dict[str, Any]) -> None:
        self.index, self.sample, self.request_id, self.row = index, sample, request_id, row
        self.name = f"{request_id}/{sample}"
        self.future: Future[dict[str, Any]] | None = None
        self.prompt: str | Messages = row["prompt"]
        self.completion = Completion([], [], [], "", "aborted", [], sample)
        self.messages: Messages = []
        self.texts: list[str] = []
        self.digests: list[str] = []
        self.rewards: list[float] = []
        self.ends: list[int] = []
        self.states: list[int] = []
        self.info: dict[str, float] = {}
        self.invalid = ""

    @property
    def length(self) -> int:
        return len(self.completion.prompt_ids) + len(self.completion.token_ids)

    def request(self, seed: int) -> dict[str, Any]:
        """Return what the environment is asked. The first seed is the same for all trajectories of
        a prompt, so that they begin alike."""
        later = [
            key_of(seed, self.request_id, self.sample, turn) for turn in range(len(self.texts))
        ]
        return {
            "trajectory": self.name,
            "row": self.row,
            "texts": self.texts,
            "seeds": [key_of(seed, self.request_id, "reset"), *later],
            "answers": self.digests,
        }

    def episode(self) -> Episode:
        completion = self.completion
        if completion.action_mask is None:
            completion = replace(completion, action_mask=[True] * len(completion.token_ids))
        return Episode(
            self.prompt,
            completion,
            self.messages,
            self.rewards,
            self.ends,
            self.states,
            self.invalid,
            self.info,
        )


class _Table:
    """The trajectories of one call on one rank: those whose environment is asked, and those whose
    turn is generated.

    Attributes:
        waited: seconds in which only environments were waited for.
    """

    def __init__(
        self,
        actor: HybridActor,
        environments: Environments,
        limits: TurnsConfig,
        params: SamplingParams,
        ended: Callable[[int, int, Episode], None] | None,
    ) -> None:
        self._actor, self._environments, self._params = actor, environments, params
        self._limits, self._ended = limits, ended
        positions = actor.decoder.config.max_positions
        self._longest = min(limits.max_length or positions, positions)
        self._most = limits.max_total_tokens or limits.max_turns * params.max_new_tokens
        self._asked: list[_Trajectory] = []
        self._call = actor.open_call()
        self._drawing: dict[int, _Trajectory] = {}
        self._over: dict[int, list[_Trajectory]] = {}
        self.waited = 0.0

    def begin(self, one: _Trajectory) -> None:
        """Ask for the prompt of a trajectory."""
        self._over.setdefault(one.index, []).append(one)
        self._ask(one)

    def play(self) -> dict[int, list[Episode]]:
        """Play all trajectories to their ends. Return those of each row in the order of samples."""
        count = sum(map(len, self._over.values()))
        self._actor.activity.begin("playing", "trajectories", count)
        try:
            while self._asked or self._drawing:
                self._draw([one for one in self._answered() if self._take(one)])
                for number, completion in self._call.step() if self._drawing else ():
                    self._drew(self._drawing.pop(number), completion)
        finally:
            self._call.close()
        return {index: [one.episode() for one in group] for index, group in self._over.items()}

    # ---- the environment
    def _ask(self, one: _Trajectory) -> None:
        one.future = self._environments.ask(one.request(self._params.seed))
        self._asked.append(one)

    def _answered(self) -> list[_Trajectory]:
        """Return trajectories that have their answer and may go on."""
        if not self._asked or (self._drawing and not self._actor.strict):
            return []
        futures = [one.future for one in self._asked if one.future is not None]
        began = time.perf_counter()
        wait(
            futures,
            0 if self._drawing else None,
            FIRST_COMPLETED if self._actor.strict else ALL_COMPLETED,
        )
        self.waited += time.perf_counter() - began
        done = [one for one in self._asked if one.future is not None and one.future.done()]
        self._asked = [one for one in self._asked if one not in done]
        return done

    def _take(self, one: _Trajectory) -> bool:
        """Take an environment's answer. Return whether the policy has another turn."""
        if one.future is None:
            raise RuntimeError("turns: a trajectory was not asked for")
        told = one.future.result()
        if "lost" in told:
            return self._leave(one, told["lost"])
        answer = told["value"]
        one.digests.append(answer["digest"])
        try:
            more = self._step(one, answer) if one.texts else self._reset(one, answer)
        except DataError as error:
            return self._leave(one, str(error))
        return more

    def _reset(self, one: _Trajectory, answer: Mapping[str, Any]) -> bool:
        one.prompt = answer["prompt"]
        ids = encode_prompt(self._actor.tokenizer, one.prompt, self._tools(one))
        if len(ids) >= self._longest:
            return self._leave(
                one,
                f"its prompt has {len(ids)} tokens, and the most of a trajectory are "
                f"{self._longest}",
            )
        one.completion = replace(one.completion, prompt_ids=ids)
        if self._actor.value_head is not None:
            one.completion = replace(one.completion, values=[])
        if self._params.return_kept:
            one.completion = replace(one.completion, kept=[])
        one.states.append(_number(one.prompt))
        return True

    def _step(self, one: _Trajectory, answer: Mapping[str, Any]) -> bool:
        one.rewards.append(answer["reward"])
        for name, number in answer["info"].items():
            one.info[name] = one.info.get(name, 0.0) + number
        if answer["done"]:
            return self._finish(one, "stop")
        if len(one.texts) >= self._limits.max_turns or self._room(one) < 1:
            return self._finish(one, "length")
        said, told = answer["observation"], isinstance(one.prompt, str)
        if told and not isinstance(said, str):
            return self._leave(
                one, "expected a text as observation, since the prompt is one, got messages"
            )
        turn = (
            said if told else [{"role": "user", "content": said}] if isinstance(said, str) else said
        )
        ids = self._between(one, turn)
        if not ids:
            return self._leave(one, "expected an observation with a token, got an empty text")
        if one.length + len(ids) >= self._longest:
            return self._finish(one, "length")
        one.completion = self._actor.extend(one.completion, ids)
        if not isinstance(turn, str):
            one.messages += turn
        one.states.append(_number(said))
        return True

    def _between(self, one: _Trajectory, turn: str | Messages) -> list[int]:
        """Return the tokens between the last turn of the policy and its next."""
        ended = one.completion.finish_reason == "stop"
        before = one.prompt if isinstance(one.prompt, list) else []
        return encode_turn(
            self._actor.tokenizer,
            [*before, *one.messages[:-1]],
            turn,
            one.completion.token_ids[-1] if ended else None,
            self._tools(one),
        )

    def _tools(self, one: _Trajectory) -> list[dict[str, Any]] | None:
        """Return the schemas that the chat template shows: those of the run, or of the data."""
        return self._environments.schemas or one.row.get("tools")

    # ---- the policy
    def _room(self, one: _Trajectory) -> int:
        """Return how many tokens the next turn may have."""
        left = self._most - len(one.completion.actions)
        return min(self._params.max_new_tokens, left, self._longest - one.length)

    def _draw(self, ready: Sequence[_Trajectory]) -> None:
        """Begin the next turns. First turns of a prompt share what is computed of it."""
        groups: list[list[_Trajectory]] = []
        for one in sorted(ready, key=lambda one: (one.index, one.sample)):
            last = groups[-1][-1] if groups else None
            alike = (
                last is not None
                and not one.texts
                and not last.texts
                and (last.index, last.sample + 1) == (one.index, one.sample)
                and last.completion.prompt_ids == one.completion.prompt_ids
            )
            if alike:
                groups[-1].append(one)
            else:
                groups.append([one])
        if not groups:
            return
        numbers = self._call.add(
            [group[0].completion for group in groups],
            [
                replace(self._params, n=len(group), max_new_tokens=self._room(group[0]))
                for group in groups
            ],
            [group[0].request_id for group in groups],
        )
        each = [one for group in groups for one in group]
        self._drawing |= dict(zip(numbers, each, strict=True))

    def _drew(self, one: _Trajectory, completion: Completion) -> None:
        """Take a turn of the policy, and ask for the environment's answer."""
        drawn = len(completion.token_ids) - len(one.completion.token_ids)
        mask = [*(one.completion.action_mask or [True] * len(one.completion.token_ids))]
        before = [*completion.prompt_ids, *completion.token_ids[: len(mask)]]
        text = self._call.text(before, completion.token_ids[len(mask) :])
        one.completion = replace(completion, action_mask=[*mask, *([True] * drawn)])
        one.ends.append(len(completion.token_ids) - 1)
        one.texts.append(text)
        one.messages.append({"role": "assistant", "content": text})
        self._ask(one)

    # ---- ends
    def _leave(self, one: _Trajectory, why: str) -> bool:
        """End a trajectory that cannot be used."""
        one.invalid = why
        return self._finish(one, "aborted")

    def _finish(self, one: _Trajectory, reason: str) -> bool:
        one.completion = replace(one.completion, finish_reason=reason)
        if reason != "stop":
            self._environments.end(one.name)
        # a turn whose answer never came has earned nothing
        one.rewards += [0.0] * (len(one.ends) - len(one.rewards))
        self._actor.activity.done += 1
        if self._ended is not None:
            self._ended(one.index, one.sample, one.episode())
        return False


def _number(observation: Any) -> int:
    """Return a number that equal observations share."""
    return key_of(json.dumps(observation, sort_keys=True))


def describe(groups: Sequence[Sequence[Episode]], waited: float) -> dict[str, float]:
    """Return metrics of trajectories; of those that cannot be used only their number."""
    every = [one for group in groups for one in group]
    found = [one for one in every if not one.invalid]
    metrics = {
        "turns/failures": float(len(every) - len(found)),
        "timing/environment_wait": waited,
    }
    if not found:
        return metrics
    turns = [len(one.ends) for one in found]
    metrics |= {
        "turns/mean": math.fsum(turns) / len(turns),
        "turns/max": float(max(turns)),
        "turns/observation_tokens": math.fsum(one.observed for one in found) / len(found),
    }
    names = sorted({name for one in found for name in one.info})
    return metrics | {
        f"environment/{name}": math.fsum(one.info.get(name, 0.0) for one in found) / len(found)
        for name in names
    }
