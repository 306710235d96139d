"""A batch of rows as the table that the pass asks its questions of: the set's columns, and beside them ours.

    _row, _split            where it stands
    _text, _prompt, ...     what it says (views.py)
    _line, _prompt_line     text and prompt without case and extra white space; null where there is none
    _c0, _t0, _c1, ...      characters and tokens of each measured column

It depends on the batch alone, so it is made in a thread of its own while the batch before is looked at.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from inspection.xray.reading import Batch, Unreadable
from inspection.xray.text_columns import lines
from inspection.xray.tokens import TokenCounter
from inspection.xray.views import COLUMNS, Shape, as_text, shape_of, view

AHEAD = 2  # batches
CHUNK = 2048  # rows: duckdb shares the chunks of a table out to its threads
MEASURED = 64  # columns
LINES = ("_line", "_prompt_line")


class Prepared(NamedTuple):
    item: Batch
    shape: Shape
    table: pa.Table
    texts: pa.Array
    """`_text`, the empty text for null."""
    measured: list[str]
    """The columns that `_c0`, `_c1`, ... are the lengths of."""


def prepared(items: Iterator[Batch | Unreadable], counter: TokenCounter | None) -> Iterator[Prepared | Unreadable]:
    """The items in their order, made up to AHEAD of them ahead."""
    make, end = Preparation(counter), object()

    def one() -> object:
        item = next(items, end)
        return make(item) if isinstance(item, Batch) else item

    with ThreadPoolExecutor(1, "xray") as pool:
        waiting = deque(pool.submit(one) for _ in range(AHEAD))
        while (found := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(one))
            yield found


class Preparation:
    def __init__(self, counter: TokenCounter | None):
        self.counter, self.shape = counter, None

    def __call__(self, item: Batch) -> Prepared:
        table = item.table
        if self.shape is None:
            self.shape = shape_of(item)
            self.measured = _measured(self.shape, table)
        viewed = view(self.shape, item)
        texts = pc.fill_null(viewed["_text"], "").combine_chunks()
        keys = texts
        if self.shape.name == "tree":  # the same reply to another message is another row
            empty = pc.equal(pc.binary_length(texts), 0)
            parents = as_text(table, "parent_id").combine_chunks()
            keys = pc.if_else(empty, "", pc.binary_join_element_wise(parents, texts, " "))
        names = sql_names(table.column_names)
        made = dict(zip(names.values(), table.columns, strict=True))
        made |= dict(zip(viewed.column_names, viewed.columns, strict=True))
        made["_row"] = pa.array(item.rows, pa.int64())
        made["_split"] = pa.repeat(item.split, len(item.rows))
        made |= dict(zip(LINES, map(lines, (keys, viewed["_prompt"].combine_chunks())), strict=True))
        present = {name: at for name, at in self.measured.items() if at in COLUMNS or at in table.column_names}
        for place, at in enumerate(present.values()):
            made[f"_c{place}"], counts = self._lengths(viewed[at] if at in COLUMNS else table[at])
            if counts is not None:
                made[f"_t{place}"] = counts
        batches = pa.table(made).combine_chunks().to_batches(CHUNK)
        return Prepared(item, self.shape, pa.Table.from_batches(batches), texts, list(present))

    def _lengths(self, texts: pa.ChunkedArray) -> tuple[pa.Array, pa.Array | None]:
        """Characters and tokens, null for null."""
        texts = texts if pa.types.is_string(texts.type) else pc.fill_null(texts.cast(pa.string()), "")
        texts = texts.combine_chunks()
        characters = pc.utf8_length(texts).cast(pa.int32())
        if self.counter is None:
            return characters, None
        counts = pa.array(
            self.counter.counts(pc.fill_null(texts, "")),
            pa.int32(),
            mask=texts.is_null().to_numpy(zero_copy_only=False),
        )
        return characters, counts


def _measured(shape: Shape, table: pa.Table) -> dict[str, str]:
    """The columns whose lengths are reported, and where each is read."""
    found = {name: name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)}
    if shape.name == "chat":
        found = {shape.column: "_text"} | {name: at for name, at in found.items() if name != shape.column}
    if shape.name == "preference":
        found |= {f"{name} (answer)": f"_{name}" for name in ("chosen", "rejected")}
    return dict(list(found.items())[:MEASURED])


# --- names ---


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def sql_names(columns: list[str]) -> dict[str, str]:
    """Names for SQL, which does not tell a from A: the later one gets a number; names like ours get one too."""
    taken: set[str] = {*COLUMNS, "_row", "_split", *LINES}
    made = {}
    for name in columns:
        new, number = name or "unnamed", 1
        while new.lower() in taken or is_length(new):
            new, number = f"{name}_{number}", number + 1
        taken.add(new.lower())
        made[name] = new
    return made


def is_length(name: str) -> bool:
    return name[:2] in ("_c", "_t") and name[2:].isdecimal()
