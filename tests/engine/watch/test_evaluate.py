"""Measuring a policy: against transformers' probabilities of the very completions, and where the
answer is known."""

import io
import math
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.estimates import Estimate
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import PromptExample
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.watch.evaluate import comparison, evaluate, side_by_side

GENERATION = GenerationConfig(max_new_tokens=12)


def length_reward(prompts, completions, completion_ids, bonus):
    return [len(ids) + extra for ids, extra in zip(completion_ids, bonus, strict=True)]


@pytest.fixture
def prompts() -> list[PromptExample]:
    return [PromptExample(f"w{i} w{i + 1}", {"bonus": float(i)}) for i in range(10)]


@pytest.fixture
def actors(tiny_model) -> tuple[HybridActor, HybridActor]:
    """The tiny model, and another not far from it."""
    reference, policy = (
        HybridActor.from_pretrained(tiny_model),
        HybridActor.from_pretrained(tiny_model),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    policy.mark_updated()
    return policy, reference


def test_estimate() -> None:
    estimate = Estimate.of([1.0, 2.0, math.nan, 6.0])
    assert estimate.mean == 3.0
    assert estimate.error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert estimate.minus(Estimate(1.0, 2.0)) == Estimate(2.0, math.hypot(estimate.error, 2.0))
    assert math.isnan(Estimate.of([1.0]).error)


def test_a_policy_is_at_no_distance_from_itself(actors, prompts) -> None:
    _, reference = actors
    found = evaluate(
        reference,
        reference,
        prompts,
        {"length": RewardSet([load_reward(length_reward)])},
        GENERATION,
        seed=0,
    )
    assert found.kl == Estimate(0.0, 0.0)
    # the rows' own columns reach the reward
    assert found.rewards["length"].mean == pytest.approx(found.length.mean + 4.5)
    assert 1 < found.perplexity < 32


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_and_perplexity_against_transformers(actors, prompts, tiny_model, temperature) -> None:
    policy, reference = actors
    generation = GenerationConfig(max_new_tokens=12, temperature=temperature)
    found = evaluate(
        policy,
        reference,
        prompts,
        {"length": RewardSet([load_reward(length_reward)])},
        generation,
        seed=3,
    )
    outs = policy.generate(
        [p.prompt for p in prompts],
        SamplingParams(max_new_tokens=12, temperature=temperature, seed=3),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model).double()
    distances, losses = [], []
    for example, (completion,) in zip(prompts, outs, strict=True):
        prompt = policy.tokenizer(example.prompt).input_ids
        ids = torch.tensor([prompt + completion.token_ids])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        logp = torch.log_softmax(logits, dim=-1)[
            range(len(completion.token_ids)), completion.token_ids
        ]
        distances.append(sum(completion.logprobs) - logp.sum().item())
        losses += (-logp).tolist()
    assert found.kl.mean == pytest.approx(Estimate.of(distances).mean, abs=1e-4)
    assert found.kl.error == pytest.approx(Estimate.of(distances).error, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.completions == [completion.text for (completion,) in outs]
    assert found.ended.mean == sum(
        completion.finish_reason == "stop" for (completion,) in outs
    ) / len(outs)


def test_repeated_prompts_get_different_samples(actors, prompts) -> None:
    _, reference = actors
    found = evaluate(
        reference,
        reference,
        prompts[:1] * 8,
        {"length": RewardSet([load_reward(length_reward)])},
        GENERATION,
        seed=0,
    )
    assert len(set(found.completions)) > 1


def test_tables_show_both(actors, prompts) -> None:
    rewards = {"length": RewardSet([load_reward(length_reward)])}
    after, before = (
        evaluate(actor, actors[1], prompts, rewards, GENERATION, seed=0) for actor in actors
    )
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(comparison(before, after, labels={"length": "a long one"}, kl_target=2.0))
    console.print(
        side_by_side([str(p.prompt) for p in prompts], before, after, score="length", count=2)
    )
    text = re.sub(r"\s+", " ", console.export_text())
    for part in (
        "a long one",
        f"{before.rewards['length']}",
        f"{after.kl}",
        "x target 2",
        f"{before.perplexity:.2f}",
        "w1 w2",
    ):
        assert part in text
