"""Reading of a data file as rows: JSONL, or one JSON list of rows; plain or gzip.

A bad line is reported and never repaired. A byte-order mark, CRLF line ends and blank lines are
accepted.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

Row = dict[str, Any]
TURNS = "turns"  # the column of a row that is a list itself, as in MOSS-RLHF's files
_BOM = b"\xef\xbb\xbf"


class BadRow(Exception):
    """Error of a row that cannot be used, with the reason."""


class Dropped(Exception):
    """Signal that a well-formed row holds no usable example. Such rows are counted; they are not
    errors."""


class RowRead(NamedTuple):
    """A row of a source as it was read.

    Attributes:
        number: its line in a file of text, else its place among the rows, from 1.
        row: its columns; empty if the row cannot be read.
        raw: its bytes, for the file of rejects; empty where a row has none of its own.
        fault: reason why it cannot be read, or "".
    """

    number: int
    row: Row
    raw: bytes
    fault: str


def read_lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield (line number, bytes, fault) for every row; reading stops at a fault.

    Raises:
        FileNotFoundError: there is no such file.
    """
    number = 0
    with open(path, "rb") as plain:
        magic = plain.read(4)
        plain.seek(0)
        stream: Any = gzip.GzipFile(fileobj=plain) if magic[:2] == b"\x1f\x8b" else plain
        try:
            if stream.peek(256).removeprefix(_BOM).lstrip()[:1] == b"[":
                yield from _elements(stream.read())
                return
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if line.strip():
                    yield number, line.rstrip(b"\r\n"), ""
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, b"", f"the gzip stream is cut or damaged from here on ({error})"


def _elements(document: bytes) -> Iterator[tuple[int, bytes, str]]:
    """Yield the elements of one JSON list, each with the line where it begins."""
    try:
        text = document.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield (
            document.count(b"\n", 0, error.start) + 1,
            b"",
            f"not UTF-8: byte 0x{document[error.start]:02x}",
        )
        return
    scan, at, number, seen = json.JSONDecoder().raw_decode, _skip(text, 0) + 1, 1, 0
    first = True
    while True:
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if not first and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif not first:
            yield (
                number + text.count("\n", seen, at),
                b"",
                f"not JSON: expected ',' or ']' behind a row of the list, {_found(text, at)}",
            )
            return
        number, seen, first = number + text.count("\n", seen, at), at, False
        try:
            _, end = scan(text, at)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield (
                number,
                text[at : at + 200].encode(),
                f"not JSON: {reason} in the row of the list that begins here",
            )
            return
        element = text[at:end]
        yield number, (f'{{"{TURNS}": {element}}}' if element[0] == "[" else element).encode(), ""
        at = end
    at = _skip(text, at + 1)
    if at < len(text):
        yield (
            number + text.count("\n", seen, at),
            b"",
            f"not JSON: expected nothing behind the list of rows, {_found(text, at)}",
        )


def _found(text: str, at: int) -> str:
    return f"got {text[at]!r}" if at < len(text) else "but the file ends"


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def parse_row(raw: bytes) -> Row:
    """Return the row of a line. Raise BadRow with the reason if the line is not a row."""
    if b"\0" in raw:
        raise BadRow(f"a NUL byte at column {raw.index(0) + 1} (a torn write, or UTF-16?)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        ) from error
    try:
        row = json.loads(text, parse_constant=_not_json, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, got {type_name(row)}")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        # half of a surrogate pair is no character, and a tokenizer refuses it
        except UnicodeEncodeError as error:
            raise BadRow(
                "a lone surrogate escape (\\ud800 to \\udfff) is not a character"
            ) from error
    return row


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in "
            "one object"
        )
    return row


def type_name(value: object) -> str:
    """Return JSON's name for a value's type."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]
