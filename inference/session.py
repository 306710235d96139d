"""A chat with a model: the prompt of each turn, the cache kept between turns, and the reply as an `Answer`."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from chat import Chat, ReplyStream, assistant_message
from inference.decode import (
    ThinkingBudget,
    add_end_token,
    check_prompt,
    end_tokens,
    new_cache,
    repetition_period,
    steps,
)
from inference.params import SamplingParams
from inference.sampling import top_logprobs
from inference.speculate import Speculation, common_prefix
from model import EMBEDDING, HEAD, KVCache, Qwen3
from ops.cpu import step as cpu_step


@dataclass
class Answer:
    """One reply. `finish_reason`: stop, length, context, loop, interrupted or error."""

    prompt_tokens: int
    thinking: str = ""
    answer: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    logprobs: list[dict] | None = None
    error: str | None = None  # why there is no answer, for a prompt of a file
    stats: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        record = {
            "prompt_tokens": self.prompt_tokens,
            "thinking": self.thinking,
            "answer": self.answer,
            "tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
            "stats": self.stats,
            "token_ids": self.token_ids,
        }
        if self.error is not None:
            record["error"] = self.error
        if self.logprobs is not None:
            record["logprobs"] = self.logprobs
        return json.dumps(record, ensure_ascii=False)


class Listener:
    """Takes the ids of one reply and makes the `Answer` of them; `ended` at a stop string or an endless repetition."""

    def __init__(
        self, chat: Chat, prompt: Sequence[int], stop: Sequence[str] = (), raw: bool = False, loop_stop: bool = True
    ):
        self.answer = Answer(len(prompt))
        self.stream = ReplyStream(chat, prompt, stop, raw)
        self.loop_stop, self.ended = loop_stop, False

    def push(self, token: int) -> list[tuple[str, str]]:
        """What the next id allows to be shown: ("thinking" | "answer", text)."""
        tokens = self.answer.token_ids
        tokens.append(token)
        pieces = self.stream.push(token)
        looks = self.loop_stop and len(tokens) % 32 == 0
        if self.stream.stopped or (looks and repetition_period(tokens)):
            self.answer.finish_reason = "stop" if self.stream.stopped else "loop"
            self.ended = True
        return pieces

    def heard(self, tokens: list[int]) -> bool:
        """The `until` of inference/decode.py's `Reply`: whether the reply so far is to end here."""
        for token in tokens[len(self.answer.token_ids) :]:
            if not self.ended:
                self.push(token)
        return self.ended

    def complete(self, model: Qwen3, params: SamplingParams) -> None:
        """The reply ended by itself: says why."""
        tokens = self.answer.token_ids
        if not self.ended:
            full = "length" if len(tokens) >= params.max_new_tokens else "context"
            self.answer.finish_reason = "stop" if tokens[-1] in end_tokens(model) else full

    def finish(self) -> list[tuple[str, str]]:
        """At the end of the ids: what was held back after all."""
        pieces = self.stream.finish()
        self.answer.thinking, self.answer.answer = self.stream.thinking, self.stream.answer
        return pieces


class Session:
    """A chat with a model: the messages so far and the cache of what it has already read of them."""

    def __init__(
        self,
        model: Qwen3,
        chat: Chat,
        params: SamplingParams,
        *,
        name: str = "",
        system: str | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
        raw: bool = False,
        logprobs: int = 0,
        speculation: Speculation | None = None,
        loop_stop: bool = True,
    ):
        self.model, self.chat, self.params, self.speculation = model, chat, params, speculation
        self.thinking, self.thinking_budget, self.raw, self.logprobs = thinking, thinking_budget, raw, logprobs
        self.name, self.loop_stop = name, loop_stop
        self.system = _system(system)
        if not raw:
            add_end_token(model, chat.end_of_turn_id)
        self.bandwidth: float | None = None  # bytes per second; where given, stats hold the share that was reached
        self.start_seconds: dict[str, float] = {}  # of the phases before the first question, for its stats
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.system)
        self.ids: list[int] = []  # what the cache holds, position by position
        self.cache: KVCache | None = None

    def set_system(self, text: str | None) -> None:
        """Another system message, or none, in front of the messages so far."""
        turns = self.messages[len(self.system) :]
        self.system = _system(text)
        self.messages = [*self.system, *turns]

    def retry(self, show: Callable[[str, str], None] = lambda kind, text: None) -> Answer:
        """Another reply, by the next seed, to the last question; the old one is kept if nothing comes."""
        before = self.messages
        if len(before) < 2 or [message["role"] for message in before[-2:]] != ["user", "assistant"]:
            raise ValueError("there is no reply yet to try again")
        self.messages, params = before[:-2], self.params
        self.params = replace(params, seed=((params.seed or 0) + 1) % (1 << 63))
        try:
            return self.ask(before[-2]["content"], show)
        finally:
            if len(self.messages) < len(before):
                self.messages = before

    def ask(self, text: str, show: Callable[[str, str], None] = lambda kind, text: None) -> Answer:
        """The reply to one more user message; `show` gets each piece of it as ("thinking" | "answer", text).

        Only the part of the prompt that changed since the last turn is computed. Ctrl-C ends the reply. What was said
        until then stays in the chat; if that is nothing, the question does not either.
        """
        asked = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.encode(text) if self.raw else self.chat.render(messages, self.thinking)
        check_prompt(self.model, prompt)
        cache, cached = self._reuse(prompt)
        self.ids = prompt[:cached]  # whatever happens from here on, the cache begins with these
        listener = Listener(self.chat, prompt, self.params.stop, self.raw, self.loop_stop)
        budget = ThinkingBudget(self.chat, prompt, self.thinking_budget) if self.thinking_budget else None
        answer, clock = listener.answer, [time.perf_counter()]
        answer.logprobs = [] if self.logprobs else None
        options = {"cache": cache, "intervene": budget, "speculation": self.speculation}
        try:
            params = replace(self.params, stop=())  # the listener looks for them itself
            for token, logits in steps(self.model, prompt, params, **options):
                if logits is not None:  # a forced token takes no step of its own
                    clock.append(time.perf_counter())
                pieces = listener.push(token)
                if self.logprobs:
                    answer.logprobs.append(self._logprob(token, logits))
                for piece in pieces:
                    show(*piece)
                if listener.ended:
                    break
            else:
                listener.complete(self.model, self.params)
        except KeyboardInterrupt:
            pass  # the reply so far is kept
        for piece in listener.finish():
            show(*piece)
        self.ids = [*prompt, *answer.token_ids][: cache.lengths[0]]
        if answer.token_ids:
            self.messages = [*messages, assistant_message(answer.thinking, answer.answer)]
        answer.stats = self._stats(len(prompt), cached, clock)
        if self.start_seconds:
            phases = {**self.start_seconds, "first token": clock[min(1, len(clock) - 1)] - asked}
            answer.stats["start_seconds"] = {name: round(seconds, 4) for name, seconds in phases.items()}
            self.start_seconds = {}
        return answer

    def _reuse(self, prompt: list[int]) -> tuple[KVCache, int]:
        """The cache, cut back to what it shares with the new prompt, and how many positions that is."""
        # The last token of the prompt is computed again in any case: its logits are needed.
        same = min(common_prefix(self.ids, prompt), len(prompt) - 1)
        context = self.model.config.context_length
        room = min(len(prompt) + self.params.max_new_tokens, context)
        if self.cache is None:
            self.cache = new_cache(self.model, room)
        self.cache.truncate(same)
        if self.cache.max_len < room:
            self.cache.grow(min(2 * room, context))
        return self.cache, same

    def _logprob(self, token: int, logits: Tensor | None) -> dict:
        """The token's natural log probability before penalties and filters, and the N likeliest ones."""
        name = self.chat.decode([token])
        if logits is None:  # forced by the thinking budget, not chosen
            return {"token_id": token, "text": name, "logprob": None, "top": []}
        logprob, pairs = top_logprobs(logits, token, self.logprobs)
        likeliest = [{"token_id": i, "text": self.chat.decode([i]), "logprob": value} for i, value in pairs]
        return {"token_id": token, "text": name, "logprob": logprob, "top": likeliest}

    def _stats(self, prompt_tokens: int, cached: int, clock: list[float]) -> dict[str, Any]:
        first, last, decoded = clock[min(1, len(clock) - 1)], clock[-1], len(clock) - 2
        stats = {
            "cached_tokens": cached,
            "prefill_tokens": prompt_tokens - cached,
            "first_token_seconds": round(first - clock[0], 4),
            "prefill_tokens_per_second": rate(prompt_tokens - cached, first - clock[0]),
            "decode_tokens_per_second": rate(decoded, last - first),
            "seed": self.params.seed,
        }
        guessing = self.speculation
        if guessing is not None:
            stats["drafted_tokens"], stats["accepted_tokens"] = guessing.drafted, guessing.accepted
            stats["acceptance"] = round(guessing.accepted / guessing.drafted, 3) if guessing.drafted else None
            stats["tokens_per_pass"] = rate(len(clock) - 1, guessing.passes)
        if (reason := not_served(self.model)) is not None:
            stats["computed_by_pytorch"] = reason  # slower than the fast path that this device has
        elif (variant := cpu_step.variant(self.model)) is not None:
            stats["kernel_variant"] = variant
        if self.bandwidth:
            passes = max(decoded, 0) if guessing is None else max(guessing.passes - 1, 0)
            read = weight_bytes_per_token(self.model) * passes / max(last - first, 1e-9)
            stats["weight_gigabytes_per_second"] = round(read / 1e9, 2)
            stats["read_bandwidth_gigabytes_per_second"] = round(self.bandwidth / 1e9, 2)
            stats["share_of_read_bandwidth"] = round(read / self.bandwidth, 3)
        return stats


def _system(text: str | None) -> list[dict]:
    return [] if text is None else [{"role": "system", "content": text}]


def rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count > 0 and seconds > 0 else None


def weight_bytes_per_token(model: Qwen3) -> int:
    """Bytes of weights that one decoded token reads: all but the unread rows of the embedding and the idle experts."""
    config, total, copy = model.config, 0, cpu_step.head_copy_bytes(model)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        share = 1.0
        if ".experts." in name:
            share = config.num_experts_per_tok / config.num_experts
        elif name.startswith("model.embed_tokens.") and not config.tie_word_embeddings:
            share = 1 / config.vocab_size
        total += copy if copy and name == head else tensor.nbytes * share
    return int(total)


def not_served(model: Qwen3) -> str | None:
    """Why this model's tokens do not go the fast way that its device has; None where they do, or it has none."""
    device = model.device.type
    if device == "cuda":
        from ops.gpu import graphs

        return graphs.why(model)
    return cpu_step.why(model) if device == "cpu" else None
