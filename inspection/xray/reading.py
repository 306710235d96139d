"""Rows of any source as Arrow tables, a batch at a time, and what could not be read.

    file      .parquet, .arrow, .jsonl/.ndjson, .json (a list, or an object a line), .csv/.tsv, .txt; the text kinds
              also as .gz, .bz2, .xz, .zst; or a pattern of names, as data.train of a training YAML
    folder    its data files, also one that `datasets` saved to disk; each file's split is that of its name or folder,
              as on the hub
    hub id    owner/name[@revision], streamed by the `datasets` library

Shards of token ids (.bin) hold no rows; inspection/xray/shards.py reads them. Every file is a stranger's: a row that
can't be read is handed on as `Unreadable` and the reading continues, a file that can't be read at all is a ValueError.
No row may be larger than ROW_BYTES, so that memory stays bounded.
"""

import codecs
import csv
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from console import is_out_of_memory
from data import documents
from data.sources import matches

BATCH_ROWS, BATCH_BYTES = 8192, 16 << 20  # a batch ends with whichever is reached first
ROW_BYTES = 32 << 20
JSON_BYTES = 1 << 30  # of a .json file, which has to be parsed in one piece
TEXT_BYTES = 1 << 30  # of a .txt file, which is one document
COLUMNS = 1000
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
LINES = {".jsonl", ".ndjson"}
TABLES = {".csv": ",", ".tsv": "\t"}
ARROWS = {".arrow", ".feather"}
KINDS = {*LINES, *TABLES, *ARROWS, ".parquet", ".json", ".txt", ".bin"}
SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test"}
SPLITS |= {"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}


class Batch(NamedTuple):
    """Rows that stand one after the other in one split."""

    split: str
    rows: np.ndarray  # int64: the number of each row in the whole source, from 0
    table: pa.Table
    where: str  # of the first row, for messages: "FILE: row 1"
    read: list[dict] | None = None  # the records as they were read, where the source is no Arrow table

    def records(self) -> list[dict]:
        """The rows as train.py reads them."""
        if self.read is not None:
            return self.read
        return [documents.without_padding(record) for record in self.table.to_pylist()]


class Unreadable(NamedTuple):
    split: str
    row: int
    where: str
    why: str
    oversized: bool = False


class Part(NamedTuple):
    """One file of a source, or one split of a hub's data set."""

    split: str
    path: Path | None = None
    stream: Any = None  # a datasets.IterableDataset
    records: Callable[[], Iterator[dict]] | None = None


Found = tuple[str, Any, str | None]  # where, record, why it can't be read


# --- what a source is made of ---


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read: `.jsonl` of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else (suffixes or [""])[-1]


def parts_of(src: str, split: str | None, subset: str | None) -> list[Part]:
    """The files or splits of a source. ValueError where there is nothing to read."""
    path = Path(src).expanduser()
    if path.is_file():
        if kind_of(path) not in KINDS:
            known = ", ".join(sorted(KINDS))
            raise ValueError(f"{path}: the kinds of files are {known}; rename it to what it is")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty")
        parts = [Part(_split_of(path.stem), path)]
    elif found := [] if path.is_dir() else matches(str(path)):
        parts = [part for file in found for part in parts_of(str(file), None, None)]
    elif path.is_dir():
        parts = [Part(_split_of(str(file.relative_to(path))), file) for file in _data_files(path, subset)]
    elif kind_of(path) in KINDS or not documents.is_data_set(src):
        raise ValueError(f"{src}: neither a file, nor a folder, nor the id of a data set (owner/name)")
    else:
        try:
            streams = documents.open_data_set(src, None, subset)
        except ImportError:
            raise ValueError(f"{src}: streaming from the hub needs `datasets`: pip install -e '.[train]'") from None
        parts = [Part(name, stream=stream) for name, stream in streams.items()]
    chosen = [part for part in parts if split is None or part.split == split]
    if not chosen:
        names = ", ".join(sorted({part.split for part in parts}))
        raise ValueError(f"--split {split}: {src} has the splits {names}")
    return chosen


def _data_files(folder: Path, subset: str | None) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and kind_of(file) in KINDS and not any(part.startswith(".") for part in file.parts)
    ]
    # beside rows, JSON files and texts are notes on them
    rows = [file for file in files if kind_of(file) not in (".json", ".txt")] or files
    if subset is not None:
        rows = [file for file in rows if subset in file.relative_to(folder).parts]
    rows = [file for file in rows if file.stat().st_size]
    if not rows:
        where = folder if subset is None else folder / subset
        raise ValueError(f"{where}: no data file in this folder ({', '.join(sorted(KINDS))})")
    return rows


def _split_of(name: str) -> str:
    """`data/test-00000-of-00001.parquet` -> test: what the file's own name says, else its folder's; train where no name
    says anything."""
    for part in reversed(name.lower().split("/")):
        for word in re.findall(r"[a-z]+(?:_(?:sft|gen|prefs))?", part):
            first, _, kind = word.partition("_")
            if first in SPLITS:
                return SPLITS[first] + ("_" + kind if kind in ("sft", "gen", "prefs") else "")
    return "train"


# --- batches ---


def batches(parts: list[Part], limit: int | None = None) -> Iterator[Batch | Unreadable]:
    """All rows of the parts in their order, numbered from 0."""
    first = 0
    for part in parts:
        left = None if limit is None else limit - first
        if left == 0:
            return
        for found in _part_batches(part, first, left):
            if isinstance(found, Batch):
                first = max(first, int(found.rows[-1]) + 1)
            elif found.row >= 0:
                first = max(first, found.row + 1)
            yield found


def counted_rows(parts: list[Part]) -> int | None:
    """The number of rows without reading them, where the files' own footers say it."""
    if any(part.path is None or kind_of(part.path) != ".parquet" for part in parts):
        return None
    try:
        return sum(pq.read_metadata(part.path).num_rows for part in parts)
    except (pa.ArrowException, OSError):
        return None


def _part_batches(part: Part, first: int, left: int | None) -> Iterator[Batch | Unreadable]:
    if part.records is not None:
        found = ((f"row {number:,}", record, None) for number, record in enumerate(part.records()))
        yield from _record_batches(part, found, first, left)
    elif part.stream is not None:
        yield from _stream_batches(part, first, left)
    elif kind_of(part.path) == ".parquet":
        yield from _parquet_batches(part, first, left)
    elif kind_of(part.path) in ARROWS:
        yield from _arrow_batches(part, first, left)
    else:
        readers = dict.fromkeys(TABLES, _csv_rows) | {".txt": _text_file}
        yield from _record_batches(part, readers.get(kind_of(part.path), _json_rows)(part.path), first, left)


def _parquet_batches(part: Part, first: int, left: int | None) -> Iterator[Batch | Unreadable]:
    """Row groups one after the other; of one that is damaged the rows are lost, and the next one is read."""
    path, begun = part.path, 0
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read as Parquet ({' '.join(str(error).split())})") from None
    with file:
        names = Counter(file.schema_arrow.names)
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"{path}: two columns are called {_short(twice)}; rename one of them")
        size, readable = _parquet_batch_rows(path, file.metadata), False
        waiting = list(_neighbours([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], size))
        while waiting:
            groups, done = waiting.pop(0), begun
            begun += sum(file.metadata.row_group(group).num_rows for group in groups)
            try:
                for batch in file.iter_batches(batch_size=size, row_groups=groups):
                    table = pa.Table.from_batches([batch[: None if left is None else left - done]])
                    if not table.num_rows:
                        return
                    readable = True
                    rows = np.arange(first + done, first + done + table.num_rows)
                    yield Batch(part.split, rows, with_plain_texts(table), f"{path}: row {done + 1:,}")
                    done += table.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                if len(groups) > 1:  # they make one batch, so nothing of them is handed on yet
                    waiting[:0] = [[group] for group in groups]
                    begun = done
                    continue
                why = f"damaged ({' '.join(str(error).split())}); download it again"
                for row in range(done, min(begun, begun if left is None else left)):
                    yield Unreadable(part.split, first + row, f"{path}: row {row + 1:,}", why)
        if begun and not readable:
            raise ValueError(f"{path}: can't be read as Parquet, all of its {begun:,} rows are {why}")


def _neighbours(rows: list[int], most: int) -> Iterator[list[int]]:
    """Numbers of row groups that stand together and have at most `most` rows, or one that has more."""
    groups, count = [], 0
    for group, size in enumerate(rows):
        if groups and count + size > most:
            yield groups
            groups, count = [], 0
        groups.append(group)
        count += size
    if groups:
        yield groups


def _parquet_batch_rows(path: Path, metadata: pq.FileMetaData) -> int:
    """How many rows make BATCH_BYTES. A column's chunk bounds the size of any value in it, whatever its encoding says
    of their sum, and a chunk that is too large for its rows can't be read in bounded memory."""
    largest, worst = 1, 0
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        largest = max(largest, group.total_byte_size // max(1, group.num_rows))
        chunks = [group.column(number) for number in range(group.num_columns)]
        worst = max([worst, *(chunk.total_uncompressed_size for chunk in chunks)])
        if group.total_byte_size // max(1, group.num_rows) > ROW_BYTES or worst > 64 * BATCH_BYTES * 2:
            size = max(worst, group.total_byte_size)
            raise ValueError(
                f"{path}: a row group of {group.num_rows:,} rows unpacks to {size:,} bytes; write it with smaller ones"
            )
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _arrow_batches(part: Part, first: int, left: int | None) -> Iterator[Batch | Unreadable]:
    """Arrow's IPC, as a file or as a stream (which `datasets` saves)."""
    path, done = part.path, 0
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for whole in batches:
                whole.validate(full=True)  # of a stranger's file, offsets may lead anywhere
                for start in range(0, whole.num_rows, BATCH_ROWS):
                    batch = whole[start : start + min(BATCH_ROWS, whole.num_rows if left is None else left - done)]
                    if not batch.num_rows:
                        return
                    rows = np.arange(first + done, first + done + batch.num_rows)
                    table = with_plain_texts(pa.Table.from_batches([batch]))
                    yield Batch(part.split, rows, table, f"{path}: row {done + 1:,}")
                    done += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: can't be read as Arrow after row {done:,} ({' '.join(str(error).split())})"
        ) from None


def _stream_batches(part: Part, first: int, left: int | None) -> Iterator[Batch | Unreadable]:
    done = 0
    try:
        for batch in part.stream.with_format("arrow").iter(batch_size=1024):
            table = batch[: None if left is None else left - done]
            if not table.num_rows:
                return
            rows = np.arange(first + done, first + done + table.num_rows)
            yield Batch(part.split, rows, with_plain_texts(table), f"{part.split}: row {done + 1:,}")
            done += table.num_rows
    except Exception as error:  # classes of datasets, huggingface_hub, fsspec, httpx and pyarrow
        if is_out_of_memory(error):
            raise
        why = f"the stream ended here ({error}); run the command again"
        if not done:
            raise ValueError(f"{part.split}: {why}") from None
        yield Unreadable(part.split, first + done, f"{part.split}: row {done + 1:,}", why)


def _record_batches(part: Part, found: Iterator[Found], first: int, left: int | None) -> Iterator[Batch | Unreadable]:
    records: list[dict] = []
    rows: list[int] = []
    where, size = "", 0
    for number, (place, record, unreadable) in enumerate(found):
        if number == left:
            break
        odd = unreadable is None and not isinstance(record, dict)
        why = f"is {_short(record)}, not an object with fields" if odd else unreadable
        if why is not None:
            yield Unreadable(part.split, first + number, place, why, oversized=why.startswith(OVERSIZED))
            continue
        where = where or place
        records.append(record)
        rows.append(first + number)
        size += sum(len(value) if isinstance(value, str) else 200 for value in record.values())
        if len(records) == BATCH_ROWS or size >= BATCH_BYTES:
            yield Batch(part.split, np.array(rows), to_table(records), where, records)
            records, rows, where, size = [], [], "", 0
    if records:
        yield Batch(part.split, np.array(rows), to_table(records), where, records)


# --- records to columns ---


def with_plain_texts(table: pa.Table) -> pa.Table:
    """The same with each column of text as `string`: other writers have large_string, string_view and dictionaries."""
    for place, column in enumerate(table.schema):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind != column.type or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            plain = pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind
            table = table.set_column(place, column.name, table[column.name].cast(plain))
    return table


def to_table(records: list[dict]) -> pa.Table:
    """Records as columns; values that no Arrow type holds together become JSON text."""
    names = list(dict.fromkeys(name for record in records for name in record))[:COLUMNS]
    return pa.table(
        [_column([record.get(name) for record in records]) for name in names], names=list(map(_text, names))
    )


def _column(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        made = [
            value
            if value is None
            else _text(value)
            if isinstance(value, str)
            else _text(json.dumps(value, default=str))
            for value in values
        ]
        if all(value is None or isinstance(value, str) for value in values):
            return pa.array(made)
        return _nested(values) or pa.array(made)


def _nested(values: list) -> pa.Array | None:
    """The same after halves of surrogate pairs deep inside were replaced; None where that was not the reason."""
    try:
        return pa.array(json.loads(_text(json.dumps(values, ensure_ascii=False))))
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
        return None


def _text(value: Any) -> str:
    """As Unicode text: half a surrogate pair becomes U+FFFD."""
    return str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- text kinds ---

OVERSIZED = "is larger than"


def _open(path: Path) -> io.BufferedReader:
    packed = PACKED.get(path.suffix.lower())
    is_xz = packed == "xz"  # which Arrow does not unpack
    source = lzma.LZMAFile(path) if is_xz else pa.input_stream(str(path), compression=packed)  # noqa: SIM115
    file = io.BufferedReader(source, 1 << 20)
    with suppress(pa.ArrowException, OSError, lzma.LZMAError, EOFError):  # damaged: whoever reads says so
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return file


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file and whether they were cut; of what is beyond ROW_BYTES in a line nothing is kept."""
    try:
        with _open(path) as file:
            while line := file.readline(ROW_BYTES):
                cut = len(line) == ROW_BYTES and not line.endswith(b"\n")
                yield line, cut
                while cut and (rest := file.readline(ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
    except (pa.ArrowException, OSError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: can't be unpacked to its end ({error}); download it again") from None


def _json_rows(path: Path) -> Iterator[Found]:
    lines = (line for line, _ in _lines(path))
    return _json_list(path) if documents.is_json_list(lines, kind_of(path)) else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Found]:
    for number, (line, cut) in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}: line {number:,}"
            if cut:
                yield where, None, f"{OVERSIZED} {ROW_BYTES:,} bytes"
                continue
            try:
                record = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except UnicodeDecodeError as error:
                yield where, None, f"is not UTF-8 at byte {error.start:,}"
            except (ValueError, RecursionError) as error:
                yield where, None, f"is not JSON ({error})"
            else:
                yield where, record, None


def _csv_rows(path: Path) -> Iterator[Found]:
    csv.field_size_limit(ROW_BYTES)
    cuts = []

    def lines() -> Iterator[str]:
        for number, (line, cut) in enumerate(_lines(path), 1):
            if cut:
                cuts.append(number)
            yield (line[:100] + b"\n" if cut else line).decode("utf-8-sig" if number == 1 else "utf-8", "replace")

    delimiter = _delimiter(path)
    reader = csv.reader(lines(), delimiter=delimiter)
    header = next(reader, None)
    if not header or len(set(header)) != len(header) or len(header) > COLUMNS:
        raise ValueError(f"{path}: the first line must name each column once (and at most {COLUMNS:,})")
    numeric = _numeric_columns(path, header, delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{path}: line {reader.line_num:,}", None, f"is not CSV ({error})"
            continue
        where = f"{path}: line {reader.line_num:,}"
        if cuts:
            cuts.clear()
            yield where, None, f"{OVERSIZED} {ROW_BYTES:,} bytes"
        elif len(cells) == len(header):
            yield where, {name: _cell(cell, name in numeric) for name, cell in zip(header, cells, strict=True)}, None
        elif cells:
            yield where, None, f"has {len(cells):,} cells for {len(header):,} columns"


NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][-+]?\d{1,3})?", re.ASCII)


def _delimiter(path: Path) -> str:
    """What stands between cells: the suffix's own, unless the first line has none of it but several of another."""
    line = next((line for line, _ in _lines(path)), b"").decode("utf-8-sig", "replace")
    own = TABLES[kind_of(path)]
    counts = {mark: len(next(csv.reader([line], delimiter=mark), [])) for mark in (own, ",", ";", "\t", "|")}
    return own if counts[own] > 1 else max(counts, key=lambda mark: counts[mark])


def _numeric_columns(path: Path, header: list[str], delimiter: str) -> set[str]:
    """The columns whose first thousand cells are all numbers or empty."""
    with _open(path) as file:
        sample = csv.reader(
            io.StringIO(file.read(1 << 20).decode("utf-8-sig", "replace"), newline=""), delimiter=delimiter
        )
        try:
            rows = [cells for _, cells in zip(range(1001), sample, strict=False) if len(cells) == len(header)][1:]
        except csv.Error:
            return set()
    columns = zip(header, zip(*rows, strict=True), strict=True) if rows else ()
    return {name for name, cells in columns if any(cells) and all(not cell or NUMBER.fullmatch(cell) for cell in cells)}


def _cell(cell: str, numeric: bool) -> Any:
    if not numeric:
        return cell
    if not NUMBER.fullmatch(cell):
        return cell or None
    return int(cell) if cell.lstrip("-").isdecimal() else float(cell)


def _text_file(path: Path) -> Iterator[Found]:
    """One document, as it is for data/texts.py."""
    yield str(path), {"text": _whole(path, TEXT_BYTES).decode("utf-8-sig", "replace")}, None


def _json_list(path: Path) -> Iterator[Found]:
    try:
        records = json.loads(_whole(path, JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: a JSON {type(records).__name__} where a list of records is expected")
    for number, record in enumerate(records, 1):
        yield f"{path}: item {number:,}", record, None


def _whole(path: Path, most: int) -> bytes:
    try:
        with _open(path) as file:
            content = file.read(most + 1)
    except (pa.ArrowException, OSError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: can't be unpacked to its end ({error}); download it again") from None
    if len(content) > most:
        raise ValueError(f"{path}: more than {most:,} bytes in one piece; write it as JSON lines")
    return content
