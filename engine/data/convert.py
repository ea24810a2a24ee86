"""Conversion of rows of each format to records: the functions that the table in formats.py names.

A function raises BadRow if the row does not fit its format, and Dropped if the row is well formed
but holds nothing to learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fusedrl.engine.data import fields as get
from fusedrl.engine.data.lines import BadRow, Dropped, Row
from fusedrl.engine.data.records import (
    Demonstration,
    Dialogue,
    Messages,
    PairExample,
    Prompt,
    PromptExample,
    RankedExample,
    ScoredExample,
    StepExample,
    UnpairedExample,
)
from fusedrl.engine.data.templates import ASSISTANT, TEMPLATES, Template, few_shot, news, tldr


@dataclass(frozen=True)
class ReadOptions:
    """Choices that some formats leave open.

    Args:
        soft_labels: keep ties (WebGPT) as pairs with label 0.5, for a loss that uses labels;
            otherwise ties are dropped and counted.
        min_score_ratio: SHP: smallest ratio of the preferred answer's votes to the other answer's;
            below it the label is mostly noise.
        max_pairs_per_post: SHP: use at most this many pairs of a post, the first ones. Otherwise a
            few posts with many answers are memorised.
        split: summaries: use only rows of this split (train, valid1, valid2); None uses all.
        count_tokens: function that returns the number of tokens of a text. If given, posts to be
            summarised are cut at a line end so that the query has at most `query_tokens` tokens.
        query_tokens: largest number of tokens of such a query.
    """

    soft_labels: bool = False
    min_score_ratio: float = 2.0
    max_pairs_per_post: int = 5
    split: str | None = None
    count_tokens: Callable[[str], int] | None = None
    query_tokens: int = 512


@dataclass
class Reading:
    """State of one pass over one file: options, template, and counts of what has been read."""

    options: ReadOptions
    template: Template
    seen: Counter[str] = field(default_factory=Counter)


# ---- shared by formats ---------------------------------------------------------------------------
def prompt_example(prompt: Prompt, row: Row, *used: str, **extra: Any) -> PromptExample:
    """Return a prompt with the row's other columns, except those in `used`. Raise BadRow if the
    prompt has no text."""
    said = [prompt] if isinstance(prompt, str) else [one.get("content") or "" for one in prompt]
    if not any(text.strip() for text in said) and not _calls(prompt):
        raise BadRow("the prompt is empty, so that nothing is asked; fill it, or leave the row out")
    columns = {name: value for name, value in row.items() if name not in used}
    if not isinstance(prompt, str) and "tools" in columns:
        columns["tools"] = get.tools(row)
    return PromptExample(prompt, columns | extra)


def _calls(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and any(one.get("tool_calls") for one in prompt)


def prompts(
    of: Callable[[Row, Reading], Prompt], *used: str
) -> Callable[[Row, Reading], PromptExample]:
    """Make a reader of prompts: `of` finds the prompt of a row; columns in `used` are left out of
    the record."""
    return lambda row, reading: prompt_example(of(row, reading), row, *used)


def asked(row: Row, name: str, reading: Reading) -> Prompt:
    """Return the prompt that the template makes of this column as the question."""
    return reading.template.render(get.text(row, name), "")


def question(name: str) -> Callable[[Row, Reading], Prompt]:
    """Make a function that returns the prompt which the template makes of this column as the
    question."""
    return lambda row, reading: asked(row, name, reading)


def given(row: Row, reading: Reading) -> Prompt:
    """Return the "prompt" column: messages unchanged, a text as the template renders it (unchanged
    unless a template was named)."""
    prompt = get.text_or_messages(row, "prompt")
    return reading.template.render(prompt, "") if isinstance(prompt, str) else prompt


def _answer(row: Row, name: str, reading: Reading) -> str:
    text = get.answer(row, name)
    return text if isinstance(row["prompt"], list) else reading.template.answer(text)


def _tools(row: Row, prompt: Prompt) -> dict[str, Any]:
    return {} if isinstance(prompt, str) or "tools" not in row else {"tools": get.tools(row)}


def demonstrated(prompt: Prompt, completion: str, **extra: Any) -> Demonstration:
    """Return the demonstration; raise Dropped if the completion is blank."""
    if not completion.strip():
        raise Dropped("the completion is empty")
    return Demonstration(prompt, completion, **extra)


def _pair(prompt: Prompt, chosen: str, rejected: str, **extra: Any) -> PairExample:
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an answer is empty")
    if chosen.strip() == rejected.strip():
        raise Dropped("the answers are equal")
    return PairExample(prompt, chosen, rejected, **extra)


# ---- preferences: {"prompt"?, "chosen", "rejected"} ----------------------------------------------
def _margin(row: Row) -> dict[str, float]:
    """Return the column "margin" of a pair, if there is one."""
    return {} if row.get("margin") is None else {"margin": get.number(row, "margin")}


def explicit_pair(row: Row, reading: Reading) -> PairExample:
    """Return a pair from a row whose prompt has a column of its own."""
    prompt = given(row, reading)
    return _pair(
        prompt,
        _answer(row, "chosen", reading),
        _answer(row, "rejected", reading),
        **_margin(row),
        **_tools(row, prompt),
    )


def implicit_pair(row: Row, reading: Reading) -> PairExample:
    """Return a pair from two whole texts or conversations. The prompt is their beginning, and must
    be the same in both."""
    prompt, chosen = get.split(row, "chosen")
    other, rejected = get.split(row, "rejected")
    if prompt != other:
        raise Dropped("the prompts of the two answers differ")
    return _pair(prompt, chosen, rejected, **_margin(row), **_tools(row, prompt))


def explicit_chosen(row: Row, reading: Reading) -> Demonstration:
    """Return the better answer of a pair as a demonstration; the prompt has a column of its own."""
    prompt = given(row, reading)
    return demonstrated(prompt, _answer(row, "chosen", reading), **_tools(row, prompt))


def implicit_chosen(row: Row, reading: Reading) -> Demonstration:
    """Return the better one of two whole conversations as a demonstration."""
    prompt, chosen = get.split(row, "chosen")
    return demonstrated(prompt, chosen, **_tools(row, prompt))


# ---- comparisons with a schema of their own ------------------------------------------------------
def red_team_prompt(row: Row, reading: Reading) -> PromptExample:
    """Return the attacker's first turn as a prompt. The rest of the transcript is not used: another
    model wrote its answers."""
    transcript = get.text(row, "transcript")
    end = transcript.find(ASSISTANT)
    if end < 0:
        raise BadRow(f'expected "transcript" to hold the first turn up to {ASSISTANT!r}')
    get.number(row, "min_harmlessness_score_transcript")
    return prompt_example(transcript[: end + len(ASSISTANT)], row)


def shp_pair(row: Row, reading: Reading) -> PairExample:
    """Return a pair of the Stanford Human Preferences. Raise Dropped if its ratio of votes is below
    `min_score_ratio`, or its post already has `max_pairs_per_post` pairs."""
    first_is_better = get.one_of(row, "labels", 0, 1) == 1
    answers = [
        reading.template.answer(get.text(row, name)) for name in ("human_ref_A", "human_ref_B")
    ]
    ratio, post = get.number(row, "score_ratio"), get.text(row, "post_id")
    prompt = asked(row, "history", reading)
    if ratio < reading.options.min_score_ratio:
        raise Dropped(f"the score ratio is below {reading.options.min_score_ratio:g}")
    pair = _pair(prompt, *(answers if first_is_better else answers[::-1]))
    reading.seen[post] += 1
    if reading.seen[post] > reading.options.max_pairs_per_post:
        raise Dropped(f"the post has more than {reading.options.max_pairs_per_post} pairs")
    return pair


def webgpt_pair(row: Row, reading: Reading) -> PairExample:
    """Return a pair of WebGPT's comparisons. A tie is dropped, or with `soft_labels` gets the label
    0.5."""
    prompt = asked(row, "question.full_text", reading)
    answers = [reading.template.answer(get.text(row, name)) for name in ("answer_0", "answer_1")]
    scores = get.number(row, "score_0"), get.number(row, "score_1")
    if scores[0] == scores[1]:
        pair = _pair(prompt, *answers, label=0.5)
        if not reading.options.soft_labels:
            raise Dropped("a tie")
        return pair
    return _pair(prompt, *(answers if scores[0] > scores[1] else answers[::-1]))


# ---- summaries -----------------------------------------------------------------------------------
def summary_query(row: Row, reading: Reading, at: str = "") -> str:
    """Return the query for a summary of a post (shortened as in TL;DR) or of an article. `at` is
    the path of the columns within the row."""
    if at and not isinstance(row["info"], dict):
        raise get.wrong("info", "an object", row["info"])
    if at and "article" in row["info"]:
        return news(get.text(row, f"{at}article"))
    options = reading.options
    try:
        return tldr(
            get.text(row, f"{at}subreddit"),
            get.text(row, f"{at}title"),
            get.text(row, f"{at}post"),
            count_tokens=options.count_tokens,
            limit=options.query_tokens,
        )
    except ValueError as error:
        raise Dropped(str(error)) from error


def _in_split(row: Row, reading: Reading) -> None:
    if reading.options.split is not None and get.text(row, "split") != reading.options.split:
        raise Dropped(f"of another split than {reading.options.split}")


def spaced(text: str) -> str:
    """Return the text with one space before it, unless it begins with one."""
    return text if text[:1].isspace() else f" {text}"


def in_info(row: Row, reading: Reading) -> Prompt:
    """Return the query for a summary of the post or article in "info"."""
    return summary_query(row, reading, "info.")


def tldr_demonstration(row: Row, reading: Reading) -> Demonstration:
    """Return a demonstration of a post and its author's summary."""
    return demonstrated(summary_query(row, reading), spaced(get.text(row, "summary")))


def comparison(row: Row, reading: Reading) -> PairExample:
    """Return a pair of two summaries of a post or article, of which one was chosen."""
    _in_split(row, reading)
    better = get.one_of(row, "choice", 0, 1)
    summaries = row["summaries"]
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(summary, dict) for summary in summaries)
    ):
        raise BadRow('expected "summaries" to be a list of two objects with a "text" each')
    texts = [spaced(get.text(summary, "text")) for summary in summaries]
    return _pair(in_info(row, reading), texts[better], texts[1 - better])


def axes(row: Row, reading: Reading) -> ScoredExample:
    """Return a summary with its scores on each axis that was judged."""
    _in_split(row, reading)
    axes = get.column(row, "summary.axes")
    if not isinstance(axes, dict):
        raise get.wrong("summary.axes", "an object", axes)
    scores = {name: get.number(axes, name) for name, value in axes.items() if value is not None}
    if not scores:
        raise Dropped("no axis was scored")
    return ScoredExample(in_info(row, reading), spaced(get.text(row, "summary.text")), scores)


# ---- questions -----------------------------------------------------------------------------------
def gold_number(answer: str) -> str:
    """Return the text after the last "####" of a GSM8K answer, without commas.

    Raises:
        ValueError: there is no "####", or no text after it.
    """
    _, mark, number = answer.rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not number.lstrip("-").replace(".", "", 1).isdigit():
        raise ValueError('expected "answer" to end with "#### number"')
    return number


def gold(row: Row) -> str:
    """Return the number at the end of a GSM8K answer; raise BadRow if there is none."""
    try:
        return gold_number(get.text(row, "answer"))
    except ValueError as error:
        raise BadRow(
            f"{error} as in GSM8K; other questions are read with "
            ":prompt=question:completion=answer behind the name of the file"
        ) from error


def gsm8k_prompt(row: Row, reading: Reading) -> PromptExample:
    """Return the question as a prompt. The column "gold" is added: the number to be found."""
    return prompt_example(asked(row, "question", reading), row, gold=gold(row))


def gsm8k_demonstration(row: Row, reading: Reading) -> Demonstration:
    """Return a demonstration of the question and its solution."""
    gold(row)
    return demonstrated(
        asked(row, "question", reading), reading.template.answer(get.text(row, "answer"))
    )


def _shots(row: Row) -> list[tuple[str, str]]:
    shots = row.get("shots") or []
    if not isinstance(shots, list) or not all(isinstance(shot, dict) for shot in shots):
        raise BadRow('expected "shots" to be a list of objects {"input", "output"}')
    return [(get.text(shot, "input"), get.text(shot, "output")) for shot in shots]


def instruction_prompt(row: Row, reading: Reading) -> Prompt:
    """Return a prompt of an instruction and its input. If the row has solved examples ("shots"),
    the instruction comes first, then the examples, and the input is the question."""
    instruction, context, shots = (
        get.text(row, "instruction"),
        get.optional_text(row, "input"),
        _shots(row),
    )
    if not shots:
        return reading.template.render(instruction, context)
    return few_shot(shots, context, instruction=instruction, form=_style(row, reading))


def _style(row: Row, reading: Reading) -> Template:
    """Return the template for a row: solved examples are written as questions and answers, or as
    turns if the template is that of a chat."""
    return (
        TEMPLATES["qa"]
        if row.get("shots") and reading.template is not TEMPLATES["chat"]
        else reading.template
    )


def instructed(row: Row, reading: Reading) -> Demonstration:
    """Return a demonstration of an instruction; a chain of thought ("cot") comes before the
    output."""
    thought = get.optional_text(row, "cot")
    output = get.text(row, "output")
    answer = f"{thought}\n{output}" if thought and output else output
    return demonstrated(instruction_prompt(row, reading), _style(row, reading).answer(answer))


# ---- TRL's others, and ours ----------------------------------------------------------------------
def completed(row: Row, reading: Reading) -> Demonstration:
    """Return a demonstration of a prompt and its completion."""
    prompt = given(row, reading)
    return demonstrated(prompt, _answer(row, "completion", reading), **_tools(row, prompt))


def desirable(row: Row, reading: Reading) -> Demonstration:
    """Return the completion of a row as a demonstration; raise Dropped unless it is labelled as
    wanted."""
    if not _label(row):
        raise Dropped("the answer is labelled as not wanted")
    return completed(row, reading)


def _label(row: Row) -> bool:
    if not isinstance(row["label"], bool):
        raise get.wrong("label", "true or false", row["label"])
    return row["label"]


def unpaired(row: Row, reading: Reading) -> UnpairedExample:
    """Return a completion with its label, for KTO."""
    label, prompt, completion = (
        _label(row),
        given(row, reading),
        _answer(row, "completion", reading),
    )
    if not completion.strip():
        raise Dropped("the completion is empty")
    return UnpairedExample(prompt, completion, label, **_tools(row, prompt))


def steps(row: Row, reading: Reading) -> StepExample:
    """Return a solution in steps, each labelled right or wrong."""
    steps, labels = (
        get.many(row, "completions", str, "string"),
        get.many(row, "labels", bool, "boolean"),
    )
    if len(steps) != len(labels):
        raise BadRow(
            f'expected as many "labels" as "completions", got {len(labels)} and {len(steps)}'
        )
    if not steps:
        raise Dropped("there is no step")
    return StepExample(given(row, reading), steps, labels)


def ranked(row: Row, reading: Reading) -> RankedExample:
    """Return several answers with their ranks; blank answers are left out."""
    if not isinstance(row["completions"], list):
        raise get.wrong("completions", "a list of answers", row["completions"])
    answers = [
        get.answer({f"completions[{i}]": value}, f"completions[{i}]")
        for i, value in enumerate(row["completions"])
    ]
    ranks = get.many(row, "ranks", int, "whole number")
    if len(answers) != len(ranks):
        raise BadRow(
            f'expected as many "ranks" as "completions", got {len(ranks)} and {len(answers)}'
        )
    prompt, lead = given(row, reading), isinstance(row["prompt"], str)
    kept = [i for i, text in enumerate(answers) if text.strip()]
    texts = tuple(reading.template.answer(answers[i]) if lead else answers[i] for i in kept)
    example = RankedExample(prompt, texts, tuple(ranks[i] for i in kept), **_tools(row, prompt))
    if len(kept) < 2:
        raise Dropped("fewer than two answers")
    if len(set(example.ranks)) == 1:
        raise Dropped("all answers tie")
    return example


def expanded(row: Row, reading: Reading) -> list[PairExample]:
    """Return all pairs of a ranked list that are not ties; their weights sum to 1."""
    example = ranked(row, reading)
    pairs = [(example.completions[i], example.completions[j]) for i, j in example.pairs()]
    pairs = [(better, worse) for better, worse in pairs if better.strip() != worse.strip()]
    if not pairs:
        raise Dropped("the answers are equal")
    return [
        PairExample(example.prompt, better, worse, weight=1 / len(pairs), tools=example.tools)
        for better, worse in pairs
    ]


def implicit_prompt(row: Row, reading: Reading) -> Prompt:
    """Return the prompt that both the better and the worse conversation begin with."""
    return get.common_prompt(row)


def dialogues(name: str) -> Callable[[Row, Reading], Dialogue]:
    """Make a reader of whole conversations in a column."""
    return lambda row, reading: whole_dialogue(conversation(row, name), row)


def plain_text(row: Row, reading: Reading) -> Demonstration:
    """Return a text that is learned as a whole, without a prompt."""
    return demonstrated("", get.text(row, "text"))


def conversation(row: Row, name: str) -> Messages:
    """Return the messages of a column."""
    if not isinstance(row[name], list):
        raise get.wrong(name, "a list of messages", row[name])
    return get.messages(row, name)


def open_prompt(name: str) -> Callable[[Row, Reading], PromptExample]:
    """Make a function that returns a conversation without its last turn if that turn is the
    assistant's."""

    def read(row: Row, reading: Reading) -> PromptExample:
        found = conversation(row, name)
        prompt = found[:-1] if found[-1]["role"] == "assistant" else found
        if not prompt:
            raise BadRow(f'expected "{name}" to begin with another turn than the assistant\'s')
        return prompt_example(prompt, row, name)

    return read


def last_answer(name: str) -> Callable[[Row, Reading], Demonstration]:
    """Make a reader of conversations: the last answer is the completion, and everything before it
    is the prompt."""

    def read(row: Row, reading: Reading) -> Demonstration:
        conversation(row, name)
        prompt, completion = get.split(row, name)
        return demonstrated(prompt, completion, **_tools(row, prompt))

    return read


def whole_dialogue(messages: Messages, row: Row) -> Dialogue:
    """Return a dialogue with its tools; raise Dropped if the assistant says nothing."""
    if not any(message["role"] == "assistant" for message in messages):
        raise Dropped("the assistant says nothing")
    return Dialogue(messages, get.tools(row))


def completed_dialogue(row: Row, reading: Reading) -> Dialogue:
    """Return the dialogue of a prompt and a completion that are both messages."""
    prompt, completion = given(row, reading), row["completion"]
    if isinstance(prompt, str) or not isinstance(completion, list):
        raise BadRow('expected "prompt" and "completion" to be lists of messages for a dialogue')
    return whole_dialogue(prompt + get.messages(row, "completion"), row)
