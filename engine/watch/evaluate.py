"""Evaluation of a policy on given prompts with fresh samples: rewards, KL to a reference,
perplexity, length, repetition, pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fusedrl.engine.actor import HybridActor, Scored
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.estimates import Estimate, pass_at_k
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, TurnsConfig
from fusedrl.engine.data.readers import PromptExample
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.generation.drafts import Drafts
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.functions import Rollout
from fusedrl.engine.rewards.remote import Ahead, Key
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.rollout.repetition import ends_in_loop, repeated_share
from fusedrl.engine.rollout.rollout import params_of, scorable
from fusedrl.engine.rollout.sampled import Prompt, sample_prompts
from fusedrl.engine.rollout.turns import Episode

TOKENS_PER_FORWARD = 8192


class Scorer(Protocol):
    """Scorer of a batch, which gives its log-probabilities: an actor, or a run's reference."""

    def score(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> Scored: ...


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one policy: its completions of the prompts, and measurements of them. The
    samples of a prompt are next to one another. Standard errors are over prompts.

    Attributes:
        rewards: for each reward's name, the mean per completion and its standard error.
        kl: nats per completion, the sum over its tokens of log policy - log reference; nan without
            a reference.
        perplexity: perplexity of the completions under the reference, exp of the mean loss per
            token; nan without a reference.
        own_perplexity: perplexity of the completions under the policy itself.
        length: tokens per completion, the EOS included.
        ended: share of the completions that ended with a stop token, not at the length limit.
        repetition: share of a completion's token triples that occurred in it before.
        loops: share of the completions that end in a loop.
        completions: texts of the completions.
        scores: for each reward's name, the score of every completion.
        pass_at: for each k, the probability that at least one of k samples has the first reward.
            Empty unless that reward is always 0 or 1.
    """

    rewards: dict[str, Estimate]
    kl: Estimate
    perplexity: float
    own_perplexity: float
    length: Estimate
    ended: Estimate
    repetition: Estimate
    loops: Estimate
    completions: list[str]
    scores: dict[str, list[float]]
    pass_at: dict[int, Estimate]


@dataclass(frozen=True)
class Measured:
    """Fresh completions of a policy, the samples of a prompt next to one another, and what was
    measured of each.

    Attributes:
        scores: for each reward's name, the score of every completion; nan where it is invalid.
        kl: nats per completion, the sum over its tokens of log policy - log reference; None without
            a reference.
        loss, own_loss: nats per completion, the sum over its tokens of -log p under the reference
            (None without one) and under the policy.
        perplexity, own_perplexity: exp of the mean loss per token; nan without a reference.
    """

    completions: list[Completion]
    scores: dict[str, list[float]]
    kl: list[float] | None
    loss: list[float] | None
    own_loss: list[float]
    perplexity: float
    own_perplexity: float

    @property
    def lengths(self) -> list[float]:
        """Tokens of each completion, the EOS included."""
        return [float(len(c.actions)) for c in self.completions]

    @property
    def ended(self) -> list[float]:
        """Whether each completion ended with a stop token."""
        return [float(c.finish_reason == "stop") for c in self.completions]

    @property
    def written(self) -> list[list[int]]:
        """Tokens of each completion without the EOS."""
        return [
            c.actions[:-1] if c.finish_reason == "stop" else c.actions for c in self.completions
        ]


def measure(
    policy: HybridActor,
    reference: Scorer | None,
    prompts: Sequence[PromptExample],
    rewards: Mapping[str, RewardSet],
    generation: GenerationConfig,
    *,
    seed: int,
    samples: int = 1,
    request_ids: Sequence[int] | None = None,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    environments: Environments | None = None,
    turns: TurnsConfig | None = None,
    drafts: Drafts | None = None,
) -> Measured:
    """Sample completions of the prompts from the policy and measure each. Arguments, errors and
    side effects are those of `evaluate`."""
    ids = [
        encode_prompt(policy.tokenizer, example.prompt, example.columns.get("tools"))
        for example in prompts
    ]
    readied = [Prompt(e.prompt, own, e.columns) for e, own in zip(prompts, ids, strict=True)]
    numbers = list(range(len(ids))) if request_ids is None else list(request_ids)
    keys = [(seed, number, sample) for number in numbers for sample in range(samples)]
    names = sorted({name for example in prompts for name in example.columns})
    ahead = {name: found for name, one in rewards.items() if (found := one.ahead()) is not None}

    def ask(
        index: int, number: int, one: Prompt, completion: Completion, episode: Episode | None
    ) -> None:
        place = index * samples + number
        asked = scorable([(one, completion)], names, [episode])
        for calls in ahead.values():
            calls.add(place, asked, keys[place])

    params = params_of(generation, n=samples, seed=seed)
    sampled = sample_prompts(
        policy,
        readied,
        params,
        numbers,
        environments,
        turns,
        ask if ahead else None,
        drafts=drafts,
    )
    if drafts is not None:
        drafts.keep()
    flat = list(zip(sampled.prompts, sampled.completions, strict=True))
    batch = PackedBatch.from_completions(
        [p.ids for p, _ in flat], [[c] for _, c in flat], device=policy.decoder.device
    )
    parts, temperature = batch.split(tokens_per_forward), generation.temperature or 1.0
    # The cache is lent as in training, which also removes the prefixes cached here: the next
    # rollout cannot reuse them, so its bits do not depend on this evaluation.
    with policy.lend_cache():
        ours = policy.score(batch, temperature=temperature, partition=parts).logp
        theirs = (
            None
            if reference is None
            else reference.score(batch, temperature=temperature, partition=parts).logp
        )
    scores = _scores(rewards, scorable(flat, names, sampled.episodes), keys, ahead)
    return Measured(
        [completion for _, completion in flat],
        scores,
        None if theirs is None else _sums(ours - theirs, batch),
        None if theirs is None else _sums(-theirs, batch),
        _sums(-ours, batch),
        math.nan if theirs is None else _perplexity(theirs, batch),
        _perplexity(ours, batch),
    )


def evaluate(
    policy: HybridActor,
    reference: Scorer | None,
    prompts: Sequence[PromptExample],
    rewards: Mapping[str, RewardSet],
    generation: GenerationConfig,
    *,
    seed: int,
    samples: int = 1,
    request_ids: Sequence[int] | None = None,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    environments: Environments | None = None,
    turns: TurnsConfig | None = None,
    drafts: Drafts | None = None,
) -> Evaluation:
    """Sample completions of the prompts from the policy and measure them.

    Evaluation does not change later samples or gradients: cached prefixes are removed from the KV
    cache.

    Args:
        policy: the model to measure.
        reference: the model that KL and perplexity refer to; may be the policy itself.
        prompts: prompts with their columns, which the rewards receive. A prompt that occurs several
            times gets different samples each time.
        rewards: rewards by the name to report. The parts of a sum are reported as name/part.
        generation: how to sample. KL and perplexity are at its temperature.
        seed: seed of the samples.
        samples: number of samples per prompt.
        request_ids: a number for each prompt. Samples depend on it and the seed. Default: 0, 1, ...
        tokens_per_forward: most tokens of a micro-batch when scoring.
        environments: what answers the policy's turns; None: a completion is one turn. Trajectories
            whose environment failed are scored nan, and their tokens count up to there.
        turns: how long trajectories may be.
        drafts: what next tokens are guessed from: earlier evaluations on the same prompts.

    Raises:
        RewardError: a reward raised or did not return one value per completion.
        RuntimeError: the policy is still generating other completions.
    """
    found = measure(
        policy,
        reference,
        prompts,
        rewards,
        generation,
        seed=seed,
        samples=samples,
        request_ids=request_ids,
        tokens_per_forward=tokens_per_forward,
        environments=environments,
        turns=turns,
        drafts=drafts,
    )

    def estimate(values: Sequence[float]) -> Estimate:
        return Estimate.of(values, per=samples)

    return Evaluation(
        rewards={name: estimate(values) for name, values in found.scores.items()},
        kl=Estimate(math.nan, math.nan) if found.kl is None else estimate(found.kl),
        perplexity=found.perplexity,
        own_perplexity=found.own_perplexity,
        length=estimate(found.lengths),
        ended=estimate(found.ended),
        repetition=estimate([repeated_share(tokens) for tokens in found.written]),
        loops=estimate([float(ends_in_loop(tokens)) for tokens in found.written]),
        completions=[completion.text for completion in found.completions],
        scores=found.scores,
        pass_at=_pass_at(next(iter(found.scores.values())), samples) if found.scores else {},
    )


def _scores(
    rewards: Mapping[str, RewardSet],
    rollout: Rollout,
    keys: Sequence[Key],
    ahead: Mapping[str, Ahead],
) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for name, reward in rewards.items():
        found = reward.score(**vars(rollout), keys=keys, ahead=ahead.get(name))
        scores[name] = found.total
        if len(found.per_reward) > 1:
            scores |= {
                f"{name}/{part}": [math.nan if value is None else value for value in values]
                for part, values in found.per_reward.items()
            }
    return scores


def _pass_at(values: Sequence[float], samples: int) -> dict[int, Estimate]:
    """Estimate pass@k for k = 1, 2, 4, ... and `samples`; nothing if a value is not 0 or 1."""
    if not values or not set(values) <= {0.0, 1.0}:
        return {}
    counts = sorted({2**i for i in range(samples.bit_length())} | {samples})
    right = [int(sum(values[start : start + samples])) for start in range(0, len(values), samples)]
    return {k: Estimate.of([pass_at_k(c, samples, k) for c in right]) for k in counts}


def _perplexity(logp_N: Tensor, batch: PackedBatch) -> float:
    return math.exp(min(80.0, -logp_N[batch.action_mask].double().mean().item()))


def _sums(values_N: Tensor, batch: PackedBatch) -> list[float]:
    """Return for each sequence the sum of a column over its completion's tokens."""
    return [
        part.double().sum().item()
        for part in torch.where(batch.action_mask, values_N, 0.0).split(list(batch.lengths))
    ]


# ---- two policies side by side -------------------------------------------------------------------
def comparison(
    before: Evaluation,
    after: Evaluation,
    *,
    labels: Mapping[str, str] | None = None,
    kl_target: float | None = None,
) -> Table:
    """Return a table of both evaluations and their difference. `labels` gives names to show for
    rewards."""
    table = Table(
        title=f"{len(before.completions)} fresh samples each (mean ± standard error)",
        title_justify="left",
    )
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name in before.rewards:
        old, new = before.rewards[name], after.rewards[name]
        table.add_row((labels or {}).get(name, name), str(old), str(new), str(new.minus(old)))
    aim = f"{after.kl.mean / kl_target:.2f} x target {kl_target:g}" if kl_target else ""
    table.add_row("KL to the reference, nats per completion", str(before.kl), str(after.kl), aim)
    perplexities = before.perplexity, after.perplexity
    table.add_row(
        "perplexity under the reference",
        *(f"{p:.2f}" for p in perplexities),
        f"{perplexities[1] - perplexities[0]:+.2f}",
    )
    table.add_row(
        "length, tokens",
        str(before.length),
        str(after.length),
        str(after.length.minus(before.length)),
    )
    ended = before.ended.mean, after.ended.mean
    table.add_row(
        "ended by themselves",
        *(f"{share:.1%}" for share in ended),
        f"{100 * (ended[1] - ended[0]):+.1f} points",
    )
    return table


def side_by_side(
    prompts: Sequence[str], before: Evaluation, after: Evaluation, *, score: str, count: int
) -> Table:
    """Return a table of the first `count` prompts with one completion from each evaluation. Each
    completion is preceded by its reward named `score`."""
    table = Table(
        title=f"The same prompts before and after; in front the score: {score}",
        title_justify="left",
        show_lines=True,
    )
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for index in range(min(count, len(prompts))):
        table.add_row(
            Text(prompts[index].strip()),
            *(
                Text(f"{e.scores[score][index]:+.1f} {e.completions[index].strip()}")
                for e in (before, after)
            ),
        )
    return table
