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
from fusedrl.engine.cli.devices import devices_of, launched, start
from fusedrl.engine.cli.early import check_models

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
        there = Path(options.directory).exists()
        why = f"{options.directory} is a file" if there else no_such(options.directory)
        raise ConfigError(f"runs: expected a directory with runs in it, and {why}")
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
    whole = run.state == "finished" and _has_model(run)
    return f"fusedrl export {at} DIR" if whole else resume_command(run.directory)


def _has_model(run: RunState) -> bool:
    return (run.directory / "model" / "config.json").is_file()


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
    began = Path(status.get("working_directory", "."))
    command = ["resume", str(Path(argv[0]).absolute()), *_from_here(argv[1:], began)]
    given = _from_here(given, began)
    with where_it_began(status):
        start(function(stage), parse(stage, given, tree=tree), command, argv[0], devices, place)


_NAME_FILES = ("config", "data", "log", "model", "monitor_reward", "reference_model", "reward")


def _from_here(words: Sequence[str], began: Path) -> list[str]:
    """Return options given anew, with the whole path of each file that they name in the caller's
    directory. A name that is the same file in the directory where the run began stays."""
    found: list[str] = []
    option = ""
    for word in words:
        before, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = before or option
        if option.replace("-", "_").rpartition(".")[2].strip("_") not in _NAME_FILES:
            found.append(word)
            continue
        path = value if Path(value).exists() else value.partition(":")[0]
        here = Path(path)
        named = bool(path) and not here.is_absolute() and here.exists()
        if named and (began / path).resolve() != here.resolve():
            value = f"{here.absolute()}{value[len(path) :]}"
        found.append(f"{before}{equals}{value}")
    return found


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
    if not given & {"--devices", "--place"} and devices != 1 and not launched():
        rest.append(f"--devices={devices}")
    began = Path(status.get("working_directory", "."))
    if (began / tree["run"]["dir"]).resolve() != root.resolve():  # it was moved
        rest.append(f"--run.dir={root.resolve()}")
    return stage, tree, [*rest, "--run.resume=true"], status


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


def _check_export(options: argparse.Namespace) -> None:
    """Raise, before torch is loaded, the errors of `export` that names and files tell.

    Raises:
        FileExistsError: the target holds something.
        FileNotFoundError: there is no such model.
        ConfigError: the run has no model yet.
    """
    from fusedrl.engine.runs.files import steps_in
    from fusedrl.engine.runs.status import run_state

    final, source = Path(options.target), Path(options.source)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(
            f"export: expected {final} to be a new directory or an empty one; nothing is written "
            "over"
        )
    run = run_state(source.parent if source.name == "model" else source) or run_state(source)
    if run is None:
        check_models([options.source])
    elif options.step is None and not _has_model(run):
        steps = ", ".join(str(step) for step, _ in reversed(steps_in(run.directory)))
        checkpoint = f", or export a checkpoint with --step N (of {steps})" if steps else ""
        raise ConfigError(f"export: {_unfinished(run)}{checkpoint}")


def _unfinished(run: RunState) -> str:
    """Return why a run has no model, and what to do."""
    at, go_on = run.directory, resume_command(run.directory)
    if run.state == "failed":
        return (
            f"{at} has no model, since its run failed at step {run.step}: "
            f"{' '.join(run.message.split())[:300]}; mend that first, then go on with {go_on}"
        )
    if run.state == "finished":
        return (
            f"{at} has no model any more, though its run finished at step {run.step}; {go_on} "
            "writes it again"
        )
    if run.state == "running":
        return f"{at} has no model yet: the run is at step {run.step}; wait until it ends"
    return f"{at} has no model yet, it is {run.state} at step {run.step}; go on with {go_on}"


def _export(options: argparse.Namespace) -> None:
    _check_export(options)
    from fusedrl.engine.tools.export import export

    path = export(
        options.source, options.target, kind=options.format, dtype=options.dtype, step=options.step
    )
    for file in sorted(path.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
