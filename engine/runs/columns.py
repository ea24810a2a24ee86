"""The metrics that the terminal shows of each stage, with their headings and units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from fusedrl.engine.config import (
    DPOConfig,
    KTOConfig,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
)
from fusedrl.engine.config.base import StageConfig


class Column(NamedTuple):
    """Column of the table of steps.

    Attributes:
        metric: the metric's name; `*` stands for any characters, and the first such metric counts.
        heading: what it is called above its numbers.
        unit: unit of the numbers that are shown; "" for a number without one.
        scale: what the metric is multiplied by.
        digits: digits after the point; None: four significant digits.
    """

    metric: str
    heading: str
    unit: str = ""
    scale: float = 1.0
    digits: int | None = None


def _percent(metric: str, heading: str, unit: str = "%") -> Column:
    return Column(metric, heading, unit, 100.0, 1)


_SPEED = (
    Column("timing/step", "time", "seconds", digits=2),
    Column("tokens_per_s", "speed", "tokens/s", digits=0),
)
_UPDATE = (
    Column("grad_norm", "gradient", "norm"),
    Column("learning_rate", "learning", "rate"),
    Column("mem/peak_gib", "memory", "peak GiB", digits=2),
)
_KL = Column("kl", "KL", "nats/answer")
_LENGTH = Column("completions/mean_length", "length", "tokens", digits=1)
_CUT_OFF = _percent("completions/clipped_ratio", "cut off")

POLICY = (
    Column("divergence", "divergence", "nats/token"),
    Column("reward", "reward"),
    _KL,
    _LENGTH,
    *_SPEED,
    _CUT_OFF,
    Column("gold/*/mean", "gold", "reward"),
    _percent("frac_reward_zero_std", "no signal", "% prompts"),
    Column("entropy", "entropy", "nats/token"),
    _percent("clip_ratio/region_mean", "clipped", "% tokens"),
    Column("val/explained_variance", "explained", "variance"),
    Column("policy/approxkl_avg", "update KL", "nats/token"),
    Column("sampling/sampling_logp_difference/mean", "sampler gap", "nats/token"),
    _UPDATE[0],
    Column("kl_coef", "KL weight"),
    Column("loss/value_avg", "value loss"),
    *_UPDATE[1:],
    Column("reward_std", "reward", "deviation"),
    Column("perplexity", "perplexity"),
)
_STAGES: dict[type[StageConfig], tuple[Column, ...]] = {
    SFTConfig: (
        Column("loss", "loss", "nats/token"),
        Column("perplexity", "perplexity"),
        *_SPEED,
        *_UPDATE,
    ),
    RewardModelConfig: (
        Column("loss", "loss", "nats/pair"),
        _percent("accuracy", "accuracy"),
        Column("margin", "margin", "score"),
        *_SPEED,
        Column("ranking_loss", "ranking", "nats/pair"),
        Column("imitation_loss", "imitation", "nats/token"),
        *_UPDATE,
    ),
    DPOConfig: (
        Column("loss", "loss", "per pair"),
        _percent("rewards/accuracies", "accuracy"),
        Column("rewards/margins", "margin", "beta x nats"),
        *_SPEED,
        Column("rewards/chosen", "chosen", "beta x nats"),
        Column("rewards/rejected", "rejected", "beta x nats"),
        Column("drift/chosen", "drift", "nats/token"),
        *_UPDATE,
    ),
    KTOConfig: (
        Column("loss", "loss", "per answer"),
        _percent("rewards/accuracies", "accuracy"),
        Column("rewards/margins", "margin", "beta x nats"),
        _KL,
        *_SPEED,
        Column("rewards/chosen", "wanted", "beta x nats"),
        Column("rewards/rejected", "unwanted", "beta x nats"),
        *_UPDATE,
    ),
    RejectionConfig: (
        Column("reward", "reward"),
        Column("kept/reward", "kept", "reward"),
        _percent("kept/fraction", "kept"),
        Column("loss", "loss", "nats/token"),
        *_SPEED,
        _LENGTH,
        _CUT_OFF,
        *_UPDATE,
    ),
}
GAP, LEAST = 2, 9  # blanks between columns, and the least width of one: -1.23e-05
PLAIN = 10  # metrics of a plain line, which nobody reads as a table


def columns_of(config: StageConfig) -> tuple[Column, ...]:
    """Return the columns of the configuration's stage, the most important first."""
    return _STAGES.get(type(config), POLICY)


def name_in(column: Column, values: Mapping[str, float]) -> str | None:
    """Return the name of the metric that a column shows, or None if `values` has none."""
    if column.metric in values:
        return column.metric
    if "*" not in column.metric:
        return None
    return next((name for name in sorted(values) if fnmatchcase(name, column.metric)), None)


def fitting(columns: Sequence[Column], width: int, first: int) -> list[Column]:
    """Choose columns, in their order, that fit in `width` characters behind a first column of
    `first` characters. A column that does not fit is left out, and so are all behind it."""
    found: list[Column] = []
    for column in columns:
        first += GAP + width_of(column)
        if first > width:
            break
        found.append(column)
    return found


def width_of(column: Column) -> int:
    """Return the width of a column in characters."""
    return max(LEAST, len(column.heading), len(column.unit))


def cell(column: Column, value: float | None) -> str:
    """Write a number in a column's unit, at most as wide as the column; "-" for None."""
    if value is None:
        return "-"
    value *= column.scale
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.4g}" if column.digits is None else f"{value:,.{column.digits}f}"
    width = width_of(column)
    return next((t for t in (text, f"{value:.3g}", f"{value:.1e}") if len(t) <= width), "large")


def named(values: Mapping[str, float], patterns: Sequence[str]) -> list[str]:
    """List the metrics that patterns name, in the order of the patterns, each once."""
    found = (name for pattern in patterns for name in sorted(values) if fnmatchcase(name, pattern))
    return list(dict.fromkeys(found))
