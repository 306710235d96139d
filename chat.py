"""Text to ids and back: a checkpoint's tokenizer and chat template, and the stream of ids turned into shown text.

    messages -> `Chat.render` -> ids -> the model -> ids -> `ReplyStream` -> ("thinking" | "answer", text)

Everything a checkpoint knows about text is in its tokenizer.json (BPE over bytes: Sennrich et al. 2016, Radford et
al. 2019), its tokenizer_config.json and its chat template, a Jinja program that writes the messages out as one text.
No id and no tag's place is written in this file; ids are looked up by their content.

The template is somebody else's program and runs in a process of its own (formats/template.py).
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from formats.template import TemplateSandbox

THINK_START, THINK_END = "<think>", "</think>"

# What the model is made to say when its thinking budget is spent (Qwen3 Technical Report, arXiv:2505.09388, section
# 4.3, and the code beside it in Qwen's documentation). `</think>` in it is encoded as the one token.
EARLY_STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)

TOKENIZER_BYTES, CONFIG_BYTES = 128 << 20, 16 << 20  # the official files have 11 MB and 10 kB


class Chat:
    """A checkpoint's tokenizer and chat template: messages and text to ids, ids to text.

    `source` names the checkpoint in error messages. `tokenizer_json` is the text of tokenizer.json; `tokenizer_config`
    the content of tokenizer_config.json; a `template` beside them (chat_template.jinja) comes before the one inside it.
    """

    def __init__(self, source: str, tokenizer_json: str, tokenizer_config: dict, template: str | None = None):
        self.source = source
        self.templates = _templates(source, tokenizer_config) if template is None else {"default": template}
        self._sandbox = TemplateSandbox()
        if self.templates:
            self._sandbox.start()  # it gets ready while the tokenizer is parsed
        self.tokenizer = _tokenizer(source, tokenizer_json)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.special_tokens = _special_tokens(tokenizer_config)
        self.think_start_id = self.tokenizer.token_to_id(THINK_START)
        self.think_end_id = self.tokenizer.token_to_id(THINK_END)

    @classmethod
    def from_pretrained(cls, src: str | Path) -> "Chat":
        """Reads the tokenizer and template of SRC: a directory, a hub id or a .gguf file.

        Raises ValueError, in one line, for a checkpoint without tokenizer or with a broken one.
        """
        from formats.source import resolve

        path = resolve(src)
        if path.is_file():
            from formats.gguf.reader import GGUF

            tokenizer_json, tokenizer_config = GGUF(path).tokenizer()
            return cls(str(path), json.dumps(tokenizer_json), tokenizer_config)
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"{path}: no tokenizer.json; take it from the model that this checkpoint was made from")
        tokenizer_json = _read_text(path / "tokenizer.json", TOKENIZER_BYTES)
        config, template = path / "tokenizer_config.json", path / "chat_template.jinja"
        return cls(
            str(path),
            tokenizer_json,
            _read_json_object(config, CONFIG_BYTES) if config.exists() else {},
            _read_text(template, CONFIG_BYTES) if template.exists() else None,
        )

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end token. What ends generation is the set in generation_config.json."""
        return self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))

    def render(self, messages: list[dict], thinking: bool = True, tools: list[dict] | None = None) -> list[int]:
        """The prompt's ids for a chat, up to where the assistant's turn begins.

        `messages` are {"role": "system" | "user" | "assistant" | "tool", "content": str, ...} with, for an assistant,
        "reasoning_content" and "tool_calls"; `tools` are JSON schemas. The ids are those of transformers'
        `apply_chat_template(messages, tools, add_generation_prompt=True, enable_thinking=thinking)`. Like there, a
        special token written out in a message becomes that token.
        """
        return self.encode(self.render_text(messages, thinking, tools))

    def render_text(
        self,
        messages: list[dict],
        thinking: bool = True,
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that `render` encodes. Raises ValueError for no template, a bad one, or messages that it rejects."""
        if not self.templates:
            raise ValueError(f"{self.source}: no chat template, as in a base model; use --raw to continue plain text")
        named = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        variables = {
            **self.special_tokens,
            "messages": [_template_message(message) for message in _dicts(messages, "messages")],
            "tools": _dicts(tools, "tools") if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": thinking,
        }
        if not messages:
            raise ValueError("messages: an empty list; a chat needs at least one message")
        try:
            return self._sandbox.render(self.templates[named], variables)
        except ValueError as error:
            raise ValueError(f"{self.source}: the chat template {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it become those tokens, and none is added around it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError("the text holds a byte that is not UTF-8 or half a surrogate pair; remove it") from None
        except BaseException as error:
            _reraise_unless_library(error)
            raise ValueError(f"{self.source}: tokenizer.json's pattern fails on this text ({error})") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, with U+FFFD where their bytes are not UTF-8. Spaces stay as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (an id without a token has none). They need not be whole characters."""
        token = self.tokenizer.id_to_token(token_id) or ""
        try:
            return bytes(map(BYTE_OF_CHARACTER.__getitem__, token))
        except KeyError:
            return token.encode()  # an added token is kept as plain text

    def opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside `<think>`, as Qwen3-Thinking-2507's always do."""
        for token_id in reversed(prompt_ids):
            if token_id == self.think_start_id:
                return True
            if token_id == self.think_end_id or token_id in self.special_ids:
                return False
        return False


def assistant_message(thinking: str, answer: str) -> dict:
    """An assistant's turn for the history. Kept apart like this, the template itself drops thinking that is old."""
    return {"role": "assistant", "content": answer, "reasoning_content": thinking}


# ---- ids to shown text ----


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one visible character, its own where Latin-1 has one, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()


class TextStream:
    """Ids one at a time to text, never half a character; the pieces joined are what `Chat.decode` gives for all ids.

    A token is a run of bytes, so a character may lie across several tokens. Each token is decoded once.
    """

    def __init__(self, chat: Chat, skip_special_tokens: bool = False):
        self._token_bytes = lru_cache(maxsize=4096)(chat.token_bytes)
        self._skipped = chat.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes nothing yet."""
        return "" if token_id in self._skipped else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """At the end of the ids: U+FFFD if a character has remained incomplete."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Text up to the first stop string. What could be the beginning of one is held back until that is decided.

    The stop string that is complete first ends the text, so the result does not depend on how the text is cut into
    pieces. `stopped` tells that one was found.
    """

    def __init__(self, stop: Sequence[str] = ()):
        if not all(stop):
            raise ValueError("--stop: an empty string would stop at once; give at least one character")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """At the end of the text: what was held back after all."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


class ReplyStream:
    """A reply's ids one at a time to pieces of ("thinking" | "answer", text) that can be shown at once.

    The ids of `<think>` and `</think>` part thinking from answer, not their text, which a model may well talk about;
    neither they nor the line breaks that the template sets around them are shown. `prompt_ids` tell whether the reply
    begins inside thinking. `stopped` tells that one of the strings `stop` came up, in either part; it and all after it
    are not shown. With `raw` everything is answer and nothing but special tokens is left out.
    """

    def __init__(self, chat: Chat, prompt_ids: Sequence[int] = (), stop: Sequence[str] = (), raw: bool = False):
        self._text = TextStream(chat, skip_special_tokens=True)
        self._stop = StopStrings(stop)
        self._parts: dict[str, list[str]] = {"thinking": [], "answer": []}
        self._tags = {} if raw else {chat.think_start_id: "thinking", chat.think_end_id: "answer"}
        self.kind = "thinking" if not raw and chat.opens_thinking(prompt_ids) else "answer"
        self._after_tag = self.kind == "thinking"
        self._line_breaks = ""  # at the end of thinking: shown only if more thinking follows

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    @property
    def thinking(self) -> str:
        """All thinking that was shown so far."""
        return "".join(self._parts["thinking"])

    @property
    def answer(self) -> str:
        """All of the answer that was shown so far."""
        return "".join(self._parts["answer"])

    def push(self, token_id: int) -> list[tuple[str, str]]:
        """What the next id allows to be shown: nothing or one (kind, text)."""
        if token_id not in self._tags:
            return self._show(self._stop.push(self._text.push(token_id)))
        shown = self.finish()
        self.kind, self._after_tag, self._line_breaks = self._tags[token_id], True, ""
        return shown

    def finish(self) -> list[tuple[str, str]]:
        """At the end of the ids: what was held back after all."""
        return self._show(self._stop.push(self._text.flush()) + self._stop.flush())

    def _show(self, text: str) -> list[tuple[str, str]]:
        if self._after_tag:
            text = text.lstrip("\n")
        if self.kind == "thinking":
            text = self._line_breaks + text
            self._line_breaks = text[len(text.rstrip("\n")) :]
            text = text.rstrip("\n")
        if not text:
            return []
        self._after_tag = False
        self._parts[self.kind].append(text)
        return [(self.kind, text)]


# ---- what a checkpoint's files and a caller's messages may hold ----


def _read_text(path: Path, limit: int) -> str:
    """A file of at most `limit` bytes of UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: not a file; replace it by the published one")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a file of this name has at most {limit:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; replace it by the published one") from None


def _read_json_object(path: Path, limit: int) -> dict[str, Any]:
    text = _read_text(path, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); replace it by the published one") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON {type(content).__name__} where an object is expected")
    return content


# A name of an affix with a value, or a letter that is spelt as an escape, as which a name could hide.
AFFIX = re.compile(r'"(?:continuing_subword_prefix|end_of_word_suffix)"\s*+:\s*+(?!null\b|"")|\\u00[4-7]', re.ASCII)


def _tokenizer(source: str, tokenizer_json: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which must be BPE over bytes: streams of text rely on it."""
    try:
        affixed = False
        if AFFIX.search(tokenizer_json):  # rare, and reading 11 MB of JSON takes a fifth of a second
            model = json.loads(tokenizer_json)["model"]
            affixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        # With affixes the library may abort the whole process, so they are not even shown to it.
        tokenizer = None if affixed else Tokenizer.from_str(tokenizer_json)
    except BaseException as error:
        _reraise_unless_library(error)
        raise ValueError(f"{source}: tokenizer.json can't be read ({error}); replace it by the published one") from None
    if not tokenizer or not isinstance(tokenizer.model, models.BPE):
        raise ValueError(f"{source}: tokenizer.json is not a byte-level BPE, the only kind that Qwen3 has")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(f"{source}: tokenizer.json has no ByteLevel decoder, which all of Qwen3's have")
    tokenizer.no_truncation()  # the file may keep settings of somebody's training
    tokenizer.no_padding()
    return tokenizer


def _reraise_unless_library(error: BaseException) -> None:
    """A panic of the tokenizers library is a BaseException without a public name; Ctrl-C and exits are not for us."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _templates(source: str, tokenizer_config: dict) -> dict[str, str]:
    """Name to chat template; the field holds one string or a list of {"name", "template"}. A base model has none."""
    field = tokenizer_config.get("chat_template") or []
    listed = [{"name": "default", "template": field}] if isinstance(field, str) else field
    try:
        templates = {entry["name"]: entry["template"] for entry in listed}
    except (TypeError, KeyError):
        templates = {"default": None}
    if templates and not (
        isinstance(templates.get("default"), str) and all(isinstance(text, str) for text in templates.values())
    ):
        raise ValueError(
            f"{source}: tokenizer_config.json: chat_template must be a text, or a list of texts with one named default"
        )
    return templates


def _special_tokens(tokenizer_config: dict) -> dict[str, str]:
    """bos_token, eos_token, ... as text, for the template; each is stored as text or as {"content": text}."""
    tokens = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _dicts(values: list[dict], name: str) -> list[dict]:
    wrong = [value for value in values if not isinstance(value, dict)]
    if wrong:
        raise ValueError(f"{name}: {repr(wrong[0])[:80]} is not a dict; give a list of them, as JSON has them")
    return values


def _template_message(message: dict) -> dict:
    """A message as templates expect it: no fields that are None, and reasoning under the one name they read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
