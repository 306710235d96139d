"""Near-duplicates: minhash signatures (Broder 1997) put rows that may be alike into one bucket, and each such pair's
Jaccard similarity is then computed exactly, on the sets of word 3-grams themselves.

Signatures are rensa's, of SLOTS values in BANDS bands: a pair at similarity 0.7 shares a bucket with probability
0.9998, at 0.8 with 1 - 5e-8. Buckets and sets lie in files, so that memory does not grow with the rows.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from rensa import RMinHash

from inspection.xray.shingles import grams, mixed, words

WORDS, SLOTS, BANDS = 3, 128, 32
CROWD = 40  # rows of one bucket that are compared each with each; beyond, with the first and with their neighbour
SET_BITS = np.uint64(48)
SHORTEST = 5  # words: of shorter texts only equal ones are duplicates


class NearDuplicates:
    """`add` takes rows in their order; `pairs` then gives those that are alike."""

    def __init__(self, folder: Path, threshold: float, limit: int):
        """`limit`: rows that are looked at, the first ones."""
        self.threshold, self.limit = threshold, limit
        self.rows: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []
        self.count = 0
        self._keys, self._sets = (folder / name for name in ("keys", "sets"))
        self._key_file, self._set_file = self._keys.open("wb"), self._sets.open("wb")

    def add(self, rows: np.ndarray, texts: pa.Array) -> None:
        room = self.limit - self.count
        rows, texts = rows[:room], texts[:room]
        if not len(rows):
            return
        found = words(texts)
        self.count += len(rows)
        made = grams(found, WORDS)
        long_enough = np.diff(found.offsets) >= SHORTEST
        # each row's set, sorted and without repetition: 48 bits of a hash below the row's place in the batch
        owner = np.repeat(np.arange(len(rows), dtype=np.uint64), np.diff(made.offsets))
        both = np.sort((owner << SET_BITS) | (made.hashes >> (np.uint64(64) - SET_BITS)))
        new = np.ones(len(both), bool)
        new[1:] = both[1:] != both[:-1]
        new &= long_enough[both >> SET_BITS]
        both = both[new]
        hashes = both & ((np.uint64(1) << SET_BITS) - np.uint64(1))
        sizes = np.bincount((both >> SET_BITS).astype(np.int64), minlength=len(rows))
        kept = np.flatnonzero(sizes)
        if not len(kept):
            return
        offsets = np.concatenate(([0], np.cumsum(sizes[kept]))).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, 42)
        slots = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(kept), BANDS, SLOTS // BANDS)
        keys = np.zeros((len(kept), BANDS), np.uint64)
        for place in range(SLOTS // BANDS):
            keys = mixed(keys * np.uint64(31) + slots[:, :, place])
        self._key_file.write(np.ascontiguousarray(keys.T).tobytes())  # a band after the other
        self._set_file.write(hashes.tobytes())
        self.rows.append(rows[kept])
        self.sizes.append(sizes[kept])

    def pairs(self, left_out: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(row, an earlier row, similarity), one for each row that has one: the most similar of the earlier ones.
        `left_out`: rows that are known to be duplicates."""
        self._key_file.close()
        self._set_file.close()
        if not self.rows:
            return
        rows, sizes = np.concatenate(self.rows), np.concatenate(self.sizes)
        sets = np.memmap(self._sets, np.uint64, "r")
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        kept = np.flatnonzero(~np.isin(rows, left_out))
        candidates = np.empty(0, np.int64)
        for band in range(BANDS):
            pairs = _bucket_pairs(self._band(band)[kept])
            candidates = np.unique(np.concatenate((candidates, kept[pairs[:, 0]] * len(rows) + kept[pairs[:, 1]])))
        best: dict[int, tuple[float, int]] = {}
        for pair in candidates.tolist():
            later, earlier = divmod(pair, len(rows))
            one, other = (sets[offsets[row] : offsets[row + 1]] for row in (later, earlier))
            if min(len(one), len(other)) < self.threshold * max(len(one), len(other)):
                continue
            shared = len(np.intersect1d(one, other, assume_unique=True))
            similarity = shared / (len(one) + len(other) - shared)
            if similarity >= self.threshold:
                best[later] = max(best.get(later, (0.0, 0)), (similarity, -earlier))
        for later, (similarity, earlier) in sorted(best.items()):
            yield int(rows[later]), int(rows[-earlier]), similarity

    def _band(self, band: int) -> np.ndarray:
        """uint64 [rows]: the keys of one band."""
        parts, before = [np.empty(0, np.uint64)], 0
        for rows in map(len, self.rows):
            offset = 8 * (before * BANDS + band * rows)
            parts.append(np.fromfile(self._keys, np.uint64, rows, offset=offset))
            before += rows
        return np.concatenate(parts)


def _bucket_pairs(keys: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: (later, earlier) places of equal keys."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2] + 1
    found = [np.empty((0, 2), np.int64)]
    two = starts[stops - starts == 2]
    found.append(np.stack((order[two + 1], order[two]), 1))
    for start, stop in zip(starts[stops - starts > 2], stops[stops - starts > 2], strict=True):
        members = order[start:stop]
        if len(members) <= CROWD:
            later, earlier = np.tril_indices(len(members), -1)
            found.append(np.stack((members[later], members[earlier]), 1))
        else:
            first = np.full(len(members) - 1, members[0])
            found += [np.stack((members[1:], first), 1), np.stack((members[2:], members[1:-1]), 1)]
    return np.concatenate(found)
