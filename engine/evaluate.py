"""How a policy does on given prompts, with fresh samples: rewards, KL to a reference, perplexity under the reference, length. Nothing is trained here."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
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
        return cls(kept.mean().item(), (kept.std() / math.sqrt(kept.numel())).item())

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates."""
        return Estimate(self.mean - other.mean, math.hypot(self.error, other.error))


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


def evaluate(policy: HybridActor, reference: HybridActor, prompts: Sequence[PromptExample], rewards: Mapping[str, RewardSet], generation: GenerationConfig,
             *, seed: int) -> Evaluation:
    """Sample one completion per prompt from the policy and measure it.

    Args:
        policy: what is measured. reference: what KL and perplexity refer to; may be the policy itself.
        prompts: with their columns, which travel to the rewards.
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
