"""Formats of data files: the columns of each, and the records that its rows become. The table is
`FORMATS`.

A format is recognised by the columns of a file's first rows (`detect`), or named by hand
(`shp:FILE`). From then on every row of the file must have this format: a row that lacks a column is
a bad line, and is never read as a simpler format.

Sources  HH-RLHF and its red-team file: Bai et al. (2022), Ganguli et al. (2022). SHP: Ethayarajh et
         al. (2022). WebGPT comparisons: Nakano et al. (2021). Summaries: Stiennon et al. (2020).
         GSM8K: Cobbe et al. (2021). K-wise: Ouyang et al. (2022). MOSS: Zheng et al. (2023). The
         others: TRL's formats.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data import convert as to
from fusedrl.engine.data import fields as get
from fusedrl.engine.data.convert import Reading
from fusedrl.engine.data.lines import TURNS, BadRow, Row
from fusedrl.engine.data.records import (
    Demonstration,
    Dialogue,
    PairExample,
    PromptExample,
    RankedExample,
    ScoredExample,
    StepExample,
    UnpairedExample,
)
from fusedrl.engine.data.templates import Template, template


@dataclass(frozen=True)
class Format:
    """One format of data files.

    Args:
        name: name of the format, as in `name:FILE`.
        columns: columns that every row has.
        reads: record type -> reader of a row.
        refuses: record type -> reason why the format does not hold such records.
        without: columns that no row may have.
        fits: function that tells, by the values of a row, this format from another one with the
            same columns.
        template: default prompt template; None if the rows hold complete prompts.
        caveat: warning to give when demonstrations are read.
    """

    name: str
    columns: tuple[str, ...]
    reads: Mapping[type, Callable[[Row, Reading], Any]]
    refuses: Mapping[type, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True
    template: str | None = None
    caveat: str = ""

    def matches(self, row: Row) -> bool:
        """Whether a row has the columns of this format."""
        return (
            all(name in row for name in self.columns)
            and not any(name in row for name in self.without)
            and self.fits(row)
        )


NOUNS = {
    PromptExample: "prompts",
    Demonstration: "demonstrations",
    Dialogue: "dialogues",
    PairExample: "pairs",
    RankedExample: "ranked answers",
    UnpairedExample: "labelled answers",
    StepExample: "labelled steps",
    ScoredExample: "scored answers",
}


# ---- the table: more columns first ---------------------------------------------------------------
_NOT_TO_IMITATE = (
    "the transcripts are attempts to make an assistant do harm, often with success; "
    "nothing in them is to be imitated"
)
_TABLE = (
    Format(
        "hh-red-team",
        ("transcript", "min_harmlessness_score_transcript", "rating"),
        {PromptExample: to.red_team_prompt},
        refuses={Demonstration: _NOT_TO_IMITATE, Dialogue: _NOT_TO_IMITATE},
    ),
    Format(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_ratio", "post_id"),
        {PairExample: to.shp_pair, PromptExample: to.prompts(to.question("history"))},
        template="dialogue",
    ),
    Format(
        "webgpt",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        {PairExample: to.webgpt_pair, PromptExample: to.prompts(to.question("question.full_text"))},
        template="dialogue",
    ),
    Format(
        "summarize-comparisons",
        ("info", "summaries", "choice"),
        {PairExample: to.comparison, PromptExample: to.prompts(to.in_info)},
    ),
    Format(
        "summarize-axis",
        ("info", "summary"),
        {ScoredExample: to.axes, PromptExample: to.prompts(to.in_info)},
        fits=lambda row: isinstance(row["summary"], dict),
    ),
    Format(
        "tldr",
        ("subreddit", "title", "post", "summary"),
        {Demonstration: to.tldr_demonstration, PromptExample: to.prompts(to.summary_query)},
    ),
    Format(
        "kwise",
        ("prompt", "completions", "ranks"),
        {
            RankedExample: to.ranked,
            PairExample: to.expanded,
            PromptExample: to.prompts(to.given, "prompt", "completions"),
        },
        template="plain",
    ),
    Format(
        "stepwise",
        ("prompt", "completions", "labels"),
        {StepExample: to.steps, PromptExample: to.prompts(to.given, "prompt", "completions")},
        template="plain",
    ),
    Format(
        "unpaired",
        ("prompt", "completion", "label"),
        {
            UnpairedExample: to.unpaired,
            Demonstration: to.desirable,
            PromptExample: to.prompts(to.given, "prompt"),
        },
        fits=lambda row: isinstance(row["label"], bool),
        template="plain",
    ),
    Format(
        "preference",
        ("prompt", "chosen", "rejected"),
        {
            PairExample: to.explicit_pair,
            Demonstration: to.explicit_chosen,
            PromptExample: to.prompts(to.given, "prompt"),
        },
        template="plain",
    ),
    Format(
        "hh-rlhf",
        ("chosen", "rejected"),
        {
            PairExample: to.implicit_pair,
            Demonstration: to.implicit_chosen,
            PromptExample: to.prompts(to.implicit_prompt),
        },
        without=("prompt",),
        fits=lambda row: (
            not isinstance(row["chosen"], list) and not isinstance(row["rejected"], list)
        ),
        caveat="preference data of HH-RLHF's kind is not meant for supervised training of "
        "dialogues; its chosen answers are only the better of two",
    ),
    Format(
        "implicit-preference",
        ("chosen", "rejected"),
        {
            PairExample: to.implicit_pair,
            Demonstration: to.implicit_chosen,
            PromptExample: to.prompts(to.implicit_prompt),
        },
        without=("prompt",),
    ),
    Format(
        "prompt-completion",
        ("prompt", "completion"),
        {
            Demonstration: to.completed,
            Dialogue: to.completed_dialogue,
            PromptExample: to.prompts(to.given, "prompt"),
        },
        template="plain",
    ),
    Format(
        "messages",
        ("messages",),
        {
            Demonstration: to.last_answer("messages"),
            Dialogue: to.dialogues("messages"),
            PromptExample: to.open_prompt("messages"),
        },
    ),
    Format(
        "instruction",
        ("instruction",),
        {Demonstration: to.instructed, PromptExample: to.prompts(to.instruction_prompt)},
        template="alpaca",
    ),
    Format(
        "gsm8k",
        ("question", "answer"),
        {Demonstration: to.gsm8k_demonstration, PromptExample: to.gsm8k_prompt},
        template="qa",
    ),
    Format(
        "moss",
        (TURNS,),
        {
            Demonstration: to.last_answer(TURNS),
            Dialogue: to.dialogues(TURNS),
            PromptExample: to.open_prompt(TURNS),
        },
    ),
    Format("text", ("text",), {Demonstration: to.plain_text}),
    Format(
        "prompt", ("prompt",), {PromptExample: to.prompts(to.given, "prompt")}, template="plain"
    ),
)
FORMATS = {entry.name: entry for entry in _TABLE}


# ---- which one a file has ------------------------------------------------------------------------
def named(name: str) -> Format:
    """Return the format with this name. Raise DataError if there is none; it names the nearest
    one."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        raise DataError(
            f"unknown data format {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(FORMATS)}. A data set is FILE or FORMAT:FILE"
        )
    return FORMATS[name]


def detect(row: Row, kind: type | None) -> Format | None:
    """Return the first format that fits the row and holds records of this kind. If there is none,
    or no kind is asked for, return the first that fits, so that the error can name it."""
    fitting = [entry for entry in FORMATS.values() if entry.matches(row)]
    return next(
        (entry for entry in fitting if kind in entry.reads), fitting[0] if fitting else None
    )


def _nearest(row: Row, kind: type | None) -> str:
    """Return the format of such records, or of any, whose columns are nearest to the row's, and the
    columns that the row lacks."""

    def alike(name: str, found: str) -> float:
        if found.lower() in _LIKELY.get(name, ()):
            return 0.9
        return difflib.SequenceMatcher(None, name, found).ratio()

    def nearness(entry: Format) -> float:
        found = [max((alike(name, one) for one in row), default=0.0) for name in entry.columns]
        return sum(found) / len(found) + (_USUAL if entry.name == _PLAIN.get(kind) else 0.0)

    # the first of the best
    candidates = (entry for entry in FORMATS.values() if kind is None or kind in entry.reads)
    nearest = max(candidates, key=nearness)
    lacking = [name for name in nearest.columns if name not in row]
    found = f"found {', '.join(map(repr, row)) or 'none'}; nearest is {nearest.name}"
    if not lacking:
        return found
    return (
        f"{found}, which needs {' and '.join(map(json.dumps, lacking))} too"
        f"{_other_name(lacking[0], [name for name in row if name not in nearest.columns])}"
    )


_PLAIN: dict[type | None, str] = {  # what most rows are whose columns have other names
    None: "prompt-completion",
    Demonstration: "prompt-completion",
    PairExample: "preference",
    PromptExample: "prompt",
}
_USUAL = 0.2
_LIKELY = {
    "prompt": ("question", "query", "instruction", "input", "problem", "prompts"),
    "completion": ("answer", "response", "output", "solution", "target", "completions"),
    "chosen": ("better", "preferred", "accepted", "winner", "response_chosen"),
    "rejected": ("worse", "dispreferred", "loser", "response_rejected"),
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue"),
    "text": ("content", "story", "document", "passage"),
}


def _other_name(lacking: str, others: list[str]) -> str:
    """Return how to tell which of the other columns is the one that is lacking."""
    if not others:
        return ""
    likely = [name for name in others if name.lower() in _LIKELY.get(lacking, ())]
    ours = {name for entry in FORMATS.values() for name in entry.columns}
    strange = [name for name in others if name not in ours]  # of the others the meaning is known
    near = likely or difflib.get_close_matches(lacking, strange, 1)
    if not near:
        return f"; a column under another name is told by FILE:{lacking}=NAME"
    return f'; if "{near[0]}" holds it, add :{lacking}={near[0]} behind the name of the file'


def unknown_columns(row: Row, kind: type | None) -> str:
    """Return the reason why no format fits: the columns found, and the nearest format."""
    of = "" if kind is None else f" of {NOUNS[kind]}"
    for name, value in row.items():  # another name for the column would not help
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and {"from", "value"} <= set(first):
            return f'"{name}" holds messages {get.SHAREGPT}; and call the column "messages"'
    return f"no format{of} has these columns: {_nearest(row, kind)}"


def check_use(entry: Format, kind: type, row: Row, where: str) -> None:
    """Raise DataError if a file of this format does not hold such records. The message gives the
    reason, and the formats that do."""
    if kind in entry.reads:
        return
    if kind in entry.refuses:
        raise DataError(
            f"{where}: a file of the format {entry.name} is not read as {NOUNS[kind]}: "
            f"{entry.refuses[kind]}"
        )
    formats = ", ".join(other.name for other in FORMATS.values() if kind in other.reads)
    raise DataError(
        f"{where}: a file of the format {entry.name} holds "
        f"{', '.join(NOUNS[other] for other in entry.reads)}, and no {NOUNS[kind]}: "
        f"{_nearest(row, kind)}. Formats that do: {formats}"
    )


def check_row(entry: Format, row: Row) -> None:
    """Raise BadRow unless the row has the format's columns."""
    lacking = [f'"{name}"' for name in entry.columns if name not in row]
    if lacking:
        raise get.missing(row, f"{' and '.join(lacking)} of the format {entry.name}")
    for name in entry.without:
        if name in row:
            raise BadRow(
                f"the file began with rows of the format {entry.name}, which has no column "
                f'"{name}"; this row has one: split the file by format'
            )


def template_of(entry: Format, name: str | None) -> Template:
    """Return the template with this name, or by default the format's own. Raise DataError if a
    template is named but the rows hold complete prompts."""
    if name is not None and entry.template is None:
        raise DataError(
            f"the format {entry.name} takes no prompt template (got {name!r}): its prompts come "
            "whole"
        )
    return template(name or entry.template or "plain")
