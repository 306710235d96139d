"""One process's rows of the next step, made while the current one is computed."""

from concurrent.futures import Future, ThreadPoolExecutor


class Prefetcher:
    """A share of a source's rows (data/sources.py), made one step early, in a thread, up to those of step `end` - 1.

    Making conversations needs the interpreter, a matrix product doesn't, so the two overlap. Rows are a pure function
    of the step, whichever thread makes them. Only that thread calls the source, which need not be thread-safe.
    """

    def __init__(self, source, end: int, share: slice):
        self.source, self.end, self.share = source, end, share
        self._thread: ThreadPoolExecutor | None = None  # started with the first rows
        self._next: tuple[int, Future] | None = None

    def rows(self, step: int) -> list:
        """Those of one optimizer step (0 is the first)."""
        made = self._next[1] if self._next and self._next[0] == step else self._ask(self._rows, step)
        self._next = (step + 1, self._ask(self._rows, step + 1)) if step + 1 < self.end else None
        return made.result()

    def validation_rows(self, index: int) -> list:
        return self._ask(self.source.validation_rows, index).result()

    def _rows(self, step: int) -> list:
        return self.source.rows(step, self.share)

    def _ask(self, make, number: int) -> Future:
        self._thread = self._thread or ThreadPoolExecutor(1, "rows")
        return self._thread.submit(make, number)
