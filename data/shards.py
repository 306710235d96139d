"""Files of token ids, in the format of the fineweb10B-gpt2 shards.

    python data/shards.py inspect FILE [--tokenizer SRC]      header, counts, document lengths, decoded samples

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] number of tokens, the rest unused) and then
the ids: uint16 (magic 20240520, version 1), or uint32 where the vocabulary is larger (magic 20240801, version 7), both
as in llm.c (https://github.com/karpathy/llm.c, dev/data). An end-of-text token precedes each document; a document may
go on from one shard into the next. A shard is somebody else's file: nothing in it is believed before it is checked.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import console
from formats.files import atomic_file

HEADER_BYTES = 1024
KINDS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
END_OF_TEXT = "<|endoftext|>"


class Shard:
    """The ids of one file, memory-mapped: `len(shard)` tokens, `shard.tokens` as uint16 or uint32 [N]."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < HEADER_BYTES:
            raise ValueError(f"{path}: {size:,} bytes are too few for a shard's header of 1,024; download it again")
        header = np.fromfile(self.path, dtype="<i4", count=256)
        magic, version, count = (int(number) for number in header[:3])
        if magic not in KINDS:
            known = " and ".join(str(number) for number in KINDS)
            raise ValueError(f"{path}: magic number {magic} is no shard's ({known} are); give a file of token ids")
        expected, dtype = KINDS[magic]
        if version != expected:
            raise ValueError(f"{path}: version {version} of the format; only {expected} is known for magic {magic}")
        stated = HEADER_BYTES + count * dtype.itemsize
        if count < 0 or stated != size:
            raise ValueError(
                f"{path}: the header says {count:,} tokens, a file of {stated:,} bytes, but it has {size:,}; download "
                "it again"
            )
        # numpy maps no empty files
        self.tokens = np.memmap(self.path, dtype, "r", HEADER_BYTES, (count,)) if count else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int, vocabulary: int) -> np.ndarray:
        """Tokens start … start + count - 1 as int64, each checked to be below `vocabulary`."""
        ids = self.tokens[start : start + count].astype(np.int64)
        if len(ids) and ids.max() >= vocabulary:
            at = start + int(ids.argmax())
            raise ValueError(
                f"{self.path}: token {at:,} is {int(ids.max()):,}, outside of the vocabulary of {vocabulary:,}; "
                "the shard was made with another tokenizer"
            )
        return ids


def write_shard(path: Path | str, ids: np.ndarray | Iterable[int], vocabulary: int) -> None:
    """Writes a whole shard or none: uint16 where every id of the vocabulary fits, else uint32."""
    magic = 20240520 if vocabulary <= 1 << 16 else 20240801
    version, dtype = KINDS[magic]
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"{path}: token ids from {ids.min()} to {ids.max()} for a vocabulary of {vocabulary:,}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header.tobytes())
        file.write(ids.astype(dtype).tobytes())


class Windows:
    """All shards as rows of `length` + 1 tokens that overlap by one, in an order of its own for each epoch.

    Row i of the endless sequence is a pure function of seed and i: every row comes once an epoch, so a run's cursor is
    a number, and processes that take different numbers never see the same row. A shard's last tokens, too few for a
    row, are left out.
    """

    def __init__(self, paths: list[Path], length: int, vocabulary: int, seed: int, shuffle: bool = True):
        self.shards = [Shard(path) for path in paths]
        self.length, self.vocabulary, self.seed, self.shuffle = length, vocabulary, seed, shuffle
        self.rows = [max(0, len(shard) - 1) // length for shard in self.shards]
        self.ends = np.cumsum(self.rows)
        if not self.rows or self.ends[-1] == 0:
            names = ", ".join(str(path) for path in paths[:3])
            raise ValueError(f"{names}: no shard has the {length + 1:,} tokens of one row; lower train.sequence")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, index: int) -> np.ndarray:
        """int64 [length + 1]"""
        epoch, place = divmod(index, len(self))
        if self.shuffle:
            if epoch != self._epoch:
                random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
                self._epoch, self._order = epoch, random.permutation(len(self))
            place = int(self._order[place])
        shard = int(np.searchsorted(self.ends, place, side="right"))
        start = (place - int(self.ends[shard]) + self.rows[shard]) * self.length
        return self.shards[shard].read(start, self.length + 1, self.vocabulary)


def documents(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The lengths of the documents in a stretch of ids, their end-of-text tokens not counted.

    What stands before the first end-of-text token is the rest of a document that began in another shard.
    """
    starts = np.flatnonzero(ids == end_of_text)
    edges = np.concatenate(([-1] if len(ids) and (not len(starts) or starts[0] > 0) else [], starts, [len(ids)]))
    return np.diff(edges).astype(np.int64) - 1


def histogram(lengths: np.ndarray, width: int = 40) -> str:
    """Document lengths by powers of two, a bar a line."""
    if not len(lengths):
        return "no documents"
    bins = np.bincount([int(length).bit_length() for length in lengths])
    lines = []
    for bits, count in enumerate(bins):
        if count:
            low, high = (1 << bits) >> 1, (1 << bits) - 1
            lines.append(f"{low:>9,} - {high:>9,}  {count:>9,}  {'#' * math.ceil(width * count / bins.max())}")
    return "\n".join(lines)


def inspect(path: Path, tokenizer: Path | None, samples: int) -> str:
    """What `python data/shards.py inspect` prints."""
    shard = Shard(path)
    lines = [f"{path}: {len(shard):,} tokens, {shard.tokens.dtype.name}, {path.stat().st_size:,} bytes"]
    if len(shard):
        lines.append(f"ids from {int(shard.tokens.min()):,} to {int(shard.tokens.max()):,}")
    decode, end = None, 50256
    if tokenizer is not None:
        from data.texts import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        end, vocabulary = loaded.token_to_id(END_OF_TEXT), loaded.get_vocab_size()
        if end is None:
            raise ValueError(f"{tokenizer}: has no {END_OF_TEXT} token, which parts the documents of a shard")
        shard.read(0, len(shard), vocabulary)
        decode = loaded.decode
    lengths = documents(shard.tokens, end)
    if len(lengths):
        median, longest = int(np.median(lengths)), int(lengths.max())
        lines.append(f"{len(lengths):,} documents; tokens each: median {median:,}, longest {longest:,}")
        lines.append(histogram(lengths))
    starts = np.flatnonzero(shard.tokens == end)
    for start in starts[:: max(1, len(starts) // max(1, samples))][:samples]:
        ids = shard.tokens[start + 1 : start + 60].tolist()
        lines.append(f"\n[token {start + 1:,}] {decode(ids) if decode else ids}")
    return "\n".join(lines)


def main() -> None:
    parser = console.ArgumentParser(description="Shows what a shard of token ids holds.")
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (default: ids are shown)")
    parser.add_argument("--samples", type=int, default=3, help="beginnings of documents to show")
    arguments = parser.parse_args()
    print(inspect(arguments.file, arguments.tokenizer, arguments.samples))


if __name__ == "__main__":
    console.run(main)
