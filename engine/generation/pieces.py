"""Text of tokens as they come, in pieces that together are the text of the whole completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 4  # last tokens of the prompt that are decoded together with the first piece
_BROKEN = "\ufffd"  # a character of which some bytes have not come yet is decoded as this


class Pieces:
    """Makes pieces of text of tokens. A character whose bytes are split over several tokens, as of
    an emoji, comes whole with its last token; until then pieces are empty.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: tokens before the first one: a sentencepiece tokenizer drops the space of a
            token that is decoded alone.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        # decoding begins at the first, and what stands before the second has been handed out
        self._start, self._told = 0, len(self._ids)

    def add(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens add."""
        self._ids += token_ids
        piece = self._new()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return piece

    def end(self) -> str:
        """Return the rest, after the last token: bytes that never became a character come as the
        sign for a broken one."""
        piece = self._new()
        self._start = self._told = len(self._ids)
        return piece

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._told]).rstrip(_BROKEN)
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
