"""Tasks as data: where the questions come from, how each is put to the model, and which scorer reads the answer.

    families                 the bundled model's questions (families.py)
    arithmetic               200 questions with four choices, made from a seed
    gsm8k, mmlu, ...         data sets of the hub (tasks.yaml)
    --data FILE              rows of {question, answer} or {question, choices, label}

A question becomes a chat whose reply is scored, or a plain text behind which each choice has its likelihood.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from data.documents import Unreadable, read_records

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_TEXT = 1 << 20  # characters of a question, an answer or a choice
ARITHMETIC_SEED = 20260101


class Question(NamedTuple):
    id: str
    messages: list[dict[str, str]]
    """The chat up to where the model answers; of a task by likelihood one message, the plain text before a choice."""
    reference: Any
    """What the scorer compares with: text, a number, a choice's index, tests, a schema."""
    choices: list[str] = []  # noqa: RUF012 (a default of a named tuple is never changed)
    """Continuations whose likelihoods are compared; empty where the model replies."""
    groups: tuple[str, ...] = ()
    thinking: bool | None = None
    """Where the task itself decides it."""


@dataclass(frozen=True)
class Task:
    """How the rows of one data set become questions; the keys of tasks.yaml."""

    name: str
    data: str
    """Hub id, file or folder."""
    scorer: str
    subset: str | None = None
    split: str = "test"
    few_shot_split: str | None = None
    question: str = "{question}"
    """The user's message; {fields} of the row."""
    answer: str = "{answer}"
    """The reference, and what an example answers."""
    choices: str | None = None
    """The field that holds the choices; `label`: the one that says which is right (an index, a letter or its text)."""
    label: str = "label"
    group: str | None = None
    sampling: str = "greedy"
    """greedy or recommended: the checkpoint's own settings."""
    metric: str = "accuracy"
    max_new_tokens: int = 4096


@cache
def published() -> dict[str, Task]:
    text = Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8")
    return {name: Task(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def task_of_file(path: str, records: list[tuple[str, Any]], scorer: str | None) -> Task:
    """What the first row of a file shows: choices are compared by likelihood, answers as numbers where all are such."""
    first = records[0][1]
    if not isinstance(first, dict) or "question" not in first:
        raise ValueError(f"{records[0][0]}: give {{question, answer}} or {{question, choices, label}}")
    name = Path(path).stem or path
    if "choices" in first:
        label = next((key for key in ("label", "answer", "gold") if key in first), "label")
        return Task(name, path, scorer or "likelihood", choices="choices", label=label)
    if scorer is None:
        from evaluation.scoring import number

        answers = [str(row.get("answer", "")) for _, row in records if isinstance(row, dict)]
        scorer = "numeric" if all(number(a.rpartition("####")[2]) is not None for a in answers) else "normalised"
    return Task(name, path, scorer)


def read(task: Task, limit: int | None, split: str | None = None) -> list[tuple[str, Any]]:
    """(place, row) of a task's data."""
    found = list(islice(read_records(task.data, split or task.split, task.subset), limit))
    if not found:
        raise ValueError(f"{task.data}: no row in it")
    return found


def questions(task: Task, records: Iterable[tuple[str, Any]], examples: list[tuple[str, Any]]) -> Iterator[Question]:
    """The rows as questions, with the examples of --few-shot before each. ValueError names the row that is none."""
    likelihood = task.scorer.startswith("likelihood")
    shown = [_posed(task, place, row) for place, row in examples]
    for index, (place, row) in enumerate(records):
        text, answer, choices, label = _posed(task, place, row)
        group = (str(row[task.group])[:200],) if task.group and row.get(task.group) is not None else ()
        if likelihood:
            context = "".join(f"{asked}{told}\n\n" for asked, told, *_ in shown) + text
            yield Question(str(index), [{"role": "user", "content": context}], label, choices, group)
        else:
            turns = [
                {"role": role, "content": content}
                for asked, told, *_ in shown
                for role, content in (("user", asked), ("assistant", told))
            ]
            yield Question(str(index), [*turns, {"role": "user", "content": text}], answer, [], group)


def _posed(task: Task, place: str, row: Any) -> tuple[str, Any, list[str], int]:
    """(what is asked, what is right, the choices as continuations, the right one's index)"""
    if isinstance(row, Unreadable):
        raise ValueError(f"{place}: {row}")
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__} where a row {{question, answer}} is expected")
    try:
        text = task.question.format_map(_Fields(row))
        if task.choices is None:
            answer = row["answer"] if task.answer == "{answer}" else task.answer.format_map(_Fields(row))
            if task.scorer != "json" and not isinstance(answer, str | int | float):
                raise ValueError(f"answer is a {type(answer).__name__}, not a text or number")
            return _checked(text), _checked(answer) if isinstance(answer, str) else answer, [], 0
        choices = row[task.choices]
        choices = choices.get("text") if isinstance(choices, dict) else choices  # ARC's {text: […], label: […]}
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{task.choices} is not a list of 2 to {len(LETTERS)} texts")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError(f"{task.choices} holds something else than non-empty texts")
        label = _label(row[task.label], choices, row.get(task.choices))
        if task.scorer.startswith("likelihood"):
            return (
                _checked(f"Question: {text}\nAnswer:"),
                f" {choices[label]}",
                [f" {_checked(c)}" for c in choices],
                label,
            )
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        asked = f"{text}\n\n{listed}\n\nAnswer with the letter of the right option, as in “Answer: A”."
        return _checked(asked), LETTERS[label], [], label
    except KeyError as error:
        raise ValueError(f"{place}: has no {error.args[0]}; the fields are {', '.join(map(str, row))[:200]}") from None
    except (ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{place}: {error}") from None


class _Fields(dict):
    """The fields of a row for a template: texts and numbers, and nothing to reach from them."""

    def __getitem__(self, name: str) -> str:
        value = super().__getitem__(name)
        if not isinstance(value, str | int | float):
            raise ValueError(f"{name} is a {type(value).__name__}, not a text or number")
        return str(value)


def _checked(text: str) -> str:
    if len(text) > MOST_TEXT:
        raise ValueError(f"a text of {len(text):,} characters; at most {MOST_TEXT:,} are asked")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("its text has an unpaired surrogate")
    return text


def _label(value: Any, choices: list[str], field: Any) -> int:
    """Which choice is right: its index, its letter, the name that the row gives it, or its text."""
    names = field.get("label") if isinstance(field, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the label is {value!r}, which is neither an index nor a letter nor a choice")
    if isinstance(value, str):
        value = value.strip()
        if names and value in names:
            return names.index(value)
        if value in choices:
            return choices.index(value)
        value = (
            LETTERS.index(value) if len(value) == 1 and value in LETTERS else int(value) if value.isdecimal() else -1
        )
    if not 0 <= value < len(choices):
        raise ValueError(f"the label names none of the {len(choices)} choices (an index from 0, a letter or the text)")
    return value


def digest(found: list[Question]) -> str:
    """What tells these questions from others."""
    return hashlib.sha256(json.dumps([tuple(q) for q in found], sort_keys=True).encode()).hexdigest()


def arithmetic(count: int = 200) -> list[tuple[str, Any]]:
    """Sums, differences and products with four choices, the same ones always; wrong choices are near ones."""
    random, rows = Random(ARITHMETIC_SEED), []
    for index in range(count):
        sign = "+-*"[index % 3]
        a, b = random.randint(100, 999), random.randint(2, 9) if sign == "*" else random.randint(10, 999)
        a, b = max(a, b), min(a, b)
        right = {"+": a + b, "-": a - b, "*": a * b}[sign]
        wrong = set()
        while len(wrong) < 3:
            wrong.add(right + random.choice((-100, -20, -10, -2, -1, 1, 2, 10, 20, 100)))
        choices = [str(value) for value in random.sample([right, *sorted(wrong)], 4)]
        row = {"question": f"What is {a} {sign} {b}?", "choices": choices, "label": choices.index(str(right))}
        rows.append((f"arithmetic: row {index + 1}", row | {"answer": str(right)}))
    return rows
