"""What the commands share: exit codes, devices that are not there, names that were meant, figures as JSON."""
from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusedrl.engine.errors import ConfigError, SetupError

FAILED, CONFIGURATION, ENVIRONMENT, INTERRUPTED = 1, 2, 3, 130


def check_device(name: str | None) -> None:
    """Raises ConfigError for what is no device, SetupError for one that this machine has not."""
    if name is None:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"config: expected device to be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        remedy = "check the driver with nvidia-smi" if built else "this torch is a CPU build; install a CUDA build from pytorch.org"
        raise SetupError(f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; {remedy}, "
                         "or use --device cpu")


def nearest(name: str, known: Mapping[str, Any], dashes: str = "") -> str:
    """A hint at the known name that looks most like this one, also where only its last part is meant (lr for optim.lr)."""
    leaves = {key.rpartition(".")[2]: key for key in known}
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(name, known, 1, 0.6)
    if not close:
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, 1, 0.6)]
    return f", did you mean {dashes}{close[0]}?" if close else ""


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
