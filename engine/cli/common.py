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

_OTHERS = ("mps", "xpu", "hpu", "xla", "mtia", "ipu", "meta", "vulkan", "hip", "privateuseone")
_INSTEAD = {
    "fusedrl report --compare": "; several runs are compared: fusedrl report RUN RUN, with --html "
    "FILE on one page"
}
FAILED, CONFIGURATION, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 130


def check_device(name: str | None) -> None:
    """Raise ConfigError if `name` is not a device, SetupError if this machine lacks the device."""
    if name is None:
        return
    check_device_name(name)
    kind, _, number = name.partition(":")
    if kind != "cuda":
        return
    import torch

    if int(number or 0) >= torch.cuda.device_count():
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


def check_device_name(name: str) -> None:
    """Raise ConfigError if `name` is not cpu, cuda or cuda:N; torch is not loaded for it."""
    if re.fullmatch(r"(cpu|cuda)(:\d{1,5})?", name):
        return
    other = name.partition(":")[0]
    why = ", which torch knows and no kernel here has been made for" if other in _OTHERS else ""
    meant = "cuda" if other.lower() in ("gpu", "nvidia", "cuda") else "cpu"
    raise ConfigError(
        f"config: expected device to be cpu, cuda or cuda:N, got {name!r}{why}; use --device "
        f"{meant}"
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
    """Parser that reports an error as a ConfigError with one message. A model that stands by itself
    may be given as --model, too."""

    words: Sequence[str] = ()  # that it was given

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as argparse does."""
        words = list(sys.argv[1:] if args is None else args)
        by_place = any(one.dest == "model" and not one.option_strings for one in self._actions)
        if by_place and "--model" not in self._option_string_actions:
            words = _placed(words)
        self.words = words
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            known = self._option_string_actions
            named = [word for word in self.words if word.startswith("--") and word != "--"]
            if wrong := [word for word in named if word.partition("=")[0] not in known]:
                unknown_option(self, self.prog, wrong[0])
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


def _placed(words: Sequence[str]) -> list[str]:
    """Return the words with what follows --model at their beginning, where it stands by itself."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--model" and (equals or index + 1 < len(words)):
            end = index + (1 if equals else 2)
            return [value if equals else words[index + 1], *words[:index], *words[end:]]
    return list(words)


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
    unknown_option(parser, prog, unknown[0])


def unknown_option(parser: argparse.ArgumentParser, prog: str, word: str) -> NoReturn:
    """Raise ConfigError for an argument that a parser does not know, with a hint at the option that
    was probably meant."""
    first = word.partition("=")[0]
    known = {
        name.removeprefix("--").replace("-", "_"): name
        for name in parser._option_string_actions
        if name.startswith("--")
    }
    hint = _INSTEAD.get(f"{prog} {first}") or nearest(
        first.lstrip("-").replace("-", "_"), known, "--"
    )
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


def output_file(text: str) -> str:
    """Check, as an argparse type, that `text` is "-" or a file name in an existing directory. So a
    wrong name is reported before a long measurement starts."""
    path = Path(text)
    if text == "-" or (text and path.parent.is_dir() and not path.is_dir()):
        return text
    why = (
        f"{text!r} is a directory"
        if text and path.is_dir()
        else no_such(path.parent)
        if text
        else "an empty name"
    )
    raise argparse.ArgumentTypeError(f"expected a file to write or -, got {text!r}: {why}")


def report_file(text: str, begins: str = "{", what: str = "a JSON report") -> str:
    """Check as `output_file` does. A file that is there is replaced only if it is empty or begins
    as `what` does."""
    path = Path(output_file(text))
    if text != "-" and path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            start = file.read(4096).lstrip()
            # a file of JSON lines begins as a report does, and has more behind its first value
            lines = begins == "{" and _is_json(start.partition(b"\n")[0])
            if not start.startswith(begins.encode()) or lines:
                raise argparse.ArgumentTypeError(
                    f"{text} is there and is not {what}: it would be lost; name another file, or "
                    "delete it first"
                )
    return text


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


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
