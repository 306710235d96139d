"""A file mapped into memory, for readers of weights: nothing is copied until changed, and pages can be released."""

import mmap
import sys
from pathlib import Path

# Copy-on-write: torch wants writable memory, the file stays unchanged. Linux would reserve memory for the whole file,
# which fails for a model larger than the machine's memory, unless asked not to (MAP_NORESERVE, which Python has from
# 3.13 on).
PRIVATE: dict[str, int] = {"access": mmap.ACCESS_COPY}
if sys.platform == "linux":
    PRIVATE = {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}


def map_file(path: Path) -> mmap.mmap:
    """A private, writable mapping of a whole file, which must not be empty. Changes stay in this process."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, **PRIVATE)


def release(mapping: mmap.mmap, start: int, end: int) -> None:
    """Releases the memory of bytes start .. end (and of the page in which they end); unchanged ones stay readable
    from the file. Changes made to them are lost."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
