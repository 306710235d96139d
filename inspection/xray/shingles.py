"""Words and word n-grams of many texts at once, as 64-bit hashes: the basis of near-duplicates and leakage.

A word is a run of letters and digits in any script, lower-cased; a Chinese or Japanese character is a word by itself.
All of it is numpy over the bytes of an Arrow column: no Python object per word.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inspection.xray.text_columns import in_parts

BYTES = 2 << 20  # of text processed at a time
LONGEST = 4 << 20  # characters of one text that count
PRIME, INVERSE = np.uint64(0x9E3779B97F4A7C15), np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


class Words(NamedTuple):
    """Of N texts with W words together."""

    hashes: np.ndarray  # uint64 [W]
    starts: np.ndarray  # int64 [W]: where each begins in its text, in bytes
    ends: np.ndarray  # int64 [W]
    offsets: np.ndarray  # int64 [N + 1]: of each text's words


class Grams(NamedTuple):
    hashes: np.ndarray  # uint64 [G]
    words: np.ndarray  # int64 [G]: the first word of each, as an index into Words
    offsets: np.ndarray  # int64 [N + 1]: of each text's n-grams


WORD = bytes(chr(code).isalnum() or code >= 0x80 for code in range(256))


def words(texts: pa.Array) -> Words:
    """`texts`: a string array without nulls."""
    texts = pc.utf8_lower(pc.utf8_slice_codeunits(texts, 0, LONGEST))
    parts = [_words(part) for part in in_parts(texts, BYTES)]
    if not parts:
        return Words(np.empty(0, np.uint64), *(np.empty(0, np.int64),) * 2, np.zeros(1, np.int64))
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    joined = (np.concatenate([part[field] for part in parts]) for field in range(3))
    return Words(*joined, np.concatenate(([0], np.cumsum(counts))))


def _words(texts: pa.Array) -> Words:
    texts = texts.cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64, len(texts) + 1)
    base, size = offsets[0], int(offsets[-1] - offsets[0])
    offsets = offsets - base
    if not size:
        return Words(np.empty(0, np.uint64), *(np.empty(0, np.int64),) * 2, np.zeros(len(texts) + 1, np.int64))
    data = np.frombuffer(texts.buffers()[2], np.uint8, size, int(base))
    word = np.frombuffer(bytearray(data.tobytes().translate(WORD)), bool)
    following = np.concatenate((data[1:], np.zeros(1, np.uint8)))
    # punctuation beyond ASCII: U+0080-00BF, U+2000-207F, U+3000-303F
    for width, marks in (
        (2, data == 0xC2),
        (3, ((data == 0xE2) & (following <= 0x81)) | ((data == 0xE3) & (following == 0x80))),
    ):
        for place in range(width):
            word[np.flatnonzero(marks[: size - place]) + place] = False
    own = np.zeros(size, bool)  # characters that are words by themselves
    leads = np.flatnonzero((data >= 0xE3) & (data <= 0xE9) & word)
    for place in range(3):
        own[leads[leads < size - place] + place] = True
    lead = np.zeros(size, bool)
    lead[leads] = True
    edge = np.zeros(size + 1, bool)
    edge[offsets] = True
    after_gap = np.concatenate(([True], ~word[:-1])) | edge[:-1]
    begins = word & (after_gap | lead | (np.concatenate(([False], own[:-1])) & ((data & 0xC0) != 0x80)))
    stops = word & np.concatenate(((~word | begins)[1:], [True])) | word & edge[1:]
    starts, ends = np.flatnonzero(begins), np.flatnonzero(stops) + 1
    # sum of byte * P^place over each word, made independent of where it stands
    sums = np.zeros(size + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers(PRIME, size)[:-1], out=sums[1:])
    inverse = powers(INVERSE, size)
    hashes = mixed((sums[ends] - sums[starts]) * inverse[starts])
    at = np.searchsorted(starts, offsets)
    first = np.repeat(offsets[:-1], np.diff(at))
    return Words(hashes, starts - first, ends - first, at)


KNOWN: dict[int, np.ndarray] = {}


def powers(base: np.uint64, size: int) -> np.ndarray:
    """uint64 [size + 1]: base to the power of 0, 1, ..."""
    known = KNOWN.get(int(base), np.empty(0, np.uint64))
    if len(known) <= size:
        known = np.full(max(size, BYTES) + 1, base)
        known[0] = 1
        np.cumprod(known, out=known)
        if size <= 2 * BYTES:
            KNOWN[int(base)] = known
    return known[: size + 1]


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread bits (the finaliser of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def grams(found: Words, n: int, short: bool = True) -> Grams:
    """The n-grams of each text. With `short` a text of fewer words has one: all that it has."""
    count = np.diff(found.offsets)
    size = np.maximum(count - n + 1, 0)
    if short:
        size = np.where((count > 0) & (count < n), 1, size)
    offsets = np.concatenate(([0], np.cumsum(size)))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], size)
    first = np.repeat(found.offsets[:-1], size) + within
    last = np.repeat(found.offsets[1:], size)
    hashes = np.zeros(len(first), np.uint64)
    for place in range(n):
        at = first + place
        inside = at < last
        word = np.where(inside, found.hashes[np.minimum(at, max(0, len(found.hashes) - 1))], np.uint64(place + 1))
        hashes = mixed(hashes * PRIME + word)
    return Grams(hashes, first, offsets)
