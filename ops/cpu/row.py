"""Passes over a row of logits, from which a token is drawn.

Each is written down in NumPy, and ops/cpu/row.cpp does the same to the bit in a tenth of the time. That is used where
the C++ library is loaded already: nothing is compiled for the sake of these. The order of each sum is part of what it
is: in a block 16 running sums, whose halves are added to each other, then quarters, and so on.
"""

import ctypes
from array import array
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ops.cpu.library import Chosen, Logits

BLOCK = 512  # numbers
SUMS = 16  # running sums of a block
ROUND = np.float32(12582912)  # 1.5 · 2^23: what is added to it is rounded to a whole number
FACTORIALS = (720, 120, 24, 6, 2, 1, 1)
BITS = {torch.bfloat16: 16, torch.float32: 32}
LOWEST = np.float32(-104)  # exp of less is 0 in float32


def compiled() -> ctypes.CDLL | None:
    """The C++ library, where something else has already asked for it."""
    return Chosen.library


class Penalties(NamedTuple):
    """What is taken off the logits of tokens that were said; inference/params.py explains the three numbers."""

    ids: array  # int32, each once, ascending
    times: array  # int32, how often in the reply
    repetition: float
    presence: float
    frequency: float


def penalize(logits: np.ndarray, penalties: Penalties) -> None:
    """Float32 logits [V], in place."""
    ids, times = np.frombuffer(penalties.ids, np.int32), np.frombuffer(penalties.times, np.int32)
    scores, factor = logits[ids], np.float32(penalties.repetition)
    scores = np.maximum(scores, 0) / factor + np.minimum(scores, 0) * factor
    scores -= np.float32(penalties.presence) * (times > 0)
    scores -= np.float32(penalties.frequency) * times.astype(np.float32)
    logits[ids] = scores


class Row:
    """A row of logits, at most `capacity` of them, that become weights; the memory is kept for the next row.

    size    logits, or those that are left of them
    all     float32 in whole blocks: the weights, or a copy of the logits; 0 or -inf behind them
    sums    of the weights of each block
    """

    def __init__(self, capacity: int):
        blocks = -(-capacity // BLOCK)
        self._memory, self._ids = np.empty(blocks * BLOCK, np.float32), np.empty(capacity, np.int64)
        self._of_blocks = np.empty((3, blocks), np.float32)
        self._places = [array.ctypes.data for array in (self._memory, self._ids, *self._of_blocks)]
        self.capacity, self._logits = capacity, Logits()
        self._resize(capacity)

    def take(self, logits: Tensor, penalties: Penalties | None = None) -> None:
        """The next row: a tensor [size] of any dtype and device. float32 and bfloat16 are read where they are, and
        the penalties made in each pass, so that nothing is copied for a few tokens."""
        (size,) = logits.shape  # a Tensor's `len` takes 30 µs between two tokens, where its code is in no cache
        if self.size != size:
            self._resize(size)
        bits = BITS.get(logits.dtype)
        if compiled() and bits and logits.is_cpu and logits.is_contiguous():
            self._given = logits, penalties
            self._read(logits.data_ptr(), bits, penalties)
            return
        logits = logits.detach()
        if bits == 16 and logits.is_cpu:  # the upper half of a float32; copy_ would wake a thread
            wide = self.numbers.view(np.uint32)
            wide[:] = logits.view(torch.int16).numpy().view(np.uint16)
            np.left_shift(wide, 16, out=wide)
        else:
            torch.from_numpy(self.numbers).copy_(logits)
        if penalties is not None:
            penalize(self.numbers, penalties)
        self._own()

    def _read(self, place: int, bits: int, penalties: Penalties | None = None) -> None:
        """What the passes read."""
        of = self._logits
        of.x, of.bits, of.size, of.count = place, bits, self.size, 0
        if penalties is not None:
            (of.ids, of.count), (of.times, _) = penalties.ids.buffer_info(), penalties.times.buffer_info()
            of.repetition, of.presence, of.frequency = penalties[2:]

    def _resize(self, size: int) -> None:
        self.size, self.blocks = size, -(-size // BLOCK)
        self.all = self._memory[: self.blocks * BLOCK]
        self.numbers = self._memory[:size]
        self.tops, self.sums, self._parts = self._of_blocks[:, : self.blocks]

    def _own(self) -> None:
        """What is in `numbers` are now the logits."""
        self.all[self.size :] = -np.inf
        self._given = None
        self._read(self._places[0], 32)

    def copy(self) -> np.ndarray:
        """The logits, less the penalties, as float32 [size], which may be changed."""
        if self._given is not None:
            compiled().row_copy(self._logits, self._places[0])
            self._own()
        return self.numbers

    def largest(self) -> tuple[int, float]:
        """The first index of the largest logit, or one of NaN, and that logit. Fills `tops`, those of each block."""
        if loaded := compiled():
            index = loaded.row_largest(self._logits, self._places[2])
        else:
            np.max(self.all.reshape(-1, BLOCK), axis=1, out=self.tops)
            block = int(self.tops.argmax())
            index = block * BLOCK + int(self.all[block * BLOCK : (block + 1) * BLOCK].argmax())
        return index, float(self.tops[index // BLOCK])

    def narrow(self, count: int) -> np.ndarray:
        """Leaves the `count` largest logits, and those that equal the last → their ascending ids. After `largest`."""
        memory, ids, tops, *_ = self._places
        loaded = compiled()
        if loaded and count <= self.blocks:
            left = loaded.row_best(self._logits, tops, count, ids, memory)
            self._resize(left)
            self._own()
            return self._ids[:left].copy()
        logits = self.copy()
        return self.keep(np.flatnonzero(logits >= np.partition(logits, -count)[-count]))

    def keep(self, ids: np.ndarray) -> np.ndarray:
        """Leaves these alone, ascending, of the copied logits or of the weights."""
        some = self.numbers[ids]
        self._resize(len(ids))
        self.numbers[:] = some
        self._own()
        return ids

    def weigh(self, factor: np.float32, largest: np.float32) -> None:
        """Logits, of which `largest` is the largest, become exp((logit - largest) · factor). Fills `sums`."""
        memory, _, _, sums, _ = self._places
        if loaded := compiled():
            loaded.row_weigh(self._logits, factor, factor * largest, memory, sums)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                self.all[:] = exponentials(self.all * factor - factor * largest)
            self.sums[:] = block_sums(self.all)

    def weigh_likely(self, factor: np.float32, largest: np.float32, least: np.float32, most: int) -> np.ndarray | None:
        """As `weigh`, of the tokens alone whose weight is at least this → their ascending ids; no `sums`.

        None, and nothing is done, where they are more than `most`.
        """
        if loaded := compiled():
            memory, ids, *_ = self._places
            left = loaded.row_likely(self._logits, factor, factor * largest, least, most, ids, memory)
            if left < 0:
                return None
            found = self._ids[:left]
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                weights = exponentials(self.numbers * factor - factor * largest)
            found = np.flatnonzero(weights >= least)
            if len(found) > most:
                return None
            self.numbers[: len(found)] = weights[found]
        self._resize(len(found))
        self._own()
        return found

    def draw(self, share: float) -> int:
        """The index of the first weight up to which their running sum is larger than this share of the whole, from 0
        to 1. The sums of blocks come first, then the weights inside one block."""
        memory, _, _, sums, _ = self._places
        if loaded := compiled():
            return loaded.row_draw(memory, sums, self.blocks, share)
        ends = self.sums.cumsum(dtype=np.float64)
        drawn = share * ends[-1]
        block = int(np.searchsorted(ends, drawn, side="right"))
        if block < len(ends):
            inside = self.all[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
            index = int(np.searchsorted(inside + (ends[block - 1] if block else 0.0), drawn, side="right"))
            if index < len(inside):
                return block * BLOCK + index
        return int(np.flatnonzero(self.all[: (block + 1) * BLOCK])[-1])  # rounding put the number at the very end

    def below(self, weight: np.float32, index: int) -> float:
        """The sum of the weights that are smaller than this one, and of the equal ones up to an index."""
        memory, *_, parts = self._places
        if loaded := compiled():
            equal = loaded.row_below(memory, self.blocks, weight, index, parts)
        else:
            self._parts[:] = block_sums(np.where(self.all < weight, self.all, np.float32(0)))
            equal = np.count_nonzero(self.all[: index + 1] == weight)
        return float(self._parts.sum(dtype=np.float64)) + float(weight) * equal

    def cut(self, weight: np.float32, index: int) -> None:
        """The weights that `below` adds up become 0. Fills `sums`."""
        memory, _, _, sums, _ = self._places
        if loaded := compiled():
            loaded.row_cut(memory, self.blocks, weight, index, sums)
        else:
            before = self.all[: index + 1]
            before[before == weight] = 0
            self.all[self.all < weight] = 0
            self.sums[:] = block_sums(self.all)

    def drop(self, top_p: float, min_p: float) -> None:
        """The weights that top-p and min-p drop become 0, where the largest is 1. Fills `sums`.

        Walking up from the least likely, of equal ones from the lower id, top-p drops those whose running sum is at
        most 1 - top_p of the whole, but never the last one.
        """
        memory, *_ = self._places
        if loaded := compiled():
            loaded.row_drop(memory, self.size, 1 - top_p, min_p)
        else:
            weights, least = self.numbers, np.float32(min_p)
            ranked = np.sort(weights)
            running = ranked.cumsum(dtype=np.float64)
            dropped = int(np.searchsorted(running, (1 - top_p) * running[-1], side="right"))
            dropped = min(dropped, len(ranked) - 1)
            edge = ranked[dropped]
            if top_p < 1 and edge >= least:
                equal = np.flatnonzero(weights == edge)
                weights[equal[: dropped - np.count_nonzero(weights < edge)]] = 0
                least = edge
            weights *= weights >= least
        self.add_up()

    def add_up(self) -> None:
        """Fills `sums`, after weights were set to 0."""
        self.cut(np.float32(0), -1)

    def total(self) -> float:
        """Of the weights."""
        return float(self.sums.sum(dtype=np.float64))


def exponentials(x: np.ndarray) -> np.ndarray:
    """exp of float32 numbers that are at most 0: 2^n · exp(r) with |r| <= ln(2) / 2, right to a bit or two."""
    one, y = np.float32(1), np.maximum(x, LOWEST)
    rounded = y * np.float32(1.44269504) + ROUND
    n = rounded - ROUND
    r = y - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    p = np.full_like(x, one / np.float32(5040))
    for factorial in FACTORIALS:
        p = p * r + one / np.float32(factorial)
    whole = n.astype(np.int32)
    first = np.maximum(whole, -126)  # below it are no normal numbers
    for power in (first, whole - first):
        p *= ((power + 127) << 23).view(np.float32)
    p[~(x > LOWEST)] = 0
    return p


def block_sums(values: np.ndarray) -> np.ndarray:
    """Sums of BLOCK values each: float32 [blocks · BLOCK] → float32 [blocks]."""
    sums = np.zeros((len(values) // BLOCK, SUMS), np.float32)
    for some in values.reshape(len(sums), BLOCK // SUMS, SUMS).swapaxes(0, 1):
        sums += some
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
