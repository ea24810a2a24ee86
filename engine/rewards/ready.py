"""Ready rewards, which --reward takes by name, with options after a colon:

    --reward exact_match
    --reward length:target=200,unit=words
    --reward 'regex:pattern=^\\d+$'

A comma or an equals sign belongs to a value unless the name of an option and = follow it. From
Python each is a function with TRL's contract, whose options are its keyword-only arguments:
`functools.partial(length, target=200)`.

    exact_match     is the final answer the right one? (no further package)
    math_verify     the same by the package math-verify, which knows algebra
    format          are the parts there, each in its tags?
    regex           does a pattern match?
    length          how near is the length to a target, or how far beyond a budget?
    code            do programs pass their tests? (`programs`)
    judge           how does a language model rate the answer? (`endpoint`)
"""

from __future__ import annotations

import difflib
import inspect
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fusedrl.engine.base.errors import RewardError, SetupError
from fusedrl.engine.rewards.answers import final_answer, last_number, plain, same_answer
from fusedrl.engine.rewards.endpoint import check_judge, judge
from fusedrl.engine.rewards.programs import TESTS, code
from fusedrl.engine.rewards.texts import column_of, text_of

GOLD = ("gold", "answer", "solution", "ground_truth", "target")  # columns of right answers
_SECONDS = 5  # in which math-verify reads, and compares, one answer


# ---- right answers -------------------------------------------------------------------------------
def exact_match(
    completions: Sequence[Any], *, column: str = "", find: str = "marked", **columns: Any
) -> list[float | None]:
    """Return 1 if the completion's final answer is the right one, else 0; None for rows without a
    right answer. `answers` says what counts as an answer, and which are the same.

    Args:
        column: column of the right answers; by default the first there is of gold, answer,
            solution, ground_truth and target. A solution that ends in its answer, as in GSM8K
            ("#### 18") and MATH (boxed), is read like a completion.
        find: "marked": the answer is boxed, or behind #### or "answer is", or the completion is
            nothing else. "number": the last number of the completion, for models that were not
            taught a form; a completion may then guess several times.
    Raises:
        RewardError: there is no such column.
    """
    if find not in ("marked", "number"):
        raise RewardError(
            f"reward 'exact_match': expected find to be marked or number, got {find!r}"
        )
    name, right = column_of("exact_match", columns, column, GOLD)
    ours = last_number if find == "number" else final_answer
    return [
        None
        if theirs is None
        else float(any(same_answer(ours(text_of(said)), one) for one in _accepted(name, theirs)))
        for said, theirs in zip(completions, right, strict=True)
    ]


def _accepted(name: str, value: Any) -> list[str]:
    """Return the right answers of a row, of which there may be several."""
    listed = value if isinstance(value, list) else [value]
    if not listed or any(isinstance(one, bool | dict | list | None) for one in listed):
        raise RewardError(
            f"reward 'exact_match': expected a right answer, or a list of them, in the column "
            f"{name!r}, got {value!r:.80}; null leaves a row to other rewards"
        )
    return [plain(final_answer(str(one))) for one in listed]


def math_verify(
    completions: Sequence[Any], *, column: str = "", **columns: Any
) -> list[float | None]:
    """Return 1 if the package math-verify finds the completion's answer equal to the right one,
    else 0; None for rows without a right answer.

    It reads LaTeX and plain expressions and compares them with sympy, so 2x + 2 equals 2(x + 1). A
    right answer without marks of LaTeX is read as if it stood in $...$. Reading and comparing may
    take five seconds each, and then count as wrong; the limit needs the main thread, elsewhere
    there is none.

    Args:
        column: as for `exact_match`.
    Raises:
        SetupError: the package is missing (pip install 'fusedrl[math]').
        RewardError: there is no such column.

    Source: Kydlíček (2025), Math-Verify, https://github.com/huggingface/Math-Verify.
    """
    try:
        import math_verify as package
    except ImportError as error:
        raise SetupError(
            "reward 'math_verify' needs the package math-verify: pip install 'fusedrl[math]'; "
            "exact_match needs none"
        ) from error
    # its limit is an alarm, which only the main thread can set
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    _, right = column_of("math_verify", columns, column, GOLD)

    def read(text: str) -> Any:
        return package.parse(text.rpartition("</think>")[2], parsing_timeout=seconds)

    def gold(value: Any) -> Any:
        text = str(value)
        written = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
        return (None if written else read(f"${text}$")) or read(text)

    return [
        None
        if theirs is None
        else float(package.verify(gold(theirs), read(text_of(said)), timeout_seconds=seconds))
        for said, theirs in zip(completions, right, strict=True)
    ]


# ---- form ----------------------------------------------------------------------------------------
def format(
    completions: Sequence[Any],
    *,
    tags: str = "think",
    opened: bool = False,
    **columns: Any,
) -> list[float]:
    """Return 1 if the completion consists of its parts, else 0: each part in its tags, in their
    order, none empty, each tag once, nothing between two parts. What follows the last part is the
    answer; it must not be empty, unless the last part is "answer".

    Args:
        tags: names of the parts with + between them: think, or think+answer.
        opened: the prompt ends with the first opening tag, as some chat templates write it, so that
            the completion begins inside.

    Source: the format reward of DeepSeek-R1 (DeepSeek-AI, 2025, 2.2.2), for the tags think and
    answer.
    """
    names = tags.split("+")
    if not all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise RewardError(
            f"reward 'format': expected tags to be names with + between them, as in think+answer, "
            f"got {tags!r}"
        )
    return [float(_formed(text_of(said), names, opened)) for said in completions]


def _formed(text: str, names: Sequence[str], opened: bool) -> bool:
    text = f"<{names[0]}>{text}" if opened else text
    at = 0
    for name in names:
        begin, end = f"<{name}>", f"</{name}>"
        if text.count(begin) != 1 or text.count(end) != 1:
            return False
        start, stop = text.index(begin), text.index(end)
        if start < at or text[at:start].strip() or not text[start + len(begin) : stop].strip():
            return False
        at = stop + len(end)
    return bool(text[at:].strip()) is (names[-1] != "answer")


def regex(
    completions: Sequence[Any], *, pattern: str, whole: bool = False, **columns: Any
) -> list[float]:
    """Return 1 if a regular expression of Python's `re` matches somewhere in the completion, else
    0; a dot matches line ends, too. A pattern that backtracks can take very long: `fusedrl
    reward-check` shows it.

    Args:
        pattern: the regular expression.
        whole: it must match the whole completion.
    Raises:
        RewardError: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(
            f"reward 'regex': {pattern!r} is no regular expression: {error}"
        ) from None
    find = compiled.fullmatch if whole else compiled.search
    return [float(find(text_of(said)) is not None) for said in completions]


def length(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    target: int = 0,
    budget: int = 0,
    unit: str = "tokens",
    **columns: Any,
) -> list[float]:
    """Return how well the length n of each completion fits, from -1 to 0.

    target    -min(1, |n - target| / target)
    budget    0 up to the budget, beyond it -min(1, (n - budget) / budget)

    Args:
        target, budget: a number above 0; exactly one of the two.
        unit: tokens (an EOS is one), words or characters.
    Raises:
        RewardError: not exactly one of target and budget, or another unit.

    Source: the length terms of L1 (Aggarwal and Welleck, 2025, eq. 1 and 2), with 1 / target as
    their coefficient.
    """
    aim = target or budget
    if (target > 0) is (budget > 0) or aim < 0:
        raise RewardError(
            "reward 'length': expected target or budget, a number above 0 and one of the two, as "
            f"in length:target=200; got target={target}, budget={budget}"
        )
    if unit == "tokens":
        if completion_ids is None:
            raise RewardError("reward 'length': in tokens it needs completion_ids")
        sizes = [len(ids) for ids in completion_ids]
    elif unit in ("words", "characters"):
        texts = [text_of(said) for said in completions]
        sizes = [len(text.split()) if unit == "words" else len(text) for text in texts]
    else:
        raise RewardError(
            f"reward 'length': expected unit to be tokens, words or characters, got {unit!r}"
        )
    away = [abs(size - aim) if target else max(0, size - aim) for size in sizes]
    return [-min(1.0, distance / aim) for distance in away]


def none(completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 0 for every completion: for methods that learn from something else."""
    return [0.0] * len(completions)


# ---- by name -------------------------------------------------------------------------------------
READY: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (exact_match, math_verify, format, regex, length, code, judge, none)
}


class Ready:
    """A ready reward with its options. A column of the data that has the name of an option does not
    set the option."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.function, self.options = function, dict(options)
        self.__name__ = function.__name__
        self._known = options_of(function)

    def try_columns(self, columns: Collection[str]) -> None:
        """Call the reward of no completion, so that it raises where a column or a package is
        lacking."""
        found = self([], [], [], **dict.fromkeys(columns, ()))
        if inspect.iscoroutine(found):
            found.close()  # it checks nothing before its first await

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        arguments = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
        } | {name: column for name, column in columns.items() if name not in self._known}
        return self.function(**arguments, **self.options)


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a ready reward: its keyword-only parameters."""
    found = inspect.signature(function).parameters
    return {name: one for name, one in found.items() if one.kind is one.KEYWORD_ONLY}


def ready(spec: str) -> Ready | None:
    """Return the ready reward that a specification names, with its options; None if it names none.

    Raises:
        RewardError: an option that the reward does not have, lacks, or whose value is of another
            type or outside its range.
        SetupError: a package that the reward needs is missing.
    """
    name, colon, rest = spec.partition(":")
    if name not in READY:
        return None
    known = options_of(READY[name])
    options: dict[str, Any] = {}
    for part in re.split(rf",(?=(?:{'|'.join(known)})=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            if key in known:
                raise RewardError(f"reward {spec!r}: expected a value, {name}:{key}=...")
            near = difflib.get_close_matches(key, known, 1)
            raise RewardError(
                f"reward {spec!r}: {name} has no option {key!r}"
                + (f", did you mean {near[0]}?" if near else "")
                + f"; its options: {', '.join(f'{one}=...' for one in known)}"
            )
        options[key] = _typed(spec, key, value, str(known[key].annotation))
    for key, one in known.items():
        if one.default is one.empty and key not in options:
            raise RewardError(f"reward {spec!r}: expected {name}:{key}=..., which has no default")
    reward = Ready(READY[name], options)
    # of no completion, so that wrong options and missing packages are told before a rollout
    reward.try_columns([*GOLD, *TESTS, options.get("column", "")])
    if name == "judge":
        check_judge(**options)
    return reward


def _typed(spec: str, key: str, value: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except (ValueError, KeyError):
        words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        raise RewardError(
            f"reward {spec!r}: expected {key} to be {words[kind]}, got {value!r}"
        ) from None
