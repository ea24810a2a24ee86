"""Words of a data option, and the sources that they name.

    FILE                       JSON lines or one JSON list of rows (.gz too), CSV, TSV (.gz too),
                               Parquet, or Arrow
    hf:ID:SPLIT                a data set of the Hugging Face hub, or a directory that `datasets`
                               reads; SPLIT is train if it is left out
    FORMAT:FILE                a source of this format: shp:train.jsonl
    FORMAT/TEMPLATE:FILE       with another prompt template than the format's own:
                               gsm8k/chat:train.jsonl
    FILE:prompt=question       a column under another name: the column "question" is read as
                               "prompt". Dots lead into nested objects. `image=` leaves a column out
    FILE:separator=semicolon   CSV with another separator: tab, semicolon, pipe, space, or itself
    FILE:header=prompt+answer  CSV without a header: the names of its columns
    hf:ID:SPLIT:config=main    a configuration of the data set; `revision=` is one of its versions
    A@2,B@1                    several sources; mixture.py says what the weights do

What these words cannot say (a name with a comma, say), a mapping can: {"path": FILE, "columns":
{"prompt": "question"}, "weight": 2}. A list holds several. YAML and Python write mappings as they
are, the command line as JSON.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.formats import named, template_of

HUB = "hf:"
SEPARATORS = {
    "comma": ",",
    "tab": "\t",
    "semicolon": ";",
    "pipe": "|",
    "space": " ",
    "colon": ":",
}


@dataclass(frozen=True)
class Source:
    """One file or data set of a hub, and how it is read.

    Args:
        path: file, or "hf:" with the id of a data set or a directory.
        format: name of the format; None: it is recognised.
        template: name of the prompt template; None: the format's own.
        weight: weight in a mixture.
        columns: our name of a column -> its name in the source; "" leaves the column out.
        separator: character between the fields of CSV; None: a tab in .tsv files, else a comma.
        header: names of the columns of CSV without a header.
        split: split of a data set; None: train.
        config: configuration of a data set.
        revision: version of a data set: a branch, a tag or a commit.

    Raises:
        DataError: an option does not belong to such a source, or has a value that cannot be.
    """

    path: str
    format: str | None = None
    template: str | None = None
    weight: float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    separator: str | None = None
    header: tuple[str, ...] | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        where = f"data: {self.path!r}: "
        if self.separator is not None:
            separator = SEPARATORS.get(self.separator, self.separator)
            object.__setattr__(self, "separator", separator)
            if len(separator) != 1 or separator in '\r\n"':
                raise DataError(
                    f"{where}expected separator to be one character, or one of "
                    f"{', '.join(SEPARATORS)}, got {self.separator!r}"
                )
        for name in ("split", "config", "revision"):
            if getattr(self, name) is not None and not self.of_hub:
                raise DataError(
                    f"{where}{name} belongs to a data set of the hub, which is written "
                    f"{HUB}ORGANISATION/NAME"
                )
        for name in ("separator", "header"):
            if getattr(self, name) is not None and self.of_hub:
                raise DataError(f"{where}{name} belongs to a CSV file; leave it out")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise DataError(f"{where}expected weight to be a positive number, got {self.weight!r}")

    @property
    def of_hub(self) -> bool:
        """Whether the source is a data set of the hub, or a directory that `datasets` reads."""
        return self.path.startswith(HUB)

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        parts = (self.path, self.config, self.split)
        return ":".join(part for part in parts if part is not None)


Data = str | Path | Source | Mapping[str, Any] | Sequence[str | Path | Source | Mapping[str, Any]]
_OPTIONS = ("separator", "header", "split", "config", "revision")  # the other words name columns
_ADDRESS = re.compile(
    r"\b([a-z][a-z0-9+.-]*)://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)/?(?!\S)|\S)*"
)
_HUB_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)/?")
_FORMAT = re.compile(
    r"(?P<format>(?!hf:)[a-z][a-z0-9-]*)(/(?P<template>[a-z]+))?:(?P<rest>.+)", re.DOTALL
)


def parse_data(data: Data) -> list[Source]:
    """Return the sources that a data option names, as described at the top of this file. If a file
    exists under the option's whole text, it is that file.

    Raises:
        DataError: a format, template or key is unknown, or a value cannot be.
    """
    if isinstance(data, Source):
        return [data]
    if isinstance(data, Mapping):
        return [_of_mapping(data)]
    if not isinstance(data, str | Path):
        sources = [source for entry in data for source in parse_data(entry)]
        if not sources:
            raise DataError("data: expected at least one file, got none")
        return sources
    if Path(data).exists():
        return [Source(str(data))]
    if (listed := _json(str(data))) is not None:
        return parse_data(listed)
    return [_source(entry.strip()) for entry in str(data).split(",")]


def _json(text: str) -> Any:
    """Return the mapping or list that a text is in JSON; None if it is neither."""
    if not (text.lstrip().startswith(('{"', "[")) and text.rstrip().endswith(("}", "]"))):
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"data: expected a file, or a mapping or list of files in JSON, got {text!r:.200}: "
            f"{error}"
        ) from error
    return found if isinstance(found, dict | list) else None


def _of_mapping(entry: Mapping[str, Any]) -> Source:
    """Return the source that a mapping of `Source`'s fields describes."""
    kinds: dict[str, tuple[type, ...]] = {one.name: (str,) for one in fields(Source)}
    kinds |= {"weight": (int, float), "columns": (Mapping,), "header": (list, tuple)}
    kinds["path"] = (str, Path)
    for key, value in entry.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, 1)
            raise DataError(
                f"data: unknown key {key!r}{f', did you mean {near[0]!r}?' if near else ''}; a "
                f"source has {', '.join(kinds)}"
            )
        if value is not None and (not isinstance(value, kinds[key]) or isinstance(value, bool)):
            words = {"weight": "a number", "columns": "a mapping of names", "header": "a list"}
            raise DataError(f"data: expected {key} to be {words.get(key, 'a text')}, got {value!r}")
    given = {key: value for key, value in entry.items() if value is not None}
    path = given.pop("path", None)
    if not path:
        raise DataError(f"data: expected a mapping with the key path, got {dict(entry)!r:.200}")
    if "header" in given:
        given["header"] = tuple(map(str, given["header"]))
    if "columns" in given:
        given["columns"] = {
            str(ours): "" if theirs is None else str(theirs)
            for ours, theirs in given["columns"].items()
        }
    plain = str(path).startswith(HUB) and not Path(path).exists()
    base = _hub(str(path)) if plain else {"path": str(path)}
    if "format" in given:
        template_of(named(given["format"]), given.get("template"))
    return Source(**{**base, **given})


def _source(entry: str) -> Source:
    """Return the source that one entry of a data option names."""
    if not entry:
        raise DataError(
            "data: expected a file, got an empty name; before and behind a comma stands a file"
        )
    _refuse_address(entry)
    if Path(entry).exists():
        return Source(entry)
    match = _FORMAT.fullmatch(entry)
    name, style, rest = match.group("format", "template", "rest") if match else (None, None, entry)
    if name is not None:
        template_of(named(name), style)
    if Path(rest).exists():
        return Source(rest, name, style)
    path, at, weight = rest.rpartition("@")
    number: float | None = None
    if at:
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not path or not 0 < number < math.inf:
            raise DataError(
                f"data: expected a file and a positive number behind the @ of {entry!r}, got "
                f"{weight!r}; and no file has that name"
            )
        rest = path
    return Source(**_words(rest), format=name, template=style, weight=number)


def _words(text: str) -> dict[str, Any]:
    """Return the fields of `Source` in FILE:key=value:... or hf:ID:SPLIT:key=value:..."""
    if Path(text).exists():
        return {"path": text}
    parts = re.split(r":(?![^\[]*\])", text)  # a colon in brackets belongs to a split
    end = len(parts)
    while end > 1 and "=" in parts[end - 1] and not Path(":".join(parts[:end])).exists():
        end -= 1
    path = ":".join(parts[:end])
    of_hub = path.startswith(HUB) and not Path(path).exists()
    found: dict[str, Any] = _hub(path) if of_hub else {"path": path}
    columns: dict[str, str] = {}
    for part in parts[end:]:
        key, _, value = (word.strip() for word in part.partition("="))
        if not key:
            raise DataError(
                f"data: expected NAME=COLUMN behind a colon of {text!r}, got {part!r}: such as "
                "prompt=question"
            )
        if key in columns or (key in found and key in _OPTIONS):
            raise DataError(f"data: {key} stands twice in {text!r}; leave one out")
        if key not in _OPTIONS:
            columns[key] = value
        elif key == "header":
            found[key] = tuple(value.split("+"))
        else:
            found[key] = value
    return found | {"columns": columns}


def _hub(text: str) -> dict[str, Any]:
    """Return path and split of hf:ID:SPLIT."""
    name, *split = re.split(r":(?![^\[]*\])", text.removeprefix(HUB))
    if not name or len(split) > 1 or not (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or "/" in name):
        raise DataError(
            f"data: expected {HUB}ORGANISATION/NAME or {HUB}ORGANISATION/NAME:SPLIT, got {text!r}"
        )
    return {"path": HUB + name} | ({"split": split[0]} if split and split[0] else {})


def _refuse_address(entry: str) -> None:
    """Raise DataError for a web address; it says how to fetch what is there."""
    if hub := _HUB_ADDRESS.search(entry):
        raise DataError(f"data: expected a file, got the address {hub[0]!r}; write {HUB}{hub[1]}")
    address = _ADDRESS.search(entry)
    if address is None:
        return
    if address[2]:
        raise DataError(
            f"data: expected a file, got the address {address[0]!r}; a data set of the hub is "
            f"written {HUB}{address[2]}"
        )
    how = (
        f"curl -LO {address[0]}"
        if address[1] in ("http", "https", "ftp")
        else f"the tool that {address[1]}:// belongs to"
    )
    raise DataError(
        f"data: expected a file, got the address {address[0]!r}. Files are not downloaded here: "
        f"fetch it with {how}; then name the file."
    )
