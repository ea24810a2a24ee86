"""Line and scatter charts as SVG, written without a plotting library: each point has only two
numbers and an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP = 560, 340, 56, 34
COLORS = (
    "#1f6feb",
    "#cf222e",
    "#1a7f37",
    "#8250df",
    "#bf8700",
    "#0e7490",
    "#57606a",
    "#d4572a",
    "#24292f",
)


class Dot(NamedTuple):
    """A point, its error in y, and what hovering over it says."""

    x: float
    y: float
    error: float = 0.0
    note: str = ""


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Dot]],
    *,
    dashed: frozenset[str] = frozenset(),
) -> str:
    """Each series as dots with error bars, joined by a line in the order given; `dashed`: series
    whose line is dashed."""
    dots = [dot for line in series.values() for dot in line]
    if not dots:
        raise ValueError(f"chart: expected points to draw for {title!r}, got none")
    x_ticks, y_ticks = (
        _ticks([dot.x for dot in dots]),
        _ticks([v for dot in dots for v in (dot.y - dot.error, dot.y + dot.error)]),
    )

    def across(x: float) -> float:
        return LEFT + WIDTH * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def down(y: float) -> float:
        return TOP + HEIGHT * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 190} '
        f'{TOP + HEIGHT + 52}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold">{title}</text>',
    ]
    out += [
        f'<path d="M{LEFT} {down(y):.1f}h{WIDTH}" stroke="#d0d7de"/>'
        f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    out += [
        f'<text x="{across(x):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    out += [
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 40}" '
        f'text-anchor="middle">{x_label}</text>',
        f'<text transform="translate(14 {TOP + HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">{y_label}</text>',
    ]
    for index, (name, line) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        dash = ' stroke-dasharray="5 4"' if name in dashed else ""
        points = " ".join(f"{across(dot.x):.1f},{down(dot.y):.1f}" for dot in line)
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>'
        )
        for dot in line:
            x = across(dot.x)
            out.append(
                f'<path d="M{x:.1f} {down(dot.y - dot.error):.1f}V{down(dot.y + dot.error):.1f}" '
                f'stroke="{color}"/>'
                f'<circle cx="{x:.1f}" cy="{down(dot.y):.1f}" r="3.5" fill="{color}">'
                f"<title>{name} {dot.note}: {dot.x:.3g}, {dot.y:.3g}</title></circle>"
            )
        out.append(
            f'<text x="{LEFT + WIDTH + 14}" y="{TOP + 14 + 18 * index}" '
            f'fill="{color}">{name}</text>'
        )
    return "\n".join([*out, "</svg>\n"])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, four to nine of them, that hold all values between them."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** (len(str(int(1e12 * span))) - 13)
    step = next(
        step * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5, 10) if span / (step * factor) <= 7
    )
    first, last = int(low // step), int(-(-high // step))
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]
