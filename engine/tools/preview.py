"""Preview of data: what a stage makes of the first rows of a source, without a model's weights.

Rows are read and tokenised by the functions that the stages use, so what the preview shows is what
a run learns from.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusedrl.engine.base import tables
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.printable import printable, shortened
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.data.formats import NOUNS, Format
from fusedrl.engine.data.readers import (
    REWARD_ARGUMENTS,
    Demonstration,
    Dialogue,
    Found,
    PairExample,
    PromptExample,
    RankedExample,
    ReadOptions,
    Source,
    UnpairedExample,
    described,
    nothing_usable,
    read_source,
)
from fusedrl.engine.data.rows import kind_of
from fusedrl.engine.data.tokenize import (
    count_tokens,
    encode_completion,
    encode_demonstrations,
    encode_dialogues,
    encode_prompt,
    encode_prompts,
    end_of_text,
    no_tokenizer,
    without_template,
)
from fusedrl.engine.preference.comparisons import Comparison, encode_preferences

STAGES: dict[type, tuple[str, ...]] = {
    Demonstration: ("sft",),
    Dialogue: ("sft with every_turn",),
    PairExample: ("reward", "dpo"),
    RankedExample: ("reward",),
    UnpairedExample: ("kto",),
    PromptExample: ("rejection", *ALGORITHMS),
}  # the stages that read each kind of record
FILES = {
    "json": "JSON",
    "csv": "CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "hub": "a data set",
}
NO_LIMIT = 2**62
LONGEST = 1500  # characters of an example's line on the terminal
BINS = 8


@dataclass(frozen=True)
class Segment:
    """Part of an example's text. `role` is prompt, trained, masked (neither trained on nor part of
    the first prompt), chosen, rejected or ranked; `special` marks a special token."""

    text: str
    role: str
    special: bool = False


@dataclass(frozen=True)
class Line:
    """One sequence of an example: its name, and its segments."""

    name: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Lengths:
    """Summary of some lengths.

    Attributes:
        p95: length that 95% of them do not exceed.
        histogram: (first, last, count) of each bin.
    """

    min: int
    median: float
    p95: int
    max: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass
class Preview:
    """Result of reading the first rows of a source as a stage does.

    Attributes:
        file: kind of the source: JSON, CSV, Parquet, Arrow, a data set.
        format, why: its format, and how that was recognised.
        records: what its rows are read as.
        stages: the stages that read it, by kind of record.
        rows, used: rows that were read, and records that a run would use.
        whole: whether these are all rows of the source.
        dropped: reason -> number of rows or records that are left out.
        bad: messages about rows that cannot be used; without skip_bad_lines a run stops at them.
        unit: what lengths count: tokens, or characters without a model.
        limit: largest length that is used.
        lengths: part of a record -> its lengths; "whole" is what the limit holds for.
        examples: the first records that are used.
        told: what else there is to know of them.
    """

    source: str
    file: str
    columns: tuple[str, ...]
    format: str
    why: str
    records: str
    stages: dict[str, tuple[str, ...]]
    rows: int
    whole: bool = True
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    bad_rows: int = 0
    unit: str = "characters"
    limit: int | None = None
    lengths: dict[str, Lengths] = field(default_factory=dict)
    examples: list[list[Line]] = field(default_factory=list)
    told: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the preview as JSON values."""
        return asdict(self) | {"dropped": dict(self.dropped)}


@dataclass(frozen=True)
class Model:
    """The parts of a model that texts need: its tokenizer, EOS ids and number of positions."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    positions: int


@dataclass(frozen=True)
class Wanted:
    """Options of a preview.

    Args:
        kind: type of the records; None takes the format's first.
        rows: rows to read; 0 reads all.
        show: examples to show.
        max_length: largest number of tokens of an example; of a prompt, for prompts. None: the
            model's.
        max_new_tokens: tokens that prompts leave room for.
        soft_labels: use ties as well, as dpo does.
    """

    kind: type | None = None
    rows: int = 1000
    show: int = 2
    max_length: int | None = None
    max_new_tokens: int = 64
    soft_labels: bool = False


def load_model(path: str) -> Model:
    """Read tokenizer and configuration of a model; its weights are not read.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it is of an unknown family.
        DataError: it has no tokenizer.
    """
    from fusedrl.engine.model.weights import load_tokenizer, read_model_config

    config, tokenizer = read_model_config(path), load_tokenizer(path)
    if tokenizer is None:
        raise no_tokenizer()
    return Model(tokenizer, tuple(config.eos_token_ids), config.max_positions)


def preview(source: Source, wanted: Wanted, model: Model | None = None) -> Preview:
    """Read the first rows of a source as a stage does.

    Raises:
        DataError: no row can be used, or the source is of another kind than is wanted.
        FileNotFoundError: there is no such file.
        ConfigError: no stage reads the records of the source.
    """
    counter = None if model is None else partial(count_tokens, model.tokenizer)
    options = ReadOptions(soft_labels=wanted.soft_labels, count_tokens=counter)
    found = read_source(
        source,
        wanted.kind,
        options,
        most=wanted.rows or None,
        streaming=wanted.rows > 0 and source.of_hub,
    )
    entry, kind = found.format, found.kind
    if entry is None or kind is None or not found.items:
        raise nothing_usable(source, found)
    if kind not in STAGES:
        others = [NOUNS[other] for other in entry.reads if other in STAGES]
        raise ConfigError(
            f"{source.name}: no stage reads {NOUNS[kind]}, which the format {entry.name} holds"
            + (f"; it also holds {', '.join(others)}: choose a stage with --stage" * bool(others))
        )
    shown = Preview(
        source=source.name,
        file=FILES[kind_of(source)],
        columns=found.columns,
        format=entry.name,
        why=_why(entry, source),
        records=NOUNS[kind],
        stages={NOUNS[one]: STAGES[one] for one in entry.reads if one in STAGES},
        rows=found.rows,
        whole=not wanted.rows or found.rows < wanted.rows,
        dropped=Counter(found.dropped),
        bad=list(described(found.bad)),
        bad_rows=len(found.bad),
    )
    _check_columns(shown, found, kind)
    records = list(_of_texts(found) if model is None else _of_tokens(found, model))
    _measure(shown, records, _limit(kind, wanted, model), wanted.show)
    if model is not None:
        shown.unit = "tokens"
        prompts = [one.prompt for one in found.items if hasattr(one, "prompt")]
        if told := without_template(model.tokenizer, prompts):
            shown.told = f"prompts: {told}"
    return shown


def _why(entry: Format, source: Source) -> str:
    if source.format is not None:
        return "named by hand"
    names = ", ".join(entry.columns)
    without = f" and no {', '.join(entry.without)}" if entry.without else ""
    return f"the first row has the column{'s'[: len(entry.columns) > 1]} {names}{without}"


def _check_columns(shown: Preview, found: Found, kind: type) -> None:
    """Tell of columns of prompts that have the name of an argument of every reward, at which a run
    stops."""
    if kind is PromptExample:
        names = {name for example in found.items for name in example.columns}
        shown.bad += [
            f'column "{name}" has the name of an argument of every reward; rename it with '
            f"FILE:other={name}, or leave it out with FILE:{name}="
            for name in REWARD_ARGUMENTS
            if name in names
        ]


def _limit(kind: type, wanted: Wanted, model: Model | None) -> int | None:
    """Return the largest number of tokens of a record; None without a model."""
    if model is None:
        return None
    room = model.positions - (wanted.max_new_tokens if kind is PromptExample else 0)
    if room < 1:
        raise ConfigError(
            f"data: expected --max_new_tokens below the model's {model.positions} positions, got "
            f"{wanted.max_new_tokens}"
        )
    return min(room, wanted.max_length or room)


# ---- records as lines ----------------------------------------------------------------------------
@dataclass(frozen=True)
class _Record:
    """A record: the length of each of its parts, the length that the limit holds for, and a
    function that returns its lines. `useless` is why it is not used whatever its length, or ""."""

    parts: dict[str, int]
    whole: int
    lines: Callable[[], list[Line]]
    useless: str = ""


def _of_texts(found: Found) -> Iterator[_Record]:
    """Yield the records as they are without a tokenizer; lengths are numbers of characters."""
    for one in found.items:
        if isinstance(one, Dialogue):
            turns = [
                (_message(message), "trained" if message["role"] == "assistant" else "masked")
                for message in one.messages
            ]
            parts = {"trained": sum(len(text) for text, role in turns if role == "trained")}
            yield _text_record(parts, [("dialogue", turns)])
            continue
        prompt = (
            one.prompt
            if isinstance(one.prompt, str)
            else "".join(_message(message) for message in one.prompt)
        )
        answers = _answers(one)
        parts = {"prompt": len(prompt)} | {name: len(text) for name, text, _ in answers}
        lines = [(name, [(prompt, "prompt"), (text, role)]) for name, text, role in answers] or [
            ("prompt", [(prompt, "prompt")])
        ]
        yield _text_record(parts, lines)


def _text_record(
    parts: dict[str, int], lines: Sequence[tuple[str, Sequence[tuple[str, str]]]]
) -> _Record:
    whole = max(sum(len(text) for text, _ in segments) for _, segments in lines)
    made = [
        Line(name, tuple(Segment(text, role) for text, role in segments if text))
        for name, segments in lines
    ]
    return _Record(parts, whole, lambda: made)


def _message(message: dict[str, Any]) -> str:
    return f"{message['role']}: {message.get('content') or message.get('tool_calls')}\n"


def _answers(one: Any) -> list[tuple[str, str, str]]:
    """Return (name, text, role) of each answer of a record."""
    if isinstance(one, Demonstration):
        return [("completion", one.completion, "trained")]
    if isinstance(one, PairExample):
        return [("chosen", one.chosen, "chosen"), ("rejected", one.rejected, "rejected")]
    if isinstance(one, RankedExample):
        ranked = zip(one.completions, one.ranks, strict=True)
        return [(f"rank {rank}", text, "ranked") for text, rank in ranked]
    if isinstance(one, UnpairedExample):
        name, role = ("wanted", "chosen") if one.label else ("unwanted", "rejected")
        return [(name, one.completion, role)]
    return []


def _of_tokens(found: Found, model: Model) -> Iterator[_Record]:
    """Yield the records as token ids, encoded by the functions of the stages."""
    tokenizer = model.tokenizer
    if found.kind is PromptExample:
        for _, ids in encode_prompts(tokenizer, found.items, NO_LIMIT)[0]:
            yield _token_record(tokenizer, {"prompt": len(ids)}, [("prompt", [(ids, "prompt")])])
        return
    end = end_of_text(tokenizer, model.eos_ids)
    if found.kind is Demonstration:
        for prompt, completion in encode_demonstrations(tokenizer, found.items, end, NO_LIMIT)[0]:
            parts = {"prompt": len(prompt), "completion": len(completion)}
            lines = [("completion", [(prompt, "prompt"), (completion, "trained")])]
            yield _token_record(tokenizer, parts, lines)
    elif found.kind is Dialogue:
        for ids, actions in encode_dialogues(tokenizer, found.items, end, NO_LIMIT)[0]:
            runs = _runs(ids, actions)
            yield _token_record(tokenizer, {"trained": sum(actions)}, [("dialogue", runs)])
    elif found.kind is UnpairedExample:
        for one in found.items:
            prompt = encode_prompt(tokenizer, one.prompt, one.tools)
            ids = encode_completion(tokenizer, one.completion, end, first=not one.prompt)
            ((name, _, role),) = _answers(one)
            parts = {"prompt": len(prompt), name: len(ids)}
            lines = [(name, [(prompt, "prompt"), (ids, role)])]
            yield _token_record(tokenizer, parts, lines)
    else:
        for example, comparison in encode_preferences(tokenizer, found.items, end, NO_LIMIT)[0]:
            yield _compared(tokenizer, example, comparison)


def _compared(tokenizer: Any, example: Any, comparison: Comparison) -> _Record:
    answers = _answers(example)
    parts = {"prompt": len(comparison.prompt)}
    lines = []
    for (name, _, role), ids in zip(answers, comparison.completions, strict=True):
        parts[name] = max(parts.get(name, 0), len(ids))
        lines.append((name, [(comparison.prompt, "prompt"), (ids, role)]))
    record = _token_record(tokenizer, parts, lines)
    alike = (
        isinstance(example, PairExample) and comparison.completions[0] == comparison.completions[1]
    )
    return replace(record, useless="the answers are equal in tokens") if alike else record


def _runs(ids: Sequence[int], actions: Sequence[bool]) -> list[tuple[list[int], str]]:
    """Return runs of tokens that are trained on, or are not."""
    runs: list[tuple[list[int], str]] = []
    for token, action in zip(ids, actions, strict=True):
        role = "trained" if action else "masked"
        if not runs or runs[-1][1] != role:
            runs.append(([], role))
        runs[-1][0].append(token)
    return runs


def _token_record(
    tokenizer: Any,
    parts: dict[str, int],
    lines: Sequence[tuple[str, Sequence[tuple[Sequence[int], str]]]],
) -> _Record:
    whole = max(sum(len(ids) for ids, _ in segments) for _, segments in lines)

    def made() -> list[Line]:
        return [Line(name, tuple(segments_of(tokenizer, segments))) for name, segments in lines]

    return _Record(parts, whole, made)


def segments_of(tokenizer: Any, runs: Sequence[tuple[Sequence[int], str]]) -> Iterator[Segment]:
    """Yield the texts of runs of tokens, special tokens apart. Each text is what the run adds to
    the text of everything before it, so that no space is lost between two of them."""
    specials = set(tokenizer.all_special_ids)
    before: list[int] = []
    said = ""
    for ids, role in runs:
        start = 0
        while start < len(ids):
            special = ids[start] in specials
            stop = start + 1
            while not special and stop < len(ids) and ids[stop] not in specials:
                stop += 1
            before += ids[start:stop]
            whole = tokenizer.decode(
                before, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            text = (
                whole[len(said) :]
                if whole.startswith(said)
                else tokenizer.decode(ids[start:stop], skip_special_tokens=False)
            )
            yield Segment(text, role, special)
            said, start = whole, stop


# ---- numbers -------------------------------------------------------------------------------------
def _measure(shown: Preview, records: Sequence[_Record], limit: int | None, show: int) -> None:
    """Fill in lengths, numbers of records and examples."""
    shown.limit = limit
    lengths: dict[str, list[int]] = {}
    for one in records:
        for name, length in {**one.parts, "whole": one.whole}.items():
            lengths.setdefault(name, []).append(length)
        if one.useless:
            shown.dropped[one.useless] += 1
        elif limit is not None and one.whole > limit:
            shown.dropped[f"longer than {limit} tokens"] += 1
        else:
            shown.used += 1
            if len(shown.examples) < show:
                shown.examples.append(one.lines())
    shown.lengths = {name: summary(found) for name, found in lengths.items()}


def summary(values: Sequence[int]) -> Lengths:
    """Return the summary of at least one length."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // width for value in ordered)
    bins = tuple(
        (low + index * width, min(high, low + (index + 1) * width - 1), counts[index])
        for index in range((high - low) // width + 1)
    )
    p95 = ordered[-(-95 * len(ordered) // 100) - 1]
    return Lengths(low, float(statistics.median(ordered)), p95, high, bins)


# ---- on the terminal -----------------------------------------------------------------------------
_STYLES = {
    "prompt": "dim",
    "masked": "dim",
    "trained": "green",
    "chosen": "green",
    "rejected": "red",
    "ranked": "cyan",
}


def print_preview(shown: Preview, console: Console | None = None) -> None:
    """Print a preview as tables and examples."""
    console = console or tables.console()

    def say(text: str, style: str = "") -> None:
        console.print(printable(text), style=style)

    say(f"{shown.source}: {shown.file}, format {shown.format} ({shown.why})", "bold")
    say(f"columns: {', '.join(shown.columns)}")
    for noun, stages in shown.stages.items():
        more = f" and {len(stages) - 6} more" if len(stages) > 7 else ""
        listed = ", ".join(stages[:6] if more else stages)
        chosen = " <- shown here" if noun == shown.records and len(shown.stages) > 1 else ""
        say(f"read as {noun} by {listed}{more}{chosen}")
    begun = "" if shown.whole else " (the first; --rows 0 reads all)"
    say(f"rows read: {shown.rows:,}{begun}; {shown.records} used: {shown.used:,}")
    for reason, count in shown.dropped.items():
        say(f"  {count:,} left out: {reason}", "yellow")
    if shown.bad_rows:
        say(
            f"  {shown.bad_rows:,} bad; a run stops at them or, with skip_bad_lines, skips them:",
            "red",
        )
    for message in shown.bad:
        say(f"    {message}", "red")
    if shown.told:
        say(shown.told, "yellow")
    tables.show(_table(shown), console)
    _print_histogram(shown, say)
    if shown.examples:
        say(_legend(shown))
    for number, lines in enumerate(shown.examples, 1):
        for line in lines:
            say(f"--- example {number}: {line.name}", "bold")
            console.print(_marked(line), soft_wrap=True)


def _table(shown: Preview) -> Table:
    limit = "" if shown.limit is None else f", at most {shown.limit:,}"
    head = f"{shown.unit}{limit}"
    table = Table(head, "min", "median", "p95", "max", box=None, header_style="bold")
    for name, one in shown.lengths.items():
        table.add_row(name, *(f"{value:,g}" for value in (one.min, one.median, one.p95, one.max)))
    return table


def _print_histogram(shown: Preview, say: Callable[[str], None]) -> None:
    bins = shown.lengths["whole"].histogram
    most = max(count for *_, count in bins)
    for first, last, count in bins:
        bar = "█" * -(-30 * count // most)
        say(f"  {first:>7,} - {last:<7,} {bar} {count:,}")


def _legend(shown: Preview) -> str:
    """Return what the brackets of the examples mean."""
    compared = {
        "pairs": "⟦ ⟧ the two answers that are compared; the prompt is only read",
        "ranked answers": "⟦ ⟧ the answers that are compared; the prompt is only read",
        "prompts": "the policy's completion follows; prompts are only read",
    }
    usual = "⟦ ⟧ trained on; the rest is only read"
    return compared.get(shown.records, usual)


def _marked(line: Line) -> Text:
    """Return a line with what is trained on or compared in brackets, and special tokens in
    colour."""
    text = Text()
    marked = False
    for segment in line.segments:
        inside = segment.role not in ("prompt", "masked")
        if inside is not marked:
            text.append("⟦" if inside else "⟧", "bold")
            marked = inside
        style = "yellow" if segment.special else _STYLES[segment.role]
        text.append(printable(shortened(segment.text, LONGEST)), style)
    if marked:
        text.append("⟧", "bold")
    return text
