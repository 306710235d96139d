"""What an answer is worth: each scorer reads one answer, says whether it is right, and shows what it takes for right.

    numeric       the number in the last \\boxed{}, else the last number, against the reference's number
    letter        the letter of the chosen option, against the reference's
    exact         the text itself, spaces at the ends aside
    normalised    the text without case, punctuation, articles and extra spaces (SQuAD, arXiv:1606.05250, section 3)
    json          a JSON value that satisfies the reference, a JSON Schema
    function      Python code that passes the reference's tests, in a process of its own with limits
    likelihood    the option with the largest log likelihood, which the model has computed

Everything here is a function of what a run has saved, so that `evaluate.py rescore` needs no model and no torch.
"""

import json
import re
import string
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from evaluation.sandbox import passes


class Verdict(NamedTuple):
    """What a scorer says of one answer."""

    score: float
    """0 or 1."""
    read: str | None
    """What was taken for the answer; None where none was found in the text: an error of form."""


class Scorer(NamedTuple):
    judge: Callable[[str, Any], Verdict]
    """(answer, reference) -> Verdict"""
    right: list[tuple[str, Any]]
    """Answers, each with its reference, that are right; the tests and the documentation show them."""
    wrong: list[tuple[str, Any]]


NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3})?(?![\d])")  # noqa: RUF001
FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}|(?<![\d./])(-?\d+)\s*/\s*(\d+)(?![\d/])")
MOST_READ, MOST_DIGITS = 20_000, 1000  # characters; what is longer is no answer
REFUSAL = re.compile(
    r"\b(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:can't|cannot|can not|won't)|as an AI)\b", re.IGNORECASE
)


def is_refusal(answer: str) -> bool:
    """Whether an answer declines in the usual words, in its first 200 characters."""
    return REFUSAL.search(answer[:200].replace("’", "'")) is not None  # noqa: RUF001


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{…}, braces inside it balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def number(text: str) -> Fraction | None:
    """The last number of a text, exactly; `1,000`, `-3.5`, `2/3`, `\\frac{2}{3}` and `1e3` are numbers."""
    text = text[-MOST_READ:]
    fractions = list(FRACTION.finditer(text))
    numbers = [match for match in NUMBER.finditer(text) if any(map(str.isdigit, match[0]))]
    fractions = [match for match in fractions if len(match[0]) <= MOST_DIGITS]
    if fractions and (not numbers or fractions[-1].end() >= numbers[-1].end()):
        above, below = (part for part in fractions[-1].groups() if part is not None)
        return Fraction(int(above), int(below)) if int(below) else None
    if not numbers or len(numbers[-1][0]) > MOST_DIGITS:
        return None
    return Fraction(numbers[-1][0].replace(",", "").replace("−", "-"))  # noqa: RUF001


def numeric(answer: str, reference: Any) -> Verdict:
    inside = boxed(answer)
    found = number(answer if inside is None else inside)
    wanted = number(str(reference).rpartition("####")[2])
    if wanted is None:
        raise ValueError(f"the reference {str(reference)[:60]!r} has no number; score this task by exact or normalised")
    return Verdict(float(found == wanted), None if found is None else str(found))


LETTER_FORMS = [
    re.compile(pattern)
    for pattern in (
        r"\\boxed\{\s*\(?([A-Z])\)?\s*\}",
        r"(?i:answer|option|choice)(?i:\s+is|\s*:)?[\s:*(]*\(?([A-Z])\b(?!')",
        r"^\W*([A-Z])\W*$",
        r"(?m)^\W*([A-Z])[).:]",
        r"\(([A-Z])\)",
        r"\*\*([A-Z])\*\*",
    )
]


def letter(answer: str, reference: Any) -> Verdict:
    """The first form that occurs counts, at its last place."""
    for form in LETTER_FORMS:
        if found := form.findall(answer.strip()):
            return Verdict(float(found[-1] == str(reference).strip()), found[-1])
    return Verdict(0.0, None)


def exact(answer: str, reference: Any) -> Verdict:
    answer = answer.strip()
    return Verdict(float(answer == str(reference).strip()), answer or None)


def plain(text: str) -> str:
    """Without case, punctuation, articles and extra spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def normalised(answer: str, reference: Any) -> Verdict:
    answer = plain(answer)
    return Verdict(float(answer == plain(str(reference))), answer or None)


FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def json_value(answer: str, reference: Any) -> Verdict:
    from jsonschema import Draft202012Validator

    fenced = FENCE.findall(answer)
    text = (fenced[-1] if fenced else answer).strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Verdict(0.0, None)
    return Verdict(float(Draft202012Validator(reference).is_valid(value)), text)


def function(answer: str, reference: Any) -> Verdict:
    """`reference`: Python that fails (an AssertionError, any exception) where the code above it is wrong."""
    fenced = FENCE.findall(answer)
    code = fenced[-1] if fenced else answer
    if not code.strip():
        return Verdict(0.0, None)
    return Verdict(float(passes(f"{code}\n\n{reference}\n")), code)


ADD = "def add(a, b):\n    return a {} b"
SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
SCORERS: dict[str, Scorer] = {
    "numeric": Scorer(
        numeric,
        [("It costs $1,024.", "#### 1024"), ("\\boxed{0.5}, as 1 + 1 = 2", "1/2"), ("-3", "-3.0")],
        [("It costs 1,025.", "1024"), ("a dozen", "12"), ("\\boxed{3}, or 4", "4")],
    ),
    "letter": Scorer(
        letter,
        [("B", "B"), ("The answer is (B).", "B"), ("**Answer: B**", "B"), ("A is wrong.\n\\boxed{B}", "B")],
        [("C", "B"), ("Both A and B", "B"), ("", "B")],
    ),
    "exact": Scorer(exact, [(" Paris\n", "Paris")], [("paris", "Paris"), ("Paris.", "Paris")]),
    "normalised": Scorer(normalised, [("The  capital, Paris.", "capital paris")], [("Paris", "capital Paris")]),
    "json": Scorer(
        json_value,
        [('{"name": "Ada"}', SCHEMA), ('Here:\n```json\n{"name": "Ada"}\n```', SCHEMA)],
        [('{"name": 3}', SCHEMA), ("{name: Ada}", SCHEMA)],
    ),
    "function": Scorer(
        function,
        [(f"```python\n{ADD.format('+')}\n```", "assert add(2, 3) == 5")],
        [(ADD.format("-"), "assert add(2, 3) == 5"), ("while True: pass", "assert True")],
    ),
}


def likelihood(choices: list[dict[str, float]], label: int, by: str | None = None) -> Verdict:
    """The choice with the largest log likelihood. `choices`: {"logprob", "bytes", "tokens"} of each; `by` "bytes" or
    "tokens" divides by the length, as lm-evaluation-harness' acc_norm divides by bytes."""
    values = [choice["logprob"] / (max(choice[by], 1) if by else 1) for choice in choices]
    best = max(range(len(values)), key=values.__getitem__)
    return Verdict(float(best == label), str(best))
