"""Files that are either whole or absent: written under a temporary name in the same folder, fsynced, then renamed.

A reader, or a run that is killed at any moment, never sees half a file under a final name (POSIX rename(2) replaces
atomically; the fsyncs order the data before the name).
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def as_path(name: str, value: Any) -> Path:
    """A path that a script gives, which is not there for an empty text: Path("") would be the current directory."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{name} is {value!r}; give a path, as a str or a pathlib.Path")
    return Path(value)


def fsync(path: Path) -> None:
    """Flushes one file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """The system's errors name the final path: a temporary one says nothing to a user, and a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(path)
        for name in ("filename", "filename2"):
            if isinstance(value := getattr(error, name), str | Path):
                setattr(error, name, str(value).replace(str(temporary), str(path)))
        raise


def _temporary(path: Path, suffix: str = "tmp") -> Path:
    """An unguessable name beside `path` that no other thread or node on the same disk uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{suffix}")


def publish(temporary: Path, path: Path) -> None:
    """Gives a complete file its final name."""
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there gets the final name when the block succeeds.

    The temporary file exists already, empty and new (never through a link). The final one has the mode that the
    umask implies, whatever wrote it.
    """
    path = Path(path)
    temporary = _temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path, temporary):
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield temporary
            temporary.chmod(mode)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """The same for a directory of files. An older directory of that name is replaced once the new one is complete."""
    path = Path(path)
    temporary, old = _temporary(path), _temporary(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path, temporary):
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file() and not file.is_symlink():
                    file.chmod(mode)
                fsync(file)
            fsync(temporary)
            if path.exists():
                path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path | str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
