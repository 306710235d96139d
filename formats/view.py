"""A view of a checkpoint: under other names, dequantised, with an adapter merged. Views can be stacked."""

from collections.abc import Iterator
from typing import Any

import torch


class View:
    """The checkpoint `base`, of which a subclass changes `config`, `tensors` or what `read` returns.

    Everything else (`path`, `files`, `generation_config`, a GGUF's `metadata`, …) is that of `base`.
    """

    def __init__(self, base: Any):
        self.base, self.config, self.tensors = base, base.config, base.tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its official name."""
        return self.base.read(name)

    def format_of(self, name: str) -> None:
        """The GGUF type in which a tensor can be read as it lies: none, as a view may change the values."""

    def release(self, name: str) -> None:
        """Releases the memory of a tensor's pages."""
        self.base.release(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in order, one in memory at a time: use each before asking for the next."""
        for name in self.tensors:
            yield name, self.read(name)
            self.release(name)
