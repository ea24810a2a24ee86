"""A terminal that a program is run on: a pseudo terminal of any size, and what a person would see
on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

# takes the terminal, so that Ctrl-C and closing it reach the program, and becomes the program
_START = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "1":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[2], sys.argv[2:])
"""
_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Terminal:
    """A program on a pseudo terminal of its own.

    Args:
        command: the program and its arguments.
        nohup: start it as nohup does.
    """

    def __init__(
        self,
        command: Sequence[str],
        width: int,
        height: int = 24,
        *,
        nohup: bool = False,
        **options: object,
    ) -> None:
        self._master, slave = pty.openpty()
        self.output = ""
        self.resize(width, height)
        modes = termios.tcgetattr(slave)
        modes[3] &= ~termios.ECHO  # what is typed is not shown
        termios.tcsetattr(slave, termios.TCSANOW, modes)

        start = [sys.executable, "-c", _START, str(int(nohup)), *command]
        self.process = subprocess.Popen(
            start, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, **options
        )
        os.close(slave)

    def resize(self, width: int, height: int = 24) -> None:
        """Give the terminal another size, and tell the program."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, until: str | None = None, seconds: float = 120.0) -> str:
        """Read until a text has come, or until the program ends."""
        end = time.monotonic() + seconds
        while until is None or until not in self.output:
            assert time.monotonic() < end, self.output[-3000:]
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:  # what Linux says where the program has closed its side
                    break
                if not data:
                    break
                self.output += data.decode("utf-8", "replace")
            elif self.process.poll() is not None:
                break
        return self.output

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def close(self) -> None:
        """Close the window."""
        os.close(self._master)

    def wait(self, seconds: float = 120.0) -> int:
        """The program's exit code, as a shell says it."""
        code = self.process.wait(seconds)
        return code if code >= 0 else 128 - code


def seen(output: str, width: int) -> list[str]:
    """The lines of a terminal of this width after a program's output, from the first one on that
    has scrolled away. A line that is too long goes on in the next."""
    lines, row, column = [""], 0, 0
    position = 0
    while position < len(output):
        found = _CONTROL.match(output, position)
        if found is not None:
            count, what = found[1], found[2]
            if what == "A":
                row = max(0, row - int(count or 1))
            elif what == "K":
                assert count == "2", found[0]
                lines[row] = ""
            else:
                assert what == "m", found[0]  # a colour; whatever else would be news
            position = found.end()
            continue
        letter = output[position]
        position += 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row, column = row + 1, 0
        else:
            if column == width:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append("")
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
        while len(lines) <= row:
            lines.append("")
    return [line.rstrip() for line in lines]
