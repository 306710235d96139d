"""ops/memory.py: memory that is given back or moved holds the same afterwards, and little is in memory twice."""

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from ops import memory
from ops.memory import HUGE_PAGE, PIECE, HugePages, release_unused_memory

SIZE = 4 << 20


def resident(address: int) -> int:
    """Bytes in memory of the mapping that begins at `address`."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


def protect(address: int, size: int, access: int) -> None:
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are a file's")
@pytest.mark.parametrize("changed", [False, True])
def test_only_a_files_unchanged_pages_are_given_back(changed, tmp_path):
    """As the code of a library, and its relocated tables, which the loader changes and then makes read-only."""
    path = tmp_path / "library"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    expected = bytearray(mapped[:])
    if changed:
        mapped[SIZE // 2] = expected[SIZE // 2] = 77
    protect(address, SIZE, mmap.PROT_READ)
    try:
        release_unused_memory()
        assert (resident(address) > 0) == changed
        assert mapped[:] == expected
    finally:
        protect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_little_is_in_memory_twice_while_it_moves(monkeypatch):
    sizes = []

    def replace(address: int, size: int) -> bool:
        sizes.append(size)
        return True

    monkeypatch.setattr(memory, "_replace", replace)
    monkeypatch.setattr(memory, "_collapse", replace)
    held = mmap.mmap(-1, 12 * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = HugePages([(ctypes.addressof(ctypes.c_char.from_buffer(held)), len(held))])
    assert pages.move(100 * HUGE_PAGE) == sum(sizes) == pages.moved >= 10 * HUGE_PAGE
    assert max(sizes) <= PIECE and not pages.left
