"""Log likelihoods of given texts: what a choice, a document or a reply is worth under the model, token by token.

One cache is kept between calls: of each text only what the one before did not share is computed, so that the examples
which a task puts before every question are read once.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from inference.decode import PREFILL_CHUNK, new_cache
from inference.speculate import common_prefix
from model import KVCache, Qwen3

ROWS = 128  # positions whose logits are in memory at once: those of one are 600 kB at Qwen3's vocabulary


class Scorer:
    """Computes log probabilities with one model. Raises ValueError for a text that its context does not hold."""

    def __init__(self, model: Qwen3):
        self.model, self.cache, self.held = model, None, []
        self.device = model.device

    def forget(self) -> None:
        """Computes the next text from its beginning."""
        self.held = []

    def logprobs(self, context: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """log p of each token of `continuation` behind `context` and its own beginning, in natural logarithms."""
        return [value for value, _ in self.scored(context, continuation)]

    @torch.inference_mode()
    def scored(self, context: Sequence[int], continuation: Sequence[int]) -> list[tuple[float, bool]]:
        """The same, each with whether it is the likeliest token there."""
        if not context:
            raise ValueError("a likelihood needs at least one token before the text: give the end-of-text token")
        ids = [*context, *continuation][:-1]  # the last token itself need not be computed on
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            raise ValueError(f"a text of {len(ids) + 1:,} tokens, but the model's context is {limit:,}; shorten it")
        first = len(context) - 1  # the position that predicts the first token of the continuation
        cache = self._room(len(ids))
        same = min(common_prefix(self.held, ids), cache.lengths[0], first)
        cache.truncate(same)
        self.held, found = ids, []
        for start, end in pairwise([*range(same, first, PREFILL_CHUNK), *range(first, len(ids), ROWS), len(ids)]):
            chunk = torch.tensor([ids[start:end]], device=self.device)
            logits = self.model(chunk, cache, last=end <= first)
            if end > first:
                targets = torch.tensor(continuation[start - first : end - first], device=self.device)
                rows = logits[0].float().log_softmax(-1)
                chosen = rows.gather(1, targets[:, None])[:, 0].tolist()
                found += zip(chosen, (rows.argmax(1) == targets).tolist(), strict=True)
        return found

    def _room(self, tokens: int) -> KVCache:
        context = self.model.config.max_position_embeddings
        if self.cache is None:
            self.cache = new_cache(self.model, max(tokens, 256))
            self.held = []
        elif tokens > self.cache.max_len:
            self.cache.grow(min(max(tokens, 2 * self.cache.max_len), context))
        return self.cache
