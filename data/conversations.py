"""Rows of other people's data, in the shapes that are in common use.

    messages       {"messages": [{"role", "content"}, ...]}          OpenAI, UltraChat
                   {"conversations": [{"from", "value"}, ...]}       ShareGPT
                   {"conversation": [{"system", "input", "output", "output_with_loss"}, ...]}    XTuner
    asked          {"prompt"}, {"question"}, {"query"}, {"instruction"} or {"input"}: a text, a list of messages, or a
                   transcript "\n\nHuman: ...\n\nAssistant:" (hh-rlhf); {"input"} or {"context"} beside them is
                   appended (Alpaca, Dolly), {"history"} holds earlier pairs of turns (LLaMA-Factory)
    answered       {"completion"}, {"response"}, {"output"} or {"answer"}: a text or a list of messages, all of whose
                   turns are learnt, while none of the prompt's is (TRL); {"answers"}: calls [{"name", "arguments"}] as
                   JSON (xLAM, APIGen)
    preference     {"chosen", "rejected"}: texts, messages or whole dialogues, with or without a prompt of its own
    question       {"question" or "prompt", "answer"}                GSM8K: the answer's last number is what counts

Beside each of these: {"system"} (or {"system_prompt"}), {"tools"} (or {"functions"}), and {"enable_thinking"}, alone or
in {"chat_template_kwargs"}; beside an answer its {"reasoning"}. Messages are those of formats/messages.py. A row of
another shape, or one with a field that would change what it teaches and that is not known here, is a ValueError; the
caller knows its line.
"""

import json
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple

from data.last_number import LastNumber, true_number
from formats.messages import REASONING, Message, is_not_text, normalise, normalise_tools, short, thinks

DIALOGUES = ("messages", "conversations", "conversation")
TRANSCRIPTS = ("prompt", "text")
ASKED = ("prompt", "instruction", "question", "query", "input")
ABOUT = ("context", "input")
ANSWERED = ("completion", "response", "output", "answer")
"""Of several answers, or forms of a question, the first counts: `Row` knows which were read. Fields that are not (an
id, a category, a score) change nothing that is taught."""
SETTINGS = ("n", "model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "max_tokens", "max_new_tokens")
SETTINGS += ("max_completion_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs")
SETTINGS += ("tool_choice", "response_format", "logit_bias", "stream", "thinking_budget")
"""Fields of a request that would change the reply; a prompt file gets them from the command line."""
UNREAD = ("documents", "loss_mask", "loss_masks", "weights", "loss_weights", "sample_weight")
"""Fields that would change the text or what is learnt of it, and that are not supported."""
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
SWITCH = {"on": True, "off": False}
"""Nemotron's `reasoning`: whether the answer thinks."""
RESULT = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)


class Row(dict):
    """A row that knows which of its fields were read, so that those which were not can be named."""

    def __init__(self, record: dict):
        super().__init__(record)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    @property
    def unread(self) -> set[str]:
        return {str(name) for name, value in self.items() if value is not None and name not in self.read}


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list[dict] | None = None
    thinking: bool | None = None
    """What the row asks the template for; None: nothing."""


class Preference(NamedTuple):
    asked: Conversation
    chosen: Message
    rejected: Message


def conversation(record: Any) -> Conversation | None:
    """Messages up to the last turn of the assistant that is learnt (weight is not 0). None where nothing is: for an
    empty answer, of which Alpaca has a few, and where all weights are 0."""
    record = fields_of(record)
    check_weight(record)
    messages = dialogue(record)
    if not messages or not turn(messages[-1]):  # then an answer may stand beside them
        messages = completed(record, messages) or messages or transcript(record)
    if messages is None:
        raise ValueError(
            f"has the fields {named(record)}, but a conversation is messages, or one of {', '.join(ASKED)} with one of "
            f"{', '.join(ANSWERED)}"
        )
    for number, message in enumerate(messages):
        if message.get("weight") and not turn(message):
            raise ValueError(
                f"message {number} has weight 1, but is the {message['role']}'s; the assistant's are learnt"
            )
    turns = [place for place, message in enumerate(messages) if turn(message) and place]
    if not turns:
        raise ValueError("messages have no turn of the assistant after somebody else's")
    learnt = [place for place in turns if is_learnt(messages[place])]
    return Conversation(messages[: learnt[-1] + 1], *beside(record)) if learnt else None


def check_weight(record: dict) -> None:
    """ValueError for a row that is not to be learnt like the others."""
    for name in ("label", "kto_tag", "desirable"):  # KTO's, which some tools write as a number or a text
        if str(record.get(name)).lower() in ("false", "0", "-1", "undesirable", "bad"):
            raise ValueError(f"{name} is {str(record[name]).lower()}: this would teach an unwanted answer")
    if record.get("weight") not in (None, 1):
        raise ValueError(f"weight is {short(record['weight'])}, but rows have no weights of their own; messages have")


def preference(record: Any) -> Preference | None:
    """None for pairs that differ in more than the last answer, or not at all; published sets have a few."""
    record = fields_of(record)
    if record.get("chosen") is None or record.get("rejected") is None:
        raise ValueError(f"has the fields {named(record)}, but a preference has chosen and rejected")
    check_weight(record)
    prompt = dialogue(record) or []
    if not prompt or turn(prompt[-1]):  # UltraFeedback's messages are the prompt with the chosen answer
        prompt = asked(record) or []
    both = [whole(prompt, record, name) for name in ("chosen", "rejected")]
    (*before, chosen), (*before_too, rejected) = (with_system(record, messages) for messages in both)
    if not before:
        raise ValueError("has no prompt, neither in a field of its own nor before the answers")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer.get("weight") == 0:
            raise ValueError(f"{name} has weight 0, but a preference is learnt from both answers")
    if not turn(chosen) or not turn(rejected) or before != before_too or chosen == rejected:
        return None
    return Preference(Conversation(before, *beside(record)), chosen, rejected)


def question(record: Any) -> tuple[Conversation, LastNumber]:
    """-> (prompt, whether a reply is right): its last number is the answer's."""
    record = fields_of(record)
    if all(record.get(name) is None for name in ("question", "prompt")) or record.get("answer") is None:
        raise ValueError(f"has the fields {named(record)}, but a question has question and answer")
    answer = record["answer"]
    text = str(answer) if isinstance(answer, int | float | Decimal) else text_of(record, "answer")
    return Conversation(asked(record, ("question", "prompt")), *beside(record)), LastNumber(true_number(text))


def prompt(record: Any) -> Conversation:
    """What a line of a prompt file asks: a text, messages, or a training row without its answer. If the last message is
    the assistant's, the reply continues it."""
    if isinstance(record, str):
        return Conversation([user(record)])
    if isinstance(record, list):
        record = {"messages": record}
    for name in SETTINGS:
        if fields_of(record).get(name) is not None:
            raise ValueError(f"{name} is a setting, which the command line gives for the whole file; leave it out")
    messages = dialogue(record) or asked(record)
    if messages is None:
        raise ValueError(f"has the fields {named(record)}, but a prompt is a text, prompt or messages")
    return Conversation(messages, *beside(record))


# --- parts of a row ---


def dialogue(record: dict) -> list[Message] | None:
    """Messages in a field of their own, after the row's system message."""
    name = next((name for name in DIALOGUES if record.get(name) is not None), None)
    if name is None:
        return None
    given = from_json(record[name])
    if name == "conversations" and isinstance(given, list) and all(isinstance(text, str) for text in given):  # LIMA
        given = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(given)]
    return with_system(record, messages_of(given, name))


def messages_of(given: Any, name: str) -> list[Message]:
    """Normalised messages, in any of the forms of a dialogue."""
    if isinstance(given, list | tuple) and given and all(isinstance(pair, dict) and "output" in pair for pair in given):
        given = [message for number, pair in enumerate(given) for message in exchange(pair, f"{name}[{number}]")]
    return bare_results(complete(normalise(given, name), name))


def exchange(pair: dict, place: str) -> list[dict]:
    """XTuner's question and answer, and the system message before them."""
    for name in pair.keys() - {"system", "input", "output", "output_with_loss"}:
        if pair[name] is not None:
            raise ValueError(f"{place}.{name}: beside input and output only system and output_with_loss are known")
    if not pair.get("input"):
        raise ValueError(f"{place}: has no input; texts without a question are for stage pretrain")
    system = [{"role": "system", "content": pair["system"]}] if pair.get("system") else []
    answer = {"role": "assistant", "content": pair["output"], "weight": pair.get("output_with_loss")}
    return [*system, {"role": "user", "content": pair["input"]}, answer]


def bare_results(messages: list[Message]) -> list[Message]:
    """The results of tools that a row has already wrapped for the template (Hermes), without the wrapping, each in a
    message of its own: the template would wrap them once more, in a form that no model ever sees."""
    bare = []
    for message in messages:
        content = message.get("content") or ""
        wrapped = RESULT.findall(content) if message["role"] == "tool" and not RESULT.sub("", content).strip() else []
        bare += [message | {"content": result} for result in wrapped] or [message]
    return bare


def from_json(value: Any) -> Any:
    """A list of messages that a column of texts holds as JSON; anything else as it is."""
    with suppress(ValueError, RecursionError):
        if isinstance(value, str) and isinstance(parsed := json.loads(value), list):
            return parsed
    return value


def asked(record: dict, names: tuple[str, ...] = ASKED) -> list[Message] | None:
    """The question as messages, with its context or input appended, after the row's history."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        return None
    # Beside an instruction, context and input belong to that one. (dict.get: it is only looked for, not read.)
    other = name != "instruction" and dict.get(record, "instruction") is not None
    about = [text_of(record, field) for field in ABOUT if not other and field != name and record.get(field)]
    if about and not isinstance(record[name], str):
        raise ValueError(f"{name} is a list of messages, so {' or '.join(ABOUT)} can't be appended to it")
    messages = as_messages(record[name], name, "user")
    if about:
        messages[-1]["content"] = "\n\n".join(filter(str.strip, [messages[-1]["content"], *about]))
    if not any(map(said, messages)):
        raise ValueError(f"{name} is {short(record[name])}, not a text")
    return with_system(record, [*history(record), *messages])


def completed(record: dict, asking: list[Message] | None = None) -> list[Message] | None:
    """Question and answer; of the assistant's turns only those of the answer are learnt. `asking`: the question."""
    name = next((name for name in ANSWERED if record.get(name) is not None), None)
    question = asked(record) if asking is None else asking
    calls = calls_of(record) if name is None else None
    if question is None or (name is None and calls is None):
        return None
    if name is None:
        name, answer = "answers", normalise([{"role": "assistant", "tool_calls": calls}], "answers")
    else:
        answer = answer_of(record, name)
    reasoning = {field: record[field] for field in REASONING if record.get(field) not in (None, *SWITCH)}
    if reasoning and turn(answer[0]) and not thinks(answer[0]):  # in a column of its own
        answer = [*normalise([answer[0] | reasoning], name), *answer[1:]]
    return [message | ({"weight": 0} if turn(message) else {}) for message in question] + answer


def calls_of(record: dict) -> list | None:
    """The calls under `answers`; None for answers of another kind (SQuAD's are spans of a text)."""
    calls = from_json(dict.get(record, "answers"))
    is_calls = isinstance(calls, list) and all(isinstance(call, dict) and "name" in call for call in calls)
    return from_json(record["answers"]) if is_calls else None


def transcript(record: dict) -> list[Message] | None:
    """A whole dialogue as one text."""
    for name in TRANSCRIPTS:
        if isinstance(record.get(name), str) and len(messages := as_messages(record[name], name, "user")) > 1:
            return with_system(record, messages)
    return None


def history(record: dict) -> list[Message]:
    """The pairs of turns under `history`."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"history is {short(pairs)}, not a list of pairs (asked, answered)")
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    return messages_of(turns, "history") if turns else []


def with_system(record: dict, messages: list[Message]) -> list[Message]:
    given = [name for name in ("system", "system_prompt") if record.get(name)]
    if not given or not messages:
        return messages
    system = {"role": "system", "content": text_of(record, given[0])}
    if messages[0] == system:
        return messages
    if len(given) > 1 or messages[0]["role"] == "system":
        raise ValueError(f"has a system message in {given[0]} and another one beside it; keep one")
    return [system, *messages]


def beside(record: dict) -> tuple[list[dict] | None, bool | None]:
    """-> (tools, thinking). ValueError for fields that would change the text and are not supported."""
    for name in filter(is_not_text, record):
        if record.get(name):
            raise ValueError(f"has {name}, and only text can be learnt")
    for name in UNREAD:
        if record.get(name) not in (None, []):
            raise ValueError(f"has {name}, which is not supported; messages have weights of 0 and 1, and contents")
    tools, functions = normalise_tools(record.get("tools")), normalise_tools(record.get("functions"), "functions")
    if tools and functions:
        raise ValueError("has tools and functions; keep one")
    if functions:  # OpenAI's older name
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in functions]
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or any(options[name] for name in options.keys() - {"enable_thinking"}):
        raise ValueError(f"chat_template_kwargs is {short(options)}, of which only enable_thinking is known")
    stated = [place["enable_thinking"] for place in (options, record) if place.get("enable_thinking") is not None]
    stated += [SWITCH[record["reasoning"]]] if dict.get(record, "reasoning") in list(SWITCH) else []
    if any(value != stated[0] for value in stated):
        raise ValueError("enable_thinking, that of chat_template_kwargs, and reasoning differ; keep one")
    thinking = stated[0] if stated else None
    if thinking not in (None, True, False):
        raise ValueError(f"enable_thinking is {short(thinking)}, neither true nor false")
    return tools, None if thinking is None else bool(thinking)  # 1 is True too


def whole(prompt: list[Message], record: dict, name: str) -> list[Message]:
    """The prompt followed by an answer; an answer that is a whole dialogue has to begin with the prompt."""
    messages = answer_of(record, name)
    if not prompt or messages[0]["role"] in ("assistant", "tool"):
        return [*prompt, *messages]
    asked, own = ([message for message in given if message["role"] != "system"] for given in (prompt, messages))
    same = [(message["role"], (message.get("content") or "").strip()) for message in asked]
    if same != [(message["role"], (message.get("content") or "").strip()) for message in own[: len(asked)]]:
        raise ValueError(f"{name} begins with other turns than the prompt")
    return messages if len(own) < len(messages) else [*prompt, *own[len(asked) :]]


def answer_of(record: dict, name: str) -> list[Message]:
    value = record[name]
    asked = (dict.get(record, field) for field in ASKED)
    if isinstance(value, str) and any(isinstance(text, str) and SPEAKER.search(text) for text in asked):
        value = value.removeprefix(" ")  # the space after "Assistant:"
    return as_messages(value, name, "assistant")


def as_messages(value: Any, field: str, role: str) -> list[Message]:
    """Messages, one message, a transcript, or a text that is one message of `role`."""
    if not isinstance(value, str):
        if not isinstance(value, list | tuple | dict):
            raise ValueError(f"{field} is {short(value)}, neither a text nor a list of messages")
        return messages_of([value] if isinstance(value, dict) else value, field)
    text = f"\n\n{value}" if value.startswith("Human: ") and "\n\nAssistant:" in value else value
    system, *turns = SPEAKER.split(text)
    asks = role == "user" and text.rstrip().endswith("\n\nAssistant:")
    if not turns or (system and not asks):
        return [{"role": role, "content": value}]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": "system", "content": system}] if system else []
    messages += ({"role": roles[who], "content": said} for who, said in zip(turns[::2], turns[1::2], strict=True))
    return messages[:-1] if asks else messages


def complete(messages: list[Message], field: str) -> list[Message]:
    for number, message in enumerate(messages):
        if "content" not in message and not message.get("tool_calls"):
            raise ValueError(f"{field}[{number}]: the message of {message['role']} has no content")
    return messages


def turn(message: Message) -> bool:
    return message["role"] == "assistant"


def is_learnt(message: Message) -> bool:
    return turn(message) and message.get("weight", 1) == 1 and said(message)


def said(message: Message) -> bool:
    parts = message.get("content"), message.get("reasoning_content")
    return bool(message.get("tool_calls")) or any(isinstance(part, str) and part.strip() for part in parts)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def fields_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"is {short(record)}, not an object with fields")
    return record


def text_of(record: dict[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is {short(value)}, not a text")
    return value


def named(record: dict[str, Any]) -> str:
    return ", ".join(list(map(str, record))[:8]) or "none"
