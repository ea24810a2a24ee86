"""Charts of docs/ as SVG, drawn by matplotlib (the extra `docs`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Dot(NamedTuple):
    """A point, and its error in y."""

    x: float
    y: float
    error: float = 0.0


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
    if not any(series.values()):
        raise ValueError(f"chart: expected points to draw for {title!r}, got none")
    figure = new_figure(8.4, 4.4)
    axes = figure.subplots()
    for name, line in series.items():
        axes.errorbar(
            [dot.x for dot in line],
            [dot.y for dot in line],
            yerr=[dot.error for dot in line] if any(dot.error for dot in line) else None,
            fmt="o--" if name in dashed else "o-",
            markersize=3.5,
            linewidth=1.4,
            elinewidth=1,
            label=name,
            gid=f"series {name}",
        )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    return svg(figure)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, on white."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def svg(figure: Figure) -> str:
    """The same figure gives the same bytes; texts stay texts."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "fusedrl", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
