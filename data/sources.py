"""What a training step learns from, as a pure function of the step: the data's cursor is the number of the step.

So a resumed run continues with exactly the rows it would have seen, and processes never overlap.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.corpus import Example, completion, training_example
from data.shards import Windows
from data.tasks import Pieces

IGNORED = -100


class Row(NamedTuple):
    """Of lists or of numpy arrays."""

    ids: Sequence[int]
    targets: Sequence[int]
    """The token after each position, or IGNORED where nothing is to be learnt."""


def row_of(prompt: list[int], answer: list[int], learn_prompt: bool = False) -> Row:
    """One conversation: the answer is learnt, the prompt only on request."""
    ids = prompt + answer
    hidden = 0 if learn_prompt else len(prompt) - 1
    return Row(ids[:-1], [IGNORED] * hidden + ids[1 + hidden :])


class Conversations:
    """The generated corpus in the chat format of a tokenizer.

    `render(messages, thinking)` gives a prompt's ids and `encode(text)` an answer's. Examples from `first` on are left
    to validation: no step of any run reaches them.
    """

    first = 1 << 40

    def __init__(
        self,
        seed: int,
        batch: int,
        longest: int,
        pieces: Pieces,
        render: Callable[[list[dict], bool], list[int]],
        encode: Callable[[str], list[int]],
        learn_prompt: bool = False,
    ):
        self.seed, self.batch, self.longest, self.pieces = seed, batch, longest, pieces
        self.render, self.encode, self.learn_prompt = render, encode, learn_prompt

    def rows(self, step: int) -> list[Row]:
        """The rows of one optimizer step (0 is the first), those that are too long left out."""
        examples = (training_example(self.seed, step * self.batch + i, self.pieces) for i in range(self.batch))
        rows = [self._row(example) for example in examples]
        return [row for row in rows if len(row.ids) <= self.longest]

    def validation_rows(self, index: int) -> list[Row]:
        return self.rows(self.first // self.batch + index)

    def _row(self, example: Example) -> Row:
        prompt = self.render(example.messages, example.thinking)
        return row_of(prompt, self.encode(completion(example)), self.learn_prompt)


class Shards:
    """Rows of token ids from shard files: shuffled ones for training, the first ones of the files for validation."""

    def __init__(self, train: str, validation: str | None, seed: int, batch: int, length: int, vocabulary: int):
        self.batch = batch
        self.train = Windows(matching(train), length, vocabulary, seed)
        self.tokens = sum(len(shard) for shard in self.train.shards)
        self.validation = Windows(matching(validation), length, vocabulary, 0, shuffle=False) if validation else None

    def rows(self, step: int) -> list[Row]:
        return [window_row(self.train.row(step * self.batch + i)) for i in range(self.batch)]

    def validation_rows(self, index: int) -> list[Row]:
        if self.validation is None:
            return []
        first = index * self.batch
        return [window_row(self.validation.row(i)) for i in range(first, min(first + self.batch, len(self.validation)))]


def matching(pattern: str) -> list[Path]:
    """The files of a glob pattern, sorted by name."""
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (absolute patterns)
    if not paths:
        raise ValueError(f"data: no file matches {pattern}; get shards with python data/shards.py download 0 1")
    return paths


def window_row(ids) -> Row:
    return Row(ids[:-1], ids[1:])
