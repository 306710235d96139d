"""What `python data/shards.py inspect` shows: a shard's header, counts, document lengths and decoded samples."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from data.shard_format import END_OF_TEXT, Shard

# Without a tokenizer: uint16 shards are GPT-2's as a rule, and the uint32 variant is here for Qwen3's vocabulary.
USUAL_SEPARATOR = {2: 50256, 4: 151643}
SAMPLE_TOKENS = 60
BAR = 40


def document_lengths(ids: np.ndarray, separator: int) -> np.ndarray:
    """The lengths of the documents in a stretch of ids, their separators not counted: int64 [N].

    What stands before the first separator is the rest of a document that began in another shard.
    """
    starts = np.flatnonzero(ids == separator)
    edges = np.concatenate(([-1] if len(ids) and (not len(starts) or starts[0] > 0) else [], starts, [len(ids)]))
    return np.diff(edges).astype(np.int64) - 1


def histogram(lengths: np.ndarray) -> Table:
    """Document lengths by powers of two, a bar a line."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    counts = np.bincount(np.frexp(lengths)[1])  # the binary exponent: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7
    bits = np.flatnonzero(counts)
    for exponent in range(bits[0], bits[-1] + 1):
        low, high = (1 << exponent) >> 1, (1 << exponent) - 1
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(span, f"{counts[exponent]:,}", Text(bar(counts[exponent] / counts.max()), style="cyan"))
    return table


def bar(share: float) -> str:
    """A share of BAR characters, to an eighth of one; any share above zero is visible."""
    eighths = max(round(8 * BAR * share), share > 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def printable(text: str) -> str:
    """One line that no character of a stranger's text can break or colour."""
    text = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def header(shard: Shard) -> dict[str, str]:
    dtype = shard.tokens.dtype
    facts = {"format": f"version {shard.version}, {dtype.name} (magic {shard.magic})"}
    facts["tokens"] = f"{len(shard):,} in {shard.path.stat().st_size:,} bytes"
    if len(shard):
        facts["ids"] = f"{int(shard.tokens.min()):,} to {int(shard.tokens.max()):,}"
    return facts


def counts(lengths: np.ndarray, starts: np.ndarray, separator: int) -> dict[str, str]:
    facts = {"documents": f"{len(starts):,} begin, each after token {separator:,}"}
    if len(lengths) > len(starts):
        facts["documents"] += "; one began earlier"
    if len(lengths):
        median, most = int(np.median(lengths)), int(lengths.max())
        facts["lengths"] = f"median {median:,}, mean {lengths.mean():,.1f}, longest {most:,} tokens"
    return facts


def samples(shard: Shard, starts: np.ndarray, number: int, decode: Callable | None) -> list[RenderableType]:
    """The beginnings of `number` documents, evenly spread over the shard."""
    chosen = starts[np.linspace(0, len(starts) - 1, min(number, len(starts))).astype(int)] if len(starts) else []
    shown: list[RenderableType] = []
    for start in chosen:
        ids = shard.tokens[start + 1 : start + 1 + SAMPLE_TOKENS].tolist()
        text = printable(decode(ids)) if decode else " ".join(map(str, ids))
        shown += [Text(f"\nfrom token {start + 1:,}", style="bold"), Padding.indent(Text(text), 2)]
    return shown


def report(path: Path, tokenizer: Path | None, separator: str | None, number: int) -> Group:
    """All about one shard. ValueError for a file that is not a shard, or is one of another tokenizer."""
    shard, decode = Shard(path), None
    if tokenizer is not None:
        from data.texts import load_tokenizer, separator_of, vocabulary_of

        loaded = load_tokenizer(tokenizer)
        shard.check(vocabulary_of(loaded))
        end = separator_of(loaded, separator or END_OF_TEXT)
        decode = partial(loaded.decode, skip_special_tokens=False)
    elif separator is None:
        end = USUAL_SEPARATOR[shard.tokens.dtype.itemsize]
    elif separator.isdecimal() and len(separator) < 11:
        end = int(separator)
    else:
        raise ValueError(f"--separator {separator}: without --tokenizer it is a token's id, as in 50256")
    starts, lengths = np.flatnonzero(shard.tokens == end), document_lengths(shard.tokens, end)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    for name, value in (header(shard) | counts(lengths, starts, end)).items():
        facts.add_row(name, value)
    parts: list[RenderableType] = [Text(str(path), style="bold"), Padding.indent(facts, 2)]
    if len(lengths):
        parts += [Text(), Padding.indent(histogram(lengths), 2)]
    return Group(*parts, *samples(shard, starts, number, decode))


def add_command(commands) -> None:
    parser = commands.add_parser("inspect", help="header, counts, document lengths and samples of a shard")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder (without: samples are ids)")
    parser.add_argument(
        "--separator", help=f"token before each document (default {END_OF_TEXT}; without tokenizer: id)"
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="beginnings of documents to show")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.samples < 0:
        raise ValueError(f"--samples {arguments.samples}: give 0 or more")
    stdout = Console(highlight=False)
    for number, path in enumerate(arguments.files):
        if number:
            stdout.print()
        stdout.print(report(path, arguments.tokenizer, arguments.separator, arguments.samples))
