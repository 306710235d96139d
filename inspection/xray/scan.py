"""One pass over a data set, batch by batch: every figure, and every row that breaks a rule.

What must be remembered of each row (lengths, hashes of its text and prompt, the rules that it breaks) goes into a
duckdb file in a temporary folder, and medians, duplicates and counts are asked of it at the end; so memory does not
grow with the rows. Conditions of the rubric run as SQL over each batch. The texts of only a few rows are kept:
examples, the first rows that break a rule, and those that the report shows.
"""

import hashlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.trees import with_paths
from inspection.xray import rubric
from inspection.xray.leakage import Leak, Leakage
from inspection.xray.masks import Masks
from inspection.xray.near import NearDuplicates
from inspection.xray.prepare import LINES, Prepared, is_length, quoted
from inspection.xray.reading import Batch, Unreadable
from inspection.xray.tokens import TokenCounter
from inspection.xray.views import Shape

MEMORY, THREADS = "512MB", 2  # of duckdb
SHOWN_ROWS = 10_000  # numbers of rows that a finding lists; all are counted
SNIPPET = 600  # characters of a row that the report shows
BUFFERED = 20_000
SNIPPETS = 3  # rows a rule
PROMPTS = 50_000  # texts of prompts that are remembered


@dataclass
class Options:
    rules: dict[str, rubric.Rule]
    counter: TokenCounter | None = None
    masks: Callable[[Shape, pa.Schema], Masks | None] | None = None
    mask_rows: int = 0
    bits: Callable[[Any], float | None] | None = None  # of a mask
    near: float = 0.7
    near_rows: int = 0
    leakage: Leakage | None = None
    keep_rows: bool = False  # for --sql


@dataclass
class Snippet:
    row: int
    where: str
    text: str
    why: str = ""
    length: int = 0  # characters of the whole row


@dataclass
class Scan:
    """The state of one pass. `add` takes what prepare.prepared gives; figures.finish closes it."""

    options: Options
    shape: Shape | None = None
    rows: int = 0
    splits: Counter = field(default_factory=Counter)
    types: dict[str, set[str]] = field(default_factory=dict)  # column -> types that its batches had
    nulls: Counter = field(default_factory=Counter)
    snippets: dict[str, list[Snippet]] = field(default_factory=dict)  # rule -> first rows
    examples: dict[str, Snippet] = field(default_factory=dict)
    prompts: dict[int, tuple[str, int]] = field(default_factory=dict)  # hash -> text, count
    leaks: list[Leak] = field(default_factory=list)
    leaked_rows: int = 0
    mask: dict[str, Any] = field(default_factory=dict)
    mask_examples: list[tuple[int, list[tuple[str, bool]]]] = field(default_factory=list)
    skipped_rules: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    characters: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="xray-"))
        self.sql = duckdb.connect(str(self.folder / "rows.duckdb"))
        self.sql.execute(f"SET memory_limit = '{MEMORY}'; SET threads = {THREADS}")
        self.sql.execute("SET enable_external_access = false; SET python_enable_replacements = false")
        self.sql.execute("SET enable_progress_bar = false")
        self.sql.execute("CREATE TABLE found (rule VARCHAR, row BIGINT)")
        self.near = None
        self.start = time.monotonic()
        self._sample: list[tuple[int, Snippet]] = []  # (hash, row) of an even sample
        self._masks: Masks | None = None
        self._messages: list[tuple[int, dict]] = []  # of a tree, the first mask_rows of them
        self._broken: dict[str, list[int]] = {}  # rule -> rows, not in the table yet
        self._pending: dict[str, list[int]] = {}  # rule -> places in this batch that the report may show

    def close(self) -> None:
        self.sql.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- a batch ---

    def add(self, found: Prepared | Unreadable) -> None:
        if isinstance(found, Unreadable):
            self.rows = max(self.rows, found.row + 1)
            self.splits[found.split] += 1
            rule = "oversized" if found.oversized else "unreadable"
            self._record(rule, [found.row])
            self._show(rule, Snippet(found.row, found.where, "", found.why))
            return
        if self.shape is None:
            self._begin(found)
        item = found.item
        self.rows = max(self.rows, int(item.rows[-1]) + 1)
        self.splits[item.split] += len(item.rows)
        for column in item.table.schema:
            self.types.setdefault(column.name, set()).add(type_name(column.type))
        for name in item.table.column_names:
            self.nulls[name] += item.table[name].null_count
        try:
            self.sql.register("batch", found.table)
        except duckdb.Error:
            found = found._replace(table=self._known(found.table))
            self.sql.register("batch", found.table)
        try:
            self._insert(found)
            self._remember(found.table["_prompt"])
        finally:
            self.sql.unregister("batch")
        self._look(item, found.texts)

    def _known(self, table: pa.Table) -> pa.Table:
        """The same, columns of types that duckdb does not have as text."""
        for place, name in enumerate(table.column_names):
            try:
                self.sql.register("column", table.select([place]))
                self.sql.unregister("column")
            except duckdb.Error:
                values = (None if value is None else str(value) for value in table[name].to_pylist())
                table = table.set_column(place, name, pa.chunked_array([pa.array(values, pa.string())]))
        return table

    def _begin(self, first: Prepared) -> None:
        self.shape = first.shape
        rows = [rule for rule in rubric.of_shape(self.options.rules, self.shape.name, "row") if rule.condition]
        self._row_rules = rows
        if self.options.near_rows:
            self.near = NearDuplicates(self.folder, self.options.near, self.options.near_rows)
        if self.options.masks is not None and self.options.mask_rows:
            self._masks = self.options.masks(self.shape, first.item.table.schema)
        self.columns = first.measured
        counted = "".join(f", c{place} INTEGER, t{place} INTEGER" for place in range(len(self.columns)))
        self.sql.execute(f"CREATE TABLE rows (row BIGINT, split VARCHAR, key UBIGINT, prompt UBIGINT{counted})")
        self.sql.execute("CREATE TABLE pairs (row BIGINT, chosen INTEGER, rejected INTEGER)")
        self.sql.execute(
            "CREATE TABLE tree (row BIGINT, id VARCHAR, parent VARCHAR, role VARCHAR, rank INTEGER, lang VARCHAR)"
        )
        mask = "row BIGINT, targets INTEGER, tokens INTEGER, has_end BOOLEAN, thinking_dropped BOOLEAN, special INTEGER"
        self.sql.execute(f"CREATE TABLE masks ({mask}, bits DOUBLE)")

    def _insert(self, found: Prepared) -> None:
        item, batch = found.item, found.table
        place_of = {name: place for place, name in enumerate(self.columns)}
        columns = ["row", "split", "key", "prompt"]
        values = ["_row", "_split", *(f"CASE WHEN {line} IS NOT NULL THEN hash({line}) END" for line in LINES)]
        for own, name in enumerate(found.measured):
            columns.append(f"c{place_of[name]}")
            values.append(f"_c{own}")
            if self.options.counter is not None:
                columns.append(f"t{place_of[name]}")
                values.append(f"_t{own}")
        self.sql.execute(f"INSERT INTO rows ({', '.join(columns)}) SELECT {', '.join(values)} FROM batch")
        self._apply(self._row_rules, "batch", item.rows)
        if self.shape.name == "preference":
            self.sql.execute(
                "INSERT INTO pairs SELECT _row, length(_chosen), length(_rejected) FROM batch WHERE _chosen <> ''"
            )
        if self.shape.name == "tree":
            kinds = dict.fromkeys(("message_id", "parent_id", "role"), "VARCHAR") | {
                "rank": "INTEGER",
                "lang": "VARCHAR",
            }
            fields = (f"TRY_CAST({n} AS {kind})" if n in batch.column_names else "NULL" for n, kind in kinds.items())
            self.sql.execute(f"INSERT INTO tree SELECT _row, {', '.join(fields)} FROM batch")
        if self.options.keep_rows:
            self._keep(batch)

    def _apply(self, rules: list[rubric.Rule], relation: str, rows: np.ndarray) -> None:
        """Which rows break which rules. A rule of the user's that this set's columns don't have is skipped, by name."""
        if not rules:
            return
        conditions = ", ".join(f"coalesce(({rule.condition}), false)" for rule in rules)
        try:
            found = self.sql.execute(f"SELECT {conditions} FROM {relation}").fetchnumpy()
        except duckdb.Error as error:
            if len(rules) == 1:
                self.skipped_rules[rules[0].name] = str(error).strip().splitlines()[0]
                self._row_rules = [rule for rule in self._row_rules if rule.name != rules[0].name]
                return
            for rule in rules:
                self._apply([rule], relation, rows)
            return
        for rule, broken in zip(rules, found.values(), strict=True):
            places = np.flatnonzero(np.asarray(broken, dtype=bool))
            if len(places):
                self._record(rule.name, rows[places])
                self._pending.setdefault(rule.name, []).extend(places[:SNIPPETS].tolist())

    def _record(self, rule: str, rows: Iterable[int]) -> None:
        self._broken.setdefault(rule, []).extend(map(int, rows))
        if sum(map(len, self._broken.values())) > BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that broke rules to the table `found`."""
        names = [name for name, rows in self._broken.items() for _ in rows]
        rows = [row for rows in self._broken.values() for row in rows]
        self._broken = {}
        self.sql.register(
            "new_rows", pa.table({"rule": pa.array(names, pa.string()), "row": pa.array(rows, pa.int64())})
        )
        self.sql.execute("INSERT INTO found SELECT rule, row FROM new_rows")
        self.sql.unregister("new_rows")

    def _remember(self, prompts: pa.ChunkedArray) -> None:
        """Of the common prompts the text is kept; counts are taken from the table at the end."""
        if prompts.null_count == len(prompts):
            return
        key = f"CASE WHEN {LINES[1]} IS NOT NULL THEN hash({LINES[1]}) END"
        keys = self.sql.execute(f"SELECT {key} FROM batch").fetchall()
        known = self.prompts
        for (key,), prompt in zip(keys, pc.utf8_slice_codeunits(prompts, 0, 300).to_pylist(), strict=True):
            if key is not None:
                old = known.get(key)
                known[key] = (prompt, 1) if old is None else (old[0], old[1] + 1)
        if len(known) > 2 * PROMPTS:
            self.prompts = dict(sorted(known.items(), key=lambda entry: -entry[1][1])[:PROMPTS])

    def _keep(self, batch: pa.Table) -> None:
        kept = batch.drop_columns([name for name in batch.column_names if name in LINES or is_length(name)])
        self.sql.register("kept", kept)
        try:
            if not hasattr(self, "_kept_columns"):
                self.sql.execute("CREATE TABLE kept_rows AS SELECT * FROM kept LIMIT 0")
                self._kept_columns = {name: str(kind) for name, kind in zip(*self._described("kept_rows"), strict=True)}
            for name, kind in zip(*self._described("kept"), strict=True):
                if name not in self._kept_columns:
                    self.sql.execute(f"ALTER TABLE kept_rows ADD COLUMN {quoted(name)} {kind}")
                    self._kept_columns[name] = str(kind)
            try:
                self.sql.execute("INSERT INTO kept_rows BY NAME SELECT * FROM kept")
            except duckdb.Error:  # a column has another type than in the batches before
                for name, kind in zip(*self._described("kept"), strict=True):
                    if str(kind) != self._kept_columns[name]:
                        self.sql.execute(f"ALTER TABLE kept_rows ALTER COLUMN {quoted(name)} TYPE VARCHAR")
                        self._kept_columns[name] = "VARCHAR"
                self.sql.execute("INSERT INTO kept_rows BY NAME SELECT * FROM kept")
        finally:
            self.sql.unregister("kept")

    def _described(self, relation: str) -> tuple[list[str], list[str]]:
        found = self.sql.execute(f"DESCRIBE {relation}").fetchall()
        return [row[0] for row in found], [row[1] for row in found]

    # --- what is looked at row by row ---

    def _look(self, item: Batch, texts: pa.Array) -> None:
        lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
        self.characters += int(lengths.sum())
        for rule, places in self._pending.items():
            for place in places:
                if len(self.snippets.get(rule, [])) < SNIPPETS:
                    self._show(rule, self._snippet(item, texts, place))
        self._pending = {}
        self._choose_examples(item, texts, lengths)
        if self.near is not None and self.near.count < self.near.limit:
            self.near.add(item.rows, texts)
        if self.options.leakage is not None:
            leaks = self.options.leakage.search(item.rows, texts)
            rows = sorted({leak.row for leak in leaks})
            self.leaked_rows += len(rows)
            self.leaks += leaks[: max(0, SHOWN_ROWS - len(self.leaks))]
            if rows:
                self._record("leakage", rows)
                place_of = {int(row): place for place, row in enumerate(item.rows)}
                for row in rows[:SNIPPETS]:
                    self._show("leakage", self._snippet(item, texts, place_of[row]))
        if self._masks is not None:
            self._learn(item)

    def _snippet(self, item: Batch, texts: pa.Array, place: int) -> Snippet:
        row = int(item.rows[place])
        file, _, number = item.where.rpartition(" ")
        if item.read is None and number.replace(",", "").isdecimal():
            where = f"{file} {int(number.replace(',', '')) + place:,}"
        else:
            where = ": ".join(filter(None, (file.rpartition(":")[0], f"row {row:,}")))
        text = texts[place].as_py()
        return Snippet(row, where, text[:SNIPPET], length=len(text))

    def _show(self, rule: str, snippet: Snippet) -> None:
        shown = self.snippets.setdefault(rule, [])
        if len(shown) < SNIPPETS and all(old.row != snippet.row for old in shown):
            shown.append(snippet)

    def _choose_examples(self, item: Batch, texts: pa.Array, lengths: np.ndarray) -> None:
        filled = np.flatnonzero(lengths > 0)
        if not len(filled):
            return
        longest, shortest = filled[lengths[filled].argmax()], filled[lengths[filled].argmin()]
        for name, place, sign in (("longest", longest, 1), ("shortest", shortest, -1)):
            old = self.examples.get(name)
            if old is None or sign * lengths[place] > sign * old.length:
                self.examples[name] = self._snippet(item, texts, int(place))
        for place in filled[:: max(1, len(filled) // 8)]:
            key = int.from_bytes(hashlib.blake2b(int(item.rows[place]).to_bytes(8), digest_size=8).digest())
            self._sample.append((key, self._snippet(item, texts, int(place))))
        self._sample = sorted(self._sample, key=lambda entry: entry[0])[:64]

    def _learn(self, item: Batch) -> None:
        left = self.options.mask_rows - self.mask.get("rows", 0)
        if left <= 0:
            return
        self.mask["rows"] = self.mask.get("rows", 0) + min(left, len(item.rows))
        found = list(zip(item.rows[:left].tolist(), item.records()[:left], strict=True))
        if self.shape.name == "tree":  # paths need the whole of it
            self._messages += found
        else:
            self._learn_rows(found)

    def learn_paths(self) -> None:
        """The masks of a tree's paths, each as the row of its last message."""
        if self._messages:
            paths = with_paths(iter(self._messages))
            self._learn_rows([(row, found) for row, found in paths if isinstance(found, dict)])
            self._messages = []

    def _learn_rows(self, found: list[tuple[int, dict]]) -> None:
        masks, made = self._masks, []
        for row, record in found:
            mask = masks.of(record)
            if mask.why is not None:
                self._record("not_trainable", [row])
                self._show("not_trainable", Snippet(row, f"row {row:,}", "", mask.why))
            masks.add(mask)
            facts = mask.facts(masks.chat, masks.sequence, masks.ends, masks.thinking_turns(record), masks.stage)
            bits = self.options.bits(mask) if self.options.bits is not None else None
            made.append({"_row": row, **facts, "_bits": bits})
            if len(self.mask_examples) < 3 and facts["_targets"]:
                self.mask_examples.append((row, masks.spans(mask.rows[0])))
        if not made:
            return
        kinds = {"_bits": pa.float64(), "_targets": pa.int32()}
        table = pa.table({name: pa.array([row[name] for row in made], kinds.get(name)) for name in made[0]})
        self.sql.register("mask", table)
        try:
            fields = "_row, _targets, _tokens, _has_end, _thinking_dropped, _special_tokens, _bits"
            self.sql.execute(f"INSERT INTO masks SELECT {fields} FROM mask")
            rules = rubric.of_shape(self.options.rules, self.shape.name, "mask")
            self._apply(rules, "mask", np.array([row["_row"] for row in made]))
        finally:
            self.sql.unregister("mask")
        for rule, places in self._pending.items():
            for place in places:
                row = made[place]
                why = f"{row['_targets'] or 0:,} of {row['_tokens']:,} tokens learnt"
                why += "" if row["_bits"] is None else f", {row['_bits']:.2f} bits each"
                self._show(rule, Snippet(row["_row"], f"row {row['_row']:,}", "", why))
        self._pending = {}


def type_name(kind: pa.DataType) -> str:
    """An Arrow type as a short text."""
    text = str(kind)
    return text if len(text) <= 200 else text[:197] + "..."
