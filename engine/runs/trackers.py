"""Weights & Biases, TensorBoard and Trackio as loggers, through their own clients.

Which server, project or mode they use is for their own settings (WANDB_PROJECT, WANDB_MODE,
TRACKIO_SPACE_ID, ...). A resumed run goes on where it was: its name there is kept in
<run>/loggers.json.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedrl.engine.base.errors import SetupError
from fusedrl.engine.runs.files import write_file
from fusedrl.engine.runs.loggers import RunInfo

PROJECT = "fusedrl"  # where the client's settings name none
_BINS = 64


def logged_in() -> Any:
    """Return the client of Weights & Biases. Raise SetupError if nobody is logged in and its mode
    is online."""
    import wandb

    online = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")
    if online and not wandb.login(prompt=False, verify=False):
        raise SetupError(
            "run.log wandb: nobody is logged in here; run `wandb login` first, or set "
            "WANDB_MODE=offline and `wandb sync` the run later, or leave it out"
        )
    return wandb


class WandB:
    """Logger of Weights & Biases (wandb). Its files go to <run>/wandb. Raise SetupError if nobody
    is logged in and its mode is online."""

    def __init__(self, info: RunInfo) -> None:
        wandb = logged_in()
        self._wandb: Any = wandb
        client = wandb.setup().settings
        self._run: Any = wandb.init(
            project=client.project or PROJECT,
            name=client.run_name or info.directory.name,
            id=client.run_id or _kept(info.directory, "wandb"),
            resume="allow",
            dir=str(info.directory),
            config=dict(info.config),
            settings=wandb.Settings(console="off"),  # lines that move are no log
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row. A step that the run has there already, since a resumed run repeats it, is
        left out."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log completions as a table."""
        self.log(step, {name: self._wandb.Table(columns=list(rows[0]), data=_cells(rows))})

    def histograms(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Log distributions."""
        made = {
            f"distribution/{name}": self._wandb.Histogram(np_histogram=np.histogram(x, _BINS))
            for name, x in columns.items()
        }
        self.log(step, made)

    def close(self, failed: bool) -> None:
        """Finish the run, and wait until it is sent."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Logger that writes TensorBoard's event files to <run>/tensorboard."""

    def __init__(self, info: RunInfo) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary: Any = Summary
        # events of steps that the run repeats are hidden
        self._writer: Any = SummaryWriter(
            str(info.directory / "tensorboard"),
            purge_step=info.start + 1 if info.start else None,
            flush_secs=10,
        )
        if not info.start:
            shown = json.dumps(dict(info.config), indent=1, default=str)
            self._writer.add_text("config", f"```\n{shown}\n```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row as one event."""
        made = [self._summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=made), step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write completions as a table in Markdown."""
        lines = [list(rows[0]), ["---"] * len(rows[0]), *_cells(rows)]
        escaped = [
            [str(x).replace("|", "\\|").replace("\n", "<br>") for x in line] for line in lines
        ]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in escaped), step)

    def histograms(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write distributions."""
        for name, x in columns.items():
            self._writer.add_histogram(f"distribution/{name}", x, step, bins="auto")

    def close(self, failed: bool) -> None:
        """Write what is left and close the file."""
        self._writer.close()


class Trackio:
    """Logger of Trackio, which keeps its runs on this machine unless its settings name a place."""

    def __init__(self, info: RunInfo) -> None:
        import trackio

        self._trackio: Any = trackio
        name = f"{info.directory.name}-{_kept(info.directory, 'trackio')}"
        self._run: Any = trackio.init(
            project=PROJECT,
            name=name,
            config={key: str(value) for key, value in info.config.items()},
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row. Trackio keeps the row of a repeated step beside the first."""
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log completions as a table."""
        self.log(step, {name: self._trackio.Table(columns=list(rows[0]), data=_cells(rows))})

    def histograms(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Log distributions."""
        made: dict[str, Any] = {
            f"distribution/{name}": self._trackio.Histogram(x, num_bins=_BINS)
            for name, x in columns.items()
        }
        self.log(step, made)

    def close(self, failed: bool) -> None:
        """Finish the run, and wait until it is written."""
        self._run.finish()


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the values of a table; those that are neither text nor number are written as JSON."""
    plain = (str, int, float, type(None))
    return [[x if isinstance(x, plain) else json.dumps(x) for x in row.values()] for row in rows]


def _kept(directory: Path, client: str) -> str:
    """Return a run's name at a client: the one in <run>/loggers.json, or a new one, which is
    written there."""
    path = directory / "loggers.json"
    known = json.loads(path.read_bytes()) if path.is_file() else {}
    if client not in known:
        known[client] = secrets.token_hex(4)
        write_file(path, (json.dumps(known) + "\n").encode())
    return str(known[client])
