"""fusedrl bench step: a whole PPO or GRPO step, timed phase by phase in the training loop's own
functions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, KLConfig, OptimConfig, PolicyConfig, RunConfig
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.policy.advantages import Signals, estimate
from fusedrl.engine.policy.control import Control
from fusedrl.engine.rollout.reference import Frozen
from fusedrl.engine.runs.run import peak_memory
from fusedrl.engine.stages.policy import advantages_first, cuts_of, recount, score, settle, update
from fusedrl.engine.tools.bench import PHASES, Subject, about
from fusedrl.engine.tools.machine import (
    gemm_rate,
    wait_for,
)
from fusedrl.engine.tools.workloads import (
    Workload,
    floor_of,
    forward_flops,
    random_workload,
)

_LR = 1e-6  # of steps that are timed: the weights hardly move


class PolicyStep:
    """Step of PPO or GRPO as `fusedrl train` makes it, on prompts given as token ids. A call makes
    one step and returns the seconds of each phase in PHASES and of the whole "step".

    PPO: value head, a frozen reference whose KL is in the reward, GAE, `epochs` passes. GRPO:
    groups of the workload's samples, no reference. With one epoch GRPO does not score: the training
    forward gives the old log-probabilities. Each epoch makes one optimizer step.

    Args:
        actor: the policy to train; for PPO it has a value head.
        reference: the frozen reference, for PPO.
        reward: f(prompt ids, completion ids) -> score.
    """

    def __init__(
        self,
        actor: HybridActor,
        workload: Workload,
        *,
        algorithm: str,
        epochs: int = 1,
        reference: HybridActor | None = None,
        reward: Callable[[list[int], list[int]], float] | None = None,
        tokens_per_microbatch: int = 8192,
        lr: float = _LR,
        seed: int = 0,
    ) -> None:
        ppo = algorithm == "ppo"
        if ppo and (reference is None or actor.value_head is None):
            raise ValueError(
                "PolicyStep: ppo needs a reference and an actor with a value head, got no "
                f"{'reference' if reference is None else 'value head'}"
            )
        self.actor, self.workload, self._reward = actor, workload, reward or _share_of_even_ids
        self._reference, self._scored = (
            Frozen(reference) if ppo and reference is not None else None,
            ppo or epochs > 1,
        )
        self.config = PolicyConfig(
            "-",
            "-",
            ("-",),
            algorithm,
            prompts_per_step=len(workload.prompts),
            samples_per_prompt=workload.samples,
            epochs=epochs,
            minibatches=1,
            tokens_per_microbatch=tokens_per_microbatch,
            kl=KLConfig(coef=0.05 if ppo else 0.0),
            strict=actor.strict,
            generation=GenerationConfig(max_new_tokens=max(workload.new_tokens)),
            optim=OptimConfig(lr=lr, schedule="constant"),
            run=RunConfig(seed=seed),
        )
        self._learner, self._control = Learner(actor, self.config.optim), Control(self.config)
        self._prompts = [list(prompt) for prompt in workload.prompts]
        self._params = [
            SamplingParams(max_new_tokens=n, n=workload.samples, seed=seed)
            for n in workload.new_tokens
        ]
        self._steps = 0
        self.batch: PackedBatch | None = None  # of the last step
        self.metrics: dict[str, float] = {}

    def __call__(self) -> dict[str, float]:
        actor, config, control = self.actor, self.config, self._control
        seconds, device = dict.fromkeys(PHASES, 0.0), actor.decoder.device
        began = time.perf_counter()
        with _timed(seconds, "generate", device):
            # number of request ids used so far; no id is used twice
            first = self._steps * len(self._prompts)
            outs = actor.generate(
                self._prompts,
                self._params,
                request_ids=list(range(first, first + len(self._prompts))),
            )
            groups = torch.arange(len(self._prompts), device=device).repeat_interleave(
                self.workload.samples
            )
            batch = PackedBatch.from_completions(self._prompts, outs, device=device).with_columns(
                group_ids=groups
            )
        with _timed(seconds, "reward", device):
            scores = [
                self._reward(c.prompt_ids, c.token_ids) for completions in outs for c in completions
            ]
            batch = batch.with_columns(
                scores=torch.tensor(scores, dtype=torch.float32, device=device)
            )
        if advantages_first(config):
            with _timed(seconds, "advantage", device):
                batch, totals = self._estimated(batch)
        with _timed(seconds, "score", device):
            cuts = cuts_of(batch, config, self._steps, epoch=0)
            batch = score(
                actor if self._scored else None,
                self._reference,
                batch,
                cuts,
                config.generation.temperature,
            )
        if not advantages_first(config):
            with _timed(seconds, "advantage", device):
                batch, totals = self._estimated(batch)
        with _timed(seconds, "train", device), actor.lend_cache():
            self.metrics = update(
                actor, self._reference, self._learner, batch, cuts, config, control, self._steps
            )
            recount(control, actor.value_head)
            control.update(self.metrics, totals)
        self.batch, self._steps = batch, self._steps + 1
        seconds["step"] = time.perf_counter() - began
        seconds["other"] = seconds["step"] - sum(seconds[phase] for phase in PHASES)
        return seconds

    def _estimated(self, batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
        config, control = self.config, self._control
        signals = Signals.of(
            config, batch, control.kl.coef, control.returns.mean, control.level or 0.0
        )
        signals = settle(signals, control, self.actor.value_head)
        return estimate(config, signals), signals.totals

    def flops(self) -> dict[str, float]:
        """Floating-point operations that the model needs in each phase, without recomputation."""
        config, lengths = self.actor.decoder.config, self.workload.lengths()
        forward = forward_flops(config, lengths, self.workload.output_tokens)
        scorers = int(self._scored) + (self._reference is not None)
        return {
            "generate": floor_of(config, self.workload, 1, 1.0, 1.0).flops,
            "score": scorers * forward,
            "train": 3 * self.config.epochs * forward,
        }


@contextmanager
def _timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    before = time.perf_counter()
    yield
    wait_for(device)
    seconds[phase] += time.perf_counter() - before


def _share_of_even_ids(prompt_ids: list[int], token_ids: list[int]) -> float:
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def step(
    subject: Subject,
    *,
    algorithm: str,
    num_prompts: int,
    samples: int,
    input_len: int,
    output_len: int,
    epochs: int,
    tokens_per_microbatch: int = 8192,
    strict: bool = False,
    iterations: int = 3,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure whole steps on random prompts, phase by phase. With `strict`, they alternate with
    steps in strict numerics, on the same weights and sizes.

    Raises:
        ConfigError: a sequence is longer than the model's positions, or GRPO has groups of one.
        ValueError: strict numerics are not possible here.
    """
    if algorithm == "grpo" and samples < 2:
        raise ConfigError(
            "bench: expected --n >= 2 for grpo, whose advantages are relative to the other "
            f"samples of a prompt, got {samples}"
        )
    decoder = subject.decoder()
    config, device = decoder.config, decoder.device
    workload = random_workload(config.vocab_size, num_prompts, input_len, output_len, samples, seed)
    workload.check(config)
    reference = HybridActor(copy.deepcopy(decoder)) if algorithm == "ppo" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps: dict[str, PolicyStep] = {}
    for kind in ("step", "strict") if strict else ("step",):
        head = ValueHead(config.hidden_size, device=device) if algorithm == "ppo" else None
        actor = HybridActor(
            copy.deepcopy(decoder) if kind == "strict" else decoder,
            value_head=head,
            strict=kind == "strict",
        )
        steps[kind] = PolicyStep(
            actor,
            workload,
            algorithm=algorithm,
            epochs=epochs,
            reference=reference,
            seed=seed,
            tokens_per_microbatch=tokens_per_microbatch,
        )
    rounds = [{kind: run() for kind, run in steps.items()} for _ in range(warmup + iterations)][
        warmup:
    ]
    seconds = {kind: _median_of([each[kind] for each in rounds]) for kind in steps}
    found, flops = about(subject, decoder, workload), steps["step"].flops()
    tokens, taken, rate = sum(workload.lengths()), seconds["step"], gemm_rate(device)
    return {
        "algorithm": algorithm,
        "epochs": epochs,
        "seconds": taken,
        "tokens_per_second": tokens / taken["step"],
        "output_tokens_per_second": workload.output_tokens / taken["generate"],
        "mfu": sum(flops.values()) / taken["step"] / rate,
        "train_mfu": flops["train"] / taken["train"] / rate,
        "flops": flops,
        "peak_memory_gib": peak_memory(),
        "strict": {
            "seconds": seconds["strict"],
            "times_the_step": seconds["strict"]["step"] / taken["step"],
        }
        if strict
        else None,
        "steps": [each["step"]["step"] for each in rounds],
        **found,
    }


def _median_of(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the step with the median time. All its phases come from this one step, so they add
    up."""
    return sorted(steps, key=lambda seconds: seconds["step"])[(len(steps) - 1) // 2]
