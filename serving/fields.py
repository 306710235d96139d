"""The fields of a request: which there are, what each may be, and what is answered to any other.

Each table maps a field to the function that reads its value. Null means absent. An unknown field, or a value that
can't be honoured, is a 400 that names it: nothing that a client asks for is ignored.
"""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from console import did_you_mean
from formats.messages import ARGUMENTS, REASONING, TEXT_PARTS, THINKING_PARTS, short
from serving.errors import ApiError, refused

Reader = Callable[[Any], Any]
"""Returns the value in the form used here, or raises ValueError that says what is wrong with it."""

MOST_CHOICES, MOST_STOPS, STOP_CHARACTERS, MOST_BIASES, MOST_LOGPROBS = 128, 16, 256, 1024, 20
MOST_PROMPTS = 2048  # in one request, as in OpenAI's API
SIGNED_64 = 1 << 63
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def number(low: float, high: float) -> Reader:
    def read(value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{short(value)} is not a number from {low} to {high}")
        return float(value)

    return read


def whole(low: int, high: float = math.inf) -> Reader:
    def read(value):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            most = "up" if high == math.inf else f"to {high}"
            raise ValueError(f"{short(value)} is not a whole number from {low} {most}")
        return value

    return read


def boolean(value):
    if not isinstance(value, bool):
        raise ValueError(f"{short(value)} is neither true nor false")
    return value


def text(value):
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not a text")
    return value


def listed(value):
    if not isinstance(value, list):
        raise ValueError(f"{short(value)} is not a list")
    return value


def only(*values: Any, why: str = "this server does no other") -> Reader:
    """A field of other servers, accepted only with the values that ask for what happens here anyway."""

    def read(value):
        if not any(type(value) is type(one) and value == one for one in values):
            known = " or ".join(map(repr, values))
            raise ValueError(f"{short(value)} can't be honoured; leave it out" + (f" or give {known}" * bool(values)))
        return value

    return read


def table(fields: dict[str, Reader]) -> Reader:
    """An object with these fields."""

    def read(value):
        if not isinstance(value, dict):
            raise ValueError(f"{short(value)} is not an object")
        found = SimpleNamespace(**dict.fromkeys(fields))
        for name, given in value.items():
            if name not in fields:
                raise refused(name[:64], f"there is no such field{did_you_mean(name[:64], fields)}")
            if given is not None:
                setattr(found, name, _value(name, given, fields[name]))
        return found

    return read


def _value(name: str, given: Any, read: Reader) -> Any:
    try:
        return read(given)
    except ApiError as error:  # a field inside
        raise ApiError(400, f"{name}.{error.message}", f"{name}.{error.param}") from None
    except ValueError as error:
        raise refused(name, str(error)) from None


def read(body: Any, fields: dict[str, Reader]) -> SimpleNamespace:
    """The fields of a request's body; None for those not given."""
    try:
        return table(fields)(body)
    except ValueError as error:
        raise ApiError(400, f"the body {error}") from None


# ---- values with a form of their own ----


def stop(value):
    """One string or several that end the reply."""
    texts = [value] if isinstance(value, str) else listed(value)
    if not all(isinstance(one, str) and 0 < len(one) <= STOP_CHARACTERS for one in texts):
        raise ValueError(f"{short(value)} is not a text, or a list of texts, of 1 to {STOP_CHARACTERS} characters")
    if len(texts) > MOST_STOPS:
        raise ValueError(f"{len(texts)} texts, but at most {MOST_STOPS} are looked for")
    return tuple(texts)


def logit_bias(value):
    """{token id as a string: what is added to its logit, from -100 (never chosen) to 100}"""
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise ValueError(f"{short(value)} is not an object of at most {MOST_BIASES} token ids")
    found = {}
    for token, bias in value.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise ValueError(f"{short(token)} is not a token id")
        found[int(token)] = number(-100, 100)(bias)
    return found


def tools(value):
    """OpenAI's list of functions: {type, function: {name, description, parameters, strict}} each."""
    for place, tool in enumerate(listed(value)):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function" or set(tool) - {"type", "function"}:
            raise ValueError(f"[{place}] is not {{type: function, function: {{name, ...}}}}")
        if extra := set(function) - {"name", "description", "parameters", "strict"}:
            raise ValueError(f"[{place}].function.{min(extra)}: there is no such field")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise ValueError(f"[{place}].function.name: {short(name)} is not a name of letters, digits, _, . and -")
        if not isinstance(parameters, dict | None):
            raise ValueError(f"[{place}].function.parameters: {short(parameters)} is not a JSON schema")
        if not isinstance(function.get("description"), str | None) or not isinstance(
            function.get("strict"), bool | None
        ):
            raise ValueError(f"[{place}].function: description is a text, strict is true or false")
    names = [tool["function"]["name"] for tool in value]
    if len(set(names)) < len(names):
        raise ValueError("two functions have the same name")
    return value or None


def tool_choice(value):
    """-> "none", "auto", "required", or {"name"} of the one function that must be called."""
    if isinstance(value, dict):
        function = value.get("function")
        known = value.get("type") == "function" and set(value) == {"type", "function"}
        if (
            not known
            or not isinstance(function, dict)
            or set(function) != {"name"}
            or not isinstance(function["name"], str)
        ):
            raise ValueError(f"{short(value)} is not {{type: function, function: {{name}}}}")
        return {"name": function["name"]}
    if value not in ("none", "auto", "required"):
        raise ValueError(f"{short(value)} is none of none, auto, required and a function")
    return value


def response_format(value):
    """-> the JSON schema that the answer must follow; None for plain text."""
    kinds = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{short(value)} has none of the types text, json_object and json_schema")
    if extra := set(value) - kinds[kind]:
        raise ValueError(f"{short(min(extra))}: there is no such field beside the type {kind}")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    given = value.get("json_schema")
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise ValueError("json_schema has no schema: give {type, json_schema: {name, schema}}")
    if extra := set(given) - {"name", "description", "schema", "strict"}:
        raise ValueError(f"json_schema.{short(min(extra))}: there is no such field")
    if not isinstance(given.get("strict"), bool | None):
        raise ValueError(f"json_schema.strict: {short(given['strict'])} is neither true nor false")
    return given["schema"]


MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING[:3]}
# Empty fields of an answer, which client libraries send back with it.
EMPTY_FIELDS = {"refusal", "annotations", "audio"}


def messages(value):
    """Checks field names only; formats/messages.py reads the messages, and knows more spellings than this API has."""
    for place, message in enumerate(listed(value)):
        if not isinstance(message, dict):
            raise ValueError(f"[{place}]: {short(message)} is not an object with role and content")
        for name, given in message.items():
            if given is not None and name not in MESSAGE_FIELDS and not (name in EMPTY_FIELDS and not given):
                raise ValueError(f"[{place}].{name}: there is no such field{did_you_mean(name, MESSAGE_FIELDS)}")
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in TEXT_PARTS + THINKING_PARTS:
                raise ValueError(f"[{place}].content: a part of type {short(kind)} is not text; only text is supported")
            if extra := set(part) - {"type", "text", kind}:
                raise ValueError(f"[{place}].content: there is no field {short(min(extra))} in a part")
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", {}) if isinstance(call, dict) else None
            if not isinstance(function, dict) or set(call) - {"id", "type", "function", "index"}:
                raise ValueError(f"[{place}].tool_calls: {short(call)} is not {{id, type, function}}")
            if set(function) - {"name", *ARGUMENTS}:
                raise ValueError(f"[{place}].tool_calls: {short(function)} is not {{name, arguments}}")
    return value


def prompt(value):
    """-> a list of prompts, each a string or token ids."""
    prompts = (
        [value] if isinstance(value, str) or (isinstance(value, list) and value and _ids(value)) else listed(value)
    )
    if not prompts or not all(isinstance(one, str) or (isinstance(one, list) and _ids(one)) for one in prompts):
        raise ValueError(f"{short(value)} is not a text, token ids, or a list of them")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"{len(prompts):,} of them, but at most {MOST_PROMPTS:,} are taken at once; send fewer")
    return prompts


def _ids(value: list) -> bool:
    return all(type(token) is int for token in value)


def ids(value):
    if not isinstance(value, list) or not _ids(value):
        raise ValueError(f"{short(value)} is not a list of token ids")
    return value


# ---- the endpoints' tables ----

STREAM_OPTIONS = table({"include_usage": boolean, "include_obfuscation": only(False)})
TEMPLATE_OPTIONS = table({"enable_thinking": boolean})

SAMPLING = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "top_k": whole(-1),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "seed": whole(-SIGNED_64, SIGNED_64 - 1),
}
GENERATION = {
    **SAMPLING,
    "model": text,
    "stream": boolean,
    "stream_options": STREAM_OPTIONS,
    "stop": stop,
    "n": whole(1, MOST_CHOICES),
    "logit_bias": logit_bias,
    "user": text,
}
CHAT = {
    **GENERATION,
    "messages": messages,
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": boolean,
    "max_tokens": whole(1),
    "max_completion_tokens": whole(1),
    "logprobs": boolean,
    "top_logprobs": whole(0, MOST_LOGPROBS),
    "response_format": response_format,
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "enable_thinking": boolean,
    "reasoning_effort": only("none"),
    "thinking_budget": whole(1),
    "continue_final_message": boolean,
    "add_generation_prompt": boolean,
    # For the client's own use, and services that this server does not have.
    "safety_identifier": text,
    "prompt_cache_key": text,
    "store": only(False),
    "modalities": only(["text"]),
    "service_tier": only("auto", "default"),
}
COMPLETION = {
    **GENERATION,
    "prompt": prompt,
    "max_tokens": whole(0),
    "logprobs": whole(0, MOST_LOGPROBS),
    "echo": boolean,
    "best_of": only(1),
    "suffix": only(""),
}
EMBEDDING = {
    "model": text,
    "input": prompt,
    "dimensions": whole(1),
    "encoding_format": only("float", "base64"),
    "user": text,
}
TOKENIZE = {
    "model": text,
    "prompt": text,
    "messages": messages,
    "tools": tools,
    "add_special_tokens": boolean,
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "return_token_strs": boolean,
}
DETOKENIZE = {"model": text, "tokens": ids}
