"""What the commands share: exit codes, devices that are not there, names that were meant, figures as JSON."""
from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedrl.engine.cli_names import known_elsewhere
from fusedrl.engine.errors import ConfigError, SetupError

FAILED, CONFIGURATION, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 130


def check_device(name: str | None) -> None:
    """Raises ConfigError for what is no device, SetupError for one that this machine has not."""
    if name is None:
        return
    import torch

    from fusedrl.engine.machine import DEVICES

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"config: expected device to be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in DEVICES:
        raise ConfigError(f"config: expected device to be cpu, cuda or cuda:N, got {name!r}, which torch knows and no kernel here has been made for; use "
                          "--device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        remedy = "check the driver with nvidia-smi" if built else "this torch is a CPU build; install a CUDA build from pytorch.org"
        raise SetupError(f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; {remedy}, "
                         "or use --device cpu")


def nearest(name: str, known: Mapping[str, Any], dashes: str = "") -> str:
    """A hint at the known name that is meant: by another trainer's name for it, by its last part alone (lr for optim.lr), or by its looks."""
    if (ours := known_elsewhere(name, known)) is not None:
        return f", which is {dashes}{ours} here"
    leaves = {key.rpartition(".")[2]: key for key in known}
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(name, known, 1, 0.6)
    if not close:
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, 1, 0.6)]
    return f", did you mean {dashes}{close[0]}?" if close else ""


def spelled(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Arguments with every option in the parser's own spelling: dashes and underscores mean the same."""
    known: dict[str, str] = {}
    parsers = [parser]
    while parsers:
        one = parsers.pop()
        known |= {name.replace("-", "_"): name for name in one._option_string_actions}
        parsers += [sub for action in one._actions if isinstance(action, argparse._SubParsersAction) for sub in action.choices.values()]
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        found.append(known.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else word)
    return found


def report_json(found: Any, file: str | None, show: Callable[[], None]) -> None:
    """A command's figures: as JSON on standard output where `file` is "-", else shown, and written to `file` if there is one."""
    text = json.dumps(found, indent=1)
    if file == "-":
        print(text)
        return
    show()
    if file is not None:
        Path(file).write_text(text + "\n", encoding="utf-8")


def count(text: str, least: int = 1) -> int:
    """A whole number of at least `least`, for argparse."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number {'above 0' if least else 'from 0 on'}, got {text!r}")


def count_or_none(text: str) -> int:
    """A whole number, 0 among them."""
    return count(text, least=0)
