"""fusedrl verify: its options, and the function that runs it."""

from __future__ import annotations

import argparse
import math
import sys

from fusedrl.engine.cli.common import (
    Parser,
    check_device,
    count,
    count_or_none,
    report_file,
    report_json,
)

FAILED = 1  # something is beyond its bound


def verify_options(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the subcommand. Parsed options run it by `options.call(options)`."""
    text = (
        "whether every kernel and the engine compute on this machine what they should; exit "
        "code 1 where one does not"
    )
    one = commands.add_parser("verify", help=text, description=text, allow_abbrev=False)
    one.set_defaults(call=_verify)
    one.add_argument("--device", help="cpu or cuda (default: the best there is)")
    one.add_argument(
        "--ops",
        default="",
        metavar="NAMES",
        help="these alone, with commas, without the engine's promises (default: everything)",
    )
    one.add_argument(
        "--cases",
        type=count_or_none,
        default=6,
        help="drawn from the grid of each implementation, beside the plain one (default: "
        "%(default)s)",
    )
    one.add_argument("--full", action="store_true", help="the whole grid: hours on a CPU")
    one.add_argument(
        "--seed", type=int, default=0, help="of the draw of cases (default: %(default)s)"
    )
    one.add_argument(
        "--jobs",
        type=count,
        help="processes at once (default: one a processor, on a GPU at most 8)",
    )
    one.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="of one row, which has failed then (default: 300; with --full, two hours)",
    )
    one.add_argument(
        "--output-json",
        type=report_file,
        metavar="FILE",
        help='the rows; "-" is standard output, without the table',
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _verify(options: argparse.Namespace) -> None:
    check_device(options.device)
    from fusedrl.engine.model.weights import resolve_device
    from fusedrl.engine.tools.verify.report import print_report, tell, verify_machine

    ops = [name for name in options.ops.split(",") if name]
    found = verify_machine(
        resolve_device(options.device),
        ops=ops or None,
        engine=not ops,
        cases=options.cases,
        full=options.full,
        seed=options.seed,
        jobs=options.jobs,
        timeout=options.timeout or (7200.0 if options.full else 300.0),
        told=tell if sys.stderr.isatty() else lambda row: None,
    )
    report_json(found, options.output_json, lambda: print_report(found))
    if not found["ok"]:
        raise SystemExit(FAILED)
