"""Replies that have to be JSON or a tool call: a grammar rules out the tokens that can't continue it.

llguidance (https://github.com/guidance-ai/llguidance) holds the tokenizer's vocabulary as a tree of bytes, and says for
each state of a grammar which tokens may follow, in less than a millisecond. `Constraint` applies that to the logits of
one reply, and lets the model think first.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from chat import Chat
from serving.errors import refused
from serving.tool_calls import BEGIN, END

# One way to write JSON, json.dumps': where white space is free, a small model writes it for ever.
COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}

# No other thread of Python runs while a grammar is read, which takes a tenth of a second for so many characters.
MOST_CHARACTERS = 100_000

# Patterns that must all match (allOf) take llguidance more than twice as long with each one: 13 take 0.1 s, 20 a
# minute. Only ending the process stops it, so a grammar with this many is first read by a process of its own.
MANY_PATTERNS = 8
EXAMINE = """\
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
from llguidance import LLMatcher
LLMatcher.validate_grammar(sys.stdin.read())
"""


class Grammars:
    """Grammars over the tokens of one checkpoint. `ends` are the ids that end a reply."""

    def __init__(self, chat: Chat, vocab_size: int, ends: set[int]):
        self.chat, self.vocab_size, self.ends = chat, vocab_size, sorted(ends)
        self._lock, self._one = threading.Lock(), asyncio.Semaphore(1)

    def prepare(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made at the first call. For 150,000 tokens that takes most of a second,
        in which no other thread of Python runs, so a server does it before anybody asks."""
        with self._lock:
            return self._tokenizer

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(Vocabulary(self.chat, self.vocab_size, self.ends[0])))

    @cached_property
    def _tags(self) -> bool:
        """Whether the checkpoint writes a call's arguments in tags of their own, not as JSON."""
        return any("<function=" in template for template in self.chat.templates.values())

    async def examine(self, grammar: str) -> None:
        """Raises ValueError for a grammar whose patterns would keep `matcher` busy for more than seconds."""
        if grammar.count('"pattern"') + grammar.count('"format"') < MANY_PATTERNS or len(grammar) > MOST_CHARACTERS:
            return
        async with self._one:
            nowhere = asyncio.subprocess.DEVNULL
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": nowhere, "stderr": nowhere}
            child = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", EXAMINE, **pipes)
            try:
                await child.communicate(grammar.encode())
            finally:
                if child.returncode is None:  # the client has gone
                    child.kill()
                    await child.wait()
        if child.returncode < 0:
            raise ValueError("its patterns are too many to hold together; give fewer")

    def matcher(self, grammar: str) -> LLMatcher:
        """Raises ValueError for a schema that can't be followed exactly, or is too large."""
        if len(grammar) > MOST_CHARACTERS:
            raise ValueError(
                f"{len(grammar):,} characters, but at most {MOST_CHARACTERS:,} are read; shorten the schema"
            )
        found = LLMatcher(self.prepare(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        wrong = [found.get_error()] if found.is_error() else found.get_grammar_warnings()
        if not wrong:
            begun = found.deep_copy()
            begun.compute_bitmask()
            wrong = ["no text fits it"] if begun.is_error() else []
        if wrong:
            raise ValueError(f"can't be followed ({' '.join(' '.join(wrong).split())[:300]})")
        return found

    def answer(self, schema: dict, tools: Sequence[dict] = (), parallel: bool = True) -> str:
        """JSON of this schema; or, where tools are offered, calls."""
        choices = ["answer", *([self._some("call", parallel)] if tools else [])]
        return "\n".join([f"start: {' | '.join(choices)}", f"answer: {_json(schema)}", *self._calls(tools)])

    def calls(self, tools: Sequence[dict], parallel: bool = True) -> str:
        """One call of these functions or, with `parallel`, several."""
        return "\n".join([f"start: {self._some('call', parallel)}", *self._calls(tools)])

    def text_or_calls(self, tools: Sequence[dict]) -> str:
        """Any text, with calls in it whose arguments follow the functions' schemas."""
        return "\n".join(["start: TEXT (call TEXT)*", "TEXT: /(?s:.*)/", *self._calls(tools)])

    @staticmethod
    def _some(rule: str, parallel: bool) -> str:
        return f'{rule} ("\\n" {rule})*' if parallel else rule

    def _calls(self, tools: Sequence[dict]) -> list[str]:
        if not tools:
            return []
        lines = []
        for number, tool in enumerate(tools):
            function = tool["function"]
            parameters = function.get("parameters") or {
                "type": "object",
                "properties": {},
                "additionalProperties": False,
            }
            rules = _tagged if self._tags else _object
            lines += rules(f"f{number}", function["name"], parameters)
        bodies = " | ".join(f"f{number}" for number in range(len(tools)))
        return [f'call: {self._token(BEGIN)} "\\n" ({bodies}) "\\n" {self._token(END)}', *lines]

    def _token(self, text: str) -> str:
        """A token of its own where the tokenizer has one, else its text."""
        return text if self.chat.tokenizer.token_to_id(text) is not None else json.dumps(text)


def _json(schema: dict) -> str:
    return f"%json {json.dumps({**schema, **COMPACT})}"


def _object(rule: str, name: str, parameters: dict) -> list[str]:
    before = json.dumps('{"name": ' + json.dumps(name) + ', "arguments": ')
    return [f'{rule}: {before} {rule}_arguments "}}"', f"{rule}_arguments: {_json(parameters)}"]


def _tagged(rule: str, name: str, parameters: dict) -> list[str]:
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    parts, lines = [], []
    for number, (key, given) in enumerate(properties.items()):
        part, begin = f"{rule}_{number}", json.dumps(f"<parameter={key}>\n")
        schema = given if isinstance(given, dict) else {}
        if schema.get("type") == "string" and "enum" not in schema and "pattern" not in schema:
            lines += [f"{part}: {begin} {part}_text", f'{part}_text[suffix="\\n</parameter>\\n"]: /(?s:.*)/']
        elif schema.get("type") == "string" and "enum" in schema:
            words = " | ".join(json.dumps(str(word)) for word in schema["enum"])
            lines += [f'{part}: {begin} ({words}) "\\n</parameter>\\n"']
        else:
            shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
            lines += [
                f'{part}: {begin} {part}_value "\\n</parameter>\\n"',
                f"{part}_value: {_json({**shared, **schema})}",
            ]
        parts.append(part if key in required else f"({part})?")
    return [f'{rule}: {json.dumps(f"<function={name}>" + chr(10))} {" ".join(parts)} "</function>"', *lines]


class Vocabulary:
    """A checkpoint's tokens as llguidance asks for them. It would read tokenizer.json too, which takes twice as long
    and makes a second tokenizer."""

    def __init__(self, chat: Chat, size: int, end: int):
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [chat.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(chat.added)
        self._chat = chat

    def __call__(self, text: bytes | str) -> list[int]:
        return self._chat.encode(text.decode() if isinstance(text, bytes) else text)


class Constraint:
    """What a grammar makes of the logits of one reply: `mask` and `intervene` of inference/decode.py's `Reply`.

    `opened`: the reply begins inside the thinking. `thinks`: it may begin with `<think>`. In the thinking everything
    may come but an end of the reply; behind it the line break that the template writes there is inserted, and there
    the grammar begins. `param`: the field that asked for it.
    """

    def __init__(self, grammars: Grammars, matcher: LLMatcher, opened: bool, thinks: bool, param: str):
        self.grammars, self.matcher, self.param = grammars, matcher, param
        chat = grammars.chat
        self._think, self._end_think = chat.think_start_id, chat.think_end_id
        self._break = chat.encode("\n\n")
        self._thinking, self._may_think = opened, thinks and not opened and self._think is not None
        self._closed, self._seen = False, 0  # the thinking has just ended; tokens that were taken
        self._bits = np.zeros((grammars.vocab_size + 31) // 32, np.int32)

    def intervene(self, tokens: list[int]) -> list[int]:
        """The line break behind the end of the thinking."""
        return self._break if self._thinking and tokens[-1] == self._end_think else []

    def mask(self, tokens: list[int], logits: Tensor) -> Tensor:
        """Logits [V] with -inf for what the grammar rules out."""
        for token in tokens[self._seen :]:
            self._take(token)
        self._seen = len(tokens)
        if self._thinking:
            logits = logits.clone()
            logits[self.grammars.ends] = -torch.inf
            return logits
        matcher = self.matcher
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if matcher.is_error():
            raise refused(self.param, f"is too complex ({matcher.get_error()[:200]})")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].view(bool)
        ends = self.grammars.ends
        allowed[ends] = allowed[ends].any() or matcher.is_stopped()
        if self._may_think and not tokens:
            allowed[self._think] = True
        return torch.where(torch.from_numpy(allowed).to(logits.device), logits, -torch.inf)

    def _take(self, token: int) -> None:
        if self._thinking:
            self._thinking, self._closed = token != self._end_think, token == self._end_think
        elif self._may_think and token == self._think and self._seen == 0:
            self._thinking = True
        elif not (self._closed and token in self._break) and token not in self.grammars.ends:
            self._closed = False
            self.matcher.consume_token(token)
