"""Messages of jsonargparse about options, in plain words."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, get_args, get_origin

from fusedrl.engine.cli.values import keys_of, parts_of

WORDS = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
}  # for types
LACKING = "which cannot be left out"  # how a message about missing options ends


def in_plain_words(message: str, cls: type) -> str:
    """Rewrite a message of jsonargparse on one line and in plain words, without Python's names of
    types."""
    message = " ".join(message.split()).replace("Parser key ", "")
    message = re.sub(
        r'"(\w+)": Does not validate against any of .*? class_path \S+ "([\w.]+)": (.*?) - '
        r"(?i:expected) .*",
        r'"\1.\2": \3',
        message,
    )
    if union := re.search(
        r'"([\w.]+)": Does not validate against any of .*? Given value: (.*)', message
    ):
        if group := re.search(r"init_args=Namespace\(.*?(\w+)=None[,)]", union[2]):
            return (
                f"expected --{union[1]}.{group[1]}, which cannot be left out beside the other "
                f"options of {union[1]}"
            )
        return f'"{union[1]}": expected {_expected(union[1], cls)}, got {union[2]}'
    if group := re.search(r'"([\w.]+)": Unable to load config \'?"?(.*?)\'?"?( - .*|$)', message):
        return f'"{group[1]}": expected {_expected(group[1], cls)}, got {group[2]}'
    if lacking := re.search(r"the following arguments are required: (.*)", message):
        *others, last = (f"--{name}" for name in lacking[1].split(", "))
        return f"expected {', '.join(others)}{' and ' * bool(others)}{last}, {LACKING}"
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(
        r"Expected a typing\.Literal\[(.*?)\]",
        lambda found: f"expected one of {found[1].replace(chr(39), '')}",
        message,
    )
    message = message.replace("Expected a ", "expected ")
    message = re.sub(
        r"\. Got value:(?: (.*))?$", lambda found: f", got {found[1] or 'nothing'}", message
    )
    if listed := re.search(r'"([\w.]+)": expected tuple( with \d+ elements)?, got (.*)', message):
        return (
            f'"{listed[1]}": expected {_expected(listed[1], cls)}{listed[2] or ""}, got {listed[3]}'
        )
    return re.sub(
        r": expected (\w+), got",
        lambda found: f": expected {WORDS.get(found[1], found[1])}, got",
        message,
    )


def _expected(key: str, cls: type) -> str:
    """Describe in words which values a key accepts."""
    words = []
    for part in parts_of(dict(keys_of(cls))[key]):
        if dataclasses.is_dataclass(part):
            words.append(f"options of its own, such as --{key}.{dataclasses.fields(part)[0].name}")
        elif get_origin(part) is tuple:
            words.append(
                "a list in brackets, such as [1,0.5]"
                if float in get_args(part) or int in get_args(part)
                else 'a list, such as ["a","b"]'
            )
        elif get_origin(part) is Literal:
            words.append(f"one of {', '.join(map(str, get_args(part)))}")
        else:
            words.append(WORDS.get(part.__name__, part.__name__))
    return " or ".join(words)
