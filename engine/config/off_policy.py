"""Options for data that the present policy did not sample: correction for the sampler, and the
replay buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedrl.engine.config.base import check


@dataclass(frozen=True)
class CorrectionConfig:
    """Correction for a sampler whose log-probabilities differ from the trainer's.

    They differ if the two use different precision or kernels. The policy term of each token is
    multiplied by w = exp(old_logp - rollout_logp), which has no gradient. In this engine the two
    agree up to rounding (sampling/sampling_logp_difference/*), and bitwise in strict mode, where
    every w is 1.

    Args:
        kind: none; truncated is min(w, high) (Yao et al., 2025, TIS); masked is w, and 0 outside
            [low, high] (IcePop); sequence_masked is w, and 0 at all tokens of a completion whose
            geometric mean of w is outside.
        level: token weighs each token by its own w; sequence weighs all tokens of a completion by
            the product of their w. The product is exact, but noisier the longer the completion is.
        low: lower bound, used by the masked kinds; None is 0.5.
        high: the cap of truncated, or the upper bound of the masked kinds.
        bypass: use the sampler's rollout_logp as old_logp in the ratio, so that old_logp need not
            be computed. There are then no weights w, because the ratio contains them already.
        off_policy_delta: completions with a negative advantage are left out of the loss once their
            mean of rollout_logp - logp is above this, in nats per token (DeepSeek-V3.2, 2025,
            off-policy sequence masking); None is off.
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
        """Lower bound: `low`, or its default if `low` is None."""
        return 0.5 if self.low is None and self.kind != "truncated" else self.low or 0.0


@dataclass(frozen=True)
class ReplayConfig:
    """Options of the replay buffer: completions of earlier rollouts are trained on again, together
    with new ones.

    Args:
        capacity: largest number of completions in the buffer; the oldest are dropped first.
        fraction: share of each step's batch that comes from the buffer, or less if the buffer holds
            too few. The number of new completions does not change.
        max_age: number of rollouts after which a completion is dropped.
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
