"""Texts to shards of token ids.

    python data/shards.py tokenize TEXT.txt --tokenizer gpt2/tokenizer.json --out DIR --validation 0.1
    python data/shards.py tokenize A.jsonl B.parquet --field text --tokenizer models/tiny --out DIR
    python data/shards.py tokenize HuggingFaceFW/fineweb --config sample-10BT --tokenizer DIR --out DIR

A source is a text file (one document), JSON lines, Parquet, or what `datasets` can stream: a data set's id on the hub
or a folder. A document is plain text: what looks like a special token in it becomes ordinary tokens. Shards
(data/shards.py) are OUT/train_000000.bin and so on, the same bytes for every number of processes.
"""

import argparse
import itertools
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

import console
from data.documents import read_documents, split_documents
from data.shard_format import END_OF_TEXT, MOST_TOKENS, write_pieces
from formats.files import publish
from formats.tokenizer_files import reraise_unless_library

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # given to a process at a time, whichever is reached first


# --- the tokenizer ---


def load_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one, for whole documents of plain text."""
    path = source / "tokenizer.json" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"--tokenizer {source}: no tokenizer.json there; give the file or its folder")
    try:
        return plain(Tokenizer.from_file(str(path)))
    except BaseException as error:  # the library raises no narrower class, and its panics are no Exception
        reraise_unless_library(error)
        raise ValueError(f"--tokenizer {path}: can't be read ({error}); replace it by the published one") from None


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer.json may ask for truncation or padding; a document is tokenised whole, without special tokens."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """One more than the highest id: the ids of a stranger's tokenizer may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def separator_of(tokenizer: Tokenizer, token: str) -> int:
    separator = tokenizer.token_to_id(token)
    if separator is None:
        raise ValueError(f"--separator {token}: the tokenizer has no such token; name the one between its documents")
    return separator


# --- documents to ids to files ---


def batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Encoder:
    """Turns batches of documents into ids, uint32 [N], the separator in front of each document."""

    here: "Encoder"  # the one of a worker process

    def __init__(self, tokenizer: Tokenizer, separator: int):
        self.tokenizer, self.separator = tokenizer, separator

    def __call__(self, batch: list[str]) -> np.ndarray:
        encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return np.concatenate([np.array([self.separator, *encoding.ids], dtype=np.uint32) for encoding in encodings])

    @staticmethod
    def start_worker(tokenizer: str, separator: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
        Encoder.here = Encoder(plain(Tokenizer.from_str(tokenizer)), separator)

    @staticmethod
    def work(batch: list[str]) -> np.ndarray:
        return Encoder.here(batch)


def token_stream(
    documents: Iterable[str], tokenizer: Tokenizer, separator: int, processes: int
) -> Iterator[np.ndarray]:
    """The ids of all documents in their order, batch by batch, from that many processes in parallel."""
    if processes == 1:
        yield from map(Encoder(tokenizer, separator), batched(documents))
        return
    workers = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=Encoder.start_worker, initargs=(tokenizer.to_str(), separator)
    )
    under_way = deque()
    try:
        for batch in batched(documents):
            under_way.append(workers.submit(Encoder.work, batch))
            if len(under_way) > 2 * processes:  # enough to keep them busy, little in memory
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a worker process died, perhaps for lack of memory; try fewer --processes") from None
    finally:
        workers.shutdown(cancel_futures=True)


def cut(stream: Iterator[np.ndarray], size: int) -> Iterator[Iterator[np.ndarray]]:
    """The stream in parts of `size` ids, the last one shorter; each part must be consumed before the next one."""
    piece = next(stream, None)

    def part() -> Iterator[np.ndarray]:
        nonlocal piece
        left = size
        while piece is not None and left:
            taken, rest = piece[:left], piece[left:]
            left -= len(taken)
            piece = rest if len(rest) else next(stream, None)
            yield taken

    while piece is not None:
        yield part()


def write_shards(
    stream: Iterator[np.ndarray], out: Path, name: str, shard_tokens: int, vocabulary: int
) -> Iterator[tuple[Path, int]]:
    """Files NAME_000000.bin, … of `shard_tokens` each, the last one shorter; yields each with its number of tokens."""
    out.mkdir(parents=True, exist_ok=True)
    for number, pieces in enumerate(cut(stream, shard_tokens)):
        path = out / f"{name}_{number:06d}.bin"
        yield path, write_pieces(path, pieces, vocabulary)


def watched(stream: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """The stream unchanged; its speed is shown on standard error."""
    tokens, start = 0, time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    silent = not console.stderr().is_terminal
    with closing(stream), Progress(*columns, console=console.stderr(), disable=silent, transient=True) as progress:
        task = progress.add_task(name, total=None)
        for ids in stream:
            tokens += len(ids)
            rate = tokens / (time.perf_counter() - start)
            progress.update(task, description=f"{name}: {tokens:,} tokens, {rate:,.0f} a second")
            yield ids
    if tokens:
        console.notice(f"{name}: {tokens:,} tokens in {tokens / rate:,.1f} s, {rate:,.0f} a second")


# --- the command ---


def add_command(commands) -> None:
    parser = commands.add_parser("tokenize", help="texts to shards")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=".txt, .jsonl, .parquet, folder or data set's id")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: one a core")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default: 100,000,000")
    parser.add_argument("--separator", default=END_OF_TEXT, metavar="TOKEN", help=f"default: {END_OF_TEXT}")
    parser.add_argument("--validation", type=float, default=0.0, metavar="SHARE", help="the end, for OUT/val_*.bin")
    parser.add_argument("--field", default="text", help="where a record's text is (default: text)")
    parser.add_argument("--split", default="train", help="data set: which part (default: train)")
    parser.add_argument("--config", help="data set: which configuration")
    parser.add_argument("--documents", type=int, metavar="N", help="stop after so many")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    for flag, value, most in (
        ("--processes", arguments.processes, 1024),
        ("--shard-tokens", arguments.shard_tokens, MOST_TOKENS),
        ("--documents", arguments.documents, sys.maxsize),
    ):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{flag} {value}: give a number from 1 to {most:,}")
    if not 0 <= arguments.validation < 1:
        raise ValueError(f"--validation {arguments.validation}: give a share from 0 to below 1")
    tokenizer = load_tokenizer(arguments.tokenizer)
    separator = separator_of(tokenizer, arguments.separator)

    def documents() -> Iterator[str]:
        opened = (read_documents(s, arguments.field, arguments.split, arguments.config) for s in arguments.sources)
        return itertools.islice(itertools.chain.from_iterable(opened), arguments.documents)

    parts = {"train": documents()}
    if arguments.validation:
        parts["train"], parts["val"] = split_documents(documents, arguments.validation)
    for name in parts:
        if there := sorted(arguments.out.glob(f"{name}_*.bin")):
            raise ValueError(f"{there[0]} already exists and would be mixed with new shards; use another --out")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with written_together(arguments.out) as folder:
        written: dict[str, int] = {}
        for name, part in parts.items():
            stream = watched(token_stream(part, tokenizer, separator, arguments.processes), name)
            with closing(stream):
                size, vocabulary = arguments.shard_tokens, vocabulary_of(tokenizer)
                shards = {path.name: tokens for path, tokens in write_shards(stream, folder, name, size, vocabulary)}
            if not shards:
                raise ValueError(f"{', '.join(arguments.sources)}: no document for {name}; give more text")
            written |= shards
    for name, tokens in written.items():
        print(f"{arguments.out / name}  {tokens:,} tokens")
    tokenizer = arguments.tokenizer.parent if arguments.tokenizer.is_file() else arguments.tokenizer
    validation = arguments.out / "val_*.bin" if arguments.validation else "null"
    keys = [f"data.train={arguments.out}/train_*.bin", f"data.validation={validation}", f"model.tokenizer={tokenizer}"]
    console.notice(f"train on them: python train.py configs/toy.yaml --set {' '.join(map(shlex.quote, keys))}")


@contextmanager
def written_together(out: Path) -> Iterator[Path]:
    """A folder inside of OUT whose files move into OUT when the block succeeds: all shards or none."""
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".tokenize-", dir=out) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            publish(path, out / path.name)
