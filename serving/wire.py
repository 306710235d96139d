"""The API's answers as JSON: whole ones, the chunks of a stream, and the tokens that were used.

Everything is written in ASCII, so that a stream may be cut at any byte.
"""

import json
import time
import uuid
from typing import Any

from chat import Chat
from console import project
from serving.choice import Choice, News
from serving.tool_calls import Call

FINGERPRINT = f"nanoqwen-{project()['version']}"


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else dumps(value)}\n\n".encode()


class Events:
    """The events of a stream, as bytes, from what `hear` of its choices said.

    Nearly all of them tell a piece of plain text. They are made from a template of each choice, which only lacks it.
    """

    def __init__(self, choices: list, head: "Head", **more: Any):
        self.choices, self.head, self.more = choices, head, more
        self._templates: dict[tuple[int, str], list[bytes]] = {}

    def __call__(self, news: News) -> bytes:
        choice = self.choices[news.choice.index]
        if len(news.pieces) == 1 and news.finish is None and not choice.wants_logprobs:
            ((kind, text),) = news.pieces
            if isinstance(text, str):
                parts = self._templates.get((choice.index, kind)) or self._template(news.choice, kind)
                return dumps(text).encode().join(parts)
        return b"".join(self.event([chunk]) for chunk in choice.chunks(news))

    def event(self, choices: list[dict], **more: Any) -> bytes:
        return event(self.head(choices, chunk=True, **self.more | more))

    def _template(self, choice: Choice, kind: str) -> list[bytes]:
        mark = uuid.uuid4().hex
        (chunk,) = self.choices[choice.index].chunks(News(choice, 0.0, pieces=[(kind, mark)]))
        parts = self._templates[choice.index, kind] = self.event([chunk]).split(dumps(mark).encode())
        return parts


def usage(prompts: list[Choice], choices: list[Choice]) -> dict:
    """`prompts`: the first choice of each prompt, which the choices of one prompt share."""
    asked = sum(len(choice.reply.ids) for choice in prompts)
    said = sum(len(choice.reply.tokens) for choice in choices)
    thought = sum(choice.reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": sum(choice.reply.cached for choice in prompts)},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


class Head:
    """What every object of one answer begins with."""

    def __init__(self, kind: str, model: str):
        self.kind, self.model = kind, model
        self.id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def __call__(self, choices: list[dict], chunk: bool = False, **more: Any) -> dict:
        return {
            "id": self.id,
            "object": f"{self.kind}.chunk" if chunk and self.kind.startswith("chat") else self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }


# ---- /v1/chat/completions ----


class ChatChoice:
    """One choice's message, whole or as deltas. Reasoning stands under both names in use."""

    def __init__(self, index: int, logprobs: bool):
        self.index, self.wants_logprobs = index, logprobs
        self.texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self.calls: list[Call] = []
        self.logprobs: list[dict] = []
        self.finish: str | None = None

    def take(self, news: News) -> None:
        for kind, what in news.pieces:
            self.calls.append(what) if isinstance(what, Call) else self.texts[kind].append(what)
        self.logprobs += news.logprobs
        self.finish = news.finish or self.finish

    def whole(self) -> dict:
        content, reasoning = "".join(self.texts["content"]), "".join(self.texts["reasoning"])
        message = {"role": "assistant", "content": None if self.calls and not content else content, "refusal": None}
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if self.calls:
            message["tool_calls"] = [_call(call) for call in self.calls]
        return {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.wants_logprobs else None,
            "finish_reason": self.finish,
        }

    def chunks(self, news: News) -> list[dict]:
        """The `choices[0]` of the chunks that this news makes: none where there is nothing to tell yet."""
        deltas: list[dict] = []
        for kind, what in news.pieces:
            if isinstance(what, Call):
                deltas += _call_deltas(what, len(self.calls))
                self.calls.append(what)
                continue
            if not deltas or deltas[-1].keys() & ({"tool_calls", "content"} if kind == "reasoning" else {"tool_calls"}):
                deltas.append({})
            names = ("reasoning_content", "reasoning") if kind == "reasoning" else ("content",)
            for name in names:
                deltas[-1][name] = deltas[-1].get(name, "") + what
        if not deltas and (news.logprobs or news.finish):
            deltas.append({})
        found = [self._chunk(delta) for delta in deltas]
        if found:
            found[0]["logprobs"] = {"content": news.logprobs, "refusal": None} if self.wants_logprobs else None
            found[-1]["finish_reason"] = news.finish
        return found

    def first(self) -> dict:
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict) -> dict:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}


def _call(call: Call) -> dict:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_deltas(call: Call, index: int) -> list[dict]:
    """As OpenAI streams a call: its name first, then its arguments."""
    begin = {"index": index, **_call(call), "function": {"name": call.name, "arguments": ""}}
    return [
        {"tool_calls": [begin]},
        {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]},
    ]


# ---- /v1/completions ----


class TextChoice:
    """One choice's text, whole or in chunks. With `echo` the prompt and its probabilities come first."""

    def __init__(self, index: int, logprobs: bool, chat: Chat, echo: str = "", scores: list[dict] | None = None):
        self.index, self.wants_logprobs, self.chat = index, logprobs, chat
        self.texts = [echo] if echo else []
        self.finish: str | None = None
        self.offset = 0
        self.head = scores or []
        self.logprobs = list(self.head)

    def take(self, news: News) -> None:
        self.texts += [what for _, what in news.pieces]
        self.logprobs += news.logprobs
        self.finish = news.finish or self.finish

    def whole(self) -> dict:
        return self._choice("".join(self.texts), self.logprobs, self.finish)

    def chunks(self, news: News) -> list[dict]:
        text = "".join(what for _, what in news.pieces)
        return [self._choice(text, news.logprobs, news.finish)] if text or news.logprobs or news.finish else []

    def first(self) -> dict | None:
        """The echo."""
        return self._choice("".join(self.texts), self.head, self.finish) if self.texts or self.finish else None

    def _choice(self, text: str, logprobs: list[dict], finish: str | None) -> dict:
        told = self._logprobs(logprobs) if self.wants_logprobs else None
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": finish}

    def _logprobs(self, entries: list[dict]) -> dict:
        """The older form: lists side by side; the first token of an echoed prompt has no probability."""
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            name = token_name(entry)
            found["tokens"].append(name)
            found["token_logprobs"].append(entry["logprob"])
            top = {}
            for other in (*entry["top_logprobs"], entry):
                if other["logprob"] is not None:
                    top[token_name(other)] = max(other["logprob"], top.get(token_name(other), -1e9))
            found["top_logprobs"].append(top if entry["logprob"] is not None else None)
            found["text_offset"].append(self.offset)
            self.offset += len(entry["token"])
        return found


def token_name(entry: dict) -> str:
    """A token's text or, where its bytes are not whole characters, these as OpenAI writes them."""
    raw = bytes(entry["bytes"])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
