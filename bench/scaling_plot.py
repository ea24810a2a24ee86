"""Draw the results of bench_scaling.py into docs/scaling.svg, and write the tables between the
markers of docs/engine-numbers.md. `python -m bench.scaling_plot`"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.harness import RESULTS, Result, read_results
from bench.tables import replace_between

DOCS = RESULTS.parents[1] / "docs"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
# contest -> what its x is, and which number of the row's shape
PANELS = {"decode, sequences": ("sequences", 0), "decode, context": ("context", 1)}
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 240, 60, 30, 80  # of a panel, and around it
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


def _panel(name: str, line: list[Point], left: int, low: float, high: float) -> list[str]:
    def across(x: float) -> float:
        return left + WIDTH * math.log(x / line[0].x) / math.log(line[-1].x / line[0].x)

    def down(y: float) -> float:
        return TOP + HEIGHT * (1 - math.log(y / low) / math.log(high / low))

    out: list[str] = []
    out.append(f'<text x="{left}" y="{TOP - 12}" font-weight="bold">tokens/s over {name}</text>')
    tick = low
    while tick <= high:
        out.append(
            f'<path d="M{left} {down(tick):.1f}h{WIDTH}" stroke="#d0d7de"/>'
            f'<text x="{left - 6}" y="{down(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:,.0f}</text>'
        )
        tick *= 10
    for point in line:
        out.append(
            f'<text x="{across(point.x):.1f}" y="{TOP + HEIGHT + 18}" '
            f'text-anchor="middle">{point.x}</text>'
        )
    for color, dash, which in (
        (ROOF, ' stroke-dasharray="5 4"', "roofline"),
        (OURS, "", "tokens_per_s"),
    ):
        path = " ".join(
            f"{across(point.x):.1f},{down(getattr(point, which)):.1f}" for point in line
        )
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'
        )
    out += [
        f'<circle cx="{across(p.x):.1f}" cy="{down(p.tokens_per_s):.1f}" r="3.5" '
        f'fill="{OURS}"><title>{p.x}: {p.tokens_per_s:,.0f}</title></circle>'
        for p in line
    ]
    out.append(
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 38}" '
        f'text-anchor="middle">{name} (logarithmic)</text>'
    )
    return out


def svg(lines: dict[str, list[Point]]) -> str:
    """One panel a contest, both axes logarithmic: what was measured, and its roofline."""
    speeds = [
        y for line in lines.values() for point in line for y in (point.tokens_per_s, point.roofline)
    ]
    low, high = (
        10 ** f(math.log10(y)) for f, y in ((math.floor, min(speeds)), (math.ceil, max(speeds)))
    )
    total = LEFT + len(lines) * (WIDTH + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {HEIGHT + TOP + 60}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, (what, line) in enumerate(lines.items()):
        out += _panel(PANELS[what][0], line, LEFT + index * (WIDTH + GAP), low, high)
    for offset, color, label in ((0, OURS, "measured"), (70, ROOF, "roofline")):
        out.append(
            f'<text x="{LEFT + offset}" y="{TOP + HEIGHT + 54}" fill="{color}">{label}</text>'
        )
    return "\n".join([*out, "</svg>\n"])


def draw(results: Path, docs: Path) -> None:
    """Raises ValueError where the rows are not there."""
    found = read_results(results)
    lines = {what: points(found, what) for what in PANELS}
    if any(len(line) < 2 for line in lines.values()):
        raise ValueError(
            f"expected rows of {', '.join(PANELS)} in {results.name}, found too few; make bench "
            "BENCH=bench/bench_scaling.py"
        )
    (docs / "scaling.svg").write_text(svg(lines), encoding="utf-8")
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
