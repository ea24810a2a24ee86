"""Cautions: what the metrics of a run say that a person should know while it runs.

Each is said once per run, when its metric has been out of bounds for a number of steps in a row.
Other parts say when all rewards are equal (watch/monitor.py), when the KL cannot reach its target
(policy/control.py) and when the policy games its reward (watch/alarm.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.config.base import SamplingConfig, StageConfig

# the mean reward is then mostly of texts without an end; five rollouts, since one has few texts
MOST_CUT_OFF, CUT_OFF_STEPS = 0.5, 5
# a baseline that explains less than a twentieth of the variance is no better than a constant; a
# critic begins at 0 and takes some tens of rollouts to learn
LEAST_EXPLAINED, EXPLAINED_STEPS = 0.05, 50
# most of the gradient is then cut, so that further steps on the rollout move little but noise; 0.2
# is usual, and some steps in a row tell a trend from a bad batch
MOST_CLIPPED, CLIPPED_STEPS = 0.5, 5
# as long as a critic's: learning rates that warm up begin without clipping
UNCLIPPED_STEPS = 50
# ten times what bfloat16 rounds to and a hundred times float32's (docs/metrics.md): not rounding,
# and one step is enough to know, since the two compute the same numbers
MOST_GAP = {"bfloat16": 1e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Bounds:
    """Bounds that a metric may leave for fewer than `steps` steps in a row, and what to say then;
    {value} in the text stands for the metric."""

    metric: str
    steps: int
    text: str
    low: float = -math.inf
    high: float = math.inf


def bounds_of(config: StageConfig, dtype: str) -> list[Bounds]:
    """List the bounds that apply to a run whose weights have this dtype."""
    if not isinstance(config, SamplingConfig):
        return []
    limit = f"generation.max_new_tokens = {config.generation.max_new_tokens}"
    what, texts = f"completions are cut off at {limit}", "texts"
    if isinstance(config, PolicyConfig) and config.plays:
        limit = f"turns.max_turns = {config.turns.max_turns}"
        what, texts = f"trajectories are ended by a limit ({limit}, or another)", "trajectories"
    found = [
        Bounds(
            "completions/clipped_ratio",
            CUT_OFF_STEPS,
            f"{{value:.0%}} of the {what}, so that most rewards judge {texts} without an end; "
            f"raise it, or set missing_eos_penalty; where {texts} are not meant to end, all is "
            "well",
            high=MOST_CUT_OFF,
        )
    ]
    if not isinstance(config, PolicyConfig):
        return found
    if config.mask_truncated_completions:
        found.append(_all_cut_off(limit, "mask_truncated_completions leaves them out"))
    if config.loss.bootstrap_truncated:
        found.append(_all_cut_off(limit, "loss.bootstrap_truncated drops their scores"))
    found += [
        Bounds(
            "val/explained_variance",
            EXPLAINED_STEPS,
            "the critic explains {value:.0%} of the variance of the returns, no more than a "
            "constant would (below 0 it adds noise); raise its learning rate or loss.value_coef, "
            "give it a model of its own (critic.model) or a head start (critic.warmup_steps)",
            low=LEAST_EXPLAINED,
        ),
        Bounds(
            "sampling/sampling_logp_difference/mean",
            1,
            "the log-probabilities of sampler and trainer differ by {value:.2g} nats a token, more "
            f"than {dtype} rounds; every ratio is off by as much; look for weights that change "
            "between rollout and update, or set strict (max_logp_diff = "
            f"{config.max_logp_diff:g} stops the run)",
            high=MOST_GAP.get(dtype, MOST_GAP["bfloat16"]),
        ),
    ]
    if config.loss.clip_low is not None and not config.idle_bounds:
        found += [
            Bounds(
                "clip_ratio/region_mean",
                CLIPPED_STEPS,
                "the clip removes the gradient of {value:.0%} of the tokens: the policy moves too "
                "far on one rollout; lower optim.lr, epochs or minibatches",
                high=MOST_CLIPPED,
            ),
            Bounds(
                "clip_ratio/region_mean",
                UNCLIPPED_STEPS,
                "the clip has never acted: the policy hardly moves on a rollout; that is safe, and "
                "slow if the reward does not rise: raise optim.lr, epochs or minibatches",
                low=1e-9,
            ),
        ]
    return found


def _all_cut_off(limit: str, why: str) -> Bounds:
    return Bounds(
        "completions/clipped_ratio",
        1,
        f"all completions are cut off, and {why}, so that nothing is learned of the rewards; raise "
        f"{limit}, or leave that option out",
        high=1 - 1e-9,
    )


class Cautions:
    """Cautions of one run. Given the metrics of a resumed run again, they are in the same state."""

    def __init__(self, config: StageConfig, dtype: str) -> None:
        self._open = dict.fromkeys(bounds_of(config, dtype), 0)

    def update(self, metrics: Mapping[str, Any]) -> list[str]:
        """Add a step's metrics; None and NaN count as not measured. Return what is to be said
        now."""
        said = []
        for bounds, stretch in list(self._open.items()):
            value = metrics.get(bounds.metric)
            if value is None or not math.isfinite(value):
                continue
            out = not bounds.low <= value <= bounds.high
            self._open[bounds] = stretch + 1 if out else 0
            if self._open[bounds] >= bounds.steps:
                del self._open[bounds]  # said once
                steps = "" if bounds.steps == 1 else f"for {bounds.steps} steps now, "
                said.append(steps + bounds.text.format(value=value))
        return said
