"""Direct preference optimisation: a policy from preference pairs alone, without a reward model and
without sampling."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from fusedrl.engine.config.base import GivenTextsConfig, OptimConfig, ReferenceConfig, check

SMOOTHED = ("sigmoid", "robust")  # the losses that label_smoothing belongs to


@dataclass(frozen=True)
class DPOConfig(ReferenceConfig, GivenTextsConfig):
    """Direct preference optimisation (Rafailov et al., 2023) and its relatives.

    The reference is the initial weights.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), sums over
    the tokens of each answer and no means:
    sigmoid -log sigmoid(beta h), ipo (h - 1 / (2 beta))^2, hinge max(0, 1 - beta h); see
    preference/losses.py.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: JSONL file (.gz too) of preference pairs: {"prompt", "chosen", "rejected"} or implicit
            {"chosen", "rejected"} such as HH-RLHF. A tie (WebGPT) is a pair of label 0.5; a
            "margin" column is what beta h should exceed (Amini et al., 2024).
        loss: sigmoid, ipo (of sums, as Azar et al. define it; TRL divides by lengths), hinge
            (RSO's, SLiC's with a reference), or robust (unbiased where a share label_smoothing of
            the labels is known to be wrong).
        beta: of the KL to the reference that is traded for preference; of ipo, its tau.
        label_smoothing: of sigmoid, the probability that a label is wrong, believed (Mitchell,
            2023, cDPO); of robust, known (Chowdhury et al., 2024).
        nll_coef: weight of the mean negative log-probability of the chosen answer's tokens, added
            to the loss of its pair (Pang et al., 2024).
        eval_fraction: part of the pairs held out for loss and accuracy.
        epochs: passes over the pairs.
        pairs_per_step: pairs of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward, both answers of a pair with their
            prompts; a pair is never cut.
        max_length: pairs with a longer side are dropped and counted; None is the model's own limit.
        optim: of the update. The peak learning rate here is Rafailov et al.'s, 1e-6, for all the
            weights of a large model; adapters and small models take more.
    """

    model: str
    data: str
    _: KW_ONLY
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_coef: float = 0.0
    eval_fraction: float = 0.1
    pairs_per_step: int = 32
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6))

    def __post_init__(self) -> None:
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
            ("pairs_per_step", self.pairs_per_step >= 1, ">= 1"),
        )

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return "dpo"
