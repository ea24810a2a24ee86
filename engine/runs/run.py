"""One run directory: its lock, resolved configuration, metrics, samples, progress and checkpoints.
All five stages use it.

<run>/config.json          the resolved configuration
<run>/metrics.jsonl        one line a step
<run>/samples.jsonl        some completions of every step (policy runs)
<run>/alarms.jsonl, samples_eval.jsonl   what watches a policy run (watch/monitor.py)
<run>/changes.jsonl        what changed between one start and the next (run.accept_changes)
<run>/status.json          running, finished, interrupted or failed, and of how many steps
<run>/checkpoints/         complete, verified states to resume from
<run>/model/               the result, loadable by transformers
"""

from __future__ import annotations

import contextlib
import math
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.base.errors import (
    ConfigError,
    Stopped,
    as_machine_fault,
    device_failed,
    resume_command,
)
from fusedrl.engine.config.base import StageConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.ranks import ALONE, Ranks, versions
from fusedrl.engine.runs.cautions import Cautions
from fusedrl.engine.runs.checkpoint import (
    Checkpoint,
    RunDirectory,
    config_to_dict,
    identity,
    read_checkpoint,
    saved_steps,
)
from fusedrl.engine.runs.columns import columns_of
from fusedrl.engine.runs.facts import dtype_of, facts_of
from fusedrl.engine.runs.files import check_held, flat
from fusedrl.engine.runs.loggers import TABLES_EVERY, Reporter, RunInfo
from fusedrl.engine.runs.metrics import JsonLines, Metrics, Written, read_rows
from fusedrl.engine.runs.peaks import Peaks
from fusedrl.engine.runs.saving import Parts, Saver
from fusedrl.engine.runs.status import write_status
from fusedrl.engine.runs.terminal import Progress, say

T = TypeVar("T")
# that goes on with a run; the command line sets it
RESUME_COMMAND: ContextVar[str | None] = ContextVar("resume_command", default=None)


class Run(contextlib.AbstractContextManager["Run"]):
    """Open the run directory of a configuration for a run of `total` steps. If `total` is None, set
    `run.total` before `restore`.

    SIGINT, SIGTERM, SIGHUP and the signals in `run.signals` end the run with exit code 128 + the
    signal, unless they were ignored before the run began (nohup). The first signal saves the last
    completed step at once, lets the current step end, and saves that as well. The second does not
    wait for the current step; but if the last completed step is not on the disk yet, it waits for
    the update in progress. The third ends the run immediately. Whatever else ends the run, the last
    completed step is saved first if it is still intact in memory (saving.py), and a message says
    where to continue from.

    With several ranks, only the first writes files and messages. The ranks save together, so a
    signal waits for the end of the step, and an error on one rank ends all of them.

    Raises:
        ConfigError: the directory holds another run and `run.resume` is off; or a resumed run's
            configuration, model or data changed; or the ranks were started with different ones.
        RuntimeError: something called sys.exit within the run.
    """

    def __init__(self, config: StageConfig, total: int | None, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.settings = config.run
        self.total, self.start = total or 0, 0
        self.last_metrics: dict[str, float] = {}
        self._config = config
        self._title = config.title
        self._skipped_before = 0  # updates that this run skipped in earlier processes
        self._parts: Parts | None = None
        self._signals, self._leaving = 0, False
        self._exit: int | None = None
        self.activity = Activity()
        self._progress: Progress | None = None
        self._cautions: Cautions | None = None
        self._reporter: Reporter | None = None
        self._tokens = 0.0  # of all steps
        self._peaks = Peaks()
        self._saver: Saver | None = None
        self._lines: dict[str, JsonLines] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._open()
            self._write_status("running")
            stack.push(self._never_began)
            self.start = self._checkpoint.step if self._checkpoint else 0
            if not self.ranks.first:
                self.ranks.meet("the files of the run")  # wait until the first rank has cut them
            self.metrics = stack.enter_context(
                Metrics(self.directory, resume_step=self.start or None, write=self.ranks.first)
            )
            self._lines["metrics.jsonl"] = self.metrics.lines
            self._samples = self.lines("samples.jsonl")
            if self.ranks.first:
                self.ranks.meet("the files of the run")
            self.last_metrics = self.metrics.last()
            self._tokens = self.last_metrics.get("num_tokens", 0.0)
            if threading.current_thread() is threading.main_thread():
                for name in dict.fromkeys(
                    ("SIGINT", "SIGTERM", "SIGHUP", *self.settings.signal_names)
                ):
                    if (before := signal.getsignal(number := signal.Signals[name])) not in (
                        signal.SIG_IGN,
                        None,
                    ):  # None: set outside Python
                        stack.callback(signal.signal, number, before)
                        signal.signal(number, self._on_signal)
            self._stack = stack.pop_all()
        return self

    def _never_began(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Say how a run stands that ended before its first step; else `__exit__` does."""
        if error is not None and not self._leaving:
            self._write_status(*_ended(error))

    def _open(self) -> None:
        """Open the directory on the first rank, and find the checkpoint to continue from."""
        ranks, self.directory = self.ranks, Path(self.settings.dir)
        if ranks.size > 1:
            ranks.same("run", flat(identity(self._config)) | versions())
        owned = self._stack.enter_context(RunDirectory(self._config)) if ranks.first else None
        self._checkpoint = None if owned is None else owned.checkpoint
        for note in () if owned is None else owned.notes:
            self.message(note)
        if ranks.size == 1:
            return
        step = None if self._checkpoint is None else self._checkpoint.step
        path = None if self._checkpoint is None else str(self._checkpoint.path)
        step, path = ranks.gather("checkpoint to go on from", [step, path])[0]
        if path is not None and not ranks.first:
            self._checkpoint = read_checkpoint(
                Path(path), step, [file.name for file in Path(path).iterdir()]
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        phase = self.activity.phase
        where = f"in {phase}" if phase else ""
        told = None if error is None else as_machine_fault(error, where)
        if isinstance(told, Exception) and self._saver is None and self._exit is not None:
            told = Stopped(self._exit)  # what a library made of the signal while it was imported
        self._leaving = True
        try:
            together = told is None or self.ranks.fail(told)
            if told is not None and self._saver is not None:
                self._leave(self._saver, told, together, device_failed(error))
            elif self._saver is not None:
                self._tell_best(self._saver)
        finally:
            self._write_status(*_ended(told))
            self._stack.__exit__(kind, error, trace)
        if told is not None and told is not error:
            raise told from error
        if isinstance(error, SystemExit) and not isinstance(error, Stopped):
            raise RuntimeError(
                f"{self._title}: something that the run called ended the process with "
                f"sys.exit({error.code!r}); a function given to a run "
                "raises an exception where it cannot go on"
            ) from error

    def _write_status(self, state: str, message: str = "") -> None:
        """Write how the run stands, for `fusedrl runs` and `fusedrl resume`."""
        if not self.ranks.first:
            return
        best = None if self._saver is None else self._saver.best
        with contextlib.suppress(OSError):  # no reason to end a run, or to hide why it ends
            write_status(
                self.directory,
                {
                    "state": state,
                    "total": max(self.total, self.start) if self.total else None,
                    "devices": self.ranks.size,
                    "working_directory": str(Path.cwd()),
                    "best": [best.name, best.step, best.value] if best and best.step else None,
                    "message": message,
                },
            )

    def _tell_best(self, saver: Saver) -> None:
        """Name the best checkpoint at the end of the run."""
        best = saver.best
        if best.name and best.step is None:
            self.message(f"no step reported {best.name}, so that no best checkpoint was kept")
        elif best.step is not None:
            self.message(
                f"the best {best.name}, {best.value:.4g}, is that of step {best.step}, in "
                f"{saved_steps(self.directory).get(best.step, 'no checkpoint')}; fusedrl export "
                f"{self.directory} DIR --step {best.step} makes a model of it"
            )

    # ---- how a run ends before its end -----------------------------------------------------------
    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        name, saver = signal.Signals(number).name, self._saver
        if self._leaving and self.ranks.size > 1:  # the others wait for this rank
            return
        self._exit = 128 + number if self._exit is None else self._exit
        if saver is None:  # nothing was trained yet
            return self.ranks.interrupt(Stopped(self._exit))
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._signals == 1:
            self._say(
                f"fusedrl: {name}: the run stops when this step is complete and saved; once more "
                "to stop before"
            )
            alone = self.ranks.size == 1
            if alone and not (saver.safe or saver.saving or capturing) and saver.whole:
                self._save(saver)
        elif self._signals > 2 or (not saver.saving and (saver.safe or saver.whole)):
            self.ranks.interrupt(Stopped(self._exit))
        else:
            self._say(
                f"fusedrl: {name}: the run stops when this update is complete and saved; once more "
                "to stop at once, and lose what was not saved"
            )

    def _leave(self, saver: Saver, error: BaseException, together: bool, broken: bool) -> None:
        """Save the last completed step if possible, and say what was saved and where. Never hides
        `error`.

        Args:
            together: whether all ranks can still save together.
            broken: whether the device failed, so that what it holds must not reach a checkpoint.
        """
        problem = ""
        if not together:
            problem = "the ranks are not together any more, so that nothing more is saved. "
        elif all(self._of_all(not broken and not saver.safe and saver.whole)):
            try:
                saver.save()
            except Exception as failed:
                self.ranks.told = False
                self.ranks.fail(failed)
                problem = (
                    f"saving the last completed step, {saver.step}, failed "
                    f"({type(failed).__name__}: {failed}). "
                )
        elif not saver.safe:
            problem = f"the last completed step, {saver.step}, is not saved: " + (
                "the device failed. "
                if broken
                else "saving it failed. "
                if saver.failed
                else "the weights have begun to change since. "
            )
        if saver.saved is None:
            kept = "nothing is saved" + (": no step was completed" if saver.step == 0 else "")
        else:
            kept = f"step {saver.saved[0]} is in {saver.saved[1]}; {self._how_to_go_on()}"
        self._say(f"fusedrl: {problem}{kept}")
        error.add_note(f"{problem}{kept}")

    def _of_all(self, value: bool) -> list[bool]:
        """Return the value on each rank, or [False] if a rank is gone."""
        try:
            return self.ranks.gather("what may be saved", value)
        except Exception:
            return [False]

    def _say(self, text: str) -> None:
        if self.ranks.first:
            say(text)

    def _how_to_go_on(self) -> str:
        return f"go on with: {RESUME_COMMAND.get() or resume_command(self.directory)}"

    # ---- state -----------------------------------------------------------------------------------
    def restore(self, **parts: Any) -> None:
        """Load the newest complete checkpoint into these objects (`saving.Parts`), in place. In a
        new run nothing is loaded. From now on, checkpoints are made of these objects."""
        found, checkpoint = Parts(**parts), self._checkpoint
        self._parts = found
        if checkpoint is not None:
            found.load(checkpoint)
            self._skipped_before = int(checkpoint.state["skipped_updates"])
            self._tell_lost(checkpoint)
        self._saver, self._checkpoint = (
            Saver(
                self.directory,
                self.settings,
                found,
                checkpoint,
                self._skipped,
                self.ranks,
                self._sync,
            ),
            None,
        )
        if self.ranks.first:
            saved = saved_steps(self.directory)
            self._saver.best.recall(read_rows(self.directory / "metrics.jsonl"), saved)
        self._write_status("running")
        if checkpoint is None and self.settings.resume:
            self.message(f"{self.directory}: nothing to resume here, beginning at step 1")
        if checkpoint is not None:
            where = (
                f"continuing after step {self.start} of {self.total}"
                if self.start < self.total
                else f"finished already, at step {self.start}"
            )
            self.message(f"{self.directory}: {where}")
        self._show(found.model)
        self._step_began = time.perf_counter()

    def _sync(self, step: int) -> dict[str, Written]:
        """Flush all files of lines to the disk; return what is in them up to a step."""
        return {name: lines.sync(step) for name, lines in self._lines.items()}

    def _tell_lost(self, checkpoint: Checkpoint) -> None:
        """Say which files of lines have lost some that were written before the checkpoint."""
        for name, saved in checkpoint.state.get("lines", {}).items():
            there = self._lines[name] if name in self._lines else self.lines(name)
            found = there.written(checkpoint.step)
            if self.ranks.first and found != saved:
                self.message(
                    f"{there.path}: expected {saved['lines']} lines up to step {saved['last']}, "
                    f"as when step {checkpoint.step} was saved, got {found['lines']} up to step "
                    f"{found['last']}; they were lost or edited since. Training goes on from the "
                    "checkpoint as before"
                )

    def _show(self, learner: Learner) -> None:
        """Begin to show the run, which trains the model of this learner."""
        self.activity, first = learner.activity, self.ranks.first
        if first:
            self._cautions = Cautions(self._config, dtype_of(learner))
            for row in read_rows(self.directory / "metrics.jsonl"):  # a resumed run's
                self._cautions.update(row)
        shown = Progress(
            self.total,
            self.settings.progress and first,
            start=self.start,
            title=self._title,
            columns=columns_of(self._config),
            names=self.settings.column_names,
            activity=self.activity,
        )
        finished = bool(self.total) and self.start >= self.total
        if self.settings.progress and first and not finished:
            shown.header(facts_of(self._config, learner, self.ranks, self.start, self.total))
        if self.settings.loggers and first:
            of = flat(config_to_dict(self._config))
            info = RunInfo(self.directory, self._title, of, self.start, self.total)
            self._reporter = self._stack.enter_context(
                Reporter(self.settings.loggers, info, self.message)
            )
        self._progress = self._stack.enter_context(shown)

    @property
    def _skipped(self) -> int:
        return self._skipped_before + (0 if self._parts is None else self._parts.skipped)

    def steps(
        self, train: Mixture[T], per_step: int, epochs: int, **parts: Any
    ) -> Iterator[tuple[int, list[T]]]:
        """Yield the steps of `epochs` passes over `train`: the number of each step and its
        `per_step` examples; the last step has those that are left. The order depends only on the
        seed. `parts` are restored before the first step, and each completed step is saved when a
        save is due."""
        end = len(train) * epochs
        self.total = math.ceil(end / per_step)
        self.restore(**parts)
        for step in range(self.start, self.total):
            first = step * per_step
            yield step, train.draw(self.settings.seed, first, min(first + per_step, end))
            self.save_if_due(step)

    def _save(self, saver: Saver) -> None:
        first = saver.saved is None
        began = time.perf_counter()
        before = self.activity.enter("save")
        path = saver.save()
        self.activity.enter(before)
        self._step_began += time.perf_counter() - began  # saving does not count as the step's time
        self.message(f"saved {path}" + (f"; {self._how_to_go_on()}" if first else ""))

    def save_if_due(self, step: int) -> None:
        """Save after step `step` if it is time to, if it is the last step, or if a signal or `stop`
        asked for it. In the latter case, end the process afterwards."""
        saver = self._saver
        if saver is None:
            raise RuntimeError("run: expected restore before the first step")
        saver.complete(step + 1, self._skipped)
        # a signal may reach a single rank, and only the first rank's clock counts
        told = self.ranks.gather("the end of a step", [self._exit, saver.due()])
        agreed = next((code for code, _ in told if code is not None), None)

        def code() -> int | None:
            """Return the code to stop with. Of several ranks, a signal that came since they told
            one another waits for the end of the next step."""
            return self._exit if self.ranks.size == 1 else agreed

        if saver.step == self.total or told[0][1] or code() is not None:
            self._save(saver)
        if (stopped := code()) is not None:
            raise Stopped(stopped)

    def stop(self, code: int) -> None:
        """End the process with this exit code once the step is saved. If a signal came before, its
        exit code is used instead."""
        self._exit = code if self._exit is None else self._exit

    def finish(self, save: Callable[[Path], None]) -> str:
        """Write <run>/model and return its path."""
        target = self.directory / "model"
        self.write("model", save)
        self.message(f"saved {target}")
        return str(target)

    def write(self, name: str, save: Callable[[Path], None]) -> None:
        """Let `save` write <run>/name on the first rank, while the other ranks wait."""

        def write() -> None:
            check_held(self.directory)
            save(self.directory / name)

        self.ranks.once(f"writing {name}", write)

    def rejects(self, name: str = "rejects.jsonl") -> Path | None:
        """Return the path of the file for malformed lines of data, or None on ranks that write
        nothing."""
        return self.directory / name if self.ranks.first else None

    # ---- what is reported ------------------------------------------------------------------------
    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measure a part of the step, its seconds as `timing/<name>` and its peak memory as
        `mem/<name>_gib`, and show that it is in progress."""
        before = self.activity.enter(name)
        self._peaks.enter()
        with self.metrics.time(name), self.ranks.working(name):
            yield
        self._peaks.leave(name)
        self.activity.enter(before)

    @contextlib.contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Time work that is not part of the step as `timing/<name>`. Its seconds count neither in
        `timing/step` nor in `tokens_per_s`."""
        began = time.perf_counter()
        with self.time(name):
            yield
        self._step_began += time.perf_counter() - began

    def lines(self, name: str) -> JsonLines:
        """Open another file of JSON lines in the run directory. When the run resumes, lines after
        the checkpoint are removed, as in metrics.jsonl."""
        if name not in self._lines:
            file = JsonLines(
                self.directory / name, resume_step=self.start or None, write=self.ranks.first
            )
            self._lines[name] = self._stack.enter_context(file)
        return self._lines[name]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, and update the progress display. The line is numbered by
        the steps done, and includes the step's seconds, its tokens per second and the peak
        memory."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        memory = self._peaks.take() | {"mem/peak_gib": max(self._peaks.most, peak_memory())}
        metrics = metrics | {"timing/step": seconds} | memory
        if "step_tokens" in metrics:
            metrics["tokens_per_s"] = metrics["step_tokens"] / seconds
            self._tokens += metrics["step_tokens"]
            metrics["num_tokens"] = self._tokens
        metrics |= self.ranks.metrics()
        if self._skipped:
            metrics = metrics | {"skipped_updates": float(self._skipped)}
        if self._saver is not None and self._saver.best.step is None:
            self._saver.best.check(metrics.keys())
        self.record(step + 1, metrics)
        if self._saver is not None:
            self._saver.best.offer(step + 1, self.last_metrics)

    def record(self, done: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics.jsonl for `done` steps, show it, and say what it gives cause to.
        Line 0 is an evaluation before the first step."""
        self.last_metrics = self.metrics.log(done, metrics)
        if self._progress is not None:
            self._progress.update(done, self.last_metrics)
        if self._reporter is not None:
            self._reporter.log(done, self.last_metrics)
        for said in () if self._cautions is None else self._cautions.update(self.last_metrics):
            self.message(f"step {done}: {said}")

    def samples(
        self, step: int, rows: list[dict], *columns: Callable[[], dict[str, np.ndarray]]
    ) -> None:
        """Append completions of this step to samples.jsonl. Now and then, hand them to the loggers
        as well, with histograms of `columns`: functions that return numbers of all completions or
        tokens by name."""
        done = step + 1
        for row in rows:
            self._samples.append({"step": done, **row})
        evaluated = any(name.startswith("eval_") for name in self.last_metrics)
        due = evaluated or done % TABLES_EVERY == 0 or done in (1, self.total)
        if due and self._reporter:
            self.table(done, "samples", rows)
            found = [column() for column in columns]
            self._reporter.histograms(done, {k: x for one in found for k, x in one.items()})

    def table(self, done: int, name: str, rows: list[dict]) -> None:
        """Hand completions of a step to the loggers."""
        if rows and self._reporter:
            self._reporter.table(done, name, rows)

    def message(self, text: str) -> None:
        """Print a line on standard error, for information that a person should see even if progress
        is hidden."""
        self._say(f"{self._title}: {text}")


def _ended(error: BaseException | None) -> tuple[str, str]:
    """Return how a run ended, as (state, message)."""
    if error is None:
        return "finished", ""
    if isinstance(error, Stopped) and isinstance(error.code, int) and error.code < 128:
        return "failed", "stopped by the reward-hacking alarm"
    if isinstance(error, KeyboardInterrupt | Stopped):  # 128 + the number of a signal
        return "interrupted", ""
    return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"


def peak_memory() -> float:
    """Return the peak memory in GiB, of torch on the GPU or of the process on a CPU: so far, or
    since `Peaks` has set the mark back."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS gives bytes, other systems KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def held_out(items: list[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split the items into (train, held out). The seed decides which items are held out; their
    number is `fraction` of all, rounded to the nearest whole number. The rest keeps its order.

    Raises:
        ConfigError: nothing is left to train on.
    """
    count = round(fraction * len(items))
    if count == len(items):
        raise ConfigError(
            f"eval_fraction = {fraction} holds out all of the {len(items)} examples and leaves "
            "none to train on; lower it or bring more data"
        )
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return [x for i, x in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]
