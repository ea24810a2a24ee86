"""Stages that learn from given texts: demonstrations, and preferences among completions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fusedrl.engine.config.base import LoRAConfig, OptimConfig, RunConfig, check_values, require


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: cross-entropy of completions (or of whole texts), a mean over all
    their tokens.

    Args:
        model: directory or id of the model to train.
        data: JSONL file (.gz too): {"prompt", "completion"}, {"text"}, {"messages"}, or preference
            pairs, whose chosen answers are used.
        eval_fraction: part of the data held out; its loss is reported after the last step.
        eval_every: report it before the first step and every so many steps, too; 0 does not.
        epochs: passes over the data.
        sequences_per_step: sequences of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward.
        every_turn: learn every turn of the assistant in conversations ({"messages"}, MOSS), not the
            last alone; needs a chat template.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward
            pass: less memory, one more forward.
        max_length: longer examples are dropped and counted; None is the model's own limit.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping
            with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. <run>/model then holds them merged, <run>/adapter by themselves.
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
        require(self.sequences_per_step >= 1, "sequences_per_step", ">= 1", self.sequences_per_step)
        require(
            self.eval_every >= 0 and (self.eval_every == 0 or self.eval_fraction > 0),
            "eval_every",
            ">= 0, and 0 with eval_fraction = 0 (nothing is held out)",
            self.eval_every,
        )

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "sft"


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model on the trunk of a language model, from preferences (Bradley-Terry) between two
    answers or among K.

    Args:
        model: directory or id of the language model whose trunk is used (an SFT model, usually).
        data: JSONL file (.gz too) of preference pairs: {"prompt", "chosen", "rejected"} or implicit
            {"chosen", "rejected"} such as HH-RLHF, with a "margin" if there is one; or of ranked
            lists: {"prompt", "completions", "ranks"}, 1 is best. All pairs of a list are learnt
            together, as one example.
        eval_fraction: part of the examples held out for the report.
        by_prompt: hold out rows of the same prompt together, and give them one vote in the report:
            for files with several rows of a prompt (SHP, summaries), whose accuracy is flattered
            and whose interval is too narrow otherwise.
        eval_every: steps between evaluations on them; 0 is at the end only.
        epochs: passes over the examples; one is usual, more over-fit.
        pairs_per_step: examples (pairs, or lists) of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward; an example is never split.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward
            pass: less memory, one more forward.
        max_length: examples with a longer side are dropped and counted; None is the model's own
            limit.
        label_noise: the rate at which labels are known to be flipped, in [0, 0.5): what is learnt
            is then what annotators mean, not how often they agree. Two who agree on a share a of
            clear cases flip (1 - sqrt(2a - 1)) / 2 each: 18% for 70%.
        denoise_folds: 2 or more: before training, as many reward models are trained, each without
            one part of the training examples, and those of its part are left out that it
            contradicts; 0 trains on all. Held-out examples are never left out.
        denoise_threshold: a pair is contradicted where the rejected answer scores more than this
            above the chosen one (log-odds).
        soft_labels: keep the ties of WebGPT, as pairs of which either answer is as likely to be the
            better one.
        center_coef: times the mean of (sum of the two scores)^2, which draws scores towards 0
            without a shift; 0.01 is usual.
        imitation_coef: times the cross-entropy, a mean over tokens, of the best answer by a second
            head over the vocabulary on the same trunk.
        normalize: after training, over the best answers of the training examples: mean, shift the
            scores to mean 0; mean_std, scale them to variance 1, too (they are log-odds no more);
            none, leave them.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping
            with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen trunk; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. The heads are trained in full, and <run>/model holds the adapters merged.
    """

    model: str
    data: str
    eval_fraction: float = 0.1
    by_prompt: bool = False
    eval_every: int = 0
    epochs: int = 1
    pairs_per_step: int = 32
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    max_length: int | None = None
    label_noise: float = 0.0
    denoise_folds: int = 0
    denoise_threshold: float = 0.5
    soft_labels: bool = False
    center_coef: float = 0.0
    imitation_coef: float = 0.0
    normalize: Literal["none", "mean", "mean_std"] = "mean"
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_data(self)
        require(self.pairs_per_step >= 1, "pairs_per_step", ">= 1", self.pairs_per_step)
        require(self.eval_every >= 0, "eval_every", ">= 0", self.eval_every)
        require(
            0 <= self.label_noise < 0.5,
            "label_noise",
            "in [0, 0.5); at one half labels say nothing",
            self.label_noise,
        )
        require(
            self.denoise_folds == 0 or self.denoise_folds >= 2,
            "denoise_folds",
            "0, or 2 and more",
            self.denoise_folds,
        )
        for name in ("center_coef", "imitation_coef", "denoise_threshold"):
            require(0 <= getattr(self, name) < math.inf, name, ">= 0", getattr(self, name))
        require(
            self.normalize in ("none", "mean", "mean_std"),
            "normalize",
            "none, mean or mean_std (it was true or false: mean or none)",
            self.normalize,
        )

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "reward model"


def _check_data(config: SFTConfig | RewardModelConfig) -> None:
    check_values(config)
    require(0 <= config.eval_fraction < 1, "eval_fraction", "in [0, 1)", config.eval_fraction)
    for name in ("epochs", "tokens_per_microbatch"):
        require(getattr(config, name) >= 1, name, ">= 1", getattr(config, name))
