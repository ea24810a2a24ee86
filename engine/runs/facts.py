"""Facts of a run that are known before its first step, for the head of its output."""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import suppress

import torch

from fusedrl.engine.base.memory import format_bytes
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.config.base import SamplingConfig, StageConfig
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.ranks import Ranks
from fusedrl.kernels.runtime.dispatch import Implementations


def facts_of(
    config: StageConfig, learner: Learner, ranks: Ranks, start: int, total: int
) -> list[tuple[str, str]]:
    """List a run's facts as (name, text): steps, model, device, kernels, memory."""
    parameters = [p for _, p in learner.model.named_parameters()]
    trained = [p for p in parameters if p.requires_grad]
    all_of_them, some = (sum(p.numel() for p in which) for which in (parameters, trained))
    decoder = getattr(learner.model, "decoder", None)
    family = "" if decoder is None else f"{decoder.config.model_type}, "
    share = "" if some == all_of_them else f", of which {_count(some)} are trained"
    steps = f"{total:,} steps" + (f", from step {start + 1:,} on" if 0 < start < total else "")
    if isinstance(config, SamplingConfig):
        steps += (
            f" of {config.prompts_per_step:,} prompts x {config.samples_per_prompt:,} completions "
            f"of at most {config.generation.max_new_tokens:,} tokens"
        )
    return [
        ("run", f"{config.run.dir}: {steps}"),
        *([("update", _update(config))] if isinstance(config, PolicyConfig) else []),
        ("model", f"{config.model}: {family}{_count(all_of_them)} parameters{share}"),
        ("device", _device(learner.device, dtype_of(learner), ranks)),
        ("kernels", kernels_on(learner.device)),
        ("memory", _memory(config, learner, ranks)),
        *_workers(config),
    ]


def _update(config: PolicyConfig) -> str:
    """Describe the optimizer steps of a rollout, and what they leave without an effect."""
    if config.objective == "trpo":
        return "1 step of TRPO a rollout"
    count = config.epochs * config.minibatches
    if count > 1:
        return (
            f"{count:,} optimizer steps a rollout: {config.epochs:,} epochs x "
            f"{config.minibatches:,} minibatches"
        )
    idle = ", ".join(config.idle_bounds)
    clips = f", so that ratios are 1 and nothing is clipped ({idle})" if idle else ""
    return f"1 optimizer step a rollout{clips}"


def _workers(config: StageConfig) -> list[tuple[str, str]]:
    """Say, of a run with worker processes, how many call its rewards."""
    if not isinstance(config, SamplingConfig) or not config.reward_workers:
        return []
    count, seconds = config.reward_workers, config.reward_timeout
    processes = f"{count} worker process{'es' if count > 1 else ''}"
    return [("rewards", f"functions in {processes}, at most {seconds:g} s a call")]


def dtype_of(learner: Learner) -> str:
    """Return the name of the dtype of most of a model's weights, such as float32."""
    bytes_of: defaultdict[torch.dtype, int] = defaultdict(int)
    for _, parameter in learner.model.named_parameters():
        bytes_of[parameter.dtype] += parameter.nbytes
    return str(max(bytes_of, key=lambda dtype: bytes_of[dtype])).removeprefix("torch.")


def kernels_on(device: torch.device) -> str:
    """Describe which implementation serves the ops that are loaded, on this device: first the one
    that serves most of them, then the others with their ops."""
    tables = {
        table.op: table
        for name, module in list(sys.modules.items())
        if name.startswith("fusedrl.kernels.")
        for table in vars(module).values()
        if isinstance(table, Implementations) and "float64" not in table.op  # for tests alone
    }
    served: defaultdict[str, list[str]] = defaultdict(list)
    for op, table in sorted(tables.items()):
        with suppress(RuntimeError):  # nothing serves it here, and nothing may need it
            served[table.choose(device)].append(op)
    first, *others = sorted(served, key=lambda name: -len(served[name])) or ["none"]
    return "; ".join([first, *(f"{name} for {', '.join(served[name])}" for name in others)])


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return str(number)


def _device(device: torch.device, dtype: str, ranks: Ranks) -> str:
    if device.type == "cuda":
        where = f"{device}, {torch.cuda.get_device_name(device)}"
    else:
        threads = torch.get_num_threads()
        where = f"{device}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{where}, {dtype}" + (f", {ranks.size} ranks" if ranks.size > 1 else "")


def _memory(config: StageConfig, learner: Learner, ranks: Ranks) -> str:
    """Describe the memory that is known before the first step, of one rank."""
    parameters = [p for _, p in learner.model.named_parameters()]
    trained = [p for p in parameters if p.requires_grad]
    moments = 2 if config.optim.state == "int8" else 8
    owned = sum(p.numel() * (moments + (4 if p.dtype.itemsize < 4 else 0)) for p in trained)
    parts = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": owned // ranks.size,
    }
    if isinstance(config, SamplingConfig) and hasattr(learner.model, "cache_bytes"):
        parts["KV cache"] = learner.model.cache_bytes
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{shown}; activations and other models come on top (fusedrl plan counts them)"
