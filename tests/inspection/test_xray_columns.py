"""What the X-ray computes by the column against the same by the row: keys, tokens, words, near-duplicates."""

import random
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from inspection.xray import near
from inspection.xray.text_columns import in_parts, lines
from inspection.xray.tokens import TokenCounter

CHARACTERS = "aAbBZ' \t\n\r\v\x1c\x85\xa0\u2003\u3000éÉ\u0301KİßΣ12.,-(<|\x00\x7f"


def strange(number: int, longest: int, words: bool = False) -> list[str]:
    dice = random.Random(number)
    if words:
        said = ["ab", "a\nb", "(x)", "1", "23", "'s", "don't", "", "x\t", "\ny", "é", "¿q", "...", "x  y", "漢字"]
        return [" ".join(dice.choices(said, k=dice.randrange(longest))) for _ in range(500)]
    return ["".join(dice.choices(CHARACTERS, k=dice.randrange(longest))) for _ in range(500)]


def test_a_line_is_a_text_without_case_and_extra_white_space():
    texts = [None, *strange(1, 12), *strange(2, 40, words=True)]
    wanted = [text and (unicodedata.normalize("NFC", " ".join(text.lower().split())) or None) for text in texts]
    wanted = [line or None for line in wanted]
    column = pa.array(texts)
    assert lines(column).to_pylist() == wanted
    assert lines(column.slice(7, 300)).to_pylist() == wanted[7:307]
    assert lines(pa.nulls(2, pa.string())).to_pylist() == [None, None]


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
ACROSS_SPACES = r"\p{L}+ \p{L}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", [None, QWEN, QWEN_3_5, ACROSS_SPACES])
def test_tokens_are_those_of_the_library(pattern):
    """On texts whose every space stands somewhere else, and with a pattern that takes a space in its middle."""
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    merges = [("Ġ", "a"), ("a", "b"), ("Ġa", "b"), ("b", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "Ċ"), (".", "Ċ")]
    names = [*sorted(bytes_), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, step]) if split else step
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    counter = TokenCounter(tokenizer)
    assert counter._pieces is not None
    assert (counter._words is None) == (pattern == ACROSS_SPACES)
    texts = [*strange(3, 80), *strange(4, 60, words=True), "", " ", " ab", "ab ", "ab  ", "a <|end|> b", "ab ab\n"]
    texts += [Path(__file__).read_text(encoding="utf-8")]
    wanted = [len(found) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    assert counter.counts(pa.array(texts)).tolist() == wanted
    assert counter.counts(pa.array(texts).slice(3, 200)).tolist() == wanted[3:203]
    assert counter.counts(pa.array([], pa.string())).tolist() == []


def test_parts_hold_all_texts_in_their_order():
    texts = pa.array(["x" * size for size in (3, 0, 50, 1, 1, 9, 30)]).slice(1)
    parts = list(in_parts(texts, 10))
    assert [text for part in parts for text in part.to_pylist()] == texts.to_pylist()
    assert len(parts) == 5
    assert all(part.offset == 0 for part in parts)


def test_similarities_are_those_of_the_sets():
    dice = random.Random(5)
    sets = [sorted(dice.sample(range(1 << 40, (1 << 40) + 30), dice.randrange(1, 20))) for _ in range(40)]
    offsets = np.cumsum([0, *map(len, sets)])
    pairs = np.array([(later, earlier) for earlier, later in combinations(range(40), 2)])
    sizes = np.diff(offsets)
    chunks = list(near.in_chunks(pairs, sizes))
    assert np.array_equal(np.concatenate(chunks, axis=1).T, pairs)
    many = np.zeros((70_000, 2), np.int64)
    assert max(chunk.shape[1] for chunk in near.in_chunks(many, sizes)) <= 1 << 16  # what a pair's number has room for
    later, earlier = pairs.T
    found = near.jaccard(np.concatenate(sets).astype(np.uint64), offsets, later, earlier)
    exact = [len({*sets[i]} & {*sets[j]}) / len({*sets[i]} | {*sets[j]}) for i, j in pairs]
    assert np.allclose(found, exact)


def test_a_bucket_gives_each_pair_of_its_rows():
    keys = np.array([7, 5, 7, 9, 5, 7, *[1] * (near.CROWD + 2)], np.uint64)
    found = {tuple(pair) for pair in near.bucket_pairs(keys).tolist()}
    small = {(2, 0), (5, 0), (5, 2), (4, 1)}
    crowd = range(6, len(keys))
    with_first, with_neighbour = {(row, 6) for row in crowd[1:]}, {(row, row - 1) for row in crowd[2:]}
    assert found == small | with_first | with_neighbour
