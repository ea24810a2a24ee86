"""Options of trajectories: conversations of several turns with an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedrl.engine.config.base import check


@dataclass(frozen=True)
class TurnsConfig:
    """Options of trajectories, of runs with an environment or with tools.

    A trajectory is a prompt, turns of the policy, and what the environment says between them; only
    the policy's tokens are trained on. generation.max_new_tokens limits one turn.

    Args:
        max_turns: most turns of the policy. A trajectory that is not done then is cut off.
        max_total_tokens: most tokens of the policy in all its turns; None: max_turns times those of
            one turn.
        max_length: most tokens of a trajectory, prompt and observations included; None takes the
            model's positions. The cache is sized for it.
        credit: what a turn's tokens are credited with. trajectory: the advantage of the algorithm,
            which group methods compute from the sum of all rewards. turn: the discounted sum of the
            rewards from this turn on, compared with that of the same turn of the group's other
            trajectories. state: the trajectory's advantage, plus state_weight times that of the
            turn among all turns of the group that answer the same observation (Feng et al., 2025,
            GiGPO). turn and state are for grpo, dr_grpo and rloo; methods with a critic have the
            rewards at the end of each turn anyway.
        gamma: discount per turn, of credit turn and state. GiGPO's authors take 0.95.
        state_weight: weight of the second part of credit state.
        tool_parser: how the calls of tools are found in the text of a turn: hermes
            (<tool_call>{...}</tool_call>), json (the whole text is a call), or file.py:NAME.
    """

    max_turns: int = 8
    max_total_tokens: int | None = None
    max_length: int | None = None
    credit: Literal["trajectory", "turn", "state"] = "trajectory"
    gamma: float = 1.0
    state_weight: float = 1.0
    tool_parser: str = "hermes"

    def __post_init__(self) -> None:
        kinds = ("trajectory", "turn", "state")
        check(
            self,
            "turns",
            ("max_turns", self.max_turns >= 1, ">= 1"),
            (
                "max_total_tokens",
                self.max_total_tokens is None or self.max_total_tokens >= 1,
                ">= 1",
            ),
            ("max_length", self.max_length is None or self.max_length >= 2, ">= 2"),
            ("credit", self.credit in kinds, f"one of {', '.join(kinds)}"),
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("state_weight", self.state_weight >= 0, ">= 0"),
            (
                "gamma",
                self.gamma == 1 or self.credit != "trajectory",
                "1 with turns.credit trajectory, which does not look at single turns",
            ),
        )
