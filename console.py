"""What every command shares at the terminal: arguments, one-line errors and progress bars.

Results go to standard output; everything that this file prints goes to standard error.
"""

import argparse
import difflib
import errno
import gc
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:  # at run time only where something is drawn
    import resource

    from rich.console import Console
    from rich.progress import Progress

# Before PyTorch is imported: how often its waiting threads look before they sleep. libgomp's own bound is milliseconds,
# in which a thread keeps the core that another program, or the thread it waits for, needs.
OUR_SPIN_BOUND = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
if OUR_SPIN_BOUND:
    os.environ["GOMP_SPINCOUNT"] = "2000"

T = TypeVar("T")


def project() -> dict[str, Any]:
    """The `project` table of pyproject.toml."""
    return tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name that is nearest to a mistyped one, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `--version`, examples below the help, and errors that are `ValueError`s and name the nearest flag.

    Flags have to be written out, so that a new one never changes what an old command means.
    """

    def __init__(self, *, examples: str = "", **settings):
        if examples:
            settings["epilog"] = f"examples:\n{examples}"
        super().__init__(**settings, allow_abbrev=False, formatter_class=_Help)
        self.add_argument("--version", action=_Version, help="show nanoqwen's version and exit")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        self._check_flags(word for word in unknown if word.startswith("-"))
        if unknown:
            self.error(f"{unknown[0]!r} is one argument too many; put a text of several words in quotes")
        return options

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_known_args(words, namespace)
        except ValueError as error:
            if "arguments are required" in str(error):  # a mistyped flag is the likelier mistake
                end = words.index("--") if "--" in words else len(words)
                known = set(self._flags())
                self._check_flags(w for w in words[:end] if w[:2] == "--" and w.partition("=")[0] not in known)
            raise

    def _check_flags(self, unknown: Iterable[str]) -> None:
        for word in unknown:
            name = word.partition("=")[0]
            self.error(f"there is no option {name}{did_you_mean(name, self._flags())}")

    def _flags(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._flags()

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            if action.type in (int, float):
                kind = "whole number" if action.type is int else "number"
                raise argparse.ArgumentError(action, f"{text!r} is not a {kind}") from None
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(known)}{hint}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are wrapped; where an example is wider than the terminal, all have their comments on the next line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines, narrow = [], max(map(len, text.splitlines())) > width
        for line in text.splitlines():
            example = narrow and re.fullmatch(r"(\s+\S.*?)\s{2,}(\S.*)", line)
            if example:
                lines += [example[1], *(f"      {part}" for part in _fold(example[2], width - 6))]
            else:
                lines += _fold(line, width)
        return "\n".join(indent + line for line in lines)


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser, *_):
        print(f"nanoqwen {project()['version']}")
        parser.exit()


def notice(message: str) -> None:
    """One line to the person at the terminal that is neither a result nor an error. Where nobody reads it any more (the
    terminal is gone, or the pipe's reader), the command continues without it."""
    try:
        print(folded(message, sys.stderr), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def folded(text: str, stream: TextIO) -> str:
    """A text as `stream` shows it: where that is a terminal, its long lines are broken between words. No word is cut,
    so that a path can still be copied; anywhere else a line stays one line."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a terminal, or a stream without a file
        return text
    return "\n".join(piece for line in text.split("\n") for piece in _fold(line, columns))


def _fold(line: str, columns: int) -> Iterator[str]:
    if columns < 1 or _cells(line) <= columns:  # some terminals say 0: unknown
        yield line
        return
    begun, *words = line.split(" ")
    for word in words:
        longer = f"{begun} {word}"
        if begun.strip() and _cells(longer) > columns:
            yield begun
            longer = word
        begun = longer
    yield begun


def _cells(text: str) -> int:
    """How many columns a terminal needs: Chinese characters and emoji take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def counted(items: Iterable[T], what: str, every: float = 15.0) -> Iterator[T]:
    """The items, unchanged; every `every` seconds a notice says how many there have been."""
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > every:
            last = time.monotonic()
            notice(f"{what}: {number:,}")
        yield item


@cache
def stderr() -> "Console":
    """Standard error, for rich's progress bars."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def byte_progress() -> "Progress":
    """A progress bar over bytes with speed and remaining time; silent where standard error is not a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr(), disable=not stderr().is_terminal, transient=True)


@contextmanager
def task_progress(what: str, total: int | None, done: int = 0, closing: bool = False) -> Iterator[Callable[..., None]]:
    """Yields update(done, said=""), `said` standing behind the bar: a bar with the time that remains in a terminal,
    else a line every 15 seconds, and with `closing` one at the end. `total` is None where nobody knows it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()
    of_all = "" if total is None else f" of {total:,}"
    with Progress(*columns, console=stderr(), disable=not stderr().is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done)

        def update(done: int, said: str = "") -> None:
            nonlocal last
            progress.update(task, completed=done, description=f"{what}  {said}".strip())
            if progress.disable and (time.monotonic() - last > 15 or (closing and done == total)):
                last = time.monotonic()
                notice(f"{what}: {done:,}{of_all}  {said}".strip())

        yield update


def peak_bytes(usage: "resource.struct_rusage | None" = None) -> int:
    """The most memory that this process has had, shared pages too, or those that `usage` is of."""
    import resource  # Windows has none

    usage = resource.getrusage(resource.RUSAGE_SELF) if usage is None else usage
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes


class Stopwatch:
    """Seconds of the phases of a command's start; the first phase is all that the process has done until now."""

    def __init__(self, first: str):
        self.seconds = {first: time.process_time()}  # Python gives no portable time of a process's birth
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Adds the time since the lap before to a phase."""
        now = time.perf_counter()
        self.seconds[phase], self._last = self.seconds.get(phase, 0.0) + now - self._last, now


def one_line(text: str, most: int = 1000) -> str:
    """A message as one line of bounded length, without the control characters that a stranger's file may bring."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def reason(error: BaseException) -> str:
    """What went wrong, in one line; of an operating system's error its file and its text: `a.txt: no such file ...`."""
    if not isinstance(error, OSError) or error.strerror is None:
        return one_line(str(error))
    text = error.strerror[:1].lower() + error.strerror[1:]
    return one_line(text if error.filename is None else f"{os.fsdecode(error.filename)}: {text}")


def is_out_of_memory(error: BaseException) -> bool:
    """Python and the system have error classes for it; of PyTorch's allocators CUDA's alone does. All say it."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "failed to map segment")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and ends the process.

    What a user can fix (`ValueError`, `OSError`, too little memory, a package that is not installed) is one line on
    standard error and exit status 2. Every other exception is a defect of ours and keeps its traceback. Ctrl-C is 130.
    A reader that closed the pipe is no error, nor is a standard stream that was closed from the beginning.
    """
    # Importing PyTorch makes some hundred thousand objects and next to no garbage, but at Python's threshold of 700
    # the collector looks at them again and again, which takes a tenth of a second.
    gc.set_threshold(50_000)
    _open_closed_streams()
    try:
        try:
            main()
            status = 0
        except SystemExit as end:  # --help and --version; a command's own exit status
            status = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        status = 0
    except BaseException as error:
        if (status := _told(error)) is None:
            raise
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
    sys.exit(status)


def _told(error: BaseException) -> int | None:
    """Says in one line what ended the command; its exit status. None, and nothing said, for a defect of ours."""
    status, said = 2, None
    if isinstance(error, KeyboardInterrupt):
        status, said = 130, "interrupted"
    elif isinstance(error, ModuleNotFoundError):
        how = _how_to_install(error.name or "")
        said = how and f"error: {error.name} is not installed; {how}"
    elif isinstance(error, ValueError | OSError):
        said = f"error: {reason(error)}"
    elif isinstance(error, MemoryError | RuntimeError | ImportError):
        if is_out_of_memory(error):
            said = f"error: out of memory ({one_line(str(error)) or 'in Python'})"
        elif "can't start new thread" in str(error):
            said = "error: the system allows no more threads (ulimit -u), or has no memory for one"
    if said is None:
        return None
    notice(f"{Path(sys.argv[0]).name}: {said}")
    return status


def _discard(stream: TextIO) -> None:
    """Sends a stream that can't be written to the null device, or the exit would try to write its buffer again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def answer_early(parse: Callable[[], Any]) -> None:
    """Ends the process where reading the arguments ends it (--help, a wrong flag); else they will be read again.

    For a command whose imports take seconds, before them. What ends these imports is one line too.
    """

    class Complete(Exception):
        pass

    def read() -> None:
        parse()
        raise Complete

    with suppress(Complete):
        run(read)
    sys.excepthook = _import_failed


def _import_failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ValueError | OSError) and (status := _told(error)) is not None:
        os._exit(status)
    sys.__excepthook__(kind, error, trace)


def _open_closed_streams() -> None:
    """Null devices for streams that the caller closed (`<&-`). Python has None there, the next file their number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _how_to_install(module: str) -> str | None:
    """The command that installs a missing package of pyproject.toml; None for a module that is in none of them."""
    table, name = project(), module.partition(".")[0].replace("_", "-")
    for extra, packages in {"": table["dependencies"], **table["optional-dependencies"]}.items():
        if name in (re.split(r"[<>=;\[ ]", package)[0].replace("_", "-") for package in packages):
            return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
    return None
