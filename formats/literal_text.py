"""Chat messages in which a special token's text stays text: nobody can end their turn from inside a message.

    marked(messages, tools)  ->  the template  ->  one text  ->  encode  ->  ids

A template writes its own special tokens and the messages' words into one text, where both look alike. So each special
token's text in a message gets a mark inside, a character that is nowhere else, before the template sees it; in the
rendered text what is still whole is the template's. The marks are left out again when the text is encoded.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

from formats.messages import Message

THINK = re.compile(r"(\s*<think>)(.*?)(</think>|\Z)(.*)", re.DOTALL)


class LiteralText:
    """Marks the messages of one prompt and encodes its text. `added`: the tokenizer's added tokens, {id: text}."""

    def __init__(self, tokenizer: Tokenizer, added: dict[int, str]):
        self.tokenizer, self.added, self.mark = tokenizer, added, ""
        texts = sorted((text for text in added.values() if len(text) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def marked(self, messages: list[Message], tools: list[dict] | None) -> tuple[list[Message], list[dict] | None]:
        """Copies with marks. A `<think>` at the beginning of an assistant's content, with its end, stays one: old
        clients keep the thinking there."""
        self.mark = unused_character([messages, tools])
        found = []
        for message in messages:
            copy, content = self._marked(message), message.get("content") or ""
            thought = THINK.fullmatch(content) if message["role"] == "assistant" else None
            if thought and not message.get("reasoning_content"):
                copy["content"] = thought[1] + self._marked(thought[2]) + thought[3] + self._marked(thought[4])
            found.append(copy)
        return found, self._marked(tools)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + self.mark + found[0][1:], value)
        if isinstance(value, dict):
            return {self._marked(name): self._marked(each) for name, each in value.items()}
        return [self._marked(each) for each in value] if isinstance(value, list | tuple) else value

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are those without a mark."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        if self.mark not in text:
            return found.ids
        ids, start = [], 0
        for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if token in self.added:
                ids += [*self.plain(text[start:begin].replace(self.mark, "")), token]
                start = end
        return ids + self.plain(text[start:].replace(self.mark, ""))

    def plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        normalizer, split = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        pieces = [text] if split is None else [piece for piece, _ in split.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self.tokenizer.model.tokenize(piece)]


def unused_character(value: Any) -> str:
    """A character that no text of this JSON data holds, neither as it is nor escaped: one without any meaning."""
    text = json.dumps(value, ensure_ascii=False).lower()
    for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900)):  # noncharacters, then the private ones
        if chr(code) not in text and f"{code:x}" not in text:
            return chr(code)
    raise ValueError("messages hold every one of Unicode's private characters; leave one out")
