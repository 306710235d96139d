"""A chat as a file: the messages and the settings, as JSON.

    {"schema": "nanoqwen/chat/1", "model": SRC, "messages": [{"role", "content", "reasoning_content"?}, ...],
     "settings": {"thinking": bool, "thinking_budget": N | null, "temperature": X, ...}}

The settings are those of SamplingParams and what a chat can set besides. `load` reads an untrusted file: all of it is
checked before any of it is used. `{"messages": [...]}` alone is a chat too, with the settings as they are. A chat that
would leave less than an eighth of the context free is continued without its earliest turns.
"""

import json
from bisect import bisect_left
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from formats.files import write_text
from inference.decode import check_prompt
from inference.params import SamplingParams
from inference.session import Session

SCHEMA = "nanoqwen/chat/1"
LARGEST = 64 << 20  # bytes
KEYS = ("role", "content", "reasoning_content")


def save(session: Session, path: Path) -> None:
    """Writes the chat, whole or not at all."""
    settings = {"thinking": session.thinking, "thinking_budget": session.thinking_budget, **asdict(session.params)}
    record = {"schema": SCHEMA, "model": session.name, "messages": session.messages, "settings": settings}
    write_text(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def load(session: Session, path: Path) -> tuple[bool, int]:
    """Continues the file's chat in the session. Returns whether `save` wrote it and all of it is there, so that it may
    be written again; and how many of its messages are not, for want of room.

    Raises ValueError, and leaves everything as it was, where the file is no chat for this model.
    """
    record = _read(path)
    try:
        messages = _messages(record.get("messages"))
        settings = _settings(session, record.get("settings", {}))
        thinking = settings.pop("thinking")
        whole = len(messages)
        if not session.raw:
            messages = _fitting(session, messages, thinking)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    session.reset()
    session.messages, session.system = messages, [m for m in messages[:1] if m["role"] == "system"]
    session.thinking, session.thinking_budget, session.params = thinking, settings["budget"], settings["params"]
    return "schema" in record and len(messages) == whole, whole - len(messages)


def _fitting(session: Session, messages: list[dict[str, str]], thinking: bool) -> list[dict[str, str]]:
    """The messages, without as many of the earliest turns as the context has no room for; the system message stays.

    PromptTooLong where the last turn alone is too long, ValueError where the template rejects the messages.
    """
    context = session.model.config.context_length
    system = [m for m in messages[:1] if m["role"] == "system"]
    starts = [number for number, m in enumerate(messages) if m["role"] == "user" and number > len(system)]
    choices = [messages, *([*system, *messages[start:]] for start in starts)]
    ids = cache(lambda number: session.chat.render(choices[number], thinking))
    for most in (context - context // 8, context):
        first = bisect_left(range(len(choices)), True, key=lambda number, most=most: len(ids(number)) <= most)
        if first < len(choices):
            break
    chosen = min(first, len(choices) - 1)
    check_prompt(session.model, ids(chosen))
    return choices[chosen]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a saved chat has at most {LARGEST:,}")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; give a file that /save wrote") from None
    if not isinstance(record, dict) or "messages" not in record:
        raise ValueError(f'{path}: not a saved chat, which is {{"messages": [...]}}')
    if not str(record.get("schema", SCHEMA)).startswith("nanoqwen/chat/"):
        raise ValueError(f"{path}: its schema is {record['schema']!r}, not {SCHEMA}")
    return record


def _messages(values: Any) -> list[dict[str, str]]:
    """The messages with the keys that a chat has. Only the first may be the system's."""
    if not isinstance(values, list) or not values:
        raise ValueError("messages: not a list of at least one message")
    messages = []
    for number, message in enumerate(values, 1):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: its role is none of system, user and assistant")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"message {number}: a system message may only come first")
        kept = {key: message[key] for key in KEYS if message.get(key) is not None}
        if "content" not in kept or not all(isinstance(value, str) for value in kept.values()):
            raise ValueError(f"message {number}: its content is not a text")
        messages.append(kept)
    return messages


def _settings(session: Session, given: Any) -> dict[str, Any]:
    """thinking, budget and params: the file's where it states them, else the session's."""
    if not isinstance(given, dict):
        raise ValueError("settings: not an object {...}")
    known = asdict(session.params)
    thinking = given.get("thinking", session.thinking)
    budget = given.get("thinking_budget", session.thinking_budget)
    if type(thinking) is not bool:
        raise ValueError(f"settings: thinking is {thinking!r}, which is neither true nor false")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ValueError(f"settings: thinking_budget is {budget!r}, which is not a whole number from 1 upwards")
    stated = {name: value for name, value in given.items() if name in known}
    try:
        params: SamplingParams = replace(session.params, **stated)
    except ValueError as error:
        raise ValueError(f"settings: {error}") from None
    return {"thinking": thinking, "budget": budget, "params": params}
