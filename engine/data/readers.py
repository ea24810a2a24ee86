"""Readers of data, which return records. A source's format is detected from its first rows, or
named by hand; `formats.FORMATS` lists the formats, and sources.py says how sources are named.

A bad line is reported and never repaired. The bad lines of all files are collected first and
reported together as `file:line: reason`, before any work on the device. On request, they are
instead written to a rejects file while reading continues.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.convert import Reading, ReadOptions
from fusedrl.engine.data.delimited import NO_HEADER, other_separator
from fusedrl.engine.data.formats import (
    Format,
    check_row,
    check_use,
    detect,
    named,
    template_of,
    unknown_columns,
)
from fusedrl.engine.data.lines import BadRow, Dropped, Row, RowRead
from fusedrl.engine.data.mistaken import guess
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
from fusedrl.engine.data.rows import EXPECTED, kind_of, read_rows
from fusedrl.engine.data.sources import Data, Source, parse_data

__all__ = [
    "Data",
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


def prompt_columns(data: Data, *, whole: bool) -> list[str]:
    """Return the columns that prompts have: those of the first row of each source or, with `whole`,
    of all rows. Bad rows are passed over; `load_prompts` reports them.

    Raises:
        DataError, FileNotFoundError: as `load_prompts`, but for bad lines.
    """
    names: dict[str, None] = {}
    for source in parse_data(data):
        found = Found(kind=PromptExample)
        found.format = named(source.format) if source.format is not None else None
        for one in read_rows(source):
            with suppress(BadRow, Dropped):
                for example in _records(one, source, found, ReadOptions()):
                    names |= dict.fromkeys(example.columns)
                if not whole:
                    break
    return list(names)


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
    return ", ".join(source.name for source in parse_data(data))


# ---- one pass over the sources -------------------------------------------------------------------
@dataclass
class Found:
    """Records of one source or several, and what became of the other rows.

    Attributes:
        items: records.
        dropped: reason -> number of well-formed rows that hold no record.
        bad: (source, line or row, reason, bytes) of each row that cannot be used.
        rows: number of rows that were read.
        format: format of the source; None if no row has one.
        kind: type of the records.
        columns: names of the columns of the first row that can be read.
        reading: template of the source, and what its format counts.
    """

    items: list[Any] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, int, str, bytes]] = field(default_factory=list)
    rows: int = 0
    format: Format | None = None
    kind: type | None = None
    columns: tuple[str, ...] = ()
    reading: Reading | None = None


def _load(
    data: Data, kind: type[T], skip: bool, rejects: str | Path | None, options: ReadOptions | None
) -> tuple[list[T], dict[str, int]]:
    total, sources = Found(), parse_data(data)
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        raise DataError(
            f"{_paths(data)}: expected files without weights here, where they are read one behind "
            "the other; `mixture.mix` is what follows weights"
        )
    for source in sources:
        found = read_source(source, kind, options or ReadOptions())
        if not found.items and (skip or not found.bad or _mistaken(source, found)):
            raise nothing_usable(source, found)
        total.items += found.items
        total.dropped += found.dropped
        total.bad += found.bad
    if total.bad and not skip:
        raise DataError(
            "\n".join(described(total.bad))
            + f"\n{len(total.bad)} bad line{'s'[: len(total.bad) != 1]}, "
            f"{len(total.items)} good; mend the file"
            + (", or set skip_bad_lines" if total.items else "")
        )
    if total.bad and rejects is not None:
        _write_rejects(Path(rejects), total.bad, {source.name for source in sources})
        _log.warning(
            "%s: %d bad lines left out; they are in %s", _paths(data), len(total.bad), rejects
        )
    return total.items, dict(total.dropped)


def _mistaken(source: Source, found: Found) -> str:
    """Return what a source without a row of any format may be instead of JSON lines; "" if nothing
    is to be seen."""
    if not found.bad or found.format is not None or kind_of(source) != "json":
        return ""
    return guess(Path(source.path))


def nothing_usable(source: Source, found: Found) -> DataError:
    """Return the error for a source without a record; it says what became of its rows."""
    if what := _mistaken(source, found):
        return DataError(f"{source.name}: no usable row; {what}")
    why = [f"{len(found.bad)} bad, the first: {found.bad[0][2]}"] if found.bad else []
    why += [f"{count} dropped: {name}" for name, count in found.dropped.items()]
    expected = f"; expected {EXPECTED[kind_of(source)]}" if not found.dropped else ""
    return DataError(
        f"{source.name}: no usable row ({'; '.join(why) or 'the file is empty'}){expected}"
    )


def described(bad: Sequence[tuple[str, int, str, bytes]]) -> Iterator[str]:
    """Yield `source:line: reason` for bad rows, one line for all rows of a source with the same
    reason; of many lines the first."""
    alike: dict[tuple[str, str], list[int]] = {}
    for name, number, reason, _ in bad:
        alike.setdefault((name, reason), []).append(number)
    for (name, reason), numbers in list(alike.items())[:SHOWN]:
        others = ", ".join(map(str, numbers[1:SHOWN])) + ", ..." * (len(numbers) > SHOWN)
        more = f" (as in {len(numbers) - 1} more: {others})" if len(numbers) > 1 else ""
        yield f"{name}:{numbers[0]}: {reason}{more}"
    if len(alike) > SHOWN:
        yield f"... and {sum(map(len, list(alike.values())[SHOWN:]))} more"


def read_source(
    source: Source,
    kind: type | None,
    options: ReadOptions,
    *,
    most: int | None = None,
    streaming: bool = False,
) -> Found:
    """Read one source.

    Args:
        kind: type of the records; None takes the first that the source's format holds.
        most: largest number of rows to read; None reads all.
        streaming: fetch a data set of the hub row by row.
    Raises:
        DataError: the format holds no such records, or the source cannot be read.
        FileNotFoundError: there is no such file.
    """
    found = Found(kind=kind)
    found.format = named(source.format) if source.format is not None else None
    for one in islice(read_rows(source, streaming=streaming), most):
        found.rows += 1
        try:
            found.items += _records(one, source, found, options)
        except BadRow as reason:
            raw = one.raw or json.dumps(one.row).encode()
            found.bad.append((source.name, one.number, str(reason), raw))
        except Dropped as reason:
            found.dropped[str(reason)] += 1
    return found


def _records(one: RowRead, source: Source, found: Found, options: ReadOptions) -> list[Any]:
    """Return the records of a row. The first row with a known format settles the format, the kind
    and the template of the source."""
    if one.fault:
        raise BadRow(one.fault)
    row = one.row
    found.columns = found.columns or tuple(row)
    entry = found.format = found.format or detect(row, found.kind)
    if entry is None:
        raise BadRow(_unknown(row, source, found.kind))
    kind = found.kind = found.kind or next(iter(entry.reads))
    if found.reading is None:
        check_use(entry, kind, row, source.name)
        found.reading = Reading(options, template_of(entry, source.template))
        if entry.caveat and kind is Demonstration:
            _log.warning("%s: %s", source.name, entry.caveat)
    check_row(entry, row)
    example = entry.reads[kind](row, found.reading)
    return example if isinstance(example, list) else [example]


def _unknown(row: Row, source: Source, kind: type | None) -> str:
    """Return the reason why no format has a row's columns."""
    if kind_of(source) != "csv":
        return unknown_columns(row, kind)
    wrong = other_separator(list(row), source.separator)
    return wrong or unknown_columns(row, kind) + NO_HEADER * (source.header is None)


def _write_rejects(rejects: Path, bad: list[tuple[str, int, str, bytes]], names: set[str]) -> None:
    """Write the bad lines to the rejects file. Replace those that an earlier reading of the same
    sources left there; keep the rest."""
    rejects.parent.mkdir(parents=True, exist_ok=True)
    old = rejects.read_text(encoding="utf-8").splitlines() if rejects.exists() else []
    kept = [line for line in old if json.loads(line)["file"] not in names]
    new = (
        json.dumps(
            {
                "file": name,
                "line": number,
                "reason": reason,
                "raw": raw.decode("utf-8", "backslashreplace"),
            }
        )
        for name, number, reason, raw in bad
    )
    rejects.write_text("".join(f"{line}\n" for line in chain(kept, new)), encoding="utf-8")
