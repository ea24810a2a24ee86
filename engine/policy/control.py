"""State that steers a policy run from step to step: coefficients that adapt, the running baseline,
and the place in the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import KLConfig, PenaltyConfig, PolicyConfig
from fusedrl.kernels.normalize import RunningMoments


class KLController:
    """KL coefficient, fixed or adapted towards a target. `kl` is in nats per sequence (the sum over
    its tokens, averaged over sequences). The coefficient is updated after a step: step k is
    penalised with the coefficient that step k - 1 left.

    Without a horizon, the controller acts on d = sqrt(kl), which grows about evenly while a policy
    moves away. It smooths d as level and slope (Holt, 1957):

        level' = a d + (1 - a) (level + slope)      a = 0.3
        slope' = a (level' - level) + (1 - a) slope
        e = clip(2 log((level + 6 slope) / sqrt(target)), -1, 3)
        coef *= exp(0.12 e), or exp(0.1 e) where e < 0

    The controller extrapolates 6 steps ahead, since a coefficient changes where training goes and
    not where it is. Below the target, e is taken as 0 while the slope leads to the target within 60
    steps. So the first steps of a run, whose KL is near 0 whatever the coefficient, do not wear the
    coefficient down. Above the target, e is taken as 0 while the slope leads back within 20 steps.
    Each step counts the same, whatever its number of sequences.

    Time to reach the target: simulated policies (tests/engine/policy/test_kl_control.py) stay
    within a factor of 1.6 of the target after 25 steps with the right coefficient, after 80 with
    one that is ten times too large or too small, and after 110 with one a hundred times off.

    With a horizon, the controller is that of Ziegler et al. (2019), Fine-Tuning Language Models
    from Human Preferences, section 2.2. `episodes` is the number of sequences of a step:

        e = clip(kl / target - 1, -0.2, 0.2);  coef *= 1 + e * episodes / horizon
    """

    SMOOTHING, AHEAD, RANGE = 0.3, 6, 1000.0  # the coefficient stays within RANGE of where it began
    GAIN_BELOW, GAIN_ABOVE, PATIENCE_BELOW, PATIENCE_ABOVE = 0.1, 0.12, 60, 20
    AWAY = 50  # steps with a KL below half or above twice the target after which a warning is given

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef
        self.level = self.slope = 0.0  # of sqrt(kl)
        self.away, self._told = 0, False

    def update(self, kl: float, episodes: int) -> None:
        """Adapt the coefficient to the KL that a step measured. Do nothing without a target, or if
        the KL is not finite."""
        target = self.config.target
        if target is None or not math.isfinite(kl):
            return
        self.away = 0 if target / 2 <= kl <= target * 2 else self.away + 1
        if self.config.horizon is not None:
            self.coef *= 1 + min(0.2, max(-0.2, kl / target - 1)) * episodes / self.config.horizon
            return
        a, before, wanted = self.SMOOTHING, self.level, math.sqrt(target)
        self.level = a * math.sqrt(max(0.0, kl)) + (1 - a) * (self.level + self.slope)
        self.slope = a * (self.level - before) + (1 - a) * self.slope
        error = 2 * math.log(max(self.level + self.AHEAD * self.slope, 1e-6) / wanted)
        gap, patience = (
            wanted - self.level,
            self.PATIENCE_BELOW if error < 0 else self.PATIENCE_ABOVE,
        )
        if error * gap < 0 and self.slope / gap * patience > 1:  # soon there
            return
        moved = self.coef * math.exp(
            self.GAIN_BELOW * max(-1.0, error) if error < 0 else self.GAIN_ABOVE * min(3.0, error)
        )
        self.coef = min(self.config.coef * self.RANGE, max(self.config.coef / self.RANGE, moved))

    def warning(self) -> str | None:
        """Return a warning with a remedy if the target is not reached, otherwise None. The warning
        is returned only once."""
        target, first = self.config.target, self.config.coef
        at_bound = (
            target is not None
            and self.config.horizon is None
            and not first / self.RANGE < self.coef < first * self.RANGE
        )
        if self._told or target is None or not (at_bound or self.away >= self.AWAY):
            return None
        self._told = True
        where = (
            f"at its bound, {self.RANGE:g} times from kl.coef {first:g}"
            if at_bound
            else f"{self.coef:.3g}"
        )
        kept = (
            f"has been off by more than a factor of 2 for {self.away} steps"
            if self.away >= self.AWAY
            else "is not reached"
        )
        low = self.level < math.sqrt(target) if self.config.horizon is None else self.coef < first
        remedy = (
            "the policy hardly moves: more steps, a higher optim.lr, or a lower kl.target"
            if low
            else "a lower optim.lr, fewer epochs x minibatches, a critic of its own (critic.model) "
            "or a higher kl.target"
        )
        remedy = (
            f"leave kl.horizon out, or shorten it (now {self.config.horizon:g} sequences)"
            if self.config.horizon is not None
            else remedy
        )
        return f"kl.target {target:g} {kept}; the coefficient is {where}; {remedy}"

    def state_dict(self) -> dict[str, float]:
        """Return the state as JSON values."""
        return {
            "coef": self.coef,
            "level": self.level,
            "slope": self.slope,
            "away": float(self.away),
            "told": float(self._told),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state that `state_dict` returned."""
        self.coef, self.level, self.slope = state["coef"], state["level"], state["slope"]
        self.away, self._told = int(state["away"]), bool(state["told"])


class PenaltyController:
    """Coefficient of ppo_penalty. It is doubled if KL(old || new) is above the upper threshold and
    halved if it is below the lower one. Source: Schulman et al. (2017), section 4."""

    def __init__(self, config: PenaltyConfig) -> None:
        self.thresholds, self.coef = config.thresholds, config.coef

    def update(self, kl: float) -> None:
        """Adapt the coefficient to the KL, in nats per token, that the step's last pass over the
        rollout measured."""
        low, high = self.thresholds
        self.coef *= 2.0 if kl > high else 0.5 if kl < low else 1.0


class Control:
    """State that a policy run carries from step to step besides weights and optimizer. It holds two
    coefficients, the moments of all returns and of all scores so far, the mean of each in the first
    rollout, and the number of prompts drawn so far."""

    def __init__(self, config: PolicyConfig) -> None:
        self.kl, self.penalty, self.returns = (
            KLController(config.kl),
            PenaltyController(config.penalty),
            RunningMoments(),
        )
        self.scores = RunningMoments()
        self.level: float | None = None  # mean return of the first rollout
        self.origin: float | None = None  # mean score of the first rollout, if scores are scaled
        # level and unit of the value head; the unit is None while all returns were the same
        self.value_level, self.unit = 0.0, cast("float | None", None)
        self.next_unit: float | None = None  # the unit after this step
        self.drawn = 0
        self._scale, self._centre = config.scale_scores, config.normalize_scores
        self._penalised = config.objective == "ppo_penalty"

    def scaled(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with its scores centred and scaled. If neither scale_scores nor
        normalize_scores is set, return the batch itself.

        First a mean is subtracted from the scores. With normalize_scores it is the mean of all
        scores so far. With scale_scores it is the mean of the first rollout's scores, for the whole
        run: a mean far from 0 would otherwise move with the deviation, and values with it. Then the
        scores are divided by the standard deviation of all scores so far, including these, or by 1
        while all scores were the same. Clipping comes later.
        """
        if not (self._scale or self._centre):
            return batch
        self.scores.update(batch.column("scores"))
        self.origin = self.scores.mean if self.origin is None else self.origin
        mean, scale = self.scores.mean if self._centre else self.origin, self.scores.std
        # a smaller deviation is only the rounding error of the mean
        scale = scale if scale > 1e-6 * max(1.0, abs(self.scores.mean)) else 1.0
        batch = batch.with_columns(scores=(batch.column("scores") - mean) / scale)
        if batch.token_rewards is not None:
            # the mean of the scores is subtracted from the last token's reward, not here
            totals_B = batch.token_totals
            batch = batch.with_columns(
                token_rewards=batch.token_rewards / scale,
                token_totals=None if totals_B is None else totals_B / scale,
            )
        return (
            batch
            if batch.greedy_scores is None
            else batch.with_columns(greedy_scores=(batch.greedy_scores - mean) / scale)
        )

    def update(self, metrics: Mapping[str, float], totals_B: Tensor) -> None:
        """Adapt the coefficients to the metrics of a step (metrics are missing while the policy is
        not trained), and add the step's returns to the moments."""
        if "kl" in metrics:
            self.kl.update(metrics["kl"], len(totals_B))
        if self._penalised and "policy/last_approxkl" in metrics:
            self.penalty.update(metrics["policy/last_approxkl"])
        self.returns.update(totals_B)
        self.level = self.returns.mean if self.level is None else self.level

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "kl": self.kl.state_dict(),
            "penalty_coef": self.penalty.coef,
            "returns": self.returns.state_dict(),
            "scores": self.scores.state_dict(),
            "level": self.level,
            "origin": self.origin,
            "value_level": self.value_level,
            "unit": self.unit,
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.kl.load_state_dict(state["kl"])
        self.penalty.coef = float(state["penalty_coef"])
        self.returns.load_state_dict(state["returns"])
        self.scores.load_state_dict(state["scores"])
        self.level, self.origin = state["level"], state["origin"]
        self.value_level, self.unit = state["value_level"], state["unit"]
        self.drawn = int(state["drawn"])
