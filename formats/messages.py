"""Chat messages in the form that chat templates read, from the many forms that files and clients use.

Chats, prompt files and training rows all pass through `normalise`. Fields that change the text, or what is learnt from
it, are honoured or rejected by name, never dropped:

    role            developer is system, human and prompter are user, gpt, chatgpt, bing, bard, model and ai are
                    assistant, function, observation and tool_response are tool, each in capitals too; others are
                    rejected
    from, value     ShareGPT's names of role and content; from: function_call holds a call as JSON
    content         a text, or a list of parts: texts are joined, thinking goes to the reasoning; images and
                    Anthropic's tool_use and tool_result are rejected
    reasoning       under reasoning_content, reasoning, thinking, thought or cot; two that differ are rejected
    tool_calls      OpenAI's or bare calls; arguments (parameters, input, args) as an object or as its JSON;
                    function_call is one of them
    tool_call_id    results come in the order of their calls, since Qwen's templates write no ids
    weight          0 or 1, whether training learns the turn; also as train, training (axolotl), trainable, learn and
                    loss (ms-swift), or the opposite as masked and ignore; a mask of parts of a turn is rejected
    tools           and functions, function_calls, which other tools write into a message: rejected

Fields that are null are left out; others (name, ...) are passed on to the template.
"""

import json
import re
from typing import Any

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}
OTHER_ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
OTHER_ROLES |= {"ai": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool"}
OTHER_ROLES |= {"function_call": "assistant"}
REASONING = ("reasoning_content", "thinking", "reasoning")  # the order of transformers' apply_chat_template
REASONING += ("thought", "thoughts", "think", "chain_of_thought", "cot")
WEIGHTS = ("weight", "train", "training", "loss", "trainable", "train_on_turn", "learn")
MASKED = ("masked", "ignore", "ignore_loss")  # the opposite of a weight
ELSEWHERE = {
    "tools": "beside the messages",
    "functions": "beside the messages, as tools",
    "function_calls": "in the message's tool_calls: [{name, arguments}]",
}
PARTLY = ("train_detail", "training_detail", "loss_scale", "loss_mask", "mask")  # which of a turn's words are learnt
ARGUMENTS = ("arguments", "parameters", "input", "args")
TEXT_PARTS, THINKING_PARTS = ("text", "input_text", "output_text"), ("thinking", "reasoning")
CALL_PARTS = {
    "tool_use": "the message's tool_calls: [{name, arguments}]",
    "tool_result": "a message of its own: role tool, content, tool_call_id",
}
MEDIA = re.compile(r"(image|img|picture|video|audio)s?(_?(path|url|file|name|id|bytes)s?)?", re.IGNORECASE)


def normalise(messages: Any, place: str = "messages") -> list[Message]:
    """New messages with role and content (and reasoning_content, tool_calls, weight). ValueError names `place`, the
    number of the message and its field."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{place}: {short(messages)} is not a list of messages")
    if not messages:
        raise ValueError(f"{place}: an empty list; a chat needs at least one message")
    return _results_in_order([_message(message, f"{place}[{number}]") for number, message in enumerate(messages)])


def normalise_tools(tools: Any, place: str = "tools") -> list[dict] | None:
    """The tools as a template gets them, None if there are none. JSON texts are parsed."""
    tools = _parsed(tools, place) if isinstance(tools, str) and tools.strip() else tools
    if tools in (None, "", [], {}):
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list | tuple):
        raise ValueError(f"{place}: {short(tools)} is not a list of tools")
    tools = [_parsed(tool, place) if isinstance(tool, str) else tool for tool in tools]
    for tool in tools:
        if not isinstance(tool, dict):
            raise ValueError(f"{place}: {short(tool)} is not a dict; give a list of them, as JSON has them")
    return tools


def is_not_text(name: Any) -> bool:
    """Whether a field of this name, of a message or a row, holds what belongs to a chat and can't be said in it."""
    return name in ("refusal", "reasoning_details") or (isinstance(name, str) and MEDIA.fullmatch(name) is not None)


def thinks(message: Message) -> bool:
    """Whether a normalised assistant turn has any reasoning, in its field or before a `</think>`."""
    before, closed, _ = (message.get("content") or "").partition("</think>")
    return bool(message.get("reasoning_content")) or (bool(closed) and bool(before.replace("<think>", "").strip()))


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(given: Any, place: str) -> Message:
    if not isinstance(given, dict):
        raise ValueError(f"{place}: {short(given)} is not a dict; a message has role and content")
    message = {key: value for key, value in given.items() if value is not None}
    for other, name in (("from", "role"), ("value", "content")):
        if other in message:
            found = message.pop(other)
            kept = message.setdefault(name, found)
            if kept != found and (name != "role" or _usual_role(kept) != _usual_role(found)):
                raise ValueError(f"{place}: {name} and {other} differ; keep one")
    for name in filter(is_not_text, message):
        if message[name]:
            raise ValueError(f"{place}.{name}: {short(message[name])} is not text; only text is supported")
    for name in PARTLY:
        if name in message:
            raise ValueError(f"{place}.{name}: a turn is learnt whole or not at all (weight 1 or 0)")
    for name, where in ELSEWHERE.items():
        if message.get(name):
            raise ValueError(f"{place}.{name}: write them {where}")
    if message.get("channel", "final") != "final":  # of OpenAI's harmony; the others are reasoning and calls
        raise ValueError(f"{place}.channel: {short(message['channel'])}: reasoning belongs in reasoning_content")
    role = message["role"].lower() if isinstance(message.get("role"), str) else None
    if role == "function_call":
        message["tool_calls"] = _parsed(message.pop("content", None), f"{place}.value")
    if OTHER_ROLES.get(role, role) not in ROLES:
        raise ValueError(f"{place}.role: {short(message.get('role'))} is none of {', '.join(ROLES)}")
    message["role"] = OTHER_ROLES.get(role, role)
    reasoning = [message.pop(name) for name in REASONING if name in message]
    if "content" in message:
        message["content"], thought = _content(message["content"], f"{place}.content")
        reasoning += thought
    if reasoning:
        message = {"thinking": (one := _agreed(reasoning, place)), **message, "reasoning_content": one}
    if message["role"] == "assistant":
        message.setdefault("content", "")  # beside calls it is often null
    _join_calls(message, place)
    _join_weights(message, place)
    return message


def _usual_role(role: Any) -> Any:
    return OTHER_ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role


def _content(content: Any, place: str) -> tuple[str, list[str]]:
    """-> (text, reasoning) of a text or of a list of parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list | tuple):
        raise ValueError(f"{place}: {short(content)} is neither a text nor a list of parts")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        found = part if isinstance(part, str) else None
        if isinstance(part, dict) and kind in TEXT_PARTS + THINKING_PARTS:
            found = part.get(kind) if isinstance(part.get(kind), str) else part.get("text")
        if kind in CALL_PARTS:
            raise ValueError(f"{place}: a part of type {kind} is Anthropic's form; write it as {CALL_PARTS[kind]}")
        if not isinstance(found, str):
            raise ValueError(f"{place}: a part of type {short(kind)} is not text; only text is supported")
        (thoughts if kind in THINKING_PARTS else texts).append(found)
    return "".join(texts), ["".join(thoughts)] if thoughts else []


def _agreed(reasoning: list[Any], place: str) -> str:
    for text in reasoning:
        if not isinstance(text, str):
            raise ValueError(f"{place}: its reasoning {short(text)} is not a text")
    different = set(filter(None, reasoning))
    if len(different) > 1:
        raise ValueError(f"{place}: two of {', '.join(REASONING)} differ; keep one")
    return different.pop() if different else ""


def _join_calls(message: Message, place: str) -> None:
    """All calls under tool_calls as {"type": "function", "function": {"name", "arguments": object}}."""
    calls = message.pop("tool_calls", None)
    calls = _parsed(calls, f"{place}.tool_calls") if isinstance(calls, str) and calls.strip() else calls or []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{place}.tool_calls: {short(calls)} is not a list of calls")
    if old := message.pop("function_call", None):
        calls = [*calls, old]
    if calls:
        message["tool_calls"] = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place}: {short(call)} is not a call with the name of a function")
    given = [name for name in ARGUMENTS if function.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{place}: has {' and '.join(given)}; keep one")
    arguments = function[given[0]] if given else None
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}.arguments: {short(arguments)} is not a JSON object")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return found if call is function or call.get("id") is None else {"id": call["id"], **found}


def _join_weights(message: Message, place: str) -> None:
    given = {name: message.pop(name) for name in WEIGHTS + MASKED if name in message}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{place}.{name}: {short(value)} is neither 0 nor 1")
        given[name] = not value if name in MASKED else value
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"{place}: {' and '.join(given)} differ; keep one")
    if given:
        message["weight"] = int(next(iter(given.values())))


def _results_in_order(messages: list[Message]) -> list[Message]:
    """Consecutive tool results with call ids, sorted into the order of their calls."""
    order, start = {}, 0
    for number, message in enumerate([*messages, {"role": None}]):
        if message["role"] == "tool":
            continue
        results = messages[start:number]
        if len(results) > 1 and all(str(result.get("tool_call_id", "")) in order for result in results):
            messages[start:number] = sorted(results, key=lambda result: order[str(result["tool_call_id"])])
        start, order = number + 1, {str(call.get("id")): at for at, call in enumerate(message.get("tool_calls", []))}
    return messages


def _parsed(text: Any, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: {short(text)} is not JSON ({error})") from None
