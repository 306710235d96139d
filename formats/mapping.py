"""A file mapped into memory, for readers of weights: nothing is copied until changed, and pages can be released."""

import ctypes
import mmap
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

# Copy-on-write: torch wants writable memory, the file stays unchanged. Linux would reserve memory for the whole file,
# which fails for a model larger than the machine's memory, unless asked not to (MAP_NORESERVE, which Python has from
# 3.13 on).
PRIVATE: dict[str, int] = {"access": mmap.ACCESS_COPY}
if sys.platform == "linux":
    PRIVATE = {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}


PIECE = 16 << 20  # bytes whose pages are looked up at a time: who maps something else waits for no more
_ahead: dict[tuple[int, ...], mmap.mmap] = {}  # mappings that `map_file` has not yet handed out


def map_file(path: Path) -> mmap.mmap:
    """A private, writable mapping of a whole file, which must not be empty. Changes stay in this process."""
    with path.open("rb") as file:
        known = _ahead.pop(_state(file), None)
        return mmap.mmap(file.fileno(), 0, **PRIVATE) if known is None else known


def map_ahead(path: Path) -> None:
    """Maps a file for the next `map_file` of it, and meanwhile a thread looks up its pages.

    The first reading of 1.2 GB finds 300,000 pages, which takes the first token 0.1 s; while PyTorch is imported it is
    free. Nothing happens where the system cannot do that or the file is more than half of the memory.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, ValueError), path.open("rb") as file:
        if 2 * os.fstat(file.fileno()).st_size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            mapping = _ahead[_state(file)] = mmap.mmap(file.fileno(), 0, **PRIVATE)
            threading.Thread(target=_look_up, args=(mapping,), daemon=True).start()


def _state(file: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _look_up(mapping: mmap.mmap) -> None:
    populate_read = 22  # madvise(2), Linux 5.14; mmap's own madvise would keep Python from running
    madvise, size = ctypes.CDLL(None).madvise, len(mapping)
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for at in range(0, size, PIECE):
        if madvise(start + at, min(PIECE, size - at), populate_read):
            return


def release(mapping: mmap.mmap, start: int, end: int) -> None:
    """Releases the memory of bytes start .. end (and of the page in which they end); unchanged ones stay readable
    from the file. Changes made to them are lost."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
