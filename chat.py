"""Text to ids and back: a checkpoint's tokenizer and chat template, and the stream of ids turned into shown text.

    messages -> `Chat.render` -> ids -> the model -> ids -> `ReplyStream` -> ("thinking" | "answer", text)

Everything a checkpoint knows about text is in its tokenizer.json (BPE over bytes: Sennrich et al. 2016, Radford et
al. 2019), its tokenizer_config.json and its chat template, a Jinja program that renders the messages as one text.
No id is hard-coded here; ids are looked up by their content.

The template is someone else's program and runs in a process of its own (formats/template.py).
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from operator import index
from pathlib import Path

from formats.json_file import read_json, uncollected
from formats.literal_text import LiteralText
from formats.messages import Message, normalise, normalise_tools, short, thinks
from formats.template import TemplateSandbox
from formats.tokenizer_files import (
    CONFIG_BYTES,
    TOKENIZER_BYTES,
    chat_templates,
    load_tokenizer,
    read_bytes,
    read_text,
    reraise_unless_library,
    special_tokens,
)

THINK_START, THINK_END = "<think>", "</think>"

# Appended to the reply when its thinking budget is spent (Qwen3 Technical Report, arXiv:2505.09388, section
# 4.3, and the code beside it in Qwen's documentation). `</think>` in it is encoded as one token.
EARLY_STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)

END_OF_TEXT = "<|endoftext|>"  # between documents; the end of a chat turn is defined by the template
# The empty thinking block that some templates write at the beginning of a turn without thinking.
EMPTY_THINKING = re.compile(r"(?P<tag><think>)?\s*</think>\s*")


class Chat:
    """A checkpoint's tokenizer and chat template: messages and text to ids, ids to text.

    `source` names the checkpoint in error messages. `tokenizer_json` is tokenizer.json as text or as bytes, or what it
    would hold (GGUF.tokenizer), `tokenizer_config` the content of tokenizer_config.json; `template`
    (chat_template.jinja) takes precedence over the one inside it.
    """

    def __init__(
        self, source: str, tokenizer_json: str | bytes | dict, tokenizer_config: dict, template: str | None = None
    ):
        self.source = source
        self.templates = chat_templates(source, tokenizer_config) if template is None else {"default": template}
        self._sandbox = TemplateSandbox()
        if self.templates:
            self._sandbox.start()  # it starts while the tokenizer is parsed
        tokenizer_json = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
        self.tokenizer = load_tokenizer(source, tokenizer_json)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.special_tokens = special_tokens(tokenizer_config)
        self.added = {index: token.content for index, token in added.items()}  # tokens beside the BPE's own
        self.think_start_id = self.tokenizer.token_to_id(THINK_START)
        self.think_end_id = self.tokenizer.token_to_id(THINK_END)

    @classmethod
    def from_pretrained(cls, src: str | Path) -> "Chat":
        """Reads the tokenizer and template of SRC: a directory, a hub id or a .gguf file.

        Raises ValueError, in one line, for a checkpoint without tokenizer or with a broken one.
        """
        from formats.adapter import text_path
        from formats.source import resolve

        path = text_path(resolve(src, tokenizer_only=True))
        if path.is_file():
            from formats.gguf.reader import GGUF

            with uncollected():
                return cls(str(path), *GGUF(path).tokenizer(check_merges=False))
        if not (path / "tokenizer.json").exists():
            raise ValueError(f"{path}: no tokenizer.json; take it from the model that this checkpoint was made from")
        tokenizer_json = read_bytes(path / "tokenizer.json", TOKENIZER_BYTES)
        config, template = path / "tokenizer_config.json", path / "chat_template.jinja"
        return cls(
            str(path),
            tokenizer_json,
            read_json(config) if config.exists() else {},
            read_text(template, CONFIG_BYTES) if template.exists() else None,
        )

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end token. What ends generation is the set in generation_config.json."""
        stated = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return self.tokenizer.token_to_id(END_OF_TEXT) if stated is None else stated

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The token that the template writes behind an assistant's turn. A base model's eos_token is another one."""
        said = "What was said."
        try:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
            text = self.render_text(turns, add_generation_prompt=False)
        except ValueError:
            return None
        behind = self.encode(text.rpartition(said)[2])
        return next((token_id for token_id in behind if token_id in self.added), None)

    def render(
        self,
        messages: list[dict],
        thinking: bool = True,
        tools: list[dict] | None = None,
        continue_final_message: bool = False,
        literal: bool = False,
    ) -> list[int]:
        """The prompt's ids for a chat, up to where the assistant's turn begins.

        `messages` are {"role": "system" | "user" | "assistant" | "tool", "content": str, ...} with, for an assistant,
        "reasoning_content" and "tool_calls", or any other spelling that formats/messages.py knows; `tools` are JSON
        schemas. The ids are those of transformers' `apply_chat_template(messages, tools, add_generation_prompt=True,
        enable_thinking=thinking)`. Like there, a special token written out in a message becomes that token, unless
        `literal`: then it stays text, and no message can end its turn or begin another one's.
        With `continue_final_message` the last message is the beginning of the assistant's turn.
        """
        flags = {"thinking": thinking, "continue_final_message": continue_final_message, "literal": literal}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, which is neither True nor False")
        render = self._continued if continue_final_message else self.render_text
        if not literal:
            return self.encode(render(messages, thinking, tools))
        text = LiteralText(self.tokenizer, self.added)
        messages, tools = text.marked(normalise(messages), normalise_tools(tools))
        return self._ids(text.encode, render(messages, thinking, tools))

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
        messages, tools = normalise(messages), normalise_tools(tools)
        text = self._template_text(messages, thinking, tools, add_generation_prompt)
        named = [message for message in messages if message.get("name") and message["role"] != "tool"]
        if named:
            nameless = [{key: value for key, value in message.items() if key != "name"} for message in messages]
            if self._template_text(nameless, thinking, tools, add_generation_prompt) == text:
                name = short(named[0]["name"])
                raise ValueError(f"{self.source}: the chat template leaves out the name {name}; say it in the content")
        return text

    def _template_text(self, messages: list[Message], thinking: bool, tools: list | None, ask: bool) -> str:
        named = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": ask,
            "enable_thinking": thinking,
        }
        try:
            return self._sandbox.render(self.templates[named], variables)
        except ValueError as error:
            raise ValueError(f"{self.source}: the chat template {error}") from None

    def turn(
        self, asked: list[dict], answer: dict, thinking: bool | None = None, tools: list[dict] | None = None
    ) -> tuple[str, str]:
        """-> (what the model sees, what it says) of an assistant's turn: what training learns, and learns it from.

        The first is the generation prompt, and where that opens a thinking that the turn does not have, its end. The
        second ends as the template ends a turn. `thinking`: what the prompt asks for; None: whether the turn thinks.
        ValueError where the template leaves out anything that the messages say.
        """
        asked, (answer,) = normalise(asked), normalise([answer])
        if thinking is False and thinks(answer):
            raise ValueError("enable_thinking is false, but this turn of the assistant thinks; keep one")
        thinking = thinks(answer) if thinking is None else thinking
        content = answer.get("content") or ""
        if content.lstrip().startswith(THINK_START) and THINK_END not in content:
            raise ValueError(
                f"the answer opens {THINK_START} and does not close it, as a reply that was cut short does"
            )
        prompt = self.render_text(asked, thinking, tools)
        whole = self.render_text([*asked, answer], thinking, tools, add_generation_prompt=False)
        bare = prompt.rstrip().removesuffix(THINK_END).rstrip().removesuffix(THINK_START)  # without an empty thinking
        shared = prompt if whole.startswith(prompt) or THINK_START not in prompt[len(bare) :] else bare
        if not whole.startswith(shared):
            if asked and asked[-1]["role"] == "assistant":
                raise ValueError("two turns of the assistant follow each other; join them")
            raise ValueError("the chat template's generation prompt is not how it begins this turn of the assistant")
        said = whole[len(shared) :]
        for what, text in _said(asked, answer, normalise_tools(tools)):
            if text.strip() not in (said if what == "answer" else whole):
                raise ValueError(f"the chat template leaves out the {what} {short(text)}")
        empty = None if thinks(answer) else EMPTY_THINKING.match(said)
        if empty:
            prompt, said = prompt if empty["tag"] else prompt + empty[0], said[empty.end() :]
        return prompt, said

    def _continued(self, messages: list[dict], thinking: bool, tools: list[dict] | None) -> str:
        """The text of a chat whose last message is the beginning of the reply, up to its end."""
        *asked, last = normalise(messages)
        content, reasoning = last.get("content") or "", last.get("reasoning_content") or ""
        if last["role"] != "assistant" or not asked or not content + reasoning or last.get("tool_calls"):
            raise ValueError("only a text that the assistant has begun, after other messages, can be continued")
        opened = content.rpartition("<think>")[2] if "<think>" in content and "</think>" not in content else None
        if opened is not None or not content:  # inside the thinking
            prompt = self.render_text(asked, True, tools)
            tag = "" if prompt.rstrip().endswith(THINK_START) else f"{THINK_START}\n"
            return prompt + tag + (reasoning if opened is None else opened.lstrip("\n"))
        end = "<<end of what was said>>"  # templates may strip what stands at the end of a content
        prompt, said = self.turn(asked, {**last, "content": content + end}, tools=tools)
        return prompt + said[: said.rindex(end)]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of plain text; special tokens written in it become those tokens. Around it none is added, unless
        `add_special_tokens`: then those that tokenizer.json asks for, as an embedding model's end of text."""
        if not isinstance(text, str):
            raise ValueError(f"text is of type {type(text).__name__}, not a str; messages are for render")
        return self._ids(lambda text: self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, text)

    def _ids(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """What `encode` makes of a text; ValueError where the library or its pattern fails."""
        try:
            return encode(text)
        except TypeError:
            raise ValueError("the text holds a byte that is not UTF-8 or half a surrogate pair; remove it") from None
        except BaseException as error:
            reraise_unless_library(error)
            raise ValueError(f"{self.source}: tokenizer.json's pattern fails on this text ({error})") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, with U+FFFD where their bytes are not UTF-8. Spaces stay as they are."""
        skipped = self.special_ids if skip_special_tokens else ()
        try:
            ids = [index(token) for token in ids]
        except (TypeError, ValueError):
            raise ValueError("ids are not the token ids of one text, as a list of whole numbers") from None
        if any(token < 0 for token in ids):
            raise ValueError(f"token id {min(ids)} is below 0")
        if any(token >= 1 << 32 for token in ids):
            raise ValueError(f"token id {max(ids)} is beyond every vocabulary")
        return b"".join(self.token_bytes(token) for token in ids if token not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token (an id without a token has none). They need not be whole characters."""
        if token_id in self.added:
            return self.added[token_id].encode()  # plain text, also where it looks like bytes in GPT-2's alphabet
        token = self.tokenizer.id_to_token(token_id) or ""
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, token))

    def opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside `<think>`, as Qwen3-Thinking-2507's always do."""
        for token_id in reversed(prompt_ids):
            if token_id == self.think_start_id:
                return True
            if token_id == self.think_end_id or token_id in self.special_ids:
                return False
        return False


def assistant_message(thinking: str, answer: str) -> dict:
    """An assistant's turn for the history. The template drops old thinking that has its own field."""
    return {"role": "assistant", "content": answer, "reasoning_content": thinking}


def _said(asked: list[Message], answer: Message, tools: list[dict] | None) -> Iterator[tuple[str, str]]:
    """What has to be found in a turn's text: ("answer" or what else it is, text)."""
    for tool in tools or []:
        function = tool.get("function", tool)
        yield "tool", str(function.get("name", "") if isinstance(function, dict) else function)
    for message in asked:
        role, content = message["role"], message.get("content") or ""
        if role == "assistant":  # older thinking may be left out
            yield "assistant's content", content.rpartition("</think>")[2]
        else:
            yield f"{role}'s content", content
            yield f"{role}'s reasoning", message.get("reasoning_content") or ""
            yield f"{role}'s name", str(message.get("name", "")) if role == "tool" else ""
        yield from (("tool call", call["function"]["name"]) for call in message.get("tool_calls", []))
    parts = [answer.get("reasoning_content") or "", *re.split("</?think>", answer.get("content") or "")]
    yield from (("answer", part) for part in parts)
    yield from (("answer", call["function"]["name"]) for call in answer.get("tool_calls", []))


# ---- ids to shown text ----


def _behind(ids: Sequence[int], token: int | None) -> Sequence[int]:
    """The ids behind the last `token`."""
    at = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == token), len(ids))
    return ids[at + 1 :]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one visible character, Latin-1's if that is visible, else one from U+0100 on."""
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
    """Text up to the first stop string. What may be the beginning of one is held back until it is decided.

    The stop string that is complete first ends the text, so the result does not depend on how the text is cut into
    pieces. Hidden text (that of a special token) is searched like any other but not returned. `stopped`: one
    was found.
    """

    def __init__(self, stop: Sequence[str] = ()):
        if not all(stop):
            raise ValueError("--stop: an empty string would stop at once; give at least one character")
        self._stop = tuple(stop)
        self._held, self._shown = "", []  # text, and for each of its characters whether it is shown
        self.stopped = False

    def push(self, text: str, hidden: bool = False) -> str:
        """The text that can be shown now."""
        if self.stopped:
            return ""
        held = self._held = self._held + text
        self._shown += [not hidden] * len(text)
        found = [(held.index(stop) + len(stop), held.index(stop)) for stop in self._stop if stop in held]
        if found:
            self.stopped = True
            shown = self._release(min(found)[1])
            self._held, self._shown = "", []
            return shown
        return self._release(len(held) - self._undecided(held))

    def flush(self) -> str:
        """At the end of the text: what is still held back."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        shown = "".join(c for c, is_shown in zip(self._held[:count], self._shown, strict=False) if is_shown)
        self._held, self._shown = self._held[count:], self._shown[count:]
        return shown

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


class ReplyStream:
    """A reply's ids one at a time to pieces of ("thinking" | "answer", text) that can be shown at once.

    The ids of `<think>` and `</think>` separate thinking from answer, not their text, which a model may talk about;
    neither they nor the line breaks that the template writes around them are shown. `prompt_ids` tell whether the
    reply begins inside thinking. `stopped`: one of the strings `stop` was found, in either part; it and all text after
    it are not shown. With `raw` everything is answer, and only special tokens are left out.
    """

    def __init__(self, chat: Chat, prompt_ids: Sequence[int] = (), stop: Sequence[str] = (), raw: bool = False):
        self._text = TextStream(chat)
        self._stop, self._special_ids = StopStrings(stop), chat.special_ids
        self._parts: dict[str, list[str]] = {"thinking": [], "answer": []}
        self._tags = {} if raw else {chat.think_start_id: "thinking", chat.think_end_id: "answer"}
        self.kind = "thinking" if not raw and chat.opens_thinking(prompt_ids) else "answer"
        # Right after the tag only: thinking that the caller has begun is continued unchanged.
        self._after_tag = self.kind == "thinking" and not chat.decode(_behind(prompt_ids, chat.think_start_id)).strip(
            "\n"
        )
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
        """What can be shown after the next id: nothing or one (kind, text)."""
        hidden = token_id in self._tags or token_id in self._special_ids
        text = self._text.flush() if hidden else ""  # of a character that remained incomplete
        text = self._stop.push(text) + self._stop.push(self._text.push(token_id), hidden)
        if token_id not in self._tags or self.stopped:
            return self._show(text)
        shown = self._show(text + self._stop.flush())
        self.kind, self._after_tag, self._line_breaks = self._tags[token_id], True, ""
        return shown

    def finish(self) -> list[tuple[str, str]]:
        """At the end of the ids: what is still held back."""
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
