"""The files of a repository, in a directory, on the hub, or the one of a .gguf: listed and opened, never trusted.

A directory may hold links that lead out of it or in circles, pipes that never answer, and sparse files of a
terabyte. A hub repository is read by range requests, within a number of bytes.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from formats import hub
from formats.download import read_range
from inspection.findings import Unexamined

MAX_FILES = 20_000
SPARSE = 64 << 20  # bytes from which a file of holes is not read
BUDGET = 960_000  # bytes read from the hub, unless all of it is wanted
BLOCK = 1 << 14  # of one request


@dataclass
class Entry:
    """One file: `open` gives a seekable stream. `problem` is (finding, reason) where it must not be opened.
    `sha256` is what the hub says of it; `local` its path on this machine."""

    path: str
    size: int
    open: Callable[[], BinaryIO]
    problem: tuple[str, str] | None = None
    sha256: str | None = None
    local: Path | None = None
    budget: "Budget | None" = None

    def read(self, limit: int) -> bytes:
        """All of its bytes, if they are at most `limit`."""
        if self.problem:
            raise Unexamined(*self.problem)
        if self.size > limit:
            raise Unexamined("too-large", f"{self.size:,} bytes, of which at most {limit:,} are read")
        with self.open() as stream:
            return stream.read(limit)


@dataclass
class Tree:
    """A repository's files. `repo` is its name, `revision` its commit where one is known, `root` its local place."""

    repo: str
    entries: list[Entry]
    revision: str | None = None
    root: Path | None = None
    left_out: tuple[str, ...] = ()
    budget: "Budget | None" = None

    def __post_init__(self):
        self._by_path = {entry.path: entry for entry in self.entries}

    def get(self, path: str) -> Entry | None:
        return self._by_path.get(path)


def local_tree(path: Path) -> Tree:
    """The tree of a directory, or of one file."""
    if path.is_file():
        return Tree(path.name, [_local_entry(path, path.name, path.parent)], None, path)
    entries, left_out = [], []
    for found, name in _walk(path, left_out):
        if len(entries) == MAX_FILES:
            entries.append(
                Entry(name, 0, _nothing, ("too-large", f"more than {MAX_FILES:,} files; the rest is left out"))
            )
            break
        entries.append(_local_entry(found, name, path))
    revision = path.name if path.parent.name == "snapshots" else None
    repo = path.parent.parent.name.removeprefix("models--").replace("--", "/") if revision else path.resolve().name
    return Tree(repo, entries, revision, path, tuple(left_out))


def _walk(root: Path, left_out: list[str]) -> Iterator[tuple[Path, str]]:
    """All that is not a directory, in order, links not followed; Git's own folder is left out."""
    pending = [(root, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            found = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            yield folder, prefix.rstrip("/") or "."
            continue
        for entry in found:
            name = prefix + entry.name
            if entry.name == ".git" and not entry.is_symlink():
                left_out.append(name)
            elif entry.is_dir(follow_symlinks=False):
                pending.append((Path(entry.path), f"{name}/"))
            else:
                yield Path(entry.path), name


def _nothing() -> BinaryIO:
    return io.BytesIO()


def _local_entry(path: Path, name: str, root: Path) -> Entry:
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    try:
        if path.is_symlink() and (problem := _link_problem(path, root)):
            return Entry(shown, 0, _nothing, problem, local=path)
        status = path.stat()
    except (OSError, RuntimeError) as error:
        return Entry(shown, 0, _nothing, ("unreadable", str(error)), local=path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory that cannot be listed" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        id = "unreadable" if stat.S_ISDIR(status.st_mode) else "special-file"
        return Entry(shown, 0, _nothing, (id, kind), local=path)
    problem = None
    if status.st_size > SPARSE and status.st_blocks * 512 < status.st_size // 16:
        problem = ("sparse-file", f"{status.st_size:,} bytes, of which {status.st_blocks * 512:,} are on disk")
    return Entry(shown, status.st_size, lambda: _open(path), problem, local=path)


def _link_problem(path: Path, root: Path) -> tuple[str, str] | None:
    target = str(path.readlink())
    try:
        real, home = path.resolve(strict=True), root.resolve()
    except (OSError, RuntimeError):
        outside = Path(target).is_absolute() or not Path(os.path.normpath(path.parent / target)).is_relative_to(root)
        if outside and not Path(target).exists() and root.parent.name != "snapshots":
            return "symlink-outside", f"a link to {target}, outside the repository"
        return "symlink-broken", f"a link to {target}, which is not there"
    if real.is_relative_to(home):
        return ("symlink-inside", f"a link to {target}") if real.is_dir() else None
    if root.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs"):
        return None  # the hub's own cache keeps files so
    return "symlink-outside", f"a link to {target}, outside the repository"


def _open(path: Path) -> BinaryIO:
    """A file opened so that a pipe that took its place meanwhile cannot block us."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unexamined("special-file", "not a regular file")
    return os.fdopen(descriptor, "rb")


# ---- on the hub ------------------------------------------------------------------------------------------------------


class Budget:
    """How many bytes may still be read over the network."""

    def __init__(self, limit: int = BUDGET):
        self.limit, self.used = limit, 0

    def spend(self, size: int) -> None:
        if self.used + size > self.limit:
            raise Unexamined(
                "not-read", f"reading it would exceed {self.limit:,} bytes over the network; --deep reads all"
            )
        self.used += size

    @property
    def left(self) -> int:
        return self.limit - self.used


def hub_tree(repo: str, revision: str | None) -> Tree:
    """The tree of a hub repository; nothing of its files is read yet."""
    commit, files = hub.listing(repo, revision)
    budget = Budget()
    entries = [
        Entry(
            path=file.name,
            size=file.size,
            open=_remote(repo, commit, file, budget),
            sha256=file.digest if len(file.digest) == 64 else None,
            budget=budget,
        )
        for file in sorted(files[:MAX_FILES], key=lambda file: (not file.name.endswith(".safetensors"), file.size))
    ]
    if len(files) > MAX_FILES:
        entries.append(Entry("...", 0, _nothing, ("too-large", f"more than {MAX_FILES:,} files; the rest is left out")))
    return Tree(repo, entries, commit, None, budget=budget)


def _remote(repo: str, commit: str, file: hub.RemoteFile, budget: Budget) -> Callable[[], BinaryIO]:
    blocks: dict[int, bytes] = {}  # shared by all streams of the file: nothing is read twice
    return lambda: io.BufferedReader(RemoteFile(hub.url(repo, commit, file.name), file.size, blocks, budget), 1024)


class RemoteFile(io.RawIOBase):
    """A file on the hub as a seekable stream: blocks are read by range requests when they are needed, and kept."""

    def __init__(self, url: str, size: int, blocks: dict[int, bytes], budget: Budget):
        self._url, self._size, self._blocks, self._budget, self._at = url, size, blocks, budget, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        if self._at >= self._size:
            return 0
        number = self._at // BLOCK
        if number not in self._blocks:
            last = min(self._size - 1, self._at + len(buffer) - 1) // BLOCK
            missing = [at for at in range(number, last + 1) if at not in self._blocks]
            last = next((at - 1 for at in range(number, last + 1) if at not in missing), last)
            start, end = number * BLOCK, min(self._size, (last + 1) * BLOCK)
            self._budget.spend(end - start)
            data = read_range(self._url, start, end - start)
            for at in range(number, last + 1):
                self._blocks[at] = data[(at - number) * BLOCK : (at - number + 1) * BLOCK]
        block, within = self._blocks[number], self._at % BLOCK
        piece = block[within : within + len(buffer)]
        if not piece:
            raise Unexamined("unreadable", "the hub sent fewer bytes than it announced")
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
