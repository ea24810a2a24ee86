"""Conversation with a model, or with two side by side, in a terminal or from standard input.

A model with a chat template gets the whole conversation rendered by it at every turn; the keys and
values of what it has read before are found in its cache. A model without one continues the text:
all that was typed and answered so far. Where the context is full, the oldest turns are left out,
and it is said.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import DataError, UserError
from fusedrl.engine.base.printable import printable
from fusedrl.engine.data.records import Messages
from fusedrl.engine.data.tokenize import encode_completion, encode_prompt
from fusedrl.engine.generation.pieces import Pieces
from fusedrl.engine.generation.sampler import SamplingParams

HELP = """/reset            begin again; the system message stays
/system TEXT      begin again with this system message; without TEXT none
/temperature X    divide the logits by X from here on; 0 is greedy
/tokens N         longest answer
/quit             end (or Ctrl-D)
//...             a message that begins with a slash
\"\"\"               on a line of its own: a message of several lines begins or ends
Ctrl-C stops an answer."""
NARROW = 80  # columns of a terminal from which on two answers stand side by side
_BLOCK = '"""'


class Speaker:
    """One model, and its side of the conversation.

    Attributes:
        notices: messages for the user about the last turn: what was left out, or cut off.
    """

    def __init__(self, actor: HybridActor, name: str, system: str = "") -> None:
        self.actor, self.name = actor, name
        self.tokenizer: Any = actor.tokenizer
        self.positions = actor.decoder.config.max_positions
        self.notices: list[str] = []
        actor.limit_cache(1, self.positions)
        self.reset(system)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template; else it continues text."""
        return bool(self.tokenizer.chat_template)

    def reset(self, system: str) -> None:
        """Forget the conversation.

        Raises:
            DataError: a system message for a model without a chat template.
        """
        if system and not self.chats:
            raise DataError(
                f"{self.name} has no chat template, and so no system message; type the text that "
                "it is to go on from"
            )
        self._messages: Messages = [{"role": "system", "content": system}] if system else []
        self._ids: list[int] = []  # all tokens so far, of a model that continues text

    def answer(self, text: str, params: SamplingParams, turn: int) -> Iterator[str]:
        """Yield the answer to a message in pieces. Closing the iterator ends the answer; what had
        come of it stays in the conversation.

        Args:
            turn: number of the message, which keys the draws.
        Raises:
            DataError: the message alone is too long, or the template refuses it. It is then not
                part of the conversation.
        """
        self.notices.clear()
        least = min(params.max_new_tokens, max(1, self.positions // 4))
        ids = self._asked(text, least) if self.chats else self._continued(text, least)
        params = replace(
            params, max_new_tokens=min(params.max_new_tokens, self.positions - len(ids))
        )
        pieces, said, drawn = Pieces(self.tokenizer, ids), "", []
        drawing = self.actor.follow(ids, params, turn)
        try:
            for new, completion in drawing:
                drawn += new
                piece = pieces.add(new) + (pieces.end() if completion is not None else "")
                said += piece
                if completion is not None and completion.finish_reason == "length":
                    self.notices.append(f"cut off at {len(drawn)} tokens")
                if piece:
                    yield piece
        finally:
            drawing.close()  # type: ignore[attr-defined]
            self._messages.append({"role": "assistant", "content": said})
            self._ids = [*ids, *drawn]

    def _asked(self, text: str, least: int) -> list[int]:
        """Add a message to the conversation, and return the tokens to go on from, with room for
        `least` more."""
        before = list(self._messages)
        self._messages.append({"role": "user", "content": text})
        try:
            ids, left_out = encode_prompt(self.tokenizer, self._messages), 0
            while len(ids) + least > self.positions:
                turns = [i for i, one in enumerate(self._messages) if one["role"] == "user"]
                if len(turns) < 2:
                    raise self._too_long(len(ids), least)
                left_out += turns[1] - turns[0]
                del self._messages[turns[0] : turns[1]]
                ids = encode_prompt(self.tokenizer, self._messages)
        except DataError:
            self._messages = before
            raise
        if left_out:
            self.notices.append(
                f"the context of {self.positions} tokens is full: the {left_out} oldest messages "
                "are left out from here on"
            )
        return ids

    def _continued(self, text: str, least: int) -> list[int]:
        ends = {self.tokenizer.eos_token_id, *self.actor.decoder.config.eos_token_ids}
        so_far = self._ids[:-1] if self._ids and self._ids[-1] in ends else self._ids
        new = (
            encode_completion(self.tokenizer, text, 0)[:-1]
            if so_far
            else encode_prompt(self.tokenizer, text)
        )
        if len(new) + least > self.positions:
            raise self._too_long(len(new), least)
        ids = [*so_far, *new]
        if (over := len(ids) + least - self.positions) > 0:
            self.notices.append(
                f"the context of {self.positions} tokens is full: the first {over} tokens are left "
                "out from here on"
            )
        return ids[max(0, over) :]

    def _too_long(self, tokens: int, least: int) -> DataError:
        return DataError(
            f"the message has {tokens} tokens with what belongs to it, and the context of "
            f"{self.name} holds {self.positions}, of which {least} are for the answer; shorten it, "
            "or ask for shorter answers (/tokens)"
        )


class Chat:
    """Conversation of a person with one model, or two.

    Args:
        params: how to sample.
        system: the first system message, or "".
    """

    def __init__(
        self, speakers: Sequence[Speaker], params: SamplingParams, system: str = ""
    ) -> None:
        self._speakers, self._params, self._system = list(speakers), params, system
        self._turn = 0
        self._out, self._err = Console(markup=False, highlight=False), sys.stderr
        self._person = sys.stdin.isatty()  # else messages come from a file or a program

    def run(self) -> None:
        """Answer messages until there are no more.

        Raises:
            DataError: a message from a file cannot be answered; a person is told, and goes on.
        """
        for speaker in self._speakers:
            if not speaker.chats:
                self._say(
                    f"{speaker.name} has no chat template: it continues your text, and all before"
                )
        if self._person:
            self._say("/help lists what there is besides messages; /quit or Ctrl-D ends")
        while (message := self._next()) is not None:
            try:
                if message.startswith("/") and not message.startswith("//"):
                    if not self._command(message):
                        return
                elif message.strip():
                    self._answers(message.removeprefix("/") if message[:2] == "//" else message)
            except UserError as error:
                if not self._person:
                    raise
                self._say(str(error))

    def _say(self, text: str) -> None:
        print(f"({text})", file=self._err, flush=True)

    # ---- messages --------------------------------------------------------------------------------
    def _next(self) -> str | None:
        """Return the next message, or None at the end."""
        line = self._line("> ")
        if line is None or line.strip() != _BLOCK:
            return line
        lines = []
        while (line := self._line("  ")) is not None and line.strip() != _BLOCK:
            lines.append(line)
        return "\n".join(lines)

    def _line(self, sign: str) -> str | None:
        if not self._person:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        while True:
            try:
                return input(sign)
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                self._say("/quit or Ctrl-D ends")

    def _command(self, line: str) -> bool:
        """Carry a command out. Return whether the conversation goes on."""
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        if name in ("reset", "system"):
            self._system = rest.strip() if name == "system" else self._system
            for speaker in self._speakers:
                speaker.reset(self._system)
            self._say("begun again" + (f", with: {self._system}" if self._system else ""))
        elif name == "temperature":
            self._change(name, float, rest)
        elif name == "tokens":
            self._change("max_new_tokens", int, rest)
        elif name == "help":
            print(HELP, file=self._err)
        else:
            raise DataError(f"there is no /{name}; /help lists what there is")
        return True

    def _change(self, name: str, kind: type, text: str) -> None:
        try:
            self._params = replace(self._params, **{name: kind(text)})
        except ValueError as error:
            why = str(error) if "SamplingParams" in str(error) else f"got {text!r}"
            raise DataError(
                f"expected a {'whole ' * (kind is int)}number for {name}; {why}"
            ) from error
        self._say(f"{name} {text.strip()}")

    # ---- answers ---------------------------------------------------------------------------------
    def _answers(self, message: str) -> None:
        self._turn += 1
        streams = [one.answer(message, self._params, self._turn) for one in self._speakers]
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.callback(stream.close)  # type: ignore[attr-defined]
            stop = stack.enter_context(_interrupts(self._person))
            if len(streams) > 1 and self._out.is_terminal and self._out.width >= NARROW:
                self._columns(streams, stop)
            else:
                for speaker, stream in zip(self._speakers, streams, strict=True):
                    if len(streams) > 1:
                        print(f"[{speaker.name}]", flush=True)
                    self._write(stream, stop)
        if stop.is_set():
            self._say("stopped")
        for speaker in self._speakers:
            for notice in speaker.notices:
                self._say(f"{speaker.name}: {notice}" if len(streams) > 1 else notice)

    def _write(self, stream: Iterator[str], stop: threading.Event) -> None:
        for piece in stream:
            print(printable(piece), end="", flush=True)
            if stop.is_set():
                break
        print(flush=True)

    def _columns(self, streams: Sequence[Iterator[str]], stop: threading.Event) -> None:
        """Show both answers as they grow, as much of their ends as the terminal holds, and then
        whole."""
        texts, left = [""] * len(streams), list(enumerate(streams))
        with Live(console=self._out, transient=True, auto_refresh=False) as live:
            while left and not stop.is_set():
                for number, stream in list(left):
                    piece = next(stream, None)
                    if piece is None:
                        left.remove((number, stream))
                    else:
                        texts[number] += printable(piece)
                live.update(self._table(texts, self._out.height - 4), refresh=True)
        self._out.print(self._table(texts, 0))

    def _table(self, texts: Sequence[str], height: int) -> Table:
        """Return the texts side by side; of each the last `height` lines, or all of them for 0."""
        width = (self._out.width - 7) // len(texts)
        table = Table(expand=True)
        cells = []
        for speaker, text in zip(self._speakers, texts, strict=True):
            table.add_column(Text(speaker.name), width=width, overflow="fold")
            lines = Text(text).wrap(self._out, width)
            cells.append(Text("\n").join(lines[-height:] if height > 0 else lines))
        table.add_row(*cells)
        return table


@contextlib.contextmanager
def _interrupts(caught: bool) -> Iterator[threading.Event]:
    """Note the first Ctrl-C in the block in an event; the second one ends the program. With
    `caught` False the first one does."""
    stop = threading.Event()
    if not caught or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
