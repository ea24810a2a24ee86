"""Chat templates, rendered within bounds of time, memory and length.

A template comes with a model, and is a program. transformers runs it in Jinja's sandbox, which
keeps it from files and from Python's own objects, and lets it loop for ever and take all memory.
Here a rendering ends with an error

    after SECONDS of its thread's processor time: a timer that interrupts Python code, long
        arithmetic and regular expressions;
    once it wants MEMORY bytes more than the process holds (Linux): a limit of the system, also for
        a single call;
    where its text is LONGER times what it was given, and has more than LEAST characters.

An ordinary rendering takes a few microseconds longer for it. Not bounded are: renderings on other
threads than the main one, since signals and limits belong to the process; a single call in C that
takes long without memory, such as the comparison of lists that hold one another thirty deep; the
sum of many renderings, each of which keeps within the bounds.
"""

from __future__ import annotations

import functools
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedrl.engine.base.blame import shown, told
from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.records import Messages, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
MEMORY = 1 << 30
LONGER, LEAST = 16, 1 << 20
_TICK = 1.0  # seconds of processor time between two looks at the clock
_RECENT = 0.2  # seconds for which the process's size is not read anew


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None, **options: Any
) -> str:
    """Return the text that the tokenizer's chat template makes of messages.

    Args:
        options: of transformers' `apply_chat_template`.
    Raises:
        DataError: the template cannot be read, refuses the messages, or goes beyond the bounds of
            this file. The error names the file that the template is in.
    """
    made = _attempt(tokenizer, messages, tools, options)
    if isinstance(made, str):
        most = max(LEAST, LONGER * len(f"{messages}{tools}{tokenizer.chat_template}"))
        if len(made) <= LEAST or len(made) <= most:
            return made
        problem = f"makes {len(made):,} characters of them, where at most {most:,} are expected"
    elif isinstance(made, _Late):
        problem = (
            f"was not done after {SECONDS:g} seconds of processor time, where a rendering takes "
            "far less than one; it loops"
        )
    elif isinstance(made, MemoryError):
        problem = f"wants more than {MEMORY >> 20:,} MiB of memory"
    else:
        raise _refused(tokenizer, made) from made
    raise DataError(
        f"the model's chat template does not end well on these messages ({shown(messages)}): it "
        f"{problem}. Mend {template_file(tokenizer)}, or take a template from where you trust it"
    )


def _attempt(
    tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any, options: Any
) -> str | Exception:
    """Return the text, or what came instead: a loop's frames are let go of before it is told."""

    def call() -> str:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        return str(text)

    try:
        return _bounded(call)
    except (_Late, MemoryError) as error:
        return error.with_traceback(None)
    except Exception as error:  # a template calls, indexes and divides as it likes
        return error


def _refused(tokenizer: PreTrainedTokenizerBase, error: Exception) -> DataError:
    """Return the error about data and template that a template's own error becomes."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    file = template_file(tokenizer)
    if isinstance(error, TemplateSyntaxError):
        return DataError(
            f"the model's chat template is no template that can be read: {error.message} (line "
            f"{error.lineno} of it); mend {file}"
        )
    said = error if isinstance(error, TemplateError) else told(error)
    return DataError(
        f"the model's chat template refuses these messages: {said}; change their roles or "
        "order (many templates take no system message, and "
        f"user and assistant in turn), or the template: {file}"
    )


def template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the file that a tokenizer's chat template is in, as far as it is known."""
    directory = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    for name in ("chat_template.jinja", "additional_chat_templates"):
        if (directory / name).exists():
            return str(directory / name)
    if (directory / "tokenizer_config.json").is_file():
        return f"chat_template in {directory / 'tokenizer_config.json'}"
    return "chat_template.jinja, or chat_template in tokenizer_config.json, of the model"


# ---- bounds --------------------------------------------------------------------------------------
class _Late(Exception):
    """A rendering has taken its time."""


_began: float | None = None  # thread_time of the rendering in progress
_size, _read = 0, float("-inf")  # bytes that the process held, and when that was


def _bounded(call: Callable[[], str]) -> str:
    """Return what `call` returns. Raise _Late or MemoryError where it goes beyond the bounds."""
    global _read
    if threading.get_ident() != threading.main_thread().ident:
        return call()
    try:
        return _timed(call)
    except MemoryError:
        pass
    # the process may have grown since its size was read: once more
    _read = float("-inf")
    return _timed(call)


def _timed(call: Callable[[], str]) -> str:
    global _began
    _listen()
    limits = _limit_memory()
    _began = time.thread_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
    try:
        return call()
    finally:
        _began = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_DATA, limits)


@functools.cache
def _listen() -> None:
    signal.signal(signal.SIGVTALRM, _look)
    signal.siginterrupt(signal.SIGVTALRM, False)


def _look(number: int, frame: object) -> None:
    """Raise _Late in a rendering that has taken its time. The main thread runs this."""
    if _began is not None and time.thread_time() - _began > SECONDS:
        raise _Late


def _limit_memory() -> tuple[int, int] | None:
    """Let the process hold MEMORY more than it does, and return its limits before; None where its
    size cannot be read."""
    global _size, _read
    if time.monotonic() - _read > _RECENT:
        try:
            with open("/proc/self/statm", "rb") as file:
                _size = int(file.read().split()[5]) * resource.getpagesize()
        except (OSError, ValueError, IndexError):
            return None
        _read = time.monotonic()
    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _size + MEMORY if soft == resource.RLIM_INFINITY else min(soft, _size + MEMORY)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return before
