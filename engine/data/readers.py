"""Readers of data files, which return records. A file's format is detected from its first rows, or
named by hand; `formats.FORMATS` lists the formats.

    FILE                       JSONL, or one JSON list of rows; .gz too
    FORMAT:FILE                the same, of this format: shp:train.jsonl
    FORMAT/TEMPLATE:FILE       with another prompt template than the format's own:
                               gsm8k/chat:train.jsonl
    A@2,B@1                    several files; see mixture.py for what the weights do

A bad line is reported and never repaired. The bad lines of all files are collected first and
reported together as `file:line: reason`, before any work on the device. On request, they are
instead written to a rejects file while reading continues.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.convert import Reading, ReadOptions
from fusedrl.engine.data.formats import (
    check_row,
    check_use,
    detect,
    named,
    template_of,
    unknown_columns,
)
from fusedrl.engine.data.lines import BadRow, Dropped, parse_row, read_lines
from fusedrl.engine.data.records import (
    Demonstration,
    Dialogue,
    PairExample,
    Prompt,
    PromptExample,
    RankedExample,
    ScoredExample,
    StepExample,
    UnpairedExample,
)

__all__ = [
    "Demonstration",
    "Dialogue",
    "PairExample",
    "Prompt",
    "PromptExample",
    "RankedExample",
    "ReadOptions",
    "ScoredExample",
    "Source",
    "StepExample",
    "UnpairedExample",
    "load_demonstrations",
    "load_dialogues",
    "load_pairs",
    "load_prompts",
    "load_ranked",
    "load_scored",
    "load_steps",
    "load_unpaired",
    "parse_data",
]

T = TypeVar("T")
_log = logging.getLogger(__name__)

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
SHOWN = 20


# ---- what to read --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Source:
    """One file, with its weight in a mixture, and its format and prompt template if they were named
    (None: to be detected)."""

    path: str
    format: str | None = None
    template: str | None = None
    weight: float | None = None


Data = str | Path | Source | Sequence[str | Path | Source]
_ADDRESS = re.compile(
    r"\b([a-z][a-z0-9+.-]*)://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)/?(?!\S)|\S)*"
)
_FORMAT = re.compile(r"(?P<format>[a-z][a-z0-9-]*)(/(?P<template>[a-z]+))?:(?P<rest>.+)", re.DOTALL)


def parse_data(data: Data) -> list[Source]:
    """Return the files that a --data option names, as described at the top of this file. If a file
    exists under the option's whole text, it is that file.

    Raises:
        DataError: a format or template is unknown, or a weight is not a positive number.
    """
    if isinstance(data, Source):
        return [data]
    if not isinstance(data, str | Path):
        sources = [source for entry in data for source in parse_data(entry)]
        if not sources:
            raise DataError("data: expected at least one file, got none")
        return sources
    if Path(data).exists():
        return [Source(str(data))]
    return [_source(entry.strip()) for entry in str(data).split(",")]


def _source(entry: str) -> Source:
    if not entry:
        raise DataError("data: expected a file, got an empty name")
    if address := _ADDRESS.search(entry):
        how = (
            f"the package datasets, load_dataset({address[2]!r}, "
            "split='train').to_json('train.jsonl')"
            if address[2]
            else f"curl -LO {address[0]}"
            if address[1] in ("http", "https", "ftp")
            else f"the tool that {address[1]}:// belongs to"
        )
        raise DataError(
            f"data: expected a file, got the address {address[0]!r}. Nothing is downloaded here: "
            f"fetch it with {how}; then name the file."
        )
    match = None if Path(entry).exists() else _FORMAT.fullmatch(entry)
    name, style, rest = match.group("format", "template", "rest") if match else (None, None, entry)
    if name is not None:
        template_of(named(name), style)
    path, at, weight = rest.rpartition("@")
    if not at or Path(rest).exists():
        return Source(rest, name, style)
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not 0 < number < math.inf:
        raise DataError(
            f"data: expected a file and a positive number behind the @ of {entry!r}, got "
            f"{weight!r}; and no file has that name"
        )
    return Source(path, name, style, number)


# ---- the readers ---------------------------------------------------------------------------------
def load_prompts(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> list[PromptExample]:
    """Load prompts with their columns, for the policy stages. Every example has the columns of all
    rows; a column that its row lacks is None.

    Raises:
        DataError: there are bad lines (all are listed), nothing in the file is usable, or the files
            hold other records than prompts.
        FileNotFoundError: there is no such file.
    """
    examples, dropped = _load(data, PromptExample, skip_bad_lines, rejects, options)
    _warn(data, dropped)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    clash = [name for name in REWARD_ARGUMENTS if name in names]
    if clash:
        raise DataError(
            f"{_paths(data)}: column {clash[0]!r} has the name of an argument of every reward "
            "(prompts, completions, completion_ids); rename it"
        )
    return [
        PromptExample(example.prompt, {name: example.columns.get(name) for name in names})
        for example in examples
    ]


def load_demonstrations(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> list[Demonstration]:
    """Load prompts with the completions to imitate, for SFT. Rows with an empty completion are
    dropped, and a warning gives their number. Raise the errors of `load_prompts`."""
    examples, dropped = _load(data, Demonstration, skip_bad_lines, rejects, options)
    _warn(data, dropped)
    return examples


def load_pairs(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[PairExample], dict[str, int]]:
    """Load preference pairs, for pairwise reward models and DPO. Also return how many rows were
    dropped for each reason (the prompts differ, an answer is empty, the answers are equal, a tie,
    ...). Raise the errors of `load_prompts`."""
    return _load(data, PairExample, skip_bad_lines, rejects, options)


def load_ranked(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[RankedExample], dict[str, int]]:
    """Load ranked lists of answers, for K-wise reward models. Also return how many rows were
    dropped for each reason. Raise the errors of `load_prompts`."""
    return _load(data, RankedExample, skip_bad_lines, rejects, options)


def load_unpaired(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[UnpairedExample], dict[str, int]]:
    """Load answers labelled as wanted or not, for KTO. Also return how many rows were dropped for
    each reason. Raise the errors of `load_prompts`."""
    return _load(data, UnpairedExample, skip_bad_lines, rejects, options)


def load_steps(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[StepExample], dict[str, int]]:
    """Load answers with a label for every step, for process reward models. Also return how many
    rows were dropped for each reason. Raise the errors of `load_prompts`."""
    return _load(data, StepExample, skip_bad_lines, rejects, options)


def load_scored(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[ScoredExample], dict[str, int]]:
    """Load answers scored by people, to evaluate a reward model. Also return how many rows were
    dropped for each reason. Raise the errors of `load_prompts`."""
    return _load(data, ScoredExample, skip_bad_lines, rejects, options)


def load_dialogues(
    data: Data,
    *,
    skip_bad_lines: bool = False,
    rejects: str | Path | None = None,
    options: ReadOptions | None = None,
) -> tuple[list[Dialogue], dict[str, int]]:
    """Load whole conversations, for SFT on every turn of the assistant. Also return how many rows
    were dropped for each reason. Raise the errors of `load_prompts`."""
    return _load(data, Dialogue, skip_bad_lines, rejects, options)


def _warn(data: Data, dropped: dict[str, int]) -> None:
    for reason, count in dropped.items():
        _log.warning("%s: %d rows dropped: %s", _paths(data), count, reason)


def _paths(data: Data) -> str:
    return ", ".join(source.path for source in parse_data(data))


# ---- one pass over the files ---------------------------------------------------------------------
@dataclass
class _Found:
    """Records, bad lines and dropped rows of one file or several."""

    items: list[Any] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[Path, int, str, bytes]] = field(default_factory=list)


def _load(
    data: Data, kind: type[T], skip: bool, rejects: str | Path | None, options: ReadOptions | None
) -> tuple[list[T], dict[str, int]]:
    total, sources = _Found(), parse_data(data)
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        raise DataError(
            f"{_paths(data)}: expected files without weights here, where they are read one behind "
            "the other; `mixture.mix` is what follows weights"
        )
    for source in sources:
        found = _read(source, kind, options or ReadOptions())
        if not found.items and (skip or not found.bad):
            why = [f"{len(found.bad)} bad, the first: {found.bad[0][2]}"] if found.bad else []
            why += [f"{count} dropped: {name}" for name, count in found.dropped.items()]
            raise DataError(
                f"{source.path}: no usable row ({'; '.join(why) or 'the file is empty'}); expected "
                "one JSON object per line"
            )
        total.items += found.items
        total.dropped += found.dropped
        total.bad += found.bad
    if total.bad and not skip:
        shown = "\n".join(
            f"{path}:{number}: {reason}" for path, number, reason, _ in total.bad[:SHOWN]
        )
        more = f"\n... and {len(total.bad) - SHOWN} more" if len(total.bad) > SHOWN else ""
        raise DataError(
            f"{shown}{more}\n{len(total.bad)} bad line{'s'[: len(total.bad) != 1]}, "
            f"{len(total.items)} good; mend the file, or set skip_bad_lines"
        )
    if total.bad and rejects is not None:
        _write_rejects(Path(rejects), total.bad, {str(Path(source.path)) for source in sources})
        _log.warning(
            "%s: %d bad lines left out; they are in %s", _paths(data), len(total.bad), rejects
        )
    return total.items, dict(total.dropped)


def _read(source: Source, kind: type, options: ReadOptions) -> _Found:
    path, found = Path(source.path), _Found()
    entry = named(source.format) if source.format is not None else None
    reading: Reading | None = None
    for number, raw, fault in read_lines(path):
        try:
            if fault:
                raise BadRow(fault)
            row = parse_row(raw)
            entry = entry or detect(row, kind)
            if entry is None:
                raise BadRow(unknown_columns(row, kind))
            if reading is None:  # the first row of a format that is known
                check_use(entry, kind, row, str(path))
                reading = Reading(options, template_of(entry, source.template))
                if entry.caveat and kind is Demonstration:
                    _log.warning("%s: %s", path, entry.caveat)
            check_row(entry, row)
            example = entry.reads[kind](row, reading)
            found.items += example if isinstance(example, list) else [example]
        except BadRow as reason:
            found.bad.append((path, number, str(reason), raw))
        except Dropped as reason:
            found.dropped[str(reason)] += 1
    return found


def _write_rejects(rejects: Path, bad: list[tuple[Path, int, str, bytes]], paths: set[str]) -> None:
    """Write the bad lines to the rejects file. Replace those that an earlier reading of the same
    files left there; keep the rest."""
    rejects.parent.mkdir(parents=True, exist_ok=True)
    old = rejects.read_text(encoding="utf-8").splitlines() if rejects.exists() else []
    kept = [line for line in old if json.loads(line)["file"] not in paths]
    new = (
        json.dumps(
            {
                "file": str(path),
                "line": number,
                "reason": reason,
                "raw": raw.decode("utf-8", "backslashreplace"),
            }
        )
        for path, number, reason, raw in bad
    )
    rejects.write_text("".join(f"{line}\n" for line in chain(kept, new)), encoding="utf-8")
