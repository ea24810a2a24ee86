"""What several definitions take: numbers of a tensor, moments, one estimate of a KL."""

from __future__ import annotations

import math

from torch import Tensor

CUT = 20.0  # largest log ratio in size inside an exponential
Columns = dict[str, Tensor]


def numbers(t: Tensor) -> list[float]:
    """The values of a tensor, in order."""
    return t.reshape(-1).tolist()


def mean_of(values: list[float]) -> float:
    """0 of none."""
    return math.fsum(values) / max(1, len(values))


def variance_of(values: list[float], unbiased: bool) -> float:
    """Mean square about the mean, or over one less than there are; 0 of none."""
    mean = mean_of(values)
    return math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - unbiased)


def estimate(k: float, estimator: str) -> float:
    """An estimate of KL(pi || ref) from k = logp - ref_logp. Schulman (2020), Approximating KL
    divergence."""
    if estimator == "k3":
        return max(0.0, math.expm1(min(max(-k, -CUT), CUT)) + k)
    return {"k1": k, "k2": k * k / 2, "abs": abs(k)}[estimator]
