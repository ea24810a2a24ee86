"""Stages that learn from given texts: demonstrations, and preferences among completions."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fusedrl.engine.config.base import LoRAConfig, OptimConfig, RunConfig, require


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: cross-entropy of completions (or of whole texts), a mean over all their tokens.

    Args:
        model: directory or id of the model to train.
        data: JSONL file (.gz too): {"prompt", "completion"}, {"text"}, {"messages"}, or preference pairs, whose chosen answers are used.
        eval_fraction: part of the data held out; its loss is reported after the last step.
        eval_every: report it before the first step and every so many steps, too; 0 does not.
        epochs: passes over the data.
        sequences_per_step: sequences of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward.
        every_turn: learn every turn of the assistant in conversations ({"messages"}, MOSS), not the last alone; needs a chat template.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward pass: less memory, one more forward.
        max_length: longer examples are dropped and counted; None is the model's own limit.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora turns it on. <run>/model then holds them merged,
            <run>/adapter by themselves.
    """

    model: str
    data: str
    eval_fraction: float = 0.0
    eval_every: int = 0
    epochs: int = 1
    sequences_per_step: int = 32
    tokens_per_microbatch: int = 8192
    every_turn: bool = False
    checkpoint_activations: bool = False
    max_length: int | None = None
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_data(self)
        require(self.eval_every >= 0 and (self.eval_every == 0 or self.eval_fraction > 0), "eval_every", ">= 0, and 0 with eval_fraction = 0 (nothing is held "
                "out)", self.eval_every)

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "sft"


@dataclass(frozen=True)
class RewardModelConfig:
    """A pairwise (Bradley-Terry) reward model on the trunk of a language model.

    Args:
        model: directory or id of the language model whose trunk is used (an SFT model, usually).
        data: JSONL file (.gz too) of preference pairs: {"prompt", "chosen", "rejected"} or implicit {"chosen", "rejected"} such as HH-RLHF.
        eval_fraction: part of the pairs held out for the accuracy.
        epochs: passes over the pairs; one is usual, more over-fit.
        pairs_per_step: pairs of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward pass: less memory, one more forward.
        max_length: pairs with a longer side are dropped and counted; None is the model's own limit.
        normalize: shift the scores so that the chosen answers of the training pairs score 0 on average.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
    """

    model: str
    data: str
    eval_fraction: float = 0.1
    epochs: int = 1
    pairs_per_step: int = 32
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    max_length: int | None = None
    normalize: bool = True
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_data(self)

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "reward model"


def _check_data(config: SFTConfig | RewardModelConfig) -> None:
    require(0 <= config.eval_fraction < 1, "eval_fraction", "in [0, 1)", config.eval_fraction)
    for name in ("epochs", "tokens_per_microbatch"):
        require(getattr(config, name) >= 1, name, ">= 1", getattr(config, name))
