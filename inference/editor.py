"""What a person types in a chat: prompt_toolkit's line editor, with a history on disk and messages of several lines.

    Enter                       sends the message
    Alt-Enter, or \\ Enter       begins another line; so does Enter after an opening triple quote, up to the closing one
    pasted text                 is one message, however many lines it has
    Up, Down, Ctrl-R            earlier messages, also of earlier chats

The history is $XDG_STATE_HOME/nanoqwen/history (~/.local/state), for its owner's eyes only, and its older half is
dropped when it passes a megabyte. Where the disk can't have it, it lasts as long as the chat.
"""

import os
import secrets
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

try:
    import termios
except ImportError:  # Windows has none
    termios = None

HISTORY_BYTES = 1 << 20
LONGEST_ENTRY = 1 << 16  # characters; a longer message is not kept
QUOTES = '"""'


class Reader(Protocol):
    def read(self) -> str:
        """The next message. EOFError: there is none. KeyboardInterrupt: it was thrown away."""


class PlainReader:
    """Messages line by line, where neither standard output nor standard error is a terminal to edit in."""

    def read(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class Editor:
    """Messages from a line editor that draws on `screen`. `words` are completed by Tab at the beginning of a line."""

    def __init__(self, screen: TextIO, words: Sequence[str] = (), history: History | None = None, **streams):
        # The editor would ask the terminal where its cursor is and complain where no answer comes; it need not know.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self.session = PromptSession(
            [("bold ansigreen", "> ")],
            multiline=True,
            prompt_continuation="  ",
            key_bindings=key_bindings(),
            completer=FirstWord(words),
            complete_while_typing=False,
            enable_suspend=True,  # Ctrl-Z
            complete_style=CompleteStyle.READLINE_LIKE,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            history=disk_history() if history is None else history,
            **({"output": create_output(stdout=screen)} | streams),
        )

    def read(self) -> str:
        text = self.session.prompt()
        quoted = text.strip()
        if quoted.count(QUOTES) == 2 and quoted.startswith(QUOTES) and quoted.endswith(QUOTES):
            return quoted[len(QUOTES) : -len(QUOTES)].strip("\n")
        return text


@contextmanager
def echo_off() -> Iterator[None]:
    """For as long as a reply is printed: keys that are typed meanwhile, Ctrl-C too, don't appear in its text.

    They are not lost: the editor shows them when it reads the next message.
    """
    if termios is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter", filter=has_focus("DEFAULT_BUFFER"))
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif buffer.text.lstrip().startswith(QUOTES) and buffer.text.count(QUOTES) % 2:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("escape", "c-j")
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


class FirstWord(Completer):
    """Completes the word at the beginning of the message."""

    def __init__(self, words: Sequence[str]):
        self.words = words

    def get_completions(self, document, _):
        begun = document.text_before_cursor
        for word in self.words if begun.startswith("/") else ():
            if word.startswith(begun):
                yield Completion(word, start_position=-len(begun))


# ---- history on disk ----


class DiskHistory(FileHistory):
    """prompt_toolkit's file of messages, with which the chat continues after any disk failure."""

    def load_history_strings(self):
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if len(string) > LONGEST_ENTRY:
            return
        with suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


def disk_history() -> History:
    """The history of the user's chats, or a new one in memory where no file can be had."""
    try:
        base = os.environ.get("XDG_STATE_HOME", "")
        folder = (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "nanoqwen"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "history"
        _prepare(path)
    except (OSError, RuntimeError):  # no home directory is a RuntimeError
        return InMemoryHistory()
    return DiskHistory(str(path))


def _prepare(path: Path) -> None:
    """A regular file that only its owner may read, of at most HISTORY_BYTES."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NONBLOCK", 0), 0o600)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        if stat.S_IMODE(status.st_mode) != 0o600:
            path.chmod(0o600)
        if status.st_size <= HISTORY_BYTES:
            return
        file.seek(-HISTORY_BYTES // 2, os.SEEK_END)
        recent = file.read()
    recent = recent[recent.find(b"\n# ") + 1 :]  # where a message begins
    temporary = path.with_name(f".history.{secrets.token_hex(8)}")
    with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(recent)
    temporary.replace(path)
