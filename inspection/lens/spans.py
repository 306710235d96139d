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
        written = chat.decode(chat.encode(content))  # as the tokenizer normalises it (NFC)
        place = text.find(written, at) if written else -1
        if place < 0:  # a template may drop a message, or change it
            continue
        at = place + len(written)
        found += _spans(chat, ids, text, places, place, at, single)
    return found


def reply_spans(chat: Chat, ids: Sequence[int], begin: int, single: bool) -> list[Span]:
    """The spans of the reply ids[begin:], special and thinking tokens left out."""
    text, places = starts(chat, ids)
    return _spans(chat, ids, text, places, places[begin] if begin < len(ids) else len(text), len(text), single, begin)


def _spans(
    chat: Chat, ids: Sequence[int], text: str, places: list[int], start: int, end: int, single: bool, first: int = 0
) -> list[Span]:
    """The parts of text[start:end] as spans of the tokens ids[first:]; special tokens separate parts, and a token
    belongs to the part in which its first visible character lies."""
    tags = {chat.think_start_id, chat.think_end_id} | chat.special_ids
    ends = [*places[1:], len(text)]
    edges = [start]
    for token, begin, stop in zip(ids, places, ends, strict=True):
        if token in tags and start <= begin < end:
            edges += (begin, stop)
    edges.append(end)
    ranges = [
        (low + a, low + b) for low, high in zip(edges[::2], edges[1::2], strict=True) for a, b in parts(text[low:high])
    ]
    owner: dict[int, list[int]] = {}
    for token in range(first, len(ids)):
        begin, stop = places[token], ends[token]
        seen = next((i for i in range(begin, stop) if not text[i].isspace()), begin)
        part = next((i for i, (a, b) in enumerate(ranges) if a <= seen < b), None)
        if part is not None and ids[token] not in tags:
            owner.setdefault(part, []).append(token)
    runs = [(tokens[0], tokens[-1] + 1) for tokens in owner.values()]
    if single:
        runs = [(token, token + 1) for tokens in owner.values() for token in tokens]
    return [Span(low, high, text[places[low] : ends[high - 1]]) for low, high in runs]
