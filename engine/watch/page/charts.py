"""Charts of a page: which there are, and their points, thinned where a run is long.

A run of more than MOST_POINTS lines is cut into BUCKETS equal spans of steps. Of each span a chart
gets the mean, which is drawn, and the least and the most value, between which it is shaded: so a
spike of a single step stays visible.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrl.engine.watch.run_files import RunRecord, Series

MOST_POINTS, BUCKETS, MOST_CHARTS = 1200, 500, 300
APART = ("timing/evaluate", "timing/waiting")  # no part of timing/step


@dataclass(frozen=True)
class Plot:
    """A metric to draw, where `*` stands for any name; `held` is the same one on held-out data."""

    title: str
    metric: str
    unit: str = ""
    about: str = ""
    held: str = ""


GROUPS: dict[str, tuple[Plot, ...]] = {
    "Reward and divergence": (
        Plot("Reward", "reward", "", "Mean score of a step's completions.", "eval_reward"),
        Plot(
            "Gold reward: *",
            "gold/*/mean",
            "",
            "Measured, never trained on. Where it falls as the reward rises, the reward is hacked.",
            "eval_gold/*/mean",
        ),
        Plot(
            "KL from the reference",
            "kl",
            "nats a completion",
            "log policy - log reference, summed over a completion.",
            "eval_kl",
        ),
        Plot(
            "Entropy", "entropy", "nats a token", "Of the next token. Near 0, exploration is over."
        ),
        Plot(
            "Length",
            "completions/mean_length",
            "tokens",
            "EOS included.",
            "eval_completions/mean_length",
        ),
        Plot(
            "Cut off",
            "completions/clipped_ratio",
            "share",
            "Completions that reached the longest length allowed.",
        ),
        Plot(
            "Perplexity under the reference",
            "perplexity_ref",
            "",
            "Rises where the text leaves what the reference would say.",
            "eval_perplexity_ref",
        ),
        Plot(
            "Repetition",
            "completions/repeated_trigrams",
            "share",
            "Token triples that their completion had before.",
            "eval_completions/repeated_trigrams",
        ),
        Plot("pass@*", "", "share", "One of so many completions is right.", "eval_pass@*"),
        Plot("Accuracy", "accuracy", "share", "Pairs whose better answer wins.", "eval_accuracy"),
        Plot("Margin", "margin", "", "Better score less worse score.", "eval_margin"),
        Plot("Margin of rewards", "rewards/margins", "nats x beta", "Chosen less rejected."),
        Plot("Accuracy of rewards", "rewards/accuracies", "share", "", "eval_rewards/accuracies"),
    ),
    "Losses and updates": (
        Plot("Loss", "loss", "", "What a step minimises.", "eval_loss"),
        Plot("Policy loss", "loss/policy_avg", "", "Mean over the step's updates."),
        Plot("Value loss", "loss/value_avg", "", "Mean over the step's updates."),
        Plot(
            "Clip fraction",
            "clip_ratio/region_mean",
            "share",
            "Tokens whose gradient a bound removed. Healthy below 0.2.",
        ),
        Plot(
            "Explained variance",
            "val/explained_variance",
            "",
            "Of the returns, by the critic. Below 0 it does harm.",
        ),
        Plot(
            "KL of an update",
            "policy/approxkl_avg",
            "nats a token",
            "From the rollout's policy to the one being trained. Healthy below 0.02.",
        ),
        Plot("Gradient norm", "grad_norm", "", "Before it is clipped."),
        Plot("Learning rate", "learning_rate", "", ""),
        Plot("KL coefficient", "kl_coef", "", "The weight of the KL in the step."),
    ),
    "Sampler and trainer": (
        Plot(
            "Largest difference",
            "sampling/sampling_logp_difference/max",
            "nats",
            "Between a token's log-probability by the sampler and by the trainer. Rounding only, "
            "or exactly 0 when strict.",
        ),
        Plot(
            "Mean difference",
            "sampling/sampling_logp_difference/mean",
            "nats",
            "The same, over all tokens.",
        ),
    ),
    "Time and memory": (
        Plot("Seconds of a step", "timing/step", "s", "Evaluation apart."),
        Plot("Speed", "tokens_per_s", "tokens/s", "Prompts and completions of a step."),
        Plot("Peak memory", "mem/peak_gib", "GiB", "The most so far."),
    ),
}
REST = "Everything else"


class Points:
    """Points of all charts. Charts of the same steps share them.

    Attributes:
        steps: lists of steps, to which the charts refer by their place.
        thinned: the most lines of a run that are in one point; 1 where all are drawn.
    """

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.thinned = 1
        self._places: dict[bytes, int] = {}

    def of(self, series: Series) -> dict[str, Any]:
        """Return a metric's points as JSON values: x (a place in `steps`), y, and lo and hi where
        they are thinned."""
        if len(series.steps) <= MOST_POINTS:
            return {"x": self._place(series.steps), "y": _rounded(series.values)}
        x, mean, low, high, count = thin(series)
        self.thinned = max(self.thinned, count)
        return {
            "x": self._place(x),
            "y": _rounded(mean),
            "lo": _rounded(low),
            "hi": _rounded(high),
        }

    def _place(self, steps: NDArray[np.float64]) -> int:
        key = steps.tobytes()
        if key not in self._places:
            self._places[key] = len(self.steps)
            self.steps.append([int(x) if x == int(x) else x for x in steps.tolist()])
        return self._places[key]


def thin(
    series: Series, buckets: int = BUCKETS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Cut a series into spans of steps.

    Returns:
        Of every span that has values its middle step, and the mean, the least and the most of its
        finite values (NaN where there is none); and the most values that a span has.
    """
    x, y = series.steps, series.values
    span = (buckets * (x - x[0]) / (x[-1] - x[0])).astype(np.int64).clip(0, buckets - 1)
    starts = np.flatnonzero(np.append(True, span[1:] != span[:-1]))
    sizes = np.diff(np.append(starts, len(x)))
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    empty = counts == 0
    mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / np.where(empty, 1.0, counts)
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    for found in (mean, low, high):
        found[empty] = np.nan
    return x[starts + sizes // 2], mean, low, high, int(sizes.max())


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    """Six digits of each value, None for NaN."""
    return [None if v != v else float(f"{v:.6g}") for v in values.tolist()]


# ---- which charts there are ----------------------------------------------------------------------
def charts(
    runs: Sequence[RunRecord], points: Points
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Return the charts of each group, as the page's script reads them, and how many were left out
    since there are more than MOST_CHARTS."""
    known = sorted({name for run in runs for name in run.series})
    drawn: set[str] = set()
    found: dict[str, list[dict[str, Any]]] = {}
    for group, plots in GROUPS.items():
        found[group] = []
        for plot in plots:
            for title, metric, held in _matches(plot, known):
                drawn |= {metric, held, f"{held}_stderr"}
                found[group].append(
                    _chart(runs, points, title, metric, held, plot.unit, plot.about)
                )
        if group == "Time and memory":
            parts = list(_phases(runs, points))
            drawn |= {name for part in parts for name in part["names"]}
            found[group] = [*parts, *found[group]]
    rest = [name for name in known if name not in drawn and not name.endswith("_stderr")]
    room = max(0, MOST_CHARTS - sum(map(len, found.values())))
    found[REST] = [_chart(runs, points, name, name, "", "", "") for name in rest[:room]]
    return {group: some for group, some in found.items() if some}, len(rest[room:])


def _matches(plot: Plot, known: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (title, metric, metric on held-out data) of what a plot stands for in these runs."""
    names: list[str] = []
    for pattern in filter(None, (plot.metric, plot.held)):
        expected = re.escape(pattern).replace(r"\*", "(.+)")
        for name in known:
            if (match := re.fullmatch(expected, name)) and not name.endswith("_stderr"):
                names.append(match[1] if match.groups() else "")
    for name in dict.fromkeys(names):
        yield tuple(text.replace("*", name) for text in (plot.title, plot.metric, plot.held))  # type: ignore[misc]


def _chart(
    runs: Sequence[RunRecord],
    points: Points,
    title: str,
    metric: str,
    held: str,
    unit: str,
    about: str,
) -> dict[str, Any]:
    lines = [
        {"run": index, "name": run.name, "held": name == held} | points.of(run.series[name])
        for name in filter(None, (metric, held))
        for index, run in enumerate(runs)
        if name in run.series
    ]
    targets = [
        {"run": index, "value": target}
        for index, run in enumerate(runs)
        if metric == "kl" and type(target := (run.config or {}).get("kl.target")) in (int, float)
    ]
    names = [name for name in (metric, held) if any(name in run.series for run in runs)]
    return {
        "title": title,
        "names": names,
        "unit": unit,
        "about": about,
        "lines": lines,
        "targets": targets,
        "held": any(line["held"] for line in lines),
    }


def _phases(runs: Sequence[RunRecord], points: Points) -> Iterator[dict[str, Any]]:
    """Yield two charts of every run with phases: their seconds, one above the other, and their
    peak memory."""
    for index, run in enumerate(runs):
        of = f": {run.name}" if len(runs) > 1 else ""
        memory = memory_of_phases(run)
        for title, names, unit, about in (
            ("Phases of a step", phases(run), "s", "One above the other; together, the step."),
            ("Peak memory of phases", memory, "GiB", "The most within each phase of the step."),
        ):
            if len(names) > 1:
                yield {
                    "title": title + of,
                    "names": names,
                    "unit": unit,
                    "about": about,
                    "lines": [
                        {"run": index, "name": _phase(name), "held": False}
                        | points.of(run.series[name])
                        for name in names
                    ],
                    "targets": [],
                    "held": False,
                } | ({"stacked": True} if unit == "s" else {})


def _phase(name: str) -> str:
    return name.removeprefix("timing/").removeprefix("mem/").removesuffix("_gib")


def memory_of_phases(run: RunRecord) -> list[str]:
    """Return the metrics that hold the peak memory of a step's phases."""
    return [
        name
        for name in run.series
        if name.startswith("mem/") and name.endswith("_gib") and name != "mem/peak_gib"
    ]


def phases(run: RunRecord) -> list[str]:
    """Return the metrics that hold the seconds of a step's phases."""
    return [
        name
        for name in run.series
        if name.startswith("timing/") and name not in (*APART, "timing/step")
    ]
