r"""The number that a text gives as its answer: where it is looked for, and what counts as a number.

Where: `answer_part` finds the part of a text that holds the answer; the last number of that part is the
answer. If the whole part, or its last line, is a list of numbers or a time such as 12:30, that is the answer.

What: decimal digits of any script, in these spellings.

    1234  1,234  1 234  1.234,5  0.5  .5  1e5  1.5 x 10^-3  2^10  -7  3/4  \frac{3}{4}  1 1/2  ½
    50%  $5.00  5 kg

A minus sign belongs to the number unless it stands between two operands. Currency signs and units are
ignored. A number inside a longer expression is not an answer (`0 + 2`, `10 - 7`, `2x`, `3 +` at a cut): where
a part ends with one, there is no answer. Digits inside a word (`H2O`, `v2`, `GPT-4`) are no number. Values
are exact: 0.1 is 1/10, and whole numbers of any length are told apart. A percentage equals a percentage of
the same number, and a plain number that is either that number or a hundredth of it: 50% equals 50 and 0.5.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

LONGEST = 4000
"""Digits of a number at most, written or as the value of a power; a longer one counts as an expression."""
NEAR = 80
"""Characters on either side of a number that are looked at."""

PHRASE = re.compile(r"\banswers?\b[^.\n=:]{0,40}?(?:\b(?:is|are|was)\b|[=:])[ \t]*:?\s*", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")

_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\^\s*\{?\s*\\circ\s*\}?|\u00b0", " "),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (r"-\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" -\1/\2 "),
        (r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
        (r"\\(?:times|cdot)(?![A-Za-z])|[\u00d7\u00b7]", "*"),
        (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:left|right)(?![A-Za-z])|\\[!;]", ""),
        (r"\\pm(?![A-Za-z])", "\u00b1"),
        (r"\\([%$])", r"\1"),
        (r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ","),
        (r"\^\s*[{(]\s*([-+]?\d+)\s*[})]", r"^\1"),
        (r"(?<=[\w)])\*\*(?=[\w(-])|(?<=[\w)]) \*\* (?=[\w(-])", "^"),
        (r"\*\*|__", ""),
        (r"(?<=[\w.])[$\u20ac\u00a3\u00a5]", " "),
        (r"[$\u20ac\u00a3\u00a5`]", ""),
        (r"\bpercent\b", "%"),
    )
]

DECIMAL = (
    r"(?:\d{1,3}(?:\.\d{3})+,\d+(?![\d,])|\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?"
    r"|\d{1,3}(?: \d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
ATOM = rf"{DECIMAL}(?:[eE][-+]?\d+(?!\w)|\s*[*x]\s*10\s*\^\s*[-+]?\d+|\s*\^\s*[-+]?\d+)?"
NUMBER = re.compile(rf"(?:\d+ +\d+/\d+(?![\d/])|{ATOM} ?/ ?{ATOM}|{ATOM})(?: ?%)?")
LIST = re.compile(r",\s+|;\s*|\s+and\s+")
UNIT_LETTERS = frozenset("gmshltdLJNVWACFK")
"""Single letters that are a unit where they follow a number directly; any other one is a variable."""
OPERATORS = "-+*/^\u00f7\u00b1"


@dataclass(frozen=True, slots=True)
class Answer:
    """One number, a list of numbers, or the parts of a time. Example: `Answer("one", (Fraction(1, 2),))`."""

    kind: str
    """"one", "list" or "time"."""
    values: tuple[Fraction, ...]
    percent: bool = False
    written: str = ""
    """As the text has it, without currency signs and thousands separators."""

    def equals(self, other: Answer) -> bool:
        if self.percent != other.percent and self.kind == other.kind == "one":
            share, plain = (self, other) if self.percent else (other, self)
            return plain.values[0] in (share.values[0], share.values[0] / 100)
        return (self.kind, self.values) == (other.kind, other.values)


def read_gold(value: Any, reward: str) -> Answer:
    """The answer in a value of the column `answer`: a number, or a text, read as a completion is.

    Raises ValueError, which names the reward function, when there is no finite number in it.
    """
    found = None
    if isinstance(value, str):
        found = final_answer(value)
    elif value is not None and not isinstance(value, bool):
        try:
            found = Answer("one", (Fraction(Decimal(str(value))),))
        except (InvalidOperation, ValueError, OverflowError):
            found = None
    if found is None:
        raise ValueError(f"{reward} needs a number in the column 'answer', got {value!r:.200}")
    return found


def answer_part(text: str) -> tuple[str, bool]:
    r"""The part of `text` that holds the answer, and whether the text marks it as the answer.

    Only what follows the last `</think>` counts, if there is one. Of that: the inside of the last
    `<answer>...</answer>`, if there is one. Of that: the inside of the last `\boxed{...}` (a box that is not
    closed holds nothing), or what follows the last `####` in its line, or all of it.
    """
    text = text.rpartition("</think>")[2]
    marked = "</answer>" in text and "<answer>" in text.rpartition("</answer>")[0]
    if marked:
        text = text.rpartition("</answer>")[0].rpartition("<answer>")[2]
    *_, box = re.split(r"\\(?:boxed|fbox)(?![A-Za-z])", text)
    if box != text:
        return _inside(box), True
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0], True
    return text, marked


def final_answer(text: str) -> Answer | None:
    """The answer that `text` gives, None if it gives none; see the top of this file.

    Where nothing marks the answer, the last "answer is", "answer:" or "answer =" that a number follows in the
    same sentence does.
    """
    part, marked = answer_part(text)
    part = simplified(part)
    if not marked:
        for found in reversed(list(PHRASE.finditer(part))):
            sentence = SENTENCE_END.split(part[found.end() :], maxsplit=1)[0]
            if NUMBER.search(sentence):
                part = sentence
                break
    lines = part.strip().splitlines() or [""]
    for whole in (part, lines[-1], re.split(r"\b(?:is|are)\b|[:=](?!\d)", lines[-1])[-1]):
        several = _several(whole)
        if several is not None:
            return several
    return _last(part)


def simplified(text: str) -> str:
    """`text` with LaTeX, emphasis, currency signs and other scripts' digits rewritten as plain characters."""
    if not text.isascii():
        text = "".join(map(_plain, text))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def _plain(character: str) -> str:
    """A digit, minus sign, space, superscript or vulgar fraction as ASCII; any other character unchanged."""
    if character.isdecimal():
        return str(unicodedata.digit(character))
    if character in "\u2212\u2013\u2012":
        return "-"
    if character in "\u00a0\u2009\u202f":
        return " "
    form = unicodedata.decomposition(character)
    if form.startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/") + " "
    if form.startswith("<super>") and character.isdigit():
        return f"^{unicodedata.digit(character)}"
    return character


def _inside(text: str) -> str:
    """What the braces at the start of `text` enclose, or its first word if there are none; "" if unclosed."""
    text = text.lstrip()
    if not text.startswith("{"):
        return text.split(maxsplit=1)[0] if text else ""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:place]
    return ""


def _several(text: str) -> Answer | None:
    """A list of numbers, or a time, that is the whole of `text`."""
    text = text.strip().rstrip(".").strip("()[]{}\\ \t\n")
    if re.fullmatch(r"\d+(?::\d+)+", text):
        return Answer("time", tuple(Fraction(int(part)) for part in text.split(":")), written=text)
    parts = LIST.split(text)
    if len(parts) == 1 and not NUMBER.fullmatch(text.lstrip("-+ ")):
        parts = text.split(",")
    values = [_signed(part.strip()) for part in parts]
    if len(parts) == 1 or None in values:
        return None
    return Answer("list", tuple(value for value in values if value is not None), written=text)


def _signed(text: str) -> Fraction | None:
    negative = text.startswith("-")
    found = NUMBER.fullmatch(text.lstrip("-+ "))
    value = _value(found[0]) if found else None
    return -value if negative and value is not None else value


def _last(text: str) -> Answer | None:
    """The last number in `text`; None if there is none or it belongs to an expression."""
    for found in reversed(list(NUMBER.finditer(text))):
        start, end = found.span()
        before = text[max(0, start - NEAR) : start]
        is_rest = found[0][0] == "." and before[-1:].isdigit()
        sign, after = _before(before), _after(text[end : end + NEAR])
        if sign == 0 or is_rest:
            continue
        value = _value(found[0])
        if sign is None or after is None or value is None:
            return None
        written = "-" * (sign < 0) + found[0].replace(",", "")
        return Answer("one", (sign * value,), found[0].endswith("%"), written)
    return None


def _before(text: str) -> int | None:
    """From what precedes a number: its sign, None if it is in an expression, 0 if it is in a word."""
    if signed := re.search(r"[-+](\s*)$", text):
        return _sign(text[: signed.start()], -1 if signed[0][0] == "-" else 1, spaced=bool(signed[1]))
    if re.search(r"[^\W\d]$|\\$|\d\.$", text):
        return 0
    if re.search(r"\d[,:/]$|[\u00f7\u00b1^/]\s*$|(?:[\d)]|\b[^\W\d])\s*\*\s*$|(?:[\d)]|\b[^\W\d])\($", text):
        return None
    if re.search(r"(?:\\[A-Za-z]+|\b(?:sqrt|log|ln|sin|cos|tan|exp))\s*[{(\[]?\s*$", text):
        return None
    return 1


def _sign(left: str, sign: int, *, spaced: bool) -> int | None:
    """As `_before`, for a number with a sign; `left` precedes the sign, `spaced`: a space follows it."""
    operand = left.rstrip()
    if re.search(r"[\d)\]}%*/^]$|(?:^|[^\w])[^\W\d_]$|\\[A-Za-z]+$", operand):
        return None
    if re.search(r"[^\W\d_]$", operand):
        if not spaced:
            return sign if operand != left else 0
        return 1
    is_bullet = spaced and left.rstrip(" \t").endswith("\n")
    return 1 if is_bullet else sign


def _after(text: str) -> int | None:
    """From what follows a number: 1, or None if it is part of an expression."""
    word = re.match(r"[^\W\d_]+", text)
    if word and len(word[0]) == 1:
        is_variable = word[0].isascii() or "GREEK" in unicodedata.name(word[0], "")
        if is_variable and word[0] not in UNIT_LETTERS:
            return None
    if re.match(r"_|\.\d|\s?\\[A-Za-z]|\((?:[\d-]|[^\W\d]\b)", text):
        return None
    followed = re.match(r"(\s*)([-+*/^\u00f7\u00b1])(\s*)(\S?\w?)", text)
    if followed is None:
        return 1
    gap, operator, _, right = followed.groups()
    if not right:
        return 1 if operator == "*" and not gap else None
    if re.match(r"[\d(\\{]|\.\d|[^\W\d_aAI]$", right) and not (operator == "*" and not gap and followed[3]):
        return None
    return 1


def _value(text: str) -> Fraction | None:
    """The value of a match of `NUMBER`, without percent sign; None for one that is too long, or x/0."""
    text = text.rstrip(" %")
    mixed = re.fullmatch(r"(\d+) +(\d+/\d+)", text)
    if mixed:
        whole, part = _value(mixed[1]), _value(mixed[2])
        return None if whole is None or part is None else whole + part
    if "/" in text:
        top, bottom = (_value(part.strip()) for part in text.split("/"))
        return None if top is None or not bottom else top / bottom
    written = re.fullmatch(rf"({DECIMAL})(?:[eE](.+)|\s*[*x]\s*10\s*\^(.+)|\s*\^(.+))?", text)
    assert written is not None
    base, exponent = _decimal(written[1]), written[2] or written[3]
    if base is None or len(exponent or written[4] or "") > 6:
        return None
    if exponent is not None:
        return base * Fraction(10) ** int(exponent) if abs(int(exponent)) <= LONGEST else None
    if written[4] is not None:
        power = int(written[4])
        too_long = len(written[1]) * abs(power) > LONGEST or (base == 0 and power <= 0)
        return None if too_long else Fraction(base**power)
    return base


def _decimal(text: str) -> Fraction | None:
    if len(text) > LONGEST:
        return None
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", text):
        text = text.replace(".", "").replace(",", ".")
    return Fraction(text.replace(",", "").replace(" ", ""))
