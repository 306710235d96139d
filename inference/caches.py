"""Where an engine keeps keys and values: one cache for each running reply, and those of finished ones while they fit.

The engine (inference/engine.py) needs seven things of a store, whatever a cache is made of:

    begin(source, shared)   an empty cache, or one that holds the first `shared` positions of another
    end(cache)              its memory is free
    keep(cache)             what stays of a cache whose reply is over, for later prompts that begin with the same ids
    make_room(lengths)      False where memory does not suffice for each cache to become so long
    forward(parts)          computes the next ids of some caches, together
    used(caches)            the bytes that these caches take; of None, those that all do
    cuts                    whether a cache can begin with a part of another one, of any length. Keys and values can. A
                            recurrent state cannot: it is copied whole or not at all, so a store of such states has
                            `cuts = False`, and its engine only continues what is a prefix of the new prompt as a whole

`Pages` is the store of the C++ step, on a CPU: a sequence has pages of its own or shares them, and all next ids, pieces
of prompts too, go through the model in one pass. `Rows` is that of PyTorch, on any device: running caches are the rows
of one KVCache, and running replies share a pass.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.decode import forward, new_cache
from model import KVCache, Qwen3
from ops.cpu import step as cpu_step

ROOM = 256  # positions that a cache has room for when the first one is computed


class Part(NamedTuple):
    """The next ids of one cache. `wanted`: whether the logits behind them are needed."""

    cache: "Row | Paged"
    ids: list[int]
    wanted: bool


@dataclass(eq=False)
class Row:
    """A cache of one sequence: its number in the batch, or for a finished reply a KVCache of its own."""

    length: int
    row: int = -1
    kept: KVCache | None = None


class Rows:
    """Rows of one KVCache, as many as there are running replies up to a power of two."""

    cuts = True

    def __init__(self, model: Qwen3, most_rows: int, context: int, cache_bytes: int):
        self.model, self.context, self.most_rows, self.limit = model, context, most_rows, cache_bytes
        self.position_bytes = position_bytes(model)
        self.batch: KVCache | None = None
        self.rows: list[Row | None] = []
        self.kept_positions = 0

    def begin(self, source: Row | None = None, shared: int = 0) -> Row | None:
        """A cache of `shared` positions, copied from `source`; None where every row is taken or memory is short."""
        if None not in self.rows:
            count = min(max(1, 2 * len(self.rows)), self.most_rows)
            if count == len(self.rows) or not self._resize(self.rows, count, min(max(ROOM, shared + 1), self.context)):
                return None
        cache = Row(shared, self.rows.index(None))
        if shared and not self._resize(self.rows, len(self.rows), shared + 1):
            return None
        if shared:
            for old, new in zip(self._tensors(source), self._tensors(cache), strict=True):
                new[:, :, :shared] = old[:, :, :shared]
        self.rows[cache.row] = cache
        return cache

    def end(self, cache: Row) -> None:
        if cache.kept is not None:
            self.kept_positions -= cache.length
        else:
            self.rows[cache.row] = None

    def keep(self, cache: Row) -> Row | None:
        """A copy of the row in memory of its own; None where there is none left."""
        self.rows[cache.row] = None
        if self._bytes(len(self.rows), self.batch.max_len, cache.length) > self.limit:
            return None
        kept = Row(cache.length, kept=new_cache(self.model, cache.length))
        for old, new in zip(self._tensors(cache), self._tensors(kept), strict=True):
            new[:] = old[:, :, : cache.length]
        self.kept_positions += cache.length
        return kept

    def make_room(self, lengths: dict[Row, int]) -> bool:
        """Rows that nobody uses go, once they are half of the batch or their memory is needed."""
        running = [row for row in self.rows if row is not None]
        longest = max(lengths.get(row, row.length + 1) for row in running)  # the others' next position is written over
        half = len(self.rows) // 2
        if len(running) <= half and self._resize(running, half, longest):
            return True
        return self._resize(self.rows, len(self.rows), longest) or self._resize(running, len(running), longest)

    def used(self, caches: Sequence[Row] | None = None) -> int:
        running = sum(row.length for row in self.rows if row is not None)
        positions = self.kept_positions + running if caches is None else sum(cache.length for cache in caches)
        return positions * self.position_bytes

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """For each part the logits [V] behind its last id, on the CPU, where they are wanted.

        What is more than one id is computed alone, as `generate` does it.
        """
        found: dict[Row, Tensor | None] = {}
        for cache, ids, wanted in parts:
            if len(ids) > 1 or len(self.rows) == 1:
                view = self.batch.row(cache.row)
                view.lengths = [cache.length]
                logits = forward(self.model, ids, view if len(self.rows) > 1 else self._only(cache))
                found[cache], cache.length = logits[0].cpu() if wanted else None, cache.length + len(ids)
        single = {part.cache.row: part for part in parts if part.cache not in found}
        if single:
            # A row without a token gets one too, at a place that its next token writes over.
            self.batch.lengths = [0 if row is None else row.length for row in self.rows]
            tokens = [[single[row].ids[0]] if row in single else [0] for row in range(len(self.rows))]
            device = self.batch.keys[0].device
            logits = self.model(torch.tensor(tokens, device=device), self.batch)[:, -1].cpu()
            for row, part in single.items():
                found[part.cache], part.cache.length = logits[row] if part.wanted else None, part.cache.length + 1
        return [found[part.cache] for part in parts]

    def _only(self, cache: Row) -> KVCache:
        self.batch.lengths = [cache.length]
        return self.batch

    def _tensors(self, cache: Row) -> list[Tensor]:
        """Keys and values of one sequence, [1, K, positions, D] for each layer."""
        one = self.batch.row(cache.row) if cache.kept is None else cache.kept
        return one.tensors

    def _bytes(self, rows: int, max_len: int, more: int = 0) -> int:
        return (rows * max_len + self.kept_positions + more) * self.position_bytes

    def _resize(self, rows: list[Row | None], count: int, longest: int) -> bool:
        """A batch of `count` rows, the first of which are these, with room for so many positions, if memory permits."""
        now = 0 if self.batch is None else self.batch.max_len
        if count == len(self.rows) and longest <= now:
            return True
        sizes = [now] if longest <= now else [min(2 * longest, self.context), longest]
        max_len = next((size for size in sizes if self._bytes(count, size) <= self.limit), None)
        if max_len is None:
            return False
        batch = new_cache(self.model, max_len, count)
        for place, row in enumerate(rows):
            if row is not None:
                for old, new in zip(self._tensors(row), batch.tensors, strict=True):
                    new[place, :, : row.length] = old[0, :, : row.length]
        for place, row in enumerate(rows):
            if row is not None:
                row.row = place
        self.batch, self.rows = batch, [*rows, *[None] * (count - len(rows))]
        return True


def position_bytes(model: Qwen3) -> int:
    """Bytes of keys and values that one position takes."""
    config = model.config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    if model.cache_dtype == torch.int8:
        return heads * (config.head_dim + torch.bfloat16.itemsize)
    return heads * config.head_dim * (model.cache_dtype or model.dtype).itemsize


@dataclass(eq=False)
class Paged:
    """A cache of one sequence in pages of BLOCK positions; full ones may be part of several caches."""

    length: int
    pages: list[Tensor]


class Pages:
    """Pages that the C++ step reads where they lie, so that nothing is copied when a sequence grows.

    A prefix is shared page by page; only what it has of a last, partly filled page is copied.
    """

    cuts = True

    def __init__(self, model: Qwen3, cache_bytes: int):
        self.model = model
        self.page_bytes = cpu_step.BLOCK * position_bytes(model)
        self.most = max(1, cache_bytes // self.page_bytes)
        self.free: list[Tensor] = []
        self.owners: Counter[int] = Counter()  # by address: how many caches a page is part of
        self.spans: cpu_step.Spans | None = None

    def begin(self, source: Paged | None = None, shared: int = 0) -> Paged | None:
        self.spans = cpu_step.spans(self.model)  # a change of the model counts from the next sequence on
        if self.spans is None:
            raise ValueError(f"the model was changed while an engine ran it: {cpu_step.why(self.model)}")
        whole, rest = divmod(shared, cpu_step.BLOCK)
        cache = Paged(shared, source.pages[:whole] if source else [])
        if not self._available(1 + (rest > 0)):
            return None
        for page in cache.pages:
            self.owners[page.data_ptr()] += 1
        if rest:
            self._append(cache)
            cache.pages[-1].copy_(source.pages[whole])
        return cache

    def end(self, cache: Paged) -> None:
        for page in cache.pages:
            self.owners[page.data_ptr()] -= 1
            if not self.owners[page.data_ptr()]:
                del self.owners[page.data_ptr()]
                self.free.append(page)
        cache.pages = []

    def keep(self, cache: Paged) -> Paged:
        return cache

    def make_room(self, lengths: dict[Paged, int]) -> bool:
        needed = {cache: -(-length // cpu_step.BLOCK) - len(cache.pages) for cache, length in lengths.items()}
        if not self._available(sum(needed.values())):
            return False
        for cache, count in needed.items():
            for _ in range(count):
                self._append(cache)
        return True

    def used(self, caches: Sequence[Paged] | None = None) -> int:
        pages = self.owners if caches is None else {page.data_ptr() for cache in caches for page in cache.pages}
        return len(pages) * self.page_bytes

    def forward(self, parts: Sequence[Part]) -> list[Tensor | None]:
        caches, ids, wanted = zip(*parts, strict=True)
        lengths, pages = [cache.length for cache in caches], [cache.pages for cache in caches]
        logits = self.spans(ids, lengths, pages, list(map(int, wanted)))
        for cache, some in zip(caches, ids, strict=True):
            cache.length += len(some)
        rows = iter(logits)
        return [next(rows) if one else None for one in wanted]

    def _available(self, count: int) -> bool:
        return len(self.owners) + count <= self.most

    def _append(self, cache: Paged) -> None:
        page = self.free.pop() if self.free else self.spans.new_page()
        self.owners[page.data_ptr()] += 1
        cache.pages.append(page)
