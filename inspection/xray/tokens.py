"""How many tokens texts have, exactly and fast: each word is split into tokens once.

A byte-level BPE first cuts a text into pieces by a pattern, and no token crosses two. So a text's count is the sum of
its pieces', and a piece that was seen before needs no work. Python's `re` cuts at about 35 MB/s once the pattern's
letter and digit classes are spelt out, as the tokenizer's own engine has them; the library itself does 4 MB/s a core.
Text that this would not serve exactly (characters from U+3000 on, text that is not NFC, added tokens in it, any other
kind of tokenizer) goes to the library, in threads.
"""

import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

from tokenizers import Regex, Tokenizer, models, normalizers

from chat import BYTE_OF_CHARACTER

LIMIT = 0x3000
PIECES = 1_000_000  # in memory at once
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
# What ByteLevel cuts by, where the file gives no pattern of its own (GPT-2's).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenCounter:
    """`counts(texts)` are the lengths of `tokenizer.encode(text, add_special_tokens=False)`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._lengths: dict[str, int] = _Lengths(tokenizer)

    def counts(self, texts: Sequence[str]) -> list[int]:
        if self._pattern is None:
            return self._library(texts)
        found: list[int] = [0] * len(texts)
        slow = []
        cut, length = self._pattern.findall, self._lengths.__getitem__
        for place, text in enumerate(texts):
            if (text.isascii() or self._is_plain(text)) and not self._added.search(text):
                found[place] = sum(map(length, cut(text)))
            else:
                slow.append(place)
        if slow:
            for place, count in zip(slow, self._library([texts[place] for place in slow]), strict=True):
                found[place] = count
        if len(self._lengths) > PIECES:
            self._lengths.clear()
        return found

    def _library(self, texts: Sequence[str]) -> list[int]:
        return [len(found) for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    @staticmethod
    def _is_plain(text: str) -> bool:
        return max(text) < chr(LIMIT) and unicodedata.is_normalized("NFC", text)

    @cached_property
    def _added(self) -> re.Pattern:
        contents = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    @cached_property
    def _pattern(self) -> re.Pattern | None:
        """The tokenizer's own pattern for Python's `re`; None where this is no such tokenizer or the two disagree."""
        with suppress(Exception):  # anything unexpected in a stranger's file means: let the library do it
            source = _pattern_of(self.tokenizer)
            if source is None:
                return None
            pattern = re.compile(_translated(source))
            probe = PROBE + "".join(map(chr, range(0x20, 0x250))) + "a b\u2009c \u00a0d\u0905\u0660 \u2167"
            probe = unicodedata.normalize("NFC", probe)
            for part in (probe, probe[::-1], *probe.split(" ")):
                text = unicodedata.normalize("NFC", part)
                if not self._added.search(text):
                    if "".join(pattern.findall(text)) != text:
                        return None
                    if sum(map(self._lengths.__getitem__, pattern.findall(text))) != self._library([text])[0]:
                        return None
            return pattern
        return None


PROBE = "Hello world's  it'S I'LL don't\r\n\r\n  x=1,234.5;\tfoo_bar() \n\n\n  end   "
PROBE += "\u201cquoted\u201d \u2014 na\u00efve 12345 \x1c\x85 "


class _Lengths(dict):
    """Piece to number of tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.model = tokenizer.model

    def __missing__(self, piece: str) -> int:
        count = len(self.model.tokenize("".join(CHARACTER_OF_BYTE[byte] for byte in piece.encode())))
        self[piece] = count
        return count


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
    classes = {name: _class_of(name) for name in (r"\p{L}", r"\p{N}", r"\s")}
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


def _class_of(name: str) -> str:
    """The members of a class below LIMIT, by the library's own engine."""
    everything = "".join(map(chr, range(LIMIT)))
    members = sorted(map(ord, set(normalizers.Replace(Regex(f"[^{name}]"), "").normalize_str(everything))))
    ranges: list[list[int]] = []
    for code in members:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in ranges)
