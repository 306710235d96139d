"""What happens to memory that is no longer needed: returned to the system, kept, or dropped and read again."""

import ctypes
import mmap
from contextlib import suppress
from ctypes import c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch


@cache
def _libc() -> ctypes.CDLL:
    """The C library, opened once: that takes half a millisecond."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
    libc.mmap.restype = libc.mremap.restype = c_void_p
    libc.mmap.argtypes = [c_void_p, c_size_t, *3 * [c_int], c_int64]
    libc.mremap.argtypes = [c_void_p, c_size_t, c_size_t, c_int, c_void_p]
    libc.munmap.argtypes = [c_void_p, c_size_t]
    return libc


def keep_freed_memory() -> None:
    """For training on a CPU, which asks for the same memory at each step. glibc would give it to the system and get it
    again page by page, which for a matrix of 150 MB takes three times as long as the arithmetic on it."""
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    with suppress(OSError, AttributeError):
        _libc().mallopt(mmap_max, 0)  # large blocks too come from the heap, which is kept
        _libc().mallopt(trim_threshold, -1)  # never shortened


def release_file_pages(tensor: torch.Tensor) -> None:
    """Gives back the memory of a tensor that is mapped from a file and unchanged; it is read again when it is needed.

    Whatever else the tensor's memory is, it stays.
    """
    _release_unchanged(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


LARGE = 1 << 20  # bytes of a library's mapping that is worth a look


def release_unused_memory() -> None:
    """Returns memory to the system that loading took and running does not need: what was freed, of which glibc would
    keep the 110 MB that reading a tokenizer.json takes, and the code of libraries: 50 MB after PyTorch was imported,
    20 more after a model was built. Code that is used again is mapped again, as the system keeps a file's pages for as
    long as nothing else needs the memory. 5 ms.
    """
    with suppress(OSError, AttributeError):  # another C library has no malloc_trim
        _libc().malloc_trim(0)
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            range_, access, _, _, inode, *_ = line.split()
            begin, end = (int(part, 16) for part in range_.split("-"))
            if access in ("r-xp", "r--p") and inode != "0" and end - begin >= LARGE:
                _release_unchanged(begin, end)


def _release_unchanged(begin: int, end: int) -> None:
    """Drops pages that are all of a file; the kernel is asked about each one (Linux, admin-guide/mm/pagemap)."""
    page = mmap.PAGESIZE
    first, last = -(-begin // page), end // page
    with suppress(OSError, AttributeError):
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            pages = np.frombuffer(file.read(max(0, 8 * (last - first))), np.uint64) >> np.uint64(61)
        present, swapped, of_file = (pages & np.uint64(flag) != 0 for flag in (4, 2, 1))
        if len(pages) == last - first and not swapped.any() and not (present & ~of_file).any():
            _libc().madvise(page * first, page * len(pages), mmap.MADV_DONTNEED)


HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on aarch64 with pages of 4 KB
PIECE = 4 * HUGE_PAGE  # moved at once, and in memory twice meanwhile


class HugePages:
    """Moves memory into huge pages where it lies, a piece at a time: its addresses and contents stay.

    A read of 4 KB pages waits for the processor's page tables again and again, above all in a virtual machine. Memory
    that is mapped from a file, privately, is copied into new huge pages, which then take the place of the file's; other
    memory is collapsed by the kernel (madvise(2), Linux 6.1). Only whole huge pages within one mapping are moved.
    Nobody else may write to the memory meanwhile. Where the system has no huge pages, nothing happens.
    """

    def __init__(self, places: list[tuple[int, int]]):
        """`places`: address and bytes of each tensor."""
        self.left: list[tuple[int, int]] = []  # begin, end
        self.moved = 0  # bytes
        for begin, end, _ in _mappings():
            first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            before = len(self.left)  # of other mappings, which may lie side by side with this one
            for address, size in sorted(places):
                low = max(first, address // HUGE_PAGE * HUGE_PAGE)
                high = min(last, -(-(address + size) // HUGE_PAGE) * HUGE_PAGE)
                if self.left[before:] and self.left[-1][1] >= low >= self.left[-1][0]:
                    self.left[-1] = (self.left[-1][0], max(high, self.left[-1][1]))
                elif low < high:
                    self.left.append((low, high))
        if sum(high - low for low, high in self.left) > available_memory() // 2:
            self.left = []  # pages of a file can be dropped when memory is short, these can't

    def move(self, size: int) -> int:
        """Moves the next `size` bytes, a multiple of HUGE_PAGE; returns how many it has moved."""
        before, mappings = self.moved, _mappings() if self.left else []
        while self.left and self.moved - before < size:
            low, high = self.left.pop()
            piece = min(high - low, size - (self.moved - before), PIECE)
            if piece < high - low:
                self.left.append((low, high - piece))
            low = high - piece
            of_file = [of_file for begin, end, of_file in mappings if begin <= low and high <= end]
            if not of_file or not (_replace if of_file[0] else _collapse)(low, piece):
                self.left = []
                break
            self.moved += piece
        return self.moved - before


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Lets a tensor that was not written to yet lie in huge pages, where the system has them."""
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if size > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError, AttributeError):
            _libc().madvise(first, size, mmap.MADV_HUGEPAGE)


def available_memory() -> int:
    """Bytes that programs may still take, those of files' pages included; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _mappings() -> list[tuple[int, int, bool]]:
    """Private writable memory of this process: begin, end, and whether it is mapped from a file."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            range_, access, _, _, inode, *_ = line.split()
            if access.startswith("rw-p"):
                begin, end = (int(part, 16) for part in range_.split("-"))
                found.append((begin, end, inode != "0"))
    return found


def _collapse(address: int, size: int) -> bool:
    hugepage, collapse = 14, 25  # madvise(2); Python does not name the second one yet
    return all(_libc().madvise(address, size, advice) == 0 for advice in (hugepage, collapse))


def _replace(address: int, size: int) -> bool:
    """Puts huge pages with the same contents in the place of `size` bytes; False, and nothing changed, if it can't."""
    libc, failed, maymove_fixed = _libc(), c_void_p(-1).value, 1 | 2
    access = mmap.PROT_READ | mmap.PROT_WRITE
    new = libc.mmap(None, size + HUGE_PAGE, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if new == failed:
        return False
    begin = -(-new // HUGE_PAGE) * HUGE_PAGE
    moved = libc.madvise(begin, size, mmap.MADV_HUGEPAGE) == 0
    if moved:
        ctypes.memmove(begin, address, size)
        moved = libc.mremap(begin, size, size, maymove_fixed, address) == address
    for low, high in (
        ((new, begin), (begin + size, new + size + HUGE_PAGE)) if moved else ((new, new + size + HUGE_PAGE),)
    ):
        if low < high:
            libc.munmap(low, high - low)
    return moved
