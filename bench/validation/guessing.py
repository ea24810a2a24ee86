"""A game of several turns, examples/guess_number.py, three seeds. GRPO starts from random weights,
through the command line. Success before and after is that of the run's own evaluations: 32 games
for each of the 15 numbers, with the standard error over the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.validation.study import ROOT, over_seeds, plus_minus, run_grid
from examples.guess_number import write_task

from fusedrl.engine.cli.main import main as fusedrl

STUDY = "guessing"
GAME = ROOT / "examples" / "guess_number.py"
STEPS = 80


def run(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Write the task, train, and read success off the run's metrics."""
    seed = spec["seed"]
    task = write_task(directory / "task", seed)
    words = ["train", "grpo", "--model", str(task / "model")]
    words += ["--data", str(task / "games.jsonl"), "--environment", f"{GAME}:Game"]
    words += ["--turns.max_turns", "4", "--turns.credit", spec["credit"]]
    words += ["--generation.max_new_tokens", "1", "--prompts_per_step", "15"]
    words += ["--samples_per_prompt", "16", "--steps", str(STEPS), "--kl.coef", "0"]
    words += ["--optim.lr", "3e-3", "--evaluation.data", str(task / "games.jsonl")]
    words += ["--evaluation.samples_per_prompt", "32", "--evaluation.every", "20"]
    words += ["--run.dir", str(directory / "run"), "--run.seed", str(seed)]
    words += ["--run.progress", "false", "--device", "cpu"]
    if (code := fusedrl(words)) != 0:
        raise RuntimeError(f"the run ended with exit code {code}")
    text = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    curve = [json.loads(line) for line in text.splitlines()]
    first, last = curve[0], curve[-1]
    return {
        "before": first["eval_reward"],
        "before_error": first["eval_reward_stderr"],
        "after": last["eval_reward"],
        "after_error": last["eval_reward_stderr"],
        "turns": last["turns/mean"],
        "curve": [[r["step"], round(r["eval_reward"], 4)] for r in curve if "eval_reward" in r],
    }


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, and return the table."""
    specs = [{"credit": "trajectory", "seed": seed} for seed in seeds]
    rows = run_grid(STUDY, run, specs, work, workers)
    lines = [
        "| seed | numbers found before | after 80 steps | times | turns of a game | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = ((row[name], row[f"{name}_error"]) for name in ("before", "after"))
        lines.append(
            f"| {row['spec']['seed']} | {plus_minus(before, 3)} | {plus_minus(after, 3)} | "
            f"{after[0] / before[0]:.1f} | {row['turns']:.2f} | {row['seconds']:.0f} |"
        )
    means = [over_seeds(rows, name) for name in ("before", "after")]
    lines.append(
        f"| mean | {plus_minus(means[0], 3)} | {plus_minus(means[1], 3)} | "
        f"{means[1][0] / means[0][0]:.1f} | | |"
    )
    return "\n".join(lines)
