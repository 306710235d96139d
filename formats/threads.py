"""Work on many tensors by as many threads as PyTorch uses."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch


def _alone() -> None:
    """Makes torch use one thread in this thread. The getter's first call sets the process's default."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def map_in_threads(function: Callable, pieces: Iterable) -> Iterator:
    """function(piece) for each piece, in order: computed by as many threads as torch uses, a few ahead of the consumer,
    so that the memory stays small however many pieces there are."""
    threads = torch.get_num_threads()
    remaining = iter(pieces)
    # In each thread of the pool torch uses that thread alone. The caller's setting is its own and stays, also where it
    # stops early; only the default for new threads has to be restored.
    try:
        with ThreadPoolExecutor(threads, initializer=_alone) as pool:
            waiting = deque(pool.submit(function, piece) for piece in islice(remaining, threads + 1))
            while waiting:
                result = waiting.popleft().result()
                torch.set_num_threads(torch.get_num_threads())
                yield result
                waiting.extend(pool.submit(function, piece) for piece in islice(remaining, 1))
    finally:
        torch.set_num_threads(torch.get_num_threads())
