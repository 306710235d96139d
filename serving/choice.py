"""One reply on its way from the engine to a client: ids to pieces of reasoning, content and tool calls.

`Choice` runs on the engine's thread. What it finds goes to its exchange as `News`, one for each pass of the model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from chat import Chat, ReplyStream
from inference.decode import Reply, ThinkingBudget
from inference.params import SamplingParams
from inference.sampling import top_logprobs
from model import Qwen3
from serving.errors import refused
from serving.grammar import Constraint
from serving.tool_calls import Call, CallParser

NOT_CHOSEN = -9999.0  # OpenAI's logprob for "very unlikely": here of tokens that a thinking budget put in


@dataclass
class News:
    """What a pass of the model brought for one choice."""

    choice: "Choice"
    at: float
    count: int = 0  # tokens
    pieces: list[tuple[str, str | Call]] = field(default_factory=list)  # ("reasoning" | "content" | "call", what)
    logprobs: list[dict] = field(default_factory=list)
    finish: str | None = None  # stop, length, tool_calls or error
    error: Exception | None = None


@dataclass
class Asked:
    """What a request wants of a reply, the same for each of its choices."""

    params: SamplingParams
    raw: bool = False  # plain text: no thinking, no calls
    thinking_budget: int | None = None
    tools: list[dict] | None = None  # functions whose calls are looked for
    parallel: bool = True  # whether the reply goes on behind a call
    logprobs: int | None = None  # how many likeliest tokens to tell beside each token; None: no probabilities
    bias: dict[int, float] = field(default_factory=dict)


class Choice:
    """A reply in the making. `send` gets its news, on the engine's thread."""

    def __init__(
        self,
        index: int,
        model: Qwen3,
        chat: Chat,
        ids: Sequence[int],
        asked: Asked,
        constraint: Constraint | None,
        send: Callable[[News], None],
    ):
        self.index, self.chat, self.asked, self.send = index, chat, asked, send
        self.constraint = constraint
        self.budget = ThinkingBudget(chat, ids, asked.thinking_budget) if asked.thinking_budget else None
        self.stream = ReplyStream(chat, ids, asked.params.stop, asked.raw)
        self.calls = CallParser(asked.tools) if asked.tools else None
        # The stream looks for the stop strings itself, as it has to hold back what may be one.
        params = replace(asked.params, stop=())
        masked = self.mask if constraint or asked.bias else None
        intervenes = self.intervene if constraint or self.budget else None
        self.reply = Reply(model, ids, params, chat, intervenes, until=self.heard, mask=masked)
        self.reasoning_tokens = 0
        self.begun = time.perf_counter()
        self.told: float | None = None  # when its latest tokens came
        self._heard, self._stopped = 0, False
        self._pieces: list[tuple[str, str | Call]] = []
        if asked.bias:
            self._biased = torch.tensor(list(asked.bias)), torch.tensor(list(asked.bias.values()))

    # ---- what inference/decode.py's Reply asks for each token, in this order ----

    def mask(self, tokens: list[int], logits: Tensor) -> Tensor:
        if self.asked.bias:
            ids, bias = self._biased
            logits = logits.float().clone()
            added = logits[ids] + bias.to(logits.device)
            logits[ids] = torch.where(bias.to(logits.device) <= -100, -torch.inf, added)
        if self.constraint is not None:
            logits = self.constraint.mask(tokens, logits)
        if self.asked.bias and logits.max() == -torch.inf:
            raise refused("logit_bias", "rules out every token that could come next")
        return logits

    def intervene(self, tokens: list[int]) -> list[int]:
        """The end of a thinking that took too long, else the line break that a grammar wants behind the thinking."""
        forced = self.budget(tokens) if self.budget else []
        return forced or (self.constraint.intervene(tokens) if self.constraint else [])

    def heard(self, tokens: list[int]) -> bool:
        """Whether the reply is to end here: a stop string, or a call where only one was asked for."""
        for token in tokens[self._heard :]:
            self._heard += 1
            if self._stopped:
                continue
            before = self.stream.kind
            self._show(self.stream.push(token))
            self.reasoning_tokens += "thinking" in (before, self.stream.kind)
            self._stopped = self.stream.stopped or self._has_its_call()
        return self._stopped

    def _has_its_call(self) -> bool:
        return self.calls is not None and not self.asked.parallel and self.calls.count > 0

    # ---- out ----

    def on_tokens(self, reply: Reply, chosen: list[tuple[int, Tensor | None]]) -> None:
        """The engine's callback after each pass."""
        news = News(self, time.perf_counter(), len(chosen))
        if self.asked.logprobs is not None:
            news.logprobs = [self._logprob(token, logits) for token, logits in chosen]
        if reply.ended:
            self._finish(news)
        news.pieces, self._pieces = self._pieces, []
        self.send(news)

    def _finish(self, news: News) -> None:
        reply = self.reply
        if reply.error is not None:
            news.error, news.finish = reply.error, "error"
            return
        self._show(self.stream.finish())
        if self.calls:
            self._add("content", self.calls.finish())
        news.finish = "stop" if self._stopped or reply.tokens[-1] in reply.ends else "length"
        if self.calls and self.calls.count and news.finish == "stop":
            news.finish = "tool_calls"

    def fail(self, error: Exception) -> None:
        """The engine can't go on with this reply."""
        self.send(News(self, time.perf_counter(), finish="error", error=error))

    def _show(self, pieces: list[tuple[str, str]]) -> None:
        for kind, text in pieces:
            if kind == "thinking":
                self._pieces.append(("reasoning", text))
            else:
                self._add("content", [text] if self.calls is None else self.calls.push(text))

    def _add(self, kind: str, found: list[Any]) -> None:
        self._pieces += [("call" if isinstance(one, Call) else kind, one) for one in found]

    def _logprob(self, token: int, logits: Tensor | None) -> dict:
        """A token's natural log probability as the model gave it, before penalties, filters and grammar."""
        if logits is None:
            return {**self.named(token), "logprob": NOT_CHOSEN, "top_logprobs": []}
        return token_logprob(self.named, logits, token, self.asked.logprobs)

    def named(self, token: int) -> dict:
        return named(self.chat, token)


def named(chat: Chat, token: int) -> dict:
    """A token in the API's form; `bytes` need not be whole characters."""
    raw = chat.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def token_logprob(name: Callable[[int], dict], logits: Tensor, token: int, most: int) -> dict:
    """One entry of the API's `logprobs.content`, from logits [V]."""
    own, top = top_logprobs(logits, token, most)
    likeliest = [{**name(other), "logprob": max(value, NOT_CHOSEN)} for other, value in top]
    return {**name(token), "logprob": max(own, NOT_CHOSEN), "top_logprobs": likeliest}
