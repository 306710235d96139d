"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then one draw.

`sample` is a pure function of logits, parameters, history and generator, so the same seed gives the same text alone, in
a batch, with or without a cache. The order of the filters is that of transformers: penalties, temperature, top-k
(https://arxiv.org/abs/1805.04833), top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).

All of it runs on the CPU, in NumPy, which is the faster library for one row of logits, and nothing sorts the
vocabulary: top-k is a partition, and top-p sorts only the few tokens around its edge (`edge_of`).
"""

import math
import threading
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.params import SamplingParams

FEW = 2048  # probabilities that are sorted as they are
TRIES = 4  # draws from all tokens, of which the dropped ones do not count
STRIDE = 32  # every so many probabilities are looked at to guess where top-p ends
MARGIN = 4.0  # standard deviations of that guess
BLOCK = 512  # values that are summed in float32; the sums are added in float64


class NotFinite(ValueError):
    """Logits that are NaN or infinite."""


class Said:
    """The ids of a prompt and of the reply so far, as the penalties look at them: each once, whatever the length."""

    def __init__(self, prompt: Iterable[int] = (), reply: Iterable[int] = ()):
        self._place: dict[int, int] = {}  # in the two arrays
        self.ids, self.times = array("q"), array("q")  # times: in the reply
        for token in prompt:
            self._count(token, 0)
        for token in reply:
            self.add(token)

    def add(self, token: int) -> None:
        """The reply's next token."""
        self._count(token, 1)

    def _count(self, token: int, times: int) -> None:
        place = self._place.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.times.append(times)
        else:
            self.times[place] += times


def is_penalized(params: SamplingParams) -> bool:
    """Whether what was said before changes the next token's logits."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalized(logits: np.ndarray, params: SamplingParams, said: Said) -> np.ndarray:
    """Logits [V] with what was said before made less likely; the input is not changed."""
    return penalize(logits.copy(), params, said)


def penalize(logits: np.ndarray, params: SamplingParams, said: Said) -> np.ndarray:
    """The same in place."""
    if not said.ids or not is_penalized(params):
        return logits
    ids, times = np.frombuffer(said.ids, np.int64), np.frombuffer(said.times, np.int64)
    scores = logits[ids]
    if params.repetition_penalty != 1.0:
        factor = np.float32(params.repetition_penalty)
        scores = np.maximum(scores, 0) / factor + np.minimum(scores, 0) * factor
    scores -= np.float32(params.presence_penalty) * (times > 0)
    scores -= np.float32(params.frequency_penalty) * times.astype(np.float32)
    logits[ids] = scores
    return logits


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """logits / temperature, float32 [V], in place where possible. Where that overflows, the largest is 0.

    Raises NotFinite for logits that are not finite.
    """
    largest = logits.max()
    if not np.isfinite(largest):
        raise NotFinite("the model's logits are not finite; float16 overflows on some models: try --dtype float32")
    with np.errstate(over="ignore", under="ignore"):
        divisor = np.float32(temperature)
        if divisor > 0 and np.isfinite(largest / divisor):
            return logits if divisor == 1 else np.divide(logits, divisor, out=logits)
        return ((logits.astype(np.float64) - largest) / temperature).astype(np.float32)


def block_sums(values: np.ndarray) -> np.ndarray:
    """Sums of BLOCK values each, float32 [n] → float32 [n / BLOCK, rounded up]."""
    return np.add.reduceat(values, np.arange(0, len(values), BLOCK))


def total(values: np.ndarray) -> float:
    return float(block_sums(values).sum(dtype=np.float64)) if len(values) else 0.0


class Edge(NamedTuple):
    """What top-p or min-p drops: all weights below `least`, and of those equal to it the lower ids."""

    least: np.float32
    dropped: int  # in all

    def keeps(self, weights: np.ndarray, index: int) -> bool:
        if weights[index] != self.least:
            return bool(weights[index] > self.least)
        return np.count_nonzero(weights[:index] == self.least) >= self._equal(weights)

    def apply(self, weights: np.ndarray) -> None:
        """Sets what is dropped to 0."""
        equal = self._equal(weights)
        weights *= weights >= self.least
        if equal:
            weights[np.flatnonzero(weights == self.least)[:equal]] = 0

    def _equal(self, weights: np.ndarray) -> int:
        """How many are dropped that are equal to the least."""
        return self.dropped - np.count_nonzero(weights < self.least)


def edge_of(weights: np.ndarray, sums: np.ndarray, top_p: float, ranked: np.ndarray) -> Edge:
    """Where top-p ends among weights proportional to the probabilities, float32 [n]; `sums` are their block sums.

    Walking up from the least likely token, those are dropped whose running sum is at most 1 - top_p of the whole. Only
    the tokens around that edge are sorted, those between two ranks that a sample of the weights suggests. If the edge
    proves to be elsewhere, all on that side are. `ranked` [n or more] is overwritten.
    """
    count, ranked = len(weights), ranked[: len(weights)]
    most = (1 - top_p) * float(sums.sum(dtype=np.float64))
    low, high = edge_ranks(weights, most) if count > FEW else (0, count)
    ranked[:] = weights
    if high < count:
        ranked.partition(high)
    if low:
        ranked[:high].partition(low)
    below = total(ranked[:low])
    if below > most:
        low, high, below = 0, low, 0.0
    elif high < count and below + total(ranked[low:high]) <= most:
        high = count
    near = ranked[low:high]
    near.sort()
    dropped = int(np.searchsorted(below + near.cumsum(dtype=np.float64), most, side="right"))
    dropped = min(dropped, len(near) - 1)  # at least one is kept
    return Edge(near[dropped], low + dropped)


def edge_ranks(weights: np.ndarray, most: float) -> tuple[int, int]:
    """Two ranks, counted from the smallest, between which the running sum of the weights probably reaches `most`."""
    sample = np.sort(weights[::STRIDE])
    running = sample.cumsum(dtype=np.float64) * STRIDE
    place = int(np.searchsorted(running, most, side="right"))
    below = sample[: place + 1]
    error = MARGIN * math.sqrt(np.dot(below, below)) / max(float(running[min(place, len(sample) - 1)]) / STRIDE, 1e-30)
    low, high = np.searchsorted(running, (most * (1 - min(error, 0.9)), most * (1 + error)), side="right")
    last = (int(high) + 2) * STRIDE
    return max(int(low) - 2, 0) * STRIDE, last if last < len(weights) - 2 * FEW else len(weights)


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """What one draw chooses from: float32 logits [V] → ids [n] in ascending order, or None for all; weights [n].

    Weights are 0 where a filter dropped a token, else proportional to the probabilities. Greedy is the one likeliest
    token with weight 1. Raises NotFinite for logits that are not finite.
    """
    scratch = Scratch(len(logits))
    scratch.row[:] = logits
    ids, weights, _, edge = filtered(scratch, params)
    if edge is not None:
        edge.apply(weights)
    return ids, weights


class Scratch:
    """Memory for the passes over a row of logits, kept between tokens: float32 [V] each."""

    def __init__(self, size: int):
        self.row, self.ranked = np.empty(size, np.float32), np.empty(size, np.float32)


_of_thread = threading.local()


def scratch_with(logits: Tensor) -> Scratch:
    """This thread's, with these logits [V] as its row."""
    scratch = getattr(_of_thread, "scratch", None)
    if scratch is None or len(scratch.row) != len(logits):
        scratch = _of_thread.scratch = Scratch(len(logits))
    torch.from_numpy(scratch.row).copy_(logits.detach())
    return scratch


def filtered(scratch: Scratch, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, Edge | None]:
    """-> ids and weights of `distribution`, their block sums, and what is dropped of them. Overwrites the logits."""
    scores, ids, edge = scratch.row, None, None
    if params.temperature == 0:
        best = scores.argmax()
        scaled(scores[best : best + 1], 1.0)  # is it finite?
        return best[None], np.ones(1, np.float32), np.ones(1, np.float32), None
    scores = scaled(scores, params.temperature)
    if 0 < params.top_k < len(scores):
        smallest = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scores >= smallest)
        scores = scores[ids]
    scores -= scores.max()
    if params.min_p > 0 and params.top_p == 1:  # then nothing else needs the exponentials of unlikely tokens
        likely = scores >= math.log(params.min_p) - 1e-3
        if np.count_nonzero(likely) <= FEW:
            likely = np.flatnonzero(likely)
            scores, ids = scores[likely], likely if ids is None else ids[likely]
    weights = np.exp(scores, out=scores)
    sums = block_sums(weights)
    if params.top_p < 1:
        edge = edge_of(weights, sums, params.top_p, scratch.ranked)
    least = np.float32(params.min_p)  # for the likeliest has weight 1
    if params.min_p > 0 and (edge is None or least > edge.least):
        edge = Edge(least, np.count_nonzero(weights < least))
    return ids, weights, sums, edge


def draw(weights: np.ndarray, sums: np.ndarray, generator: torch.Generator) -> int:
    """An index with a chance proportional to its weight, float32 [n]: one uniform number compared with the running sum.

    Since the running sum goes in the order of the ids, a last-bit difference in the logits (another device, a batch)
    almost never changes the token. `sums` (block_sums) come first, then the weights inside one block.
    """
    ends = sums.cumsum(dtype=np.float64)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * ends[-1]
    block = int(np.searchsorted(ends, drawn, side="right"))
    if block < len(ends):
        inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
        index = int(np.searchsorted(inside + (ends[block - 1] if block else 0.0), drawn, side="right"))
        if index < len(inside):
            return block * BLOCK + index
    return int(np.flatnonzero(weights[: (block + 1) * BLOCK])[-1])  # rounding put the number at the very end


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator, said: Said | None = None) -> int:
    """One token id from logits [V]; `said`: what came before, for the penalties."""
    scratch = scratch_with(logits)
    if said is not None:
        penalize(scratch.row, params, said)
    ids, weights, sums, edge = filtered(scratch, params)
    # To draw again is quicker than to drop what is unlikely, while most of the weight is kept.
    for _ in range(TRIES if edge is not None and len(weights) > FEW else 0):
        index = draw(weights, sums, generator)
        if edge.keeps(weights, index):
            break
    else:
        if edge is not None:
            edge.apply(weights)
            sums = block_sums(weights)
        index = 0 if len(weights) == 1 else draw(weights, sums, generator)
    return index if ids is None else int(ids[index])


def top_logprobs(logits: Tensor, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """-> (natural log probability of a token, the `most` likeliest ones with theirs, falling), from logits [V]."""
    scratch = scratch_with(logits)
    scores, largest = scratch.row, scratch.row.max()
    exponentials = np.subtract(scores, largest, out=scratch.ranked)
    normaliser = float(largest) + math.log(total(np.exp(exponentials, out=exponentials)))
    most = min(most, len(scores))
    ids = np.flatnonzero(scores >= np.partition(scores, -most)[-most]) if most else np.empty(0, np.int64)
    ids = ids[np.argsort(-scores[ids], kind="stable")][:most]
    likeliest = [(int(index), float(scores[index]) - normaliser) for index in ids]
    return float(scores[token]) - normaliser, likeliest
