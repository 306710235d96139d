"""The thread that owns the engine: everything that touches the model happens there, between two passes.

Other threads hand it commands through a queue. What a reply says is taken by `Exchange.hear` on this thread; the event
loop hears of ends only, once for each pass. No lock is held while the model computes.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from inference.engine import Engine
from serving.choice import Choice


class Worker:
    """Runs an engine, and jobs beside it that are computed in pieces (serving/jobs.py), a piece for each pass."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        self.engine, self.loop = engine, loop
        self.running: dict[int, Choice] = {}  # by id
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()
        self._out: list[tuple[Callable[[Any], None], Any]] = []
        self._busy = self._stopping = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from the event loop ----

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread after the pass that it is in. Replies that are still running get nothing more."""
        self._commands.put(self._stop)
        self.thread.join()

    def add(self, choices: list[Choice]) -> None:
        self._commands.put(lambda: self._add(choices))

    def cancel(self, choices: list[Choice]) -> None:
        """Frees their rows before the next pass."""
        self._commands.put(lambda: self._cancel(choices))

    async def compute(self, job: Iterator[None]) -> Any:
        """What a job returns; it is dropped where the caller is cancelled."""
        one = _Job(job, self.loop.create_future())
        self._commands.put(lambda: self._jobs.append(one))
        return await one.result

    # ---- on the engine's thread ----

    def _run(self) -> None:
        while not self._stopping:
            try:
                idle = not (self._busy or self._jobs)
                self._obey(idle)
                if self._stopping:
                    break
                self._busy = self.engine.step()
                self._work()
            except Exception as error:  # a defect; the replies that it hit are told, and the next ones are served
                self._fail(error)
            self._flush()
        self._flush()
        self.engine.close()

    def _obey(self, wait: bool) -> None:
        try:
            while True:
                self._commands.get(wait)()
                wait = False
        except queue.Empty:
            pass

    def _stop(self) -> None:
        self._stopping = True
        self._cancel(list(self.running.values()))

    def _add(self, choices: list[Choice]) -> None:
        for choice in choices:
            self.running[id(choice)] = choice
            try:
                self.engine.add(choice.reply, choice.on_tokens)
            except ValueError as error:
                choice.fail(error)

    def _cancel(self, choices: list[Choice]) -> None:
        for choice in choices:
            self.end(choice)

    def end(self, choice: Choice) -> None:
        """Called by an exchange: this reply gets nothing more."""
        if self.running.pop(id(choice), None) is not None:
            self.engine.cancel(choice.reply)

    def tell(self, receive: Callable[[Any], None], what: Any) -> None:
        """`receive(what)` on the event loop, after this pass."""
        self._out.append((receive, what))

    def _work(self) -> None:
        """A piece of the first job."""
        while self._jobs and self._jobs[0].result.cancelled():
            self._jobs.popleft()
        if not self._jobs:
            return
        job = self._jobs[0]
        try:
            next(job.pieces)
            return
        except StopIteration as end:
            self.tell(job.done, end.value)
        except Exception as error:
            self.tell(job.failed, error)
        self._jobs.popleft()

    def _fail(self, error: Exception) -> None:
        for choice in list(self.running.values()):
            choice.fail(error)
        self._busy = False

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self.loop.call_soon_threadsafe(_deliver, out)


class _Job:
    def __init__(self, pieces: Iterator[None], result: asyncio.Future):
        self.pieces, self.result = pieces, result

    def done(self, value: Any) -> None:
        if not self.result.done():
            self.result.set_result(value)

    def failed(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


def _deliver(out: list[tuple[Callable[[Any], None], Any]]) -> None:
    for receive, what in out:
        receive(what)
