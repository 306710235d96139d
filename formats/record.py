"""model_context.json as the commands write it beside their results: what was made from what, every byte accounted for.

One such file is beside the results (inside a directory, or in the folder of a .gguf file), with one entry in
`results` for each: "." for the directory itself, else the file's name. An entry names the source (and the SHA-256 of
each of its files), the options (of a training run: stage, data, steps), the commit of this project, the size and
SHA-256 of each written file, and for each converted tensor where its bytes are, their SHA-256 and how far its values
are from the source's. `verify` re-reads a result and names what changed. audit.py adds everything else to the file.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.files import sha256, write_text
from formats.json_file import read_json

NAME = "model_context.json"
SCHEMA = "nanoqwen/model_context/1"
ROOT = Path(__file__).resolve().parent.parent
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
    """The digest of `size` bytes of a file, or of as many as there are."""
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


def made_by() -> dict[str, str | None]:
    """The version and commit of this project, which made the result."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return {"tool": f"nanoqwen {version}", "commit": commit()}


def commit(digits: int = 40) -> str | None:
    """The checkout's commit, `-dirty` behind it where files differ from it; None where this is no checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def write_directory(directory: Path, about: dict[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Writes the record of a complete directory, as the last of its files."""
    written = {file.name: file for file in sorted(directory.iterdir()) if file.is_file() and file.name not in left_out}
    entry = sign({**made_by(), **about, "files": HashThread(written).result(), "tensors": {}})
    (directory / NAME).write_text(to_text({".": entry}), encoding="utf-8")


def to_text(results: dict[str, Any], others: dict[str, Any] | None = None) -> str:
    """The file's text. `others`: the rest of its content."""
    return json.dumps({**(others or {}), "schema": SCHEMA, "results": results}, indent=1) + "\n"


def write_entry(out: Path, entry: dict[str, Any]) -> None:
    """Adds the entry of a file to its folder's record. Safe during another conversion into the same folder."""
    path = out.parent / NAME
    with _lock(out.parent):
        found = results(path)
        write_text(path, to_text(found | {out.name: entry}, read_json(path) if path.exists() else {}))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _results(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError:
        raise ValueError(f"{path}: not a record of results; move it away") from None
    results = content.get("results", {} if content.get("schema") == SCHEMA else None)
    if not isinstance(results, dict) or not all(isinstance(entry, dict) for entry in results.values()):
        raise ValueError(f"{path}: not a record of results; move it away")
    return results


def results(path: Path) -> dict[str, Any]:
    """The entries of a record; none where there is no record."""
    return _results(path) if path.exists() else {}


def is_result(directory: Path) -> bool:
    """Whether a directory was written by a conversion."""
    try:
        return "." in _results(directory / NAME)
    except (ValueError, OSError):
        return False


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """The entry of a result, unchecked; None where its folder has no record or no entry for it."""
    return results(folder / NAME).get(name)


def verify(out: Path, progress: Callable[[int], None] = lambda size: None) -> dict[str, Any]:
    """Re-reads a result and returns its entry. ValueError names the files and tensors that changed, in one line.

    `progress` is called with the number of bytes just read.
    """
    if not out.exists():
        raise ValueError(f"--verify {out}: no such file or directory")
    path, name = (out / NAME, ".") if out.is_dir() else (out.parent / NAME, out.name)
    if not path.exists():
        raise ValueError(
            f"--verify {out}: there is no {path}, which convert.py and train.py write beside their results"
        )
    entry = _results(path).get(name)
    if entry is None:
        raise ValueError(f"--verify {out}: {path} has no entry for it; it was not made by convert.py or train.py")
    if entry.get("record_sha256") != _digest(entry) or not _is_whole(entry):
        raise ValueError(f"{path}: the record itself was changed, so it proves nothing; make the result again")
    changed = [text for file in entry["files"] for text in _changes(path.parent, file, entry, progress)]
    if changed:
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        raise ValueError(f"{out} is not as written: {'; '.join(changed[:4])}{more}")
    return entry


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry has the form written here: a valid digest alone proves nothing, as anyone can compute it."""
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
    """What changed in one file: tensors by name where the record has their offsets."""
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
