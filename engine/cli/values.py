"""Values as people write them on the command line and in YAML: yes, 1 and True for true, None for
null, a list without brackets. Also the reader of YAML files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fusedrl.engine.base.errors import ConfigError, no_such
from fusedrl.engine.config.base import data_text

_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_LARGEST, _MOST_VALUES = 200_000, 10_000  # of a file of options: bytes, values with aliases
_NOTHING = ("none", "null", "~")


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (dotted key, type) of a configuration class, including groups of keys."""
    for name, kind in get_type_hints(cls).items():
        if name == "_":  # marks the fields that are given by name alone
            continue
        yield f"{prefix}{name}", kind
        if (group := group_of(kind)) is not None:
            yield from keys_of(group, f"{prefix}{name}.")


def parts_of(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union; for any other type, a tuple of that type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def group_of(kind: Any) -> type | None:
    """Return the configuration class of a group of keys, also of an optional group; None for a
    single key."""
    return next(
        (
            part
            for part in parts_of(kind)
            if isinstance(part, type) and dataclasses.is_dataclass(part)
        ),
        None,
    )


def meant(value: Any, kind: Any) -> Any:
    """Convert a value as written to the type of its key, such as "yes" to True. Return it unchanged
    if there is nothing to convert; its type is checked later."""
    parts, word = parts_of(kind), value.strip().lower() if isinstance(value, str) else None
    if type(None) in parts and word in _NOTHING:
        return None
    if bool in parts:
        return _BOOLEANS.get(str(value) if type(value) is int else word or "", value)
    listed = next((part for part in parts if get_origin(part) is tuple), None)
    if (
        listed is None
        or not isinstance(value, str | int | float)
        or isinstance(value, bool)
        or (word is not None and word[:1] in ("[", ""))
    ):
        return value
    if str in get_args(listed):
        return (
            [part.strip() for part in str(value).split(",")]
            if word is not None and re.fullmatch(r"[\w-]+(\s*,\s*[\w-]+)*", word)
            else [value]
        )
    try:
        return [_number(part) for part in re.split(r"[,\s]+", str(value).strip())]
    except ValueError:
        return value


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def read_yaml(path: str, known: Mapping[str, Any], hint: Callable[[str], str]) -> dict[str, Any]:
    """Read the options in a YAML file as nested dictionaries of the configuration's names.

    Args:
        known: the type of each dotted name (`keys_of`).
        hint: function that returns what to add to the message about an unknown name.
    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: it is not a YAML mapping, or a key is unknown or occurs twice.
    """

    def read(branch: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in branch.items():
            name = f"{prefix}{key}".replace("-", "_")
            if name not in known:
                raise ConfigError(f"{path}: unknown key {f'{prefix}{key}'!r}{hint(name)}")
            value = meant(value, known[name])
            if name.rpartition(".")[2] == "data" and isinstance(value, dict | list):
                value = data_text(value)
            if group_of(known[name]) is not None and not (
                value is None and type(None) in parts_of(known[name])
            ):
                if not isinstance(value, dict):
                    first = next(key for key in known if key.startswith(f"{name}."))
                    example = f"{name}: {{{first.rpartition('.')[2]}: ...}}"
                    raise ConfigError(
                        f"{path}: expected {name!r} to be a mapping of options, got "
                        f"{type(value).__name__}; its options stand below it, such as {example}"
                    )
                value = read(value, f"{name}.")
            if (own := name.removeprefix(prefix)) in found:
                raise ConfigError(
                    f"{path}: {name!r} stands there twice, once with dashes and once with "
                    "underscores; leave one out"
                )
            found[own] = value
        return found

    return read(_tree(path), "")


def _tree(path: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file. Errors are those of `read_yaml`."""
    import yaml

    if Path(path).is_dir():
        raise ConfigError(f"{path}: expected a YAML file, got a directory; name the file in it")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such configuration file: {no_such(path)}")
    if (size := Path(path).stat().st_size) > _LARGEST:
        raise ConfigError(
            f"{path}: expected a file of options of at most {_LARGEST:,} bytes, got {size:,}; data "
            "are given with --data"
        )
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_aliases(path, node)
        _check_once(path, node)
        tree = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: byte {error.start} is not UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(
            f"{path}{f':{mark.line + 1}' if mark else ''}: not YAML: {what}{_hint(what)}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of options to values, got "
            f"{'an empty file' if tree is None else type(tree).__name__}; options are written "
            "key: value, one a line"
        )
    return tree


def _hint(problem: str) -> str:
    """Return what to do about some mistakes in YAML."""
    if "'\\t'" in problem:
        return "; lines are indented with spaces, not with tabs"
    if "mapping values are not allowed" in problem:
        return "; a value that holds a colon and a space stands in quotes"
    return ""


def _check_aliases(path: str, node: Any) -> None:
    """Raise ConfigError for a file whose aliases (*name) stand for too much: each may stand for
    many others, so that a few lines become more than memory holds, or for itself."""
    sizes: dict[int, int] = {}  # of what each node stands for; 0: not known yet

    def size(inner: Any) -> int:
        if inner is None:
            return 0
        if sizes.setdefault(id(inner), 0):
            return sizes[id(inner)]
        parts = inner.value if isinstance(inner.value, list) else []
        total = 1
        for part in parts:
            for one in part if isinstance(part, tuple) else (part,):
                if sizes.get(id(one)) == 0:
                    raise ConfigError(
                        f"{path}:{one.start_mark.line + 1}: expected options, got an alias that "
                        "stands for itself; write out what is meant"
                    )
                total += size(one)
        if total > _MOST_VALUES:
            raise ConfigError(
                f"{path}:{inner.start_mark.line + 1}: expected at most {_MOST_VALUES:,} values, "
                "got aliases that stand for more; write out what is meant"
            )
        sizes[id(inner)] = total
        return total

    size(node)


def _check_once(path: str, node: Any) -> None:
    """Raise ConfigError if a mapping has a key twice; YAML would silently take the last one."""
    seen: dict[str, int] = {}
    for key, value in node.value if type(node).__name__ == "MappingNode" else ():
        if isinstance(key.value, str):
            if key.value in seen and key.value != "<<":
                raise ConfigError(
                    f"{path}:{key.start_mark.line + 1}: {key.value!r} stands there twice, first in "
                    f"line {seen[key.value]}; leave one out"
                )
            seen[key.value] = key.start_mark.line + 1
        _check_once(path, value)
