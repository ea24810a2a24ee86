"""Options of direct preference optimisation, which trains a policy on preference pairs, without a
reward model and without sampling."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from fusedrl.engine.config.base import (
    GivenTextsConfig,
    OptimConfig,
    ReferenceConfig,
    check,
    either,
)
from fusedrl.engine.config.parts import OF_ALGORITHM

SMOOTHED = ("sigmoid", "robust")  # the losses that label_smoothing belongs to
WITHOUT_REFERENCE = ("simpo", "orpo")
# beta, margin and nll_coef where they are not set, and those of two losses
_USUAL = (0.1, 0.0, 0.0)
_OWN = {"simpo": (2.0, 1.0, 0.0), "orpo": (0.1, 0.0, 1.0)}


@dataclass(frozen=True)
class DPOConfig(ReferenceConfig, GivenTextsConfig):
    """Direct preference optimisation (Rafailov et al., 2023) and its relatives.

    The reference is the initial weights; simpo and orpo have none.

    Let h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), where each
    log-probability is the sum over the answer's tokens. The losses are: sigmoid -log
    sigmoid(beta h), ipo (h - 1 / (2 beta))^2, hinge max(0, 1 - beta h); see preference/losses.py.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: a file or hf:ID (docs/guide.md) of preference pairs: {"prompt", "chosen", "rejected"}
            or implicit {"chosen", "rejected"} such as HH-RLHF. A tie (WebGPT) is a pair with label
            0.5; a "margin" field is the number that beta h should exceed (Amini et al., 2024).
        loss: sigmoid; ipo (of sums, as Azar et al. define it); ipo_mean (the same of each answer's
            mean log-probability per token, as TRL has it); hinge (that of RSO, or of SLiC with a
            reference); robust (unbiased if the share of wrong labels is known to be
            label_smoothing); simpo (of mean log-probabilities per token, Meng et al., 2024); or
            orpo (odds ratio beside the likelihood of the chosen answer, Hong et al., 2024).
        beta: strength of the KL that keeps the policy near the reference; with ipo and ipo_mean,
            its tau; with simpo the scale of the difference; with orpo the weight of the odds
            ratio, their lambda. None: 0.1, and with simpo 2, the smallest of their section 4.
        margin: number that beta h should exceed in every pair, added to a pair's own margin; the
            gamma of simpo. None: 0, and with simpo 1, half of its beta.
        label_smoothing: probability that a label is wrong: an assumed one with sigmoid (Mitchell,
            2023, cDPO), a known one with robust (Chowdhury et al., 2024).
        nll_coef: weight of the mean negative log-probability of the chosen answer's tokens, added
            to the loss of its pair (Pang et al., 2024). None: 0, and with orpo 1, which is its
            definition.
        eval_fraction: part of the pairs held out for loss and accuracy.
        epochs: passes over the pairs.
        pairs_per_step: pairs of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward, counting both answers of a pair
            with their prompts; a pair is never split.
        max_length: largest number of tokens of a prompt with an answer; longer pairs are dropped
            and counted. None takes the model's own limit.
        optim: the optimizer. Its default peak learning rate, 1e-6, is that of Rafailov et al. for
            all the weights of a large model; adapters and small models need a larger one.
    """

    model: str
    data: str
    _: KW_ONLY
    loss: Literal["sigmoid", "ipo", "ipo_mean", "hinge", "robust", "simpo", "orpo"] = "sigmoid"
    beta: float = OF_ALGORITHM
    margin: float = OF_ALGORITHM
    label_smoothing: float = 0.0
    nll_coef: float = OF_ALGORITHM
    eval_fraction: float = 0.1
    pairs_per_step: int = 32
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6))

    def __post_init__(self) -> None:
        usual = _OWN.get(self.loss, _USUAL)
        for name, value in zip(("beta", "margin", "nll_coef"), usual, strict=True):
            object.__setattr__(self, name, either(getattr(self, name), value))
        self.check_stage()
        self.check_texts()
        self.check_reference()
        check(
            self,
            "",
            (
                "beta",
                self.beta > 0,
                "> 0 (at 0 nothing holds the policy near its reference, and nothing prefers)",
            ),
            (
                "label_smoothing",
                0 <= self.label_smoothing < 0.5,
                "in [0, 0.5) (half of the labels wrong is no preference, more is the opposite one)",
            ),
            (
                "label_smoothing",
                self.label_smoothing == 0 or self.loss in SMOOTHED,
                f"0 with loss {self.loss}, which does not read it (it belongs to "
                f"{' and '.join(SMOOTHED)})",
            ),
            (
                "label_smoothing",
                self.label_smoothing > 0 or self.loss != "robust",
                "> 0 with loss robust: the share of labels that are wrong (without any it is "
                "sigmoid)",
            ),
            ("nll_coef", self.nll_coef >= 0, ">= 0"),
            ("margin", 0 <= self.margin < math.inf, ">= 0"),
            (
                "loss",
                self.needs_reference or (self.reference == "auto" and self.reference_model is None),
                f"another one than {self.loss} with reference or reference_model: it has none",
            ),
            ("pairs_per_step", self.pairs_per_step >= 1, ">= 1"),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the run needs a reference model."""
        return self.loss not in WITHOUT_REFERENCE

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return "dpo"
