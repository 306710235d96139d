"""Texts to shards of token ids.

    python data/texts.py TEXT.txt --tokenizer gpt2/tokenizer.json --out data/shakespeare --validation 0.1
    python data/texts.py A.jsonl B.parquet --field text --tokenizer models/tiny --out DIR
    python data/texts.py HuggingFaceFW/fineweb --config sample-10BT --tokenizer DIR --out DIR --documents 100000

A source is a text file (one document), JSON lines, Parquet, or the id of a data set on the hub, which is streamed. The
tokenizer works on many documents at once, on all cores. Shards (data/shards.py) are OUT/train_000000.bin and so on.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import console
from data.shards import END_OF_TEXT, write_shard

DOCUMENTS_AT_ONCE = 256


def load_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one."""
    path = source / "tokenizer.json" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"--tokenizer {source}: no tokenizer.json there; give the file or its folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"--tokenizer {path}: can't be read ({error}); replace it by the published one") from None


def read_documents(source: str, field: str, split: str, config: str | None) -> Iterator[str]:
    """The documents of one source, in its order. ValueError names the file, and the line or row."""
    path = Path(source)
    if path.is_file():
        readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
        if path.suffix not in readers:
            raise ValueError(f"{path}: the kinds of files are {', '.join(readers)}; rename it to what it is")
        return readers[path.suffix](path, field)
    if path.exists() or path.suffix in (".txt", ".jsonl", ".parquet") or source.count("/") != 1:
        raise ValueError(f"{source}: neither a file nor the id of a data set (owner/name)")
    return _data_set(source, field, split, config)


def _text(path: Path, field: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; convert it first") from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}: line {number:,} is not JSON ({error})") from None
                yield _field(record, field, f"{path}: line {number:,}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names[:8])
                raise ValueError(f"{path}: has no column {field} but {names}; name one with --field")
            rows = (value for batch in file.iter_batches(columns=[field]) for value in batch.column(0).to_pylist())
            for number, value in enumerate(rows, 1):
                yield _field({field: value}, field, f"{path}: row {number:,}")
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error}); download it again") from None


def _data_set(name: str, field: str, split: str, config: str | None) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _field(row, field, f"{name}: row {number:,}")
    except (datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(f"{name}: the data set can't be streamed ({error})") from None


def _field(record: Any, field: str, place: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{place} has no text under {field!r}; name the field with --field")
    return value


def token_stream(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each document, int64, the end-of-text token in front."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token, which parts the documents of a shard")
    documents = iter(documents)
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([end, *encoding.ids], dtype=np.int64)


def write_shards(stream: Iterable[np.ndarray], out: Path, name: str, shard_tokens: int, vocabulary: int) -> list[Path]:
    """Cuts a stream of ids into files of `shard_tokens`, the last one shorter."""
    out.mkdir(parents=True, exist_ok=True)
    paths, waiting, count = [], [], 0

    def write(ids: np.ndarray) -> None:
        paths.append(out / f"{name}_{len(paths):06d}.bin")
        write_shard(paths[-1], ids, vocabulary)
        console.notice(f"{paths[-1]}: {len(ids):,} tokens")

    for ids in stream:
        waiting.append(ids)
        count += len(ids)
        while count >= shard_tokens:
            joined = np.concatenate(waiting)
            write(joined[:shard_tokens])
            waiting, count = [joined[shard_tokens:]], count - shard_tokens
    if count:
        write(np.concatenate(waiting))
    return paths


def parted(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Training and validation: the end of a single document's characters, or the last documents of several."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - share))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = round(len(documents) * (1 - share))
    return documents[:cut], documents[cut:]


def main() -> None:
    parser = console.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or its folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--field", default="text", help="JSON lines, Parquet, data set: where the text is")
    parser.add_argument("--split", default="train", help="data set: which part")
    parser.add_argument("--config", help="data set: which configuration")
    parser.add_argument("--documents", type=int, help="stop after so many")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--validation", type=float, default=0.0, help="share that goes to OUT/val_*.bin; needs memory")
    arguments = parser.parse_args()
    if not 0 <= arguments.validation < 1 or arguments.shard_tokens < 1:
        raise ValueError("--validation is a share from 0 to below 1, --shard-tokens at least 1")
    tokenizer = load_tokenizer(arguments.tokenizer)
    documents: Iterable[str] = itertools.islice(
        itertools.chain.from_iterable(
            read_documents(source, arguments.field, arguments.split, arguments.config) for source in arguments.sources
        ),
        arguments.documents,
    )
    parts = {"train": documents}
    if arguments.validation:
        parts["train"], parts["val"] = parted(list(documents), arguments.validation)
    for name, part in parts.items():
        stream = token_stream(part, tokenizer)
        write_shards(stream, arguments.out, name, arguments.shard_tokens, tokenizer.get_vocab_size())


if __name__ == "__main__":
    console.run(main)
