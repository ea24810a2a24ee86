"""Share of each part in the time of a `train_policy` step, on a real model (`--model DIR`). The
whole loop runs, with its rollouts, rewards, metrics and updates.

GRPO step     8 prompts of 8 samples of up to 64 tokens, one optimizer step, KL k3 in the loss
PPO step      64 prompts, up to 64 tokens, critic, KL in the reward, 4 epochs

The field `extra` of a result has the share of each part in per cent, as medians over the steps.
Calls of generation, the decoder, the head, backward, the optimizer, the reward and the run
directory are timed; the time of a timed call inside another one is subtracted from the outer call.
"algorithm" is *everything else* between two steps: advantages, losses, token weights, batches and
their split into micro-batches, controllers, metrics and the rest. "algorithm: loss" and similar
entries are parts of "algorithm". The backward of a loss counts as "backward". The loop runs in a
separate thread and halts between steps. On a CPU the shares are of that thread's processor time,
which other processes do not lengthen; on a GPU they are of the wall clock.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.harness import DEVICE

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, OptimConfig, PolicyConfig, RunConfig
from fusedrl.engine.optim.adamw import Optimizer
from fusedrl.engine.policy import micro_loss, minibatches
from fusedrl.engine.policy.metrics import Meter
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.runs.run import Run
from fusedrl.engine.stages import policy

TEXTS = [
    f"Once upon a time there was a {size} {animal} who"
    for size in ("big", "small", "kind", "shy", "sad", "red", "old", "new")
    for animal in ("cat", "dog", "fox", "pig", "cow", "hen", "bear", "duck")
]
REWARD = """
def share_of_even_ids(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
ALGORITHM = "algorithm"
PARTS: list[tuple[Any, str, str]] = [
    (HybridActor, "generate", "generation"),
    (HybridActor, "forward", "forward"),
    (HybridActor, "logprobs", "head"),
    (HybridActor, "values", "head"),
    (torch.Tensor, "backward", "backward"),
    (Optimizer, "step", "optimizer"),
    (Optimizer, "zero_grad", "optimizer"),
    (RewardSet, "score", "reward"),
    (Run, "log", "run directory"),
    (Run, "samples", "run directory"),
    (Run, "save_if_due", "run directory"),
    (policy, "estimate", "algorithm: advantages"),
    (micro_loss, "objective_loss", "algorithm: loss"),
    (micro_loss, "head_loss", "algorithm: loss"),
    (minibatches, "minibatch_weights", "algorithm: weights"),
    (policy, "measure", "algorithm: metrics"),
    (Meter, "add", "algorithm: metrics"),
    (Meter, "metrics", "algorithm: metrics"),
    (PackedBatch, "select", "algorithm: batches"),
    (PackedBatch, "from_completions", "algorithm: batches"),
]


def now() -> float:
    """Seconds of this thread."""
    return time.thread_time() if DEVICE.type == "cpu" else time.perf_counter()


class Clock:
    """Seconds of a step by part, each call's own: what is called within it and timed, too, is not
    in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self._within: list[float] = []
        self._began = now()

    def timed(self, function: Callable, part: str) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            before = now()
            self._within.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent = now() - before
                self.seconds[part] += spent - self._within.pop()
                if self._within:
                    self._within[-1] += spent

        return call

    def start(self) -> None:
        self.seconds.clear()
        self._began = now()

    def stop(self) -> None:
        """Record the shares of the parts, in per cent, of the step since `start`."""
        whole = now() - self._began
        shares = {part: 100 * seconds / whole for part, seconds in self.seconds.items()}
        shares[ALGORITHM] = 100 - sum(
            share for part, share in shares.items() if not part.startswith(ALGORITHM)
        )
        self.steps.append(shares)

    def medians(self, last: int) -> dict[str, float]:
        """Return the median shares over the newest `last` steps, sorted by size."""
        parts = {part for shares in self.steps[-last:] for part in shares}
        found = {
            f"{part} %": statistics.median(shares.get(part, 0.0) for shares in self.steps[-last:])
            for part in parts
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _time_parts(clock: Clock, patch: pytest.MonkeyPatch) -> None:
    for owner, name, part in PARTS:
        found = vars(owner)[name]
        timed = clock.timed(found.__func__ if isinstance(found, classmethod) else found, part)
        patch.setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)


@contextmanager
def halting_loop(
    config: PolicyConfig, clock: Clock, patch: pytest.MonkeyPatch
) -> Iterator[Callable[[], int]]:
    """train_policy, standing between two steps; the function does one and returns how many tokens
    it trained on."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    state: dict[str, Any] = {"stop": False, "error": None, "tokens": 0}
    _time_parts(clock, patch)
    restore, save_if_due, log = Run.restore, Run.save_if_due, Run.log

    class Stop(BaseException):
        pass

    def halt() -> None:
        go.acquire()
        if state["stop"]:
            raise Stop
        clock.start()

    def after(function: Callable, *, ends: bool) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if ends:
                clock.stop()
                done.release()
            halt()
            return result

        return call

    def noted(run: Run, step: int, metrics: dict[str, float]) -> None:
        state["tokens"] = int(metrics["step_tokens"])
        log(run, step, metrics)

    patch.setattr(Run, "log", noted)
    patch.setattr(Run, "restore", after(restore, ends=False))
    patch.setattr(Run, "save_if_due", after(save_if_due, ends=True))

    def train() -> None:
        torch.set_num_threads(1)  # OpenMP's number is a thread's own
        try:
            policy.train_policy(config)
        except Stop:
            pass
        except BaseException as error:
            state["error"] = error
        done.release()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()

    def step() -> int:
        go.release()
        done.acquire()
        if state["error"] is not None:
            raise RuntimeError("the loop stopped") from state["error"]
        return state["tokens"]

    try:
        yield step
    finally:
        state["stop"] = True
        go.release()
        thread.join()


@pytest.mark.parametrize("algorithm, prompts, samples", [("grpo", 8, 8), ("ppo", 64, 1)])
def bench_breakdown(contest, request, tmp_path, monkeypatch, algorithm, prompts, samples):
    model = request.config.getoption("--model")
    if not model.is_dir():
        pytest.skip(f"no model in {model.name}/: name the directory of one by --model")
    data, rewards = Path(tmp_path / "prompts.jsonl"), Path(tmp_path / "rewards.py")
    data.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS), encoding="utf-8"
    )
    rewards.write_text(REWARD, encoding="utf-8")
    config = PolicyConfig(
        str(model),
        str(data),
        (f"{rewards}:share_of_even_ids",),
        algorithm,
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        steps=100_000,
        generation=GenerationConfig(max_new_tokens=64),
        optim=OptimConfig(lr=1e-6, schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )
    clock = Clock()
    with halting_loop(config, clock, monkeypatch) as step:
        contest(
            f"{config.title.upper()} step, by part",
            f"{prompts} x {samples} x 64",
            torch.float32,
            {"fusedrl": step},
            same=None,
            derive=lambda times: clock.medians(len(times["fusedrl"])),
        )
