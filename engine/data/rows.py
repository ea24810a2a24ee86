"""Rows of any source that a data option names, as they stand there or under other names.

The kind of a file is told by its first bytes, then by its name; what is neither a table nor CSV is
JSON.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fusedrl.engine.base.errors import DataError, check_no_pointer, no_such
from fusedrl.engine.data.delimited import other_separator, read_delimited, typed
from fusedrl.engine.data.fields import column
from fusedrl.engine.data.lines import BadRow, Row, RowRead, parse_row, read_lines
from fusedrl.engine.data.sources import HUB, Source

_MAGIC = {b"PAR1": "parquet", b"ARRO": "arrow", b"FEA1": "arrow"}
_NAMES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_REFUSED = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as CSV"),
    **dict.fromkeys(
        (".zip", ".zst", ".bz2", ".xz", ".7z", ".tar", ".tgz"), "an archive; unpack it, or use gzip"
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth", ".bin"),
        "a pickle, which can run code when "
        "it is read; save its rows as JSON lines where you trust it",
    ),
    **dict.fromkeys((".yaml", ".yml"), "YAML; options of a run are given with --config"),
    ".safetensors": "weights; data are rows of text",
}  # suffix -> what it is, and what to do
_REFUSED_MAGIC = {
    b"PK\x03\x04": ".zip",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh9": ".bz2",
    b"\xfd7zX": ".xz",
    b"7z\xbc\xaf": ".7z",
}
EXPECTED = {
    "json": "one JSON object per line",
    "csv": "the names of columns in the first line, and a row in each line behind it",
    "parquet": "rows",
    "arrow": "rows",
    "hub": "rows",
}


def kind_of(source: Source) -> str:
    """Return how a source is read: hub, parquet, arrow, csv or json. Errors are those of
    `check_source`."""
    if source.of_hub and not Path(source.path).exists():
        return "hub"
    path = Path(source.path)
    _check_file(path)
    check_no_pointer(path)
    with open(path, "rb") as file:
        first = file.read(4)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if first in _MAGIC:
        return _MAGIC[first]
    if suffix in _REFUSED or first in _REFUSED_MAGIC:
        what = _REFUSED[suffix if suffix in _REFUSED else _REFUSED_MAGIC[first]]
        raise DataError(f"{path}: expected JSON lines, CSV, Parquet or Arrow, got {what}")
    if source.separator is not None or source.header is not None:
        return "csv"
    kind = _NAMES.get(suffix, "json")
    if kind in ("parquet", "arrow") and first[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: expected a {suffix} file, got gzip; unpack it with gunzip")
    return kind


def check_source(source: Source) -> None:
    """Raise an error unless the source is a data set of a hub, or a regular file of a kind that is
    read here.

    Raises:
        FileNotFoundError: there is no such file; the message names a data set of the hub if the
            path looks like one.
        DataError: a directory, a special file, or a file of another kind.
    """
    kind_of(source)


def may_be_read(source: Source) -> bool:
    """Whether a source is a data set of the hub or a file that is there."""
    return source.of_hub or Path(source.path).is_file()


def source_digest(source: Source) -> str:
    """Return the SHA-256 of a file's bytes or of the rows of a data set of the hub, hexadecimal.
    Errors are those of `read_rows`."""
    if kind_of(source) == "hub":
        from fusedrl.engine.data.hub import digest

        return digest(source)
    with open(source.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path) -> None:
    if not path.exists():
        if path.suffix in ("", ".git") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
            raise FileNotFoundError(
                f"{path} is no file here; if it is a data set of the Hugging Face hub, write "
                f"{HUB}{path}"
            )
        raise FileNotFoundError(f"no such data file: {no_such(path)}")
    if path.is_dir():
        raise DataError(
            f"{path}: expected a file, got a directory; name the file in it, or write {HUB}{path} "
            "if it is a data set that the package datasets saved"
        )
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got a special file")


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[RowRead]:
    """Yield the rows of a source with the names that `source.columns` gives their columns; reading
    stops at a fault of the source as a whole.

    Args:
        streaming: fetch a data set of the hub row by row.
    Raises:
        FileNotFoundError, DataError: as for `check_source`, or the source cannot be read.
        SetupError: a package or the network is missing.
    """
    kind = kind_of(source)
    for one in _read(source, kind, streaming):
        if one.fault:
            yield one
            continue
        try:
            row = renamed(one.row, source.columns)
            yield one._replace(row=typed(row) if kind == "csv" else row)
        except BadRow as reason:
            split = other_separator(list(one.row), source.separator) if kind == "csv" else ""
            yield one._replace(fault=split or str(reason))


def _read(source: Source, kind: str, streaming: bool) -> Iterator[RowRead]:
    path = Path(source.path)
    without = [ours for ours, theirs in source.columns.items() if not theirs]
    if kind == "hub":
        yield from _of_hub(source, streaming)
    elif kind == "csv":
        yield from read_delimited(path, source.separator, source.header, without)
    elif kind == "json":
        yield from _of_lines(path)
    else:
        from fusedrl.engine.data.tables import read_table

        yield from read_table(path, kind, without)


def _of_hub(source: Source, streaming: bool) -> Iterator[RowRead]:
    from fusedrl.engine.data.hub import read_hub

    yield from read_hub(source, streaming=streaming)


def _of_lines(path: Path) -> Iterator[RowRead]:
    for number, raw, fault in read_lines(path):
        try:
            yield RowRead(number, {} if fault else parse_row(raw), raw, fault)
        except BadRow as reason:
            yield RowRead(number, {}, raw, str(reason))


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row in which the columns have our names; columns that no name leads to stay.

    Args:
        columns: our name -> the name in the row, with dots into nested objects; "" for a column
            that is left out.
    Raises:
        BadRow: the row lacks a column.
    """
    if not columns:
        return row
    found = {
        ours: row[theirs] if theirs in row else column(row, theirs)
        for ours, theirs in columns.items()
        if theirs
    }
    gone = {*columns, *columns.values()}
    return found | {name: value for name, value in row.items() if name not in gone}
