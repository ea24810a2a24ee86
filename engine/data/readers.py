"""JSONL readers (plain or gzip): prompts, preference pairs, demonstrations.

A bad line is never guessed at. All of them are collected first and reported together as `file:line: reason`, before any device work; or, when
asked, written to a rejects file while reading goes on. Accepted without complaint: a byte-order mark, CRLF line ends and blank lines.

Forms of a row, the first that fits (message lists, [{"role", "content"}, ...], may stand for any of the texts):
    prompts         {"prompt", ...}, or a preference row, whose common prefix is the prompt; the remaining columns travel to the rewards
    pairs           {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}, both with the prompt in front (Anthropic's HH-RLHF)
    demonstrations  {"prompt", "completion"}, {"messages"}, {"text"}, {"instruction", "input", "output"}, or a preference row's chosen answer
"""
from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fusedrl.engine.errors import DataError

Prompt = str | list[dict[str, str]]
T = TypeVar("T")
_log = logging.getLogger(__name__)

ASSISTANT = "\n\nAssistant:"  # HH-RLHF: what stands before every answer
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
SHOWN = 20


@dataclass(frozen=True)
class PromptExample:
    """A prompt and the other columns of its row."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairExample:
    """A prompt with a preferred and a rejected answer."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt, "" for plain text, and what should follow it."""

    prompt: Prompt
    completion: str


class _BadRow(Exception):
    """The reason why a row cannot be used."""


class _Dropped(Exception):
    """A well-formed row that holds no usable example: a condition of the data, counted and not an error."""


# ---- the three readers --------------------------------------------------------------------------------------------------------
def load_prompts(path: str | Path, *, skip_bad_lines: bool = False, rejects: str | Path | None = None) -> list[PromptExample]:
    """Prompts with their columns. Every example has the columns of all rows; where a row lacks one it is None.

    Raises:
        DataError: bad lines (all of them), or nothing usable in the file.
        FileNotFoundError: no such file.
    """
    examples, _ = _load(path, _prompt_of, skip_bad_lines, rejects)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    clash = [name for name in REWARD_ARGUMENTS if name in names]
    if clash:
        raise DataError(f"{path}: column {clash[0]!r} has the name of an argument of every reward (prompts, completions, completion_ids); rename it")
    return [PromptExample(example.prompt, {name: example.columns.get(name) for name in names}) for example in examples]


def load_pairs(path: str | Path, *, skip_bad_lines: bool = False, rejects: str | Path | None = None) -> tuple[list[PairExample], dict[str, int]]:
    """Preference pairs, and how many rows were dropped for which reason (the prompts differ, an answer is empty, the answers are equal).

    Raises:
        DataError: bad lines (all of them), or nothing usable in the file.
        FileNotFoundError: no such file.
    """
    return _load(path, _pair_of, skip_bad_lines, rejects)


def load_demonstrations(path: str | Path, *, skip_bad_lines: bool = False, rejects: str | Path | None = None) -> list[Demonstration]:
    """Prompts with the completions to imitate. Rows with an empty completion are dropped, and a warning counts them.

    Raises:
        DataError: bad lines (all of them), or nothing usable in the file.
        FileNotFoundError: no such file.
    """
    examples, dropped = _load(path, _demonstration_of, skip_bad_lines, rejects)
    for reason, count in dropped.items():
        _log.warning("%s: %d rows dropped: %s", path, count, reason)
    return examples


def _load(path: str | Path, parse: Callable[[dict[str, Any]], T], skip: bool, rejects: str | Path | None) -> tuple[list[T], dict[str, int]]:
    path = Path(path)
    items: list[T] = []
    dropped: Counter[str] = Counter()
    bad: list[tuple[int, str, bytes]] = []
    for number, raw, fault in _lines(path):
        try:
            if fault:
                raise _BadRow(fault)
            items.append(parse(_row(raw)))
        except _BadRow as reason:
            bad.append((number, str(reason), raw))
        except _Dropped as reason:
            dropped[str(reason)] += 1
    if bad and skip and rejects is not None:
        Path(rejects).parent.mkdir(parents=True, exist_ok=True)
        with open(rejects, "w", encoding="utf-8") as file:
            for number, reason_, raw in bad:
                file.write(json.dumps({"file": str(path), "line": number, "reason": reason_, "raw": raw.decode("utf-8", "backslashreplace")}) + "\n")
        _log.warning("%s: %d bad lines left out; they are in %s", path, len(bad), rejects)
    if bad and not skip:
        shown = "\n".join(f"{path}:{number}: {reason_}" for number, reason_, _ in bad[:SHOWN])
        more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{shown}{more}\n{len(bad)} bad line{'s'[:len(bad) != 1]}, {len(items)} good; mend the file, or set skip_bad_lines")
    if not items:
        found = [f"{len(bad)} bad"] * bool(bad) + [f"{count} dropped: {reason_}" for reason_, count in dropped.items()]
        raise DataError(f"{path}: no usable row ({'; '.join(found) or 'the file is empty'}); expected one JSON object per line")
    return items, dict(dropped)


# ---- lines and rows -----------------------------------------------------------------------------------------------------------
def _lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """(line number, bytes, fault) of every line that is not blank; a fault ends the file."""
    if not path.exists():
        raise FileNotFoundError(2, "no such data file", str(path))
    if not path.is_file():
        raise DataError(f"{path}: expected a JSONL file, got a {'directory' if path.is_dir() else 'special file'}")
    number = 0
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream: Any = gzip.GzipFile(fileobj=plain) if packed else plain
        try:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line.rstrip(b"\r\n"), ""
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield number + 1, b"", f"the gzip stream is cut or damaged from here on ({error})"


def _row(raw: bytes) -> dict[str, Any]:
    if b"\0" in raw:
        raise _BadRow(f"a NUL byte at column {raw.index(0) + 1} (a torn write, or UTF-16?)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error
    try:
        row = json.loads(text, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise _BadRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _BadRow(f"expected a JSON object, got {_type(row)}")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair is no character, and a tokenizer refuses it
            raise _BadRow("a lone surrogate escape (\\ud800 to \\udfff) is not a character") from error
    return row


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


# ---- forms --------------------------------------------------------------------------------------------------------------------
def _prompt_of(row: dict[str, Any]) -> PromptExample:
    if "prompt" in row:
        prompt = _text_or_messages(row, "prompt")
    elif "chosen" in row and "rejected" in row:
        prompt = _common_prompt(row)
    else:
        raise _missing(row, '"prompt" (or "chosen" and "rejected")')
    return PromptExample(prompt, {name: value for name, value in row.items() if name != "prompt"})


def _pair_of(row: dict[str, Any]) -> PairExample:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _missing(row, f'"{name}"')
    if "prompt" in row:
        prompt, chosen, rejected = _text_or_messages(row, "prompt"), _answer(row, "chosen"), _answer(row, "rejected")
    else:
        prompt, chosen = _split(row, "chosen")
        other, rejected = _split(row, "rejected")
        if prompt != other:
            raise _Dropped("the prompts of the two answers differ")
    if not chosen.strip() or not rejected.strip():
        raise _Dropped("an answer is empty")
    if chosen.strip() == rejected.strip():
        raise _Dropped("the answers are equal")
    return PairExample(prompt, chosen, rejected)


def _demonstration_of(row: dict[str, Any]) -> Demonstration:
    prompt: Prompt
    if "completion" in row:
        if "prompt" not in row:
            raise _missing(row, '"prompt"')
        prompt, completion = _text_or_messages(row, "prompt"), _answer(row, "completion")
    elif "messages" in row:
        prompt, completion = _split(row, "messages")
    elif "text" in row:
        prompt, completion = "", _text(row, "text")
    elif "instruction" in row:
        if "output" not in row:
            raise _missing(row, '"output"')
        extra = _text(row, "input") if row.get("input") is not None else ""
        prompt = _text(row, "instruction") + (f"\n\n{extra}" if extra else "") + "\n\n"
        completion = _text(row, "output")
    elif "chosen" in row:
        prompt, completion = (_text_or_messages(row, "prompt"), _answer(row, "chosen")) if "prompt" in row else _split(row, "chosen")
    else:
        raise _missing(row, '"prompt" and "completion", "messages", "text", "instruction" and "output", or "chosen"')
    if not completion.strip():
        raise _Dropped("the completion is empty")
    return Demonstration(prompt, completion)


# ---- parts of a form ----------------------------------------------------------------------------------------------------------
def _missing(row: dict[str, Any], expected: str) -> _BadRow:
    return _BadRow(f"missing column {expected}; found {', '.join(map(repr, row)) or 'none'}")


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise _BadRow(f'expected "{name}" to be a string, got {_type(row[name])}')
    return row[name]


def _messages(row: dict[str, Any], name: str) -> list[dict[str, str]]:
    messages = row[name]
    if not messages:
        raise _BadRow(f'"{name}" is an empty list of messages')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise _BadRow(f'expected "{name}"[{index}] to be a message {{"role": string, "content": string}}')
    return messages


def _text_or_messages(row: dict[str, Any], name: str) -> Prompt:
    if isinstance(row[name], list):
        return _messages(row, name)
    if isinstance(row[name], str):
        return row[name]
    raise _BadRow(f'expected "{name}" to be a string or a list of messages, got {_type(row[name])}')


def _answer(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], list):
        return _text(row, name)
    messages = _messages(row, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise _BadRow(f'expected "{name}" to be one message of the assistant, got roles {[message["role"] for message in messages]}')
    return messages[0]["content"]


def _split(row: dict[str, Any], name: str) -> tuple[Prompt, str]:
    """A whole dialogue as what comes before its last answer, and that answer."""
    if isinstance(row[name], list):
        messages = _messages(row, name)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise _BadRow(f'expected "{name}" to end with an answer of the assistant, got roles {[message["role"] for message in messages]}')
        return messages[:-1], messages[-1]["content"]
    text = _text(row, name)
    end = text.rfind(ASSISTANT)
    if end < 0:
        raise _BadRow(f'expected a "prompt" column, or "{name}" to hold the prompt up to its last {ASSISTANT!r}')
    end += len(ASSISTANT)
    return text[:end], text[end:]


def _common_prompt(row: dict[str, Any]) -> Prompt:
    """What both dialogues share, through the last place where the assistant is to speak."""
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        pair = _messages(row, "chosen"), _messages(row, "rejected")
        shared = next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        turns = [i for i in range(1, min(shared + 1, *map(len, pair))) if all(messages[i]["role"] == "assistant" for messages in pair)]
        if not turns:
            raise _BadRow("the messages of the two answers share no prompt")
        return pair[0][:turns[-1]]
    text, other = _text(row, "chosen"), _text(row, "rejected")
    shared = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    end = text.rfind(ASSISTANT, 0, shared)
    if end < 0:
        raise _BadRow(f'expected a "prompt" column, or "chosen" and "rejected" to share a prompt up to {ASSISTANT!r}')
    return text[:end + len(ASSISTANT)]
