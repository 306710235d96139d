"""The official chat templates of the family: recognised byte for byte, and compared with line by line.

Their texts are not kept here, only hashes (official_templates.json): of the whole, of each line, and of the prompts
that they write for the fixtures of inspection/trials.py. They tell which lines of another template are not official,
which official ones it lacks, and whether the prompts differ.
"""

import hashlib
import json
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("official_templates.json")
LIKE = 0.5  # of the lines are the same: below, a template is one of its own and not a changed official one
MAX_LINES = 2000


class Difference(NamedTuple):
    name: str
    """Of the official template that has most lines in common with it."""
    own: list[int]
    """Numbers, from 1, of the lines that are not in the official one."""
    missing: list[int]
    """Numbers of the official one's lines that are not in this one."""
    prompts: list[str]
    """Fixtures for which the prompts differ."""


def fingerprint(text: str, prompts: dict[str, str]) -> dict[str, Any]:
    """What is kept of an official template: `text`, and what it writes for each fixture."""
    return {
        "sha256": _hash(text, 64),
        "lines": [_hash(line, 8) for line in text.split("\n")],
        "prompts": {name: _hash(prompt, 16) for name, prompt in prompts.items()},
    }


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:digits]


@lru_cache
def known() -> dict[str, dict[str, Any]]:
    """Name -> fingerprint."""
    return json.loads(FILE.read_text("utf-8"))


def name_of(text: str) -> str | None:
    """Where this very text was published, if it is one of the official templates."""
    digest = _hash(text, 64)
    return next((name for name, of in known().items() if of["sha256"] == digest), None)


def difference(text: str, prompts: dict[str, str]) -> Difference | None:
    """Against the official template that is most like it; None where none is."""
    mine = fingerprint(text, prompts)
    if len(mine["lines"]) > MAX_LINES:
        return None
    best, nearest = LIKE, None
    for name, of in known().items():
        matcher = SequenceMatcher(None, of["lines"], mine["lines"], autojunk=False)
        if matcher.ratio() >= best:
            best, nearest = matcher.ratio(), (name, of, matcher.get_opcodes())
    if nearest is None:
        return None
    name, of, operations = nearest
    changes = [operation for operation in operations if operation[0] != "equal"]
    return Difference(
        name,
        [line + 1 for _, _, _, start, end in changes for line in range(start, end)],
        [line + 1 for _, start, end, _, _ in changes for line in range(start, end)],
        [fixture for fixture, prompt in mine["prompts"].items() if of["prompts"].get(fixture) != prompt],
    )


def sentence(found: Difference) -> str:
    """A difference in words."""

    def lines(numbers: list[int]) -> str:
        return f"line {numbers[0]} is" if len(numbers) == 1 else f"lines {ranges(numbers)} are"

    parts = [f"{lines(found.own)} not in it"] if found.own else []
    parts += [f"its {lines(found.missing)} missing"] if found.missing else []
    which = f"prompts differ for: {', '.join(found.prompts)}" if found.prompts else "all fixtures give the same prompt"
    return f"most like that of {found.name}, but {' and '.join(parts)}; {which}"


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more places" if len(runs) > most else "")
