"""Helpers that several definitions use: numbers of a tensor, moments, estimates of a KL."""

from __future__ import annotations

import math

from torch import Tensor

CUT = 20.0  # largest log ratio in size inside an exponential
Columns = dict[str, Tensor]


def numbers(t: Tensor) -> list[float]:
    """List the values of a tensor, in order."""
    return t.reshape(-1).tolist()


def mean_of(values: list[float]) -> float:
    """Return the mean of the values; 0 if there are none."""
    return math.fsum(values) / max(1, len(values))


def variance_of(values: list[float], unbiased: bool) -> float:
    """Return the mean squared distance from the mean; if `unbiased`, divide by n - 1 instead of n.
    Return 0 if there are no values."""
    mean = mean_of(values)
    return math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - unbiased)


def estimate(k: float, estimator: str) -> float:
    """Estimate KL(pi || ref) from k = logp - ref_logp. Schulman (2020), Approximating KL
    divergence."""
    if estimator == "k3":
        return max(0.0, math.expm1(min(max(-k, -CUT), CUT)) + k)
    return {"k1": k, "k2": k * k / 2, "abs": abs(k)}[estimator]
