"""Shared parts of the commands: exit codes, checks of the device, hints for unknown names, results
as JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fusedrl.engine.base.errors import ConfigError, SetupError, no_such
from fusedrl.engine.cli.names import ELSEWHERE, HOW, known_elsewhere, nearest_names

FAILED, CONFIGURATION, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 130


def check_device(name: str | None) -> None:
    """Raise ConfigError if `name` is not a device, SetupError if this machine lacks the device."""
    if name is None:
        return
    import torch

    from fusedrl.engine.model.weights import DEVICES

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"config: expected device to be cpu, cuda or cuda:N, got {name!r}"
        ) from error
    if device.type not in DEVICES:
        raise ConfigError(
            f"config: expected device to be cpu, cuda or cuda:N, got {name!r}, which torch knows "
            "and no kernel here has been made for; use "
            "--device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        remedy = (
            "check the driver with nvidia-smi"
            if built
            else "this torch is a CPU build; install a CUDA build from pytorch.org"
        )
        raise SetupError(
            f"device {name!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; {remedy}, "
            "or use --device cpu"
        )


def nearest(name: str, known: Mapping[str, Any], dashes: str = "") -> str:
    """Return a hint at the known name that was probably meant: `name` is what another trainer calls
    it, or is spelled much like it. Return "" if there is no such name."""
    if (ours := known_elsewhere(name, known)) is not None:
        how = HOW.get(name.lower().replace("-", "_").rpartition(".")[2])
        return f", which is {dashes}{ours} here" + (f" ({dashes}{ours} {how})" if how else "")
    if close := nearest_names(name, known):
        return f", did you mean {' or '.join(dashes + one for one in close)}?"
    theirs = [
        their
        for their in nearest_names(name, ELSEWHERE)[:1]
        if known_elsewhere(their, known) is not None
    ]
    return (
        f", did you mean {dashes}{known_elsewhere(theirs[0], known)} ({theirs[0]} elsewhere)?"
        if theirs
        else ""
    )


class Parser(argparse.ArgumentParser):
    """Parser that reports an error as a ConfigError with one message."""

    def error(self, message: str) -> NoReturn:
        for kind, words in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f": invalid {kind} value: ", f": expected {words}, got ")
        if choice := re.fullmatch(
            r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", message
        ):
            choices = choice[3].replace("'", "").split(", ")
            message = (
                f"{choice[1]}: invalid choice: "
                f"{choice[2]!r}{nearest(choice[2], dict.fromkeys(choices))}; expected one "
                f"of {', '.join(choices)}"
            )
        name = self.prog.removeprefix("fusedrl").strip()
        raise ConfigError(
            f"{name + ': ' if name else ''}{message.removeprefix('argument ')}; {self.prog} --help "
            "lists what there is"
        )


def refuse_unknown(
    parser: argparse.ArgumentParser, options: argparse.Namespace, unknown: Sequence[str]
) -> NoReturn:
    """Raise ConfigError for the first argument that a command does not know, with a hint at the
    option that was probably meant."""
    prog = parser.prog
    for name in (getattr(options, "command", None), getattr(options, "kind", None)):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                parser, prog = action.choices[name], f"{prog} {name}"
                break
    first = unknown[0].partition("=")[0]
    known = {
        name.removeprefix("--").replace("-", "_"): name
        for name in parser._option_string_actions
        if name.startswith("--")
    }
    hint = nearest(first.lstrip("-").replace("-", "_"), known, "--")
    option = first.startswith("-")
    raise ConfigError(
        f"{prog.removeprefix('fusedrl ')}: unknown {'option' if option else 'argument'} "
        f"{first!r}{hint}{'' if option else '; a text with spaces stands in quotes'}; "
        f"{prog} --help lists what there is"
    )


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show each warning on one line, without its file and line number."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"fusedrl: warning: {' '.join(str(message).split()).removeprefix('fusedrl: ')}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = before


def output_file(text: str, begins: str = "{", what: str = "a JSON report") -> str:
    """Check, as an argparse type, that `text` is "-" or a file name in an existing directory. So a
    wrong name is reported before a long measurement starts. A file that is there is replaced only
    if it is empty or `begins` with the same characters, as `what` does."""
    path = Path(text)
    if text == "-" or (text and path.parent.is_dir() and not path.is_dir()):
        if text != "-" and path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                if not file.read(4096).lstrip().startswith(begins.encode()):
                    raise argparse.ArgumentTypeError(
                        f"{text} is there and is not {what}: it would be lost; name another file, "
                        "or delete it first"
                    )
        return text
    why = (
        f"{text!r} is a directory"
        if text and path.is_dir()
        else no_such(path.parent)
        if text
        else "an empty name"
    )
    raise argparse.ArgumentTypeError(f"expected a file to write or -, got {text!r}: {why}")


def spelled(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Spell every option in `argv` as the parser does; dashes and underscores mean the same."""
    known: dict[str, str] = {}
    parsers = [parser]
    while parsers:
        one = parsers.pop()
        known |= {name.replace("-", "_"): name for name in one._option_string_actions}
        parsers += [
            sub
            for action in one._actions
            if isinstance(action, argparse._SubParsersAction)
            for sub in action.choices.values()
        ]
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        found.append(
            known.get(name.replace("-", "_"), name) + equals + value
            if name.startswith("--")
            else word
        )
    return found


def report_json(found: Any, file: str | None, show: Callable[[], None]) -> None:
    """Report a command's results. If `file` is "-", print them as JSON; else call `show`, and if
    `file` is not None, write the JSON to it."""
    text = json.dumps(found, indent=1)
    if file == "-":
        print(text)
        return
    show()
    if file is not None:
        Path(file).write_text(text + "\n", encoding="utf-8")
        wrote(file)


def wrote(file: str) -> None:
    """Say on standard error which file a command wrote."""
    print(f"wrote {file}", file=sys.stderr)


def count(text: str, least: int = 1) -> int:
    """Parse a whole number of at least `least` (0 or 1), as an argparse type."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"expected a whole number {'above 0' if least else 'from 0 on'}, got {text!r}"
    )


def count_or_none(text: str) -> int:
    """Parse a whole number of at least 0, as an argparse type."""
    return count(text, least=0)
