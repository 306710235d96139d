"""Trees of messages, one message a row (OASST: https://huggingface.co/datasets/OpenAssistant/oasst1), as conversations.

    {"message_id", "parent_id": null of a root, "role": "prompter" or "assistant", "text", "rank": 0 is the best}

Each path from a root to a leaf is a conversation, the better-ranked answers first. An answer that several paths share
is learnt in the first of them alone: its weight is 0 in the others.
"""

from collections.abc import Iterator
from typing import Any

from data.documents import Unreadable

FIELDS = frozenset(("message_id", "text", "role"))  # and parent_id, which some leave out of roots
ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


def is_tree(record: Any) -> bool:
    return isinstance(record, dict) and record.keys() >= FIELDS


def with_paths(found: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """(place, record) pairs unchanged, or where the first is a message of a tree, (place of its leaf, conversation) of
    each path. A message whose parent is not there is Unreadable."""
    first = next(found, None)
    if first is None:
        return
    if not is_tree(first[1]):
        yield first
        yield from found
        return
    messages: dict[str, tuple[Any, dict]] = {}
    children: dict[str | None, list[str]] = {}
    for place, record in (first, *found):
        if not is_tree(record):
            yield place, record
            continue
        name = str(record["message_id"])
        parent = None if record.get("parent_id") is None else str(record["parent_id"])
        if name not in messages:
            messages[name] = place, record
            children.setdefault(parent, []).append(name)
    learnt: set[str] = set()
    reached: set[str] = set()
    path: list[str] = []
    waiting = [(0, name) for name in reversed(_ranked(children.get(None, []), messages))]
    while waiting:
        depth, name = waiting.pop()
        path[depth:] = [name]
        reached.add(name)
        below = _ranked(children.get(name, []), messages)
        waiting += [(depth + 1, child) for child in reversed(below)]
        if not below and (turns := _turns(path, messages, learnt)):
            yield messages[name][0], {"messages": turns}
    for name in (name for name in messages if name not in reached):
        yield messages[name][0], Unreadable("answers a message that is not there, so it belongs to no conversation")


def _ranked(names: list[str], messages: dict[str, tuple[Any, dict]]) -> list[str]:
    ranks = {name: messages[name][1].get("rank") for name in names}
    return sorted(names, key=lambda name: ranks[name] if isinstance(ranks[name], int | float) else float("inf"))


def _turns(path: list[str], messages: dict[str, tuple[Any, dict]], learnt: set[str]) -> list[dict] | None:
    """A path up to its last answer; None where all of it was in an earlier path."""
    turns, new = [], False
    for name in path:
        role, text = (messages[name][1][field] for field in ("role", "text"))
        turns.append({"role": ROLES.get(role, role), "content": text})
        if turns[-1]["role"] == "assistant":
            turns[-1]["weight"] = int(name not in learnt)
            new |= name not in learnt
            learnt.add(name)
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    return turns if new else None
