"""Rewards: Python functions with TRL's contract, reward-model directories, and weighted sums of
several.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]
            sync or async; None: the reward does not apply to this sample

A sample's value may be a list instead of a number. The list holds one number per token, or, for
rewards of reasoning steps, pairs (number of characters of the completion up to the end of the step,
reward of the step). Where one number is needed, as in group methods, the sum of the list is the
sample's score; `RewardScores.tokens` gives the part of each token.

If a prompt is a list of messages, its completion is passed as a list of messages too, as in TRL. A
function without **kwargs receives only the arguments that it names. A reward that raises, or does
not return one value per completion, stops the run. A single value that is not a finite number makes
its sample invalid; it never counts as 0. In worker processes (`remote`) a call is of one
completion, and one that fails makes its sample invalid.

One file: a reward's protocol, its loading, and the error messages for its mistakes.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedrl.engine.base.blame import Invalid, blame, shown
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.data.records import Messages, Prompt
from fusedrl.engine.data.sources import Data
from fusedrl.engine.data.tokenize import encode_completion, encode_prompt, end_of_text
from fusedrl.engine.parallel.lanes import costs_of, deal
from fusedrl.engine.parallel.ranks import ALONE, Ranks
from fusedrl.engine.rewards.functions import (
    FunctionReward,
    Reward,
    Rollout,
    check_columns,
    load_function,
    number_of,
    values_of,
)
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.ready import Ready, ready
from fusedrl.engine.rewards.remote import Ahead, Found, Key, WorkerReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_FORWARD = 8192
CONTEXT = 4  # last tokens of the prompt that are decoded together with a completion


@dataclass(frozen=True)
class RewardScores:
    """Scores of B completions.

    Attributes:
        total: [B] weighted sums, NaN where invalid.
        per_reward: {name: [B]} values, None where a reward does not apply, NaN where it is invalid.
        invalid: (index of the completion, name of the reward, reason) of each invalid value.
        tokens: [B] lists with the part of the total that accrued at each token; None if no reward
            of the completion is per token.
        lost: calls in worker processes that raised, were late or lost their process.
        waited: seconds in which nothing but those calls was waited for.
    """

    total: list[float]
    per_reward: dict[str, list[float | None]]
    invalid: list[tuple[int, str, str]]
    tokens: list[list[float] | None]
    lost: int = 0
    waited: float = 0.0


# ---- several rewards -----------------------------------------------------------------------------
class RewardSet:
    """Weighted sum of rewards. Names are made unique, since metrics are filed under them.

    Args:
        ranks: ranks that call `score` together, with the same arguments. Each rank scores a part of
            the completions (all those of a prompt together) and gets all scores. A reward sees only
            its rank's part.
    Raises:
        RewardError: no reward, or the numbers of weights and rewards differ.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.weights = (
            [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        )
        if not rewards or len(self.weights) != len(rewards):
            raise RewardError(
                f"expected at least one reward and one weight for each, got {len(rewards)} rewards "
                f"and {len(self.weights)} weights"
            )
        self.rewards = list(rewards)
        self.names: list[str] = []
        for reward in rewards:
            taken = sum(
                name == reward.name or name.startswith(f"{reward.name}#") for name in self.names
            )
            self.names.append(f"{reward.name}#{taken + 1}" if taken else reward.name)
        self._remote = {
            name: reward
            for name, reward in zip(self.names, self.rewards, strict=True)
            if isinstance(reward, WorkerReward)
        }

    def place(self, name: str) -> str:
        """Return where the reward of this name is written, file:line; "" if it is not known."""
        known = dict(zip(self.names, self.rewards, strict=True))
        return getattr(known.get(name), "place", "")

    @property
    def runs_elsewhere(self) -> bool:
        """Whether some reward runs in worker processes."""
        return bool(self._remote)

    def ahead(self) -> Ahead | None:
        """Return what completions are given to as they finish, so that worker processes score them
        while others are generated; `score` takes it. None if no reward runs in worker processes."""
        return Ahead(self._remote) if self._remote else None

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Messages],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        earned: Sequence[Any] | None = None,
        *,
        keys: Sequence[Key] | None = None,
        ahead: Ahead | None = None,
        most_lost: float = math.inf,
    ) -> RewardScores:
        """Score B completions. Every argument has one entry per completion (a prompt with n samples
        is repeated n times).

        Args:
            earned: of trajectories, what an EnvironmentReward among the rewards gives.
            keys: of each completion, what the draws of rewards in worker processes are seeded by;
                by default its index.
            ahead: what completions were given to before, of this rank or of all.
            most_lost: with so many completions that failed in worker processes the others are still
                waited for.
        Raises:
            RewardError: a reward raised, or did not return one value per completion. The message
                names the reward and the cause. Or too many failed in worker processes.
        """
        rollout = Rollout(prompts, completions, prompt_ids, completion_ids, columns or {}, earned)
        for what, column in (
            ("prompts", prompts),
            ("prompt_ids", prompt_ids),
            ("completion_ids", completion_ids),
            *rollout.columns.items(),
        ):
            if len(column) != len(completions):
                raise RewardError(
                    f"rewards: expected {len(completions)} entries in {what}, one per completion, "
                    f"got {len(column)}"
                )
        cuts, rank = self._cuts(rollout), self.ranks.rank
        remote, lost, waited = self._of_workers(
            rollout,
            range(cuts[rank], cuts[rank + 1]),
            keys or [(index,) for index in range(len(completions))],
            ahead,
            most_lost,
        )
        found = (
            self._score(rollout, remote)
            if self.ranks.size == 1
            else self._divided(rollout, remote, cuts)
        )
        return replace(found, lost=lost, waited=waited)

    def _cuts(self, rollout: Rollout) -> list[int]:
        """Return the first completion of each rank's part, and the number of all. Completions of a
        prompt stay together."""
        count, size = len(rollout.completions), self.ranks.size
        starts = [
            i for i in range(count) if i == 0 or rollout.prompt_ids[i] != rollout.prompt_ids[i - 1]
        ] + [count]
        return [starts[len(starts[1:]) * r // size] for r in range(size + 1)]

    def _of_workers(
        self,
        rollout: Rollout,
        part: Iterable[int],
        keys: Sequence[Key],
        ahead: Ahead | None,
        most_lost: float,
    ) -> tuple[dict[str, list[Any]], int, float]:
        """Return the values of the rewards that run in worker processes, of all completions; how
        many calls were lost, and the seconds waited here. Each rank has those asked for that it
        has generated; without `ahead` those of its part."""
        if not self._remote:
            return {}, 0, 0.0
        if ahead is None:
            ahead = Ahead(self._remote)
            for index in part:
                ahead.add(index, rollout.part(index, index + 1), keys[index])
        found = ahead.collect(most_lost)
        told = self.ranks.gather("rewards of worker processes", found.to_json())
        values: dict[str, list[Any]] = {
            name: [None] * len(rollout.completions) for name in self._remote
        }
        for theirs in map(Found.from_json, told):
            for name, own in theirs.values.items():
                for index, value in zip(theirs.indices, own, strict=True):
                    values[name][index] = value
        return values, sum(theirs["lost"] for theirs in told), found.waited

    def _divided(
        self, rollout: Rollout, remote: Mapping[str, list[Any]], cuts: Sequence[int]
    ) -> RewardScores:
        """Return the scores of all ranks' parts, concatenated."""
        rank = self.ranks.rank
        mine = rollout.part(cuts[rank], cuts[rank + 1])
        nothing = RewardScores([], {name: [] for name in self.names}, [], [])
        known = {name: values[cuts[rank] : cuts[rank + 1]] for name, values in remote.items()}
        known |= {
            name: reward(rollout, self.ranks)[cuts[rank] : cuts[rank + 1]]
            for name, reward in zip(self.names, self.rewards, strict=True)
            if isinstance(reward, ModelReward)
        }
        found = self._score(mine, known) if len(mine.completions) else nothing
        parts = [RewardScores(**told) for told in self.ranks.gather("rewards", asdict(found))]
        return RewardScores(
            [x for part in parts for x in part.total],
            {name: [x for part in parts for x in part.per_reward[name]] for name in self.names},
            [
                (first + index, name, reason)
                for first, part in zip(cuts, parts, strict=False)
                for index, name, reason in part.invalid
            ],
            [x for part in parts for x in part.tokens],
        )

    def _score(
        self, rollout: Rollout, known: Mapping[str, list[Any]] | None = None
    ) -> RewardScores:
        completions = rollout.completions
        per_reward: dict[str, list[float | None]] = {}
        invalid: list[tuple[int, str, str]] = []
        tokens: list[list[float] | None] = [None] * len(completions)
        for name, weight, reward, returned in zip(
            self.names, self.weights, self.rewards, self._call(rollout, known or {}), strict=True
        ):
            per_reward[name] = []
            for index, value in enumerate(
                values_of(f"reward {name!r}", returned, len(completions))
            ):
                spread = _spread(value, reward, rollout, index) if _is_list(value) else None
                if isinstance(spread, list):
                    tokens[index] = [
                        a + weight * b
                        for a, b in zip(tokens[index] or [0.0] * len(spread), spread, strict=True)
                    ]
                number, reason = number_of(
                    value
                    if spread is None
                    else math.fsum(spread)
                    if isinstance(spread, list)
                    else spread
                )
                per_reward[name].append(number)
                if reason:
                    invalid.append((index, name, reason))
        total = []
        for index in range(len(completions)):
            parts = [
                weight * value
                for weight, name in zip(self.weights, self.names, strict=True)
                if (value := per_reward[name][index]) is not None
            ]
            total.append(math.fsum(parts) if parts else math.nan)
            if not parts:
                invalid.append(
                    (
                        index,
                        ", ".join(self.names),
                        "no reward applies to this sample: all returned None",
                    )
                )
        return RewardScores(total, per_reward, invalid, tokens)

    def _call(self, rollout: Rollout, known: Mapping[str, list[Any]]) -> list[Any]:
        """Return what each reward returns, but for those whose values are known."""
        returned: list[Any] = []
        for name, reward in zip(self.names, self.rewards, strict=True):
            own = getattr(reward, "function", None)
            user = None if isinstance(own, Ready) else own
            call = partial(blame, f"reward {name!r}", partial(reward, rollout), function=user)
            returned.append(known[name] if name in known else _explained(reward, rollout, call))
        pending = [index for index, value in enumerate(returned) if inspect.isawaitable(value)]
        if pending:

            async def caught(value: Awaitable[Any]) -> Any:
                try:
                    return await value
                except BaseException as error:  # gather itself would let sys.exit through
                    return _Raised(error)

            async def gather() -> list[Any]:
                return await asyncio.gather(*(caught(returned[index]) for index in pending))

            # run in a separate thread: the caller may be inside an event loop, as in a notebook
            with ThreadPoolExecutor(1) as thread:
                for index, value in zip(
                    pending, thread.submit(asyncio.run, gather()).result(), strict=True
                ):
                    call = partial(blame, f"reward {self.names[index]!r}", partial(_value, value))
                    returned[index] = _explained(self.rewards[index], rollout, call)
        return returned


def _explained(reward: Reward, rollout: Rollout, call: Callable[[], Any]) -> Any:
    """Call, and let a function's reward explain the error that it raised."""
    try:
        return call()
    except RewardError as error:
        if not isinstance(reward, FunctionReward):
            raise
        raise reward.explained(error, rollout) from error.__cause__


@dataclass(frozen=True)
class _Raised:
    """Exception that an awaitable raised, in place of its value."""

    error: BaseException


def _value(value: Any) -> Any:
    if isinstance(value, _Raised):
        raise value.error
    return value


# ---- rewards of tokens and of steps --------------------------------------------------------------
def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (
        isinstance(value, torch.Tensor) and value.numel() != 1
    )


def _spread(value: Any, reward: Reward, rollout: Rollout, index: int) -> list[float] | Invalid:
    """Return a number for each token of the completion."""
    listed = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    ids, text = rollout.completion_ids[index], rollout.completions[index]
    steps = all(isinstance(step, list | tuple) and len(step) == 2 for step in listed)
    numbers: list[float] = []
    for worth in [step[1] for step in listed] if steps else listed:
        number, reason = number_of(worth)
        if number is None or reason:
            return Invalid(reason or "expected a number, got None in a list of rewards")
        numbers.append(number)
    if steps and not isinstance(text, str):
        return Invalid(
            "expected a number for each token of a trajectory, got rewards of steps, whose ends "
            "are counted in the characters of one text"
        )
    if not steps:
        if len(numbers) != len(ids):
            return Invalid(
                f"expected a number or None, got {shown(value)}; rewards of tokens are one for "
                f"each, {len(ids)} here"
            )
        return numbers
    spread = [0.0] * len(ids)
    for (end, _), number in zip(listed, numbers, strict=True):
        if not isinstance(end, int) or not 0 < end <= len(text):
            return Invalid(
                f"expected the end of a step within the {len(text)} characters of the completion, "
                f"got {shown(end)}"
            )
        spread[_token_at(reward, rollout.prompt_ids[index], ids, end)] += number
    return spread


def _token_at(reward: Reward, prompt_ids: Sequence[int], ids: Sequence[int], end: int) -> int:
    """Return the index of the token that completes the first `end` characters. The completion is
    decoded together with the last tokens of the prompt: alone, its first space may be lost."""
    tokenizer = getattr(reward, "policy_tokenizer", None)
    if tokenizer is None:
        raise RewardError(
            f"reward {reward.name!r} returned rewards of steps, and where a step ends is known in "
            "characters; give load_reward the policy's "
            "tokenizer, or return a number for each token"
        )
    before = list(prompt_ids[-CONTEXT:])

    def length(count: int) -> int:
        return len(tokenizer.decode([*before, *ids[:count]], skip_special_tokens=True))

    return min(len(ids) - 1, bisect_left(range(1, len(ids) + 1), length(0) + end, key=length))


def moved_rewards(
    batch: PackedBatch, tokens: Sequence[Sequence[float] | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [N] float32, the rewards of tokens with their sum subtracted at the last action of
    each sequence, and [B] float32, that sum.

    The score at the last action already contains that sum. Added to it, this column (shaped_gae's
    token_rewards) moves the rewards to the tokens where they accrued. The return of the whole
    sequence is the same with and without the column.
    """
    moved, mask, start = (
        torch.zeros(batch.num_tokens, dtype=torch.float64),
        batch.action_mask.cpu(),
        0,
    )
    totals = torch.zeros(batch.num_sequences, dtype=torch.float64)
    for b, (length, rewards) in enumerate(zip(batch.lengths, tokens, strict=True)):
        if rewards is not None:
            own = torch.zeros(length, dtype=torch.float64)
            own[length - len(rewards) :] = torch.tensor(rewards, dtype=torch.float64)
            acted = mask[start : start + length].nonzero()
            if len(acted):
                own[~mask[start : start + length]] = 0.0
                totals[b] = own.sum()
                own[acted[-1]] -= totals[b]
                moved[start : start + length] = own
        start += length
    return moved.float().to(batch.device), totals.float().to(batch.device)


# ---- one reward ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Named:
    """Reward function that was loaded, and the specification that names it, by which a worker
    process loads it too."""

    spec: str
    function: Callable[..., Any]


Specification = str | Path | Callable[..., Any] | Named


def load_reward(
    spec: Specification,
    *,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    workers: Workers | None = None,
) -> Reward:
    """Load a reward from `file.py:function`, a reward-model directory, the name of a ready reward
    with its options (`ready.READY`: `exact_match`, `length:target=200`), or a function.

    Args:
        device: device of a reward model.
        tokenizer: the policy's tokenizer. Rewards of steps use it to find the token where a step
            ends. A reward model with the same tokenizer reads the policy's token ids; otherwise it
            tokenises the texts.
        workers: processes in which a function that `spec` names runs, if there are any. What is
            given as a function runs in this process.

    Raises:
        RewardError: no such file, no such function, a failed import, an option that a ready reward
            does not have, or none of all these.
        ValueError, FileNotFoundError: the directory is not a reward model.
    """
    found: Callable[..., Any] | None
    if isinstance(spec, Named):
        found, spec = spec.function, spec.spec
    elif callable(spec):
        return FunctionReward(spec, tokenizer)
    else:
        found = load_function(str(spec))
    if found is not None:
        reward = FunctionReward(found, tokenizer)
        if workers is not None and workers.processes:
            return WorkerReward(reward, workers, str(spec))
        return reward
    return ModelReward(Path(spec), device=device, policy_tokenizer=tokenizer)


def load_functions(specs: Sequence[Specification], *data: Data) -> list[Specification]:
    """Load those of the rewards that are functions, so that what is wrong with one is told before a
    model is loaded. Return them, and the directories of reward models as they are, for
    `load_reward`.

    Args:
        data: prompts that the rewards will judge.
    Raises:
        RewardError: as `load_reward`; or a function needs a column that no row of the data has.
        ValueError, FileNotFoundError: a directory is not a reward model.
        DataError, OSError: the data cannot be read.
    """
    from fusedrl.engine.model.heads import check_reward_model

    found: list[Specification] = []
    for spec in specs:
        text = str(spec) if isinstance(spec, str | Path) else ""
        if text and ready(text) is None and Path(text).is_dir():
            check_reward_model(text)
            found.append(spec)
            continue
        reward = load_reward(spec)
        if isinstance(reward, FunctionReward):
            check_columns(reward, *data)
            found.append(Named(text, reward.function) if text else reward.function)
    return found


class ModelReward:
    """Reward model: the reward is its score at the last token of prompt and completion. Sequences
    longer than the model can read are invalid.

    Raises:
        ValueError, FileNotFoundError: the directory is not a reward model, or has no tokenizer with
            an EOS.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device | str | None = None,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        from fusedrl.engine.model.heads import load_reward_model
        from fusedrl.engine.model.weights import load_tokenizer

        self.name = directory.resolve().name
        self.model = load_reward_model(directory, device=device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(directory)
        if self.tokenizer is None:
            raise RewardError(
                f"reward {directory}: expected a tokenizer beside the reward model, got none; copy "
                "its tokenizer.json and "
                "tokenizer_config.json there"
            )
        self._policy_tokenizer = policy_tokenizer
        self._same = policy_tokenizer is not None and _identity(policy_tokenizer) == _identity(
            self.tokenizer
        )
        config = self.model.decoder.config
        self._limit = config.max_positions
        self._eos = end_of_text(self.tokenizer, config.eos_token_ids)

    @torch.no_grad()
    def __call__(self, rollout: Rollout, ranks: Ranks = ALONE) -> list[float | Invalid]:
        """Score a rollout. The given ranks divide its forward passes, which are cut alike on any
        number of ranks, so that the scores have the same bits."""
        pairs = (
            list(zip(rollout.prompt_ids, rollout.completion_ids, strict=True))
            if self._same
            else self._tokenize(rollout)
        )
        values: list[float | Invalid] = [
            Invalid(
                f"{len(prompt) + len(completion)} tokens, and the reward model {self.name!r} reads "
                f"at most {self._limit}"
            )
            for prompt, completion in pairs
        ]
        fitting = [
            index
            for index, (prompt, completion) in enumerate(pairs)
            if 0 < len(prompt) + len(completion) <= self._limit
        ]
        batch = PackedBatch.from_sequences(
            (pairs[index] for index in fitting), device=self.model.head.weight.device
        )
        parts = batch.split(TOKENS_PER_FORWARD)
        scores = torch.zeros(len(fitting), dtype=torch.float64, device=batch.device)
        for index in deal(costs_of(batch.lengths, parts), ranks.size)[ranks.rank]:
            scores[parts[index]] = self.model(batch.select(parts[index])).double()
        ranks.sum("scores of a reward model", scores)
        for index, value in zip(fitting, scores.tolist(), strict=True):
            values[index] = value
        return values

    def _tokenize(self, rollout: Rollout) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Tokenise the texts with the reward model's tokenizer, which differs from the policy's.
        Add an EOS where the policy ended its answer."""
        ends = (
            set(self._policy_tokenizer.all_special_ids)
            if self._policy_tokenizer is not None
            else None
        )
        pairs: list[tuple[Sequence[int], Sequence[int]]] = []
        tools = rollout.columns.get("tools", [None] * len(rollout.prompts))
        for prompt, text, ids, schemas in zip(
            rollout.prompts, rollout.completions, rollout.completion_ids, tools, strict=True
        ):
            if not isinstance(text, str):
                raise RewardError(
                    f"reward {self.name!r}: expected a reward model with the policy's tokenizer, "
                    "to judge trajectories of several turns, got one with another; use a function, "
                    "or a model of the same tokenizer"
                )
            completion = encode_completion(self.tokenizer, text, self._eos, first=not prompt)
            ended = ends is None or (len(ids) > 0 and ids[-1] in ends)
            pairs.append(
                (
                    encode_prompt(self.tokenizer, prompt, schemas),
                    completion if ended else completion[:-1],
                )
            )
        return pairs


def _identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the parts of a tokenizer that decide the ids of a text. Padding and truncation are
    left out, since calls switch them on and off."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab(), type(tokenizer)
    return {
        key: value
        for key, value in json.loads(backend.to_str()).items()
        if key not in ("padding", "truncation")
    }
