"""Downloads shards of fineweb10B-gpt2 (FineWeb in GPT-2's tokens, https://huggingface.co/datasets/kjj0/fineweb10B-gpt2).

    python data/fineweb.py --out data/fineweb --shards 0-2      0 is the validation shard, 1 to 103 are for training

A download that broke off goes on where it stopped. A file gets its name only when its size and header are right.
"""

import http.client
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import console
from data.shards import HEADER_BYTES, Shard
from formats.files import fsync

LAST = 103
TOKENS, TOKENS_OF_LAST = 100_000_000, 55_324_043
SECONDS = 30  # without a single byte


def shard_name(number: int) -> str:
    return f"fineweb_{'val' if number == 0 else 'train'}_{number:06d}.bin"


def shard_bytes(number: int) -> int:
    return HEADER_BYTES + 2 * (TOKENS_OF_LAST if number == LAST else TOKENS)


def parse_range(text: str) -> list[int]:
    """`0-2,7` -> [0, 1, 2, 7]"""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--shards {text}: write numbers and ranges, as in 0-2,7")
        numbers |= set(range(int(first), int(last or first) + 1)) if len(last) < 4 else {LAST + 1}
    if not numbers or max(numbers) > LAST:
        raise ValueError(f"--shards {text}: there are the shards 0 (validation) to {LAST}")
    return sorted(numbers)


def download(url: str, path: Path, size: int) -> None:
    """Fetches a file of a known size; what is already in `path`.part is kept."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have < size:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response, console.byte_progress() as progress:
                if response.status != 206:
                    have = 0  # the server sends the whole file
                stated = response.headers.get("Content-Length")
                if stated is not None and have + int(stated) != size:
                    raise ValueError(f"{url}: {have + int(stated):,} bytes, but this shard has {size:,}")
                task = progress.add_task(path.name, total=size, completed=have)
                with part.open("ab" if have else "wb") as file:
                    while (chunk := response.read(1 << 20)) and have <= size:
                        file.write(chunk)
                        have += len(chunk)
                        progress.update(task, completed=have)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise ValueError(f"{url}: {error}; run the same command again to go on") from None
    if part.stat().st_size != size:
        raise ValueError(f"{url}: {part.stat().st_size:,} of {size:,} bytes came; run the same command again to go on")
    try:
        Shard(part)
    except ValueError:
        part.unlink()
        raise
    fsync(part)
    part.replace(path)


def main() -> None:
    parser = console.ArgumentParser(description="Downloads FineWeb shards by number.")
    parser.add_argument("--out", type=Path, default=Path("runs/fineweb"))
    parser.add_argument("--shards", default="0-1", help="numbers and ranges, as in 0-2,7; 0 is the validation shard")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{endpoint}/datasets/kjj0/fineweb10B-gpt2/resolve/main"
    parser.add_argument("--url", default=url, help="folder of the files, for a mirror")
    arguments = parser.parse_args()
    numbers = parse_range(arguments.shards)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        path = arguments.out / shard_name(number)
        if path.exists() and path.stat().st_size == shard_bytes(number):
            Shard(path)
            console.notice(f"{path} is there")
            continue
        download(f"{arguments.url.rstrip('/')}/{path.name}", path, shard_bytes(number))
        print(path)


if __name__ == "__main__":
    console.run(main)
