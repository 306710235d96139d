"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then one draw.

`sample` is a pure function of logits, parameters, history and random numbers, so the same seed gives the same text
alone, in a batch, with or without a cache. The order of the filters is that of transformers: penalties, temperature,
top-k (https://arxiv.org/abs/1805.04833), top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).

All of it runs on the CPU, in passes over one row of logits (ops/cpu/row.py). Nothing sorts the vocabulary: top-k looks
where the largest logits are, and of many tokens one is drawn before it is asked whether top-p keeps it.
"""

import math
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from inference.params import SamplingParams, Uniforms
from ops.cpu.row import Penalties, Row

FEW = 2048  # probabilities that are sorted


class NotFinite(ValueError):
    """Logits that are NaN or infinite."""


class Said:
    """The ids of a prompt and of the reply so far, as the penalties look at them: each once, whatever the length."""

    def __init__(self, prompt: Iterable[int] = (), reply: Iterable[int] = ()):
        self.ids = array("i", sorted(set(prompt)))
        self.times = array("i", bytes(self.ids.itemsize * len(self.ids)))  # how often in the reply
        for token in reply:
            self.add(token)

    def add(self, token: int) -> None:
        """The reply's next token."""
        place = bisect_left(self.ids, token)
        if place == len(self.ids) or self.ids[place] != token:
            self.ids.insert(place, token)
            self.times.insert(place, 0)
        self.times[place] += 1


def is_penalized(params: SamplingParams) -> bool:
    """Whether what was said before changes the next token's logits."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalties(params: SamplingParams, said: Said | None) -> Penalties | None:
    """What these settings take off the logits of what was said; None where that is nothing."""
    if said is None or not said.ids or not is_penalized(params):
        return None
    return Penalties(said.ids, said.times, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)


def find_likeliest(row: Row) -> tuple[int, float]:
    """The first index of the largest logit, and that logit. Raises NotFinite where it is not finite."""
    index, largest = row.largest()
    if not math.isfinite(largest):
        raise NotFinite("the model's logits are not finite; float16 overflows on some models: try --dtype float32")
    return index, largest


def scale(row: Row, largest: float, temperature: float) -> tuple[np.float32, np.float32]:
    """What `Row.weigh` makes weights with, 1 for the largest logit: the factor, and that logit."""
    factor = 1 / temperature
    if not max(factor, factor * abs(largest)) < 3e38:  # float32 ends there
        numbers = row.copy()
        with np.errstate(over="ignore"):
            numbers[:] = (numbers.astype(np.float64) - largest) / temperature
        factor, largest = 1.0, 0.0
    return np.float32(factor), np.float32(largest)


def distribution(
    logits: np.ndarray, params: SamplingParams, said: Said | None = None
) -> tuple[np.ndarray | None, np.ndarray]:
    """What one draw chooses from: float32 logits [V] → ids [n] in ascending order, or None for all; weights [n].

    Weights are 0 where a filter dropped a token, else proportional to the probabilities. Greedy is the one likeliest
    token with weight 1. Raises NotFinite for logits that are not finite.
    """
    row = Row(len(logits))
    row.take(torch.from_numpy(logits), penalties(params, said))
    ids = candidates(row, params)
    row.drop(params.top_p, params.min_p)
    return ids, row.numbers


_of_thread = threading.local()


def row_of(logits: Tensor, taken_off: Penalties | None = None) -> Row:
    """This thread's, with these logits [V]."""
    row, size = getattr(_of_thread, "row", None), logits.shape[0]
    if row is None or row.capacity != size:
        row = _of_thread.row = Row(size)
    row.take(logits, taken_off)
    return row


def candidates(row: Row, params: SamplingParams) -> np.ndarray | None:
    """Makes of logits the weights of `distribution` before top-p and min-p, the largest being 1 → its ids."""
    ids, (likeliest, largest) = None, find_likeliest(row)
    if params.temperature == 0:
        row.keep(np.int64([likeliest]))
        row.numbers[0] = 1
        return np.int64([likeliest])
    if 0 < params.top_k < row.size:
        ids = row.narrow(params.top_k)
    factor, largest = scale(row, largest, params.temperature)
    if params.min_p > 0 and params.top_p == 1:  # then nothing else needs the unlikely tokens
        places = row.weigh_likely(factor, largest, np.float32(params.min_p), FEW)
        if places is not None:
            return places if ids is None else ids[places]
    row.weigh(factor, largest)
    return ids


def draw(row: Row, uniforms: Uniforms) -> int:
    """An index with a chance proportional to its weight: one random number compared with the running sum.

    Since the running sum goes in the order of the ids, a last-bit difference in the logits (another device, a batch)
    almost never changes the token.
    """
    return row.draw(uniforms.next())


def draw_kept(row: Row, params: SamplingParams, uniforms: Uniforms) -> int:
    """An index drawn as from the weights that `Row.drop` leaves, without finding out which those are.

    Whether one token is kept is a sum over those that are less likely. One that is not is drawn again, without it and
    all that are less likely, as in FlashInfer's sampling (https://flashinfer.ai/2025/03/10/sampling.html). Overwrites
    the weights.
    """
    whole = left = row.total()
    while True:
        index = draw(row, uniforms)
        weight = row.all[index]
        kept = weight >= np.float32(params.min_p)
        if kept and params.top_p < 1:
            kept = whole - left + row.below(weight, index) > (1 - params.top_p) * whole
        if kept:
            return index
        row.cut(weight, index)
        left = row.total()
        if not left:  # at least one is kept, whatever the rounding
            return index


def sample(logits: Tensor, params: SamplingParams, uniforms: Uniforms, said: Said | None = None) -> int:
    """One token id from logits [V]; `said`: what came before, for the penalties."""
    row = row_of(logits, penalties(params, said))
    if params.temperature == 0:
        return find_likeliest(row)[0]
    ids = candidates(row, params)
    if row.size == 1:
        index = 0
    elif row.size > FEW:
        index = draw_kept(row, params, uniforms)
    else:
        row.drop(params.top_p, params.min_p)
        index = draw(row, uniforms)
    return index if ids is None else int(ids[index])


def top_logprobs(logits: Tensor, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """-> (natural log probability of a token, the `most` likeliest ones with theirs, falling), from logits [V].

    Raises NotFinite for logits that are not finite.
    """
    row = row_of(logits)
    value, (_, largest), most = float(logits[token]), find_likeliest(row), min(most, row.size)
    pairs = []
    if most:
        ids = row.narrow(most).tolist()
        pairs = sorted(zip(ids, row.numbers.tolist(), strict=True), key=lambda pair: -pair[1])[:most]
        row.take(logits)
    row.weigh(np.float32(1), np.float32(largest))
    normaliser = largest + math.log(row.total())
    return value - normaliser, [(index, logit - normaliser) for index, logit in pairs]
