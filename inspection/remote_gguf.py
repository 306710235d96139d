"""The header of a .gguf file on the hub, read by range requests: metadata, chat template and the table of tensors.

Most of a header is the vocabulary: at Qwen3's, 5.9 MB of token texts, types and merges, with the template and the
tensors behind them. Large arrays are skipped. One of numbers has a known size; the end of one of strings is found
by looking: each string is its length and its bytes, so a few hundred bytes show whether they lie in such a row. A wrong
guess cannot pass: all that follows must parse, and the tensors must fill the file exactly (formats/gguf/reader.py).
"""

import re
import struct
from typing import Any, BinaryIO, NamedTuple

from formats.gguf import types
from formats.gguf.reader import Head, parse
from inspection.tree import RemoteFile

FEW = 4096  # strings or numbers that are read anyway
WINDOW = 8192  # bytes that are looked at
LONGEST = 1024  # of a token or merge
LEAST = 8  # strings in a row
BOOLEAN = 7


class Unread(NamedTuple):
    """A placeholder in the metadata for an array that was skipped."""

    count: int
    bytes: int


class _Bytes:
    """A stream as a sequence of bytes."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: slice | int) -> Any:
        start, end = (at, at + 1) if isinstance(at, int) else at.indices(self._size)[:2]
        self._stream.seek(start)
        found = self._stream.read(max(0, end - start))
        return found[0] if isinstance(at, int) else found


class RemoteHead(Head):
    """`Head`, with `Unread` for large arrays. ValueError where their ends cannot be found."""

    def number(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        start = self.take(size, what)
        return struct.unpack("<" + letter, self.data[start : start + size])[0]

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        if kind != types.ARRAY:
            return super().value(kind, key, nesting)
        start = self.take(12, key)
        element, count = struct.unpack("<IQ", self.data[start : start + 12])
        begin, letter = self.position, types.LETTERS.get(element)
        is_large = count > FEW and not nesting and (letter or element == types.STRING)
        if not is_large and (letter is None or element == BOOLEAN):
            self.position -= 12
            return super().value(kind, key, nesting)
        self.elements.setdefault(key, element)
        if letter:
            self.take(count * struct.calcsize("<" + letter), key)
            if not is_large:
                return list(struct.unpack(f"<{count}{letter}", self.data[begin : self.position]))
        else:
            self.position = self._end_of_strings(begin, count, key)
        return Unread(count, self.position - begin)

    def _end_of_strings(self, begin: int, count: int, key: str) -> int:
        """Where an array of `count` strings ends that begins at `begin`."""
        if count * 9 > self.size - begin:
            self.fail(f"{count} values of {key} cannot be in {self.size - begin} bytes")
        step = max(WINDOW, 2 * count)  # the types of tokens, four bytes each, stand between two arrays of strings
        inside, beyond = begin, begin + 9 * count  # none is empty
        while beyond < self.size and self._row(beyond):
            inside, beyond = beyond, beyond + step
        beyond = min(beyond, self.size)
        while beyond - inside > WINDOW // 2:
            middle = (inside + beyond) // 2
            inside, beyond = (middle, beyond) if self._row(middle) else (inside, middle)
        places = self._row(inside, 4 * WINDOW)
        if len(places) < 2:
            self.fail(f"the end of {key} cannot be found")
        # The name of the next key, or of the first tensor, is a string too, and the last one that can be read so.
        length = struct.unpack("<Q", self.data[places[-1] : places[-1] + 8])[0]
        name = bytes(self.data[places[-1] + 8 : places[-1] + 8 + length])
        if not re.fullmatch(rb"[\w-]+(\.[\w-]+)+", name):
            self.fail(f"the end of {key} cannot be found")
        return places[-1]

    def _row(self, at: int, window: int = WINDOW) -> list[int]:
        """Where strings begin that follow each other from somewhere near `at` on; none where there is no such row."""
        data = self.data[at : at + window]
        for offset in range(min(LONGEST, len(data))):
            places, place = [], offset
            while place + 8 <= len(data):
                length = int.from_bytes(data[place : place + 8], "little")
                end = place + 8 + length
                if not 0 < length <= LONGEST or (end <= len(data) and not _is_utf8(data[place + 8 : end])):
                    break
                if end > len(data):
                    break
                places.append(at + place)
                place = end
            if len(places) >= LEAST:
                return places
        return []


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def parse_head(path: str, stream: BinaryIO, size: int) -> Head:
    """The header of an open .gguf file; of one on the hub no more than is needed."""
    if isinstance(getattr(stream, "raw", None), RemoteFile):
        return RemoteHead(path, _Bytes(stream, size))
    return parse(path, stream, size)


def unread(head: Head) -> int:
    """Bytes of the header that were skipped."""
    return sum(value.bytes for value in head.metadata.values() if isinstance(value, Unread))
