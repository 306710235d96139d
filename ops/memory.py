"""What happens to memory that is no longer needed: returned to the system, kept, or dropped and read again."""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

import torch


def release_freed_memory() -> None:
    """Returns freed memory to the system; glibc would keep the 110 MB that reading a tokenizer.json takes."""
    with suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """For training on a CPU, which asks for the same memory at each step. glibc would give it to the system and get it
    again page by page, which for a matrix of 150 MB takes three times as long as the arithmetic on it."""
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # large blocks too come from the heap, which is kept
        libc.mallopt(trim_threshold, -1)  # never shortened


def release_file_pages(tensor: torch.Tensor) -> None:
    """Gives back the memory of a tensor that is mapped from a file and unchanged; it is read again when it is needed.

    Whatever else the tensor's memory is, it stays: the kernel is asked about each page (Linux, admin-guide/mm/pagemap).
    """
    page = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    with suppress(OSError, AttributeError):
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = bytearray(file.read(max(0, 8 * (last - first))))
        pages = torch.frombuffer(entries, dtype=torch.int64) if entries else torch.empty(0, dtype=torch.int64)
        present, swapped, of_file = (pages >> bit & 1 == 1 for bit in (63, 62, 61))
        if len(pages) == last - first and not swapped.any() and not (present & ~of_file).any():
            madvise = ctypes.CDLL(None, use_errno=True).madvise
            madvise(ctypes.c_void_p(page * first), ctypes.c_size_t(page * len(pages)), mmap.MADV_DONTNEED)
