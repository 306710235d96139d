"""Many prompts of a file: JSON lines in, JSON lines out, in the same order, decoded in batches.

A line is a text, or what data/conversations.py reads as a prompt: {"prompt": text}, {"messages": [{"role": ...,
"content": ...}, ...]}, a row of training data, each with its tools. An assistant's message at the end is the beginning
of the reply, which is continued. Empty lines are skipped. A line of another form ends the run with its number, after
the answers of the lines before it are out. A prompt that the model or its template can't take is answered by a record
with `error`, and the others are answered.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from data.conversations import Conversation, prompt
from inference.decode import ThinkingBudget, check_prompt
from inference.engine import Engine, generate_batch
from inference.session import Answer, Listener, Session

WINDOW = 4  # batches that are read ahead: a prompt joins as soon as a reply ends


def read_prompts(path: Path) -> Iterator[Conversation]:
    """What each line asks. Raises ValueError with file and line number for anything else."""
    if path.is_dir():
        raise ValueError(f"--prompts {path}: a directory; give a file of JSON lines")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read(f"{path}: line {number:,}", line)


def _read(place: str, line: bytes) -> Conversation:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {error.start:,} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); each line is a value of its own") from None
    try:
        return prompt(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def answer_prompts(session: Session, path: Path, batch_size: int) -> Iterator[Answer]:
    """The answers to the prompts of a file in their order, each the one that its prompt gets alone.

    The session gives the model and the settings; nothing is remembered from one prompt to the next. At most `WINDOW`
    batches of the file are in memory.
    """
    prompts, engine = read_prompts(path), Engine(session.model, batch_size)
    while True:
        window, broken = [], None
        try:
            for asked in islice(prompts, WINDOW * batch_size):
                window.append(_prompt(session, asked))
        except ValueError as error:
            broken = error
        waiting = [i for i, ids in enumerate(window) if not isinstance(ids, Answer)]
        for i, answer in zip(waiting, _answers(session, [window[i] for i in waiting], engine), strict=True):
            window[i] = answer
        yield from window
        if broken is not None:
            raise broken
        if not window:
            return


def _prompt(session: Session, asked: Conversation) -> list[int] | Answer:
    """The ids of a prompt, or the answer that says why it has none."""
    ids: list[int] = []
    messages, tools, thinking = asked
    try:
        if session.raw:
            if len(messages) > 1 or messages[0]["role"] != "user" or tools:
                raise ValueError("--raw continues one text, so this line's messages cannot be asked")
            ids = session.chat.encode(messages[0]["content"])
        else:
            own, begun = messages[0]["role"] == "system", messages[-1]["role"] == "assistant"
            messages = messages if own else [*session.system, *messages]
            ids = session.chat.render(messages, session.thinking if thinking is None else thinking, tools, begun)
        check_prompt(session.model, ids)
    except ValueError as error:
        return Answer(len(ids), finish_reason="error", error=str(error))
    return ids


def _answers(session: Session, prompts: list[list[int]], engine: Engine) -> list[Answer]:
    chat, params, tokens = session.chat, session.params, session.thinking_budget
    listeners = [Listener(chat, ids, params.stop, session.raw, session.loop_stop) for ids in prompts]
    generate_batch(
        session.model,
        prompts,
        replace(params, stop=()),  # the listeners look for them themselves
        intervene=[ThinkingBudget(chat, ids, tokens) if tokens else None for ids in prompts],
        until=[listener.heard for listener in listeners],
        engine=engine,
    )
    for listener in listeners:
        listener.complete(session.model, params)
        listener.finish()
        listener.answer.stats = {"seed": params.seed, "batch_size": engine.max_batch}
    return [listener.answer for listener in listeners]
