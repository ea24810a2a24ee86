"""Options that observe a policy run without changing it: evaluation on held-out prompts, and the
alarm for reward hacking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedrl.engine.config.base import check, require, settle_data


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during a policy run.

    It takes place before the first step, every `every` steps, and after the last step. Completions
    are sampled as in rollouts, with the same random draws each time (the run's seed, separate
    request ids). Training is bitwise the same as without evaluation.

    Args:
        data: held-out prompts, in the format of the run's data; evaluation.data turns evaluation
            on.
        every: steps between evaluations.
        prompts: largest number of prompts to use, drawn by the run's seed; 0 uses all of them.
        samples_per_prompt: completions of each prompt. If all rewards are 0 or 1, pass@k is
            reported for k up to this number.
        show: number of prompts whose first completion is written to <run>/samples_eval.jsonl at
            every evaluation (fusedrl samples RUN).
    """

    data: str
    every: int = 10
    prompts: int = 64
    samples_per_prompt: int = 1
    show: int = 4

    def __post_init__(self) -> None:
        settle_data(self)
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
    """Alarm for reward hacking: the reward used in training rises, but the quality it stands for
    does not.

    Args:
        action: report the alarm (a message, <run>/alarms.jsonl, alarm/reward_hacking), stop the run
            with a checkpoint and exit code 4, or off.
        window: number of steps in each of the two spans that are compared, the first and the last.
        sigmas: smallest change that counts, in standard errors.
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
