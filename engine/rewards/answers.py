"""Final answers of mathematical texts: where they stand, and whether two are the same.

    answer          the last \\boxed{...}, else what follows the last ####, else what follows the
                    last "answer is" or "answer:", else the whole text; text up to the last </think>
                    is never looked at
    number          18, 1,200, $5, .5, -3, 1.5e3, 1/2, \\frac{1}{2}, 3\\frac{1}{2}, 50%
    unit            words in \\text or \\mathrm behind a number are left out: 18 \\text{ apples} is
                    18, but 5 \\text{ million} is not 5
    the same        numbers of one exact value (1/2 = 0.5, and 0.33 is not 1/3); tuples and lists of
                    the same answers; else texts that differ in spaces, case, $, \\left, \\right and
                    \\text alone. 50% is the same as 0.5, and as 50: a question that says "what
                    percentage" is answered either way

A minus (- or U+2212) is a sign unless a letter, a digit or another dash stands before it: in "the
result-18" it is a hyphen. Numbers joined by +, -, *, / or ^, as in 10-4 and 3^2, are a calculation
without a result; 10-4=6 ends with 6.

Nothing is simplified here: 2x + 2 and 2(x + 1) are two answers. The reward `math_verify` knows
algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# a point that a number begins with does not stand behind a letter or another point
PLAIN = rf"(?:{DIGITS}(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\w))?"
SIGN = r"(?:(?<![\w)\-\u2010-\u2015\u2212])[-\u2212])"
NUMBER = rf"\$?{SIGN}?(?:\$\ ?)?{PLAIN}"
OPERATOR = r"(?:[-+*/^x\u2212\u00d7\u00f7]|\*\*|\\times|\\cdot|\\div)"
JOIN = rf"(?:{OPERATOR}|\ +{OPERATOR}\ +)"  # "2 -3" has two numbers
SUM = re.compile(rf"(?P<number>{NUMBER})(?:/(?P<over>{NUMBER}))?(?P<more>(?:{JOIN}{NUMBER})*)")

_MARK = re.compile(r"####[ \t]*(.+)")
_SAID = re.compile(r"\banswer(?:\s+is\s*:?|\s*[:=])[ \t]*(.+)", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[\d})])(?:\s|\\[,;: ])*\\(?:text|mathrm|mbox)\s*"
    r"\{(?!\s*(?:hundred|thousand|million|billion|trillion|dozen|percent))[^{}\d]*\}"
    r"(?:\^\{?\d\}?)?(?=[\s$.]*$)"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*([-\d.]+)\s*\}\s*\{\s*([-\d.]+)\s*\}|(\d)\s*(\d))")
_MIXED = re.compile(r"(?<![\w.])(\d+)\s*\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))")
_NAMED = re.compile(r"[A-Za-z]\w{0,2}\s*(?:=|\\in)\s*(?=[^=])")  # x = 5
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|[!,;: ])|\^\{?\\circ\}?|\\degree|\\[()\[\]]")


def value_of(found: re.Match[str]) -> Fraction | None:
    """Return the value of a match of `SUM`; None for a calculation, and for a fraction over 0."""
    if found["more"]:
        return None
    number, over = (
        Fraction(Decimal(re.sub(r"[$, ]", "", text).replace("\u2212", "-")))
        for text in (found["number"], found["over"] or "1")
    )
    return number / over if over else None


def final_answer(text: str) -> str:
    """Return the answer that a text ends with, as described at the top of this file."""
    text = text.rpartition("</think>")[2]
    for place in (_boxed, _last(_MARK), _last(_SAID)):
        if (found := place(text)) is not None:
            return found.strip()
    return text.strip()


def last_number(text: str) -> str:
    """Return the last number of a text as it is written, a sign of percent included; "" if there is
    none, or if it is part of a calculation."""
    text = plain(text.rpartition("</think>")[2])
    last = next(reversed(list(SUM.finditer(text))), None)
    if last is None or last["more"]:
        return ""
    return last[0] + "%" * (re.match(r"\s?%", text[last.end() :]) is not None)


def same_answer(ours: str, theirs: str) -> bool:
    """Whether two answers are the same, as described at the top of this file."""
    ours, theirs = plain(ours), plain(theirs)
    if not ours or not theirs:
        return ours == theirs
    if _spelled(ours) == _spelled(theirs):
        return True
    number, number_too = _number(ours), _number(theirs)
    if number is not None and number_too is not None:
        (x, percent), (y, percent_too) = number, number_too
        return x == y or (percent and x == 100 * y) or (percent_too and y == 100 * x)
    mine, other = _parts(ours), _parts(theirs)
    return (
        mine is not None
        and other is not None
        and mine[0] == other[0]
        and len(mine[1]) == len(other[1])
        and all(same_answer(a, b) for a, b in zip(mine[1], other[1], strict=True))
    )


def plain(text: str) -> str:
    """Return an answer without the LaTeX that does not change it, with fractions of numbers written
    a/b."""
    text = _DROPPED.sub(" ", _UNIT.sub("", text))
    text = _WRAPPED.sub(lambda found: f" {found[1].strip()} ", text)
    text = _MIXED.sub(_improper, text)
    text = _FRACTION.sub(lambda found: f"{found[1] or found[3]}/{found[2] or found[4]}", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("{,}", ",").replace("**", "")
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    text = re.sub(r"(?<=\S)\.$", "", text)  # the end of a sentence
    return _NAMED.sub("", text, count=1) if _NAMED.match(text) else text


def _boxed(text: str) -> str | None:
    last = next(reversed(list(_BOXED.finditer(text))), None)
    if last is None:
        return None
    rest = text[last.end() :]
    if not rest.startswith("{"):
        return rest.split()[0].strip("$") if rest.split() else None
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[1:at]
    return None  # cut off before it closed


def _last(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def find(text: str) -> str | None:
        last = next(reversed(list(pattern.finditer(text))), None)
        return None if last is None else last[1]

    return find


def _number(text: str) -> tuple[Fraction, bool] | None:
    """Return the value of an answer that is a number, and whether it is in percent."""
    percent = text.endswith("%")
    found = SUM.fullmatch(text.removesuffix("%").strip().rstrip("$"))
    value = None if found is None else value_of(found)
    return None if value is None else (value, percent)


def _improper(found: re.Match[str]) -> str:
    whole, over, under = int(found[1]), int(found[2] or found[4]), int(found[3] or found[5])
    return f"{whole * under + over}/{under}"


def _spelled(text: str) -> str:
    text = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)  # 3 1/2 is not 31/2
    return text.replace("\u2212", "-").replace("$", "").casefold()


def _parts(text: str) -> tuple[str, list[str]] | None:
    """Return the brackets of a tuple, list or set and its entries; None if the text is not one."""
    if len(text) < 2 or text[0] + text[-1] not in ("()", "[]", "(]", "[)", "{}"):
        return None
    entries = list(_entries(text[1:-1]))
    return (text[0] + text[-1], entries) if len(entries) > 1 else None


def _entries(text: str) -> Iterator[str]:
    depth = start = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()
