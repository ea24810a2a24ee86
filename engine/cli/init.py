"""fusedrl init: write a commented YAML file of a stage's options, or of a tested recipe."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli.common import Parser, nearest
from fusedrl.engine.cli.fields import (
    default_in,
    defaults_of,
    docs_of,
    example_of,
    needed_of,
    summary,
)
from fusedrl.engine.cli.help import has_critic
from fusedrl.engine.cli.values import group_of, keys_of

Stage = tuple[type, str]
RECIPES = Path(__file__).resolve().parent / "recipes"
_WIDTH = 96


def add_commands(commands: argparse._SubParsersAction[Parser], stages: Mapping[str, Stage]) -> None:
    """Add `fusedrl init`. Parsed options run the command by `options.call(options)`.

    Args:
        stages: configuration class and title of every stage.
    """
    init = commands.add_parser(
        "init",
        help="a commented YAML file of a stage's options, or a recipe for a model",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages: sft, reward, dpo, kto, rejection, ppo, grpo, ... (fusedrl train --help)\n"
        "recipes:\n" + "\n".join(f"  {name}" for name in recipes()),
    )
    init.set_defaults(call=lambda options: _init(options, stages))
    init.add_argument("name", metavar="NAME", help="a stage, such as grpo, or a recipe")
    init.add_argument(
        "file", metavar="FILE", nargs="?", help="the file to write (default: NAME.yaml)"
    )


def recipes() -> dict[str, Path]:
    """Return the recipes that come with fusedrl, by their names."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _init(options: argparse.Namespace, stages: Mapping[str, Stage]) -> None:
    name, found = options.name, recipes()
    path = Path(options.file or f"{name}.yaml")
    if name in found:
        text = found[name].read_text(encoding="utf-8")
        stage = name.rsplit("-", 1)[-1] if name.rsplit("-", 1)[-1] in stages else _stage_in(text)
    elif name in stages:
        stage, text = name, written(name, *stages[name], path.name)
    else:
        close = difflib.get_close_matches(name, found, 1)
        hint = nearest(name, stages) or (f", did you mean {close[0]}?" if close else "")
        raise ConfigError(
            f"init: unknown stage or recipe {name!r}{hint}; expected a stage of fusedrl train "
            f"--help, or one of {', '.join(found)}"
        )
    if path.exists():
        raise FileExistsError(f"init: {path} is there already, and is not written over")
    if not path.parent.is_dir():
        raise ConfigError(f"init: expected a directory for {path}, and {path.parent} is none")
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    print(f"{path}: fill in what its first lines say, then fusedrl train {stage} --config {path}")


def _stage_in(text: str) -> str:
    """Return the stage of the command in a recipe's first lines."""
    return text.partition("fusedrl train ")[2].split()[0]


def written(stage: str, cls: type, title: str, name: str) -> str:
    """Return a YAML file with every option of a stage, its documentation and its default.

    Options without a default have example values. Groups that are off are comments. The
    configuration that the file gives is that of a command with the same values alone.
    """
    config, docs = defaults_of(stage, cls), docs_of(cls)
    needed = needed_of(stage, cls)
    head = [f"fusedrl train {stage} --config {name}", "", f"{stage}: {title}.", ""]
    head.append(
        f"Fill in: {', '.join(needed)}. All other options have their defaults; what you do not "
        "change may be deleted. Options on the command line win over this file."
    )
    lines = [line for part in head for line in _comment(part) or ["#"]]
    kinds = {
        key: kind
        for key, kind in keys_of(cls)
        if "." not in key and (key != "critic" or has_critic(stage))
    }
    plain = [key for key, kind in kinds.items() if group_of(kind) is None]
    first = [*needed, *(key for key in plain if key not in needed)]
    for key in [*first, *(key for key in kinds if key not in plain)]:
        lines.append("")
        value, group = getattr(config, key), group_of(kinds[key])
        lines += _comment(docs.get(key) or (summary(group) if group else ""))
        if group is None:
            lines.append(f"{key}: {_yaml(_listed(stage, key, value, needed))}")
        elif value is None:
            lines += [f"# {line}".rstrip() for line in _group(key, group, None, docs, key, "")]
        else:
            lines += _group(key, group, value, docs, key, "")
    return "\n".join(lines) + "\n"


def _listed(stage: str, key: str, value: Any, needed: list[str]) -> Any:
    if key in needed:
        return [example_of(stage, key)] if key == "reward" else example_of(stage, key)
    return value


def _group(
    name: str, cls: type, value: Any, docs: Mapping[str, str], key: str, indent: str
) -> list[str]:
    """Return the lines of a group of options; `value` is None where the group is off, and its
    lines have the defaults."""
    lines, inner = [f"{indent}{name}:"], f"{indent}  "
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        own = f"{key}.{field.name}"
        found = default_in(cls, field.name) if value is None else getattr(value, field.name)
        lines += _comment(docs.get(own, ""), inner)
        if dataclasses.is_dataclass(found):
            lines += _group(field.name, type(found), found, docs, own, inner)
        else:
            lines.append(f"{inner}{field.name}: {_yaml(found)}")
    return lines


def _comment(text: str, indent: str = "") -> list[str]:
    wrapped = textwrap.wrap(
        text, _WIDTH - len(indent), break_on_hyphens=False, break_long_words=False
    )
    return [f"{indent}# {line}" for line in wrapped]


def _yaml(value: Any) -> str:
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
