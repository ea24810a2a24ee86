"""Run directories written by hand: what a run leaves, and what broken ones do."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = {
    "stage": "PolicyConfig",
    "config": {
        "algorithm": "ppo",
        "steps": 40,
        "optim": {"lr": 0.001},
        "kl": {"coef": 0.1, "target": 6.0},
        "run": {"dir": "x", "seed": 0},
    },
}
EVIDENCE = [
    {"metric": "reward", "kind": "proxy", "then": 0.1, "now": 0.9, "sigma": 8.0},
    {"metric": "gold/g/mean", "kind": "gold", "then": 1.0, "now": 0.2, "sigma": -6.5},
]
CALIBRATION = {
    "accuracy": 0.7,
    "accuracy_low": 0.6,
    "accuracy_high": 0.8,
    "ece": 0.05,
    "pairs": 64,
    "temperature": None,
    "bins": [
        {"low": 0.5, "high": 0.6, "weight": 0.5, "predicted": 0.55, "observed": 0.5},
        {"low": 0.8, "high": 0.9, "weight": 0.5, "predicted": 0.85, "observed": 0.9},
    ],
}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """NaN and infinity as Python's json writes them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """The metrics of a PPO run that gets hacked at its middle, evaluated every tenth step."""
    draw = random.Random(seed)
    rows = []
    for step in range(steps + 1):
        at = step / max(steps, 1)
        held = {"eval_reward": at, "eval_gold/g/mean": math.sin(3 * at), "eval_kl": 8 * at}
        row: dict[str, Any] = {"step": step} | (held if step % max(1, steps // 4) == 0 else {})
        if step:
            row |= {
                "reward": at + draw.gauss(0, 0.1),
                "gold/g/mean": math.sin(3 * at) + draw.gauss(0, 0.1),
                "kl": 8 * at + draw.gauss(0, 0.5),
                "entropy": 2 - at,
                "completions/mean_length": 30.0 + draw.randint(-5, 5),
                "loss/policy_avg": draw.gauss(0, 0.01),
                "clip_ratio/region_mean": 0.1 * draw.random(),
                "val/explained_variance": at,
                "sampling/sampling_logp_difference/max": 1e-6 * draw.random(),
                "timing/step": 1.5,
                "timing/generate_and_reward": 0.8,
                "timing/score": 0.2,
                "timing/train": 0.5,
                "mem/peak_gib": 1.0 + at,
                "tokens_per_s": 1000.0,
                "some/other": at,
            }
        rows.append(row)
    return rows


def samples(texts: Sequence[str], prompt: Any = "Once upon a time") -> list[dict[str, Any]]:
    """A completion of one prompt every tenth step."""
    return [
        {"step": 10 * place, "prompt": prompt, "completion": text, "scores": {"reward": place / 2}}
        for place, text in enumerate(texts)
    ]


def write_run(
    directory: Path, steps: int = 40, *, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Path:
    """A whole run: configuration, metrics, samples, an alarm, calibration."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"config": CONFIG["config"] | dict(options or {})}
    (directory / "config.json").write_text(json.dumps(config))
    write_lines(directory / "metrics.jsonl", metrics(steps, seed))
    texts = ["A dog ran home, and slept.", "A red dog ran home and slept.", "Nothing alike at all"]
    write_lines(directory / "samples_eval.jsonl", samples(texts))
    write_lines(directory / "alarms.jsonl", [{"step": steps // 2, "evidence": EVIDENCE}])
    (directory / "report.json").write_text(json.dumps(CALIBRATION))
    return directory
