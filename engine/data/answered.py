"""Reading of the answers that a data file of any format holds, each prompt with its columns, to try
a reward on."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.convert import Reading, ReadOptions
from fusedrl.engine.data.fields import answer
from fusedrl.engine.data.formats import FORMATS, Format, check_row, named, template_of
from fusedrl.engine.data.lines import BadRow, Dropped, Row
from fusedrl.engine.data.readers import REWARD_ARGUMENTS, SHOWN, Data, Source, parse_data
from fusedrl.engine.data.records import (
    AnsweredExample,
    Demonstration,
    PairExample,
    PromptExample,
    RankedExample,
    ScoredExample,
    UnpairedExample,
)
from fusedrl.engine.data.rows import read_rows

_KINDS = (RankedExample, PairExample, UnpairedExample, ScoredExample, Demonstration)
_log = logging.getLogger(__name__)


def load_answered(data: Data) -> list[AnsweredExample]:
    """Load the answers of files: the two of a pair, ranked ones, completions, answers of GSM8K. The
    columns are those that a reward gets in training. A column that a row lacks is None.

    Raises:
        DataError: there are bad lines, no usable row, or no answers in a file.
        FileNotFoundError: there is no such file.
    """
    found: list[AnsweredExample] = []
    bad: list[str] = []
    dropped: Counter[str] = Counter()
    for source in parse_data(data):
        before = len(found)
        _read(source, found, bad, dropped)
        if len(found) == before and not bad:
            why = "; ".join(f"{count} dropped: {name}" for name, count in dropped.items())
            raise DataError(f"{source.name}: no usable row ({why or 'the file is empty'})")
    if bad:
        more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(
            "\n".join(bad[:SHOWN]) + f"{more}\n{len(bad)} bad line{'s'[: len(bad) != 1]}, "
            f"{len(found)} good; mend the file"
        )
    for reason, count in dropped.items():
        _log.warning("%d rows dropped: %s", count, reason)
    names = dict.fromkeys(name for example in found for name in example.columns)
    return [
        AnsweredExample(
            one.prompt, one.completions, one.ranks, {n: one.columns.get(n) for n in names}
        )
        for one in found
    ]


def _read(
    source: Source, found: list[AnsweredExample], bad: list[str], dropped: Counter[str]
) -> None:
    path = source.name
    entry = named(source.format) if source.format is not None else None
    reading: Reading | None = None
    for one in read_rows(source):
        row, number = one.row, one.number
        try:
            if one.fault:
                raise BadRow(one.fault)
            entry = entry or _format_of(row)
            if entry is None or not any(kind in entry.reads for kind in _KINDS):
                raise DataError(
                    f"{path}:{number}: expected rows with answers, such as prompt and completion, "
                    f"or prompt, chosen and rejected; found {', '.join(map(repr, row)) or 'none'}. "
                    "Give --model for completions of a model"
                )
            reading = reading or Reading(
                ReadOptions(min_score_ratio=1.0), template_of(entry, source.template)
            )
            check_row(entry, row)
            found.append(_answered(entry, row, reading))
        except BadRow as reason:
            bad.append(f"{path}:{number}: {reason}")
        except Dropped as reason:
            dropped[str(reason)] += 1


def _format_of(row: Row) -> Format | None:
    return next(
        (
            entry
            for entry in FORMATS.values()
            if entry.matches(row) and any(kind in entry.reads for kind in _KINDS)
        ),
        None,
    )


def _answered(entry: Format, row: Row, reading: Reading) -> AnsweredExample:
    columns = _columns(entry, row, reading)
    if entry.name == "prompt-completion" and PromptExample in entry.reads:
        # a demonstration may not be empty; an answer to look at may
        prompt = entry.reads[PromptExample](row, reading).prompt
        return AnsweredExample(prompt, (answer(row, "completion"),), (), columns)
    kind = next(kind for kind in _KINDS if kind in entry.reads)
    one: Any = entry.reads[kind](row, reading)
    if isinstance(one, RankedExample):
        return AnsweredExample(one.prompt, one.completions, one.ranks, columns)
    if isinstance(one, PairExample):
        return AnsweredExample(one.prompt, (one.chosen, one.rejected), (1, 2), columns)
    return AnsweredExample(one.prompt, (one.completion,), (), columns)


def _columns(entry: Format, row: Row, reading: Reading) -> dict[str, Any]:
    """Return the columns that a reward gets of this row in training."""
    columns = {name: value for name, value in row.items() if name not in entry.columns}
    try:
        if PromptExample in entry.reads:
            columns = entry.reads[PromptExample](row, reading).columns
    except (BadRow, Dropped):  # as a conversation that ends with the answer
        pass
    return {name: value for name, value in columns.items() if name not in REWARD_ARGUMENTS}
