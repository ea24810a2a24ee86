"""Teach a chat model word problems that it can sometimes solve: SmolLM2-135M-Instruct with its own
chat template, by GRPO with an exact verifier, training all weights or an adapter. No
demonstrations, no KL.

GSM8K itself is too hard for this model (3% of its easiest problems, those of one calculation, at
temperature 1), so the problems come from examples/word_problems.py. The model's own samples choose
the training problems: of eight samples per problem, at least one must be right, but not all.
Held-out problems are not chosen this way. The table shows separately those held-out problems that
had a right sample before training.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.drawing import Dot, chart
from bench.validation.study import ROOT, grouped, over_seeds, plus_minus, run_grid
from examples.rewards.gsm8k import last_number
from examples.word_problems import problems

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.estimates import Estimate
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
)
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.watch.evaluate import evaluate

STUDY = "word_problems"
REWARD = f"{ROOT / 'examples/rewards/gsm8k.py'}:last_number"
ASKED = " Reply with one short sentence."
GENERATION = GenerationConfig(max_new_tokens=40, temperature=0.7)
TRIED, HELD_OUT, CHOICE = 320, 150, 8  # problems, problems, samples of each
STEPS, PROMPTS, SAMPLES = 40, 8, 8
RATES = {"full": 2e-5, "lora": 5e-4}


def choose(model: str, directory: Path) -> Path:
    """Write train.jsonl, the problems of which the model solves some of its samples, and
    held_out.jsonl, with the share that was right of each."""
    actor, drawn = HybridActor.from_pretrained(model), problems(0)
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRIED), ("held_out", HELD_OUT)):
        rows = [dict(row) for row in itertools.islice(drawn, count)]
        for row in rows:
            row["prompt"] = [{**row["prompt"][0], "content": row["prompt"][0]["content"] + ASKED}]
        outs = actor.generate(
            [encode_prompt(actor.tokenizer, row["prompt"], None) for row in rows],
            SamplingParams(
                max_new_tokens=GENERATION.max_new_tokens,
                temperature=GENERATION.temperature,
                n=CHOICE,
            ),
        )
        for row, samples in zip(rows, outs, strict=True):
            row["right"] = sum(
                value or 0.0
                for value in last_number(
                    [sample.text for sample in samples], [row["gold"]] * CHOICE
                )
            )
        kept = [row for row in rows if name == "held_out" or 0 < row["right"] < CHOICE]
        (directory / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8"
        )
    return directory


def run(model: str, chosen: Path, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train one seed of one mode, and measure it on the held-out problems."""
    trained = train_policy(
        PolicyConfig(
            model,
            str(chosen / "train.jsonl"),
            (REWARD,),
            "grpo",
            steps=STEPS,
            prompts_per_step=PROMPTS,
            samples_per_prompt=SAMPLES,
            generation=GENERATION,
            kl=KLConfig(coef=0.0),
            lora=LoRAConfig() if spec["mode"] == "lora" else None,
            optim=OptimConfig(lr=RATES[spec["mode"]], warmup_steps=5),
            run=RunConfig(str(directory / "run"), seed=spec["seed"], progress=False),
        )
    ).model
    metrics = [
        json.loads(line)
        for line in (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return measured(model, trained, chosen) | {
        "trained_on": sum(1 for _ in (chosen / "train.jsonl").open(encoding="utf-8")),
        "step_seconds": sum(row["timing/step"] for row in metrics) / len(metrics),
        "curve": [[row["step"], round(row["reward"], 4)] for row in metrics],
    }


def measured(model: str, trained: str, chosen: Path) -> dict[str, Any]:
    """Four fresh samples of each held-out problem before and after, and the first eight texts."""
    prompts = load_prompts(str(chosen / "held_out.jsonl"))
    reachable = [prompt.columns["right"] > 0 for prompt in prompts]
    base = HybridActor.from_pretrained(model)
    found: dict[str, Any] = {"held_out": len(prompts), "reachable": sum(reachable)}
    for name, path in (("before", model), ("after", trained)):
        policy = base if path == model else HybridActor.from_pretrained(path)
        reward = RewardSet([load_reward(REWARD, tokenizer=policy.tokenizer)])
        result = evaluate(
            policy,
            base if path != model else None,
            prompts,
            {"right": reward},
            GENERATION,
            seed=1,
            samples=4,
        )
        scores = result.scores["right"]
        within = [score for at, score in enumerate(scores) if reachable[at // 4]]
        near = Estimate.of(within, per=4)
        found |= {
            name: result.rewards["right"].mean,
            f"{name}_error": result.rewards["right"].error,
            f"{name}_reachable": near.mean,
            f"{name}_reachable_error": near.error,
            f"{name}_pass_at_4": result.pass_at[4].mean,
            f"{name}_length": result.length.mean,
            f"{name}_ended": result.ended.mean,
            f"{name}_texts": result.completions[: 8 * 4 : 4],
            "kl": result.kl.mean,
        }
    found["questions"] = [prompt.prompt[0]["content"] for prompt in prompts[:8]]
    return found


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, draw docs/word-problems.svg, and return the table."""
    torch.set_num_threads(1)
    chosen = work / STUDY / "problems"
    if not (chosen / "held_out.jsonl").is_file():
        choose(model, chosen)
    rows = run_grid(
        STUDY,
        partial(run, model, chosen),
        [{"mode": mode, "seed": seed} for seed in seeds for mode in RATES],
        work,
        workers,
    )
    lines = [
        "| weights | seed | right before | right after | within reach before | after | one of 4 "
        "before | after | tokens before | after | KL, nats | s a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    series = {}
    for (mode,), group in grouped(rows, "mode").items():
        for row in group:
            pairs = [
                plus_minus((row[f"{when}{which}"], row[f"{when}{which}_error"]), 3)
                for which in ("", "_reachable")
                for when in ("before", "after")
            ]
            lines.append(
                f"| {mode} | {row['spec']['seed']} | {' | '.join(pairs)} | "
                f"{row['before_pass_at_4']:.2f} | {row['after_pass_at_4']:.2f} | "
                f"{row['before_length']:.0f} | {row['after_length']:.0f} | {row['kl']:.1f} | "
                f"{row['step_seconds']:.0f} |"
            )
            smooth = [
                sum(reward for _, reward in row["curve"][at : at + 5]) / 5
                for at in range(0, STEPS, 5)
            ]
            series[f"{mode}, seed {row['spec']['seed']}"] = [
                Dot(5 * at + 3, value) for at, value in enumerate(smooth)
            ]
        if len(group) > 1:
            means = [plus_minus(over_seeds(group, when), 3) for when in ("before", "after")]
            lines.append(f"| {mode} | mean | {' | '.join(means)} | | | | | | | | |")
    drawing = chart(
        "Word problems by GRPO, SmolLM2-135M: share of right answers, means of five steps",
        "step",
        "right",
        series,
    )
    (ROOT / "docs" / "word-problems.svg").write_text(drawing, encoding="utf-8")
    return "\n".join(lines)
