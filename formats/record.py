"""conversion.json: what was converted from what, and every byte of the result accounted for.

One such file lies beside the results (inside a directory, or in the folder of a .gguf file), with one entry for each:
"." for the directory itself, else the file's name. An entry names the source (and the SHA-256 of each of its files),
the options, the size and SHA-256 of each written file, and for each tensor where its bytes lie, their SHA-256 and how
far its values are from the source's. `verify` re-reads a result and names what is no longer as it was written.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.files import sha256, write_text
from formats.json_file import read_json

NAME = "conversion.json"
BLOCK = 1 << 22  # bytes


class HashThread:
    """SHA-256 of files in the background: hashlib lets other threads run meanwhile."""

    def __init__(self, files: dict[str, Path]):
        pool = ThreadPoolExecutor(2)
        self._files = {name: (file.stat().st_size, pool.submit(sha256, file)) for name, file in files.items()}
        pool.shutdown(wait=False)

    def result(self) -> dict[str, dict[str, Any]]:
        """File name → size in bytes and digest."""
        return {name: {"bytes": size, "sha256": future.result()} for name, (size, future) in self._files.items()}


def sha256_of_range(path: Path, offset: int, size: int) -> str:
    """The digest of `size` bytes of a file, or of those of them that are there."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(offset)
        while size and (block := stream.read(min(BLOCK, size))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def sign(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with a digest over itself, so that a changed byte of the record is found too."""
    return {**entry, "record_sha256": _digest(entry)}


def _digest(entry: dict[str, Any]) -> str:
    bare = {key: value for key, value in entry.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def to_text(results: dict[str, Any]) -> str:
    return json.dumps({"results": results}, indent=1) + "\n"


def write_entry(out: Path, entry: dict[str, Any]) -> None:
    """Puts the entry of a file into its folder's record. Safe beside another conversion into the same folder."""
    path = out.parent / NAME
    with _lock(out.parent):
        results = _results(path) if path.exists() else {}
        write_text(path, to_text(results | {out.name: entry}))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _results(path: Path) -> dict[str, Any]:
    results = read_json(path).get("results")
    if not isinstance(results, dict) or not all(isinstance(entry, dict) for entry in results.values()):
        raise ValueError(f"{path}: not a record of conversions; move it away")
    return results


def is_result(directory: Path) -> bool:
    """Whether a directory was written by a conversion."""
    try:
        return "." in _results(directory / NAME)
    except (ValueError, OSError):
        return False


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """The entry of a result, unchecked; None where its folder has no record or none of it."""
    path = folder / NAME
    return _results(path).get(name) if path.is_file() else None


def verify(out: Path, progress: Callable[[int], None] = lambda size: None) -> dict[str, Any]:
    """Re-reads a result and returns its entry. ValueError names the files and tensors that changed, in one line.

    `progress` is called with the number of bytes just read.
    """
    if not out.exists():
        raise ValueError(f"--verify {out}: no such file or directory")
    path, name = (out / NAME, ".") if out.is_dir() else (out.parent / NAME, out.name)
    if not path.exists():
        raise ValueError(f"--verify {out}: there is no {path}, which a conversion writes beside its result")
    entry = _results(path).get(name)
    if entry is None:
        raise ValueError(f"--verify {out}: {path} has no entry for it; it was not written by a conversion")
    if entry.get("record_sha256") != _digest(entry) or not _is_whole(entry):
        raise ValueError(f"{path}: the record itself was changed, so it proves nothing; convert again")
    changed = [text for file in entry["files"] for text in _changes(path.parent, file, entry, progress)]
    if changed:
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        raise ValueError(f"{out} is not as it was written: {'; '.join(changed[:4])}{more}")
    return entry


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry has the form that is written here: its digest can be a stranger's work too."""
    files, tensors = entry.get("files"), entry.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        return False
    plain = all(Path(name).name == name and isinstance(file, dict) for name, file in files.items())
    counts = [file.get("bytes") for file in files.values()] if plain else [None]
    for tensor in tensors.values():
        if not isinstance(tensor, dict) or tensor.get("file") not in files:
            return False
        counts += [tensor.get("offset"), tensor.get("bytes")]
    return plain and all(type(count) is int and count >= 0 for count in counts)


def _changes(folder: Path, file: str, entry: dict[str, Any], progress: Callable[[int], None]) -> list[str]:
    """What changed in one file: tensors by name where the record knows their places."""
    path, expected = folder / file, entry["files"][file]
    if not path.is_file():
        return [f"{file} is missing"]
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            whole.update(block)
            progress(len(block))
    if whole.hexdigest() == expected.get("sha256"):
        return []
    tensors = {name: tensor for name, tensor in entry["tensors"].items() if tensor["file"] == file}
    found = [
        f"tensor {name} in {file}"
        for name, place in tensors.items()
        if sha256_of_range(path, place["offset"], place["bytes"]) != place.get("sha256")
    ]
    size = path.stat().st_size
    if size != expected["bytes"]:
        found.append(f"{file} has {size:,} bytes instead of {expected['bytes']:,}")
    return found or [f"{file} outside its tensors (header or padding)" if tensors else file]
