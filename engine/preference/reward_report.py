"""Report of how well a reward model predicts held-out preferences: accuracy, calibration, length
bias, as a dataclass, JSON and a table.

Votes     The pairs of one ranked list are not independent. So each example (a pair, or a list) has
          one vote, split evenly over its pairs, and the interval's n counts examples. (For lists
          the interval is slightly too wide: a mean of agreements varies less than one agreement.)
          Examples that share a prompt, as in SHP, can be given one vote together; with a vote each
          the interval would be too narrow.
Predicted The model predicts that the first answer of a pair is preferred with probability
          sigmoid(d), d the difference of scores. If labels are known to be flipped at a rate e, the
          *label* prefers it with (1 - e) sigmoid(d) + e sigmoid(-d). Calibration compares the
          predictions for labels with the labels.
Bins      Pairs are binned by the predicted probability of the answer that the model prefers, which
          is at least 0.5. So the order of a pair's answers does not matter.
Ties      Pairs that are labelled a tie have no right answer and are left out. Equal scores for a
          pair that is not a tie count as wrong.
Source    Wilson (1927); Guo et al. (2017), On calibration of modern neural networks (bins, expected
          calibration error, temperature); Brier (1950).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.preference.comparisons import pair_nll
from fusedrl.engine.runs.files import write_file

BINS = 10
_SHARPEST = 1e3  # temperatures between this and its inverse are looked at


@dataclass(frozen=True)
class Bin:
    """Bin of the pairs whose predicted probability lies in [low, high): their share of all votes
    (`weight`), their mean prediction, and the share that the labels confirm."""

    low: float
    high: float
    weight: float
    predicted: float
    observed: float


@dataclass(frozen=True)
class RewardReport:
    """Accuracy and calibration of a reward model on held-out preferences.

    Attributes:
        examples, pairs: number of examples, and of pairs.
        accuracy, accuracy_low, accuracy_high: mean over examples, with its 95% interval.
        loss: mean negative log-likelihood of the labels under the prediction, in nats.
        brier: mean squared error of the predicted probability.
        ece: expected calibration error, the mean over the bins of |observed - predicted|.
        confidence: the mean predicted probability of the preferred answer, which is the accuracy
            that the model itself expects.
        temperature, loss_at_temperature: the number that scores must be divided by for the least
            loss on these pairs (1 is calibrated, above 1 over-confident), and that loss. Both are
            None if no finite number is best.
        margin: mean of the better answer's score minus the worse one's.
        length_correlation: correlation of difference of scores and difference of lengths, with both
            orders of every pair counted; 0 without length bias.
        longer_wins, shorter_wins: the accuracy of always preferring the longer or the shorter
            answer (half a point if lengths are equal).
        ceiling: the accuracy of a perfect judge, given `label_noise`; None if it is 0.
        label_noise: the rate at which labels are known to be flipped.
        bins: predicted and observed agreement, by predicted probability.
    """

    examples: int
    pairs: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    brier: float
    ece: float
    confidence: float
    temperature: float | None
    loss_at_temperature: float | None
    margin: float
    length_correlation: float
    longer_wins: float
    shorter_wins: float
    ceiling: float | None
    label_noise: float
    bins: tuple[Bin, ...]

    def metrics(self) -> dict[str, float]:
        """Return the report's main numbers under their names in metrics.jsonl."""
        return {
            "eval_loss": self.loss,
            "eval_accuracy": self.accuracy,
            "eval_accuracy_low": self.accuracy_low,
            "eval_accuracy_high": self.accuracy_high,
            "eval_pairs": float(self.pairs),
            "eval_examples": float(self.examples),
            "eval_brier": self.brier,
            "eval_ece": self.ece,
            "eval_margin": self.margin,
            "eval_length_correlation": self.length_correlation,
        }


def reward_report(
    difference_P: Tensor,
    examples: Sequence[int],
    lengths: Sequence[int],
    labels: Sequence[float] | None = None,
    *,
    label_noise: float = 0.0,
) -> RewardReport | None:
    """Report how well score differences predict the labels of P pairs.

    Args:
        difference_P: the better answer's score minus the worse one's; float, any device.
        examples: [P] a number for each pair's example; pairs of equal numbers share one vote.
        lengths: [P] number of tokens of the better answer minus that of the worse one.
        labels: [P] the probability that the answer ranked better really is better; if None, 1.
            Pairs with label 0.5 are left out.
        label_noise: the rate at which labels are known to be flipped, in [0, 0.5).
    Returns:
        The report, or None if all pairs are left out.
    """
    label_P = (
        torch.ones(len(examples), dtype=torch.float64)
        if labels is None
        else torch.tensor(labels, dtype=torch.float64)
    )
    kept = (label_P != 0.5).nonzero().squeeze(1)
    if not len(kept):
        return None
    d, label, length = (
        difference_P.detach().double().cpu()[kept],
        label_P[kept],
        torch.tensor(lengths, dtype=torch.float64)[kept],
    )
    _, unit = torch.unique(torch.tensor(examples)[kept], return_inverse=True)
    share = 1.0 / unit.bincount()[unit].double() / (int(unit.max()) + 1)
    n = int(unit.max()) + 1

    def mean(x: Tensor) -> float:
        return float((share * x).sum())

    predicted = _predicted(d, label_noise)  # that the label prefers the first
    right = torch.where(d > 0, label, torch.where(d < 0, 1 - label, 0.0))
    accuracy = mean(right)
    low, high = wilson_interval(accuracy * n, n)
    temperature, at_temperature = _fit_temperature(d, label, share, label_noise)
    spread = math.sqrt(mean(d * d) * mean(length * length))
    sure = torch.maximum(predicted, 1 - predicted)
    # equal scores predict either answer with 0.5
    found = _bins(sure, torch.where(d == 0, 0.5, right), share)
    agreed = torch.where(label > 0.5, length.sign(), -length.sign())
    return RewardReport(
        examples=n,
        pairs=len(kept),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=mean(pair_nll(d, label, label_noise)),
        brier=mean((predicted - label).square()),
        ece=sum(b.weight * abs(b.observed - b.predicted) for b in found),
        confidence=mean(sure),
        temperature=temperature,
        loss_at_temperature=at_temperature,
        margin=mean(d),
        length_correlation=mean(d * length) / spread if spread else 0.0,
        longer_wins=mean(0.5 + agreed / 2),
        shorter_wins=mean(0.5 - agreed / 2),
        ceiling=1 - label_noise if label_noise else None,
        label_noise=label_noise,
        bins=found,
    )


def _predicted(d: Tensor, label_noise: float) -> Tensor:
    return label_noise + (1 - 2 * label_noise) * torch.sigmoid(d)


def _bins(sure_P: Tensor, observed_P: Tensor, share_P: Tensor) -> tuple[Bin, ...]:
    """Group pairs into bins of equal width over [0.5, 1]; empty bins are left out."""
    index_P = ((sure_P - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    bins = []
    for i in index_P.unique().tolist():
        inside = index_P == i
        weight = share_P[inside].sum()
        predicted, observed = (
            float((share_P[inside] * x[inside]).sum() / weight) for x in (sure_P, observed_P)
        )
        bins.append(
            Bin(0.5 + i / 2 / BINS, 0.5 + (i + 1) / 2 / BINS, float(weight), predicted, observed)
        )
    return tuple(bins)


def _fit_temperature(
    d: Tensor, label: Tensor, share: Tensor, label_noise: float
) -> tuple[float | None, float | None]:
    """Return the temperature of the least loss, and that loss. A ternary search on the logarithm
    starts from the best point of a grid."""

    def loss(log_sharpness: float) -> float:
        return float((share * pair_nll(d * math.exp(log_sharpness), label, label_noise)).sum())

    most = math.log(_SHARPEST)
    grid = torch.linspace(-most, most, 57).tolist()
    # if several losses underflow to 0, take the sharpest
    at = min(range(len(grid)), key=lambda i: (loss(grid[i]), -i))
    if at in (0, len(grid) - 1):
        return None, None
    low, high = grid[at - 1], grid[at + 1]
    while high - low > 1e-7:
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    best = (low + high) / 2
    return math.exp(-best), loss(best)


# ---- what people see -----------------------------------------------------------------------------
def save_report(report: RewardReport, path: str | Path) -> None:
    """Write a report as JSON, replacing the file atomically."""
    write_file(Path(path), (json.dumps(asdict(report), indent=1, allow_nan=False) + "\n").encode())


def report_table(report: RewardReport) -> Table:
    """Return the report as a table for the terminal."""
    r = report
    table = Table(
        title=f"Held-out preferences: {r.pairs} pairs of {r.examples} examples",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row(
        "accuracy (95% interval)",
        f"{r.accuracy:.1%} ({r.accuracy_low:.1%} to {r.accuracy_high:.1%})",
    )
    if r.ceiling is not None:
        table.add_row(
            f"ceiling, where {r.label_noise:.0%} of the labels are flipped", f"{r.ceiling:.1%}"
        )
    table.add_row(
        "preferring the shorter answer; the longer", f"{r.shorter_wins:.1%}; {r.longer_wins:.1%}"
    )
    table.add_row("correlation of score and length", f"{r.length_correlation:+.2f}")
    table.add_row("mean margin", f"{r.margin:.3f}")
    table.add_row("loss, nats; a coin's", f"{r.loss:.4f}; {math.log(2):.4f}")
    table.add_row("Brier score; a coin's", f"{r.brier:.4f}; 0.2500")
    table.add_row("expected calibration error", f"{r.ece:.1%}")
    table.add_row("accuracy that the model expects", f"{r.confidence:.1%}")
    if r.temperature is not None and r.loss_at_temperature is not None:
        table.add_row(
            "temperature of the least loss; that loss",
            f"{r.temperature:.2f}; {r.loss_at_temperature:.4f}",
        )
    table.add_section()
    for b in r.bins:
        table.add_row(
            f"predicted {b.predicted:.1%} ({b.weight:.0%} of the votes)",
            f"observed {b.observed:.1%}",
        )
    return table
