"""Written answers whose last number is what counts, as GSM8K's: https://arxiv.org/abs/2110.14168, section 2."""

import re
from decimal import Decimal
from typing import NamedTuple

from formats.messages import short

MINUS = "\u2212"
NUMBER = re.compile(rf"(?<![\w.])[-{MINUS}]?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)|\d+(?:\.\d+)?")
# A number in a fraction, a root or a power is not the value of what it stands in.
IN_FORMULA = re.compile(r"(?:frac\s*\{[^{}]*\}\s*\{|sqrt\s*\{?|[/^_]\s*[{(]?|\d[eE][+-]?)\s*$")
# Where an answer without words begins, what may stand beside its number, and what changes the value of that.
RESULT_MARK, WORD = re.compile(r"####|\\boxed|="), re.compile(r"(?<!\\)\b(?!(?:and|or)\b)[^\W\d_]{2,}")
UNIT = re.compile(r"\^?\{?\\circ\}?|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\(?:left|right|quad|[$%,; ])")
MORE = re.compile(r"\d\s*!|\\[A-Za-z]+")


class LastNumber(NamedTuple):
    """Whether the last number of a reply is the right one."""

    right: Decimal

    def __call__(self, reply: str) -> bool:
        return last_number(reply) == self.right


def true_number(text: str) -> Decimal:
    """The last number of a written answer. ValueError where that is not its value."""
    found = list(NUMBER.finditer(text))
    if not found:
        raise ValueError("answer has no number, so no reply can be checked")
    at = found[-1].start()
    if IN_FORMULA.search(text[max(0, at - 40) : at]):
        raise ValueError(f"answer {short(text[-60:])} ends in a fraction, a root or a power; write it as one number")
    final = UNIT.sub(" ", RESULT_MARK.split(text)[-1])
    if not WORD.search(final) and (len(NUMBER.findall(final)) > 1 or MORE.search(final)):
        raise ValueError(f"answer {short(final.strip())} is more than one number; write it as one")
    return _value(found[-1][0])


def last_number(text: str) -> Decimal | None:
    """`So 1,234.50 dollars` -> 1234.5; a minus counts where no number or word stands before it."""
    found = NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace(MINUS, "-"))
