"""A model's tool calls, found in the text of its answer while it comes.

    <tool_call>                                    <tool_call>
    {"name": "f", "arguments": {"x": 3}}           <function=f>
    </tool_call>                                   <parameter=x>
                                                   3
                                                   </parameter>
    Qwen3 (Hermes' form)                           </function>
                                                   </tool_call>      Qwen3-Coder, Qwen3.5

A call is given out once it is whole. One that is unfinished, malformed or of a function that was not offered is text.
"""

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*(?:</function>)?\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


@dataclass
class Call:
    name: str
    arguments: str
    """JSON, an object."""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class CallParser:
    """Text in pieces to a list of texts and `Call`s. `tools` are the request's."""

    def __init__(self, tools: list[dict]):
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._held = ""
        self.count = 0

    def push(self, text: str) -> list[str | Call]:
        """What is decided now. White space in front of a call and between two belongs to them."""
        found: list[str | Call] = []
        self._held += text
        while BEGIN in self._held:
            before, _, behind = self._held.partition(BEGIN)
            if END not in behind:
                break
            body, _, self._held = behind.partition(END)
            call = self._call(body)
            if call is None:
                found.append(before + BEGIN + body + END)
            else:
                found += [kept] if (kept := before.rstrip()) else []
                found.append(call)
                self.count += 1
        if BEGIN not in self._held:
            shown = len(self._held) - _undecided(self._held)
            if shown:
                found.append(self._held[:shown])
                self._held = self._held[shown:]
        return found

    def finish(self) -> list[str | Call]:
        """At the end of the answer: what is no call after all."""
        held, self._held = self._held, ""
        return [] if not held or (self.count and not held.strip()) else [held]

    def _call(self, body: str) -> Call | None:
        found = _from_json(body) if body.lstrip().startswith("{") else self._from_tags(body)
        if found is None or found[0] not in self._parameters:
            return None
        return Call(found[0], json.dumps(found[1], ensure_ascii=False))

    def _from_tags(self, body: str) -> tuple[str, dict] | None:
        function = FUNCTION.fullmatch(body)
        if function is None:
            return None
        name, given = function[1].strip(), function[2]
        if PARAMETER.sub("", given).strip():
            return None
        properties = self._parameters.get(name, {}).get("properties")
        properties = properties if isinstance(properties, dict) else {}
        return name, {key: _typed(value, properties.get(key)) for key, value in PARAMETER.findall(given)}


def _from_json(body: str) -> tuple[str, dict] | None:
    try:
        call = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    arguments = call.get("arguments", {}) if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
        return None
    return call["name"], arguments


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _typed(value: str, schema: Any) -> Any:
    """A parameter's text as JSON, unless the schema says that it is a text."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return value


def _undecided(text: str) -> int:
    """The length of the end of `text` that may belong to a call: white space, and the beginning of `<tool_call>`."""
    begun = next((n for n in range(min(len(BEGIN) - 1, len(text)), 0, -1) if BEGIN.startswith(text[-n:])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())
