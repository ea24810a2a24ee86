"""One run directory: its lock, resolved configuration, metrics, samples, progress and checkpoints. What the three stages share.

    <run>/config.json          the resolved configuration
    <run>/metrics.jsonl        one line a step
    <run>/samples.jsonl        some completions of every step (policy runs)
    <run>/checkpoints/         complete, verified states to resume from
    <run>/model/               the result, loadable by transformers
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fusedrl.engine.checkpoint import ConfigError, RunLock, config_diff, config_to_dict, latest_checkpoint, save_checkpoint
from fusedrl.engine.config import PPOConfig, RewardModelConfig, SFTConfig
from fusedrl.engine.control import KLController
from fusedrl.engine.metrics import Metrics, Progress
from fusedrl.engine.optim import Optimizer, StepResult

T = TypeVar("T")
_MAX_SKIPPED = 5


class Model(Protocol):
    """What a run trains and saves."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def save_pretrained(self, directory: Path) -> None: ...


class Run(contextlib.AbstractContextManager["Run"]):
    """Open the run directory of a configuration; `total` steps (None: set `run.total` before `restore`).

    SIGINT and SIGTERM are honoured between steps: the state is saved and the process exits with 128 + the signal; a second one is immediate.

    Raises:
        ConfigError: the directory holds another run and `run.resume` is off, or a resumed run's configuration, model or data changed.
    """

    def __init__(self, config: SFTConfig | RewardModelConfig | PPOConfig, total: int | None) -> None:
        self.config, self.settings = config, config.run
        self.directory = Path(config.run.dir)
        self.total = total or 0
        self.start = 0
        self.last_metrics: dict[str, float] = {}
        self._skipped_in_a_row = 0
        self._skipped = 0
        self._signal: int | None = None
        self._saved_step: int | None = None
        self._parts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.directory)
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def _open(self) -> None:
        recorded = self.directory / "config.json"
        now = config_to_dict(self.config) | {"fingerprints": {"model": fingerprint(self.config.model), "data": fingerprint(self.config.data)}}
        if recorded.exists():
            if not self.settings.resume:
                raise ConfigError(f"{self.directory} already holds a run; pass --run.resume true to continue it, or another --run.dir")
            difference = config_diff(json.loads(recorded.read_text(encoding="utf-8")), now)
            if difference:
                raise ConfigError(f"{self.directory} cannot be resumed with another configuration; changed:\n" + "\n".join(difference))
        self._checkpoint = latest_checkpoint(self.directory) if self.settings.resume else None
        self.start = self._checkpoint.step if self._checkpoint else 0
        temporary = recorded.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        temporary.replace(recorded)
        self.metrics = Metrics(self.directory, resume_step=self.start)
        self.progress = Progress(self.total, enabled=self.settings.progress)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        self.metrics.close()
        self._lock.__exit__(kind, error, trace)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number
        print(f"fusedrl: {signal.Signals(number).name}: saving after this step; once more to stop at once", file=sys.stderr)

    # ---- state ----------------------------------------------------------------------------------------------------------
    def restore(self, *, model: Model, optimizer: Optimizer, kl: KLController | None = None) -> None:
        """Load the newest complete checkpoint into these objects, in place; nothing happens on a fresh run."""
        if self._checkpoint is None:
            return
        parameters = dict(model.named_parameters())
        saved = self._checkpoint.tensors["model"]
        if saved.keys() != parameters.keys():
            raise ConfigError(f"checkpoint of step {self.start}: expected tensors {sorted(parameters)}, got {sorted(saved)}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        optimizer.load_state_dict(self._checkpoint.tensors["optimizer"])
        if kl is not None:
            kl.coef = float(self._checkpoint.state["kl_coef"])
        self._skipped = int(self._checkpoint.state["skipped_updates"])
        torch.set_rng_state(self._checkpoint.tensors["rng"]["torch_cpu"])
        self._checkpoint = None
        where = f"continuing at step {self.start} of {self.total}" if self.start < self.total else f"finished already, at step {self.start}"
        self.progress.message(f"{self.directory}: {where}")

    def _save(self, step: int) -> None:
        if step == self._saved_step:
            return
        model, optimizer, kl = (self._parts.get(name) for name in ("model", "optimizer", "kl"))
        tensors: dict[str, dict[str, Tensor]] = {"model": {name: p.detach() for name, p in model.named_parameters()}, "optimizer": optimizer.state_dict(),
                                                 "rng": {"torch_cpu": torch.get_rng_state()}}
        state = {"skipped_updates": self._skipped} | ({"kl_coef": kl.coef} if kl is not None else {})
        save_checkpoint(self.directory, step, tensors, state, keep=self.settings.keep)
        self._saved_step = step

    def save_if_due(self, step: int, **parts: Any) -> None:
        """After step `step`: save where `save_every` says so, at the end, or because a signal asked for it (which ends the process)."""
        self._parts = parts
        done = step + 1
        if done == self.total or (self.settings.save_every and done % self.settings.save_every == 0) or self._signal is not None:
            self._save(done)
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def finish(self, model: Model, *extra: Any) -> str:
        """Write <run>/model and return its path."""
        target = self.directory / "model"
        model.save_pretrained(target, *extra)
        self.progress.message(f"saved {target}")
        return str(target)

    # ---- what is reported ---------------------------------------------------------------------------------------------------
    def time(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a part of the step into `timing/<name>`."""
        return self.metrics.time(name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the progress display."""
        if self._skipped:
            metrics = metrics | {"skipped_updates": float(self._skipped)}
        self.last_metrics = self.metrics.log(step, metrics)
        self.progress.update(step + 1, self.total, self.last_metrics)

    def samples(self, step: int, rows: list[dict]) -> None:
        """Append completions of this step to samples.jsonl."""
        self.metrics.append("samples.jsonl", step, rows)

    def note_dropped(self, what: str, count: int, total: int, reason: str) -> None:
        """Say how many examples are not used, and why; ConfigError when none is left."""
        if count:
            self.progress.message(f"dropped {count} of {total} {what} ({100 * count / total:.1f}%): {reason}")
        if count == total:
            raise ConfigError(f"all {total} {what} were dropped ({reason}); nothing is left to train on" if total else f"the data holds no {what}")

    def check_update(self, result: StepResult) -> None:
        """Count skipped updates. Raises RuntimeError at the fifth in a row."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        self._skipped += int(result.skipped)
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            raise RuntimeError(f"{_MAX_SKIPPED} updates in a row had a non-finite gradient norm; stopped. The weights are those of the last finite update. "
                               "Lower optim.lr, or resume from the last checkpoint with clipped scores (score_clip)")


def held_out(items: list[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): `fraction` of the items, drawn by `seed`, rounded to the nearest whole number; the order of the rest is kept."""
    count = round(fraction * len(items))
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return [x for i, x in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]


def fingerprint(path: str) -> str | None:
    """sha256 of a file, or of a directory's safetensors; None where there is nothing local."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(root.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
