"""Saving of a run: the contents of a checkpoint, when one is written, and whether the memory still
holds the last completed step.

A checkpoint is the state at the end of a step. A run that continues from it is bitwise the same as
an uninterrupted run. When a step is complete, its small parts (generators, coefficients, counts)
are copied. Weights and moments are not copied: they stay those of the last completed step until the
next update begins, and the optimizers count the updates begun. So a run that ends while it
generates, scores or waits can still be saved as of its last completed step. A run that ends
half-way through an update cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fusedrl.engine.base.draws import generator_states, set_generator_states
from fusedrl.engine.base.errors import CheckpointError
from fusedrl.engine.config.base import RunConfig
from fusedrl.engine.optim.learner import Learner, Model
from fusedrl.engine.parallel.ranks import ALONE, Ranks
from fusedrl.engine.runs.best import Best
from fusedrl.engine.runs.checkpoint import Checkpoint, save_checkpoint
from fusedrl.engine.runs.files import check_held

# a save waits for this many times the seconds that the last save took, so that saving takes at most
# 5% of the time
_SHARE = 20


@runtime_checkable
class Versioned(Protocol):
    """Model whose weights have a version number."""

    weights_version: int


class Stateful(Protocol):
    """Object whose state is small and consists of JSON values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class Buffer(Protocol):
    """Object that keeps tensors of earlier steps; `newest` is the last of these steps."""

    @property
    def newest(self) -> int: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, saved: Mapping[str, Tensor], /) -> None: ...


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything that a run carries from step to step."""

    model: Learner
    control: Stateful | None = None
    critic: Learner | None = None
    replay: Buffer | None = None
    drafts: Buffer | None = None

    def learners(self) -> Iterator[tuple[str, str, Learner]]:
        """Yield each learner with the names under which a checkpoint stores its weights and its
        optimizer's state."""
        yield "model", "optimizer", self.model
        if self.critic is not None:
            yield "critic", "critic_optimizer", self.critic

    @property
    def skipped(self) -> int:
        """Number of updates skipped since these objects were made."""
        return sum(learner.skipped for _, _, learner in self.learners())

    def mark(self) -> tuple[int, ...]:
        """Return numbers that change with everything that an update writes: optimizer steps begun,
        in-place writes to parameters, the newest replayed step and the newest drafts."""
        counts = [
            count
            for _, _, learner in self.learners()
            for count in (
                learner.optimizer.begun,
                sum(p._version for p in trained(learner.model).values()),
            )
        ]
        buffers = (self.replay, self.drafts)
        return *counts, *(-1 if buffer is None else buffer.newest for buffer in buffers)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore these objects, in place, and the process's random generators. Raise
        CheckpointError if the checkpoint was made of other objects."""
        for group, moments, learner in self.learners():
            parameters, saved = trained(learner.model), checkpoint.tensors[group]
            if saved.keys() != parameters.keys() or any(
                saved[name].shape != p.shape for name, p in parameters.items()
            ):
                raise CheckpointError(
                    f"{checkpoint.path}: expected tensors {_shapes(parameters)}, got "
                    f"{_shapes(saved)}"
                )
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
            learner.optimizer.load_state_dict(checkpoint.tensors[moments])
        if self.control is not None:
            try:
                self.control.load_state_dict(checkpoint.state)
            except KeyError as error:
                raise CheckpointError(
                    f"{checkpoint.path}: state.json lacks {error}, so another version of fusedrl "
                    "wrote it; resume with that version, "
                    "or begin another run from a model that it saved"
                ) from error
        if self.replay is not None:
            if "replay" not in checkpoint.tensors:
                raise CheckpointError(
                    f"{checkpoint.path}: expected the group replay, got "
                    f"{sorted(checkpoint.tensors)}"
                )
            self.replay.load(checkpoint.tensors["replay"])
        # without drafts a run is the same one, only slower: they may be switched on in between
        if self.drafts is not None and "drafts" in checkpoint.tensors:
            self.drafts.load(checkpoint.tensors["drafts"])
        if "weights_version" in checkpoint.state and isinstance(self.model.model, Versioned):
            self.model.model.weights_version = checkpoint.state["weights_version"]
        set_generator_states(checkpoint.tensors["rng"])


@dataclass(frozen=True, eq=False)
class _Completed:
    """The end of a step: copies of its small parts, and the mark that identifies the rest."""

    step: int
    generators: dict[str, Tensor]
    state: dict[str, Any]
    mark: tuple[int, ...]


class Saver:
    """Saves the checkpoints of a run. With several ranks, all of them save together.

    Args:
        directory: the run directory.
        checkpoint: checkpoint that the run continues from, already loaded into `parts`; None at the
            beginning.
        skipped: number of updates skipped so far.
        ranks: ranks of the run.
        sync: function of a step that flushes the run's files of lines to the disk and returns what
            is in them up to that step; it is kept in the checkpoint as "lines".
    Attributes:
        saved: newest checkpoint, as (step, directory), or None.
        best: the best step so far by `run.keep_best`; its checkpoint is kept.
    """

    def __init__(
        self,
        directory: Path,
        settings: RunConfig,
        parts: Parts,
        checkpoint: Checkpoint | None,
        skipped: int,
        ranks: Ranks = ALONE,
        sync: Callable[[int], Mapping[str, Any]] = lambda step: {},
    ) -> None:
        self._directory, self._settings, self._parts = directory, settings, parts
        self._ranks, self._sync = ranks, sync
        self.saved = None if checkpoint is None else (checkpoint.step, checkpoint.path)
        self.saving = False
        self.best = Best(settings.keep_best)
        self._failed: int | None = None
        self._seconds, self._last = 0.0, time.perf_counter()
        self.complete(0 if checkpoint is None else checkpoint.step, skipped)

    def complete(self, step: int, skipped: int) -> None:
        """Note that `step` steps are complete, and that the parts are in the state after the last
        of them."""
        model, control = self._parts.model.model, self._parts.control
        state = {"skipped_updates": skipped} | (control.state_dict() if control is not None else {})
        state |= {"weights_version": model.weights_version} if isinstance(model, Versioned) else {}
        self._completed = _Completed(step, generator_states(), state, self._parts.mark())

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self._completed.step

    @property
    def safe(self) -> bool:
        """Whether nothing would be lost if the process ended now, because the last completed step
        is on the disk."""
        return self.step == 0 or (self.saved is not None and self.saved[0] == self.step)

    @property
    def failed(self) -> bool:
        """Whether saving the last completed step was tried and ended in an error."""
        return self._failed == self.step

    @property
    def whole(self) -> bool:
        """Whether the last completed step can still be saved: no update has begun since, and saving
        it has not failed."""
        return self._parts.mark() == self._completed.mark and not self.failed

    def due(self) -> bool:
        """Whether to save the step just completed. The best step so far is saved. Otherwise, with
        `save_every`, it depends on the number of the step; without, it goes by the clock: the first
        step, then every `save_minutes`, and never so often that saving takes more than 5% of the
        time."""
        if self.best.step == self.step:
            return True
        if self._settings.save_every:
            return self.step % self._settings.save_every == 0
        waited = time.perf_counter() - self._last
        return self._settings.save_minutes > 0 and (
            self.saved is None
            or waited >= max(60 * self._settings.save_minutes, _SHARE * self._seconds)
        )

    def save(self) -> Path:
        """Write a checkpoint of the last completed step; allowed only while `whole`. Errors are
        those of `save_checkpoint`."""
        began = time.perf_counter()
        self.saving, self._failed = True, self.step
        try:
            check_held(self._directory)
            tensors: dict[str, Mapping[str, Tensor]] = {"rng": self._completed.generators}
            shares: dict[str, Mapping[str, Tensor]] = {}
            for group, moments, learner in self._parts.learners():
                tensors[group] = trained(learner.model)
                shares[moments] = learner.optimizer.state_dict()
            if self._parts.replay is not None:
                tensors["replay"] = self._parts.replay.tensors()
            if self._parts.drafts is not None:
                tensors["drafts"] = self._parts.drafts.tensors()
            path = save_checkpoint(
                self._directory,
                self.step,
                tensors,
                # lines that came before a checkpoint must not be lost where it is not
                self._completed.state | {"lines": dict(self._sync(self.step))},
                keep=self._settings.keep,
                spare=() if self.best.step is None else (self.best.step,),
                shares=shares,
                ranks=self._ranks,
            )
            self.saved, self._failed = (self.step, path), None
        finally:
            self.saving, self._last = False, time.perf_counter()
        self._seconds = self._last - began
        return path


def trained(model: Model) -> dict[str, Tensor]:
    """Return the part of a model that a checkpoint holds: without the weights that LoRA froze,
    which are those of the initial model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
