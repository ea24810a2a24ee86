"""What watches a policy run without taking part in it: evaluation on held-out prompts, and the
alarm for reward hacking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedrl.engine.config.base import check, require


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during a policy run.

    It takes place before the first step, every so many steps and after the last. The draws are the
    same every time (the run's seed, request ids of their own), sampled as rollouts are, and
    training is bitwise what it is without.

    Args:
        data: held-out prompts, as the run's own data; evaluation.data turns it on.
        every: steps between evaluations.
        prompts: at most so many, drawn by the run's seed; 0 is all of them.
        samples_per_prompt: completions of each. Where rewards are 0 or 1 throughout, pass@k is
            reported up to this k.
        show: prompts whose first completion goes to <run>/samples_eval.jsonl at every evaluation
            (fusedrl samples RUN).
    """

    data: str
    every: int = 10
    prompts: int = 64
    samples_per_prompt: int = 1
    show: int = 4

    def __post_init__(self) -> None:
        require(bool(self.data), "evaluation.data", "a file of held-out prompts", self.data)
        for name, least in (("every", 1), ("prompts", 0), ("samples_per_prompt", 1), ("show", 0)):
            require(
                getattr(self, name) >= least,
                f"evaluation.{name}",
                f">= {least}",
                getattr(self, name),
            )


@dataclass(frozen=True)
class AlarmConfig:
    """The reward-hacking alarm: the trained reward rises while what it stands for does not.

    Args:
        action: report it (a message, <run>/alarms.jsonl, alarm/reward_hacking), stop the run with a
            checkpoint and exit code 4, or off.
        window: the first so many steps are compared with the last so many.
        sigmas: standard errors from which a change counts.
    """

    action: Literal["report", "stop", "off"] = "report"
    window: int = 10
    sigmas: float = 5.0

    def __post_init__(self) -> None:
        check(
            self,
            "alarm",
            ("window", self.window >= 3, ">= 3 (a spread is estimated from it)"),
            ("sigmas", self.sigmas > 0, "> 0"),
        )
