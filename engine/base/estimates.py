"""Estimates from samples, with their uncertainty: of means, shares, ratios and pass@k."""

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


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, which is nan where nothing is known of it."""

    value: float
    low: float
    high: float

    @classmethod
    def mean(cls, values: Sequence[float], per: int = 1) -> Interval:
        """Return the mean of values, with Student's interval over prompts, each of which has `per`
        values that follow one another. Values that are not finite are left out."""
        found = Estimate.of(values, per)
        count = sum(
            any(math.isfinite(value) for value in values[start : start + per])
            for start in range(0, len(values), per)
        )
        half = math.nan if count < 2 else student_t(count - 1) * found.error
        return cls(found.mean, found.mean - half, found.mean + half)

    @classmethod
    def share(cls, values: Sequence[float], per: int = 1) -> Interval:
        """Return the mean of values within [0, 1], with Wilson's interval, one trial a prompt.
        Values that are not finite are left out."""
        groups = [
            [value for value in values[start : start + per] if math.isfinite(value)]
            for start in range(0, len(values), per)
        ]
        means = [math.fsum(group) / len(group) for group in groups if group]
        if not means:
            return cls(math.nan, 0.0, 1.0)
        total = math.fsum(means)
        return cls(total / len(means), *wilson_interval(total, len(means)))

    @classmethod
    def ratio(cls, over: Sequence[float], under: Sequence[float], per: int = 1) -> Interval:
        """Return sum(over) / sum(under), such as a loss per token, with Student's interval over
        prompts by the linearised variance of a ratio (Cochran, 1977, "Sampling Techniques",
        6.4)."""
        pairs = [
            (math.fsum(over[start : start + per]), math.fsum(under[start : start + per]))
            for start in range(0, len(over), per)
        ]
        whole, count = math.fsum(y for _, y in pairs), len(pairs)
        if not whole:
            return cls(math.nan, math.nan, math.nan)
        ratio = math.fsum(x for x, _ in pairs) / whole
        if count < 2:
            return cls(ratio, math.nan, math.nan)
        spread = math.fsum((x - ratio * y) ** 2 for x, y in pairs) * count / (count - 1)
        half = student_t(count - 1) * math.sqrt(spread) / whole
        return cls(ratio, ratio - half, ratio + half)

    def to_json(self) -> dict[str, float | None]:
        """Return the three numbers as JSON values; what is not finite becomes null."""
        return {
            name: number if math.isfinite(number) else None
            for name, number in (("value", self.value), ("low", self.low), ("high", self.high))
        }


def student_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` >= 1 degrees of freedom, to a
    thousandth: from a table up to 3, else by the expansion at the normal quantile (Abramowitz and
    Stegun, 1964, 26.7.5)."""
    if freedom < 4:
        return (12.7062, 4.30265, 3.18245)[freedom - 1]
    z, v = 1.959964, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


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
