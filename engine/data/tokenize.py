"""Text to token ids, with the boundary between prompt and completion that generation has.

A prompt and its completion are tokenised separately: the generator continues the ids of the prompt,
so no token may span the boundary in training either. Lengths are limited here, before any device
work, and what is dropped is counted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from fusedrl.engine.base.blame import told
from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.records import Demonstration, Dialogue, Prompt, PromptExample, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


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
    """Ids of a prompt: the special tokens that the tokenizer adds, but no EOS at the end; messages,
    and tools, through the chat template.

    An empty prompt is the BOS token alone.

    Raises:
        DataError: no tokenizer, an empty prompt without a BOS token, messages without a chat
            template or of which it makes nothing, or a text with a lone surrogate.
    """
    if tokenizer is None:
        raise no_tokenizer()
    if not isinstance(prompt, str):
        _needs_template(tokenizer)
        with _templates():
            text = tokenizer.apply_chat_template(
                prompt, tools=tools, tokenize=False, add_generation_prompt=True
            )
        if not (ids := _ids(tokenizer, str(text), special=False)):
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
    """Tokens of a text as a prompt, for ReadOptions.count_tokens: posts to be summarized are
    shortened by it."""
    return len(encode_prompt(tokenizer, text))


def end_of_text(tokenizer: PreTrainedTokenizerBase, model_ids: Sequence[int]) -> int:
    """The id that ends a completion: the first of the model's EOS ids, else the tokenizer's.

    Raises:
        DataError: neither names one.
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
    """Ids of a completion: no special tokens, then EOS.

    Some tokenizers put a space in front of every text. That is right at the beginning (`first`,
    plain text after BOS) and wrong in the middle, where it would make `prompt + completion` decode
    with two spaces; there the text is tokenised behind a line end, which is cut off again.
    """
    return (_ids(tokenizer, text, special=False) if first else _continued(tokenizer, text)) + [
        eos_id
    ]


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase | None, dialogue: Dialogue, eos_id: int
) -> tuple[list[int], list[bool]]:
    """(ids, actions) of a whole conversation: the tokens of the assistant's turns, through the
    special token that ends each, are actions; nothing else is.

    A turn begins where the chat template asks for it (add_generation_prompt), and is tokenised
    apart from what stands before and behind it, as it is when the model writes it. If no special
    token ends the last turn, EOS does. Where the template writes earlier turns otherwise than last
    ones, so that they cannot be found that way, its {% generation %} marks say which tokens are the
    assistant's.

    Raises:
        DataError: no tokenizer, no chat template, or one that neither goes turn by turn nor has the
            marks.
    """
    if tokenizer is None:
        raise no_tokenizer()
    _needs_template(tokenizer)
    text = _render(tokenizer, dialogue)
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


def _render(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, **options: Any) -> str:
    with _templates():
        return str(
            tokenizer.apply_chat_template(
                dialogue.messages, tools=dialogue.tools, tokenize=False, **options
            )
        )


@contextlib.contextmanager
def _templates() -> Iterator[None]:
    """What a chat template refuses, or cannot render, is told as a fault of data and template."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except Exception as error:  # a template calls, indexes and divides as it likes
        said = error if isinstance(error, TemplateError) else told(error)
        raise DataError(
            f"the model's chat template refuses these messages: {said}; change their roles or "
            "order (many templates take no system message, and "
            "user and assistant in turn), or the template in the model's directory"
        ) from error


def _turns_by_prefix(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, text: str
) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the rendered conversation, if the template renders turn
    by turn; else nothing."""
    spans = []
    for index, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            if not index:
                return []  # no template renders an empty conversation
            before = _render(
                tokenizer,
                Dialogue(dialogue.messages[:index], dialogue.tools),
                add_generation_prompt=True,
            )
            through = _render(tokenizer, Dialogue(dialogue.messages[: index + 1], dialogue.tools))
            if not text.startswith(through) or not through.startswith(before):
                return []
            spans.append((len(before), len(through)))
    return spans


def _turns_by_marks(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, text: str
) -> list[tuple[int, int]]:
    """The same from {% generation %} marks: they are made to print two characters that the text
    does not have. (The mask that transformers makes of them takes in a whole token where one spans
    the beginning of a turn.)"""
    begin, end = "\ue000", "\ue001"
    template: Any = tokenizer.get_chat_template(tools=dialogue.tools)
    for mark, name in ((begin, "generation"), (end, "endgeneration")):
        template = re.sub(
            rf"({{%-?)\s*{name}\s*(-?%}})", rf"\1 if true %}}{mark}{{% endif \2", template
        )
    printed = _render(tokenizer, dialogue, chat_template=template)
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
    """(example, prompt ids) of the prompts of at most `limit` tokens.

    Raises:
        DataError: all of them are longer.
    """
    items = [
        (example, encode_prompt(tokenizer, example.prompt, example.columns.get("tools")))
        for example in examples
    ]
    return drop_longer(items, limit, lambda item: len(item[1]))


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Demonstration], eos_id: int, limit: int
) -> tuple[list[tuple[list[int], list[int]]], Dropped]:
    """(prompt ids, completion ids) of the demonstrations of at most `limit` tokens in all.

    Raises:
        DataError: all of them are longer.
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
    """(ids, actions) of the conversations of at most `limit` tokens; see `encode_dialogue`.

    Raises:
        DataError: all of them are longer.
    """
    return drop_longer(
        [encode_dialogue(tokenizer, example, eos_id) for example in examples],
        limit,
        lambda item: len(item[0]),
    )


def drop_longer(
    items: Sequence[T], limit: int, length: Callable[[T], int]
) -> tuple[list[T], Dropped]:
    """The items of at most `limit` tokens, and the count of the others.

    Raises:
        DataError: none is left.
    """
    kept = [item for item in items if length(item) <= limit]
    if items and not kept:
        shortest = min(length(item) for item in items)
        raise DataError(
            f"all {len(items)} examples are longer than {limit} tokens (the shortest has "
            f"{shortest}); raise the limit, or shorten them"
        )
    return kept, Dropped(len(items) - len(kept), len(items), limit)


def no_tokenizer() -> DataError:
    """Return the error to raise where there is text and no tokenizer."""
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
    """Ids of a text that stands behind another."""
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
    """The ids of a line end, for tokenizers that treat the beginning of a text differently; else
    nothing."""
    end, behind = _ids(tokenizer, "\n", special=False), _ids(tokenizer, "\na", special=False)
    return (
        tuple(end)
        if end
        and behind[: len(end)] == end
        and behind[len(end) :] != _ids(tokenizer, "a", special=False)
        else ()
    )
