"""How many tokens texts have, exactly and fast: each word is tokenised once.

A byte-level BPE first cuts a text into pieces by a pattern, and no token crosses two. So a text's count is the sum of
its pieces', and a piece that was seen before needs no work. All published patterns (ALTERNATIVES) cut before a space
that stands alone, so a text can be split there, which is faster still; elsewhere Python's `re` cuts, once the pattern's
letter and digit classes are spelt out, as the tokenizer's own engine has them.
Text that this would not count exactly (characters from U+3000 on, text that is not NFC, added tokens in it, any other
kind of tokenizer) goes to the library, in threads.
"""

import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Regex, Tokenizer, models, normalizers

from chat import BYTE_OF_CHARACTER
from inspection.xray.text_columns import in_parts

LIMIT = 0x3000
BYTES = 4 << 20  # of text processed at a time
REMEMBERED = 1_000_000  # words, pieces and runs, of each
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
# What ByteLevel cuts by, where the file gives no pattern of its own (GPT-2's).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenCounter:
    """`counts(texts)` are the lengths of `tokenizer.encode(text, add_special_tokens=False)`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._pieces: Memo | None = None  # None: the library counts
        self._words: Memo | None = None  # None: the pattern cuts
        with suppress(Exception):  # anything unexpected in a stranger's file means: let the library do it
            self._read_pattern()

    def counts(self, texts: pa.Array) -> np.ndarray:
        """int64 [N] of N texts, none of them null."""
        if self._pieces is None:
            return self._library(texts)
        found = [np.empty(0, np.int64)]
        for part in in_parts(texts, BYTES):
            found.append(sizes := np.zeros(len(part), np.int64))
            plain = self._plain(part)
            fast = self._one_by_one if self._words is None else self._by_words
            for mask, count in ((plain, fast), (~plain, self._library)):
                if mask.any():
                    sizes[mask] = count(part if mask.all() else part.filter(pa.array(mask)))
        for known in (self._pieces, self._words, self._runs):
            if known is not None and len(known) > REMEMBERED:
                known.clear()
        return np.concatenate(found)

    def _plain(self, texts: pa.Array) -> np.ndarray:
        """Which texts are counted exactly without the library."""
        plain = pc.string_is_ascii(texts).to_numpy(zero_copy_only=False).copy()
        for place in np.flatnonzero(~plain):
            text = texts[int(place)].as_py()
            plain[place] = max(text) < chr(LIMIT) and unicodedata.is_normalized("NFC", text)
        if self._added:
            plain &= ~pc.match_substring_regex(texts, self._added).to_numpy(zero_copy_only=False)
        return plain

    def _by_words(self, texts: pa.Array) -> np.ndarray:
        """By words between spaces; what stands beside other white space is joined to its neighbours."""
        words = pc.split_pattern(texts, " ")
        flat, firsts = words.flatten(), words.offsets.to_numpy()[:-1]
        different = flat.dictionary_encode()
        facts = np.fromiter(map(self._words.__getitem__, different.dictionary.to_pylist()), np.int32)
        facts = facts[different.indices.to_numpy()]
        sizes, begins, ends = facts >> 2, facts & 2 > 0, facts & 1 > 0
        edges = np.frombuffer(flat.buffers()[1], np.int32, len(flat) + 1)
        ends[firsts[edges[firsts] == edges[firsts + 1]]] = True  # a text's own beginning is no word
        cut = np.concatenate(([True], begins[1:] & ends[:-1]))
        cut[firsts] = True
        starts = np.flatnonzero(cut)
        stops = np.append(starts[1:], len(flat))
        is_first = np.zeros(len(flat), bool)
        is_first[firsts] = True
        sizes, is_first = sizes[starts], is_first[starts]
        odd = np.flatnonzero(is_first | (stops - starts > 1))
        # where they stand in the texts, which have a space before each word but a text's first
        text = np.searchsorted(firsts, starts[odd], side="right") - 1
        start = edges[starts[odd]] + starts[odd] - text - ~is_first[odd]
        stop = edges[stops[odd]] + stops[odd] - 1 - text
        data = (texts.buffers()[2] or pa.py_buffer(b"")).to_pybytes()
        sizes[odd] = [self._runs[data[a:b]] for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
        return np.add.reduceat(sizes, np.searchsorted(starts, firsts))

    def _one_by_one(self, texts: pa.Array) -> np.ndarray:
        return np.array([self._pieces_of(text) for text in texts.to_pylist()])

    def _pieces_of(self, text: str) -> int:
        return sum(map(self._pieces.__getitem__, self._cut(text)))

    def _word(self, word: str) -> int:
        """4 times the tokens of the space and the word after it, + 2 if a cut before it is one, + 1 if one after it."""
        begins, ends = bool(word) and not word[0].isspace(), bool(word) and not word[-1].isspace()
        return self._pieces_of(f" {word}") << 2 | begins << 1 | ends

    def _piece(self, piece: str) -> int:
        return len(self.tokenizer.model.tokenize("".join(CHARACTER_OF_BYTE[byte] for byte in piece.encode())))

    def _library(self, texts: pa.Array) -> np.ndarray:
        return np.array([len(e) for e in self.tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)])

    def _read_pattern(self) -> None:
        """Takes the tokenizer's own pattern for Python's `re`, unless the two disagree about texts of every kind."""
        source = _pattern_of(self.tokenizer)
        if source is None:
            return
        self._cut = re.compile(_translated(source)).findall
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        self._added = "|".join(map(re.escape, added))
        self._pieces, self._runs = Memo(self._piece), Memo(lambda run: self._pieces_of(run.decode()))
        if set(alternatives(source)) <= ALTERNATIVES and all(map(str.isspace, members(r"\s"))):
            self._words = Memo(self._word)
        probe = PROBE + "".join(map(chr, range(0x20, 0x250))) + "a b\u2009c \u00a0d\u0905\u0660 \u2167"
        probe = unicodedata.normalize("NFC", probe)
        texts = pa.array([unicodedata.normalize("NFC", text) for text in (probe, probe[::-1], *probe.split(" "))])
        texts = texts.filter(pa.array(self._plain(texts)))
        whole = all("".join(self._cut(text)) == text for text in texts.to_pylist())
        if not whole or not np.array_equal(self.counts(texts), self._library(texts)):
            self._pieces = None


class Memo(dict):
    """What was computed once."""

    def __init__(self, compute: Callable):
        self.compute = compute

    def __missing__(self, key: str | bytes) -> int:
        self[key] = value = self.compute(key)
        return value


# What the patterns in use are made of. Each takes a space only as its first character or beside other white space; so
# before a space that stands alone a piece ends, whatever surrounds it.
ALTERNATIVES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *(r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
    *(r"\p{N}", r"\p{N}{1,3}", r" ?\p{N}+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
    *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
}


def alternatives(pattern: str) -> list[str]:
    return re.split(r"\|(?![^()]*\))", pattern)


PROBE = "Hello world's  it'S I'LL don't\r\n\r\n  x=1,234.5;\tfoo_bar() \n\n\n  end   "
PROBE += "\u201cquoted\u201d \u2014 na\u00efve 12345 \x1c\x85 "


def _pattern_of(tokenizer: Tokenizer) -> str | None:
    """The pattern of a byte-level BPE that cuts by one, isolated, after at most NFC."""
    import json

    normal = tokenizer.normalizer
    if not isinstance(tokenizer.model, models.BPE) or not (normal is None or isinstance(normal, normalizers.NFC)):
        return None
    step = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2 if steps[-1]["use_regex"] else None
    split = steps[0]
    plain = len(steps) == 2 and not steps[-1]["use_regex"] and split["type"] == "Split"
    return split["pattern"].get("Regex") if plain and split["behavior"] == "Isolated" and not split["invert"] else None


def _translated(pattern: str) -> str:
    r"""The pattern with `\p{L}`, `\p{N}` and `\s` spelt out up to LIMIT."""
    classes = {name: _class_of(name) for name in (r"\p{L}", r"\p{M}", r"\p{N}", r"\s")}
    made, inside = [], False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part in ("[", "]"):
            inside = part == "["
        if part in classes:
            made.append(classes[part] if inside else f"[{classes[part]}]")
        elif part == r"\S" and not inside:
            made.append(f"[^{classes[chr(92) + 's']}]")
        elif part[:2] in (r"\p", r"\P", r"\w", r"\W", r"\d", r"\D", r"\S", r"\h", r"\b"):
            raise ValueError(part)
        else:
            made.append(part)
    return "".join(made)


def members(name: str) -> list[str]:
    """The characters of a class below LIMIT, by the library's own engine."""
    everything = "".join(map(chr, range(LIMIT)))
    return sorted(set(normalizers.Replace(Regex(f"[^{name}]"), "").normalize_str(everything)))


def _class_of(name: str) -> str:
    ranges: list[list[int]] = []
    for code in map(ord, members(name)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in ranges)
