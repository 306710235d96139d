"""Where a text's parts lie in its tokens: sentences and list items, or single tokens, of messages and of the reply.

A span is half-open, in tokens. Special tokens and the template's own words belong to no span: taking them out would ask
the model something else, not the same with less.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from chat import Chat, TextStream

# A sentence ends behind its mark and closing quotes where a space follows, or at a line's end; CJK marks need no space.
END = re.compile(r"(?<=[.!?…])[\"')\]’”]*(?=\s)|(?<=[。！？])|\n+")  # noqa: RUF001


class Span(NamedTuple):
    start: int
    end: int
    text: str


def starts(chat: Chat, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids, and the character at which each token begins."""
    stream, text, places = TextStream(chat), "", []
    for token in ids:
        places.append(len(text))
        text += stream.push(token)
    return text + stream.flush(), places


def parts(text: str) -> Iterator[tuple[int, int]]:
    """The sentences and lines of a text, as character ranges that leave out the space around them."""
    begin = 0
    for end in [*(match.end() for match in END.finditer(text)), len(text)]:
        piece = text[begin:end]
        if stripped := piece.strip():
            first = begin + piece.index(stripped[0])
            yield first, first + len(stripped)
        begin = end


def prompt_spans(chat: Chat, ids: Sequence[int], contents: Sequence[str], single: bool) -> list[Span]:
    """The spans of a prompt: those of the messages' `contents`, in the order in which the template writes them."""
    text, places = starts(chat, ids)
    found, at = [], 0
    for content in map(str.strip, contents):
        place = text.find(content, at) if content else -1
        if place < 0:  # a template may drop a message, or change it
            continue
        at = place + len(content)
        found += _spans(text, places, place, at, single, len(ids))
    return found


def reply_spans(chat: Chat, ids: Sequence[int], begin: int, single: bool) -> list[Span]:
    """The spans of the reply ids[begin:], special and thinking tokens left out."""
    text, places = starts(chat, ids)
    tags = {chat.think_start_id, chat.think_end_id} | chat.special_ids
    runs, start = [], begin
    for index in range(begin, len(ids) + 1):
        if index == len(ids) or ids[index] in tags:
            if index > start:
                runs.append((start, index))
            start = index + 1
    return [
        span
        for first, last in runs
        for span in _spans(text, places, places[first], places[last] if last < len(ids) else len(text), single, last)
    ]


def _spans(text: str, places: list[int], start: int, end: int, single: bool, limit: int) -> list[Span]:
    """The parts of text[start:end] as spans of tokens; a token belongs to the part in which its first visible
    character lies."""
    ranges = [(start + a, start + b) for a, b in parts(text[start:end])]
    owner: dict[int, list[int]] = {}
    for token in range(min(limit, len(places))):
        begin = places[token]
        stop = places[token + 1] if token + 1 < len(places) else len(text)
        seen = next((i for i in range(begin, stop) if not text[i].isspace()), begin)
        if not start <= seen < end:
            continue
        part = next((i for i, (a, b) in enumerate(ranges) if a <= seen < b), None)
        if part is not None:
            owner.setdefault(part, []).append(token)
    if single:
        return [Span(t, t + 1, _shown(text, places, t, t + 1)) for tokens in owner.values() for t in tokens]
    return [Span(t[0], t[-1] + 1, _shown(text, places, t[0], t[-1] + 1)) for t in owner.values()]


def _shown(text: str, places: list[int], start: int, end: int) -> str:
    return text[places[start] : places[end] if end < len(places) else len(text)]
