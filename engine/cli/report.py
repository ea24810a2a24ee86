"""fusedrl samples, report, watch: their options, and the functions that show runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import Parser, count, report_file, report_json, wrote

if TYPE_CHECKING:
    from fusedrl.engine.watch.run_files import RunRecord


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the three subcommands. Parsed options run the command by `options.call(options)`."""
    samples = commands.add_parser(
        "samples", help="how completions of held-out prompts changed in a run", allow_abbrev=False
    )
    samples.set_defaults(call=_samples)
    samples.add_argument("run", metavar="RUN", help="a run directory")
    samples.add_argument(
        "--columns",
        type=count,
        default=4,
        help="evaluations shown: first, last, and between (default: %(default)s)",
    )

    report = commands.add_parser(
        "report",
        help="what runs measured and how they differ: on the terminal, as one HTML page, as JSON",
        allow_abbrev=False,
    )
    report.set_defaults(call=_report)
    report.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run directory; several are compared"
    )
    report.add_argument(
        "--compare",
        action="store_true",
        help="side by side, as several runs are without it; an error for a single one",
    )
    report.add_argument(
        "--html", type=_page_file, metavar="FILE", help="one page with curves and completions"
    )
    report.add_argument(
        "--json",
        type=report_file,
        metavar="FILE",
        help='the figures; "-" is standard output, without the tables',
    )

    watch = commands.add_parser(
        "watch",
        help="write the page of runs again and again until they end",
        allow_abbrev=False,
    )
    watch.set_defaults(call=_watch)
    watch.add_argument(
        "runs", metavar="RUN", nargs="+", help="the directory of a run that is going on"
    )
    watch.add_argument(
        "--html", type=_page_file, metavar="FILE", required=True, help="the page to write"
    )
    watch.add_argument(
        "--every",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="time between two pages (default: %(default)g)",
    )


def _page_file(text: str) -> str:
    if text == "-":
        raise argparse.ArgumentTypeError("expected a file to write the page to, got '-'")
    return report_file(text, "<!doctype html>", "a page")


def _seconds(text: str) -> float:
    try:
        if 1 <= float(text) <= 86400:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of seconds, at least 1, got {text!r}")


def _read(directories: list[str]) -> list[RunRecord]:
    from fusedrl.engine.watch.run_files import open_runs

    return [files.read() for files in open_runs(directories)]


def _samples(options: argparse.Namespace) -> None:
    from fusedrl.engine.base.tables import show
    from fusedrl.engine.watch.run_report import samples_table

    show(samples_table(_read([options.run])[0], options.columns))


def _report(options: argparse.Namespace) -> None:
    from fusedrl.engine.watch.run_report import summary

    runs = _read(options.runs)
    if options.compare and len(runs) < 2:
        raise ConfigError(
            f"report --compare: expected two runs or more, got {len(runs)}; name the others behind "
            f"{runs[0].directory}"
        )
    if options.html is not None:
        from fusedrl.engine.watch.page.page import write_page

        write_page(runs, Path(options.html))
        wrote(options.html)
    if options.json is not None:
        report_json(summary(runs), options.json, lambda: _show(runs))
    else:
        _show(runs)


def _show(runs: list[RunRecord]) -> None:
    from fusedrl.engine.base.tables import console, fits, show
    from fusedrl.engine.watch.run_report import VALUES, comparison_tables, metrics_table

    to = console()
    if len(runs) == 1:  # on a narrow terminal, fewer values beside whole names
        choices = [metrics_table(runs[0], some) for some in (VALUES, VALUES[:3], VALUES[::2][:2])]
        show(next((table for table in choices if fits(table, to)), choices[0]), to)
    else:
        for table in comparison_tables(runs):
            show(table, to)
    for run in runs:
        front = f"{run.name}: " if len(runs) > 1 else ""
        for alarm in run.alarms:
            to.print(front + alarm.text, style="bold red")
        for note in run.notes:
            to.print(f"{run.name}: {note}", style="dim")


def _watch(options: argparse.Namespace) -> None:
    from fusedrl.engine.runs.terminal import say
    from fusedrl.engine.watch.page.follow import follow
    from fusedrl.engine.watch.run_files import open_runs

    path = Path(options.html)
    try:
        said = follow(open_runs(options.runs), path, options.every, say)
    except ConfigError as error:  # a run that was deleted meanwhile
        raise ConfigError(f"watch: {error}") from error
    say(f"watch: {said}; the page is {path}")
