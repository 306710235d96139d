"""Files of token ids, in the format of the fineweb10B-gpt2 shards.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] number of tokens, the rest unused) and then
the ids: uint16 (magic 20240520, version 1), or uint32 where the vocabulary is larger (magic 20240801, version 7), both
as in llm.c (https://github.com/karpathy/llm.c, dev/data). An end-of-text token precedes each document; a document may
continue in the next shard. Shards are untrusted files: header and size are checked when one is opened, each id when it
is read, so that opening a hundred shards costs nothing.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from formats.files import atomic_file

HEADER_BYTES = 1024
KINDS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
MOST_TOKENS = 2**31 - 1  # what the header can say
END_OF_TEXT = "<|endoftext|>"
SAMPLES, SAMPLE_BYTES = 64, 1 << 12  # of a shard's fingerprint: 256 KB, of whatever size it is


class Shard:
    """The ids of one file: `len(shard)` tokens, read when they are needed, so that no file stays open."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < HEADER_BYTES:
            raise ValueError(f"{path}: {size:,} bytes are too few for a shard's header of 1,024; download it again")
        header = np.fromfile(self.path, dtype="<i4", count=256)
        self.magic, self.version, count = (int(number) for number in header[:3])
        if self.magic not in KINDS:
            known = " and ".join(str(number) for number in KINDS)
            raise ValueError(
                f"{path}: magic number {self.magic} is not that of a shard ({known} are); give a file of token ids"
            )
        expected, dtype = KINDS[self.magic]
        if self.version != expected:
            raise ValueError(
                f"{path}: version {self.version} of the format; only {expected} is known for magic {self.magic}"
            )
        stated = HEADER_BYTES + count * dtype.itemsize
        if count < 0 or stated != size:
            raise ValueError(
                f"{path}: the header says {count:,} tokens, a file of {stated:,} bytes, but it has {size:,}; download "
                "it again"
            )
        self.count, self.dtype = count, dtype

    def __len__(self) -> int:
        return self.count

    @cached_property
    def tokens(self) -> np.ndarray:
        """All ids, memory-mapped: uint16 or uint32 [N]."""
        if not self.count:  # numpy maps no empty files
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", HEADER_BYTES, (self.count,))

    def read(self, start: int, count: int, vocabulary: int) -> np.ndarray:
        """Tokens start … start + count - 1 as int64, each checked to be below `vocabulary`."""
        count = max(0, min(count, self.count - start))
        ids = np.fromfile(self.path, self.dtype, count, offset=HEADER_BYTES + start * self.dtype.itemsize)
        if len(ids) < count:
            raise ValueError(
                f"{self.path}: it has been shortened since it was opened; do not change shards during a run"
            )
        self._check(ids, start, vocabulary)
        return ids.astype(np.int64)

    def check(self, vocabulary: int) -> None:
        """Reads the whole file; ValueError where an id is not below `vocabulary`."""
        self._check(self.tokens, 0, vocabulary)

    def _check(self, ids: np.ndarray, start: int, vocabulary: int) -> None:
        if len(ids) and ids.max() >= vocabulary:
            at = int((ids >= vocabulary).argmax())
            raise ValueError(
                f"{self.path}: token {start + at:,} is {int(ids[at]):,}, outside the vocabulary of {vocabulary:,}; "
                "the shard was made with another tokenizer"
            )

    def fingerprint(self) -> bytes:
        """A hash of the header and of `SAMPLES` stretches spread evenly over the file, its end among them: of all of a
        small file. It tells other contents, not one changed token among 100 million."""
        size, digest = HEADER_BYTES + self.count * self.dtype.itemsize, hashlib.blake2b(digest_size=16)
        with self.path.open("rb") as file:
            if size <= HEADER_BYTES + SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(HEADER_BYTES))
                for sample in range(SAMPLES):
                    file.seek(HEADER_BYTES + (size - HEADER_BYTES - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.digest()


def write_shard(path: Path | str, ids: ArrayLike, vocabulary: int) -> None:
    """Writes a whole shard or none: uint16 where every id of the vocabulary fits, else uint32."""
    write_pieces(path, [ids], vocabulary)


def write_pieces(path: Path | str, pieces: Iterable[ArrayLike], vocabulary: int) -> int:
    """The same for ids that come piece by piece and are never together in memory. Returns their number."""
    magic = 20240520 if vocabulary <= 1 << 16 else 20240801
    (version, dtype), count = KINDS[magic], 0
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for piece in pieces:
            ids = np.asarray(piece)
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
                raise ValueError(
                    f"{path}: token ids from {ids.min()} to {ids.max()} for a vocabulary of {vocabulary:,}"
                )
            file.write(ids.astype(dtype).tobytes())
            count += len(ids)
            if count > MOST_TOKENS:
                raise ValueError(
                    f"{path}: more than {MOST_TOKENS:,} tokens, which a header can't say; split it into shards"
                )
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, version, count
        file.seek(0)
        file.write(header.tobytes())
    return count


def windows_of(tokens: int, length: int) -> int:
    """How many rows of `length` + 1 tokens that overlap by one a shard has."""
    return max(0, tokens - 1) // length


class Windows:
    """All shards as rows of `length` + 1 tokens that overlap by one, in an order of its own for each epoch.

    Row i of the endless sequence is a pure function of seed and i: every row comes once an epoch, so a run's cursor is
    a number, and processes that take different numbers never see the same row. A shard's last tokens, too few for a
    row, are left out: the next file need not be the next part of the text.
    """

    def __init__(self, paths: list[Path], length: int, vocabulary: int, seed: int, shuffle: bool = True):
        self.shards = [Shard(path) for path in paths]
        self.length, self.vocabulary, self.seed, self.shuffle = length, vocabulary, seed, shuffle
        self.rows = [windows_of(len(shard), length) for shard in self.shards]
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
