"""What a model will learn: the rows that train.py makes of a record, by train.py's own code (data/sources.py).

A record gives one training row or several (a chat of several turns whose thinking the template drops), each a list of
ids and of targets; what the targets leave out is not learnt.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from chat import Chat
from data import conversations
from data.packing import dealt, in_parts, packed
from data.sources import IGNORED, Listed, Row, WrittenRows
from formats.messages import thinks
from inspection.xray.views import Shape

LEARNT_SHAPES = ("sft", "chat", "tree", "eval", "rag", "preference", "pretraining")


class Mask(NamedTuple):
    """Of one record."""

    rows: list[Row]  # those that fit, and those that don't
    why: str | None = None  # why it can't be trained on

    def facts(self, chat: Chat, sequence: int, ends: frozenset[int], thinking_turns: int, stage: str) -> dict:
        """The columns that conditions over `mask` see."""
        fitting = [row for row in self.rows if row.length <= sequence]
        learnt = [np.asarray(row.targets) for row in fitting]
        learnt = [targets[targets != IGNORED] for targets in learnt]
        thought = sum(int((targets == chat.think_end_id).sum()) for targets in learnt)
        longest = max((row.length for row in self.rows), default=0)
        return {
            "_targets": None if stage == "grpo" or (longest > sequence and not learnt) else sum(map(len, learnt)),
            "_tokens": longest,
            "_has_end": all(len(targets) == 0 or int(targets[-1]) in ends for targets in learnt),
            "_thinking_dropped": thinking_turns > thought and bool(fitting),
            "_special_tokens": sum(int(np.isin(row.ids, list(chat.special_ids)).sum()) for row in fitting),
            "_sequence": sequence,
        }


@dataclass
class Masks:
    """The masks of the records of one shape. `turns` and `thinking` are train.py's data.turns and grpo.thinking."""

    chat: Chat
    shape: Shape
    sequence: int
    turns: str = "all"
    thinking: bool = True
    stage: str | None = None  # of a training run; None: what the shape is for
    made: Iterator[list[Row]] | None = None  # the rows of each record in turn, where a run makes them itself
    lengths: list[int] = field(default_factory=list)  # of the rows that fit, in the order of the records

    def __post_init__(self):
        self.rows = WrittenRows(self.chat, self.turns, self.thinking)
        self.stage = self.stage or {"preference": "dpo", "pretraining": "pretrain"}.get(self.shape.name, "sft")
        end = self.chat.end_of_turn_id
        self.ends = frozenset(self.chat.special_ids if end is None else [end])

    def of(self, record: dict) -> Mask:
        """What train.py makes of it. A row that it refuses has the reason."""
        if self.made is not None:
            return Mask(next(self.made))
        try:
            if self.stage == "pretrain":
                return Mask([self._window(str(record.get(self.shape.column) or ""))])
            if self.stage == "dpo":
                made = [row for pair in self.rows.preference(record) for row in (pair.chosen, pair.rejected)]
            elif self.stage == "grpo":  # replies are learnt, which the model writes itself
                made = [Row(question.prompt, [IGNORED] * question.length) for question in self.rows.question(record)]
            else:
                made = self.rows.conversation(record)
        except ValueError as error:
            return Mask([], str(error))
        return Mask(made)

    def _window(self, text: str) -> Row:
        """Texts are cut into windows; a document's first one stands for it."""
        ids = self.chat.encode(text)[: self.sequence + 1]
        return Row(ids[:-1], ids[1:])

    def thinking_turns(self, record: dict) -> int:
        """How many turns of the assistant that are to be learnt think, in the record."""
        if self.stage != "sft" or self.made is not None:
            return 0
        try:
            found = conversations.conversation(record)
        except ValueError:
            return 0
        turns = [message for message in found.messages if conversations.is_learnt(message)] if found else []
        return sum(map(thinks, turns[-1:] if self.turns == "last" else turns))

    def add(self, mask: Mask) -> None:
        self.lengths += [row.length for row in mask.rows if row.length <= self.sequence]

    def spans(self, row: Row) -> list[tuple[str, bool]]:
        """The text of a row in runs that are learnt or not, for a page."""
        ids = [int(token) for token in row.ids]
        learnt = [False, *(int(target) != IGNORED for target in row.targets)]
        ids.append(int(row.targets[-1]) if len(row.targets) and int(row.targets[-1]) != IGNORED else -1)
        runs: list[tuple[bool, list[int]]] = []
        for token, flag in zip(ids, learnt, strict=True):
            if token < 0:
                continue
            if not runs or runs[-1][0] != flag:
                runs.append((flag, []))
            runs[-1][1].append(token)
        return [(self.chat.decode(tokens), flag) for flag, tokens in runs]


# --- what a step's padding costs ---


class Length(NamedTuple):
    """Stands for a training row where only its length matters."""

    length: int


def padding_share(lengths: list[int], batch: int, parts: int, seed: int, pack: int | None = None) -> float:
    """The share of padding in the batches of one epoch, dealt as train.py deals them. `pack`: the longest sequence of
    a run that puts several rows into one (data.pack)."""
    rows = [Length(length) for length in lengths]
    source, held = Listed(rows, [], batch, seed), 0
    for step in range(-(-len(rows) // batch)):
        chosen = source.rows(step)[: len(rows) - step * batch]  # the last step continues into the next epoch
        made = in_parts(chosen, parts) if pack is None else dealt(packed(chosen, pack), parts, 1, 0)
        held += sum(max(sequence.length for sequence in some) * len(some) for some in made)
    return 1 - sum(lengths) / held if held else 0.0
