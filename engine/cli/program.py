"""The program `fusedrl`, or `python -m fusedrl`: one command, then the end of the process.

The exit code does not depend on the moment at which a signal comes. One that ends the process gives
128 + its number, also while Python still imports, or after a run has given the handlers back. Once
the command has ended and the exit code is known, a signal ends the process at once with that code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_ALL = (signal.SIGINT, *_ENDING, signal.SIGUSR1, signal.SIGUSR2)


def program() -> NoReturn:
    """Run the command in sys.argv, and exit with its code."""
    # the first registered is called last: from then on Python takes itself down, without handlers
    atexit.register(_set, _ALL, signal.SIG_IGN)
    _set([signal.SIGINT], _interrupt)
    _set(_ENDING, _end)
    code = 1
    try:
        from fusedrl.engine.cli.main import main

        code = main()
    except KeyboardInterrupt:  # as main ended
        code = 128 + signal.SIGINT
        print("fusedrl: interrupted", file=sys.stderr)
    finally:
        with suppress(OSError, ValueError):  # the reader has gone, or it was closed
            if sys.stdout is not None:  # None: closed before Python began
                sys.stdout.flush()
        _set(_ALL, lambda *_: os._exit(code))
    sys.exit(code)


def _end(number: int, _: object) -> NoReturn:
    """End the process as the signal itself would, but for the exit code."""
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but end the process where a module is being imported: some modules
    abort then, or take the interrupt for a package that is missing."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"fusedrl: interrupted\n")
            _end(number, None)
        frame = frame.f_back
    raise KeyboardInterrupt


def _set(numbers: Sequence[signal.Signals], handler: Callable[..., Any] | signal.Handlers) -> None:
    """Set the handler of signals, but of those that this process was started to ignore (nohup)."""
    for number in numbers:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
