"""A finished reply's thinking and answer, and whether it is well-formed."""

from collections.abc import Sequence
from typing import NamedTuple

from chat import Chat


class Reply(NamedTuple):
    thinking: str
    answer: str
    tokens: int
    """Of the thinking."""
    well_formed: bool
    """The thinking is closed (if there is any) and the answer ended with an end token."""


def parse(chat: Chat, prompt: Sequence[int], ids: Sequence[int], thinking: bool, ends: set[int]) -> Reply:
    """The ids of a reply to a prompt, split at the end of its thinking. `ends`: the tokens that end a reply."""
    ended = bool(ids) and ids[-1] in ends
    ids = list(ids[:-1] if ended else ids)
    if not thinking:
        return Reply("", chat.decode(ids), 0, ended)
    opened = chat.opens_thinking(prompt) or ids[:1] == [chat.think_start_id]
    closed = chat.think_end_id in ids
    cut = ids.index(chat.think_end_id) if closed else len(ids)
    answer = chat.decode(ids[cut + 1 :]).strip() if closed else ""
    thought = [token for token in ids[:cut] if token != chat.think_start_id]
    return Reply(chat.decode(thought).strip(), answer, cut, ended and closed and opened)
