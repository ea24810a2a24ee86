"""Run directories as they are on the disk: metrics, configuration, samples, alarms, calibration.

Whatever is missing or broken is left out and said in `RunRecord.notes`; a run that is still going
on is read again from where the last look ended.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrl.engine.base.errors import ConfigError, no_such
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.runs.files import flat, is_locked
from fusedrl.engine.runs.status import read_status
from fusedrl.engine.watch.alarm import Evidence, message

FILES = ("metrics.jsonl", "config.json", "samples_eval.jsonl")  # a run has at least one of them
RESULTS = ("model", "adapter")  # what a run leaves when it has ended well
UNEQUAL = ("run.dir", "run.resume", "run.progress")  # options that say nothing of a run
STAGES = {
    "SFTConfig": "supervised fine-tuning",
    "RewardModelConfig": "a reward model",
    "DPOConfig": "direct preference optimisation",
    "KTOConfig": "Kahneman-Tversky optimisation",
    "RejectionConfig": "rejection sampling",
}


@dataclass(frozen=True, eq=False)
class Series:
    """Values of one metric over the steps, which rise; NaN where a value was not finite."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def finite(self) -> NDArray[np.float64]:
        """The values that are finite."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Sample:
    """Completion of a held-out prompt after a step; scores that do not apply are None."""

    step: int
    prompt: str
    completion: str
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Alarm:
    """Alarm of a step: the metrics that are its evidence, and a message in words."""

    step: int
    metrics: tuple[str, ...]
    text: str


@dataclass(eq=False)
class RunRecord:
    """Contents of a run directory.

    Attributes:
        name: the directory's name, with as many of its parents as tell it from the other runs.
        kind, stage: the class of its configuration, and the method in words; "" if not known.
        config: options under dotted names, or None without a readable config.json.
        series: the metrics by name.
        calibration: the report of a reward model, as report.json holds it, or None.
        status: "running", "finished", "failed" or "stopped".
        steps, total: steps done, and steps to do where the configuration says how many.
        notes: what is missing or could not be read.
    """

    directory: Path
    name: str
    kind: str = ""
    stage: str = ""
    config: dict[str, Any] | None = None
    series: dict[str, Series] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    status: str = "stopped"
    total: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max((int(one.steps[-1]) for one in self.series.values()), default=0)

    @property
    def seconds(self) -> float:
        """Seconds that the steps took."""
        found = self.series.get("timing/step")
        return 0.0 if found is None else float(found.finite.sum())


class RunFiles:
    """Reader of one run directory. Each `read` parses only what was appended since the last.

    Raises:
        ConfigError: the path is no run directory.
    """

    def __init__(self, directory: str | Path, name: str | None = None) -> None:
        self.directory = Path(directory)
        _check(self.directory)
        self.name = name or self.directory.resolve().name
        self._metrics = _Lines(self.directory / "metrics.jsonl")
        self._samples = _Lines(self.directory / "samples_eval.jsonl")
        self._alarms = _Lines(self.directory / "alarms.jsonl")
        self._series: dict[str, tuple[array[float], array[float]]] = {}
        self._shown: list[Sample] = []
        self._alarmed: list[Alarm] = []
        self._no_numbers = 0

    def read(self) -> RunRecord:
        """Return what the directory holds now."""
        run = RunRecord(self.directory, self.name)
        run.status = (
            "running"
            if is_locked(self.directory)
            else "finished"
            if any((self.directory / name).exists() for name in RESULTS)
            else "stopped"
        )
        said = read_status(self.directory)
        if run.status == "stopped" and said.get("state") == "failed":
            run.status = "failed"
            run.notes.append(f"it failed: {said.get('message', 'status.json does not say why')}")
        self._configure(run)
        self._read_metrics(run)
        self._read_samples(run)
        self._read_alarms(run)
        run.calibration = _calibration(self.directory / "report.json", run.notes)
        return run

    def _configure(self, run: RunRecord) -> None:
        found = _object(self.directory / "config.json", run.notes)
        if found is None or not isinstance(found.get("config"), dict):
            run.notes.append("no readable config.json, so that the options are not known")
            return
        run.config = flat(found["config"])
        run.kind = str(found.get("stage", ""))
        algorithm = str(run.config.get("algorithm", ""))
        run.stage = (
            ALGORITHMS[algorithm].title if algorithm in ALGORITHMS else STAGES.get(run.kind, "")
        )
        steps = run.config.get("steps")
        run.total = steps if isinstance(steps, int) else None

    def _read_metrics(self, run: RunRecord) -> None:
        anew, rows = self._metrics.read()
        if anew:
            self._series.clear()
            self._no_numbers = 0
        for row in rows:
            step = row.pop("step")
            for name, value in row.items():
                if value is None:
                    value = np.nan
                elif type(value) is not float and type(value) is not int:
                    self._no_numbers += 1
                    continue
                pair = self._series.get(name)
                if pair is None:
                    pair = self._series[name] = (array("d"), array("d"))
                pair[0].append(step)
                try:
                    pair[1].append(value)
                except OverflowError:  # a whole number beyond float64
                    pair[1].append(np.nan)
        self._metrics.note(run.notes, "no metrics yet")
        run.series = {name: _series(*pair) for name, pair in self._series.items()}
        holes = sum(len(one.values) - len(one.finite) for one in run.series.values())
        if holes:
            run.notes.append(f"{_several(holes, 'value')} not finite: gaps in the curves")
        if self._no_numbers:
            run.notes.append(f"{_several(self._no_numbers, 'value')} no numbers and left out")
        if missing := _missing(run):
            run.notes.append(f"metrics.jsonl: {missing}")

    def _read_samples(self, run: RunRecord) -> None:
        anew, rows = self._samples.read()
        if anew:
            self._shown.clear()
        for row in rows:
            try:
                scores = {str(name): _number(value) for name, value in row["scores"].items()}
                prompt, completion = _prompt(row["prompt"]), row["completion"]
                if not isinstance(completion, str):
                    raise TypeError
                self._shown.append(Sample(int(row["step"]), prompt, completion, scores))
            except (AttributeError, KeyError, TypeError, ValueError, IndexError):
                self._samples.broken += 1
        if self._samples.broken:
            self._samples.note(run.notes, "")
        run.samples = list(self._shown)

    def _read_alarms(self, run: RunRecord) -> None:
        anew, rows = self._alarms.read()
        if anew:
            self._alarmed.clear()
        for row in rows:
            try:
                evidence = [Evidence(**one) for one in row["evidence"]]
                step = int(row["step"])
                self._alarmed.append(
                    Alarm(step, tuple(e.metric for e in evidence), message(step, evidence))
                )
            except (KeyError, TypeError, ValueError):
                self._alarms.broken += 1
        if self._alarms.broken:
            self._alarms.note(run.notes, "")
        run.alarms = list(self._alarmed)


def open_runs(directories: Sequence[str | Path]) -> list[RunFiles]:
    """Open several run directories under names that tell them apart. A directory that is given
    twice is opened once.

    Raises:
        ConfigError: one of them is no run directory.
    """
    unique = list({Path(path).resolve(): Path(path) for path in directories}.items())
    return [
        RunFiles(path, _name(whole, [other for other, _ in unique if other != whole]))
        for whole, path in unique
    ]


def _name(path: Path, others: Sequence[Path]) -> str:
    for depth in range(1, len(path.parts) + 1):
        if all(path.parts[-depth:] != other.parts[-depth:] for other in others):
            break
    return "/".join(path.parts[-depth:])


def config_differences(runs: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """Return the options that differ between the runs: their names, and a value for each run as
    JSON text, None where the run has no such option.

    It is no difference where a run writes, nor that another stage has no such option.
    """
    found = {}
    names = dict.fromkeys(name for run in runs for name in run.config or ())
    for name in names:
        having = [run for run in runs if name in (run.config or ())]
        values = {json.dumps((run.config or {})[name]) for run in having}
        kinds = {run.kind for run in having}
        lacking = any(run.kind in kinds and run.config and run not in having for run in runs)
        if any(other.startswith(f"{name}.") for other in names):  # null where its parts are not set
            continue
        if name not in UNEQUAL and (len(values) > 1 or lacking):
            found[name] = [
                json.dumps(run.config[name], ensure_ascii=False)
                if run.config is not None and name in run.config
                else None
                for run in runs
            ]
    return found


# ---- files that may be half there ----------------------------------------------------------------
class _Lines:
    """A file of JSON lines that grows.

    broken: lines so far that are no JSON object with a step, or not of the expected form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken, self.torn, self.there = 0, False, False
        self._inode, self._at = -1, 0

    def read(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Return whether the file is another one than at the last call, or was cut; and its rows
        since then."""
        try:
            status = os.stat(self.path)
            self.there = True
        except OSError:
            self.there, anew = False, self._at > 0
            self._at, self._inode = 0, -1
            return anew, iter(())
        anew = status.st_ino != self._inode or status.st_size < self._at
        if anew:
            self._at, self.broken, self._inode = 0, 0, status.st_ino
        return anew, self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        self.torn = False
        with open(self.path, "rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    self.torn = True
                    return
                self._at += len(line)
                try:
                    row = json.loads(line)
                    step = float(row["step"])
                    if not abs(step) < 2**53 or isinstance(row["step"], bool | str):
                        raise ValueError
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    self.broken += 1
                    continue
                yield row

    def note(self, notes: list[str], empty: str) -> None:
        """Add what is wrong with the file."""
        name = self.path.name
        if not self.there:
            notes.append(f"no {name}")
        elif self._at == 0 and not self.broken and empty:
            notes.append(f"{name}: {empty}")
        if self.broken:
            notes.append(f"{name}: {_several(self.broken, 'line')} not readable and left out")
        if self.torn:
            notes.append(f"{name}: the last line is torn and left out")


def _several(count: int, thing: str) -> str:
    return f"{count:,} {thing}{' is' if count == 1 else 's are'}"


def _missing(run: RunRecord) -> str:
    """Say which steps between the first and the last have no metrics; "" if all have."""
    found = max((one.steps for one in run.series.values()), key=len, default=np.zeros(0))
    holes = np.flatnonzero(np.diff(found) > 1)
    if not len(holes):
        return ""
    count = int((np.diff(found)[holes] - 1).sum())
    first, last = int(found[holes[0]]) + 1, int(found[holes[0] + 1]) - 1
    which = f"step {first}" if first == last else f"steps {first:,} to {last:,}"
    more = f", and {count - (last - first + 1):,} more" if len(holes) > 1 else ""
    return f"{which}{more} missing; the curves run across"


def _series(steps: array[float], values: array[float]) -> Series:
    x, y = np.array(steps), np.array(values)
    y[~np.isfinite(y)] = np.nan
    if len(x) > 1 and not (np.diff(x) > 0).all():  # of a step that was written twice, the last line
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        kept = np.append(x[1:] != x[:-1], True)
        x, y = x[kept], y[kept]
    return Series(x, y)


def _object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file; None, with a note, if there is something else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name}: expected a JSON object, got {type(found).__name__}")
    return None


def _calibration(path: Path, notes: list[str]) -> dict[str, Any] | None:
    found = _object(path, notes)
    if found is None:
        return None
    bins = found.get("bins")
    whole = isinstance(bins, list) and all(
        isinstance(one, dict)
        and None not in [_number(one.get(key)) for key in ("weight", "predicted", "observed")]
        for one in bins
    )
    if not whole:
        notes.append(f"{path.name}: expected the report of a reward model, with its bins")
        return None
    return found


def _number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if np.isfinite(float(value)) else None
    except OverflowError:
        return None


def _prompt(prompt: Any) -> str:
    """Return the text of a prompt; of messages, each behind its role where there are several."""
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        raise ValueError("no messages")
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(
            "expected the directory of a run, and "
            f"{f'{directory} is a file' if directory.exists() else no_such(directory)}"
        )
    run = directory.resolve().parent
    if not (directory / "metrics.jsonl").is_file() and (run / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{directory}: expected a run directory; the run that it belongs to is "
            f"{directory.parent}"
        )
    if any((directory / name).is_file() for name in FILES):
        return
    inside = sorted(
        str(path)
        for path in directory.iterdir()
        if path.is_dir() and any((path / name).is_file() for name in FILES)
    )
    hint = f"; runs there: {', '.join(inside[:8])}" if inside else "; name what was --run.dir"
    raise ConfigError(f"{directory}: expected a run directory with one of {', '.join(FILES)}{hint}")
