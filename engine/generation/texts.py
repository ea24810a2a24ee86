"""Texts: prompts, completions and stop strings, converted with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.generation.sampler import SamplingParams

_CONTEXT = 4  # last tokens of the prompt that are decoded together with a completion


class Texts:
    """Converts prompts to token ids, and token ids to texts. `tokenizer` may be None if prompts are
    token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def stop_string(self, params: SamplingParams, tokens: np.ndarray, start: int) -> str | None:
        """Return the stop string that the last token has completed in the text of tokens[start:],
        or None. Only the end of the text is decoded."""
        # a character is four tokens at the most: its bytes
        tail = max(start, len(tokens) - 4 * max(map(len, params.stop)) - _CONTEXT)
        text = self.text(tokens[:tail].tolist(), tokens[tail:].tolist())
        return next((stop for stop in params.stop if stop in text), None)

    def text(self, prompt_ids: list[int], token_ids: list[int]) -> str:
        """Return the text that the tokens add to the prompt's. They are decoded together with the
        prompt's last tokens: decoded alone, a sentencepiece tokenizer drops their first space."""
        before = self.tokenizer.decode(prompt_ids[-_CONTEXT:], skip_special_tokens=True)
        both = self.tokenizer.decode(prompt_ids[-_CONTEXT:] + token_ids, skip_special_tokens=True)
        return (
            both.removeprefix(before)
            if both.startswith(before)
            else self.tokenizer.decode(token_ids, skip_special_tokens=True)
        )

    def encode(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Return the token ids of strings, id lists and message lists."""
        ids: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, Completion):
                prompt = [*prompt.prompt_ids, *prompt.token_ids]
            elif isinstance(prompt, Tensor | np.ndarray):
                prompt = prompt.tolist()
            if isinstance(prompt, str):
                ids.append(encode_prompt(self._need("text"), prompt))
            elif (
                isinstance(prompt, Sequence)
                and prompt
                and all(isinstance(message, Mapping) for message in prompt)
            ):
                ids.append(
                    encode_prompt(self._need("messages"), [dict(message) for message in prompt])
                )
            elif isinstance(prompt, Sequence) and all(
                isinstance(t, Integral) and not isinstance(t, bool) for t in prompt
            ):
                ids.append([int(t) for t in prompt])
            else:
                raise TypeError(
                    f"generate: expected prompt {index} to be a string, a list of token ids, a "
                    "list of messages or a Completion, "
                    f"got {repr(prompt)[:80]}"
                )
            if not ids[-1]:
                raise ValueError(
                    f"generate: prompt {index} has no token; a completion needs at least one to go "
                    "on from, such as the BOS"
                )
        return ids

    def with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with stop strings that are special tokens turned into stop token
        ids. Texts are decoded without special tokens, so such strings would never be found.

        Raises:
            ValueError: a stop string contains a special token among other text.
        """
        tokenizer = self._need("stop strings")
        special = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        for text in params.stop:
            if text not in special and (
                inside := next((token for token in special if token and token in text), None)
            ):
                raise ValueError(
                    f"generate: the stop string {text!r} holds the special token {inside!r}, which "
                    "a completion's text never does; give that "
                    "token alone, and what stands beside it as a stop string of its own"
                )
        found = [special[text] for text in params.stop if text in special]
        if not found:
            return params
        return replace(
            params,
            stop=tuple(text for text in params.stop if text not in special),
            stop_token_ids=(*params.stop_token_ids, *found),
        )

    def _need(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"generate: prompts as {what} need a tokenizer, and this actor has none; give "
                "lists of token ids"
            )
        return self.tokenizer
