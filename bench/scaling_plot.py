"""Draw the results of bench_scaling.py into docs/scaling.svg, and write the tables between the
markers of docs/engine-numbers.md. `python -m bench.scaling_plot`"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.drawing import new_figure, svg
from bench.harness import RESULTS, Result, read_results
from bench.tables import replace_between

DOCS = RESULTS.parents[1] / "docs"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
# contest -> what its x is, and which number of the row's shape
PANELS = {"decode, sequences": ("sequences", 0), "decode, context": ("context", 1)}
OURS, ROOF = "#1f6feb", "#8b949e"


class Point(NamedTuple):
    """One row."""

    x: int
    tokens_per_s: float
    roofline: float
    step_ms: float


def points(results: Sequence[Result], what: str) -> list[Point]:
    """The rows of a contest, by x."""
    found = []
    for row, _ in results:
        if row["what"] == what:
            sizes = [int(size) for size in row["shape"].split(" x ")]
            speed = row["extra"]["tokens/s"]
            found.append(
                Point(
                    sizes[PANELS[what][1]],
                    speed,
                    100 * speed / row["percent_of_ceiling"],
                    1e3 * sizes[0] / speed,
                )
            )
    return sorted(found)


def exponent(before: Point, after: Point) -> float:
    """k of tokens per second ~ x^k between two points."""
    return math.log(after.tokens_per_s / before.tokens_per_s) / math.log(after.x / before.x)


def table(what: str, line: Sequence[Point]) -> str:
    """Format the table as Markdown."""
    rows = [
        f"| {PANELS[what][0]} | tokens/s | ms a step | of the roofline | exponent since the row "
        "before |",
        "|---|---|---|---|---|",
    ]
    for before, point in zip([None, *line], line, strict=False):
        grown = "" if before is None else f"{exponent(before, point):.2f}"
        rows.append(
            f"| {point.x} | {point.tokens_per_s:,.0f} | {point.step_ms:.3g} | "
            f"{100 * point.tokens_per_s / point.roofline:.1f}% | {grown} |"
        )
    return "\n".join(rows)


def drawing(lines: dict[str, list[Point]]) -> str:
    """One panel a contest, both axes logarithmic: what was measured, and its roofline."""
    figure = new_figure(9.2, 3.4)
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for panel, (what, line) in zip(panels, lines.items(), strict=True):
        name, sizes = PANELS[what][0], [point.x for point in line]
        panel.plot(sizes, [point.roofline for point in line], "--", color=ROOF, label="roofline")
        speeds = [point.tokens_per_s for point in line]
        panel.plot(sizes, speeds, "o-", color=OURS, markersize=4, label="measured", gid=what)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_title(f"tokens/s over {name}", loc="left", fontsize=10, fontweight="bold")
        panel.set_xlabel(f"{name} (logarithmic)")
        panel.grid(axis="y", color="#d0d7de", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].legend(frameon=False, fontsize=9)
    return svg(figure)


def draw(results: Path, docs: Path) -> None:
    """Raises ValueError where the rows are not there."""
    found = read_results(results)
    lines = {what: points(found, what) for what in PANELS}
    if any(len(line) < 2 for line in lines.values()):
        raise ValueError(
            f"expected rows of {', '.join(PANELS)} in {results.name}, found too few; make bench "
            "BENCH=bench/bench_scaling.py"
        )
    (docs / "scaling.svg").write_text(drawing(lines), encoding="utf-8")
    page = docs / "engine-numbers.md"
    run = found[-1][1]
    where = (
        f"{run['gpu'] or run['cpu'] + ', ' + run['capability']}, {run['threads']} thread; "
        f"torch {run['torch']}; `{run['commit']}`; {run['date']}"
    )
    text = "\n\n".join(
        [*(table(what, line) for what, line in lines.items()), f"Measured on {where}."]
    )
    page.write_text(
        replace_between(page.read_text(encoding="utf-8"), BEGIN, END, text), encoding="utf-8"
    )


if __name__ == "__main__":
    draw(RESULTS / "scaling.json", DOCS)
