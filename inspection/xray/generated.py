"""The rows of a training run on the generated corpus, read back from the ids that the run would learn from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from chat import Chat
from data.sources import IGNORED, Pair, Question, Row


def rows_of(source: Any, chat: Chat, limit: int) -> Iterator[tuple[dict, list[Row]]]:
    """(record, training rows) of the first `limit` items of a run's source, step by step."""
    count = step = 0
    while count < limit:
        for item in source.rows(step)[: limit - count]:
            count += 1
            yield _record(item, chat)
        step += 1


def _record(item: Row | Pair | Question, chat: Chat) -> tuple[dict, list[Row]]:
    def text(ids) -> str:
        return chat.decode(map(int, ids), skip_special_tokens=True).strip()

    if isinstance(item, Question):
        return {"question": text(item.prompt)}, [Row(item.prompt, [IGNORED] * item.length)]
    if isinstance(item, Pair):
        prompt, chosen = _parts(item.chosen)
        _, rejected = _parts(item.rejected)
        made = {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
        return made, [item.chosen, item.rejected]
    prompt, answer = _parts(item)
    if len(prompt) <= 1:  # all of a text is learnt but its first token
        return {"text": text([*prompt, *answer])}, [item]
    return {"prompt": text(prompt), "completion": text(answer)}, [item]


def _parts(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """What is only read, and what is learnt."""
    ids, targets = np.asarray(row.ids), np.asarray(row.targets)
    learnt = targets != IGNORED
    return ids[: len(ids) - int(learnt.sum()) + 1], targets[learnt]
