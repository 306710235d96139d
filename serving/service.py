"""One server's model, worker, settings and limits, and how a request becomes replies."""

import asyncio
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chat import Chat
from inference.decode import add_end_token, damage, end_tokens
from inference.engine import Engine
from inference.load import packed_as, parameters
from inference.params import SamplingParams, recommended
from inference.sampling import NotFinite
from model import Qwen3
from serving.choice import Asked, Choice, News
from serving.errors import ApiError, refused
from serving.fields import SAMPLING
from serving.grammar import Constraint, Grammars
from serving.metrics import Metrics
from serving.worker import Worker

QUEUE = 256  # replies that may wait for a row; more are answered 429


class Service:
    """One model and what its endpoints share. `context`: the most tokens of prompt and reply together."""

    def __init__(
        self,
        name: str,
        model: Qwen3,
        chat: Chat,
        sampling: dict[str, Any],
        *,
        max_batch: int = 16,
        context: int | None = None,
        memory: int | None = None,
        pooling: bool = False,
        queue: int = QUEUE,
    ):
        self.name, self.model, self.chat, self.sampling = name, model, chat, sampling
        self.max_batch, self.queue, self.pooling = max_batch, queue, pooling
        add_end_token(model, chat.end_of_turn_id)
        self.engine = Engine(model, max_batch=max_batch, context=context, cache_bytes=memory)
        self.context = self.engine.context
        self.grammars = Grammars(chat, model.config.vocab_size, end_tokens(model))
        self.metrics = Metrics()
        self.thinking = thinking_of(chat)
        self.accepted = 0  # replies that are waiting or running
        self.computing = 0  # jobs beside them
        self.reply_seconds = 1.0  # how long a reply took, a running mean
        self.started = int(time.time())
        self.worker: Worker | None = None

    def start(self) -> None:
        """On the event loop, when it begins."""
        self.grammars.prepare()
        self.engine.settle()
        self.worker = Worker(self.engine, asyncio.get_running_loop())
        self.worker.start()
        self.metrics.batch.set_function(lambda: min(self.accepted, self.max_batch))
        self.metrics.queue.set_function(lambda: max(0, self.accepted - self.max_batch))
        for of in ("kept", "running"):
            self.metrics.cache.labels(of).set_function(lambda of=of: self.engine.cache_bytes()[of])

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()

    # ---- settings ----

    def defaults(self, thinking: bool) -> SamplingParams:
        """What a request without sampling fields gets: the command's flags above the checkpoint's own settings."""
        return recommended(self.model.generation_config, thinking, **self.sampling)

    def params(self, fields: Namespace, thinking: bool, most: int | None) -> SamplingParams:
        """A request's settings; `most` tokens, None: as many as the context holds."""
        given = {name: getattr(fields, name) for name in SAMPLING}
        if given["seed"] is not None:
            given["seed"] %= 1 << 63
        elif "seed" not in self.sampling:
            given["seed"] = int.from_bytes(os.urandom(7), "big")
        given = {name: value for name, value in given.items() if value is not None}
        stop = fields.stop or self.sampling.get("stop", ())
        return replace(self.defaults(thinking), **given, stop=stop, max_new_tokens=most or self.context)

    def describe(self) -> dict:
        """The model as `/v1/models` lists it."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
        kinds = {"thinking": True, "answer": False}
        sampling = {kind: {name: getattr(self.defaults(on), name) for name in names} for kind, on in kinds.items()}
        weight = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        kind = str(self.model.dtype).removeprefix("torch.")
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "nanoqwen",
            "context_length": self.context,
            "max_model_len": self.context,
            "precision": packed_as(self.model) or weight.get(kind, kind),
            "parameters": parameters(self.model),
            "chat": bool(self.chat.templates),
            "thinking": self.thinking,
            "tools": any("tools" in template for template in self.chat.templates.values()),
            "embeddings": self.pooling,
            "sampling": {**sampling, "max_tokens": self.context},
        }

    async def compute(self, job: Iterator[None]) -> Any:
        """What a job of serving/jobs.py returns. ApiError 429 where too many wait, 500 where a number is not finite."""
        if self.computing >= self.queue:
            raise ApiError(
                429,
                f"{self.computing:,} requests are waiting, as many as this server takes",
                code="queue_full",
                retry_after="1",
            )
        self.computing += 1
        try:
            return await self.worker.compute(job)
        except NotFinite as error:
            raise ApiError(500, f"this could not be computed: {damage(self.model) or error}") from None
        finally:
            self.computing -= 1

    # ---- replies ----

    def check_length(self, ids: list[int], param: str, least: str = "") -> None:
        if len(ids) > self.context:
            message = f"{param}: {least}{len(ids):,} tokens, but the context holds {self.context:,}; shorten it"
            raise ApiError(400, message, param, "context_length_exceeded")

    def check_text(self, text: Any, param: str) -> None:
        """Refuses a text that is far too long by its beginning, before all of it is tokenized."""
        if isinstance(text, str) and len(text) > 32 * self.context:
            self.check_length(self.chat.encode(text[: 16 * self.context])[:-16], param, "more than ")

    def check_count(self, replies: int, param: str) -> None:
        most = max(self.queue, self.max_batch)
        if replies > most:
            raise refused(param, f"{replies:,} replies in one request, but at most {most:,} are taken; send fewer")

    def exchange(self, prompts: list[list[int]], asked: Asked, n: int, constraints: Callable[[], Constraint | None]):
        """The replies to these prompts, `n` of each, in the API's order. ApiError 429 where the queue is full."""
        wanted = n * len(prompts)
        if asked.bias and max(asked.bias) >= self.model.config.vocab_size:
            raise refused("logit_bias", f"token {max(asked.bias)} is not in the vocabulary")
        waiting = max(0, self.accepted - self.max_batch)
        if waiting + wanted > self.queue + max(0, self.max_batch - self.accepted):
            seconds = math.ceil(self.reply_seconds * (1 + waiting / self.max_batch))
            message = f"{self.accepted:,} replies are waiting or running, as many as this server takes"
            raise ApiError(429, message, code="queue_full", retry_after=str(min(max(seconds, 1), 120)))
        exchange = Exchange(self)
        for number in range(wanted):
            seed = (asked.params.seed + number % n) % (1 << 63)
            one = replace(asked, params=replace(asked.params, seed=seed))
            ids = prompts[number // n]
            choice = Choice(number, self.model, self.chat, ids, one, constraints(), exchange.hear)
            exchange.choices.append(choice)
        exchange.prompts = exchange.choices[::n]
        return exchange


class Exchange:
    """The replies of one request while they come. A context manager: at its end what still runs is cancelled.

    `listen` is called on the engine's thread with all news but errors. What it raises ends the exchange.
    """

    def __init__(self, service: Service):
        self.service = service
        self.choices: list[Choice] = []
        self.prompts: list[Choice] = []  # the first choice of each prompt
        self.listen: Callable[[News], None] = lambda news: None
        self.open = 0  # replies that are waiting or running
        self._error: Exception | None = None
        self._over = asyncio.Event()

    def __enter__(self) -> "Exchange":
        self.open = len(self.choices)
        self.service.accepted += self.open
        self.service.worker.add(self.choices)
        return self

    def __exit__(self, *_) -> None:
        if self.open:
            self.service.metrics.cancelled.inc(self.open)
            self.service.worker.cancel(self.choices)
            self.service.accepted -= self.open
            self.open = 0

    async def wait(self, seconds: float | None = None) -> bool:
        """Until the last reply has ended; false where it has not after so many seconds. Raises what ended it early."""
        if self.open and self._error is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._over.wait()
        if self._error is not None:
            raise self._error
        return not self.open

    def hear(self, news: News) -> None:
        """On the engine's thread, from a choice."""
        choice, error = news.choice, news.error
        self.service.metrics.heard(news)
        if news.count:
            choice.told = news.at
        if error is None:
            try:
                self.listen(news)
            except Exception as defect:
                error = defect
        elif not isinstance(error, ApiError):
            error = ApiError(500, f"the reply could not be computed: {error}")
            error.__cause__ = news.error
        if error is not None or news.finish is not None:
            worker = self.service.worker
            worker.end(choice)
            worker.tell(self._end, (news, error))

    def _end(self, ended: tuple[News, Exception | None]) -> None:
        news, error = ended
        if not self.open:
            return
        took = news.at - news.choice.begun
        self.open -= 1
        self.service.accepted -= 1
        self.service.reply_seconds += 0.1 * (took - self.service.reply_seconds)
        self.service.metrics.seconds.observe(took)
        self._error = self._error or error
        if not self.open or error is not None:
            self._over.set()


def thinking_of(chat: Chat) -> str:
    """What the template does with `enable_thinking`: "switch", or the model thinks "always" or "never"."""
    asked = [{"role": "user", "content": "x"}]
    if not chat.templates or chat.think_end_id is None:
        return "never"
    try:
        on, off = (chat.render(asked, thinking) for thinking in (True, False))
    except ValueError:
        return "never"
    return "switch" if on != off else "always" if chat.opens_thinking(on) else "never"
