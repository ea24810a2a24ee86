"""Rows of CSV files, read by Python's csv module; plain or gzip.

Every value is a text, as it stands in the file: "007" and "1e5" stay as they are. Only columns that
are no texts in any format become what they are: numbers (margin, label, ...), and lists of messages
or ranks, which are written as JSON. A blank line is no row, and a column without a name (the index
that pandas writes) is left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.lines import TURNS, BadRow, Row, RowRead

# columns of formats whose values are numbers, booleans, lists or objects
_VALUES = frozenset(
    "margin label labels ranks completions messages tools shots info summaries choice rating "
    f"score_ratio score_0 score_1 min_harmlessness_score_transcript {TURNS}".split()
)
_TEXT_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected")


def read_delimited(
    path: Path,
    separator: str | None = None,
    header: Sequence[str] | None = None,
    without: Collection[str] = (),
) -> Iterator[RowRead]:
    """Yield the rows of a file, each with the number of the line where it begins. Reading stops at
    a fault of the file as a whole: a quote that is never closed, a gzip stream that is cut.

    Args:
        separator: character between fields; None: a tab in .tsv files, else a comma.
        header: names of the columns; None: the first row has them.
        without: columns that are left out.
    Raises:
        DataError: the header has a name twice or no name at all.
    """
    tab = ".tsv" in [suffix.lower() for suffix in path.suffixes]
    separator = separator or ("\t" if tab else ",")
    csv.field_size_limit(2**31 - 1)  # a text may be long
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream: Any = gzip.GzipFile(fileobj=plain) if packed else plain
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        yield from _rows(path, text, separator, header, without)


def _rows(
    path: Path,
    text: IO[str],
    separator: str,
    header: Sequence[str] | None,
    without: Collection[str],
) -> Iterator[RowRead]:
    reader = csv.reader(text, delimiter=separator, strict=True)
    names = None if header is None else _checked(path, header, separator)
    while True:
        begun = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield RowRead(begun, {}, b"", _fault(error))
            return
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = f"the gzip stream is cut or damaged from here on ({error})"
            yield RowRead(begun, {}, b"", reason)
            return
        if cells is None:
            return
        if not cells:
            continue
        if names is None:
            names = _checked(path, cells, separator)
            continue
        raw = separator.join(cells).encode("utf-8", "surrogateescape")
        try:
            yield RowRead(begun, _row(names, cells, without, separator), raw, "")
        except BadRow as reason:
            yield RowRead(begun, {}, raw, str(reason))


def _fault(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end of data" in said:
        return "not CSV: a quote is opened in the row that begins here, and the file ends before it"
    if "expected after" in said:
        return (
            f"not CSV: {said} in the row that begins here; a quote within a field is written twice"
        )
    return f"not CSV: {said} in the row that begins here"


def _checked(path: Path, cells: Sequence[str], separator: str) -> list[str]:
    """Return the names of the columns. Raise DataError if a name occurs twice, or if they are no
    text."""
    names = [cell.strip() for cell in cells]
    if bad := next((name for name in names if not _is_text(name)), None):
        raise DataError(
            f"{path}: expected the names of columns in UTF-8, got {bad[:40]!a}; a file that a "
            "spreadsheet wrote as UTF-16 or Latin-1 is saved again as UTF-8"
        )
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(
            f"{path}: two columns have the name {twice!r}; rename one of them in the first line"
        )
    if not any(names):
        raise DataError(
            f"{path}: expected the names of columns in the first line, got none "
            f"(separator {separator!r})"
        )
    return names


def _row(
    names: Sequence[str], cells: Sequence[str], without: Collection[str], separator: str
) -> Row:
    if len(cells) != len(names):
        raise BadRow(
            f"expected {len(names)} fields, as the header has, got {len(cells)}; a field that "
            f"holds {separator!r} or a line end stands in quotes"
        )
    for name, cell in zip(names, cells, strict=True):
        if "\0" in cell:
            raise BadRow(f'a NUL byte in column "{name}" (a torn write, or UTF-16?)')
        if not _is_text(cell):
            raise BadRow(f'not UTF-8: column "{name}"')
    return {
        name: cell for name, cell in zip(names, cells, strict=True) if name and name not in without
    }


def _is_text(cell: str) -> bool:
    try:
        return cell.isascii() or bool(cell.encode())
    except UnicodeEncodeError:  # a byte that was not UTF-8
        return False


def typed(row: Row) -> Row:
    """Return a row of texts with the values of those columns that are no texts.

    Raises:
        BadRow: a column holds what Python's `str` makes of a list, which is not JSON.
    """
    return {
        name: _value(name, cell) if isinstance(cell, str) else cell for name, cell in row.items()
    }


def _value(name: str, cell: str) -> Any:
    stripped = cell.strip()
    if name not in _VALUES and not (name in _TEXT_OR_MESSAGES and stripped.startswith("[{")):
        return cell
    if stripped == "" and name in _VALUES:
        return None
    try:
        value = json.loads(stripped.lower() if stripped in ("True", "False") else stripped)
    except ValueError:
        if stripped.startswith(("[{'", "['")):
            raise BadRow(
                f'column "{name}" holds a list as Python prints it, which is not JSON; write the '
                "file as JSON lines or Parquet, or such columns by json.dumps"
            ) from None
        return cell
    if name in _TEXT_OR_MESSAGES and not all(
        isinstance(message, dict) and "role" in message for message in value
    ):
        return cell
    return value


def other_separator(columns: Sequence[str], separator: str | None) -> str:
    """Return the reason why a header is one name, if it holds another separator; else ""."""
    for other, word in ((";", "semicolon"), ("\t", "tab"), ("|", "pipe"), (",", "comma")):
        if len(columns) == 1 and other in columns[0] and other != separator:
            return (
                f"the first line has one name, {columns[0]!r}, which holds {other!r}: add "
                f":separator={word} behind the name of the file"
            )
    return ""


NO_HEADER = (
    "; the first line was taken for the names of the columns: if it is a row, add their names, "
    "such as :header=prompt+completion"
)
