"""Prompts -> completions -> scores: how the batch that a policy step learns from is made.

    score = reward - missing_eos_penalty where the completion was cut off
            - overlong_penalty min(1, max(0, length - (max_new_tokens - overlong_buffer))
                                      / overlong_buffer)      (Yu et al., 2025, DAPO, eq. 13)

Dynamic sampling (same source, 3.2): a group whose rewards are all the same teaches nothing about
the task; it is dropped, and another prompt takes its place. The rewards are compared before
penalties for length and for a missing end: lengths alone do not make a group worth keeping.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.draws import generators_kept
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, RunConfig
from fusedrl.engine.config.turns import TurnsConfig
from fusedrl.engine.generation.drafts import Drafts
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.functions import Reward
from fusedrl.engine.rewards.functions import Rollout as Scorable
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.remote import Key
from fusedrl.engine.rewards.rewards import (
    RewardError,
    RewardScores,
    RewardSet,
    Specification,
    load_reward,
    moved_rewards,
)
from fusedrl.engine.rollout.repetition import (
    distinct_share,
    ends_in_loop,
    longest_run,
    repeated_share,
)
from fusedrl.engine.rollout.sampled import Prompt, sample_prompts
from fusedrl.engine.rollout.turns import Episode, Played, describe


class RolloutConfig(Protocol):
    """Configuration of sampling and scoring, shared by policy optimisation and rejection
    sampling."""

    @property
    def generation(self) -> GenerationConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def prompts_per_step(self) -> int: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def missing_eos_penalty(self) -> float: ...
    @property
    def overlong_buffer(self) -> int: ...
    @property
    def overlong_penalty(self) -> float: ...
    @property
    def refill_tries(self) -> int: ...
    @property
    def max_invalid_fraction(self) -> float: ...
    @property
    def turns(self) -> TurnsConfig: ...


@dataclass(frozen=True)
class Rollout:
    """One step's experience. `batch` has the columns rollout_logp, weights_versions, scores,
    group_ids and reward_parts, and greedy_scores if requested. `metrics` describe the completions
    and their rewards."""

    batch: PackedBatch
    prompts: list[Prompt]
    completions: list[Completion]
    metrics: dict[str, float]
    episodes: list[Episode | None] | None = None

    def samples(self, count: int) -> list[dict[str, Any]]:
        """Return the first `count` completions with their prompts and scores, as JSON values; of
        trajectories with their messages."""
        found = [
            {"prompt": p.prompt, "completion": c.text, "finish_reason": c.finish_reason, "score": s}
            for p, c, s in zip(
                self.prompts[:count],
                self.completions[:count],
                self.batch.column("scores")[:count].tolist(),
                strict=True,
            )
        ]
        for sample, one in zip(found, self.episodes or (), strict=False):
            if one is not None and one.messages and not isinstance(one.prompt, str):
                sample["messages"] = one.messages
        return found

    def cut_off(self) -> Tensor:
        """Return [B] bool: the completions that a limit of length ended."""
        cut_B = torch.tensor([one.finish_reason != "stop" for one in self.completions])
        return cut_B.to(self.batch.device)

    def whole(self) -> Tensor:
        """Return [N] bool: the actions of completions that were not cut off."""
        lengths = torch.tensor(self.batch.lengths, device=self.batch.device)
        return self.batch.action_mask & ~torch.repeat_interleave(self.cut_off(), lengths)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the length and the score of every completion, for histograms."""
        lengths = [len(completion.actions) for completion in self.completions]
        return {
            "completions/length": np.array(lengths, dtype=np.float64),
            "reward": self.batch.column("scores").double().cpu().numpy(),
        }


def reward_loader(workers: Workers, actor: HybridActor) -> Callable[[Specification], Reward]:
    """Return what loads a reward of the actor's completions, to run in the worker processes if it
    is a function."""
    return partial(
        load_reward, device=actor.decoder.device, tokenizer=actor.tokenizer, workers=workers
    )


def sampling_params(config: RolloutConfig) -> SamplingParams:
    """Return the sampling options that a configuration describes."""
    g, n = config.generation, config.samples_per_prompt
    return replace(params_of(g, n=n, seed=config.run.seed), return_kept=g.truncates)


def params_of(generation: GenerationConfig, *, n: int, seed: int) -> SamplingParams:
    """Return the parameters of n samples of each prompt."""
    return SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        min_p=generation.min_p,
        n=n,
        seed=seed,
        stop_token_ids=generation.stop_token_ids,
    )


@dataclass(frozen=True)
class Sample:
    """Completion with its rewards and score.

    Attributes:
        rewards: values by reward name; None if a reward does not apply.
        reward: weighted sum of the rewards; NaN if a reward is invalid.
        score: the reward minus penalties.
        greedy_reward, greedy_score: the same of the greedy completion of the prompt; 0 without one.
        tokens: part of the weighted sum that accrued at each token; None if no reward is per token.
        episode: the trajectory whose completion it is, in runs with an environment.
    """

    prompt: Prompt
    completion: Completion
    group: int
    rewards: dict[str, float | None]
    reward: float
    score: float
    greedy_reward: float
    greedy_score: float
    tokens: list[float] | None
    episode: Episode | None = None

    @property
    def parts(self) -> list[float]:
        """Rewards, NaN where one does not apply, and the penalties, which are negative."""
        values = [math.nan if value is None else value for value in self.rewards.values()]
        return [*values, self.score - self.reward]

    @property
    def valid(self) -> bool:
        """Whether the completion, and the greedy one of its prompt, could be scored."""
        return math.isfinite(self.score) and math.isfinite(self.greedy_score)


def rollout(
    actor: HybridActor,
    draw: Callable[[int], tuple[list[Prompt], int]],
    rewards: RewardSet,
    gold: RewardSet | None,
    config: RolloutConfig,
    environments: Environments | None = None,
    *,
    greedy: bool = False,
    drafts: Drafts | None = None,
) -> Rollout:
    """Generate `samples_per_prompt` completions of `prompts_per_step` prompts and score them.

    Samples with an invalid reward (raised, NaN, of the wrong type) are left out of the batch, so
    groups may differ in size. With `refill_tries`, groups whose rewards are all equal before
    penalties are left out, too. As many other prompts are drawn in their place, at most
    `refill_tries` times. If all groups are of this kind, the first ones stay. Metrics cover all
    valid samples, including those left out: the samples in the batch alone would misrepresent the
    policy.

    Args:
        draw: returns the given number of prompts, and the request id of the first. Ids count on
            from there and are never reused, so that repeated prompts get different completions and
            a replayed run gets the same ones. The ids become the batch's group_ids.
        greedy: complete and score every prompt once more, greedily. If that score is invalid, all
            samples of the prompt are invalid.
        gold: rewards that are only measured and reported, not trained on. Samples that such a
            reward cannot score are left out of its mean.
        environments: what answers the policy's turns (`play`); None: a completion is one turn. A
            trajectory whose environment fails is a sample without a valid reward.
        drafts: what next tokens are guessed from, and what is told of all completions.
    Raises:
        RewardError: more than `max_invalid_fraction` of the samples were invalid, or all of them.
    """
    samples: list[Sample] = []
    kept: list[Sample] = []
    invalid: list[tuple[int, str, str]] = []
    remote: Counter[str] = Counter()
    groups: list[list[Episode]] = []
    waited = 0.0
    for _ in range(1 + config.refill_tries):
        prompts, first = draw(config.prompts_per_step - len({sample.group for sample in kept}))
        found, scored, played = _generate(
            actor, prompts, rewards, config, first, greedy, environments, drafts
        )
        invalid += [(len(samples) + index, name, reason) for index, name, reason in scored.invalid]
        samples += found
        _check_valid(samples, invalid, config, rewards)
        if rewards.runs_elsewhere:
            remote.update(_of_workers(scored))
        if played is not None:
            groups, waited = groups + played.groups, waited + played.waited
        fine = [sample for sample in found if sample.valid]
        flat = _flat(fine, greedy, of="reward") if config.refill_tries else set()
        kept += [sample for sample in fine if sample.group not in flat]
        if len({sample.group for sample in kept}) == config.prompts_per_step:
            break
    most = config.prompts_per_step * config.samples_per_prompt
    kept = kept or [sample for sample in samples if sample.valid][:most]
    batch = _packed(kept, config, greedy, actor.decoder.device)
    metrics = _describe(samples, config, greedy) | _gold(gold, samples, config)
    metrics |= remote
    if drafts is not None:
        metrics |= drafts.metrics()
    if environments is not None:
        metrics |= describe(groups, waited)
    if config.refill_tries:
        metrics |= {
            "refill/generated_groups": float(len({s.group for s in samples})),
            "refill/kept_groups": float(len({s.group for s in kept})),
        }
    return Rollout(
        batch,
        [s.prompt for s in kept],
        [s.completion for s in kept],
        metrics,
        [s.episode for s in kept],
    )


def _packed(
    kept: Sequence[Sample], config: RolloutConfig, greedy: bool, device: torch.device
) -> PackedBatch:
    """Return the batch of samples, with the columns of a rollout."""
    batch = PackedBatch.from_completions(
        [s.prompt.ids for s in kept], [[s.completion] for s in kept], device=device
    )
    scores, greedy_scores = (
        torch.tensor(column, dtype=torch.float32)
        for column in zip(*((s.score, s.greedy_score) for s in kept), strict=True)
    )
    batch = batch.with_columns(
        scores=scores.to(batch.device),
        group_ids=torch.tensor([s.group for s in kept]).to(batch.device),
        reward_parts=torch.tensor([s.parts for s in kept], dtype=torch.float32).to(batch.device),
    )
    if any(s.tokens is not None for s in kept):
        moved, token_totals = moved_rewards(batch, [s.tokens for s in kept])
        batch = batch.with_columns(token_rewards=moved, token_totals=token_totals)
    if greedy:
        batch = batch.with_columns(greedy_scores=greedy_scores.to(batch.device))
    if config.turns.credit == "state":
        states = [x for s in kept if s.episode is not None for x in s.episode.turn_states]
        batch = batch.with_columns(turn_states=torch.tensor(states).to(batch.device))
    return batch


def _generate(
    actor: HybridActor,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    config: RolloutConfig,
    first_request_id: int,
    greedy: bool,
    environments: Environments | None,
    drafts: Drafts | None,
) -> tuple[list[Sample], RewardScores, Played | None]:
    """Return completions with their rewards, the scores as the rewards gave them, and trajectories
    if there are any."""
    request_ids = list(range(first_request_id, first_request_id + len(prompts)))
    n, seed, ahead = config.samples_per_prompt, config.run.seed, rewards.ahead()
    names = sorted({name for prompt in prompts for name in prompt.columns})

    def ask(
        index: int, number: int, one: Prompt, completion: Completion, episode: Episode | None
    ) -> None:
        if ahead is not None:
            key = (seed, request_ids[index], number)
            ahead.add(index * n + number, scorable([(one, completion)], names, [episode]), key)

    found = sample_prompts(
        actor,
        prompts,
        sampling_params(config),
        request_ids,
        environments,
        config.turns,
        None if ahead is None else ask,
        drafts,
    )
    flat = list(zip(found.prompts, found.completions, strict=True))
    actor.activity.begin(f"rewarding {len(flat)} completions")
    scored = _score(
        rewards,
        flat,
        episodes=found.episodes,
        ahead=ahead,
        most_lost=config.max_invalid_fraction * len(flat),
    )
    best = (
        _greedy_scores(actor, prompts, rewards, config, request_ids, drafts)
        if greedy
        else [(0.0, 0.0)] * len(prompts)
    )
    samples = [
        Sample(
            prompt,
            completion,
            request_ids[i // n],
            {name: values[i] for name, values in scored.per_reward.items()},
            scored.total[i],
            _placed(scored.total[i], completion, config),
            *best[i // n],
            scored.tokens[i],
            found.episodes[i],
        )
        for i, (prompt, completion) in enumerate(flat)
    ]
    return samples, scored, found.played


def _greedy_scores(
    actor: HybridActor,
    prompts: Sequence[Prompt],
    rewards: RewardSet,
    config: RolloutConfig,
    request_ids: Sequence[int],
    drafts: Drafts | None,
) -> list[tuple[float, float]]:
    """Return reward and score of each prompt's greedy completion."""
    single = actor.generate(
        [p.ids for p in prompts],
        replace(sampling_params(config), temperature=0.0, n=1),
        request_ids=request_ids,
        drafts=drafts,
    )
    pairs = [(prompt, completion) for prompt, (completion,) in zip(prompts, single, strict=True)]
    keys = [(config.run.seed, one, "greedy") for one in request_ids]
    totals = _score(rewards, pairs, keys).total
    return [
        (total, _placed(total, completion, config))
        for total, (_, completion) in zip(totals, pairs, strict=True)
    ]


def _of_workers(scored: RewardScores) -> dict[str, Any]:
    """Return metrics of rewards in worker processes."""
    return {"reward_failures": float(scored.lost), "timing/reward_wait": scored.waited}


def _check_valid(
    samples: Sequence[Sample],
    invalid: Sequence[tuple[int, str, str]],
    config: RolloutConfig,
    rewards: RewardSet,
) -> None:
    """Raise RewardError if too many of a step's samples so far are invalid, or all of them."""
    if (bad := len({index for index, _, _ in invalid})) > config.max_invalid_fraction * len(
        samples
    ):
        index, name, reason = invalid[0]
        place = rewards.place(name)
        raise RewardError(
            f"{bad} of {len(samples)} samples have no valid reward, more than max_invalid_fraction "
            f"= {config.max_invalid_fraction}; the first, sample {index}, by {name}"
            f"{place and f' ({place})'}: {reason}"
        )
    if not any(sample.valid for sample in samples):
        raise RewardError(
            f"none of the {len(samples)} samples has a valid reward; the first: "
            + (invalid[0][2] if invalid else "that of the greedy completion")
        )


def scorable(
    flat: Sequence[tuple[Prompt, Completion]],
    names: Iterable[str] | None = None,
    episodes: Sequence[Episode | None] | None = None,
) -> Scorable:
    """Return completions as rewards are given them, with the columns `names` of the data, by
    default all that a prompt has. Trajectories are given as all their messages, and with what they
    earned."""
    if names is None:
        names = sorted({name for prompt, _ in flat for name in prompt.columns})
    played = episodes or [None] * len(flat)
    return Scorable(
        [p.prompt for p, _ in flat],
        [c.text if one is None else one.shown for (_, c), one in zip(flat, played, strict=True)],
        [p.ids for p, _ in flat],
        [c.token_ids for _, c in flat],
        {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names},
        None
        if all(one is None for one in played)
        else [None if one is None else one.earned for one in played],
    )


def _score(
    rewards: RewardSet,
    flat: Sequence[tuple[Prompt, Completion]],
    keys: Sequence[Key] | None = None,
    episodes: Sequence[Episode | None] | None = None,
    **options: Any,
) -> RewardScores:
    return rewards.score(**vars(scorable(flat, episodes=episodes)), keys=keys, **options)


def _placed(total: float, completion: Completion, config: RolloutConfig) -> float:
    """Return a completion's score: its reward, minus the penalties for not ending and for its
    length."""
    score = total - (config.missing_eos_penalty if completion.finish_reason != "stop" else 0.0)
    if config.overlong_buffer:
        over = len(completion.token_ids) - (
            config.generation.max_new_tokens - config.overlong_buffer
        )
        score -= config.overlong_penalty * min(1.0, max(0.0, over / config.overlong_buffer))
    return score


def _flat(
    samples: Iterable[Sample], greedy: bool, of: Literal["reward", "score"] = "score"
) -> set[int]:
    """Return the groups whose scores, or rewards before penalties, are all the same. With `greedy`,
    that of the greedy completion counts as well."""
    found: dict[int, set[float]] = {}
    for sample in samples:
        group = found.setdefault(sample.group, set())
        group.add(getattr(sample, of))
        if greedy:
            group.add(getattr(sample, f"greedy_{of}"))
    return {group for group, values in found.items() if len(values) == 1}


def _describe(samples: Sequence[Sample], config: RolloutConfig, greedy: bool) -> dict[str, float]:
    valid = [sample for sample in samples if sample.valid]
    scores = torch.tensor([sample.score for sample in valid], dtype=torch.float32)
    lengths = torch.tensor(
        [len(sample.completion.actions) for sample in valid], dtype=torch.float32
    )
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std().item() if len(scores) > 1 else 0.0,
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(
            sample.completion.finish_reason != "stop" for sample in valid
        )
        / len(valid),
        "completions/invalid": float(len(samples) - len(valid)),
        **_repetition([sample.completion for sample in valid]),
    }
    if config.samples_per_prompt > 1 or greedy:
        metrics["frac_reward_zero_std"] = len(_flat(valid, greedy)) / len(
            {sample.group for sample in valid}
        )
    for name in samples[0].rewards:
        numbers = [
            value
            for sample in samples
            if (value := sample.rewards[name]) is not None and math.isfinite(value)
        ]
        if numbers:
            metrics[f"rewards/{name}/mean"] = sum(numbers) / len(numbers)
    return metrics


def _repetition(completions: Sequence[Completion]) -> dict[str, float]:
    written = [c.actions[:-1] if c.finish_reason == "stop" else c.actions for c in completions]
    return {
        "completions/repeated_trigrams": math.fsum(map(repeated_share, written)) / len(written),
        "completions/distinct_trigrams": distinct_share(written),
        "completions/loop_fraction": sum(map(ends_in_loop, written)) / len(written),
        "completions/longest_run": float(max(map(longest_run, written))),
    }


def _gold(
    gold: RewardSet | None, samples: Sequence[Sample], config: RolloutConfig
) -> dict[str, float]:
    if gold is None:
        return {}
    valid = [sample for sample in samples if sample.valid]
    with generators_kept():  # its random draws leave the process's generators unchanged
        scored = _score(
            gold,
            [(sample.prompt, sample.completion) for sample in valid],
            [(config.run.seed, sample.group, sample.completion.sample) for sample in valid],
            [sample.episode for sample in valid],
        )
    found = {
        name: [value for value in values if value is not None and math.isfinite(value)]
        for name, values in scored.per_reward.items()
    }
    return {
        f"gold/{name}/mean": math.fsum(values) / len(values)
        for name, values in found.items()
        if values
    }
