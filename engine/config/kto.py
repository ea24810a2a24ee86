"""Options of KTO, which trains a policy on single answers that are labelled as wanted or not."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field

from fusedrl.engine.config.base import GivenTextsConfig, OptimConfig, ReferenceConfig, check

LEAST, MOST = 1.0, 4 / 3  # of (weight x number) wanted over unwanted: Ethayarajh et al., eq. 8


@dataclass(frozen=True)
class KTOConfig(ReferenceConfig, GivenTextsConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024) from answers, each labelled as wanted
    or not. No pairs are needed.

    With r = log pi(answer) - log ref(answer), a sum over the answer's tokens, the loss of a wanted
    answer is desirable_weight (1 - sigmoid(beta (r - z))), and that of an unwanted one is
    undesirable_weight (1 - sigmoid(beta (z - r))). z estimates KL(pi || ref) from prompts with
    their neighbours' answers; it is at least 0 and has no gradient. See preference/losses.py.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: a file or hf:ID (docs/guide.md) of labelled answers, {"prompt", "completion",
            "label"}, or of preference pairs, each of which is split into a wanted and an unwanted
            answer.
        beta: strength of the KL that keeps the policy near the reference.
        desirable_weight: weight of wanted answers. The weights times the numbers of wanted and of
            unwanted answers should have a ratio between 1 and 4/3 (their eq. 8); elsewhere the run
            says which weight would.
        undesirable_weight: weight of unwanted answers.
        eval_fraction: part of the answers held out for loss and accuracy.
        epochs: passes over the answers.
        answers_per_step: answers of one optimizer step, at least 2: with one alone there is no
            neighbour to estimate the KL from. Their section 4 takes 8 to 128.
        tokens_per_microbatch: tokens of one forward and backward, prompts included.
        max_length: largest number of tokens of a prompt with its answer; longer ones are dropped
            and counted. None takes the model's own limit.
        optim: the optimizer. Its default peak learning rate, 5e-6, is theirs for all the weights of
            a large model at beta 0.1; adapters and small models need a larger one.
    """

    model: str
    data: str
    _: KW_ONLY
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    eval_fraction: float = 0.1
    answers_per_step: int = 32
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-6))

    def __post_init__(self) -> None:
        self.check_stage()
        self.check_texts()
        self.check_reference()
        check(
            self,
            "",
            (
                "beta",
                0 < self.beta < math.inf,
                "> 0 (at 0 nothing holds the policy near its reference, and nothing prefers)",
            ),
            *(
                (name, 0 <= getattr(self, name) < math.inf, ">= 0")
                for name in ("desirable_weight", "undesirable_weight")
            ),
            (
                "desirable_weight",
                self.desirable_weight + self.undesirable_weight > 0,
                "> 0, or undesirable_weight (with both 0 nothing is learned)",
            ),
            (
                "answers_per_step",
                self.answers_per_step >= 2,
                ">= 2 (the KL is estimated from other answers of the step)",
            ),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the run needs a reference model: always."""
        return True

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
        return "kto"

    def imbalance(self, wanted: int, unwanted: int) -> str | None:
        """Return a warning if these numbers of answers, times their weights, are not in the ratio
        that the paper advises, with the weight that would be; otherwise None."""
        if not wanted or not unwanted:
            return (
                f"all {wanted + unwanted} answers are {'wanted' if wanted else 'unwanted'}: "
                "nothing says what to move away from, or towards; bring both kinds"
            )
        ratio = self.desirable_weight * wanted / max(1e-30, self.undesirable_weight * unwanted)
        if LEAST - 1e-9 <= ratio <= MOST + 1e-9:
            return None
        low, high = (x * self.undesirable_weight * unwanted / wanted for x in (LEAST, MOST))
        return (
            f"{wanted} answers are wanted and {unwanted} are not: times their weights a ratio of "
            f"{ratio:.3g}, and 1 to 1.33 is advised; desirable_weight {low:.3g} to {high:.3g} "
            "gives that"
        )
