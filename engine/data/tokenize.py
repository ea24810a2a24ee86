"""Conversion of text to token ids, with the same boundary between prompt and completion as in
generation.

A prompt and its completion are tokenised separately: the generator continues the ids of the prompt,
so no token may span the boundary in training either. Lengths are limited here, before any work on
the device, and dropped examples are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.records import (
    Demonstration,
    Dialogue,
    Messages,
    Prompt,
    PromptExample,
    Tools,
)
from fusedrl.engine.data.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_MARK = "\ue000turn\ue001"  # characters that no text has


@dataclass(frozen=True)
class Dropped:
    """Number of examples, of `total`, that were longer than `limit` tokens."""

    count: int
    total: int
    limit: int

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.total} ({100 * self.count / max(1, self.total):.1f}%) are "
            f"longer than {self.limit} tokens and were dropped"
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, tools: Tools | None = None
) -> list[int]:
    """Return the ids of a prompt, with the special tokens that the tokenizer adds, but without EOS
    at the end. Messages and tools are rendered by the chat template.

    An empty prompt becomes the BOS token alone.

    Raises:
        DataError: there is no tokenizer; the prompt is empty and there is no BOS token; there are
            messages but no chat template, or the template renders them as nothing or without end;
            or the text has a lone surrogate.
    """
    if tokenizer is None:
        raise no_tokenizer()
    if not isinstance(prompt, str):
        _needs_template(tokenizer)
        text = render(tokenizer, prompt, tools, add_generation_prompt=True)
        if not (ids := _ids(tokenizer, text, special=False)):
            raise DataError(
                "the chat template makes nothing of the prompt's messages; a completion needs at "
                f"least one token to go on from: {str(prompt)[:120]}"
            )
        return ids
    plain = _ids(tokenizer, prompt, special=False)
    if not plain:
        if tokenizer.bos_token_id is None:
            raise DataError(
                "an empty prompt needs a BOS token to start from, and the tokenizer has none; give "
                "the prompt at least one character"
            )
        return [tokenizer.bos_token_id]
    ids = _ids(tokenizer, prompt, special=True)
    # an EOS that the author of the prompt wrote stays
    return ids[:-1] if ids[-len(plain) - 1 :] == [*plain, tokenizer.eos_token_id] else ids


def count_tokens(tokenizer: PreTrainedTokenizerBase | None, text: str) -> int:
    """Return the number of tokens of a text as a prompt. ReadOptions.count_tokens uses it to
    shorten posts to be summarised."""
    return len(encode_prompt(tokenizer, text))


def without_template(tokenizer: PreTrainedTokenizerBase | None, prompts: Iterable[Any]) -> str:
    """Say how many prompts are texts, to which the tokenizer's chat template is not applied; ""
    if it has none, or all prompts are messages."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    texts = [isinstance(prompt, str) for prompt in prompts]
    return (
        f"{sum(texts):,} of {len(texts):,} are texts, to which the model's chat template is not "
        'applied; for it give messages: {"prompt": [{"role": "user", "content": "..."}]}'
        if any(texts)
        else ""
    )


def end_of_text(tokenizer: PreTrainedTokenizerBase, model_ids: Sequence[int]) -> int:
    """Return the id that ends a completion: the first of the model's EOS ids, or else the
    tokenizer's EOS.

    Raises:
        DataError: neither the model nor the tokenizer has an EOS.
    """
    ids = [
        *model_ids,
        *([] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
    ]
    if not ids:
        raise DataError(
            "expected an EOS token to end completions with, and neither the model's configuration "
            "nor its tokenizer names one; "
            "set eos_token_id in config.json"
        )
    return ids[0]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, eos_id: int, *, first: bool = False
) -> list[int]:
    """Return the ids of a completion, without special tokens, followed by EOS.

    Some tokenizers put a space in front of every text. This is right at the beginning (`first`,
    plain text after BOS), but elsewhere `prompt + completion` would decode with two spaces. There
    the text is tokenised after a line end, whose ids are then removed.
    """
    return (_ids(tokenizer, text, special=False) if first else _continued(tokenizer, text)) + [
        eos_id
    ]


def encode_turn(
    tokenizer: PreTrainedTokenizerBase | None,
    before: Messages,
    turn: str | Messages,
    last: int | None,
    tools: Tools | None = None,
) -> list[int]:
    """Return the ids between one turn of the model and its next: what ends its turn, if it did not
    end it itself, the messages of others, and what prompts the model again. A text is tokenised
    as it is.

    The chat template renders the conversation with a mark in place of the model's turn; what stands
    behind the mark is tokenised. So the ids that the model drew are never tokenised anew, and what
    the template makes of earlier turns has no effect.

    Args:
        before: the messages before the model's turn.
        turn: those behind it.
        last: the id with which the model ended its turn; None if it was cut off.
    Raises:
        DataError: there is no tokenizer or no chat template, or the template refuses the messages
            or does not print the model's turn once.
    """
    if tokenizer is None:
        raise no_tokenizer()
    if isinstance(turn, str):
        return _continued(tokenizer, turn)
    _needs_template(tokenizer)
    marked: Messages = [*before, {"role": "assistant", "content": _MARK}, *turn]
    text = render(tokenizer, marked, tools, add_generation_prompt=True)
    if text.count(_MARK) != 1:
        raise DataError(
            "expected the chat template to print the content of an assistant's message once, got "
            f"it {text.count(_MARK)} times; turns of a trajectory cannot be told apart"
        )
    ids = _continued(tokenizer, text.partition(_MARK)[2])
    if last is not None and last in ids:
        end = ids.index(last)
        if not str(tokenizer.decode(ids[:end])).strip():
            return ids[end + 1 :]
    return ids


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase | None, dialogue: Dialogue, eos_id: int
) -> tuple[list[int], list[bool]]:
    """Return (ids, actions) of a whole conversation. The actions are the tokens of the assistant's
    turns, including the special token that ends each turn.

    A turn begins where the chat template prompts the assistant (add_generation_prompt). It is
    tokenised separately from the text before and after it, as if the model had written it. If no
    special token ends the last turn, EOS is added. Some templates render earlier turns differently
    from the last one, so that turns cannot be found in this way. Then the template's {% generation
    %} marks tell which tokens are the assistant's.

    Raises:
        DataError: there is no tokenizer or no chat template, or the template neither renders turn
            by turn nor has the marks.
    """
    if tokenizer is None:
        raise no_tokenizer()
    _needs_template(tokenizer)
    text = render(tokenizer, dialogue.messages, dialogue.tools)
    turns = _turns_by_prefix(tokenizer, dialogue, text) or _turns_by_marks(
        tokenizer, dialogue, text
    )
    specials = set(tokenizer.all_special_ids) | {eos_id}
    ids: list[int] = []
    actions: list[bool] = []
    end = 0
    for start, stop in turns:
        context = text[end:start]
        before = _continued(tokenizer, context) if end else _ids(tokenizer, context, special=False)
        turn = _continued(tokenizer, text[start:stop])
        chosen = max(
            (index + 1 for index, token in enumerate(turn) if token in specials), default=0
        )
        if not chosen and stop == len(text):
            turn.append(eos_id)
        ids += before + turn
        actions += [False] * len(before) + [
            index < (chosen or len(turn)) for index in range(len(turn))
        ]
        end = stop
    rest = _continued(tokenizer, text[end:])
    return ids + rest, actions + [False] * len(rest)


def _turns_by_prefix(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, text: str
) -> list[tuple[int, int]]:
    """Return the positions of the assistant's turns in the rendered conversation, if the template
    renders turn by turn; else nothing."""
    spans = []
    for index, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            if not index:
                return []  # no template renders an empty conversation
            before = render(
                tokenizer, dialogue.messages[:index], dialogue.tools, add_generation_prompt=True
            )
            through = render(tokenizer, dialogue.messages[: index + 1], dialogue.tools)
            if not text.startswith(through) or not through.startswith(before):
                return []
            spans.append((len(before), len(through)))
    return spans


def _turns_by_marks(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, text: str
) -> list[tuple[int, int]]:
    """Return the positions of the assistant's turns from {% generation %} marks, which are made to
    print two characters that the text does not have. (transformers' mask of these marks contains a
    whole token if the token spans the beginning of a turn.)"""
    begin, end = "\ue000", "\ue001"
    template: Any = tokenizer.get_chat_template(tools=dialogue.tools)
    for mark, name in ((begin, "generation"), (end, "endgeneration")):
        template = re.sub(
            rf"({{%-?)\s*{name}\s*(-?%}})", rf"\1 if true %}}{mark}{{% endif \2", template
        )
    printed = render(tokenizer, dialogue.messages, dialogue.tools, chat_template=template)
    spans: list[tuple[int, int]] = []
    at = 0
    for part in printed.split(begin)[1:]:
        at = printed.index(begin, at) + 1
        start = at - 2 * len(spans) - 1
        spans.append((start, start + part.find(end)))
    if (
        not spans
        or begin in text
        or end in text
        or printed.replace(begin, "").replace(end, "") != text
    ):
        raise DataError(
            "the chat template writes a turn of the assistant otherwise when others follow, so "
            "which tokens are the assistant's cannot be told; "
            "put {% generation %} and {% endgeneration %} around them in the template, or train on "
            "the last turn alone"
        )
    return spans


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[PromptExample], limit: int
) -> tuple[list[tuple[PromptExample, list[int]]], Dropped]:
    """Return (example, prompt ids) for the prompts of at most `limit` tokens.

    Raises:
        DataError: all prompts are longer.
    """
    items = [
        (example, encode_prompt(tokenizer, example.prompt, example.columns.get("tools")))
        for example in examples
    ]
    return drop_longer(items, limit, lambda item: len(item[1]))


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Demonstration], eos_id: int, limit: int
) -> tuple[list[tuple[list[int], list[int]]], Dropped]:
    """Return (prompt ids, completion ids) for the demonstrations of at most `limit` tokens in
    total.

    Raises:
        DataError: all demonstrations are longer.
    """
    items = [
        (
            encode_prompt(tokenizer, e.prompt, e.tools),
            encode_completion(tokenizer, e.completion, eos_id, first=not e.prompt),
        )
        for e in examples
    ]
    return drop_longer(items, limit, lambda item: len(item[0]) + len(item[1]))


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Dialogue], eos_id: int, limit: int
) -> tuple[list[tuple[list[int], list[bool]]], Dropped]:
    """Return (ids, actions) for the conversations of at most `limit` tokens; see `encode_dialogue`.

    Raises:
        DataError: all conversations are longer.
    """
    return drop_longer(
        [encode_dialogue(tokenizer, example, eos_id) for example in examples],
        limit,
        lambda item: len(item[0]),
    )


def drop_longer(
    items: Sequence[T], limit: int, length: Callable[[T], int]
) -> tuple[list[T], Dropped]:
    """Return the items of at most `limit` tokens, and the number of longer ones.

    Raises:
        DataError: no item is left.
    """
    kept = [item for item in items if length(item) <= limit]
    if items and not kept:
        shortest = min(length(item) for item in items)
        raise DataError(
            f"all {len(items)} examples are longer than {limit} tokens (the shortest has "
            f"{shortest}); raise the limit (max_length, or max_prompt_length of "
            "prompts; the model's positions are the most), or shorten them"
        )
    return kept, Dropped(len(items) - len(kept), len(items), limit)


def no_tokenizer() -> DataError:
    """Return the error to raise if there is text but no tokenizer."""
    return DataError(
        "text needs a tokenizer, and the model's directory has none; put its tokenizer.json and "
        "tokenizer_config.json there"
    )


def _needs_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the prompt is a list of messages, but the tokenizer has no chat template; use a chat "
            "model, or write prompts as strings"
        )


def _continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that follows another text."""
    anchor = _anchor(tokenizer)
    if anchor:
        ids = _ids(tokenizer, "\n" + text, special=False)
        if tuple(ids[: len(anchor)]) == anchor:
            return ids[len(anchor) :]
    return _ids(tokenizer, text, special=False)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    try:
        encoded: Any = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
    except (TypeError, UnicodeEncodeError):  # as tokenizers in Rust and in Python say it
        if not any("\ud800" <= character <= "\udfff" for character in text):
            raise
        raise DataError(
            "a text has a lone surrogate (\\ud800 to \\udfff), which is not a character: "
            f"{text[:80]!a}"
        ) from None
    return list(encoded["input_ids"])


@lru_cache(maxsize=4)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of a line end if the tokenizer treats the beginning of a text differently;
    else nothing."""
    end, behind = _ids(tokenizer, "\n", special=False), _ids(tokenizer, "\na", special=False)
    return (
        tuple(end)
        if end
        and behind[: len(end)] == end
        and behind[len(end) :] != _ids(tokenizer, "a", special=False)
        else ()
    )
