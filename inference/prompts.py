"""Many prompts of a file: JSON lines in, JSON lines out, in the same order, decoded in batches.

A line is a text, {"prompt": text} or {"messages": [{"role": ..., "content": ...}, ...]}; empty lines are passed over. A
line of another form ends the run with its number, after the answers of the lines read before it are out. A prompt that
the model or its template cannot take is answered by a record with `error`, and the others go on.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from inference.decode import ThinkingBudget, check_prompt, generate_batch
from inference.session import Answer, Listener, Session

WINDOW = 4  # batches that are read ahead and sorted by length, so that rows of a batch are about as long


def read_prompts(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The messages of each line. Raises ValueError with file and line number for what is no prompt."""
    if path.is_dir():
        raise ValueError(f"--prompts {path}: a directory; give a file of JSON lines")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _messages(f"{path}: line {number:,}", line)


def _messages(place: str, line: bytes) -> list[dict[str, Any]]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {error.start:,} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); each line is a value of its own") from None
    if isinstance(value, dict) and set(value) == {"prompt"}:
        value = value["prompt"]
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages = value.get("messages") if isinstance(value, dict) and set(value) == {"messages"} else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{place}: give a text, {{"prompt": text}} or {{"messages": [...]}} and nothing beside it')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'{place}: a message is {{"role": text, "content": text}}')
    return messages


def answer_prompts(session: Session, path: Path, batch_size: int) -> Iterator[Answer]:
    """The answers to the prompts of a file in their order, each the one that its prompt gets alone.

    The session gives the model and the settings; nothing is remembered from one prompt to the next. At most `WINDOW`
    batches of the file are in memory.
    """
    prompts = read_prompts(path)
    while True:
        window, broken = [], None
        try:
            for messages in islice(prompts, WINDOW * batch_size):
                window.append(_prompt(session, messages))
        except ValueError as error:
            broken = error
        waiting = [i for i, ids in enumerate(window) if not isinstance(ids, Answer)]
        waiting.sort(key=lambda i: len(window[i]))
        for start in range(0, len(waiting), batch_size):
            chosen = waiting[start : start + batch_size]
            for i, answer in zip(chosen, _answers(session, [window[i] for i in chosen]), strict=True):
                window[i] = answer
        yield from window
        if broken is not None:
            raise broken
        if not window:
            return


def _prompt(session: Session, messages: list[dict[str, Any]]) -> list[int] | Answer:
    """The ids of a prompt, or the answer that says why it has none."""
    ids: list[int] = []
    try:
        if session.raw:
            if len(messages) > 1 or messages[0]["role"] != "user":
                raise ValueError("--raw continues one text, so this line's messages cannot be asked")
            ids = session.chat.encode(messages[0]["content"])
        else:
            own = messages[0]["role"] == "system"
            ids = session.chat.render(messages if own else [*session.system, *messages], session.thinking)
        check_prompt(session.model, ids)
    except ValueError as error:
        return Answer(len(ids), finish_reason="error", error=str(error))
    return ids


def _answers(session: Session, prompts: list[list[int]]) -> list[Answer]:
    chat, params, tokens = session.chat, session.params, session.thinking_budget
    listeners = [Listener(chat, ids, params.stop, session.raw) for ids in prompts]
    generate_batch(
        session.model,
        prompts,
        replace(params, stop=()),  # the listeners look for them themselves
        intervene=[ThinkingBudget(chat, ids, tokens) if tokens else None for ids in prompts],
        until=[listener.heard for listener in listeners],
    )
    for listener in listeners:
        listener.complete(session.model, params)
        listener.finish()
        listener.answer.stats = {"seed": params.seed, "batch_size": len(prompts)}
    return [listener.answer for listener in listeners]
