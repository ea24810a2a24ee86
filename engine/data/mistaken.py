"""Guesses at what a file is that holds no JSON lines although JSON lines are expected of it."""

from __future__ import annotations

import ast
import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST = 64 * 2**20  # bytes of a file that are read to guess at it


def guess(path: Path) -> str:
    """Return what a file may be, and what to do; "" if nothing is to be seen."""
    head = _head(path, 4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.partition(b"\n")[0]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16; save it as UTF-8"
    if b"\0" in head:
        return "the file is not text; expected JSON lines, CSV, Parquet or Arrow"
    if text[:1] == b"<":
        return "the file is a web page (HTML or XML), perhaps that of a file: download the file"
    if text[:1] == b"{":
        return _of_object(path) or ("" if _is_json(first) else _as_python(first))
    if text[:1] not in (b"[", b'"', b"") and not _is_json(first):
        return (
            "the file is plain text, and a row of JSON lines is an object: "
            '{"text": ...} for a text to learn, {"prompt": ...} for a prompt. CSV is read from a '
            "file that ends in .csv, or with :separator="
        )
    return ""


def _head(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, unpacked."""
    with suppress(OSError, EOFError), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.GzipFile(fileobj=file).read(count) if packed else file.read(count)
    return b""


def _is_json(line: bytes) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return True
    return False


def _of_object(path: Path) -> str:
    """Return what a file is that holds a single JSON object."""
    whole = _head(path, _MOST)
    value: Any = None
    with suppress(ValueError, RecursionError):
        value = json.loads(whole)
    if not isinstance(value, dict):
        return ""
    lists = [key for key, inner in value.items() if isinstance(inner, list) and _are_rows(inner)]
    if lists:
        return (
            f"the file is one JSON object, and its rows lie in the list {lists[0]!r}; write that "
            "list alone"
        )
    if b"\n" in whole.strip():
        return "the file is one JSON object over several lines; write each row on a line"
    return ""


def _are_rows(values: list[Any]) -> bool:
    """Whether a list may be rows; messages are not."""
    return bool(values) and all(
        isinstance(value, dict) and not {"role", "from"} & set(value) for value in values
    )


def _as_python(line: bytes) -> str:
    """Return that the first line is an object as Python prints it, if it is one."""
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if isinstance(ast.literal_eval(line.decode()), dict):
            return (
                "the rows are written as Python prints them, and are not JSON; write them by "
                "json.dumps"
            )
    return ""
