"""Ablation of PPO-max on the stories task: each run leaves out one part, to show what the part is
worth. Three seeds.

The scores are coarse and unscaled (the rule gives -5 to 5), and the KL coefficient is fixed. A step
has four optimizer steps, so that the clips have an effect. The critic is a separate model that
starts from the policy's weights. Measured on 48 held-out prompts x 8 samples; J = reward -
coefficient x KL combines both in one number.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.validation.frontier import COMPLETIONS, GENERATION, HELD_OUT, PROMPTS, REWARD, SAMPLES
from bench.validation.study import grouped, measure, over_seeds, plus_minus, run_grid

from fusedrl.engine.config import (
    CriticConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    PtxConfig,
    RunConfig,
)
from fusedrl.engine.stages.policy import train_policy

STUDY = "ablation"
STEPS, KL_COEF = 40, 0.1
WITHOUT: dict[str, dict[str, Any]] = {  # the options that take one part out
    "nothing (all parts)": {},
    "KL in the reward": {"kl": KLConfig(coef=0.0, measure=True)},
    "score normalisation": {"normalize_scores": False},
    "score clip": {"score_clip": 0.0},
    "advantage normalisation": {"whiten": False},
    "advantage clip": {"advantage_clip": 0.0},
    "policy clip": {"objective": "importance"},
    "critic clip": {"value_clip": None},
    "entropy target": {"entropy_coef": 0.0, "entropy_target": None},
    "pretraining loss": {"ptx": None},
    "its own critic": {"critic": None, "value_coef": 0.01},
    "any (plain PPO)": {
        "normalize_scores": False,
        "score_clip": 0.0,
        "advantage_clip": 0.0,
        "entropy_coef": 0.0,
        "entropy_target": None,
        "ptx": None,
        "critic": None,
        "value_coef": 0.01,
    },
}


def config_of(model: str, spec: dict[str, Any], directory: Path, texts: Path) -> PolicyConfig:
    """The run without one part."""
    changes = WITHOUT[spec["without"]]
    parts = {
        "whiten": True,
        "value_coef": 1.0,
        "entropy_coef": 0.01,
        "entropy_target": 1.0,
        "lam": 1.0,
    }
    loss = LossConfig(
        **(
            parts
            | {
                name: value
                for name, value in changes.items()
                if name in LossConfig.__dataclass_fields__
            }
        )
    )
    whole = PolicyConfig(
        model,
        str(PROMPTS),
        (REWARD,),
        "ppo_max",
        steps=STEPS,
        prompts_per_step=COMPLETIONS,
        epochs=2,
        minibatches=2,
        generation=GENERATION,
        kl=KLConfig(coef=KL_COEF),
        loss=loss,
        optim=OptimConfig(lr=2e-4),
        critic=CriticConfig("policy", optim=OptimConfig(lr=1e-3)),
        ptx=PtxConfig(data=str(texts), coef=0.1, sequences_per_step=16),
        run=RunConfig(str(directory / "run"), seed=spec["seed"], progress=False),
    )
    return replace(
        whole,
        **{
            name: value
            for name, value in changes.items()
            if name in PolicyConfig.__dataclass_fields__
        },
    )


def run(model: str, spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One part left out, one seed."""
    texts = directory / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in _texts(model, spec["seed"])),
        encoding="utf-8",
    )
    trained = train_policy(config_of(model, spec, directory, texts))
    found = measure(trained.model, model, HELD_OUT, {"reward": REWARD}, GENERATION, samples=SAMPLES)
    explained = trained.metrics.get("val/explained_variance")
    return (
        found
        | {"J": found["reward"] - KL_COEF * found["kl"]}
        | ({} if explained is None else {"explained_variance": explained})
    )


def _texts(model: str, seed: int, count: int = 512) -> list[str]:
    """Sample texts from the model. They replace its pretraining data, which is not available."""
    from fusedrl.engine.actor import HybridActor
    from fusedrl.engine.generation.sampler import SamplingParams

    actor = HybridActor.from_pretrained(model)
    params = SamplingParams(
        max_new_tokens=128, n=count, seed=seed + 2000, stop_token_ids=GENERATION.stop_token_ids
    )
    return [
        completion.text for completion in actor.generate([""], params)[0] if completion.text.strip()
    ]


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing and return the table."""
    rows = run_grid(
        STUDY,
        partial(run, model),
        [{"without": name, "seed": seed} for name in WITHOUT for seed in seeds],
        work,
        workers,
    )
    lines = [
        f"| without | reward | KL, nats | reward - {KL_COEF:g} KL | perplexity under the original "
        "| length | explained variance | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name,), group in grouped(rows, "without").items():
        columns = [
            plus_minus(over_seeds(group, value))
            for value in ("reward", "kl", "J", "perplexity_ref")
        ]
        length, explained, seconds = (
            over_seeds(group, value)[0] for value in ("length", "explained_variance", "seconds")
        )
        lines.append(
            f"| {name} | {' | '.join(columns)} | {length:.0f} | {explained:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)
