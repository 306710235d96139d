"""Leakage between two sets: the runs of words that a row has in common with a row of the other set.

Eight words in a row are found (NGRAM, as in GPT-2's and PaLM's reports), and a match is shown as the whole run. What
more than COMMON rows of the other set have is taken for a form that its rows share, not for leakage. A shorter row
of the other set counts where all of its words are a row's.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from inspection.xray.shingles import Grams, Words, grams, words

NGRAM, COMMON, SHORTEST = 8, 10, 3
MOST_WORDS = 100_000_000
SHOWN = 1000  # characters of a run


class Leak(NamedTuple):
    row: int
    other_row: int
    ngram: str


class Leakage:
    """`add_other` takes the rows of the other set, `search` those of this one."""

    def __init__(self, n: int = NGRAM):
        self.n, self._hashes, self._rows, self._words = n, [], [], 0

    def add_other(self, rows: np.ndarray, texts: pa.Array) -> None:
        found = words(texts)
        self._words += len(found.hashes)
        if self._words > MOST_WORDS:
            raise ValueError(f"--against has more than {MOST_WORDS:,} words; give the smaller set there")
        made = self._grams(found)
        self._hashes.append(made.hashes)
        self._rows.append(np.repeat(rows, np.diff(made.offsets)))

    def _grams(self, found: Words) -> Grams:
        made = grams(found, self.n)
        short = np.diff(found.offsets) < SHORTEST
        kept = ~np.repeat(short, np.diff(made.offsets))
        sizes = np.where(short, 0, np.diff(made.offsets))
        return Grams(made.hashes[kept], made.words[kept], np.concatenate(([0], np.cumsum(sizes))))

    def close(self) -> None:
        """All of the other set is there."""
        hashes = np.concatenate([*self._hashes, np.empty(0, np.uint64)])
        rows = np.concatenate([*self._rows, np.empty(0, np.int64)])
        order = np.lexsort((rows, hashes))
        hashes, rows = hashes[order], rows[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        hashes, rows = hashes[new], rows[new]
        _, count = np.unique(hashes, return_counts=True)
        kept = np.repeat(count <= COMMON, count)
        self._sorted, self._owners = hashes[kept], rows[kept]
        self._hashes, self._rows = [], []

    def search(self, rows: np.ndarray, texts: pa.Array) -> list[Leak]:
        """The leaks of a batch, for each pair of rows the longest run."""
        found = words(texts)
        made = self._grams(found)
        at = np.searchsorted(self._sorted, made.hashes)
        inside = at < len(self._sorted)
        hit = np.zeros(len(at), bool)
        hit[inside] = self._sorted[at[inside]] == made.hashes[inside]
        owner = np.repeat(np.arange(len(rows)), np.diff(made.offsets))
        runs: dict[tuple[int, int], list[int]] = {}  # (place, other row) -> first and last word of the run in sight
        longest: dict[tuple[int, int], tuple[int, int]] = {}
        for place in np.flatnonzero(hit):
            start = int(made.words[place])
            stop = min(start + self.n, int(found.offsets[owner[place] + 1]))
            entry = int(at[place])
            while entry < len(self._sorted) and self._sorted[entry] == made.hashes[place]:
                key = (int(owner[place]), int(self._owners[entry]))
                run = runs.get(key)
                run = [run[0], stop] if run and start < run[1] else [start, stop]
                runs[key] = run
                old = longest.get(key, (0, 0))
                if run[1] - run[0] > old[1] - old[0]:
                    longest[key] = (run[0], run[1])
                entry += 1
        return [
            Leak(int(rows[place]), other, _cut(texts[place].as_py(), found, start, stop))
            for (place, other), (start, stop) in sorted(longest.items())
        ]


def _cut(text: str, found: Words, start: int, stop: int) -> str:
    """The run as the row has it. Places count in the lower-cased text, which for a few letters is longer."""
    lowered = text.lower().encode()
    source = text.encode() if len(text.encode()) == len(lowered) else lowered
    return source[found.starts[start] : found.ends[stop - 1]].decode("utf-8", "replace")[:SHOWN]
