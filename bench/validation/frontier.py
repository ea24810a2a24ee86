"""Reward reached at a given KL on one task, for PPO with a shared and with a separate critic, GRPO,
RLOO, REINFORCE++, DPO and best-of-n, three seeds each.

The task is examples/rewards/stories.py:fable on stories260K. All online methods draw 64 completions
of 64 tokens per step, run the same number of steps, and have the KL in the reward. Their KL
coefficient adapts to a target KL; each target gives one point of the plot. DPO takes one pass over
pairs of the model's own samples; each beta gives one point. Best-of-n takes the best of n samples;
its KL is at most log n - (n - 1) / n, which the plot shows. All are measured on 48 held-out prompts
x 8 samples.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.drawing import Dot, chart
from bench.validation.study import ROOT, grouped, measure, over_seeds, plus_minus, run_grid

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import (
    CriticConfig,
    DPOConfig,
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.rollout.best_of_n import best_of_n, best_of_n_kl, expected_best
from fusedrl.engine.stages.dpo import train_dpo
from fusedrl.engine.stages.policy import train_policy

STUDY = "frontier"
REWARD = f"{ROOT / 'examples/rewards/stories.py'}:fable"
PROMPTS, HELD_OUT = (
    ROOT / "examples/prompts/stories.jsonl",
    ROOT / "examples/prompts/stories_held_out.jsonl",
)
GENERATION = GenerationConfig(max_new_tokens=64, stop_token_ids=(1,))
STEPS, COMPLETIONS, SAMPLES = 60, 64, 8
TARGETS, BETAS, BEST_OF = (2.0, 5.0, 10.0), (0.3, 0.1, 0.03), (2, 4, 8, 16, 32)
# what differs; a small value loss, since the shared trunk is the policy's own
ONLINE: dict[str, dict[str, Any]] = {
    "ppo": dict(algorithm="ppo", loss=LossConfig(lam=1.0, value_coef=0.01)),
    "ppo, separate critic": dict(
        algorithm="ppo",
        loss=LossConfig(lam=1.0, value_coef=1.0),
        critic=CriticConfig("policy", optim=OptimConfig(lr=1e-3)),
    ),
    "grpo": dict(algorithm="grpo", samples_per_prompt=8),
    "rloo": dict(algorithm="rloo", samples_per_prompt=8),
    "reinforce++": dict(algorithm="reinforce_pp"),
}


def specs(seeds: list[int]) -> list[dict[str, Any]]:
    """Return the specifications of all runs."""
    common = [
        {"method": method, "target": target, "seed": seed}
        for method in ONLINE
        for target in TARGETS
        for seed in seeds
    ]
    common += [{"method": "dpo", "beta": beta, "seed": seed} for beta in BETAS for seed in seeds]
    return [{"method": "best of n", "seed": seed} for seed in seeds] + common


def run(model: str, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One method at one point with one seed."""
    seed = spec["seed"]
    if spec["method"] == "best of n":
        return _best_of_n(model, seed)
    settings = RunConfig(str(directory / "run"), seed=seed, progress=False)
    if spec["method"] == "dpo":
        pairs = _pairs(model, seed, directory / "pairs.jsonl")
        trained = train_dpo(
            DPOConfig(
                model,
                str(pairs),
                beta=spec["beta"],
                eval_fraction=0.0,
                pairs_per_step=32,
                optim=OptimConfig(lr=1e-4),
                run=settings,
            )
        ).model
    else:
        options = {
            "epochs": 2,
            "minibatches": 2,
            "prompts_per_step": COMPLETIONS // ONLINE[spec["method"]].get("samples_per_prompt", 1),
        }
        kl = KLConfig(coef=0.1, placement="reward", target=spec["target"], horizon=256.0)
        trained = train_policy(
            PolicyConfig(
                model,
                str(PROMPTS),
                (REWARD,),
                steps=STEPS,
                generation=GENERATION,
                kl=kl,
                optim=OptimConfig(lr=2e-4),
                run=settings,
                **(options | ONLINE[spec["method"]]),
            )
        ).model
    return measure(trained, model, HELD_OUT, {"reward": REWARD}, GENERATION, samples=SAMPLES)


def _pairs(model: str, seed: int, path: Path, per_prompt: int = 16) -> Path:
    """Preference pairs among the model's own samples: as many completions as 60 steps see; each is
    in one pair, with one of another reward."""
    actor = HybridActor.from_pretrained(model)
    prompts = [example.prompt for example in load_prompts(str(PROMPTS))]
    params = SamplingParams(
        max_new_tokens=GENERATION.max_new_tokens,
        n=per_prompt,
        seed=seed + 1000,
        stop_token_ids=GENERATION.stop_token_ids,
    )
    rng, rewards, rows = random.Random(seed), RewardSet([load_reward(REWARD)]), []
    for prompt, group in zip(prompts, actor.generate(prompts, params), strict=True):
        texts = [completion.text for completion in group]
        found = sorted(
            zip(
                rewards.score(
                    [prompt] * len(texts),
                    texts,
                    [c.prompt_ids for c in group],
                    [c.token_ids for c in group],
                ).total,
                texts,
                strict=True,
            )
        )
        half = len(found) // 2
        rng.shuffle(found[:half])
        rows += [
            {"prompt": prompt, "chosen": better, "rejected": worse}
            for (low, worse), (high, better) in zip(found[:half], found[half:], strict=True)
            if high > low
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _best_of_n(model: str, seed: int) -> dict[str, Any]:
    """The expected reward of the best of n for every n at once, without bias, from the largest n's
    samples."""
    actor, examples = HybridActor.from_pretrained(model), load_prompts(str(HELD_OUT))
    found = best_of_n(
        actor, examples, RewardSet([load_reward(REWARD)]), max(BEST_OF), GENERATION, seed=seed
    )
    scores = torch.tensor([one.scores for one in found])
    return {
        "best": [
            {"n": n, "kl": best_of_n_kl(n), "reward": expected_best(scores, n).mean().item()}
            for n in (1, *BEST_OF)
        ]
    }


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, draw docs/frontier.svg, and return the table."""
    rows = run_grid(STUDY, partial(run, model), specs(seeds), work, workers)
    series: dict[str, list[Dot]] = {}
    lines = [
        "| method | setting | KL, nats | reward | perplexity under the original | length | "
        "seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    best = [row["best"] for row in rows if row["spec"]["method"] == "best of n"]
    for points in zip(*best, strict=True):
        reward = over_seeds(points, "reward")
        series.setdefault("best of n", []).append(Dot(points[0]["kl"], reward[0], reward[1]))
        lines.append(
            f"| best of n | n = {points[0]['n']} | {points[0]['kl']:.2f} (bound) | "
            f"{plus_minus(reward)} | | | |"
        )
    for (method, target, beta), group in grouped(
        [row for row in rows if row["spec"]["method"] != "best of n"], "method", "target", "beta"
    ).items():
        kl, reward, perplexity, length, seconds = (
            over_seeds(group, name)
            for name in ("kl", "reward", "perplexity_ref", "length", "seconds")
        )
        setting = f"target {target:g}" if target is not None else f"beta {beta:g}"
        series.setdefault(method, []).append(Dot(kl[0], reward[0], reward[1]))
        lines.append(
            f"| {method} | {setting} | {plus_minus(kl)} | {plus_minus(reward)} | "
            f"{plus_minus(perplexity)} | {length[0]:.0f} | {seconds[0]:.0f} |"
        )
    drawing = chart(
        "Reward against KL, three seeds (bars: standard error over seeds)",
        "KL to the original model, nats per completion",
        "reward (held out)",
        {name: sorted(dots) for name, dots in series.items()},
        dashed=frozenset({"best of n"}),
    )
    (ROOT / "docs" / "frontier.svg").write_text(drawing, encoding="utf-8")
    return "\n".join(lines)
