"""Tables for people: whole words at any width, so that a name can be read, searched and copied.

A table that does not fit the terminal gives room where lines can break between words. Where even
that does not suffice, each row becomes a paragraph: its name, and a line for each value. What is
piped or written to a file is as wide as it needs to be.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

ANY = 10_000  # columns of what is no terminal
READABLE = 120  # columns of running text there
_SHORT = 40  # characters of a value and its heading that share a line with others


def console(file: TextIO | None = None, *, texts: bool = False) -> Console:
    """Return a console on standard output, or on `file`, that prints texts as they are. Where it is
    no terminal it is as wide as COLUMNS says; without that, as any table needs, or with `texts` as
    one reads well."""
    from rich.console import Console

    class Kept(Console):
        """Console that leaves a reader who has gone, as with `| head`, to the command line."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    found = Kept(file=file, markup=False, highlight=False, emoji=False)
    if not found.is_terminal:
        found.width = shutil.get_terminal_size((READABLE if texts else ANY, 25)).columns
    return found


def show(table: Table, to: Console | None = None) -> None:
    """Print a table, or its rows one after the other if no width of its columns keeps all words
    whole.

    Args:
        to: where to print; standard output by default. There, columns that share the width by ratio
            are texts.
    """
    to = to or console(texts=any(column.ratio for column in table.columns))
    title, table.title = table.title, None
    if title:
        to.print(title, style="table.title")
    columns = [_cells(table, index, to) for index in range(len(table.columns))]
    widths = _widths(table, columns, to)
    if widths is None:
        _stacked(columns, table.show_header, to)
        return
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.ratio = width, None
    to.print(table)


def fits(table: Table, to: Console) -> bool:
    """Whether a table can be printed there with all words whole."""
    columns = [_cells(table, index, to) for index in range(len(table.columns))]
    return _widths(table, columns, to) is not None


def _widths(table: Table, columns: Sequence[Sequence[Text]], to: Console) -> list[int] | None:
    """Return widths of the columns that keep words whole, or None if there are none."""
    most = [max(line.cell_len for one in column for line in one.split()) for column in columns]
    least = [max(map(_longest, column)) for column in columns]
    edges = (2 if table.show_edge else 0) + len(columns) - 1 if table.box else 0
    room = to.width - edges - sum(table.padding[1::2]) * len(columns)
    return _shared(least, most, room) if sum(least) <= room else None


def _cells(table: Table, index: int, to: Console) -> list[Text]:
    """Return a column's heading and cells."""
    from rich.text import Text

    column = table.columns[index]
    cells = ([column.header] if table.show_header else []) + list(column.cells)
    return [cell if isinstance(cell, Text) else to.render_str(str(cell)) for cell in cells] or [
        Text("")
    ]


def _longest(text: Text) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.plain.split()), default=0)


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Return widths between `least` and `most` that fit: the widest columns give first."""
    widths = list(most)
    while (over := sum(widths) - room) > 0:
        widest = max(w for w, low in zip(widths, least, strict=True) if w > low)
        which = [i for i, w in enumerate(widths) if w == widest and w > least[i]]
        next_ = max([w for w in widths if w < widest], default=0)
        for i in which:
            taken = min(widest - max(next_, least[i]), -(-over // len(which)))
            widths[i] -= max(1, taken)
    return widths


def _stacked(columns: Sequence[Sequence[Text]], headed: bool, to: Console) -> None:
    """Print each row as a paragraph: short values in one line, each text below its heading."""
    from rich.text import Text

    for number in range(int(headed), len(columns[0])):
        to.print(columns[0][number])
        cells = [
            Text.assemble(f"{column[0].plain} " if headed else "", column[number])
            for column in columns[1:]
            if column[number].plain
        ]
        if all(cell.cell_len <= _SHORT and "\n" not in cell.plain for cell in cells):
            cells = [Text(", ").join(cells)] if cells else []
        for cell in cells:
            for line in cell.wrap(to, max(1, to.width - 2)):
                to.print(Text.assemble("  ", line))
