"""Prompt templates, which make the text or messages that the model continues of a question and the
context that the question is about.

A file's template is that of its format, or the one named by hand, as in `gsm8k/chat:FILE`. The
template's `lead` is put between the prompt and an answer, unless the answer begins with white
space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.records import Messages, Prompt

ASSISTANT = "\n\nAssistant:"  # HH-RLHF: what stands before every answer
HUMAN = "\n\nHuman:"


@dataclass(frozen=True)
class Template:
    """A prompt template: render(question, context) -> prompt; `lead` is put between the prompt and
    an answer."""

    render: Callable[[str, str], Prompt]
    lead: str = ""

    def answer(self, text: str) -> str:
        """Return an answer as it follows the prompt, with `lead` before it."""
        return text if text[:1].isspace() else self.lead + text


def _plain(question: str, context: str) -> str:
    return f"{question}\n\n{context}" if context else question


def _alpaca(question: str, context: str) -> str:
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{question}\n\n### "
            f"Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response:\n"
    )


def _chat(question: str, context: str) -> Messages:
    return [{"role": "user", "content": _plain(question, context)}]


TEMPLATES = {
    "plain": Template(_plain),
    "chat": Template(_chat),  # the model's own chat template renders it
    "qa": Template(
        lambda question, context: f"Question: {_plain(question, context)}\nAnswer:", " "
    ),
    # Kojima et al. (2022), "Large Language Models are Zero-Shot Reasoners"
    "cot": Template(
        lambda question, context: f"Q: {_plain(question, context)}\nA: Let's think step by step.",
        " ",
    ),
    "dialogue": Template(
        lambda question, context: f"{HUMAN} {_plain(question, context)}{ASSISTANT}", " "
    ),  # as HH-RLHF writes
    "alpaca": Template(_alpaca),  # Taori et al. (2023), as the text column of their data has it
}


def template(name: str) -> Template:
    """Return the template with this name. Raise DataError if there is none; it lists the known
    names."""
    if name not in TEMPLATES:
        raise DataError(f"unknown prompt template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def few_shot(
    shots: Sequence[tuple[str, str]],
    question: str,
    context: str = "",
    *,
    instruction: str = "",
    form: str | Template = "qa",
) -> Prompt:
    """Return a prompt of N solved questions, (question, answer) each, followed by a question. For a
    chain of thought write the reasoning into the answers.

    With a text template the parts are separated by empty lines, and the instruction comes first.
    With a chat template the solved questions are turns, and the instruction is the system message.
    """
    style = template(form) if isinstance(form, str) else form
    prompt = style.render(question, context)
    rendered = [(style.render(asked, ""), answer) for asked, answer in shots]
    if isinstance(prompt, str):
        parts = (
            [instruction] * bool(instruction)
            + [f"{asked}{style.answer(answer)}" for asked, answer in rendered]
            + [prompt]
        )
        return "\n\n".join(parts)
    turns: Messages = [{"role": "system", "content": instruction}] * bool(instruction)
    for asked, answer in rendered:
        turns += [*asked, {"role": "assistant", "content": answer}]  # type: ignore[list-item]
    return turns + prompt


# ---- summaries (Stiennon et al., 2020) -----------------------------------------------------------
def tldr(
    subreddit: str,
    title: str,
    post: str,
    *,
    count_tokens: Callable[[str], int] | None = None,
    limit: int = 512,
) -> str:
    """Return the query for a summary of a post. If `count_tokens` is given, the post is shortened
    so that the query has at most `limit` tokens: see `shorten`."""

    def render(body: str) -> str:
        return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"

    return render(post) if count_tokens is None else shorten(render, post, count_tokens, limit)


def news(article: str) -> str:
    """Return the query for a summary of an article of CNN or the Daily Mail."""
    return f"Article:\n{article}\n\nTL;DR:"


def shorten(
    render: Callable[[str], str], body: str, count_tokens: Callable[[str], int], limit: int
) -> str:
    """Return render(body) if it has at most `limit` tokens. Otherwise render the longest beginning
    of the body that fits and ends at a line end. If even the first line is too long, as many of its
    characters as fit are used.

    Raises:
        ValueError: even render("") has more than `limit` tokens.
    """
    while count_tokens(render(body)) > limit:
        end = body.rfind("\n")
        if end < 0:
            break
        body = body[:end]
    else:
        return render(body)
    fits, beyond = 0, len(body)
    if count_tokens(render("")) > limit:
        raise ValueError(f"the prompt has more than {limit} tokens without its text")
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if count_tokens(render(body[:middle])) <= limit:
            fits = middle
        else:
            beyond = middle
    return render(body[:fits])
