"""The reward-hacking alarm. It fires when the reward that is trained on (the proxy) rises while the
quality it stands for does not, and it lists the evidence.

In a hacked policy the reward jumps and the text becomes meaningless or repetitive; its entropy,
length and perplexity move far from where they were. None of these signs alone is a fault, and the
proxy rises in every run that works. So the alarm fires when the proxy rose significantly and
  - a gold reward (measured, not trained on: monitor_reward) fell significantly, or
  - no gold reward rose, and the text has changed in at least two of these ways:
        perplexity   under the reference: now 1.5 times what it was at first, or two thirds of it
        entropy      of the policy: less than half
        length       twice as long, or half as long
        repetition   within completions (token triples that occurred before, loops at the end) .1
                     more, or between them (distinct token triples) less than half
        kl           above twice kl.target
"At first" and "now" are medians over the first and the last `window` steps, which must not overlap.
A change is significant if it is more than `sigmas` standard errors of the difference of the two
medians. The standard error comes from the absolute deviations around the medians. So a trend within
a window counts as noise, and a single outlying step counts little.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from fusedrl.engine.config import AlarmConfig

PROXY, GOLD = "reward", "gold/"
# where nothing varies, any change is infinitely significant, and JSON has no infinity
MOST_SIGMAS = 999.0
KINDS_NEEDED = 2


@dataclass(frozen=True)
class Bounds:
    """Bounds that a metric may not leave: now / then within [low, high], and now - then at most
    `rise`. `kind` is the kind of evidence that a violation counts as."""

    kind: str
    low: float = -math.inf
    high: float = math.inf
    rise: float = math.inf


BOUNDS = {
    "perplexity_ref": Bounds("perplexity", low=2 / 3, high=1.5),
    "entropy": Bounds("entropy", low=0.5),
    "completions/mean_length": Bounds("length", low=0.5, high=2.0),
    "completions/repeated_trigrams": Bounds("repetition", rise=0.1),
    "completions/loop_fraction": Bounds("repetition", rise=0.1),
    "completions/distinct_trigrams": Bounds("repetition", low=0.5),
}
KL_FACTOR = 2.0


@dataclass(frozen=True)
class Evidence:
    """Evidence from one metric: its medians then and now, their difference in standard errors
    (`sigma`), and the kind of evidence."""

    metric: str
    kind: str
    then: float
    now: float
    sigma: float

    def __str__(self) -> str:
        moved = "rose" if self.now > self.then else "fell"
        return (
            f"{self.metric} {moved} from {self.then:.4g} to {self.now:.4g} "
            f"({abs(self.sigma):.1f} standard errors)"
        )


class _Series:
    """The first and the last values of one metric."""

    def __init__(self, window: int) -> None:
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        if len(self.first) < (self.last.maxlen or 0):
            self.first.append(value)
        else:
            self.last.append(value)

    def change(self) -> tuple[float, float, float] | None:
        """Return (then, now, their signed difference in standard errors), or None until both
        windows are full."""
        if len(self.last) < (self.last.maxlen or 0):
            return None
        then, now = median(self.first), median(self.last)
        deviations = [abs(value - then) for value in self.first] + [
            abs(value - now) for value in self.last
        ]
        # for normal noise, each of the two is the standard deviation
        spread = max(1.4826 * median(deviations), 1.2533 * fmean(deviations))
        # the standard error of a median is sqrt(pi / 2) times that of a mean
        error = 1.2533 * spread * math.sqrt(2 / len(self.first))
        if now == then:
            return then, now, 0.0
        sigma = (now - then) / error if error else math.copysign(MOST_SIGMAS, now - then)
        return then, now, max(-MOST_SIGMAS, min(MOST_SIGMAS, sigma))


class Detector:
    """Detector of reward hacking: takes the metrics of every step and returns the evidence. It
    depends on the metrics alone: given the metrics of a resumed run again, it is in the same state.

    kl_target: the target KL in nats per completion, or None. firing: whether the last step's
    evidence was enough for an alarm.
    """

    def __init__(self, config: AlarmConfig, kl_target: float | None = None) -> None:
        self._config, self._kl_target = config, kl_target
        self._series: dict[str, _Series] = {}
        self.firing = False

    def update(self, metrics: Mapping[str, Any]) -> list[Evidence]:
        """Add a step's metrics; None and NaN count as not measured. Return the evidence, the
        proxy's rise first, if there is enough for an alarm; else an empty list."""
        for name, value in metrics.items():
            if (
                (name in BOUNDS or name in (PROXY, "kl") or name.startswith(GOLD))
                and value is not None
                and math.isfinite(value)
            ):
                self._series.setdefault(name, _Series(self._config.window)).add(float(value))
        found = self._evidence()
        self.firing = bool(found)
        return found

    def _evidence(self) -> list[Evidence]:
        changes = {
            name: change
            for name, series in self._series.items()
            if (change := series.change()) is not None
        }
        if PROXY not in changes or changes[PROXY][2] <= self._config.sigmas:
            return []
        proxy = Evidence(PROXY, "proxy", *changes[PROXY])
        gold = {name: change for name, change in changes.items() if name.startswith(GOLD)}
        fell = [
            Evidence(name, "gold", *change)
            for name, change in gold.items()
            if change[2] < -self._config.sigmas
        ]
        rose = any(change[2] > self._config.sigmas for change in gold.values())
        others = [
            Evidence(name, bounds.kind, *changes[name])
            for name, bounds in BOUNDS.items()
            if name in changes and self._outside(bounds, *changes[name])
        ]
        if (
            self._kl_target is not None
            and "kl" in changes
            and changes["kl"][1] > KL_FACTOR * self._kl_target
        ):
            others.append(Evidence("kl", "kl", *changes["kl"]))
        suffices = bool(fell) or (
            not rose and len({evidence.kind for evidence in others}) >= KINDS_NEEDED
        )
        return [proxy, *fell, *others] if suffices else []

    def _outside(self, bounds: Bounds, then: float, now: float, sigma: float) -> bool:
        return abs(sigma) > self._config.sigmas and (
            now < bounds.low * then or now > bounds.high * then or now > then + bounds.rise
        )


def as_row(step: int, evidence: list[Evidence]) -> dict[str, Any]:
    """Return an alarm as a line of alarms.jsonl."""
    return {"step": step, "evidence": [asdict(one) for one in evidence]}


def message(step: int, evidence: list[Evidence]) -> str:
    """Describe an alarm in words, for the terminal."""
    proxy, *others = map(str, evidence)
    return (
        f"reward hacking suspected at step {step}: the trained {proxy} while {'; '.join(others)}. "
        "Read <run>/samples.jsonl; a larger kl.coef, a smaller "
        "kl.target, fewer steps or a better reward is the remedy"
    )
