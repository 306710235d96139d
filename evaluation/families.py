"""The bundled model's own evaluation as one task: unseen questions of the generated corpus, family by family.

Each column is a group of questions: thinking on and off over unseen questions in trained phrasings, and on over
phrasings that training never uses; the hard split, for which supervised training has no trace; and questions outside
every family, which are to be declined in a polite sentence.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from data.corpus.examples import FAMILIES, Example, check, hard_examples, outside_examples, unseen_examples
from data.corpus.talk import is_refusal
from data.corpus.tasks import Problem
from evaluation.scoring import Verdict
from evaluation.tasks import Question

COLUMNS = ("on", "off", "new phrasings", "hard", "declined outside")
LONGEST = 400  # tokens of a reply


def family_questions(seed: int, count: int, pieces: Callable[[str], list[str]]) -> Iterator[Question]:
    """`count` questions of each column, the families taking turns. `pieces`: how the tokenizer cuts a word."""
    if count < len(FAMILIES):
        raise ValueError(f"--limit {count}: give at least {len(FAMILIES)}, one question a family")
    columns = {
        "on": unseen_examples(seed, count, pieces),
        "off": unseen_examples(seed, count, pieces),
        "new phrasings": unseen_examples(seed, count, pieces, "held-out"),
        "hard": hard_examples(seed, count, pieces),
        "declined outside": outside_examples(seed, count),
    }
    return chain.from_iterable(
        (_question(column, index, example) for index, example in enumerate(examples))
        for column, examples in columns.items()
    )


def _question(column: str, index: int, example: Example) -> Question:
    family = example.problem.family if example.problem else None
    groups = (column,) if family is None or column in ("hard",) else (column, f"{column}: {family}")
    reference = {"family": family, "facts": example.problem.facts if example.problem else None}
    return Question(f"{column}/{index}", example.messages, reference, groups=groups, thinking=column != "off")


def family_verdict(reference: dict[str, Any], answer: str) -> Verdict:
    """The corpus' own verdict, by the truth that it finds independently of the traces."""
    family = reference["family"]
    problem = None if family is None else Problem(family, tuple_of(reference["facts"]))
    return Verdict(float(check(problem, answer)), answer or None)


def declines(answer: str) -> bool:
    return is_refusal(answer)


def tuple_of(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(tuple_of, value)) if isinstance(value, list) else value
