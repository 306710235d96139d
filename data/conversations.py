"""Rows of other people's data, in the shapes that the field writes them.

    conversation   {"messages": [{"role", "content"}, ...]}         OpenAI, UltraChat
                   {"instruction", "context", "response"}           Dolly
                   {"instruction", "input", "output"}               Alpaca
                   {"prompt", "completion"}, {"question", "answer"}
    preference     {"prompt", "chosen", "rejected"}                 each a text or a list of messages; UltraFeedback's
                                                                    lists, which begin with the prompt, too
                   {"chosen", "rejected"}                           such lists, or hh-rlhf's transcripts
                                                                    "\n\nHuman: ...\n\nAssistant: ..."
    question       {"question", "answer"}                           GSM8K: the answer's last number is what counts

A row of another shape is a ValueError that says what is wrong with it; whoever reads the rows knows where it stands.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# Fields of a row with one question: what is asked, what it is asked about, the answer.
SINGLE = (
    ("instruction", "context", "response"),
    ("instruction", "input", "output"),
    ("prompt", None, "completion"),
    ("question", None, "answer"),
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def conversation(record: Any) -> list[Message] | None:
    """Messages with at least one turn of the assistant; what follows the last of them teaches nothing and goes. None
    for an empty answer, of which Alpaca has a few."""
    record = fields_of(record)
    if "messages" in record:
        messages = messages_of(record["messages"], "messages")
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise ValueError("messages have no turn of the assistant after somebody else's")
        return messages[: turns[-1] + 1]
    for asked, about, answer in SINGLE:
        if asked in record and answer in record:
            question = text_of(record, asked)
            if about and record.get(about):
                question += "\n\n" + text_of(record, about)
            told = text_of(record, answer, empty=True)
            return [user(question), {"role": "assistant", "content": told}] if told.strip() else None
    shapes = ", ".join("/".join(filter(None, shape)) for shape in SINGLE)
    raise ValueError(f"has the fields {named(record)}, but a conversation is messages or one of {shapes}")


def preference(record: Any) -> tuple[list[Message], Message, Message] | None:
    """-> (prompt, chosen answer, rejected answer). None for pairs that differ in more than the last answer, or not at
    all: published sets have a few of them."""
    record = fields_of(record)
    if "chosen" not in record or "rejected" not in record:
        raise ValueError(f"has the fields {named(record)}, but a preference has chosen and rejected")
    prompt = record.get("prompt")
    prompt = [] if prompt is None else as_messages(prompt, "prompt", "user")
    both = [as_messages(record[name], name, "assistant") for name in ("chosen", "rejected")]
    if len(both[0]) == len(both[1]) == 1:  # answers alone
        both = [[*prompt, *messages] for messages in both]
    (*asked, chosen), (*asked_too, rejected) = both
    if not asked:
        raise ValueError("has no prompt, neither in a field of its own nor before the answers")
    if chosen["role"] != "assistant" or rejected["role"] != "assistant" or asked != asked_too or chosen == rejected:
        return None
    return asked, chosen, rejected


def question(record: Any) -> tuple[list[Message], Callable[[str], bool]]:
    """-> (prompt, whether a reply is right): its last number is the answer's."""
    record = fields_of(record)
    if "question" not in record or "answer" not in record:
        raise ValueError(f"has the fields {named(record)}, but a question has question and answer")
    truth = last_number(text_of(record, "answer"))
    if truth is None:
        raise ValueError("answer has no number, so no reply can be checked")
    return [user(text_of(record, "question"))], lambda reply: last_number(reply) == truth


def last_number(text: str) -> Decimal | None:
    """`So 1,234.50 dollars` -> 1234.5; a minus counts where no number or word stands before it."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def as_messages(value: Any, field: str, role: str) -> list[Message]:
    """A list of messages, a transcript, or a text that is one message of `role`."""
    if not isinstance(value, str):
        return messages_of(value, field)
    before, *turns = SPEAKER.split(value)
    if before or not turns:
        return [{"role": role, "content": value}]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def messages_of(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} is {short(value)}, not a list of messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{field} holds {short(message)}, which is no message with a role of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"{field} holds a message of {message['role']} whose content is no text")
    return value


def fields_of(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"is {short(record)}, not an object with fields")
    return record


def text_of(record: dict[str, Any], field: str, empty: bool = False) -> str:
    value = record[field]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"{field} is {short(value)}, not a text")
    return value


def named(record: dict[str, Any]) -> str:
    return ", ".join(list(map(str, record))[:8]) or "none"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
