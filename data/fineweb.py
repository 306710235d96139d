"""Downloads shards of fineweb10B-gpt2 (FineWeb in GPT-2's tokens, https://huggingface.co/datasets/kjj0/fineweb10B-gpt2).

    python data/shards.py download 0 1-2 --out runs/fineweb      0 is the validation shard, 1 to 103 are for training

An interrupted download continues where it stopped. A file gets its name only once its size, header and ids are
right. HF_ENDPOINT names another hub, as for huggingface_hub.
"""

import argparse
import os
from pathlib import Path

import console
from data.shard_format import HEADER_BYTES, Shard
from formats.download import transfer
from formats.files import publish

LAST = 103
TOKENS, TOKENS_OF_LAST = 100_000_000, 55_324_043
VOCABULARY = 50257
FOLDER = "datasets/kjj0/fineweb10B-gpt2/resolve/main"


def shard_name(number: int) -> str:
    return f"fineweb_{'val' if number == 0 else 'train'}_{number:06d}.bin"


def shard_bytes(number: int) -> int:
    return HEADER_BYTES + 2 * (TOKENS_OF_LAST if number == LAST else TOKENS)


def parse_numbers(texts: list[str]) -> list[int]:
    """["0-2", "7"] -> [0, 1, 2, 7]"""
    numbers: set[int] = set()
    for text in texts:
        first, dash, last = text.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isascii() and end.isdecimal() for end in ends):
            raise ValueError(f"download {text}: write numbers and ranges, as in 0 1-10")
        low, high = (int(end) if len(end) < 10 else LAST + 1 for end in ends)
        if not low <= high <= LAST:
            raise ValueError(f"download {text}: there are the shards 0 (validation) to {LAST}")
        numbers |= set(range(low, high + 1))
    return sorted(numbers)


def download(url: str, path: Path, size: int) -> None:
    """Fetches a shard of known size; a partial transfer stays in `path`.part and is continued from there."""
    part = path.with_name(path.name + ".part")
    with console.byte_progress() as progress:
        task = progress.add_task(path.stem, total=size)
        transfer(url, {}, part, size, lambda have: progress.update(task, completed=have))
    try:
        Shard(part).check(VOCABULARY)
    except ValueError:
        part.unlink()
        raise
    publish(part, path)


def add_command(commands) -> None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    parser = commands.add_parser("download", help="shards of fineweb10B-gpt2 by number")
    parser.add_argument("numbers", nargs="+", metavar="NUMBER", help="and ranges, as in 0 1-10; 0 is for validation")
    parser.add_argument("--out", type=Path, default=Path("runs/fineweb"), help="default: runs/fineweb")
    parser.add_argument("--url", default=f"{endpoint}/{FOLDER}", help="folder of the files, for a mirror")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    numbers = parse_numbers(arguments.numbers)
    if not arguments.url.startswith(("https://", "http://")):
        raise ValueError(f"--url {arguments.url}: not an address; it begins with https:// or http://")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        path = arguments.out / shard_name(number)
        if path.exists() and path.stat().st_size == shard_bytes(number):
            Shard(path)
            console.notice(f"{path} is there already")
        else:
            download(f"{arguments.url.rstrip('/')}/{path.name}", path, shard_bytes(number))
        print(path)
    folder = "" if arguments.out == Path("runs/fineweb") else f" --set 'data.train={arguments.out}/fineweb_train_*.bin'"
    console.notice(f"train on them: python train.py configs/toy.yaml{folder}")
