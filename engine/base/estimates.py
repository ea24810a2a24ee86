"""Estimates from samples, with their uncertainty: of a mean, of a share and of pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float], per: int = 1) -> Estimate:
        """Return the mean of independent values, with its standard error. If each prompt has `per`
        values, which follow one another, only the prompts are independent: the estimate is then
        that of the prompts' means. Values that are not finite are left out. The error of fewer than
        two values is nan, and so is the mean of no values."""
        groups = [
            [value for value in values[start : start + per] if math.isfinite(value)]
            for start in range(0, len(values), per)
        ]
        means = [math.fsum(group) / len(group) for group in groups if group]
        if not means:
            return cls(math.nan, math.nan)
        mean = math.fsum(means) / len(means)
        if len(means) == 1:
            return cls(mean, math.nan)
        return cls(
            mean,
            math.sqrt(
                math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1) / len(means)
            ),
        )

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference of two independent estimates."""
        return Estimate(self.mean - other.mean, math.hypot(self.error, other.error))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% score interval of a proportion (Wilson, 1927, JASA 22). It also serves for the
    mean of values within [0, 1], with their sum as `successes`. The interval is then too wide
    rather than too narrow, since no such values vary more than those of a proportion."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = (
        z * math.sqrt(max(0.0, share * (1 - share)) / trials + spread / (4 * trials)) / (1 + spread)
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right, for a prompt with `right`
    right ones among `samples`: 1 - C(samples - right, k) / C(samples, k), without bias (Chen et
    al., 2021, "Evaluating Large Language Models Trained on Code", eq. 1).

    Raises:
        ValueError: k is not within 1 .. samples, or `right` not within 0 .. samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(
            f"pass_at_k: expected 1 <= k <= samples and 0 <= right <= samples, got k = {k}, "
            f"samples = {samples}, right = {right}"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
