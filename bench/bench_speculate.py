"""Guessed tokens with a model of a real size (`--instruct DIR`, SmolLM2-135M-Instruct from
examples/smollm2.py): generation with `drafts` compared with the same generation without, whose
completions are checked to be the same bits. Prompts are those of examples/prompts/questions.jsonl.

tail            3 of 32 completions (8 samples of 4 prompts) from their token 192 on, as if the
                other 29 had ended: 96 tokens each
second epoch    8 samples of one prompt, of which 8 completions were drawn before under other random
                numbers: 96 tokens each
evaluation      4 prompts with one sample each, whose completions were drawn before under the same
                random numbers and the weights of 4 optimizer steps ago (AdamW at lr 1e-5): 96
                tokens each

A contestant's guesses come from nothing that an earlier round drew. `cpu_ratio` is the ratio of the
medians of the process's CPU time: the machine may be shared.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.harness import DEVICE

from fusedrl.engine import CacheConfig, Completion, Drafts, HybridActor, PackedBatch, SamplingParams

PROMPTS = Path(__file__).parents[1] / "examples/prompts/questions.jsonl"
QUESTIONS, SAMPLES = 4, 8
TAIL, WRITTEN, NEW = 3, 192, 96
UPDATES, LR = 4, 1e-5
LONG = {"min_new_tokens": WRITTEN + NEW, "max_new_tokens": WRITTEN + NEW}  # no EOS ends them


@pytest.fixture(autouse=True)
def path(request) -> Path:
    found = request.config.getoption("--instruct")
    if DEVICE.type != "cpu":
        pytest.skip("guesses are computed on a CPU alone")
    if not found.is_dir():
        pytest.skip(f"no model in {found}: python examples/smollm2.py {found} writes it")
    return found


@cache
def actor_of(path: Path, dtype: torch.dtype) -> HybridActor:
    return HybridActor.from_pretrained(path, dtype=dtype, cache=CacheConfig(num_blocks=2048))


@cache
def epoch(path: Path, temperature: float, number: int) -> list[list[Completion]]:
    """Completions of all prompts, of 288 tokens, by the float32 model."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    return actor_of(path, torch.float32).generate(
        [json.loads(line)["prompt"] for line in lines],
        SamplingParams(temperature=temperature, n=SAMPLES, **LONG),
        [number * QUESTIONS + index for index in range(QUESTIONS)],
    )


def remembering(*groups: list[Completion]) -> Drafts:
    """Drafts that hold these completions."""
    drafts = Drafts()
    drafts.end(groups, [])
    drafts.keep()
    return drafts


def cut(one: Completion, length: int) -> Completion:
    """The first tokens of a completion."""
    return dataclasses.replace(
        one,
        token_ids=one.token_ids[:length],
        logprobs=one.logprobs[:length],
        weights_versions=one.weights_versions[:length],
        finish_reason="aborted",
    )


class Timed:
    """Contestants, with the CPU time of each call and what became of their guesses."""

    def __init__(self, actor: HybridActor, drafts: Callable[[], Drafts], *asked: Any) -> None:
        self._actor, self._drafts, self._asked = actor, drafts, asked
        self.seconds: dict[str, list[float]] = {"fusedrl": [], "fusedrl, no drafts": []}
        self.totals = [0, 0, 0]

    def contestants(self) -> dict[str, Callable[[], Any]]:
        return {name: lambda name=name: self._run(name) for name in self.seconds}

    def _run(self, name: str) -> list[tuple[list[int], list[float]]]:
        drafts = self._drafts() if name == "fusedrl" else None
        began = time.process_time()
        outs = self._actor.generate(*self._asked, drafts=drafts)
        self.seconds[name].append(time.process_time() - began)
        if drafts is not None:
            self.totals = drafts.totals
        return [(one.token_ids, one.logprobs) for group in outs for one in group]

    def derive(self, _: Mapping[str, Any]) -> dict[str, float]:
        with_drafts, without = map(statistics.median, self.seconds.values())
        drafted, accepted, verifications = self.totals
        return {
            "cpu_ratio": without / with_drafts,
            "drafted": drafted,
            "accepted_share": accepted / max(1, drafted),
            "tokens_per_verification": 1 + accepted / max(1, verifications),
        }


def same(ours: Any, other: Any) -> None:
    if ours != other:
        raise AssertionError("other tokens or log-probabilities")


CASES = pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 1.0), (torch.float32, 0.6)],
)


def race(contest, what: str, shape: str, dtype: torch.dtype, temperature: float, timed: Timed):
    contest(
        f"speculation, {what}",
        f"{shape}, T {temperature:g}",
        dtype,
        timed.contestants(),
        same=same,
        derive=timed.derive,
    )


@CASES
def bench_tail(contest, path, dtype, temperature):
    groups = epoch(path, temperature, 0)
    last = [group[-1] for group in groups[:TAIL]]
    siblings = [group[:-1] for group in groups]
    params = SamplingParams(temperature=temperature, max_new_tokens=NEW, min_new_tokens=NEW)
    timed = Timed(
        actor_of(path, dtype),
        lambda: remembering(*siblings),
        [cut(one, WRITTEN) for one in last],
        params,
        list(range(TAIL)),
    )
    race(contest, "tail", f"{TAIL} of {QUESTIONS * SAMPLES}", dtype, temperature, timed)


@CASES
def bench_second_epoch(contest, path, dtype, temperature):
    group = epoch(path, temperature, 0)[0]
    params = SamplingParams(
        temperature=temperature, n=SAMPLES, max_new_tokens=NEW, min_new_tokens=NEW
    )
    timed = Timed(
        actor_of(path, dtype),
        lambda: remembering(group),
        [group[0].prompt_ids],
        params,
        [QUESTIONS],
    )
    race(contest, "second epoch", f"1 x {SAMPLES} x {NEW}", dtype, temperature, timed)


@cache
def trained(path: Path) -> HybridActor:
    """The model after some optimizer steps on its own completions."""
    actor = HybridActor.from_pretrained(
        path, dtype=torch.float32, cache=CacheConfig(num_blocks=2048)
    )
    optimizer = torch.optim.AdamW(actor.parameters(), lr=LR)
    groups = epoch(path, 1.0, 0)
    for step in range(UPDATES):
        outs = [[groups[step % QUESTIONS][sample] for sample in range(2)]]
        batch = PackedBatch.from_completions([outs[0][0].prompt_ids], outs)
        logp, _ = actor.logprobs(batch, actor.forward(batch))
        (-logp.sum() / batch.action_mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return actor


def bench_evaluation(contest, path):
    params = SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW)
    prompts = [group[0].prompt_ids for group in epoch(path, 1.0, 0)]
    before = actor_of(path, torch.float32).generate(prompts, params)
    timed = Timed(trained(path), lambda: remembering(*before), prompts, params)
    race(contest, "evaluation", f"{QUESTIONS} x {NEW}", torch.float32, 1.0, timed)
