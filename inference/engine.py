"""Many replies at once: pass after pass of the model, each over all running replies (continuous batching).

    engine = Engine(model, max_batch=16)
    engine.add(Reply(model, ids, params), on_tokens)      at any time between two passes
    while engine.step(): ...                              a token for each running reply, and a piece of new prompts

A reply joins and leaves between two passes, so that a short one never waits for a long one. Each reply is the one that
`generate` gives alone: on a CPU served by ops/cpu/step.py to the bit, whatever else is running.

A prompt is computed in pieces while others are running, so that their next token is late by a bounded time (`Pace`).
Caches of finished replies are kept while memory lasts; the least recently used goes first. A request starts from the
longest beginning that it shares with any cache, kept or running; while another one computes a prompt that begins in the
same way, it waits for it.

If running replies outgrow the memory, the youngest is put back into the queue. It is computed again when there is room,
to the same bits, so nobody sees more of it than the time.

An engine belongs to one thread. Nothing in it is locked.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chat import Chat
from inference.caches import Pages, Part, Rows, position_bytes
from inference.decode import Intervene, PromptTooLong, Reply, Until, check_model
from inference.params import SamplingParams, number
from inference.speculate import common_prefix
from model import Qwen3
from ops.cpu import step as cpu_step
from ops.memory import available_memory

PAUSE = 0.12  # seconds that pieces of prompts may add to a pass while replies are running; else four times as long
PIECE = (16, 512)  # tokens of prompts in one pass, whatever that takes: at least, at most
FORGET = 0.95  # what a pass still counts when the next one is measured
SPREAD = 16.0  # variance of the number of tokens from which a line can be fitted
WORTH_WAITING = 32  # tokens that another request is about to compute anyway
MEMORY_SHARE = 0.25  # of the free memory that caches may take where no limit is given

Choices = list[tuple[int, Tensor | None]]
OnTokens = Callable[[Reply, Choices], None]


@dataclass(eq=False)
class Running:
    """A request in the batch."""

    reply: Reply
    on_tokens: OnTokens | None
    cache: Any = None  # None: not begun
    prompt: np.ndarray = field(init=False)  # int64 [tokens], as comparisons want it

    def __post_init__(self):
        self.prompt = np.array(self.reply.ids, np.int64)

    @property
    def pending(self) -> int:
        """How many ids of prompt and reply are to be computed."""
        return len(self.reply.ids) + len(self.reply.tokens) - (self.cache.length if self.cache else 0)

    def ids(self, start: int, count: int) -> list[int]:
        """Of prompt and reply, from `start` on."""
        prompt, end = self.reply.ids, start + count
        return prompt[start:end] + self.reply.tokens[max(0, start - len(prompt)) : max(0, end - len(prompt))]

    def text(self) -> np.ndarray:
        """Prompt and reply, int64 [positions]."""
        return np.concatenate((self.prompt, np.array(self.reply.tokens, np.int64)))


class Pace:
    """How many tokens of prompts fit into `PAUSE`, by what the passes before took.

    A pass takes about as long as reading the weights, and a little more for each token in it: a line, fitted by least
    squares, in which a pass counts less with each that follows.
    """

    def __init__(self):
        self.per_token = 0.0  # seconds that one more token adds to a pass
        self._sums = (0.0,) * 5  # of 1, tokens, seconds, tokens^2, tokens * seconds

    def piece(self, decoding: bool) -> int:
        """Tokens of prompts in the next pass; `decoding`: replies are running, and wait for it."""
        least, most = PIECE
        if not self.per_token:
            return least if decoding else most // 4
        fits = int((PAUSE if decoding else 4 * PAUSE) / self.per_token + 1e-6)
        return max(least, min(most, fits // least * least))

    def measured(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens."""
        if self.per_token:  # one that stood still because the machine did says little about the next one
            seconds = min(seconds, 4 * (self._sums[2] / self._sums[0] + self.per_token * tokens))
        news = (1.0, tokens, seconds, tokens**2, tokens * seconds)
        self._sums = tuple(FORGET * sum_ + new for sum_, new in zip(self._sums, news, strict=True))
        count, x, y, xx, xy = self._sums
        variance = xx / count - (x / count) ** 2
        if variance >= SPREAD:
            slope = (xy / count - x * y / count**2) / variance
            self.per_token = min(max(slope, y / x / 16), y / x)
        elif not self.per_token:
            self.per_token = y / x


@dataclass(eq=False)
class Kept:
    """The cache of a finished reply, and the ids of its positions."""

    text: np.ndarray
    cache: Any


class Engine:
    """Runs replies of one model side by side.

    max_batch     replies that run at once; more wait in a queue, in the order in which they came
    context       positions of a prompt with its reply; None: the model's
    cache_bytes   bound of the memory for keys and values, and so of the context; None: a quarter of what is free now
    """

    def __init__(self, model: Qwen3, max_batch: int = 16, context: int | None = None, cache_bytes: int | None = None):
        check_model(model)
        if number("max_batch", max_batch, whole=True) < 1:
            raise ValueError(f"max_batch is {max_batch!r}; give a number of replies from 1")
        limit = (
            free_bytes(model) * MEMORY_SHARE if cache_bytes is None else number("cache_bytes", cache_bytes, whole=True)
        )
        most = model.config.context_length
        if context is not None and not 1 <= number("context", context, whole=True) <= most:
            raise ValueError(f"a context of {context:,} positions: the model's is {most:,}")
        paged = cpu_step.serving(model) is not None
        unit = cpu_step.BLOCK if paged else 1
        fits = int(limit) // (position_bytes(model) * unit) * unit
        if fits < 1:
            needed = position_bytes(model) * unit
            raise ValueError(f"{limit:,.0f} bytes for caches are too few: {unit} positions take {needed:,}")
        self.model, self.max_batch, self.context = model, max_batch, min(context or most, fits)
        self.store = Pages(model, int(limit)) if paged else Rows(model, max_batch, self.context, int(limit))
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # in the order in which they came
        self.kept: list[Kept] = []  # the least recently used first
        self.pace = Pace()
        self.threads: ThreadPoolExecutor | None = None

    # ---- requests ----

    def add(self, reply: Reply, on_tokens: OnTokens | None = None) -> None:
        """Queues a reply; it joins the batch with the next pass if there is a place.

        `on_tokens(reply, [(token id, logits [V] or None), ...])` is called after each choice, with what `Reply.choose`
        returned; with an empty list where the reply could not be continued (reply.error). What it raises comes out of
        `step`, and the reply is cancelled. Raises PromptTooLong for a prompt that the context does not hold.
        """
        if len(reply.ids) > self.context:
            few = "" if self.context == self.model.config.context_length else " here"
            raise PromptTooLong(
                f"the prompt has {len(reply.ids):,} tokens, but the context{few} is {self.context:,}; shorten it"
            )
        if reply.ended or any(one.reply is reply for one in (*self.running, *self.waiting)):
            raise ValueError("this reply has ended or is running already; make a new one")
        reply.limit = min(reply.limit, self.context - len(reply.ids) + 1)
        self.waiting.append(Running(reply, on_tokens))

    def cancel(self, reply: Reply) -> None:
        """Ends a reply where it is; nothing happens if it has ended. Its place is free at once."""
        for one in self.waiting:
            if one.reply is reply:
                self.waiting.remove(one)
                return
        for one in self.running:
            if one.reply is reply:
                self._leave(one)
                return

    def run(self) -> None:
        """Until every reply is complete."""
        while self.step():
            pass

    def close(self) -> None:
        """Ends the threads that draw tokens; without it they end with the engine."""
        if self.threads is not None:
            self.threads.shutdown()
            self.threads = None

    def settle(self) -> None:
        """For an engine that runs long: the weights move into huge pages now, and not in the first replies' passes."""
        cpu_step.settle(self.model)

    def cache_bytes(self) -> dict[str, int]:
        """Memory of keys and values: what finished replies have left behind, and what only running ones use."""
        kept = self.store.used([held.cache for held in self.kept])
        return {"kept": kept, "running": self.store.used() - kept}

    # ---- one pass ----

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass of the model over all running replies; false where there is nothing to do."""
        while self.waiting and len(self.running) < self.max_batch:
            self.running.append(self.waiting.popleft())
        if not self.running:
            return False
        parts = self._parts()
        start = time.perf_counter()
        found = self.store.forward(list(parts.values()))
        self.pace.measured(sum(len(part.ids) for part in parts.values()), time.perf_counter() - start)
        chosen = [(one, logits) for one, logits in zip(parts, found, strict=True) if logits is not None]
        drawn, failed = self._draw(chosen), []
        for (one, logits), draw in zip(chosen, drawn, strict=True):
            if one in self.running:  # else a callback has cancelled it
                try:
                    self._accept(one, draw, logits)
                except BaseException as error:  # the other replies get their tokens first
                    self.cancel(one.reply)
                    failed.append(error)
        if failed:
            raise failed[0]
        return bool(self.running or self.waiting)

    def _parts(self) -> dict[Running, Part]:
        """What is computed now: the next ids of each running reply, then as much of the prompts as fits."""
        while True:
            begun = [one for one in self.running if self._begin(one)]
            decoding = [one for one in begun if one.reply.tokens and one.pending <= PIECE[0]]
            counts = {one: one.pending for one in decoding}
            left = self.pace.piece(bool(decoding))
            for one in begun:
                if one not in counts and left > 0:
                    counts[one] = min(one.pending, left)
                    left -= counts[one]
            if counts and self._make_room({one.cache: one.cache.length + n for one, n in counts.items()}):
                return {one: self._part(one, count) for one, count in counts.items()}

    @staticmethod
    def _part(one: Running, count: int) -> Part:
        return Part(one.cache, one.ids(one.cache.length, count), count == one.pending)

    def _make_room(self, lengths: dict[Any, int]) -> bool:
        """False: something had to go, and what is computed next is another question."""
        while not self.store.make_room(lengths):
            if self.kept:
                self.store.end(self.kept.pop(0).cache)
                continue
            if len(self.running) == 1:
                raise MemoryError(f"not enough memory for a cache of {max(lengths.values()):,} positions")
            youngest = self.running.pop()
            if youngest.cache is not None:
                self.store.end(youngest.cache)
                youngest.cache = None
            self.waiting.appendleft(youngest)
            return False
        return True

    def _begin(self, one: Running) -> bool:
        """Gives a request a cache, with the longest beginning that is there; false where it has to wait for one."""
        if one.cache is not None:
            return True
        text = one.text()
        source, shared, coming = None, 0, 0
        for held in (*self.kept, *(other for other in self.running if other.cache is not None)):
            theirs = held.text if isinstance(held, Kept) else held.text()
            same = min(common_prefix(text, theirs), len(text) - 1)  # the last token's logits are needed
            there = min(same, held.cache.length)
            if not self.store.cuts and there < held.cache.length:
                there = 0
            coming = max(coming, same)
            if there > shared:
                source, shared = held, there
        if coming >= shared + WORTH_WAITING and self.store.cuts:
            return False
        while (cache := self.store.begin(source and source.cache, shared)) is None:
            oldest = next((held for held in self.kept if held is not source), None)
            if oldest is None:
                if any(other.cache is not None for other in self.running):
                    return False
                if source is None:
                    raise MemoryError("not enough memory for the cache of one reply")
                oldest, source, shared = source, None, 0
            self.kept.remove(oldest)
            self.store.end(oldest.cache)
        if isinstance(source, Kept):
            self.kept.remove(source)
            self.kept.append(source)
        one.cache = cache
        if not one.reply.tokens:
            one.reply.cached = shared
        return True

    # ---- one reply ----

    def _draw(self, chosen: list[tuple[Running, Tensor]]) -> list[Callable[[], int]]:
        """Draws a token for each reply, in threads, for the model has to wait for it; → what gives it, or raises."""
        if len(chosen) == 1 or torch.get_num_threads() == 1:
            return [partial(one.reply.draw, logits) for one, logits in chosen]
        if self.threads is None:
            self.threads = ThreadPoolExecutor(torch.get_num_threads(), "draw")
        return [self.threads.submit(one.reply.draw, logits).result for one, logits in chosen]

    def _accept(self, one: Running, draw: Callable[[], int], logits: Tensor) -> None:
        try:
            news = one.reply.accept(draw(), logits)
        except Exception as error:  # of this reply alone: its logits are not finite, its grammar is at an end
            one.reply.error, one.reply.ended, news = error, True, []
        if one.reply.ended:
            self._leave(one)
        if one.on_tokens is not None:
            one.on_tokens(one.reply, news)

    def _leave(self, one: Running) -> None:
        """Out of the batch; the cache is kept where it is worth anything."""
        self.running.remove(one)
        cache, one.cache = one.cache, None
        if cache is None:
            return
        text = one.text()[: cache.length]
        if not len(text) or any(common_prefix(text, held.text) == len(text) for held in self.kept):
            return self.store.end(cache)
        for held in [held for held in self.kept if common_prefix(text, held.text) == len(held.text)]:
            self.kept.remove(held)
            self.store.end(held.cache)
        if (kept := self.store.keep(cache)) is not None:
            self.kept.append(Kept(text, kept))


def free_bytes(model: Qwen3) -> int:
    """Memory that is free on the model's device; 8 GB where nobody says."""
    if model.device.type == "cuda":
        return torch.cuda.mem_get_info(model.device)[0]
    return available_memory() or 8 << 30


def one_each(name: str, given: Any, count: int) -> list:
    """A list with an entry for each of `count` prompts, all None where nothing is given."""
    if given is None:
        return [None] * count
    if isinstance(given, str | dict) or not isinstance(given, Iterable):
        raise ValueError(f"{name} is a {type(given).__name__}; give a list of them, one for each prompt")
    entries = list(given)
    if len(entries) != count:
        raise ValueError(f"{name} has {len(entries)} entries for {count} prompts; give one for each")
    return entries


def generate_batch(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    chat: Chat | None = None,
    intervene: Sequence[Intervene | None] | None = None,
    until: Sequence[Until | None] | None = None,
    engine: Engine | None = None,
) -> list[list[int]]:
    """Replies to many prompts at once, of any lengths; each reply is the one that `generate` gives alone.

    `chat` is for stop strings; `intervene` and `until` hold what `Reply` takes, one for each prompt. `engine`: one of
    this model with unchanged weights, which says how many run at once and has caches of calls before (None: all run).
    """
    if isinstance(prompts, Tensor | str | dict) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give a list of prompts, each a list of ids")
    if not isinstance(engine, Engine | None):
        raise ValueError(f"engine is a {type(engine).__name__}; give Engine(model, max_batch)")
    prompts = list(prompts)
    if not prompts:
        return []
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    lists = [
        one_each(name, given, len(prompts))
        for name, given in (("params", each), ("intervene", intervene), ("until", until))
    ]
    replies = [Reply(model, ids, p, chat, put_in, end) for ids, p, put_in, end in zip(prompts, *lists, strict=True)]
    engine = engine or Engine(model, len(replies))
    try:
        for reply in replies:
            engine.add(reply)
        engine.run()
    finally:
        for reply in replies:
            engine.cancel(reply)
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    return [reply.tokens for reply in replies]
