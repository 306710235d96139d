"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, then one draw.

`sample` is a pure function of logits, parameters, history and generator, so the same seed gives the same text alone, in
a batch, with or without a cache. The order of the filters is that of transformers: penalties, temperature, top-k
(https://arxiv.org/abs/1805.04833), top-p (https://arxiv.org/abs/1904.09751), min-p (https://arxiv.org/abs/2407.01082).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# What the model card advises (https://huggingface.co/Qwen/Qwen3-0.6B#best-practices). generation_config.json of a model
# that can do both holds the thinking values alone.
THINKING_ADVICE = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
ANSWER_ADVICE = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError for a value out of its range."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token (greedy)
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the fewest tokens that hold this probability together
    min_p: float = 0.0  # only tokens at least this likely, relative to the likeliest
    presence_penalty: float = 0.0  # taken off the logit of each token that was generated before
    repetition_penalty: float = 1.0  # makes each token of prompt and reply less likely by this factor
    max_new_tokens: int = 32768
    stop: tuple[str, ...] = ()  # texts that end the reply; they are not part of it
    seed: int | None = None  # None: a fresh one each time

    def __post_init__(self):
        for name, low, high, meaning in (
            ("temperature", 0, 100, "0 is greedy"),
            ("top_k", 0, math.inf, "0 is off"),
            ("top_p", 0, 1, "1 is off"),
            ("min_p", 0, 1, "0 is off"),
            ("presence_penalty", -2, 2, "0 is off"),
            ("repetition_penalty", 0.01, 100, "1 is off"),
            ("max_new_tokens", 1, math.inf, "tokens"),
        ):
            value = getattr(self, name)
            whole = name in ("top_k", "max_new_tokens")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"{name} is {value!r}, which is not a {'whole ' if whole else ''}number")
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, but has to lie from {low} to {high} ({meaning})")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed is {self.seed}, but has to lie from 0 to 2^63 - 1")
        if not all(self.stop):
            raise ValueError("stop has an empty text, which would end every reply at once")

    def generator(self) -> torch.Generator:
        """The random state of one reply. On the CPU, so that a seed means the same text on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def recommended(generation_config: dict[str, Any], thinking: bool, **chosen: Any) -> SamplingParams:
    """The checkpoint's own settings, the model card's advice where it has none, and `chosen` above both.

    `chosen` values of None do not count. Raises ValueError for a generation_config.json with impossible values.
    """
    names = {field.name for field in fields(SamplingParams)} - {"max_new_tokens", "stop", "seed"}
    stated = {name: value for name, value in generation_config.items() if name in names and value is not None}
    if generation_config.get("do_sample") is False:
        stated["temperature"] = 0.0
    is_thinking_advice = all(stated.get(name, value) == value for name, value in THINKING_ADVICE.items())
    if not thinking and (not stated or is_thinking_advice):
        stated |= ANSWER_ADVICE
    try:
        params = SamplingParams(**(THINKING_ADVICE | stated))
    except (ValueError, TypeError) as error:
        raise ValueError(f"generation_config.json: {error}") from None
    return replace(params, **{name: value for name, value in chosen.items() if value is not None})


def penalized(logits: Tensor, params: SamplingParams, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """Logits [V] with what was said before made less likely; the input is not changed."""
    if params.repetition_penalty != 1.0 and (prompt or reply):
        seen = torch.tensor(sorted({*prompt, *reply}), device=logits.device)
        score = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))
    if params.presence_penalty != 0.0 and reply:
        seen = torch.tensor(sorted(set(reply)), device=logits.device)
        logits = logits.index_put((seen,), logits[seen] - params.presence_penalty)
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that the filters leave, in ascending order, and their probabilities. float32 [V] → ids [n], [n].

    Greedy is the one likeliest token with probability 1. After top-k only the few that are left are sorted.
    """
    if params.temperature == 0:
        return logits.argmax()[None], torch.ones(1, device=logits.device)
    scores = logits / params.temperature
    if 0 < params.top_k < len(scores):
        smallest = scores.topk(params.top_k).values[-1]
        ids = (scores >= smallest).nonzero()[:, 0]
        scores = scores[ids]
    else:
        ids = torch.arange(len(scores), device=scores.device)
    if params.top_p < 1:
        ascending, order = scores.sort(stable=True)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        dropped[-1] = False
        kept = order[~dropped].sort().values
        ids, scores = ids[kept], scores[kept]
    probabilities = scores.softmax(-1)
    if params.min_p > 0:
        kept = probabilities >= params.min_p * probabilities.max()
        ids, probabilities = ids[kept], scores[kept].softmax(-1)
    return ids, probabilities


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    prompt: Sequence[int] = (),
    reply: Sequence[int] = (),
) -> int:
    """One token id from logits [V]; `prompt` and `reply` are the ids before it, which the penalties look at.

    The draw is one uniform number held against the cumulative probabilities in order of the ids, so a last-bit
    difference in the logits (another device, a batch) almost never changes the token.
    """
    logits = penalized(logits.float(), params, prompt, reply)
    if not torch.isfinite(logits.max()):
        raise ValueError("the model's logits are not finite; float16 overflows on some models, so try --dtype float32")
    ids, probabilities = candidates(logits, params)
    if len(ids) == 1:
        return int(ids)
    cumulative = probabilities.double().cpu().cumsum(-1)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(ids[min(int(torch.searchsorted(cumulative, drawn, right=True)), len(ids) - 1)])
