"""Arithmetic with an exact verifier, three seeds. GRPO starts from a model after SFT on
demonstrations, half of which are wrong. pass@1 on 400 held-out problems, 4 samples each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.drawing import Dot, chart
from bench.validation.study import ROOT, measure, over_seeds, plus_minus, run_grid
from examples.arithmetic import write_task

from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.sft import train_sft

STUDY = "arithmetic"
REWARD = f"{ROOT / 'examples/rewards/arithmetic.py'}:exact"
GENERATION = GenerationConfig(max_new_tokens=6)
STEPS, SAMPLES = 200, 4


def run(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Write the task, train both stages, measure before and after."""
    seed = spec["seed"]
    task = write_task(directory / "task", seed)
    sft = train_sft(
        SFTConfig(
            str(task / "model"),
            str(task / "sft.jsonl"),
            epochs=8,
            sequences_per_step=64,
            optim=OptimConfig(lr=3e-3, warmup_steps=20),
            run=RunConfig(str(directory / "sft"), seed=seed, progress=False),
        )
    ).model
    grpo = train_policy(
        PolicyConfig(
            sft,
            str(task / "prompts.jsonl"),
            (REWARD,),
            "grpo",
            steps=STEPS,
            prompts_per_step=64,
            minibatches=4,
            generation=GENERATION,
            kl=KLConfig(coef=0.0),
            loss=LossConfig(clip_high=0.28),
            optim=OptimConfig(lr=3e-4),
            run=RunConfig(str(directory / "grpo"), seed=seed, progress=False),
        )
    ).model
    curve = [
        json.loads(line)
        for line in (directory / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    before, after = (
        measure(
            policy, sft, task / "held_out.jsonl", {"pass@1": REWARD}, GENERATION, samples=SAMPLES
        )
        for policy in (sft, grpo)
    )
    return {
        "before": before["pass@1"],
        "before_error": before["pass@1_error"],
        "after": after["pass@1"],
        "after_error": after["pass@1_error"],
        "kl": after["kl"],
        "curve": [[row["step"], round(row["reward"], 4)] for row in curve[::5]],
    }


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, draw docs/arithmetic.svg, and return the table."""
    rows = run_grid(STUDY, run, [{"seed": seed} for seed in seeds], work, workers)
    lines = [
        "| seed | pass@1 after SFT | pass@1 after GRPO | times | KL, nats | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = ((row[name], row[f"{name}_error"]) for name in ("before", "after"))
        lines.append(
            f"| {row['spec']['seed']} | {plus_minus(before, 3)} | {plus_minus(after, 3)} | "
            f"{after[0] / before[0]:.2f} | {row['kl']:.2f} "
            f"| {row['seconds']:.0f} |"
        )
    means = [over_seeds(rows, name) for name in ("before", "after")]
    lines.append(
        f"| mean | {plus_minus(means[0], 3)} | {plus_minus(means[1], 3)} | "
        f"{means[1][0] / means[0][0]:.2f} | | |"
    )
    series = {
        f"seed {row['spec']['seed']}": [Dot(step, reward) for step, reward in row["curve"]]
        for row in rows
    }
    drawing = chart(
        "Arithmetic by GRPO: share of right answers among the step's samples",
        "step",
        "right",
        series,
    )
    (ROOT / "docs" / "arithmetic.svg").write_text(drawing, encoding="utf-8")
    return "\n".join(lines)
