"""Documentation and default values of options, read off the configuration classes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from fusedrl.engine.cli.values import group_of, keys_of
from fusedrl.engine.config.algorithms import ALGORITHMS

REQUIRED = {  # option -> an example value, for options that have no default
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "data": "data.jsonl",
    "reward": "my_rewards.py:helpful",
    "reference_model": "HuggingFaceTB/SmolLM2-360M-Instruct",
}
DATA_OF = {  # stage -> the name that its examples give to a file; policies: prompts.jsonl
    "sft": "demonstrations.jsonl",
    "reward": "pairs.jsonl",
    "dpo": "pairs.jsonl",
    "kto": "labelled.jsonl",
}


def example_of(stage: str, option: str) -> str:
    """Return an example value of an option without a default."""
    return DATA_OF.get(stage, "prompts.jsonl") if option == "data" else REQUIRED[option]


@cache
def docs_of(cls: type, prefix: str = "") -> Mapping[str, str]:
    """Return the documentation of every dotted option of a configuration class, groups included. A
    class that documents an option again has the last word."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _documented(base.__doc__ or "")
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    docs = {prefix + name: text for name, text in found.items() if name in fields}
    for name, kind in keys_of(cls):
        if "." not in name and (group := group_of(kind)) is not None:
            docs |= docs_of(group, f"{prefix}{name}.")
    return docs


def _documented(docstring: str) -> dict[str, str]:
    """Return the texts of a docstring's section Args."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = docstring.partition("Args:\n")
    for line in section.split("\n\n")[0].splitlines():
        begin = re.fullmatch(r" {8}(\w+(?:, \w+)*): (.*)", line)
        if begin:
            names = begin[1].split(", ")
            found |= dict.fromkeys(names, begin[2].strip())
        elif line.startswith(" " * 12) and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            break
    return found


def summary(cls: type) -> str:
    """Return the first paragraph of a configuration class's documentation."""
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())


def fixed_of(stage: str) -> dict[str, Any]:
    """Return the options that a stage's name decides."""
    if stage not in ALGORITHMS:
        return {}
    rewarded = ALGORITHMS[stage].advantage != "none"
    return {"algorithm": stage} | ({} if rewarded else {"reward": ("none",)})


def needed_of(stage: str, cls: type) -> list[str]:
    """List the options of a stage that cannot be left out."""
    found = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in fixed_of(stage)
    ]
    return found + (["reference_model"] if stage == "distill" else [])


def defaults_of(stage: str, cls: type) -> Any:
    """Return the configuration of a stage with all its defaults, and example values for options
    that have none."""
    needed: dict[str, Any] = {name: example_of(stage, name) for name in needed_of(stage, cls)}
    if "reward" in needed:
        needed |= {"reward": (needed["reward"],)}
    return cls(**needed, **fixed_of(stage))


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted option; of an option in a group that is off, the group's own
    default."""
    for name in key.split("."):
        kind = group_of(dict(keys_of(type(config)))[name])
        found = getattr(config, name)
        if found is None and kind is not None:
            found = _Off(kind)
        if isinstance(found, _Off):
            return found if key == name else default_in(found.cls, key.rpartition(f"{name}.")[2])
        config = found
    return config


@dataclasses.dataclass(frozen=True)
class _Off:
    """Group of options that is off."""

    cls: type


def default_in(cls: type, name: str) -> Any:
    """Return the default of a field; None if it has none."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name == name.partition(".")[0]:
            if field.default_factory is not dataclasses.MISSING:
                made = field.default_factory()
                _, _, inner = name.partition(".")
                return value_of(made, inner) if inner else made
            return None if field.default is dataclasses.MISSING else field.default
    return None
