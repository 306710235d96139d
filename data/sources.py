"""The rows of a training step, as a pure function of its number, which is the only cursor of the data.

So a resumed run continues with exactly the rows it would have seen. A source gives the items of one optimizer step,
`rows(step, share)` (0 is the first; `share` is the slice that one process takes, and only those are made), and
of a validation, `validation_rows(index)`:

    Generated   the offline corpus          Row, Pair or Question
    Listed      files and streamed sets     Row, Pair or Question
    Shards      texts as token ids          Row
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import console
from data import conversations
from data.corpus.examples import check, completion, document, question_example, training_example
from data.corpus.preferences import preference_example
from data.corpus.tasks import Pieces
from data.documents import Unreadable, is_data_set, read_records
from data.shard_format import END_OF_TEXT, Windows
from data.trees import with_paths
from formats.files import atomic_file
from formats.messages import thinks

IGNORED = -100
ALL = slice(None)


class Row(NamedTuple):
    """Lists or numpy arrays of equal length."""

    ids: Sequence[int]
    targets: Sequence[int]
    """The token after each position, or IGNORED where nothing is learnt."""

    @property
    def length(self) -> int:
        return len(self.ids)


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Row
    rejected: Row

    @property
    def length(self) -> int:
        return max(self.chosen.length, self.rejected.length)


class Question(NamedTuple):
    prompt: list[int]
    thinking: bool
    is_right: Callable[[str], bool]
    """The verdict on an answer (without its thinking)."""

    @property
    def length(self) -> int:
        return len(self.prompt)


Item = Row | Pair | Question


def row_of(prompt: list[int], answer: list[int]) -> Row:
    """The answer is learnt, the prompt is not."""
    ids = prompt + answer
    return Row(ids[:-1], [IGNORED] * (len(prompt) - 1) + answer)


# --- the offline corpus ---


class Generated:
    """Item after item of an endless sequence that `make(number, unseen)` computes; those longer than `longest` tokens
    are left out of their step. Those of validation are unseen: no step of any run has them."""

    def __init__(self, make: Callable[[int, bool], Item], batch: int, longest: int):
        self.make, self.batch, self.longest = make, batch, longest

    def rows(self, step: int, share: slice = ALL) -> list[Item]:
        return self._items(step, share, unseen=False)

    def validation_rows(self, index: int) -> list[Item]:
        return self._items(index, ALL, unseen=True)

    def fingerprint(self, count: int = 16) -> str:
        """A hash of the first items' ids: another tokenizer, template or corpus has another."""
        items = [self.make(number, False) for number in range(count)]
        rows = [item.prompt if isinstance(item, Question) else fingerprint(item) for item in items]
        return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()

    def _items(self, step: int, share: slice, unseen: bool) -> list[Item]:
        items = (self.make(step * self.batch + i, unseen) for i in range(self.batch)[share])
        return [item for item in items if item.length <= self.longest]


class Corpus:
    """The generated corpus in the chat format of a tokenizer; `chat` is a `chat.Chat`."""

    def __init__(self, seed: int, pieces: Pieces, chat: Any, hard: float = 0.0, outside: float = 0.0):
        self.seed, self.pieces, self.chat, self.hard, self.outside = seed, pieces, chat, hard, outside

    def text(self, index: int, unseen: bool = False) -> Row:
        end = self.chat.encode(END_OF_TEXT)
        return row_of(end, [*self.chat.encode(document(self.seed, index, self.pieces, unseen)), *end])

    def conversation(self, index: int, unseen: bool = False) -> Row:
        example = training_example(self.seed, index, self.pieces, unseen)
        prompt = self.chat.render(example.messages, example.thinking)
        return row_of(prompt, self.chat.encode(completion(example)))

    def preference(self, index: int, unseen: bool = False) -> Pair:
        pair = preference_example(self.seed, index, self.pieces, unseen)
        prompt = self.chat.render(pair.messages, pair.thinking)
        return Pair(*(row_of(prompt, self.chat.encode(answer)) for answer in (pair.chosen, pair.rejected)))

    def question(self, index: int, unseen: bool = False) -> Question:
        """There is no validation on questions: a loss over the model's own replies says nothing."""
        example = question_example(self.seed, index, self.pieces, self.hard, self.outside)
        prompt = self.chat.render(example.messages, example.thinking)
        return Question(prompt, example.thinking, lambda answer: check(example.problem, answer))


# --- other people's rows ---


class Listed:
    """A list of items, shuffled anew for each epoch; every item comes once an epoch."""

    def __init__(self, items: list[Item], unseen: list[Item], batch: int, seed: int):
        self.items, self.unseen, self.batch, self.seed = items, unseen, batch, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, step: int, share: slice = ALL) -> list[Item]:
        return [self._item(step * self.batch + i) for i in range(self.batch)[share]]

    def validation_rows(self, index: int) -> list[Item]:
        return self.unseen[index * self.batch : (index + 1) * self.batch]

    def _item(self, index: int) -> Item:
        epoch, place = divmod(index, len(self.items))
        if epoch != self._epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, random.permutation(len(self.items))
        return self.items[self._order[place]]


class WrittenRows:
    """Rows (data/conversations.py) in the chat format of a tokenizer; `chat` is a `chat.Chat`."""

    def __init__(self, chat: Any, turns: str = "all", thinking: bool = True):
        """`turns`: whether all of the assistant's turns are learnt or only the last. `thinking`: whether replies to
        questions think."""
        self.chat, self.turns, self.thinking = chat, turns, thinking

    def conversation(self, record: Any) -> list[Row]:
        """Each learnt turn of the assistant after the prompt that `Chat.render` gives for it.

        A turn whose text is the beginning of a later turn's shares the row of that one. With Qwen3's template it often
        is not: the template drops the thinking of earlier turns, so the prompt of a turn is no part of the whole text.
        """
        found = conversations.conversation(record)
        messages = found.messages if found else []
        turns = [place for place, message in enumerate(messages) if conversations.is_learnt(message) and place]
        rows: list[tuple[list[int], np.ndarray]] = []
        for place in reversed(turns[-1:] if self.turns == "last" else turns):
            prompt, answer = self.turn(messages[:place], messages[place], found.thinking, found.tools)
            ids = prompt + answer
            if not rows or rows[-1][0][: len(ids)] != ids:
                rows.append((ids, np.zeros(len(ids), dtype=bool)))
            rows[-1][1][len(prompt) : len(ids)] = True
        return [
            Row(np.array(ids[:-1], dtype=np.int32), np.where(learnt, ids, IGNORED)[1:].astype(np.int32))
            for ids, learnt in rows
        ]

    def preference(self, record: Any) -> list[Pair]:
        if (found := conversations.preference(record)) is None:
            return []
        answers, (asked, tools, thinking) = (found.chosen, found.rejected), found.asked
        thinking = any(map(thinks, answers)) if thinking is None else thinking
        chosen, rejected = (row_of(*self.turn(asked, answer, thinking, tools)) for answer in answers)
        return [Pair(chosen, rejected)]

    def question(self, record: Any) -> list[Question]:
        (asked, tools, thinking), is_right = conversations.question(record)
        thinking = self.thinking if thinking is None else thinking
        return [Question(self.chat.render(asked, thinking, tools), thinking, is_right)]

    def turn(
        self, asked: list[dict], answer: dict, thinking: bool | None = None, tools: list[dict] | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of what the model sees, and of what it says up to the token that ends its turn. For a turn without
        thinking the prompt turns thinking off."""
        prompt, said = self.chat.turn(asked, answer, thinking, tools)
        ids, end = self.chat.encode(said), self.chat.end_of_turn_id
        return self.chat.encode(prompt), ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def read_items(
    name: str,
    found: Iterator[tuple[str, Any]],
    make: Callable[[Any], list[Item]],
    longest: int,
    skip_share: float = 0.0,
    tells: bool = True,
) -> tuple[list[Item], str]:
    """The items of all (where it stands, record), those longer than `longest` tokens left out, and a hash of them.

    A row of another form is left out and counted. ValueError, naming the first, where they are more than the share
    `skip_share` of all rows; one is always allowed, unless the share is 0. `tells`: says what was left out.
    """
    rows, items, too_long, unusable, odd, unread = 0, [], 0, 0, [], set()
    digest = hashlib.blake2b(digest_size=8)
    for where, given in console.counted(found, f"{name}: rows") if tells else found:
        rows += 1
        try:
            if isinstance(given, Unreadable):
                raise given
            record = conversations.Row(given) if isinstance(given, dict) else given
            made = make(record)
        except ValueError as error:
            odd.append(f"{where}: {error}")
            continue
        unread |= record.unread
        fitting = [item for item in made if item.length <= longest]
        too_long, unusable = too_long + len(made) - len(fitting), unusable + (not made)
        for item in fitting:
            digest.update(fingerprint(item))
        items += fitting
    if odd and (not items or len(odd) > max(skip_share * rows, 1 if skip_share else 0)):
        raise ValueError(
            f"{odd[0]} ({len(odd):,} of {rows:,} rows are of another form; data.skip_share allows {skip_share})"
        )
    kinds = {f"longer than {longest:,} tokens": too_long, "without an answer or a difference": unusable}
    left_out = [f"{count:,} {kind}" for kind, count in kinds.items() if count]
    left_out += [f"{len(odd):,} of another form ({'; '.join(odd[:3])}{'; ...' if odd[3:] else ''})"] if odd else []
    said = (
        f"{name}: {rows:,} rows, {len(items):,} to learn from"
        + ("; left out: " + ", ".join(left_out) if left_out else "")
        + (f"; fields that are not read: {', '.join(sorted(unread))}" if unread else "")
    )
    if tells:
        console.notice(said)
    if not items:
        raise ValueError(f"data: {name} has nothing to learn from; use other rows or a longer train.sequence")
    return items, digest.hexdigest()


def fingerprint(item: Item) -> bytes:
    """16 bytes that tell one item from another; of written rows, whose verdict is a LastNumber."""
    rows = item if isinstance(item, Pair) else (item,)
    parts = [part for row in rows for part in (row if isinstance(row, Row) else (row.prompt,))]
    digest = hashlib.blake2b(repr(item.is_right).encode() if isinstance(item, Question) else b"", digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype=np.int32).tobytes())
    return digest.digest()


def records(place: str, split: str, subset: str | None, limit: int | None, out: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of the first `limit` rows. A streamed data set is first copied into the run's folder, so that
    resuming needs no hub."""
    if (not matches(place) and is_data_set(place)) or Path(place).is_dir():
        name = hashlib.blake2b(repr((place, split, subset, limit)).encode(), digest_size=6).hexdigest()
        copy = out / f"rows-{name}.jsonl"
        if not copy.exists():
            out.mkdir(parents=True, exist_ok=True)
            with atomic_file(copy) as temporary, temporary.open("w", encoding="utf-8") as file:
                for _, record in limited(read_records(place, split, subset), limit):
                    file.write(json.dumps(record, default=str) + "\n")
        sources = [copy]
    else:
        sources = matching(place, "give JSON lines, JSON, Parquet or the id of a data set (owner/name)")
    found = (found for source in sources for found in read_records(str(source), split, subset))
    return with_paths(limited(found, limit))


def limited(found: Iterator, limit: int | None) -> Iterator:
    return (item for _, item in zip(range(limit), found, strict=False)) if limit else found


# --- shards ---


class Shards:
    """Rows of token ids from shard files: shuffled for training, the files' first ones for validation."""

    def __init__(self, train: str, validation: str | None, seed: int, batch: int, length: int, vocabulary: int):
        self.batch = batch
        self.train = Windows(matching(train), length, vocabulary, seed)
        self.tokens = sum(len(shard) for shard in self.train.shards)
        digest = hashlib.blake2b(b"".join(shard.fingerprint() for shard in self.train.shards), digest_size=8)
        self.fingerprint = digest.hexdigest()
        self.validation = Windows(matching(validation), length, vocabulary, 0, shuffle=False) if validation else None

    def rows(self, step: int, share: slice = ALL) -> list[Row]:
        return [window_row(self.train.row(step * self.batch + i)) for i in range(self.batch)[share]]

    def validation_rows(self, index: int) -> list[Row]:
        if self.validation is None:
            return []
        first = index * self.batch
        return [window_row(self.validation.row(i)) for i in range(first, min(first + self.batch, len(self.validation)))]


def matches(pattern: str) -> list[Path]:
    """The files of a glob pattern, sorted by name."""
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (absolute patterns)


def matching(pattern: str, fix: str = "get shards with python data/shards.py download 0 1") -> list[Path]:
    """The same; ValueError where there are none."""
    paths = matches(pattern)
    if not paths:
        raise ValueError(f"data: no file matches {pattern}; {fix}")
    return paths


def window_row(ids) -> Row:
    return Row(ids[:-1], ids[1:])
