"""Reward hacking and its alarm. A policy is trained on a count of cheerful words, with and without
a KL, while the reward that this count was meant to represent is measured, too.

Proxy reward, which is trained on: examples/rewards/cheerful.py. True reward, never trained on:
examples/rewards/stories.py:fable. GRPO on stories260K, three seeds.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from bench.drawing import Dot, chart
from bench.validation.frontier import GENERATION, HELD_OUT, PROMPTS, REWARD
from bench.validation.study import ROOT, grouped, measure, over_seeds, plus_minus, run_grid

from fusedrl.engine.config import KLConfig, OptimConfig, PolicyConfig, RunConfig
from fusedrl.engine.stages.policy import train_policy

STUDY = "hacking"
PROXY = f"{ROOT / 'examples/rewards/cheerful.py'}:cheerful"
KL_COEFS, STEPS = (0.0, 0.3), 60


def run(model: str, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One coefficient, one seed."""
    config = PolicyConfig(
        model,
        str(PROMPTS),
        (PROXY,),
        "grpo",
        steps=STEPS,
        prompts_per_step=8,
        monitor_reward=(REWARD,),
        kl=KLConfig(coef=spec["kl_coef"], measure=True),
        generation=GENERATION,
        optim=OptimConfig(lr=1e-3),
        run=RunConfig(str(directory / "run"), seed=spec["seed"], progress=False),
    )
    trained = train_policy(config).model
    rows, alarms = (_lines(directory / "run" / name) for name in ("metrics.jsonl", "alarms.jsonl"))
    rewards = {"proxy": PROXY, "gold": REWARD}
    before, after = (
        measure(policy, model, HELD_OUT, rewards, GENERATION, samples=4)
        for policy in (model, trained)
    )
    return (
        {f"{name}_before": before[name] for name in rewards}
        | after
        | {
            "alarm_step": alarms[0]["step"] if alarms else None,
            "evidence": [one["kind"] for one in alarms[0]["evidence"]] if alarms else [],
            "curve": [
                [row["step"], round(row["reward"], 3), round(row["gold/fable/mean"], 3)]
                for row in rows[::2]
            ],
        }
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.is_file()
        else []
    )


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, draw docs/hacking.svg, and return the table."""
    rows = run_grid(
        STUDY,
        partial(run, model),
        [{"kl_coef": coef, "seed": seed} for coef in KL_COEFS for seed in seeds],
        work,
        workers,
    )
    lines = [
        "| KL coefficient | seed | proxy, before -> after | gold, before -> after | KL, nats | "
        "perplexity under the original | alarm | its evidence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    series: dict[str, list[Dot]] = {}
    for (coef,), group in grouped(rows, "kl_coef").items():
        for row in group:
            alarm = "none" if row["alarm_step"] is None else f"step {row['alarm_step']}"
            lines.append(
                f"| {coef:g} | {row['spec']['seed']} | {row['proxy_before']:.2f} -> "
                f"{plus_minus((row['proxy'], row['proxy_error']))} "
                f"| {row['gold_before']:.2f} -> {plus_minus((row['gold'], row['gold_error']))} | "
                f"{row['kl']:.1f} | {row['perplexity_ref']:.1f} "
                f"| {alarm} | {', '.join(dict.fromkeys(row['evidence']))} |"
            )
        for index, name in ((1, "proxy"), (2, "gold")):
            steps = zip(*(row["curve"] for row in group), strict=True)
            means = [
                (points[0][0], over_seeds([{"x": point[index]} for point in points], "x"))
                for points in steps
            ]
            series[f"{name}, KL {coef:g}"] = [
                Dot(step, mean, error) for step, (mean, error) in means
            ]
    drawing = chart(
        "A proxy that is hacked, and one that a KL holds (means of three seeds)",
        "step",
        "reward of the step's samples",
        series,
    )
    (ROOT / "docs" / "hacking.svg").write_text(drawing, encoding="utf-8")
    return "\n".join(lines)
