"""Rollout and reward with a model (`--model DIR`, a small Llama-like one): reward functions called
in this process after the rollout, and in worker processes while completions finish.

slow reward     64 completions of 16 to 457 tokens, and a function that takes 50 ms for each; 4
                worker processes. Beside it the rollout alone, and the rewards alone in the workers,
                handed in at once: nothing can take less than the longer of the two
                (`over_the_longer`: how many times that, round by round)
cheap reward    8 x 8 x 128 tokens whose reward is their number, which is what workers cost; beside
                it a whole GRPO step on them (`cost_of_a_step`: the difference as a share of that)

Completions end where their prompt's request says, so that all contestants draw the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.harness import DEVICE, Times

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.engine.generation.generator import Finished
from fusedrl.engine.rewards.functions import Rollout
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.tools.bench_step import PolicyStep
from fusedrl.engine.tools.workloads import random_workload

WORKERS = 4
SEQUENCES, SHORTEST, LONGEST = 64, 16, 457
PROMPTS, SAMPLES, NEW = 8, 8, 128
REWARDS = """
import time

def slow(completion_ids, **columns):
    time.sleep(0.05 * len(completion_ids))
    return [float(len(ids)) for ids in completion_ids]

def cheap(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def actor(request) -> HybridActor:
    path: Path = request.config.getoption("--model")
    if not path.is_dir():
        pytest.skip(f"no model in {path.name}/: name the directory of one by --model")
    found = HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE)
    found.decoder.config = dataclasses.replace(found.decoder.config, eos_token_ids=())
    found.tokenizer = None
    return found


@pytest.fixture
def rewards(tmp_path) -> Iterator[Callable[[str], SimpleNamespace]]:
    """A reward of the file above, in this process and in workers that have started."""
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS, encoding="utf-8")
    pool = Workers(WORKERS, 60.0)

    def make(name: str) -> SimpleNamespace:
        spec = f"{file}:{name}"
        both = SimpleNamespace(
            here=RewardSet([load_reward(spec)]), there=RewardSet([load_reward(spec, workers=pool)])
        )
        both.there.score(["p"] * 8, list("abcdefgh"), [[1]] * 8, [[2]] * 8)
        return both

    with pool:
        yield make


def scored(
    actor: HybridActor,
    rewards: RewardSet,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
) -> list[float]:
    """The totals of completions, handed to workers as they finish, if there are any."""
    ahead = rewards.ahead()

    def ask(done: Finished) -> None:
        ids = done.completion.token_ids
        if ahead is not None:
            place = done.prompt * samples + done.sample
            ahead.add(place, Rollout(["p"], [""], [[1]], [ids], {}), (place,))

    samples = params[0].n
    outs = actor.generate(
        [list(prompt) for prompt in prompts], params, finished=None if ahead is None else ask
    )
    ids = [completion.token_ids for out in outs for completion in out]
    count = len(ids)
    return rewards.score(["p"] * count, [""] * count, [[1]] * count, ids, ahead=ahead).total


def equal(a: Any, b: Any) -> None:
    if a != b:
        raise AssertionError("rewards that differ")


def bench_slow_reward(contest, actor, rewards):
    both = rewards("slow")
    prompts = random_workload(actor.decoder.config.vocab_size, SEQUENCES, 8, NEW).prompts
    step = (LONGEST - SHORTEST) // (SEQUENCES - 1)
    params = [SamplingParams(max_new_tokens=SHORTEST + step * place) for place in range(SEQUENCES)]
    lengths = [float(one.max_new_tokens) for one in params]

    def alone() -> list[float]:
        outs = actor.generate([list(prompt) for prompt in prompts], params)
        return [float(len(out[0].token_ids)) for out in outs]

    def handed_in() -> list[float]:
        ids = [[1] * int(length) for length in lengths]
        count = len(ids)
        return both.there.score(["p"] * count, [""] * count, [[1]] * count, ids).total

    def derive(times: Times) -> dict[str, float]:
        longer = [
            max(pair) for pair in zip(times["rollout alone"], times["rewards alone"], strict=True)
        ]
        over = sorted(
            ours / least for ours, least in zip(times["fusedrl, workers"], longer, strict=True)
        )
        return {"over_the_longer": over[len(over) // 2]}

    contest(
        "rollout and slow reward",
        f"{SEQUENCES} x (8 + {SHORTEST}..{LONGEST}), 50 ms each, {WORKERS} workers",
        torch.float32,
        {
            "fusedrl, workers": lambda: scored(actor, both.there, prompts, params),
            "fusedrl, in process": lambda: scored(actor, both.here, prompts, params),
            "rollout alone": alone,
            "rewards alone": handed_in,
        },
        same=equal,
        derive=derive,
    )


def bench_cheap_reward(contest, actor, rewards):
    both = rewards("cheap")
    workload = random_workload(actor.decoder.config.vocab_size, PROMPTS, 8, NEW, SAMPLES)
    params = [SamplingParams(max_new_tokens=NEW, n=SAMPLES)] * PROMPTS
    step = PolicyStep(actor, workload, algorithm="grpo")

    def derive(times: Times) -> dict[str, float]:
        there, here, whole = (
            times[name] for name in ("fusedrl, workers", "fusedrl, in process", "a whole step")
        )
        costs = sorted((x - y) / z for x, y, z in zip(there, here, whole, strict=True))
        return {"cost_of_a_step": costs[len(costs) // 2]}

    contest(
        "rollout and cheap reward",
        f"{PROMPTS} x {SAMPLES} x (8 + {NEW}), {WORKERS} workers",
        torch.float32,
        {
            "fusedrl, workers": lambda: scored(actor, both.there, workload.prompts, params),
            "fusedrl, in process": lambda: scored(actor, both.here, workload.prompts, params),
            "a whole step": lambda: step() and None,
        },
        same=equal,
        unchecked=("a whole step",),
        derive=derive,
    )
