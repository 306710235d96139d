"""Waiting for the network no longer than one wants to."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")
REACH_SECONDS = 6.0  # to the first answer, with name server, connections and redirects


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """`ask()`'s answer or exception; TimeoutError when it takes longer.

    A name server that is silent has no time-out of its own, so a thread waits for the answer and we for the thread.
    """

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    answers = SimpleQueue()
    Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return answer
