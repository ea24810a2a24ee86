"""fusedrl runs, resume and export: what runs there are, how to go on with one, and how to hand its
model over."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.errors import ConfigError, no_such, resume_command
from fusedrl.engine.cli.common import CONFIGURATION, Parser, output_file, report_json
from fusedrl.engine.cli.devices import devices_of, start

if TYPE_CHECKING:
    from rich.table import Table

    from fusedrl.engine.runs.status import RunState


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommands. Parsed options run the command by `options.call(options)`; main reads
    the options of resume itself."""
    runs = commands.add_parser(
        "runs", help="the runs in a directory, how they stand, and how to go on", allow_abbrev=False
    )
    runs.set_defaults(call=_runs)
    runs.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        default="runs",
        help="where to look, three levels down (default: %(default)s)",
    )
    runs.add_argument(
        "--output-json",
        type=output_file,
        metavar="FILE",
        help='the same as JSON; "-" is standard output, without the table',
    )
    resume = commands.add_parser(
        "resume", help="go on with a run, from its own saved configuration", add_help=False
    )
    resume.add_argument("rest", nargs=argparse.REMAINDER)
    _export_options(commands)


# ---- runs ----------------------------------------------------------------------------------------
def _runs(options: argparse.Namespace) -> None:
    from fusedrl.engine.runs.status import find_runs

    if not Path(options.directory).is_dir():
        raise ConfigError(
            f"runs: expected a directory with runs in it, and {no_such(options.directory)}"
        )
    found = find_runs(options.directory)
    report_json(
        [_to_json(one) for one in found],
        options.output_json,
        lambda: _show(found, options.directory),
    )


def _show(found: Sequence[RunState], directory: str) -> None:
    from fusedrl.engine.base.tables import show

    if not found:
        print(f"{directory}: no runs are in it")
        return
    show(_table(found))
    for run in found:  # not in the table, which folds them: commands are copied
        print(_next(run))


def _next(run: RunState) -> str:
    """Return what to do next with a run: the command that goes on with it, or uses its model."""
    at = shlex.quote(str(run.directory))
    if run.state == "running" or not run.resumes:
        return f"fusedrl report {at}"
    return f"fusedrl export {at} DIR" if run.state == "finished" else resume_command(run.directory)


def _table(found: Sequence[RunState]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    for name in ("run", "stage", "state", "step", "last", "time", "changed"):
        table.add_column(name, justify="right" if name == "step" else "left")
    style = {"running": "cyan", "finished": "green", "failed": "red"}
    for run in found:
        state = Text(run.state, style=style.get(run.state, "yellow"))
        if run.message:
            state.append(f"\n{run.message[:200]}", style="dim")
        if not run.resumes:
            state.append("\nno checkpoint to go on from", style="dim")
        last = "" if run.score is None else f"{run.score[0]} {run.score[1]:.4g}"
        if run.best is not None:
            last += f"\nbest {run.best[0]} {run.best[2]:.4g} at step {run.best[1]}"
        table.add_row(
            Text(str(run.directory)),
            run.stage,
            state,
            f"{run.step}{f' of {run.total}' if run.total else ''}",
            Text(last),
            _span(run.seconds),
            _changed(run.directory),
        )
    return table


def _to_json(run: RunState) -> dict[str, Any]:
    return vars(run) | {"directory": str(run.directory), "next": _next(run)}


def _span(seconds: float) -> str:
    """Write a span of time in its two largest units."""
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} {int(seconds % size // part)}{small}"
    return f"{int(seconds // 60)}m {int(seconds % 60)}s" if seconds >= 60 else f"{seconds:.0f}s"


def _changed(directory: Path) -> str:
    times = [path.stat().st_mtime for path in directory.glob("*.json*")]
    return f"{_span(max(0.0, time.time() - max(times)))} ago" if times else ""


# ---- resume --------------------------------------------------------------------------------------
_RESUME_HELP = """usage: fusedrl resume RUN [--devices N] [--option value ...]

Goes on with the run in the directory RUN from its newest complete checkpoint, with the options
that it was started with, in the directory in which it was started, and on as many devices. Options
that do not change what was trained so far may be given anew, such as --steps, --run.save_minutes or
--evaluation.every. A run that has finished writes its model again. Under torchrun:
torchrun --nproc-per-node N -m fusedrl resume RUN."""


def run_resume(
    argv: Sequence[str],
    parse: Callable[..., Any],
    function: Callable[[str], Callable[[], Callable[[Any], Any]]],
) -> None:
    """Run `fusedrl resume` with these arguments.

    Args:
        parse: main's parse_config.
        function: function of a stage's name that returns what `devices.start` imports.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(_RESUME_HELP, file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else CONFIGURATION)
    stage, tree, given, status = resumed(argv)
    given, devices, place = devices_of(given)
    command = ["resume", str(Path(argv[0]).absolute()), *argv[1:]]
    with where_it_began(status):
        start(function(stage), parse(stage, given, tree=tree), command, argv[0], devices, place)


def resumed(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str], dict[str, Any]]:
    """Return what `fusedrl resume` goes on with: the stage, its saved options, the options given
    anew (with --devices as it was, and the run's directory if it was moved), and the run's status.

    Raises:
        ConfigError: the first argument is not the directory of a run.
    """
    from fusedrl.engine.runs.status import read_status, stage_name

    if not argv or argv[0].startswith("-"):
        raise ConfigError(
            "resume: expected the directory of a run, such as fusedrl resume runs/grpo; fusedrl "
            "runs lists them"
        )
    root = Path(argv[0])
    path = root / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"resume: expected the directory of a run, and "
            f"{f'{root} has no config.json of one' if root.is_dir() else no_such(root)}; fusedrl "
            "runs lists them"
        )
    try:
        saved = json.loads(path.read_bytes())
        stage = stage_name(saved)
        if stage is None:
            raise ConfigError(
                f"resume: {path} is the configuration of a model, and not of a run; fusedrl runs "
                "lists runs"
            )
        tree = dict(saved["config"])
        # these hold for one start
        tree["run"] = tree["run"] | {"restart": False, "accept_changes": False}
    except ConfigError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"resume: {path} cannot be read ({type(error).__name__}: {error}), so what the run "
            "was started with is not known, and it cannot go on; start anew in another --run.dir"
        ) from error
    status = read_status(root)
    rest = list(argv[1:])
    given = {word.partition("=")[0] for word in rest}
    devices = status.get("devices", 1)
    if not given & {"--devices", "--place"} and devices != 1 and not _launched():
        rest.append(f"--devices={devices}")
    began = Path(status.get("working_directory", "."))
    if (began / tree["run"]["dir"]).resolve() != root.resolve():  # it was moved
        rest.append(f"--run.dir={root.resolve()}")
    return stage, tree, [*rest, "--run.resume=true"], status


def _launched() -> bool:
    """Whether torchrun started this process, and the others of the run beside it."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def where_it_began(status: dict[str, Any]) -> Iterator[None]:
    """Work, within the block, in the directory in which a run was started, so that its relative
    paths lead where they led."""
    before, began = Path.cwd(), status.get("working_directory")
    if isinstance(began, str) and Path(began).is_dir():
        os.chdir(began)
    try:
        yield
    finally:
        os.chdir(before)


# ---- export --------------------------------------------------------------------------------------
def _export_options(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="a trained model as a directory to hand over: whole, as an adapter, or as GGUF",
        allow_abbrev=False,
    )
    export.set_defaults(call=_export)
    export.add_argument("source", metavar="RUN", help="a run directory, or a model's directory")
    export.add_argument("target", metavar="DIR", help="the directory to write; new or empty")
    export.add_argument(
        "--format",
        default="merged",
        choices=("merged", "adapter", "gguf"),
        help="merged: a whole model for transformers; adapter: the LoRA adapter, in PEFT's files; "
        "gguf: one file for llama.cpp (default: %(default)s)",
    )
    export.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: that of the model; float16 is for gguf alone (default: %(default)s)",
    )
    export.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help='the checkpoint of this step, or "best" (run.keep_best), in place of the end',
    )


def _step(text: str) -> int | str:
    if text == "best" or text.isdecimal():
        return text if text == "best" else int(text)
    raise argparse.ArgumentTypeError(f"expected the number of a step, or best, got {text!r}")


def _export(options: argparse.Namespace) -> None:
    from fusedrl.engine.tools.export import export

    path = export(
        options.source, options.target, kind=options.format, dtype=options.dtype, step=options.step
    )
    for file in sorted(path.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
