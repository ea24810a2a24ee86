"""How a policy does on given prompts, with fresh samples: rewards, KL to a reference, perplexity under the reference, length."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import PromptExample
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.packing import PackedBatch
from fusedrl.engine.rewards import RewardSet

TOKENS_PER_FORWARD = 8192


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of independent values; those that are not finite are left out. The error of fewer than two is nan."""
        kept = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
        spread = kept.std().item() if kept.numel() > 1 else math.nan
        return cls(kept.mean().item(), spread / math.sqrt(max(1, kept.numel())))

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates."""
        return Estimate(self.mean - other.mean, math.hypot(self.error, other.error))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Evaluation:
    """One policy's completions of the prompts, one each, and what they measure.

    rewards: by name, per completion the mean and its standard error. kl: nats per completion, the sum over its tokens of log policy - log reference.
    perplexity: of the completions under the reference, exp of its mean loss per token. length: tokens, the EOS included. ended: the share that ended
    by itself. scores: per completion, by name.
    """

    rewards: dict[str, Estimate]
    kl: Estimate
    perplexity: float
    length: Estimate
    ended: float
    completions: list[str]
    scores: dict[str, list[float]]


def evaluate(policy: HybridActor, reference: HybridActor, prompts: Sequence[PromptExample], rewards: Mapping[str, RewardSet],
             generation: GenerationConfig, *, seed: int) -> Evaluation:
    """Sample one completion per prompt from the policy and measure it.

    Args:
        policy: what is measured. reference: what KL and perplexity refer to; may be the policy itself.
        prompts: with their columns, which travel to the rewards; one that comes several times gets as many different samples.
        rewards: by the name they are reported under.
        generation: how to sample; KL and perplexity are of the distributions at its temperature.
        seed: of the samples.

    Raises:
        RewardError: a reward raised or did not return one value per completion.
    """
    g = generation
    ids = [encode_prompt(policy.tokenizer, example.prompt) for example in prompts]
    params = SamplingParams(max_new_tokens=g.max_new_tokens, temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p, seed=seed,
                            stop_token_ids=g.stop_token_ids)
    outs = policy.generate(ids, params)
    completions = [out[0] for out in outs]
    batch = PackedBatch.from_completions(ids, outs, device=policy.decoder.device)
    parts = batch.split(TOKENS_PER_FORWARD)
    ours, theirs = (actor.score(batch, temperature=g.temperature or 1.0, partition=parts).logp for actor in (policy, reference))
    texts = [completion.text for completion in completions]
    columns = {name: [example.columns.get(name) for example in prompts] for name in sorted({name for example in prompts for name in example.columns})}
    scores = {name: reward.score([example.prompt for example in prompts], texts, ids, [c.token_ids for c in completions], columns).total
              for name, reward in rewards.items()}
    return Evaluation({name: Estimate.of(values) for name, values in scores.items()}, Estimate.of(_sums(ours - theirs, batch)),
                      math.exp(-theirs[batch.action_mask].double().mean().item()), Estimate.of([len(c.token_ids) for c in completions]),
                      sum(c.finish_reason == "stop" for c in completions) / len(completions), texts, scores)


def _sums(values_N: Tensor, batch: PackedBatch) -> list[float]:
    """[B] sums of an action column over each sequence."""
    return [part.double().sum().item() for part in torch.where(batch.action_mask, values_N, 0.0).split(list(batch.lengths))]


# ---- two policies side by side ------------------------------------------------------------------------------------------------
def comparison(before: Evaluation, after: Evaluation, *, labels: Mapping[str, str] | None = None, kl_target: float | None = None) -> Table:
    """A table of both and their difference. `labels`: what to call the rewards."""
    table = Table(title=f"{len(before.completions)} fresh samples each (mean ± standard error)", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name in before.rewards:
        old, new = before.rewards[name], after.rewards[name]
        table.add_row((labels or {}).get(name, name), str(old), str(new), str(new.minus(old)))
    aim = f"{after.kl.mean / kl_target:.2f} x target {kl_target:g}" if kl_target else ""
    table.add_row("KL to the reference, nats per completion", str(before.kl), str(after.kl), aim)
    perplexities = before.perplexity, after.perplexity
    table.add_row("perplexity under the reference", *(f"{p:.2f}" for p in perplexities), f"{perplexities[1] - perplexities[0]:+.2f}")
    table.add_row("length, tokens", str(before.length), str(after.length), str(after.length.minus(before.length)))
    table.add_row("ended by themselves", f"{before.ended:.1%}", f"{after.ended:.1%}", f"{100 * (after.ended - before.ended):+.1f} points")
    return table


def side_by_side(prompts: Sequence[str], before: Evaluation, after: Evaluation, *, score: str, count: int) -> Table:
    """The first `count` completions of both, the reward `score` in front."""
    table = Table(title=f"The same prompts before and after; in front the score: {score}", title_justify="left", show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for index in range(min(count, len(prompts))):
        table.add_row(Text(prompts[index].strip()), *(Text(f"{e.scores[score][index]:+.1f} {e.completions[index].strip()}") for e in (before, after)))
    return table
