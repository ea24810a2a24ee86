"""Earlier rollouts, trained on again: the replay buffer of a policy run.

Each step's completions enter after they were trained on, whole: with the old_logp of the policy that wrote them, ref_logp, values, returns and advantages. A
step's batch is its own completions and some of the buffer's, drawn without replacement. The ratio exp(logp - old_logp) of a replayed token is then its
importance weight pi / mu, which the objective keeps, clips or caps as it does in later epochs; so a buffer is more epochs, spread over steps. Advantages are
those of their own step, normalised in their own group and batch: the surrogate E_mu[pi / mu A^mu] of PPO, about an older mu.

Source    experience replay with importance weights: Lin (1992); Wang et al. (2016), ACER. The truncated weight is the objective's clip.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusedrl.engine.config import ReplayConfig
from fusedrl.engine.control import shuffled
from fusedrl.engine.errors import CheckpointError
from fusedrl.engine.packing import PackedBatch


@dataclass(frozen=True)
class Replayed:
    """What a step gets from the buffer: completions, and metrics of how old they are."""

    batch: PackedBatch
    metrics: dict[str, float]


class ReplayBuffer:
    """Completions of past steps, oldest first, in the host's memory. A function of what was added and of `seed`: a resumed run draws the same.

    An age counts rollouts: 1 is the step before.
    """

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._steps: list[int] = []  # when each was written
        self._batch: PackedBatch | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, batch: PackedBatch, step: int) -> None:
        """Take in a step's completions, with all that an update reads of them; the oldest beyond the capacity go."""
        added = replace(batch, weights=None, old_entropy=None).to("cpu")
        self._batch = added if self._batch is None else PackedBatch.concat([self._batch, added])
        self._steps += [step] * batch.num_sequences
        self._keep(range(max(0, len(self) - self.config.capacity), len(self)))

    def draw(self, step: int, fresh: int, device: torch.device | str) -> Replayed | None:
        """Completions for step `step` beside `fresh` new ones, so that they are `fraction` of all, or as many as there are; None where there are none. What is
        older than max_age is dropped before."""
        self._keep([i for i, written in enumerate(self._steps) if step - written <= self.config.max_age])
        if self._batch is None or not len(self):
            return None
        count = round(fresh * self.config.fraction / (1 - self.config.fraction))
        rows = shuffled(len(self), self._seed, "replay", step)[:count]
        if not rows:
            return None
        ages = [step - self._steps[row] for row in rows]
        return Replayed(self._batch.select(rows).to(device), {
            "replay/size": float(len(self)), "replay/fraction": len(rows) / (fresh + len(rows)), "replay/age_mean": sum(ages) / len(ages),
            "replay/age_max": float(max(ages))})

    def _keep(self, rows: range | list[int]) -> None:
        if self._batch is not None and len(rows) < len(self):
            self._batch, self._steps = self._batch.select(rows), [self._steps[row] for row in rows]

    # ---- checkpoints ----------------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """All it holds."""
        columns = {} if self._batch is None else {name: x for name, x in vars(self._batch).items() if isinstance(x, Tensor)}
        return columns | {"steps": torch.tensor(self._steps, dtype=torch.int64)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """What `tensors` gave. Raises CheckpointError where that is no buffer."""
        columns = dict(saved)
        try:
            self._steps = columns.pop("steps").tolist()
            lengths = tuple(columns["cu_seqlens"].diff().tolist()) if columns else ()
            self._batch = PackedBatch(lengths=lengths, **columns) if columns else None  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: replay holds no buffer that this version reads ({error}); start in another --run.dir") from error
        if len(lengths) != len(self._steps):
            raise CheckpointError(f"checkpoint: replay holds {len(lengths)} completions and {len(self._steps)} ages; start in another --run.dir")


def with_replay(fresh_cuts: list[list[list[int]]], fresh: int, replayed: PackedBatch, tokens_per_microbatch: int) -> list[list[list[int]]]:
    """Cuts of the new completions 0 .. fresh - 1 as they are, and in each minibatch its share of those replayed behind them, which are numbered from `fresh` on,
    in micro-batches of their own: the new ones' ratios stay exactly 1."""
    R, M = replayed.num_sequences, len(fresh_cuts)
    shares = [replayed.split(tokens_per_microbatch, range(m * R // M, (m + 1) * R // M)) for m in range(M)]
    return [cuts + [[fresh + row for row in group] for group in share] for cuts, share in zip(fresh_cuts, shares, strict=True)]
