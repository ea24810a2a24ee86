"""A small student and its teacher: supervised fine-tuning on the teacher's texts, and distillation
on the student's own, from one start and as many tokens; how far is each from the teacher then?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from bench.validation.study import grouped, measure, over_seeds, plus_minus, run_grid

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    OptimConfig,
    PolicyConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import save_pretrained
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.sft import train_sft

STUDY = "distillation"
STUDENT = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OPENING, LENGTH = 16, 48  # tokens of a prompt, and at most of a completion
START, STEPS, EACH, HELD_OUT = 300, 150, 64, 256  # steps of the start and of a method, texts a step
METHODS = {"sft": "SFT on the teacher's texts", "reverse": "distill, reverse", "forward": "forward"}
RATES = (1e-3, 3e-3)


def _texts(teacher: HybridActor, count: int, seed: int) -> list[tuple[str, str]]:
    """Openings and continuations of stories, both sampled from the teacher."""
    whole = SamplingParams(max_new_tokens=OPENING - 1, n=count, seed=seed)
    openings = [[1, *c.token_ids] for c in teacher.generate([[1]], whole)[0]]
    params = SamplingParams(max_new_tokens=LENGTH, seed=seed)
    told = teacher.generate(openings, params, request_ids=list(range(1, count + 1)))
    decode = teacher.tokenizer.decode
    pairs = [(decode(o[1:]), c[0].text) for o, c in zip(openings, told, strict=True)]
    return [(opening, text) for opening, text in pairs if opening.strip() and text.strip()]


def _write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"prompt": opening, "completion": text} for opening, text in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(spec: dict[str, Any], directory: Path, model: str) -> dict[str, Any]:
    """Make texts and a start, train by one method, measure before and after."""
    seed, method = spec["seed"], spec["method"]
    teacher = HybridActor.from_pretrained(model)
    pairs = _texts(teacher, (START + STEPS) * EACH + 2 * HELD_OUT, seed)
    held_out = _write(directory / "held_out.jsonl", pairs[:HELD_OUT])
    first = _write(directory / "first.jsonl", pairs[HELD_OUT : HELD_OUT + START * EACH])
    second = _write(directory / "second.jsonl", pairs[HELD_OUT + START * EACH :][: STEPS * EACH])
    tree = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")) | STUDENT
    student = directory / "student"
    decoder = Decoder.random(model_config(tree), seed)
    save_pretrained(decoder, student, tokenizer=teacher.tokenizer)

    def optim(rate: float) -> OptimConfig:
        return OptimConfig(lr=rate, warmup_steps=5)

    def supervised(start: str, data: Path, name: str, rate: float) -> str:
        place = RunConfig(str(directory / name), seed=seed, progress=False)
        return train_sft(
            SFTConfig(start, str(data), sequences_per_step=EACH, optim=optim(rate), run=place)
        ).model

    start = supervised(str(student), first, "start", 5e-3)
    generation = GenerationConfig(max_new_tokens=LENGTH)
    if method == "sft":
        after = supervised(start, second, "after", spec["rate"])
    else:
        after = train_policy(
            PolicyConfig(
                start,
                str(second),
                ("none",),
                "distill",
                reference_model=model,
                steps=STEPS,
                prompts_per_step=EACH,
                kl=KLConfig(direction=method),
                generation=generation,
                optim=optim(spec["rate"]),
                run=RunConfig(str(directory / "after"), seed=seed, progress=False),
            )
        ).model
    found: dict[str, Any] = {}
    for name, which in (("before", start), ("after", after)):
        theirs = partial(measure, data=held_out, rewards={}, generation=generation, samples=2)
        ours, back = theirs(which, model), theirs(model, which)
        found |= {f"reverse_{name}": ours["kl"] / ours["length"]}
        found |= {f"forward_{name}": back["kl"] / back["length"]}
        found |= {f"perplexity_{name}": ours["perplexity_ref"]}
    return found


def main(model: str, work: Path, seeds: list[int], workers: int) -> str:
    """Run what is missing, and return the table."""
    specs = [
        {"method": method, "rate": rate, "seed": seed}
        for method in METHODS
        for rate in RATES
        for seed in seeds
    ]
    rows = run_grid(STUDY, partial(run, model=model), specs, work, workers)
    lines = [
        "| method | rate | KL(student, teacher) before | after | KL(teacher, student) before "
        "| after | perplexity under the teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, rate), group in grouped(rows, "method", "rate").items():
        numbers = [
            plus_minus(over_seeds(group, f"{direction}_{when}"), 3)
            for direction in ("reverse", "forward")
            for when in ("before", "after")
        ]
        numbers.append(plus_minus(over_seeds(group, "perplexity_after"), 2))
        lines.append(f"| {METHODS[method]} | {rate:g} | {' | '.join(numbers)} |")
    return "\n".join(lines)
