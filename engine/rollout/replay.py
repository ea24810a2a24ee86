"""Earlier rollouts, trained on again: the replay buffer of a policy run.

Completions enter the buffer whole, after the step that trained on them: with the old_logp of the
policy mu that wrote them, ref_logp, values, returns and advantages. A step's batch is its new
completions and some of the buffer's, drawn without replacement. The ratio exp(logp - old_logp) of a
replayed token is then its importance weight pi / mu. The objective keeps, clips or caps it as in
later epochs, so a buffer acts like more epochs, spread over steps. Advantages are those of the step
that wrote the completion, normalised in the group and batch of that step: the surrogate
E_mu[pi / mu A^mu] of PPO, with an older mu. So a KL in the reward is that of the older policy;
kl.through_ratio charges the current policy's KL, at each state. The older the data, the more the
clip is needed: unclipped token weights neither correct the distribution of states nor stay bounded.

Source    experience replay with importance weights: Lin (1992); Wang et al. (2016), ACER. The
          truncated weight is the objective's clip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrl.engine.base.errors import CheckpointError
from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import ReplayConfig
from fusedrl.kernels.kept import Kept


@dataclass(frozen=True)
class Replayed:
    """Completions drawn from the buffer for one step, and metrics of how old they are."""

    batch: PackedBatch
    metrics: dict[str, float]


class ReplayBuffer:
    """Completions of past steps, in the host's memory. Draws depend only on the completions added
    and on `seed`, so a resumed run draws the same ones.

    The age of a completion counts rollouts: 1 is the previous step.
    """

    def __init__(self, config: ReplayConfig, seed: int) -> None:
        self.config, self._seed = config, seed
        self._held: list[tuple[int, PackedBatch]] = []  # step and completions, oldest first

    def __len__(self) -> int:
        return sum(batch.num_sequences for _, batch in self._held)

    @property
    def newest(self) -> int:
        """Step whose completions were added last; -1 if there are none."""
        return self._held[-1][0] if self._held else -1

    def add(self, batch: PackedBatch, step: int) -> None:
        """Add a step's completions, with all columns that an update reads. The oldest completions
        beyond the capacity are dropped."""
        unread = dict.fromkeys(("weights", "old_entropy", "token_totals", "cut_off", "last_values"))
        self._held.append((step, batch.with_columns(**unread).to("cpu")))
        while (surplus := len(self) - self.config.capacity) > 0:
            written, oldest = self._held.pop(0)
            if oldest.num_sequences > surplus:
                self._held.insert(0, (written, oldest.select(range(surplus, oldest.num_sequences))))

    def draw(self, step: int, fresh: int, device: torch.device | str) -> Replayed | None:
        """Draw completions for step `step` to join `fresh` new ones, so that the drawn ones are
        `fraction` of all. Draw fewer if the buffer holds fewer, and return None if there are none
        to draw. Completions older than max_age are dropped first."""
        self._held = [
            (written, batch)
            for written, batch in self._held
            if step - written <= self.config.max_age
        ]
        size, count = len(self), round(fresh * self.config.fraction / (1 - self.config.fraction))
        chosen = set(shuffled(size, self._seed, "replay", step)[:count])
        if not chosen:
            return None
        parts: list[PackedBatch] = []
        ages: list[int] = []
        first = 0
        for written, batch in self._held:
            rows = [row for row in range(batch.num_sequences) if first + row in chosen]
            first += batch.num_sequences
            if rows:
                parts.append(batch.select(rows))
                ages += [step - written] * len(rows)
        return Replayed(
            PackedBatch.concat(parts).to(device),
            {
                "replay/size": float(size),
                "replay/fraction": len(ages) / (fresh + len(ages)),
                "replay/age_mean": sum(ages) / len(ages),
                "replay/age_max": float(max(ages)),
            },
        )

    # ---- checkpoints -----------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the buffer holds, as tensors."""
        steps = [written for written, batch in self._held for _ in range(batch.num_sequences)]
        columns = vars(PackedBatch.concat([batch for _, batch in self._held])) if self._held else {}
        found = {name: x for name, x in columns.items() if isinstance(x, Tensor)}
        if (kept := columns.get("kept")) is not None:
            found |= {"kept_ids": kept.token_ids, "kept_offsets": kept.offsets}
        return found | {"steps": torch.tensor(steps, dtype=torch.int64)}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned. Raise CheckpointError if `saved` is not a buffer."""
        columns = dict(saved)
        try:
            steps = columns.pop("steps").tolist()
            if not steps and not columns:
                self._held = []
                return
            lengths = tuple(columns["cu_seqlens"].diff().tolist())
            kept = None
            if "kept_ids" in columns:
                kept = Kept(columns.pop("kept_ids"), columns.pop("kept_offsets"))
            batch = PackedBatch(lengths=lengths, kept=kept, **columns)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint: replay holds no buffer that this version reads ({error}); start in "
                "another --run.dir"
            ) from error
        if len(lengths) != len(steps):
            raise CheckpointError(
                f"checkpoint: replay holds {len(lengths)} completions and {len(steps)} ages; start "
                "in another --run.dir"
            )
        self._held = [
            (written, batch.select([row for row, of in enumerate(steps) if of == written]))
            for written in sorted(set(steps))
        ]


def with_replay(
    fresh_cuts: list[list[list[int]]],
    fresh: int,
    replayed: PackedBatch,
    tokens_per_microbatch: int,
    apart: Collection[int] = (),
    lanes: int = 1,
) -> list[list[list[int]]]:
    """Return how to split a batch that has replayed completions after its new ones into minibatches
    and micro-batches.

    The new completions, 0 .. fresh - 1, keep their micro-batches, so that their ratios stay exactly
    1. The replayed completions are numbered from `fresh` on. Each minibatch gets its share of them,
    in micro-batches without new completions. Replayed completions whose number, counted from 0, is
    in `apart` do not share a micro-batch with the rest. `lanes` is that of `split_by_tokens`.
    """
    R, M = replayed.num_sequences, len(fresh_cuts)
    # each minibatch gets completions of all ages
    shares = [replayed.split(tokens_per_microbatch, range(m, R, M), apart, lanes) for m in range(M)]
    return [
        cuts + [[fresh + row for row in group] for group in share]
        for cuts, share in zip(fresh_cuts, shares, strict=True)
    ]
