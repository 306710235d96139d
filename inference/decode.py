"""The decode loop of one reply, ids to ids (`generate`, `steps`). Many replies at once are inference/engine.py's.

    prompt ids -> model(ids, cache) -> logits -> Reply.choose -> the next ids -> model ...

What happens to the logits of a position is decided in `Reply` alone, here and in the engine: the draw, the ids that a
thinking budget inserts, and the end. A draft (inference/speculate.py) only lets one pass of the model serve several
positions.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chat import EARLY_STOP_TEXT, Chat, ReplyStream
from formats.tensors import all_finite
from inference.params import SamplingParams, Uniforms, recommended
from inference.sampling import NotFinite, Said, is_penalized, sample
from model import Config, KVCache, Qwen3, check_lengths
from ops.cpu.step import Running, running

PREFILL_CHUNK = 2048  # prompt tokens that go through the model at once; bounds the memory of a long prompt

Intervene = Callable[[list[int]], list[int]]
Until = Callable[[list[int]], bool]
Mask = Callable[[list[int], Tensor], Tensor]


class Speculator(Protocol):
    """Guesses the next tokens of a reply; inference/speculate.py has the one that is used."""

    def begin(self, prompt: Sequence[int]) -> None:
        """A new reply to this prompt begins."""

    def propose(self, reply: Sequence[int], most: int, params: SamplingParams, uniforms: Uniforms) -> list[int]:
        """At most `most` ids that may follow the prompt and the reply so far. The random numbers are only looked at."""

    def learn(self, pending: int, drafted: int, accepted: int) -> None:
        """After a pass over `pending` known and `drafted` guessed tokens, of which `accepted` were right."""


def generate(model: Qwen3, ids: Sequence[int], params: SamplingParams | None = None, **options) -> Iterator[int]:
    """Yields the reply's token ids one by one, the end token included. `options` are those of `steps`.

    The model is the one that it is at the first token: modules, weights and hooks that are replaced while a reply is
    made count for the next one. Stops at an end token of the checkpoint, at `max_new_tokens`, or where the model's
    context is full. Stop strings are text: with `params.stop` the checkpoint's `chat` has to be given.
    """
    for token, _ in steps(model, ids, params, **options):
        yield token


def steps(
    model: Qwen3,
    ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    chat: Chat | None = None,
    cache: KVCache | None = None,
    intervene: Intervene | None = None,
    speculation: Speculator | None = None,
) -> Iterator[tuple[int, Tensor | None]]:
    """The loop of `generate`: yields (token id, the logits [V] that it was drawn from).

    `cache`: positions that it already holds must be the beginning of `ids`; only the rest is computed.
    `intervene`: is shown the reply after each token and may return ids that come next whatever the model thinks; they
    are yielded without logits.
    `speculation`: guesses the next tokens, and one pass of the model verifies them. Each position's token is drawn as
    without it and a guess only tells whether the pass already holds what follows, so the reply is the same.
    """
    reply = Reply(model, ids, params, chat, intervene)
    ids = reply.ids
    if speculation is not None and not all(hasattr(speculation, name) for name in ("begin", "propose", "learn")):
        raise ValueError(f"speculation is a {type(speculation).__name__}; give Speculation(PromptLookup())")
    if cache is not None and not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}, not a KVCache(model.config, ...)")
    if cache is not None:
        check_lengths(cache)
    if cache is not None and cache.lengths[0] >= len(ids):
        held = f"the cache holds {cache.lengths[0]:,} positions, but the prompt has {len(ids):,}"
        raise ValueError(f"{held}; truncate it, so that at least one is left to compute")
    cache = cache or new_cache(model, len(ids) + reply.limit)
    pending = list(ids[cache.lengths[0] :])
    if speculation is not None:
        speculation.begin(ids)
    fast = running(model, cache)
    while True:
        guesses = []
        if speculation is not None and reply.tokens:
            most = reply.limit - len(reply.tokens) - 1 if len(pending) == 1 else 0
            guesses = speculation.propose(reply.tokens, most, reply.params, reply.uniforms)
        logits = forward(model, [*pending, *guesses], cache, count=1 + len(guesses), fast=fast)
        chosen, accepted = [], 0
        for row, guess in zip(logits, [*guesses, None], strict=True):
            news = reply.choose(row)
            chosen += news
            accepted += news[0][0] == guess
            if reply.ended or [token for token, _ in news] != [guess]:
                break
        # Before anything is yielded, so that the cache is right wherever the caller leaves off.
        cache.truncate(cache.lengths[0] - len(guesses) + accepted)
        if speculation is not None:
            speculation.learn(len(pending), len(guesses), accepted)
        yield from chosen
        if reply.ended:
            return
        pending = reply.tokens[cache.lengths[0] - len(ids) :]


class Reply:
    """One reply in the making: what each position's logits become, and when it is over.

    `intervene` as in `steps`; `until` is shown the reply after each choice and ends it by returning true. `mask` is
    shown the reply so far and the next logits [V], and returns those to sample from (a new tensor; -inf for a token
    that must not come): a logit bias, a grammar.
    Raises ValueError for a prompt that the model cannot take and for stop strings without a tokenizer.

    tokens, ended   the reply so far, and whether it is complete
    cached          in an engine: the prompt's tokens that were not computed, since another request's cache held them
    error           in an engine: why the reply could not be continued
    """

    def __init__(
        self,
        model: Qwen3,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        chat: Chat | None = None,
        intervene: Intervene | None = None,
        until: Until | None = None,
        mask: Mask | None = None,
    ):
        check_model(model)
        self.model, self.ids = model, check_prompt(model, ids)
        if not isinstance(params, SamplingParams | None):
            raise ValueError(f"params is a {type(params).__name__}; give SamplingParams(temperature=0, ...)")
        if not isinstance(chat, Chat | None):
            raise ValueError(f"chat is a {type(chat).__name__}; give Chat.from_pretrained(...)")
        for name, given in (("intervene", intervene), ("until", until), ("mask", mask)):
            if given is not None and not callable(given):
                raise ValueError(
                    f"{name} is a {type(given).__name__}, not a function; Reply says what it is called with"
                )
        self.params = params or recommended(model.generation_config, thinking=True)
        if self.params.stop and chat is None:
            raise ValueError("stop strings are text: give generate the checkpoint's chat too")
        self.tokens, self.ended = [], False
        self.cached, self.error = 0, None
        # The last token itself need not be computed on, so it may be beyond the context.
        self.limit = min(self.params.max_new_tokens, model.config.context_length - len(self.ids) + 1)
        self.uniforms, self.ends = self.params.uniforms(), end_tokens(model)
        self.said = Said(self.ids) if is_penalized(self.params) else None
        self.intervene, self.until, self.mask = intervene, until, mask
        self.text = ReplyStream(chat, self.ids, self.params.stop, raw=True) if self.params.stop else None

    def choose(self, logits: Tensor) -> list[tuple[int, Tensor | None]]:
        """The token drawn from logits [V] and, without logits, the ids that `intervene` inserts after it."""
        return self.accept(self.draw(logits), logits)

    def draw(self, logits: Tensor) -> int:
        """The first half of `choose`, which several replies can do at once in threads: mask and sample."""
        scores = logits if self.mask is None else self.mask(self.tokens, logits)
        try:
            return sample(scores, self.params, self.uniforms, self.said)
        except NotFinite as error:
            raise ValueError(damage(self.model) or str(error)) from None

    def accept(self, token: int, logits: Tensor) -> list[tuple[int, Tensor | None]]:
        """The second half: what follows from the token."""
        self.tokens.append(token)
        over = token in self.ends
        forced = [] if over or self.intervene is None else self.intervene(self.tokens)
        forced = whole_numbers("what intervene returned", forced)[: self.limit - len(self.tokens)]
        self.tokens += forced
        for token_id in (token, *forced) if self.said is not None else ():
            self.said.add(token_id)
        if self.text is not None:
            for token_id in (token, *forced):
                self.text.push(token_id)
            over |= self.text.stopped
        over |= self.until is not None and self.until(self.tokens)
        self.ended = over or len(self.tokens) >= self.limit
        return [(token, logits), *((token_id, None) for token_id in forced)]


def damage(model: Qwen3, most: int = 6) -> str | None:
    """Which of a model's weights are NaN or infinite, in one line."""
    names = [name for name, tensor in model.state_dict().items() if not all_finite(tensor)]
    if not names:
        return None
    place = f"{model.path}: " if model.path is not None else ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{place}weights that are non-finite: {', '.join(names[:most])}{more}; download or save them again"


@torch.inference_mode()
def forward(model: Qwen3, ids: Sequence[int], cache: KVCache, count: int = 1, fast: Running | None = None) -> Tensor:
    """Appends ids to a cache of one row, a chunk at a time, and returns the logits [count, V] of the last `count`.

    `fast` does the same for this model and this cache, where ops/cpu/step.py serves them.
    """
    for start in range(0, len(ids), PREFILL_CHUNK):
        part = ids[start : start + PREFILL_CHUNK]
        if fast is None or (logits := fast(part, min(count, len(part)))) is None:
            logits = model(torch.tensor([part], device=model.device), cache, last=count == 1)[0]
    return logits[-count:]


class PromptTooLong(ValueError):
    """A prompt longer than the model's context; a chat can start over."""


def check_model(model: Any) -> None:
    if not isinstance(getattr(model, "config", None), Config):  # a compiled one is of another class
        raise ValueError(f"model is a {type(model).__name__}, not a Qwen3; Qwen3.from_pretrained(...) opens one")


def whole_numbers(name: str, ids: Any) -> list[int]:
    """Token ids in order, from whatever holds them. ValueError where they are none."""
    try:
        if isinstance(ids, dict | set | frozenset):
            raise TypeError
        found = list(ids)
        if any(isinstance(token, bool) for token in found):
            raise TypeError
        return list(map(operator.index, found))
    except TypeError:
        raise ValueError(f"{name} is not a list of token ids (whole numbers): {repr(ids)[:80]}") from None


def check_prompt(model: Qwen3, ids: Sequence[int] | Tensor) -> list[int]:
    """The ids of one prompt as a list. Raises ValueError for what is none, or not one for this model."""
    if isinstance(ids, str | bytes):
        raise ValueError("the prompt is a text, but token ids are needed; Chat.encode or Chat.render makes them")
    if isinstance(ids, Tensor):
        if ids.dim() != 1:
            raise ValueError(
                f"the prompt has the shape {list(ids.shape)}; give the ids of one prompt, in one dimension"
            )
        ids = ids.tolist()
    ids = whole_numbers("the prompt", ids)
    context, vocabulary = model.config.context_length, model.config.vocab_size
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(ids) > context:
        raise PromptTooLong(f"the prompt has {len(ids):,} tokens, but this model's context is {context:,}; shorten it")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token id {wrong} is outside of the vocabulary of {vocabulary:,}; is the tokenizer another's?"
        )
    return ids


def end_tokens(model: Qwen3) -> set[int]:
    """The ids that end a reply: those of generation_config.json and of config.json together."""
    stated = (model.generation_config.get("eos_token_id"), model.config.eos_token_id)
    return {token for ids in stated if ids is not None for token in (ids if isinstance(ids, list) else [ids])}


def add_end_token(model: Qwen3, token: int | None) -> None:
    """Makes a chat template's end of a turn one of the ids that end a reply; a base model's own is another one."""
    ends = end_tokens(model)
    if token is not None and token not in ends:
        model.generation_config = {**model.generation_config, "eos_token_id": [token, *sorted(ends)]}


def new_cache(model: Qwen3, max_len: int, batch_size: int = 1) -> KVCache:
    max_len = min(max_len, model.config.context_length)
    return KVCache(model.config, batch_size, max_len, device=model.device, dtype=model.cache_dtype or model.dtype)


class ThinkingBudget:
    """Ends thinking that takes more than `tokens`: the official text is put in the model's mouth, then it answers."""

    def __init__(self, chat: Chat, prompt: Sequence[int], tokens: int):
        self.chat, self.tokens = chat, tokens
        self.text = chat.encode(EARLY_STOP_TEXT)
        self.opened = chat.opens_thinking(prompt)

    def __call__(self, reply: list[int]) -> list[int]:
        self.opened |= reply[-1] == self.chat.think_start_id
        if reply[-1] == self.chat.think_end_id:
            self.opened = False
        return self.text if self.opened and len(reply) == self.tokens else []


def repetition_period(reply: Sequence[int], longest: int = 256, span: int = 2048) -> int:
    """The period of an endless repetition at the end of a reply, 0 if there is none.

    It is one if the last `span` tokens are the same up to `longest` tokens over and over. No shorter run tells a loop
    from what may have been asked for: a hundred equal rows of a table, a line written 200 times, a zero matrix.
    """
    if len(reply) < span:
        return 0
    tail = reply[-span:]
    for period in range(1, longest + 1):
        # The last 16 tokens decide nearly always, without the copies of the whole comparison.
        if tail[-16 - period : -period] == tail[-16:] and tail[period:] == tail[:-period]:
            return period
    return 0
