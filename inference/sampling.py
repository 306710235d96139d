"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then one draw.

`sample` is a pure function of logits, parameters, history and generator, so the same seed gives the same text alone, in
a batch, with or without a cache. The order of the filters is that of transformers: penalties, temperature, top-k
(https://arxiv.org/abs/1805.04833), top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).

All of it runs on the CPU, in NumPy, which is the faster library for one row of logits, and nothing sorts the
vocabulary: top-k is a partition, and of many tokens one is drawn before it is asked whether top-p keeps it.
"""

import math
import threading
from array import array
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from inference.params import SamplingParams

FEW = 2048  # probabilities that are sorted
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


def check_finite(largest: np.float32) -> None:
    """Raises NotFinite where the largest of some logits is not finite."""
    if not math.isfinite(largest):
        raise NotFinite("the model's logits are not finite; float16 overflows on some models: try --dtype float32")


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """logits / temperature, float32 [V], in place where possible. Where that overflows, the largest is 0.

    Raises NotFinite for logits that are not finite.
    """
    largest = logits.max()
    check_finite(largest)
    with np.errstate(over="ignore", under="ignore"):
        divisor = np.float32(temperature)
        if divisor > 0 and np.isfinite(largest / divisor):
            return logits if divisor == 1 else np.divide(logits, divisor, out=logits)
        return ((logits.astype(np.float64) - largest) / temperature).astype(np.float32)


def block_sums(values: np.ndarray) -> np.ndarray:
    """Sums of BLOCK values each, float32 [n] → float32 [n / BLOCK, rounded up]."""
    return np.add.reduceat(values, np.arange(0, len(values), BLOCK))


def total(values: np.ndarray) -> float:
    return float(block_sums(values).sum(dtype=np.float64))


def drop(weights: np.ndarray, params: SamplingParams) -> None:
    """Sets the weights [n] that top-p and min-p drop to 0; the largest has to be 1.

    Walking up from the least likely token, of equal ones from the lower id, top-p drops those whose running sum is at
    most 1 - top_p of the whole, but never the last one.
    """
    least = np.float32(params.min_p)
    if params.top_p < 1:
        ranked = np.sort(weights)
        running = ranked.cumsum(dtype=np.float64)
        dropped = int(np.searchsorted(running, (1 - params.top_p) * running[-1], side="right"))
        dropped = min(dropped, len(ranked) - 1)
        edge = ranked[dropped]
        if edge >= least:
            equal = np.flatnonzero(weights == edge)
            weights[equal[: dropped - np.count_nonzero(weights < edge)]] = 0
            least = edge
    weights *= weights >= least


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """What one draw chooses from: float32 logits [V] → ids [n] in ascending order, or None for all; weights [n].

    Weights are 0 where a filter dropped a token, else proportional to the probabilities. Greedy is the one likeliest
    token with weight 1. Raises NotFinite for logits that are not finite.
    """
    scratch = Scratch(len(logits))
    scratch.row[:] = logits
    ids, weights = candidates(scratch, params)
    drop(weights, params)
    return ids, weights


class Scratch:
    """Memory for the passes over a row of logits, kept between tokens: float32 [V] each."""

    def __init__(self, size: int):
        self.row, self.other = np.empty(size, np.float32), np.empty(size, np.float32)


_of_thread = threading.local()


def scratch_with(logits: Tensor) -> Scratch:
    """This thread's, with these logits [V] as its row."""
    scratch = getattr(_of_thread, "scratch", None)
    if scratch is None or len(scratch.row) != len(logits):
        scratch = _of_thread.scratch = Scratch(len(logits))
    if logits.dtype is torch.bfloat16 and logits.is_cpu:  # the upper half of a float32; copy_ would wake a thread
        wide = scratch.row.view(np.uint32)
        wide[:] = logits.detach().view(torch.int16).numpy().view(np.uint16)
        np.left_shift(wide, 16, out=wide)
    else:
        torch.from_numpy(scratch.row).copy_(logits.detach())
    return scratch


def candidates(scratch: Scratch, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The ids and weights of `distribution` before top-p and min-p, the largest being 1. Overwrites the logits."""
    scores, ids = scratch.row, None
    if params.temperature == 0:
        best = scores.argmax()  # the first NaN, if there is one
        check_finite(scores[best])
        return best[None], np.ones(1, np.float32)
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
    return ids, np.exp(scores, out=scores)


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


def draw_kept(weights: np.ndarray, params: SamplingParams, generator: torch.Generator, scratch: np.ndarray) -> int:
    """An index drawn as from the weights that `drop` leaves, without finding out which those are.

    Whether one token is kept is a sum over those that are less likely. One that is not is drawn again, without it and
    all that are less likely, as in FlashInfer's sampling (https://flashinfer.ai/2025/03/10/sampling.html). Overwrites
    the weights [n] and `scratch` [n].
    """
    sums = block_sums(weights)
    whole = left = float(sums.sum(dtype=np.float64))
    while True:
        index = draw(weights, sums, generator)
        weight = weights[index]
        kept = weight >= np.float32(params.min_p)
        if kept and params.top_p < 1:
            # The sum of the smaller weights, of the equal ones up to this id, and of those that are gone.
            equal = np.count_nonzero(weights[: index + 1] == weight) - np.count_nonzero(weights >= weight)
            smaller = total(np.minimum(weights, weight, out=scratch)) + float(weight) * equal
            kept = whole - left + smaller > (1 - params.top_p) * whole
        if kept:
            return index
        before = weights[: index + 1]
        before[before == weight] = 0
        weights *= weights >= weight
        sums = block_sums(weights)
        left = float(sums.sum(dtype=np.float64))
        if not left:  # at least one is kept, whatever the rounding
            return index


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator, said: Said | None = None) -> int:
    """One token id from logits [V]; `said`: what came before, for the penalties."""
    scratch = scratch_with(logits)
    if said is not None:
        penalize(scratch.row, params, said)
    ids, weights = candidates(scratch, params)
    if len(weights) == 1:
        index = 0
    elif len(weights) > FEW:
        index = draw_kept(weights, params, generator, scratch.other[: len(weights)])
    else:
        drop(weights, params)
        index = draw(weights, block_sums(weights), generator)
    return index if ids is None else int(ids[index])


def top_logprobs(logits: Tensor, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """-> (natural log probability of a token, the `most` likeliest ones with theirs, falling), from logits [V]."""
    scratch = scratch_with(logits)
    scores, largest = scratch.row, scratch.row.max()
    exponentials = np.subtract(scores, largest, out=scratch.other)
    normaliser = float(largest) + math.log(total(np.exp(exponentials, out=exponentials)))
    most = min(most, len(scores))
    ids = np.flatnonzero(scores >= np.partition(scores, -most)[-most]) if most else np.empty(0, np.int64)
    ids = ids[np.argsort(-scores[ids], kind="stable")][:most]
    likeliest = [(int(index), float(scores[index]) - normaliser) for index in ids]
    return float(scores[token]) - normaliser, likeliest
