"""A chat template tried out in the sandbox: on fixtures, and for words of the user that change what it writes.

Every text that stands in the template is put into a user's message, and where the prompt around it changes, it is a
switch: markup and commands may be one, ordinary words may not.
"""

import re
import time
from typing import Any

from formats.template import TemplateSandbox
from inspection.constants import value_of
from inspection.findings import Ledger

SLOW = 2.0  # seconds of four short renderings, above which hundreds more are left out
NEUTRAL = "qzvkw"  # a word that no template knows
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "a city"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ANSWER = {"role": "assistant", "content": "4", "reasoning_content": "two and two", "thinking": "two and two"}
FIXTURES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]},
    "history": {
        "messages": [{"role": "user", "content": "What is 2 + 2?"}, ANSWER, {"role": "user", "content": "And 3 + 3?"}]
    },
    "not thinking": {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "enable_thinking": False},
    "tools": {"messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": [TOOL]},
    "tool result": {
        "messages": [
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny"},
        ],
        "tools": [TOOL],
    },
}


def request(fixture: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """What a template is given (chat.py's names)."""
    base = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": True}
    return {**variables, **base, **fixture}


def _candidates(tree: Any) -> list[str]:
    """The texts of a template that could be looked for in a message: constants, and sums of constants."""
    from jinja2 import nodes

    found = {}
    for node in tree.find_all(nodes.Expr):
        value = value_of(node)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and 2 <= len(text.strip()) <= 200:
                found[text.strip()] = None
    return list(found)[:200]


def try_words(
    ledger: Ledger, where: str, source: str, tree: Any, sandbox: TemplateSandbox, variables: dict[str, str]
) -> None:
    """Puts each text of the template into a user's message, and sees whether more than the message changes."""

    failures = 0

    def render(text: str, more: dict[str, Any] | None = None) -> str | None:
        nonlocal failures
        fixture = {
            **(more or {}),
            "messages": [*(more or {}).get("messages", [])[:2], {"role": "user", "content": text}],
        }
        try:
            return sandbox.render(source, request(fixture, variables))
        except ValueError:  # each one costs a process
            failures += 1
            return None

    forms = ("Please tell me about {} now.", "{}", "{} and more", "more and {}")
    began = time.monotonic()
    plain = [render(form.format(NEUTRAL)) for form in forms]
    if any(plain) and time.monotonic() - began > SLOW:
        ledger.find("template-unrendered", where, "it is slow: its words were not tried")
        return
    failures = 0
    words, switches = [], []
    for text in _candidates(tree):
        for form, before in zip(forms, plain, strict=True):
            after = render(form.format(text)) if before is not None and failures < 4 else None
            if after is None or after.replace(text, NEUTRAL) == before.replace(text, NEUTRAL):
                continue
            (words if is_wordy(text) else switches).append(text)
            break
    all_words = " ".join(text for text in _candidates(tree) if is_wordy(text))
    for more in ({}, {"tools": [TOOL]}, {"messages": FIXTURES["history"]["messages"]}) if all_words else ():
        before, after = (render(text, more) for text in (NEUTRAL, all_words))
        if (
            not words
            and None not in (before, after)
            and after.replace(all_words, NEUTRAL) != before.replace(all_words, NEUTRAL)
        ):
            words.append(all_words)
    for text in words[:8]:
        ledger.find("template-trigger", where, f"{text[:80]!r} in a user's message changes the prompt around it")
    if switches:
        ledger.find("template-switch", where, ", ".join(repr(text[:40]) for text in switches[:8]))
    long = " ".join(["word"] * 600)
    before = plain[1]
    after = render(long) if before is not None else None
    if after is not None and after.replace(long, NEUTRAL) != before:
        ledger.find("template-trigger", where, "a long message changes the prompt around it")


def is_wordy(text: str) -> bool:
    """Words as people write them, not markup or a command."""
    return bool(re.search(r"[^\W\d_]{2,}|\d{3,}", text)) and not re.search(r"[<>\[\]{}|\n`*]|^[/@]|^\W+$|=$", text)
