"""TRL trainers with completions from a HybridActor that shares the trained model's weights: nothing is copied, synchronised or re-tokenised.

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    actor = HybridActor.from_module(model, tokenizer)
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, rollout_func=rollout_func(actor), ...)
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.generation.sampler import SamplingParams


def rollout_func(actor: HybridActor, params: SamplingParams | None = None) -> Callable[[list[Any], Any], dict[str, list[Any]]]:
    """What TRL's `GRPOTrainer(rollout_func=...)` calls: f(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs"}, one completion a prompt.

    TRL repeats a prompt once for each of its completions; equal neighbours are prefilled once. `logprobs` are of the temperature-scaled distribution.

    Args:
        actor: shares the weights that the trainer trains (`HybridActor.from_module`), with the trainer's tokenizer.
        params: how to draw (its n is not used); None: as the trainer's arguments say (max_completion_length, temperature, top_p, top_k, min_p, seed).
    """
    calls = 0

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        nonlocal calls
        draw = params if params is not None else _as_the_trainer(trainer.args)
        groups = [(prompt, len(list(equal))) for prompt, equal in groupby(prompts)]
        ids = range(calls, calls + len(groups))  # never used again, so that equal prompts of two steps draw differently
        calls += len(groups)
        outs = actor.generate([prompt for prompt, _ in groups], [replace(draw, n=n) for _, n in groups], request_ids=list(ids))
        completions = [completion for samples in outs for completion in samples]
        return {"prompt_ids": [c.prompt_ids for c in completions], "completion_ids": [c.token_ids for c in completions],
                "logprobs": [c.logprobs for c in completions]}

    return rollout


def _as_the_trainer(arguments: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=arguments.max_completion_length, temperature=arguments.temperature, top_p=arguments.top_p,
                          top_k=arguments.top_k or 0, min_p=arguments.min_p or 0.0, seed=arguments.seed)
