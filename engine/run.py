"""One run directory: its lock, resolved configuration, metrics, samples, progress and checkpoints. What the three stages share.

    <run>/config.json          the resolved configuration
    <run>/metrics.jsonl        one line a step
    <run>/samples.jsonl        some completions of every step (policy runs)
    <run>/alarms.jsonl, samples_eval.jsonl   what watches a policy run (monitor.py)
    <run>/checkpoints/         complete, verified states to resume from
    <run>/model/               the result, loadable by transformers
"""
from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fusedrl.engine.checkpoint import RunDirectory, save_checkpoint
from fusedrl.engine.config.base import StageConfig
from fusedrl.engine.control import Control
from fusedrl.engine.errors import CheckpointError, ConfigError
from fusedrl.engine.metrics import JsonLines, Metrics, Progress
from fusedrl.engine.optim import Optimizer, StepResult
from fusedrl.engine.replay import ReplayBuffer

T = TypeVar("T")
_MAX_SKIPPED = 5


class Model(Protocol):
    """What a run trains."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


class Learner(Protocol):
    """A model beside the first, with an optimizer of its own."""

    @property
    def model(self) -> Model: ...
    @property
    def optimizer(self) -> Optimizer: ...


class Run(contextlib.AbstractContextManager["Run"]):
    """Open the run directory of a configuration; `total` steps (None: set `run.total` before `restore`).

    SIGINT and SIGTERM are honoured between steps: the state is saved and the process exits with 128 + the signal; a second one is immediate.

    Raises:
        ConfigError: the directory holds another run and `run.resume` is off, or a resumed run's configuration, model or data changed.
    """

    def __init__(self, config: StageConfig, total: int | None) -> None:
        self.settings = config.run
        self.total = total or 0
        self.last_metrics: dict[str, float] = {}
        self._config = config
        self._title = config.title
        self._skipped_in_a_row: Counter[str] = Counter()
        self._skipped = 0
        self._signal: int | None = None
        self._exit: int | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            owned = stack.enter_context(RunDirectory(self._config))
            self.directory, self._checkpoint = owned.dir, owned.checkpoint
            self.start = self._checkpoint.step if self._checkpoint else 0
            self.metrics = stack.enter_context(Metrics(self.directory, resume_step=self.start or None))
            self._samples = stack.enter_context(JsonLines(self.directory / "samples.jsonl", resume_step=self.start or None))
            self.last_metrics = self.metrics.last()
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal, self._exit = number, 128 + number
        print(f"fusedrl: {signal.Signals(number).name}: saving after this step; once more to stop at once", file=sys.stderr)

    # ---- state ----------------------------------------------------------------------------------------------------------
    def restore(self, *, model: Model, optimizer: Optimizer, control: Control | None = None, critic: Learner | None = None,
                replay: ReplayBuffer | None = None) -> None:
        """Load the newest complete checkpoint into these objects, in place; nothing happens on a fresh run."""
        self._step_began = time.perf_counter()
        self._progress = self._stack.enter_context(Progress(self.total, self.settings.progress, start=self.start, title=self._title))
        if self._checkpoint is None:
            return
        for group, moments, learner, its_optimizer in _learners(model, optimizer, critic):
            parameters, saved = _trained(learner), self._checkpoint.tensors[group]
            if saved.keys() != parameters.keys() or any(saved[name].shape != p.shape for name, p in parameters.items()):
                raise CheckpointError(f"{self._checkpoint.path}: expected tensors {_shapes(parameters)}, got {_shapes(saved)}")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
            its_optimizer.load_state_dict(self._checkpoint.tensors[moments])
        if control is not None:
            control.load_state_dict(self._checkpoint.state)
        if replay is not None:
            if "replay" not in self._checkpoint.tensors:
                raise CheckpointError(f"{self._checkpoint.path}: expected the group replay, got {sorted(self._checkpoint.tensors)}")
            replay.load(self._checkpoint.tensors["replay"])
        self._skipped = int(self._checkpoint.state["skipped_updates"])
        torch.set_rng_state(self._checkpoint.tensors["rng"]["torch_cpu"])
        self._checkpoint = None
        where = f"continuing after step {self.start} of {self.total}" if self.start < self.total else f"finished already, at step {self.start}"
        self.message(f"{self.directory}: {where}")

    def _save(self, step: int, model: Model, optimizer: Optimizer, control: Control | None = None, critic: Learner | None = None,
              replay: ReplayBuffer | None = None) -> None:
        tensors: dict[str, dict[str, Tensor]] = {"rng": {"torch_cpu": torch.get_rng_state()}}
        for group, moments, learner, its_optimizer in _learners(model, optimizer, critic):
            tensors |= {group: _trained(learner), moments: its_optimizer.state_dict()}
        if replay is not None:
            tensors["replay"] = replay.tensors()
        state = {"skipped_updates": self._skipped} | (control.state_dict() if control is not None else {})
        save_checkpoint(self.directory, step, tensors, state, keep=self.settings.keep)

    def save_if_due(self, step: int, **parts: Any) -> None:
        """After step `step`: save where `save_every` says so, at the end, or because a signal or `stop` asked for it (which ends the process)."""
        done = step + 1
        if done == self.total or (self.settings.save_every and done % self.settings.save_every == 0) or self._exit is not None:
            self._save(done, **parts)
        if self._exit is not None:
            raise SystemExit(self._exit)

    def stop(self, code: int) -> None:
        """End the process with this exit code once the step is saved. A signal that came before has its own."""
        self._exit = code if self._exit is None else self._exit

    def finish(self, save: Callable[[Path], None]) -> str:
        """Write <run>/model and return its path."""
        target = self.directory / "model"
        save(target)
        self.message(f"saved {target}")
        return str(target)

    # ---- what is reported ---------------------------------------------------------------------------------------------------
    def time(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a part of the step into `timing/<name>`."""
        return self.metrics.time(name)

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Time a part into `timing/<name>` that is none of the step's own: its seconds are not in `timing/step`, nor in `tokens_per_s`."""
        began = time.perf_counter()
        with self.metrics.time(name):
            yield
        self._step_began += time.perf_counter() - began

    def lines(self, name: str) -> JsonLines:
        """Another file of JSON lines in the run directory; a resumed run's is cut as its metrics are."""
        return self._stack.enter_context(JsonLines(self.directory / name, resume_step=self.start or None))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, numbered by the steps done, with the step's seconds, its tokens per second and the peak memory; and the progress
        display."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        metrics = metrics | {"timing/step": seconds, "mem/peak_gib": peak_memory()}
        if "num_tokens" in metrics:
            metrics["tokens_per_s"] = metrics["num_tokens"] / seconds
        if self._skipped:
            metrics = metrics | {"skipped_updates": float(self._skipped)}
        self.last_metrics = self.metrics.log(step + 1, metrics)
        if self._progress is not None:
            self._progress.update(step + 1, self.last_metrics)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Completions of this step, into samples.jsonl."""
        for row in rows:
            self._samples.append({"step": step + 1, **row})

    def message(self, text: str) -> None:
        """A line on the terminal, where progress is shown."""
        if self.settings.progress:
            print(f"{self._title}: {text}", file=sys.stderr)

    def check_update(self, result: StepResult, of: str = "model") -> None:
        """Count skipped updates. Raises RuntimeError at the fifth in a row `of` one model."""
        self._skipped_in_a_row[of] = self._skipped_in_a_row[of] + 1 if not result.applied else 0
        self._skipped += int(not result.applied)
        if self._skipped_in_a_row[of] >= _MAX_SKIPPED:
            raise RuntimeError(f"{_MAX_SKIPPED} updates of the {of} in a row had a non-finite gradient norm; stopped. The weights are those of the last "
                               "finite update. Lower optim.lr, or resume from the last checkpoint with clipped scores (score_clip)")


def _trained(model: Model) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: not what LoRA froze, which is the initial model's."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _learners(model: Model, optimizer: Optimizer, critic: Learner | None) -> Iterator[tuple[str, str, Model, Optimizer]]:
    """What a checkpoint calls the weights and the optimizer's state, and whose they are."""
    yield "model", "optimizer", model, optimizer
    if critic is not None:
        yield "critic", "critic_optimizer", critic.model, critic.optimizer


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))


def peak_memory() -> float:
    """GiB: the most that torch held on the GPU, or that the process held on a CPU, so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def held_out(items: list[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): `fraction` of the items, drawn by `seed`, rounded to the nearest whole number; the order of the rest is kept.

    Raises:
        ConfigError: nothing is left to train on.
    """
    count = round(fraction * len(items))
    if count == len(items):
        raise ConfigError(f"eval_fraction = {fraction} holds out all of the {len(items)} examples and leaves none to train on; lower it or bring more data")
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return [x for i, x in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]

