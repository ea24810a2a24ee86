"""The long runs of docs/results.md: `make validate`, or `python -m bench.validation frontier
--model DIR`. Tables are written between the markers of docs/results.md. The study word_problems
runs only if it is named, with `--model` SmolLM2-135M-Instruct (examples/smollm2.py)."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from bench.harness import RESULTS
from bench.tables import replace_between

STUDIES = ("frontier", "ablation", "hacking", "arithmetic", "distillation", "guessing")
NAMED = (*STUDIES, "word_problems")  # all that there are
PAGE = RESULTS.parents[1] / "docs" / "results.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "studies",
        nargs="*",
        default=list(STUDIES),
        metavar="STUDY",
        help=f"of {', '.join(NAMED)} (default: all but the last)",
    )
    parser.add_argument(
        "--model",
        default=str(RESULTS.parents[2] / "shared/models/stories260k"),
        help="stories260K; see examples/convert_llama2c.py",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/validation"),
        help="where models and metrics go (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="runs at a time, one thread each (default: one for each core)",
    )
    options = parser.parse_args()
    if unknown := set(options.studies) - set(NAMED):
        parser.error(f"expected studies of {', '.join(NAMED)}, got {', '.join(sorted(unknown))}")
    for study in options.studies:
        table = importlib.import_module(f"bench.validation.{study}").main(
            options.model, options.work, options.seeds, options.workers
        )
        print(table)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            replace_between(page, f"<!-- {study}:begin -->", f"<!-- {study}:end -->", table),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
