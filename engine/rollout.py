"""Prompts -> completions -> scores: the batch that a policy step learns from."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.generation.generator import Completion
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.packing import PackedBatch
from fusedrl.engine.rewards import RewardError, RewardScores, RewardSet


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to generate from: as the data has it, its ids, and its row's other columns, which travel to the rewards."""

    prompt: Any
    ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Rollout:
    """One step's experience. `batch` has rollout_logp, weights_versions, scores and group_ids, and greedy_scores where asked for; `metrics` describe the
    completions and their rewards."""

    batch: PackedBatch
    prompts: list[Prompt]
    completions: list[Completion]
    metrics: dict[str, float]


def sampling_params(config: PolicyConfig) -> SamplingParams:
    """The sampler's settings of a policy run."""
    g = config.generation
    return SamplingParams(max_new_tokens=g.max_new_tokens, temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p,
                          n=config.samples_per_prompt, seed=config.run.seed, stop_token_ids=g.stop_token_ids)


def rollout(actor: HybridActor, prompts: Sequence[Prompt], rewards: RewardSet, config: PolicyConfig, *, first_request_id: int,
            greedy: bool = False) -> Rollout:
    """Generate `samples_per_prompt` completions of every prompt and score them.

    Request ids count on from `first_request_id`; the caller never reuses one, so repeated prompts differ and a replay is identical. They are the batch's
    group_ids. Samples whose reward is invalid (raised, NaN, of the wrong type) are left out of the batch, so that groups may differ in size.

    Args:
        greedy: complete and score every prompt once more, greedily; where that is invalid, the prompt's samples are.
    Raises:
        RewardError: more than `max_invalid_fraction` of the samples were invalid, or all of them.
    """
    request_ids = list(range(first_request_id, first_request_id + len(prompts)))
    outs = actor.generate([p.ids for p in prompts], sampling_params(config), request_ids=request_ids)
    flat = [(prompt, completion) for prompt, group in zip(prompts, outs, strict=True) for completion in group]
    ids = [request_id for request_id, group in zip(request_ids, outs, strict=True) for _ in group]
    scored = _score(rewards, flat)
    if len({i for i, _, _ in scored.invalid}) > config.max_invalid_fraction * len(flat):
        index, name, reason = scored.invalid[0]
        raise RewardError(f"{len({i for i, _, _ in scored.invalid})} of {len(flat)} samples have no valid reward, more than max_invalid_fraction = "
                          f"{config.max_invalid_fraction}; the first, sample {index}, by {name}: {reason}")
    best = _greedy(actor, prompts, rewards, config, request_ids) if greedy else dict.fromkeys(request_ids, 0.0)
    valid = [i for i, total in enumerate(scored.total) if math.isfinite(total) and math.isfinite(best[ids[i]])]
    if not valid:
        raise RewardError(f"none of the {len(flat)} samples has a valid reward; the first: "
                          + (scored.invalid[0][2] if scored.invalid else "that of the greedy completion"))
    kept = [flat[i] for i in valid]
    cut = [completion.finish_reason != "stop" for _, completion in kept]
    scores = torch.tensor([_placed(scored.total[i], c, config) for i, (_, c) in zip(valid, kept, strict=True)], dtype=torch.float32)
    groups = torch.tensor([ids[i] for i in valid])
    batch = PackedBatch.from_completions([p.ids for p, _ in kept], [[c] for _, c in kept], device=actor.decoder.device)
    batch = batch.with_columns(scores=scores.to(batch.device), group_ids=groups.to(batch.device))
    if greedy:
        batch = batch.with_columns(greedy_scores=torch.tensor([best[ids[i]] for i in valid], dtype=torch.float32, device=batch.device))
    return Rollout(batch, [p for p, _ in kept], [c for _, c in kept], _describe(scores, groups, cut, kept, scored.per_reward, len(flat) - len(kept), config))


def _score(rewards: RewardSet, flat: Sequence[tuple[Prompt, Completion]]) -> RewardScores:
    columns = {name: [prompt.columns.get(name) for prompt, _ in flat] for name in sorted({name for prompt, _ in flat for name in prompt.columns})}
    return rewards.score([p.prompt for p, _ in flat], [c.text for _, c in flat], [p.ids for p, _ in flat], [c.token_ids for _, c in flat], columns)


def _placed(total: float, completion: Completion, config: PolicyConfig) -> float:
    """A completion's score: its reward, less what not ending costs."""
    return total - (config.missing_eos_penalty if completion.finish_reason != "stop" else 0.0)


def _greedy(actor: HybridActor, prompts: Sequence[Prompt], rewards: RewardSet, config: PolicyConfig, request_ids: Sequence[int]) -> dict[int, float]:
    """The score of every prompt's greedy completion, by request id."""
    outs = actor.generate([p.ids for p in prompts], replace(sampling_params(config), temperature=0.0, n=1), request_ids=request_ids)
    flat = [(prompt, completion) for prompt, (completion,) in zip(prompts, outs, strict=True)]
    totals = _score(rewards, flat).total
    return {request_id: _placed(total, completion, config) for request_id, total, (_, completion) in zip(request_ids, totals, flat, strict=True)}


def _describe(scores: torch.Tensor, groups: torch.Tensor, cut: list[bool], kept: list[tuple[Prompt, Completion]],
              per_reward: dict[str, list[float | None]], invalid: int, config: PolicyConfig) -> dict[str, float]:
    lengths = torch.tensor([len(c.token_ids) for _, c in kept], dtype=torch.float32)
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(cut) / len(cut),
        "completions/invalid": float(invalid),
    }
    if config.samples_per_prompt > 1:
        metrics["frac_reward_zero_std"] = _flat(scores, groups).float().mean().item()
    for name, values in per_reward.items():
        numbers = [v for v in values if v is not None and math.isfinite(v)]
        if numbers:
            metrics[f"rewards/{name}/mean"] = sum(numbers) / len(numbers)
    return metrics


def _flat(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[G] bool: of each group, whether all its scores are the same. Groups lie together."""
    lengths = torch.unique_consecutive(groups, return_counts=True)[1]
    return torch.segment_reduce(scores, "max", lengths=lengths) == torch.segment_reduce(scores, "min", lengths=lengths)
