"""A JSON object in a file of its own, read with limits: config.json and its relatives, records, results."""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.mistaken import mistaken

COPY = re.compile(r"[ _-]*(?:\(\d+\)|copy)(?=\.)", re.IGNORECASE)  # what a browser or a file manager adds to a name
MAX_JSON = 32_000_000  # bytes; the names of 10^5 tensors stay far below, and parsing it stays within a gigabyte


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in an untrusted file; ValueError names the file where it is not one."""
    if path.is_dir():
        raise ValueError(f"{path}: a directory, not a file of JSON; give the file")
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        alike = next((file.name for file in beside if COPY.sub("", file.name).lower() == path.name), None)
        fix = f"rename {alike}" if alike and alike != path.name else "download it again"
        raise ValueError(f"{path}: no such file, but a checkpoint directory needs one; {fix}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes is too large for this file; download it again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        with path.open("rb") as file:
            found = mistaken(file.read(64), is_json=True)
        if found:
            raise ValueError(f"{path}: {found}") from None
        raise ValueError(f"{path}: not valid JSON ({str(error)[:80]}); download the file again") from None
    if not isinstance(value, kind):
        wanted = "an object {...}" if kind is dict else "a list [...]"
        raise ValueError(f"{path}: a JSON {type(value).__name__}, not {wanted}; download the file again")
    return value


@contextmanager
def uncollected() -> Iterator[None]:
    """Many new objects without the garbage collector, which would look at all there are again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
