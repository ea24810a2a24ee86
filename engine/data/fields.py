"""Access to columns of a row by type. BadRow is raised if a column is missing or of another type;
it says what was expected and what was found."""

from __future__ import annotations

import json
from typing import Any

from fusedrl.engine.data.lines import TURNS, BadRow, Row, type_name
from fusedrl.engine.data.records import Messages, Prompt, Tools
from fusedrl.engine.data.templates import ASSISTANT


def missing(row: Row, expected: str) -> BadRow:
    """Return the error for a missing column; it lists the columns that exist."""
    return BadRow(f"missing column {expected}; found {', '.join(map(repr, row)) or 'none'}")


def wrong(name: str, expected: str, value: object) -> BadRow:
    """Return the error for a column of an unexpected type."""
    return BadRow(f'expected "{name}" to be {expected}, got {type_name(value)}')


def column(row: Row, name: str) -> Any:
    """Return the value of a row's column `name`; dots in the name lead into nested objects."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict):
            raise wrong(name.rpartition(".")[0], "an object", value)
        if part not in value:
            raise missing(value, f'"{name}"')
        value = value[part]
    return value


def text(row: Row, name: str) -> str:
    """Return the column as a string."""
    value = column(row, name)
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    return value


def optional_text(row: Row, name: str) -> str:
    """Return the column as a string; an empty one if it is missing or null."""
    return "" if row.get(name) is None else text(row, name)


def number(row: Row, name: str) -> float:
    """Return the column as a float; true and false are not numbers."""
    value = column(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, "a number", value)
    return float(value)


def one_of(row: Row, name: str, *known: int) -> int:
    """Return the column as one of the whole numbers in `known`."""
    value = column(row, name)
    if isinstance(value, bool) or value not in known:
        raise BadRow(f'expected "{name}" to be {" or ".join(map(str, known))}, got {value!r:.80}')
    return int(value)


def many(row: Row, name: str, kind: type, what: str) -> tuple[Any, ...]:
    """Return the column as a list of values of one type."""
    values = column(row, name)
    if not isinstance(values, list):
        raise wrong(name, f"a list of {what}s", values)
    for index, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise wrong(f"{name}[{index}]", f"a {what}", value)
    return tuple(values)


SHAREGPT = (
    '{"from", "value"} as ShareGPT writes it: write "from" as "role" and "value" as "content", '
    "human as user, gpt as assistant"
)


# ---- messages ------------------------------------------------------------------------------------
def messages(row: Row, name: str) -> Messages:
    """Return the column as messages. A list of strings becomes messages of user and assistant in
    turn, the user first."""
    found = row[name]
    if not found:
        raise BadRow(f'"{name}" is an empty list of messages')
    # MOSS-RLHF: the user begins, and they take turns
    if name in (TURNS, "chosen", "rejected") and all(isinstance(turn, str) for turn in found):
        return [
            {"role": ("user", "assistant")[index % 2], "content": turn}
            for index, turn in enumerate(found)
        ]
    for index, message in enumerate(found):
        calls = (
            isinstance(message, dict)
            and message.get("tool_calls")
            and message.get("content") is None
        )
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not (calls or isinstance(message.get("content"), str))
        ):
            theirs = isinstance(message, dict) and {"from", "value"} <= set(message)
            raise BadRow(
                f'expected "{name}"[{index}] to be a message {{"role": string, "content": string}}'
                + (f", got {SHAREGPT}" if theirs else "")
            )
    return found


def text_or_messages(row: Row, name: str) -> Prompt:
    """Return the column as a string, or as messages."""
    value = column(row, name)
    if isinstance(value, list):
        return messages(row, name)
    if isinstance(value, str):
        return value
    raise wrong(name, "a string or a list of messages", value)


def content(message: dict[str, Any], name: str) -> str:
    """Return the text of an answer; raise BadRow if it has none because it calls a tool."""
    if message.get("content") is None:
        raise BadRow(
            f'the answer in "{name}" is a call of a tool, which has no text; read the file as '
            "dialogues"
        )
    return message["content"]


def answer(row: Row, name: str) -> str:
    """Return an answer: a text, or the content of the assistant's only message."""
    if not isinstance(column(row, name), list):
        return text(row, name)
    found = messages(row, name)
    if len(found) != 1 or found[0]["role"] != "assistant":
        raise BadRow(
            f'expected "{name}" to be one message of the assistant, got roles '
            f"{[message['role'] for message in found]}"
        )
    return content(found[0], name)


def split(row: Row, name: str) -> tuple[Prompt, str]:
    """Return a whole dialogue in two parts: all messages before the last answer, and that
    answer."""
    if isinstance(column(row, name), list):
        found = messages(row, name)
        if found[-1]["role"] != "assistant" or len(found) < 2:
            raise BadRow(
                f'expected "{name}" to end with an answer of the assistant, got roles '
                f"{[message['role'] for message in found]}"
            )
        return found[:-1], content(found[-1], name)
    dialogue = text(row, name)
    end = dialogue.rfind(ASSISTANT)
    if end < 0:
        raise BadRow(
            f'expected a "prompt" column, or "{name}" to hold the prompt up to its last '
            f"{ASSISTANT!r}"
        )
    end += len(ASSISTANT)
    return dialogue[:end], dialogue[end:]


def common_prompt(row: Row) -> Prompt:
    """Return the beginning that both dialogues share, up to the last place where the assistant is
    to speak."""
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        pair = messages(row, "chosen"), messages(row, "rejected")
        shared = next(
            (i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair))
        )
        turns = [
            i
            for i in range(1, min(shared + 1, *map(len, pair)))
            if all(found[i]["role"] == "assistant" for found in pair)
        ]
        if not turns:
            raise BadRow("the messages of the two answers share no prompt")
        return pair[0][: turns[-1]]
    first, other = text(row, "chosen"), text(row, "rejected")
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b),
        min(len(first), len(other)),
    )
    end = first.rfind(ASSISTANT, 0, shared)
    if end < 0:
        raise BadRow(
            'expected a "prompt" column, or "chosen" and "rejected" to share a prompt up to '
            f"{ASSISTANT!r}"
        )
    return first[: end + len(ASSISTANT)]


def tools(row: Row) -> Tools | None:
    """Return the "tools" column, a list of JSON schemas or such a list as a string; None if there
    is none."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(
                'expected "tools" to be a list of JSON schemas, got a string that is not JSON: '
                f"{error}"
            ) from error
    if value is None or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        return value or None
    raise wrong("tools", "a list of JSON schemas", value)
