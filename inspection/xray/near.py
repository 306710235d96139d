"""Near-duplicates: minhash signatures (Broder 1997) put rows that may be alike into one bucket, and each such pair's
Jaccard similarity is then computed exactly, on the sets of word 3-grams themselves.

Signatures are rensa's, of SLOTS values in BANDS bands: a pair at similarity 0.7 shares a bucket with probability
0.9998, at 0.8 with 1 - 5e-8. Buckets and sets lie in files, so that memory does not grow with the rows.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from rensa import RMinHash

from inspection.xray.shingles import grams, mixed, words

WORDS, SLOTS, BANDS = 3, 128, 32
CROWD = 40  # rows of one bucket that are compared each with each; beyond, with the first and with their neighbour
PAIRS, SHINGLES = 4_000_000, 1_000_000  # in memory at once
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
        slots = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint64, len(kept) * SLOTS)
        slots = slots.reshape(len(kept), BANDS, SLOTS // BANDS)
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
        sets = np.asarray(np.memmap(self._sets, np.uint64, "r"))
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        kept = np.flatnonzero(~np.isin(rows, left_out))
        best: dict[int, tuple[float, int]] = {}
        for later, earlier in in_chunks(self._candidates(kept, sizes), sizes):
            similarity = jaccard(sets, offsets, later, earlier)
            for place in np.flatnonzero(similarity >= self.threshold):
                found = (float(similarity[place]), -int(earlier[place]))
                best[int(later[place])] = max(best.get(int(later[place]), (0.0, 0)), found)
        for later, (similarity, earlier) in sorted(best.items()):
            yield int(rows[later]), int(rows[-earlier]), similarity

    def _candidates(self, kept: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """int64 [pairs, 2]: places (later, earlier) of rows that share a bucket and are not too different in size."""
        found, waiting = np.empty(0, np.int64), []
        for band in range(BANDS):
            pairs = kept[bucket_pairs(self._band(band)[kept])]
            low, high = np.sort(sizes[pairs], axis=1).T
            pairs = pairs[low >= self.threshold * high]
            waiting.append(pairs[:, 0] * len(sizes) + pairs[:, 1])
            if band == BANDS - 1 or sum(map(len, waiting)) > PAIRS:
                found, waiting = np.unique(np.concatenate((found, *waiting))), []
        return np.stack(np.divmod(found, len(sizes)), 1)

    def _band(self, band: int) -> np.ndarray:
        """uint64 [rows]: the keys of one band."""
        parts, before = [np.empty(0, np.uint64)], 0
        for rows in map(len, self.rows):
            offset = 8 * (before * BANDS + band * rows)
            parts.append(np.fromfile(self._keys, np.uint64, rows, offset=offset))
            before += rows
        return np.concatenate(parts)


def bucket_pairs(keys: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: (later, earlier) places of equal keys."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    starts, sizes = edges[::2], edges[1::2] + 1 - edges[::2]
    found = [np.empty((0, 2), np.int64)]
    for size in np.unique(sizes[sizes <= CROWD]):
        members = order[starts[sizes == size, None] + np.arange(size)]
        later, earlier = np.tril_indices(size, -1)
        found.append(np.stack((members[:, later].ravel(), members[:, earlier].ravel()), 1))
    for start, size in zip(starts[sizes > CROWD], sizes[sizes > CROWD], strict=True):
        members = order[start : start + size]
        first = np.full(size - 1, members[0])
        found += [np.stack((members[1:], first), 1), np.stack((members[2:], members[1:-1]), 1)]
    return np.concatenate(found)


def in_chunks(pairs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """[2, some pairs] whose sets have about SHINGLES members together."""
    ends, start = np.cumsum(sizes[pairs].sum(1)), 0
    while start < len(pairs):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + SHINGLES)))
        stop = min(stop, start + (1 << 16))  # a pair's number stands above SET_BITS
        yield pairs[start:stop].T
        start = stop


def jaccard(sets: np.ndarray, offsets: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [pairs] of the sets `sets[offsets[i] : offsets[i + 1]]`, whose members are below 2^48."""
    both = np.stack((ones, others), 1).ravel()
    sizes = offsets[both + 1] - offsets[both]
    members = np.repeat(offsets[both] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    pair = np.repeat(np.arange(len(both), dtype=np.uint64) // np.uint64(2), sizes)
    members = np.sort((pair << SET_BITS) | sets[members])
    shared = members[1:][members[1:] == members[:-1]] >> SET_BITS
    shared = np.bincount(shared.astype(np.int64), minlength=len(ones))
    return shared / (sizes[::2] + sizes[1::2] - shared)
