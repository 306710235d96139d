"""What every command shares at the terminal: arguments, one-line errors and progress bars.

Results go to standard output; all that this file prints goes to standard error.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

stderr = Console(stderr=True, highlight=False)
T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `ValueError`s, so that a bad flag ends like every other bad input: in one line.

    Flags have to be written out, so that a new one never changes what an old command means.
    """

    def __init__(self, *, examples: str = "", **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def notice(message: str) -> None:
    """One line to the person at the terminal that is neither a result nor an error."""
    print(message, file=sys.stderr, flush=True)


def counted(items: Iterable[T], what: str, every: float = 15.0) -> Iterator[T]:
    """The items as they are; how many there were is told every so many seconds, for work that takes long."""
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > every:
            last = time.monotonic()
            notice(f"{what}: {number:,}")
        yield item


def byte_progress() -> Progress:
    """A progress bar over bytes with speed and remaining time; silent where standard error is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, disable=not stderr.is_terminal, transient=True)


@contextmanager
def task_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields update(done): a bar with what is left in a terminal, else a line every 15 seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def update(done: int) -> None:
            nonlocal last
            progress.update(task, completed=done)
            if progress.disable and time.monotonic() - last > 15:
                last = time.monotonic()
                notice(f"{what}: {done:,} of {total:,}")

        yield update


def _one_line(text: str, most: int = 1000) -> str:
    """A message as one line of bounded length, without the control characters that a stranger's file may bring."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and ends the process.

    What a user can mend (`ValueError`, `OSError`) is one line on standard error and exit status 2. Every other
    exception is a defect of ours and keeps its traceback. Ctrl-C is 130, a reader that closed the pipe is no error.
    """
    program = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would flush into it again
    except KeyboardInterrupt:
        notice(f"{program}: interrupted")
        sys.exit(130)
    except (ValueError, OSError) as error:
        notice(f"{program}: error: {_one_line(str(error))}")
        sys.exit(2)
    sys.exit(0)
