"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then one draw.

`sample` is a pure function of logits, parameters, history and generator, so the same seed gives the same text alone, in
a batch, with or without a cache. The order of the filters is that of transformers: penalties, temperature, top-k
(https://arxiv.org/abs/1805.04833), top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).

All of it runs on the CPU, in NumPy where that is the faster library for one row of logits, and nothing sorts the
vocabulary: top-k is a partition, and top-p sorts only the few tokens around its edge (`nucleus`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inference.params import SamplingParams

FEW = 2048  # probabilities that are sorted as they are; more are narrowed down first
BLOCK = 512  # probabilities that a draw adds up before it looks at each


def penalized(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], reply: Sequence[int]) -> np.ndarray:
    """Logits [V] with what was said before made less likely; the input is not changed."""
    repetition = params.repetition_penalty != 1.0 and len(prompt) + len(reply) > 0
    presence = params.presence_penalty != 0.0 and len(reply) > 0
    frequency = params.frequency_penalty != 0.0 and len(reply) > 0
    if not repetition and not presence and not frequency:
        return logits
    logits = logits.copy()
    said = np.asarray(reply, np.int64)
    if repetition:
        seen, factor = np.concatenate((np.asarray(prompt, np.int64), said)), np.float32(params.repetition_penalty)
        score = logits[seen]
        logits[seen] = np.where(score < 0, score * factor, score / factor)  # a token that occurs twice has one value
    if presence:
        logits[said] = logits[said] - np.float32(params.presence_penalty)
    if frequency:
        tokens, times = np.unique(said, return_counts=True)
        logits[tokens] -= np.float32(params.frequency_penalty) * times.astype(np.float32)
    return logits


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """logits / temperature, float32 [V]. Where that overflows, the largest is 0 and the others are below it.

    Raises ValueError for logits that are not finite.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scores = logits / np.float32(temperature)
        if np.isfinite(scores.max()):
            return scores
        largest = logits.max()
        if not np.isfinite(largest):
            raise ValueError("the model's logits are not finite; float16 overflows on some models: try --dtype float32")
        return ((logits.astype(np.float64) - largest) / temperature).astype(np.float32)


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens top-p keeps: bool [n] for float32 weights [n], which are proportional to the probabilities.

    Walking up from the least likely token, those are dropped whose running sum is at most 1 - top_p of the whole; of
    equally likely ones, the lower ids first. Of many tokens only those of one bin around that edge are sorted: bins are
    the leading bits of a float, which order non-negative numbers.
    """
    if len(weights) > FEW:
        bins = weights.view(np.int32) >> 17  # 64 to an octave
        # PyTorch's bincount, for it is three times as fast as NumPy's
        sums = torch.bincount(torch.from_numpy(bins), torch.from_numpy(weights.astype(np.float64))).numpy().cumsum()
        most = (1 - top_p) * sums[-1]
        edge = min(int(np.searchsorted(sums, most, side="right")), len(sums) - 1)
        kept, inside, below = bins > edge, np.flatnonzero(bins == edge), sums[edge - 1] if edge else 0.0
    else:
        most = (1 - top_p) * weights.sum(dtype=np.float64)
        kept, inside, below = np.zeros(len(weights), bool), np.arange(len(weights)), 0.0
    order = inside[weights[inside].argsort(kind="stable")]
    running = below + weights[order].cumsum(dtype=np.float64)
    dropped = int(np.searchsorted(running, most, side="right"))
    kept[order[min(dropped, len(order) - 1) :]] = True
    return kept


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """What one draw chooses from: float32 logits [V] → ids [n] in ascending order, or None for all; weights [n].

    Weights are 0 where a filter dropped a token, else proportional to the probabilities. Greedy is the one likeliest
    token with weight 1. Raises ValueError for logits that are not finite.
    """
    if params.temperature == 0:
        best = logits.argmax()
        scaled(logits[best : best + 1], 1.0)  # is it finite?
        return best[None], np.ones(1, np.float32)
    scores, ids = scaled(logits, params.temperature), None
    if 0 < params.top_k < len(scores):
        smallest = np.partition(scores, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(scores >= smallest)
        scores = scores[ids]
    scores -= scores.max()
    weights = np.exp(scores, out=scores)
    if params.top_p < 1:
        weights *= nucleus(weights, params.top_p)
    if params.min_p > 0:
        weights *= weights >= np.float32(params.min_p)  # the likeliest has weight 1
    return ids, weights


def draw(weights: np.ndarray, generator: torch.Generator) -> int:
    """An index with a chance proportional to its weight, float32 [n]: one uniform number compared with the running sum.

    Since the running sum goes in the order of the ids, a last-bit difference in the logits (another device, a batch)
    almost never changes the token. The sum over blocks comes first, then that inside one block.
    """
    ends = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum(dtype=np.float64)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * ends[-1]
    block = int(np.searchsorted(ends, drawn, side="right"))
    if block < len(ends):
        inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
        index = int(np.searchsorted(inside + (ends[block - 1] if block else 0.0), drawn, side="right"))
        if index < len(inside):
            return block * BLOCK + index
    return int(np.flatnonzero(weights[: (block + 1) * BLOCK])[-1])  # rounding put the number at the very end


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    prompt: Sequence[int] = (),
    reply: Sequence[int] = (),
) -> int:
    """One token id from logits [V]; `prompt` and `reply` are the ids before it, which the penalties look at.

    Long ones had better be `array.array("q")`, which NumPy reads in place: a list is converted at every call.
    """
    scores = penalized(logits.detach().float().cpu().numpy(), params, prompt, reply)
    ids, weights = distribution(scores, params)
    index = 0 if len(weights) == 1 else draw(weights, generator)
    return index if ids is None else int(ids[index])
