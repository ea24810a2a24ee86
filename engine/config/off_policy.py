"""Data that the policy did not sample as it is now: what the sampler is corrected by, and the
replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedrl.engine.config.base import check


@dataclass(frozen=True)
class CorrectionConfig:
    """Correction for a sampler whose log-probabilities are not the trainer's.

    Another precision or other kernels make them differ. The policy term of a token is multiplied by
    w = exp(old_logp - rollout_logp), a constant. Here the two agree to rounding
    (sampling/logp_diff_*), and bitwise in strict mode, where every w is 1.

    Args:
        kind: none; truncated is min(w, high) (Yao et al., 2025, TIS); masked is w, and 0 outside
            [low, high] (IcePop); sequence_masked is w, and 0 at all tokens of a completion whose
            geometric mean of w is outside.
        level: of tokens; or of sequences: the product over a completion, for each of its tokens.
            That is exact, and as noisy as the completion is long.
        low: with the masked kinds; None is 0.5.
        high: the cap, or the upper bound.
        bypass: the ratio is to what the sampler said: old_logp is rollout_logp, and nothing is
            scored first for the ratio's sake. Without weights: the ratio holds them already.
        off_policy_delta: completions with a negative advantage teach nothing once the mean of
            rollout_logp - logp is above this, in nats per token (DeepSeek-V3.2, 2025, off-policy
            sequence masking); None is off.
    """

    kind: Literal["none", "truncated", "masked", "sequence_masked"] = "none"
    level: Literal["token", "sequence"] = "token"
    low: float | None = None
    high: float = 2.0
    bypass: bool = False
    off_policy_delta: float | None = None

    def __post_init__(self) -> None:
        check(
            self,
            "correction",
            (
                "low",
                self.low is None or self.kind in ("masked", "sequence_masked"),
                "only with correction.kind = masked or sequence_masked",
                (self.low, self.kind),
            ),
            (
                "correction",
                0 <= self.floor <= 1 <= self.high,
                "0 <= low <= 1 <= high, since an exact sampler's weight is 1",
                (self.floor, self.high),
            ),
            (
                "kind",
                not self.bypass or self.kind == "none",
                "none with correction.bypass (the ratio to rollout_logp holds the weight already; "
                "twice would square it)",
            ),
            (
                "off_policy_delta",
                self.off_policy_delta is None or self.off_policy_delta > 0,
                "> 0, in nats per token",
            ),
        )

    @property
    def floor(self) -> float:
        """`low`, or what is usual."""
        return 0.5 if self.low is None and self.kind != "truncated" else self.low or 0.0


@dataclass(frozen=True)
class ReplayConfig:
    """Completions of earlier rollouts, trained on again beside the new ones.

    Args:
        capacity: completions that the buffer holds; the oldest go first.
        fraction: of each step's batch, from the buffer; as much as it has. New completions are as
            many as without.
        max_age: rollouts after which a completion is dropped.
    """

    capacity: int = 4096
    fraction: float = 0.5
    max_age: int = 8

    def __post_init__(self) -> None:
        check(
            self,
            "replay",
            ("capacity", self.capacity >= 1, ">= 1"),
            ("fraction", 0 < self.fraction < 1, "in (0, 1)"),
            ("max_age", self.max_age >= 1, ">= 1"),
        )
