"""The documents of text files, and the records of JSON, Parquet files and streamed data sets, one at a time.

The files are untrusted: what can't be read is refused with the file and the line or row.
"""

import itertools
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from console import is_out_of_memory
from formats.download import reach
from formats.mistaken import foreign, mistaken

MOST_OF_LINE = 64 << 20  # bytes of a line that tells what a file is
Documents = Callable[[], Iterator[str]]
Records = Iterator[tuple[str, Any]]
"""Where a record was found, for messages, and the record: `Unreadable` for a line that holds none."""


class Unreadable(ValueError):
    """A line that holds no record; later ones may."""


def read_documents(source: str, field: str, split: str, config: str | None) -> Iterator[str]:
    """The documents of one source, in its order. ValueError names the file, and the line or row."""
    if Path(source).suffix.lower() == ".txt" and Path(source).is_file():
        return _text(_filled(Path(source)))
    return (_field(record, field, place) for place, record in read_records(source, split, config, field))


def read_records(source: str, split: str, config: str | None, field: str | None = None) -> Records:
    """The records of one source; of a Parquet file only the column `field`, where that is given."""
    path = Path(source)
    readers = {".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": partial(_parquet, field=field)}
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in readers:
            raise ValueError(
                f"{path}: the kinds of files are .txt, {', '.join(readers)}; convert it, or rename it to what it is"
            )
        return readers[suffix](_filled(path))
    if not path.is_dir() and (suffix in (".txt", *readers) or not is_data_set(source)):
        raise ValueError(f"{source}: neither a file, nor a folder, nor the id of a data set (owner/name)")
    return _data_set(source, split, config)


def is_data_set(source: str) -> bool:
    """Whether this looks like an id on the hub: owner/name, or owner/name@revision."""
    return source.partition("@")[0].count("/") == 1 and not source.startswith((".", "/"))


def _filled(path: Path) -> Path:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty; leave it out")
    return path


def _text(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; convert it first") from None


def _json_lines(path: Path) -> Records:
    with path.open("rb") as file:
        start = file.peek(64)[:64]
        if found := foreign(start):
            raise ValueError(f"{path}: is {found}")
        if (encoding := json.detect_encoding(start)) not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"{path}: is {encoding.upper()}; convert it to UTF-8 (iconv)")
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    record = Unreadable(f"is not JSON ({error})")
                yield f"{path}: line {number:,}", record


def is_json_list(lines: Iterator[bytes], suffix: str) -> bool:
    """Whether JSON is one list of records and not a record a line: the content tells, as files of both forms have the
    name .json, and some lists .jsonl."""
    filled = (line for line in (line.removeprefix(BOM_UTF8).strip() for line in lines) if line)
    head = next(filled, b"")
    try:
        found = json.loads(head)
    except (ValueError, RecursionError):  # it continues in the next line, or is damaged
        return suffix == ".json" or re.match(rb"\[\s*(\{|$)", head) is not None
    if isinstance(found, list):
        return suffix == ".json" or isinstance(next(iter(found), None), dict)
    return suffix == ".json" and next(filled, None) is None  # one object alone, which is refused as what it is


def _json(path: Path) -> Records:
    with path.open("rb") as file:
        is_list = is_json_list(iter(partial(file.readline, MOST_OF_LINE), b""), path.suffix.lower())
    return _json_list(path) if is_list else _json_lines(path)


def _json_list(path: Path) -> Records:
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is {_mistaken(path, is_json=True) or f'not JSON ({error})'}") from None
    if not isinstance(records, list):
        raise ValueError(
            f"{path}: a JSON {type(records).__name__} where a list of records is expected; save that alone"
        )
    for number, record in enumerate(records, 1):
        yield f"{path}: item {number:,}", record


def _parquet(path: Path, field: str | None) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field is not None and field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names[:8])
                raise ValueError(f"{path}: has no column {field} but {names}; name one with --field")
            batches = file.iter_batches(batch_size=1024, columns=None if field is None else [field])
            for number, record in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path}: row {number:,}", without_padding(record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_out_of_memory(error) or getattr(error, "errno", None):  # the machine's failure, not the file's
            raise
        found = _mistaken(path)
        problem = f"is {found}" if found else f"can't be read as Parquet ({error}); download it again"
        raise ValueError(f"{path}: {problem}") from None


def _mistaken(path: Path, is_json: bool = False) -> str | None:
    with path.open("rb") as file:
        start = file.read(64)
    return None if start.startswith(b"PAR1") else mistaken(start, is_json)  # Parquet's mark


def open_data_set(name: str, split: str | None, config: str | None) -> Any:
    """What `datasets` streams of a data set on the hub or of a folder: a split, or by name all of them."""
    import datasets

    if not Path(name).is_dir():
        _reach_hub(name)  # `datasets` itself tries for half a minute and says so line by line
    name, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision or None, streaming=True)
    except Exception as error:  # classes of datasets, huggingface_hub, fsspec, httpx and pyarrow
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{name}: can't be opened as a data set ({error})") from None


def _data_set(name: str, split: str, config: str | None) -> Records:
    rows = iter(open_data_set(name, split, config))
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{name}: the stream ended at row {number:,} ({error}); run the command again") from None
        yield f"{name}: row {number:,}", without_padding(row)


def without_padding(value: Any, depth: int = 0) -> Any:
    """A record from Arrow without the nulls inside its columns: Arrow gives every object of a list the fields of all of
    them, so that a tool would have the parameters of the other tools, too."""
    if isinstance(value, dict):
        return {key: without_padding(v, depth + 1) for key, v in value.items() if depth == 0 or v is not None}
    return [without_padding(item, depth + 1) for item in value] if isinstance(value, list) else value


def _reach_hub(name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        repo, _, revision = name.partition("@")
        reach(lambda: HfApi().dataset_info(repo, revision=revision or None))
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"{name}: neither a file or folder here nor a data set on the hub") from None
    except Exception as error:  # the HTTP library's classes: all mean the same to a user
        raise ValueError(f"{name}: the hub can't be reached ({error}); give files instead, or try again") from None


def _field(record: Any, field: str, place: str) -> str:
    if isinstance(record, Unreadable):
        raise ValueError(f"{place} {record}")
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{place} has no text under {field!r}; name the field with --field")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} is no Unicode text: half of a surrogate pair stands alone") from None
    return value


def split_documents(documents: Documents, share: float) -> tuple[Iterator[str], Iterator[str]]:
    """Splits into training and validation: by the characters of a single document, else by documents, at least one for
    each.

    `documents()` starts over each time, so that nothing has to be kept: the first pass only counts.
    """
    count = sum(1 for _ in documents())
    if count == 1:
        (text,) = documents()
        cut = int(len(text) * (1 - share))
        if not 0 < cut < len(text):
            raise ValueError(f"--validation {share}: the only document is too short to be split; add more text")
        return iter([text[:cut]]), iter([text[cut:]])
    cut = min(max(round(count * (1 - share)), 1), max(count - 1, 0))
    return itertools.islice(documents(), cut), itertools.islice(documents(), cut, None)
