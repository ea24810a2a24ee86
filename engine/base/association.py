"""Association of two columns of numbers: rank correlations, and pairs ordered alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation, with ties at their mean rank; nan if a column is constant
    or there are fewer than two rows (Spearman, 1904)."""
    a, b = _ranked(x), _ranked(y)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Kendall's tau-b, which allows for ties; nan as for `spearman` (Kendall, 1945)."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    agree = untied_x = untied_y = 0
    for i in range(len(a) - 1):  # row by row: a matrix of all pairs would be too large
        sx, sy = np.sign(a[i + 1 :] - a[i]), np.sign(b[i + 1 :] - b[i])
        agree += int((sx * sy).sum())
        untied_x += int(np.count_nonzero(sx))
        untied_y += int(np.count_nonzero(sy))
    scale = math.sqrt(untied_x * untied_y)
    return agree / scale if scale else math.nan


def agreement(
    x: Sequence[float], y: Sequence[float], groups: Sequence[int]
) -> list[tuple[int, float]]:
    """Return (group, 1 or 0) for every pair of rows of one group that both columns order, with 1 if
    they order it alike."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    found = []
    for group, members in rows.items():
        for place, i in enumerate(members):
            for j in members[place + 1 :]:
                first, second = x[i] - x[j], y[i] - y[j]
                if first and second:
                    found.append((group, float((first > 0) is (second > 0))))
    return found


def _ranked(values: Sequence[float]) -> np.ndarray:
    """Return the rank of each value, from 1; equal values get the mean of their ranks."""
    _, which, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[which]
