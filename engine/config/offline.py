"""Options of the stages that learn from given texts: demonstrations, and preferences between
completions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from fusedrl.engine.config.base import GivenTextsConfig, StageConfig, check


@dataclass(frozen=True)
class SFTConfig(StageConfig, GivenTextsConfig):
    """Supervised fine-tuning: the mean cross-entropy of the tokens of completions or whole texts.

    Args:
        model: directory or id of the model to train.
        data: a file or hf:ID (docs/guide.md): {"prompt", "completion"}, {"text"}, {"messages"}, or
            preference pairs, whose chosen answers are used.
        eval_fraction: part of the data held out; its loss is reported after the last step.
        eval_every: also report the loss before the first step and every so many steps; 0 reports it
            at the end only.
        sequences_per_step: sequences of one optimizer step.
        every_turn: learn every turn of the assistant in conversations ({"messages"}, MOSS), not
            only the last; needs a chat template.
    """

    model: str
    data: str
    _: KW_ONLY
    eval_every: int = 0
    sequences_per_step: int = 32
    every_turn: bool = False

    def __post_init__(self) -> None:
        self.check_stage()
        self.check_texts()
        check(
            self,
            "",
            ("sequences_per_step", self.sequences_per_step >= 1, ">= 1"),
            (
                "eval_every",
                self.eval_every >= 0 and (self.eval_every == 0 or self.eval_fraction > 0),
                ">= 0, and 0 with eval_fraction = 0 (nothing is held out)",
            ),
        )

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return "sft"


@dataclass(frozen=True)
class RewardModelConfig(StageConfig, GivenTextsConfig):
    """Reward model on the trunk of a language model, learned from preferences among K answers.

    The model of preferences is Bradley and Terry's, for two answers or more.

    Args:
        model: directory or id of the language model whose trunk is used (an SFT model, usually).
        data: a file or hf:ID (docs/guide.md) of preference pairs: {"prompt", "chosen", "rejected"}
            or implicit {"chosen", "rejected"} such as HH-RLHF, with a "margin" if there is one; or
            of ranked lists: {"prompt", "completions", "ranks"}, where rank 1 is best. All pairs of
            a list are learned together, as one example.
        eval_fraction: part of the examples held out for the report.
        by_prompt: hold out all rows of a prompt together, and count each prompt once in the report.
            Use it for files with several rows per prompt (SHP, summaries): otherwise the accuracy
            is too high and its interval too narrow.
        eval_every: steps between evaluations on the held-out examples; 0 evaluates at the end only.
        epochs: passes over the examples; one is usual, and more tend to over-fit.
        pairs_per_step: examples (pairs, or lists) of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward; an example is never split.
        max_length: largest number of tokens of a prompt with an answer; longer examples are dropped
            and counted. None takes the model's own limit.
        label_noise: the rate at which labels are known to be flipped, in [0, 0.5). The model then
            learns what annotators mean, not how often they agree. If two annotators agree on a
            share a of clear cases, each flips (1 - sqrt(2a - 1)) / 2 of them: 18% for 70%.
        denoise_folds: number of parts (2 or more) of the training examples; before training, one
            reward model per part is trained on all other parts, and examples of the part that this
            model contradicts are left out. 0 trains on all examples. Held-out examples are never
            left out.
        denoise_threshold: a pair is contradicted if the rejected answer scores higher than the
            chosen one by more than this (log-odds).
        soft_labels: keep the ties of WebGPT, as pairs in which both answers are equally likely to
            be the better one.
        center_coef: weight of the mean of (sum of the two scores)^2 in the loss, which draws scores
            towards 0; 0.01 is usual.
        imitation_coef: weight of the best answer's cross-entropy, a mean over tokens, in the loss.
            A second head over the vocabulary, on the same trunk, computes it.
        normalize: change of the scores after training, by their statistics over the best answers of
            the training examples. mean shifts the scores to mean 0; mean_std also scales them to
            variance 1 (they are then no longer log-odds); none leaves them.
        lora: train adapters on the frozen trunk; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. The heads are trained in full, and <run>/model holds the adapters merged.
    """

    model: str
    data: str
    _: KW_ONLY
    eval_fraction: float = 0.1
    by_prompt: bool = False
    eval_every: int = 0
    pairs_per_step: int = 32
    label_noise: float = 0.0
    denoise_folds: int = 0
    denoise_threshold: float = 0.5
    soft_labels: bool = False
    center_coef: float = 0.0
    imitation_coef: float = 0.0
    normalize: Literal["none", "mean", "mean_std"] = "mean"

    def __post_init__(self) -> None:
        self.check_stage()
        self.check_texts()
        check(
            self,
            "",
            ("pairs_per_step", self.pairs_per_step >= 1, ">= 1"),
            ("eval_every", self.eval_every >= 0, ">= 0"),
            (
                "label_noise",
                0 <= self.label_noise < 0.5,
                "in [0, 0.5); at one half labels say nothing",
            ),
            (
                "denoise_folds",
                self.denoise_folds == 0 or self.denoise_folds >= 2,
                "0, or 2 and more",
            ),
            ("center_coef", self.center_coef >= 0, ">= 0"),
            ("imitation_coef", self.imitation_coef >= 0, ">= 0"),
            ("denoise_threshold", self.denoise_threshold >= 0, ">= 0"),
            (
                "normalize",
                self.normalize in ("none", "mean", "mean_std"),
                "none, mean or mean_std (it was true or false: mean or none)",
            ),
        )

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return "reward model"
