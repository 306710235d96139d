"""The rules as data: rubric.yaml, a user's own file over it, and which of them can be asked of a set's columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RUBRIC = Path(__file__).with_name("rubric.yaml")
SHAPES = ("pretraining", "sft", "chat", "tree", "preference", "eval", "rag", "shards")
LEVELS = ("row", "mask", "set", "file")
SEVERITIES = ("high", "medium", "low")
FIELDS = {"name", "over", "shapes", "condition", "severity", "reason", "fix"}


@dataclass(frozen=True)
class Rule:
    name: str
    over: str
    condition: str | None
    severity: str
    reason: str
    shapes: tuple[str, ...] = ()
    fix: str | None = None  # "drop" or "keep"; None: what the severity says

    @property
    def drops(self) -> bool:
        """Whether `--fix` leaves out the rows that break it."""
        return self.fix == "drop" or (self.fix is None and self.severity == "high")


def load(own: Path | None = None) -> dict[str, Rule]:
    """Name to rule, a user's file over the house's."""
    rules = _read(RUBRIC)
    if own is not None:
        rules |= _read(own)
    return {name: rule for name, rule in rules.items() if rule.condition is not None or rule.over == "file"}


def _read(path: Path) -> dict[str, Rule]:
    if not path.is_file():
        raise ValueError(f"--rules {path}: no such file")
    try:
        listed = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--rules {path}: not YAML ({error})") from None
    if not isinstance(listed, list):
        raise ValueError(f"--rules {path}: a list of rules is expected; inspection/xray/rubric.yaml is an example")
    return {rule.name: rule for rule in (_rule(entry, path) for entry in listed)}


def _rule(entry: Any, path: Path) -> Rule:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"].isidentifier():
        raise ValueError(f"--rules {path}: {str(entry)[:80]!r} is no rule with a name of letters, digits and _")
    where = f"--rules {path}: {entry['name']}"
    if unknown := set(map(str, entry)) - FIELDS:
        raise ValueError(f"{where} has the unknown field {min(unknown)} (there are {', '.join(sorted(FIELDS))})")
    entry = {"over": "row", "severity": "medium", "reason": "", "condition": None, "shapes": [], "fix": None} | entry
    choices = {"over": LEVELS, "severity": SEVERITIES, "fix": ("drop", "keep", None)}
    for field, known in choices.items():
        if entry[field] not in known:
            raise ValueError(f"{where}: {field} is {entry[field]!r}, not one of {', '.join(map(str, known))}")
    if not isinstance(entry["shapes"], list) or set(map(str, entry["shapes"])) - set(SHAPES):
        raise ValueError(f"{where}: shapes is {entry['shapes']!r}, not a list of {', '.join(SHAPES)}")
    if not isinstance(entry["condition"], str | None) or not isinstance(entry["reason"], str):
        raise ValueError(f"{where}: condition and reason are texts")
    return Rule(**entry | {"shapes": tuple(entry["shapes"])})


def of_shape(rules: dict[str, Rule], shape: str, over: str) -> list[Rule]:
    return [rule for rule in rules.values() if rule.over == over and (not rule.shapes or shape in rule.shapes)]
