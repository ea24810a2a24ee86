"""Rows of Parquet and Arrow files, read by pyarrow in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusedrl.engine.base.errors import DataError, SetupError
from fusedrl.engine.data.lines import BadRow, Row, RowRead
from fusedrl.engine.data.plain import plain

INSTALL = "pip install 'fusedrl[data]'"
BATCH = 1024  # rows


def read_table(path: Path, kind: str, without: Collection[str] = ()) -> Iterator[RowRead]:
    """Yield the rows of a file, numbered from 1.

    Args:
        kind: parquet, or arrow: the file format, the stream format, or Feather.
        without: columns that are not read.
    Raises:
        SetupError: pyarrow is not installed.
        DataError: the file is damaged, or two of its columns have one name.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise SetupError(
            f"{path}: reading Parquet and Arrow needs the package pyarrow, which is not installed; "
            f"{INSTALL}"
        ) from error
    number = 0
    try:
        for batch in _batches(path, kind):
            yield from rows_of(batch, number, without, str(path))
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        name = {"parquet": "Parquet", "arrow": "Arrow"}[kind]
        raise DataError(
            f"{path}: expected a whole {name} file, got one that pyarrow cannot read"
            f"{f' behind row {number}' if number else ''} "
            f"({' '.join(str(error).split())[:300]}); write or download it again"
        ) from error


def _batches(path: Path, kind: str) -> Iterator[Any]:
    """Yield the record batches of a file."""
    import pyarrow as pa

    if kind == "parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH)
        return
    with pa.OSFile(str(path), "rb") as file:
        if file.read(4) == b"FEA1":
            from pyarrow.feather import read_table as read_feather

            yield from read_feather(path).to_batches(max_chunksize=BATCH)
            return
        file.seek(0)
        with suppress(pa.ArrowInvalid):
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
            return
        file.seek(0)
        yield from pa.ipc.open_stream(file)  # as datasets writes its cache


def rows_of(batch: Any, before: int, without: Collection[str], where: str) -> Iterator[RowRead]:
    """Yield the rows of a record batch or table of pyarrow.

    Args:
        before: number of rows before the batch.
        without: columns that are left out.
        where: name of the source in messages.
    Raises:
        DataError: two columns have one name.
    """
    names = batch.schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{where}: two columns have the name {twice!r}; rename one of them")
    kept = [(name, batch.column(name)) for name in names if name not in without]
    whole = [None if _as_is(column.type) else name for name, column in kept]
    lists = [_values(column) for _, column in kept]
    for index in range(batch.num_rows):
        row: Row = {}
        try:
            for (name, _), change, values in zip(kept, whole, lists, strict=True):
                value = values[index]
                if isinstance(value, _Unreadable):
                    raise BadRow(f'column "{name}" cannot be read: {value.reason}')
                row[name] = value if change is None else plain(value, name)
        except BadRow as reason:
            cells = zip(kept, lists, strict=True)
            shown = {name: str(values[index])[:1000] for (name, _), values in cells}
            yield RowRead(before + index + 1, {}, repr(shown).encode(), str(reason))
        else:
            yield RowRead(before + index + 1, row, b"", "")


class _Unreadable:
    """A value that pyarrow cannot turn into Python's, with the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def _values(column: Any) -> list[Any]:
    """Return the values of a column; of a column that pyarrow refuses as a whole, one by one."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # bytes that are not UTF-8, times out of Python's range
        found = []
        for one in column:
            try:
                found.append(one.as_py())
            except (ValueError, OverflowError) as error:
                found.append(_Unreadable(" ".join(str(error).split())[:200]))
        return found


def _as_is(kind: Any) -> bool:
    """Whether all values of a type of pyarrow are plain as they come."""
    import pyarrow.types as of

    if of.is_list(kind) or of.is_large_list(kind):
        return _as_is(kind.value_type)
    return bool(
        of.is_string(kind)
        or of.is_large_string(kind)
        or of.is_integer(kind)
        or of.is_boolean(kind)
        or of.is_null(kind)
    )
