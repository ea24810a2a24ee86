"""Texts that a model, a user or a file has made, for a terminal."""

from __future__ import annotations

import re

# What moves the cursor, changes colours and titles, rings, or turns the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return the text with control characters as pictures or as their numbers, so that it cannot
    steer the terminal. Line breaks and tabs stay."""
    return _CONTROL.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 32:
        return chr(0x2400 + code)
    return "\u2421" if code == 127 else f"<U+{code:04X}>"


def shortened(text: str, longest: int) -> str:
    """Return the text, or its two ends with the number of characters between if it has more than
    `longest`."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
