"""A chat in a terminal: messages, commands, and notices between them.

What begins with a slash and one of the words of COMMANDS is a command, and a slash with any other single word is
taken for a mistyped one. Everything else is a message, paths such as `/home/me is full` included, as they have a second
slash; `//help me` sends `/help me`. A message of several lines is a command only if it begins with a known one.
"""

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import console
from inference import saved_chat
from inference.answers import show, stats_lines
from inference.decode import PromptTooLong
from inference.editor import Editor, PlainReader, Reader, echo_off
from inference.load import describe
from inference.params import THINKING_ADVICE, SamplingParams, recommended
from inference.session import Answer, Session

COMMANDS = {
    "/help": ("", "this list"),
    "/set": ("[NAME VALUE]", "show the settings, or change one: /set temperature 0.3"),
    "/think": ("[on|off]", "think before answering, or not"),
    "/system": ("[TEXT|off]", "show, change or remove the system message"),
    "/retry": ("", "another reply to the last message"),
    "/reset": ("", "forget the chat"),
    "/save": ("[FILE]", "write messages and settings to a file"),
    "/load": ("FILE", "continue a saved chat"),
    "/stats": ("[on|off]", "show the speed of the last reply, or of every reply from now on"),
    "/quit": ("", "leave; so do /exit and Ctrl-D"),
}
ALIASES = {"/?": "/help", "/exit": "/quit", "/bye": "/quit", "/clear": "/reset"}
COMMAND = re.compile(r"/(?:[A-Za-z_]+|\?)(?=\s|$)")
KEYS = {
    "Enter": "send",
    "Alt-Enter, \\ Enter": 'begin another line; Enter does too inside """ quotes',
    "Ctrl-C": "stop the reply, or clear the line; twice: leave",
    "Up, Down, Ctrl-R": "earlier messages",
    "//help": "send /help as a message",
}
SETTINGS = [*(field.name for field in fields(SamplingParams)), "thinking_budget"]


class Leave(Exception):
    """The chat is over."""


class TerminalChat:
    """A session whose turns a person types. `remembers` is false where each message is independent."""

    def __init__(self, session: Session, reader: Reader, screen: TextIO, *, as_json=False, stats=False, remembers=True):
        self.session, self.reader, self.as_json, self.stats, self.remembers = session, reader, as_json, stats, remembers
        self.screen = screen
        self.last: Answer | None = None
        self.file: Path | None = None  # of this chat: /save writes it again

    def say(self, text: str) -> None:
        print(console.folded(text, self.screen), file=self.screen, flush=True)

    def run(self, first: str | None = None) -> None:
        """Until the person leaves. `first` is a message that is already there."""
        self.say(f"{self.session.name}: {describe(self.session.model)}")
        self.say("Type a message; /help lists the commands.")
        if first is not None:
            with echo_off():
                self.answer(partial(self.session.ask, first))
        interrupted = False
        while True:
            try:
                text = self.reader.read()
                interrupted = False
                if text.strip():
                    with echo_off():
                        self.take(text)
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self.say("(Ctrl-C again, or Ctrl-D, leaves)")
            except (EOFError, Leave):
                return

    def take(self, text: str) -> None:
        """A message or a command."""
        word = COMMAND.match(text)
        name = word and ALIASES.get(word[0].lower(), word[0].lower())
        rest = text[word.end() :].strip() if word else ""
        if name in ("/think", "/no_think", "/nothink") and rest.lower() not in ("", "on", "off"):
            name = None  # Qwen3's own switches in front of a question are for the model
        if name in ("/no_think", "/nothink"):
            name, rest = "/think", "off"
        if name in COMMANDS:
            try:
                if rest and not COMMANDS[name][0] and name != "/help":
                    raise ValueError(f"{name} takes nothing after it (/{word[0]} ... sends it as a message)")
                getattr(self, f"do_{name[1:]}")(rest)
            except (ValueError, OSError) as error:
                self.say(console.reason(error))
        elif name and "\n" not in text.strip():
            hint = console.did_you_mean(name, [*COMMANDS, *ALIASES]) or "; /help lists them"
            self.say(f"there is no command {word[0]}{hint} (/{word[0]} sends it as a message)")
        else:
            if text.startswith("//") and COMMAND.match(text[1:]):
                text = text[1:]
            if not self.remembers:
                self.session.reset()
            self.answer(partial(self.session.ask, text))

    def answer(self, ask: Callable[..., Answer]) -> None:
        """Shows a reply; whatever is wrong with the question, the chat continues."""
        try:
            self.last = show(self.session, ask, self.as_json, self.stats)
        except PromptTooLong as error:
            if len(self.session.messages) == len(self.session.system):
                self.say(f"The message is too long: {error}.")
                return
            self.say(
                f"The chat is full: {error}, start over with /reset, or /save and /load it, "
                "which continues with its latest messages."
            )
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            self.say(console.reason(error))
        except KeyboardInterrupt:
            self.say("Interrupted.")

    # ---- commands ----

    def do_help(self, _: str) -> None:
        rows = {f"{name} {usage}".strip(): about for name, (usage, about) in COMMANDS.items()}
        width, columns = max(map(len, [*rows, *KEYS])), max(40, shutil.get_terminal_size().columns - 1)
        for table in (rows, {"": ""}, KEYS):
            for name, about in table.items():
                text = f"{name:{width}}  {about}".rstrip()
                self.say(textwrap.fill(text, columns, subsequent_indent=" " * (width + 2)))

    def do_quit(self, _: str) -> None:
        raise Leave

    def do_reset(self, _: str) -> None:
        self.session.reset()
        self.last = self.file = None
        self.say("The chat is forgotten; the settings and the system message are kept.")

    def do_retry(self, _: str) -> None:
        self.answer(self.session.retry)

    def do_system(self, text: str) -> None:
        session = self.session
        if session.raw:
            raise ValueError("--raw has no system message")
        if text:
            session.set_system(None if text.lower() == "off" else text)
        now = session.system[0]["content"] if session.system else None
        self.say("no system message" if now is None else f"system message: {console.one_line(now)}")

    def do_think(self, value: str) -> None:
        if self.session.raw:
            raise ValueError("--raw has no thinking")
        session, thinking = self.session, value.lower() != "off"
        advised = [recommended(session.model.generation_config, state) for state in (session.thinking, thinking)]
        old, new = [{name: getattr(params, name) for name in THINKING_ADVICE} for params in advised]
        if replace(session.params, **old) == session.params:  # nobody chose others
            session.params = replace(session.params, **new)
        session.thinking = thinking
        self.say(f"thinking is {'on' if thinking else 'off'}")

    def do_stats(self, value: str) -> None:
        if value.lower() in ("on", "off"):
            self.stats = value.lower() == "on"
            self.say(f"stats after each reply: {value.lower()}")
        elif value:
            raise ValueError(f"/stats {value}: give on or off, or nothing")
        else:
            self.say("there is no reply yet" if self.last is None else stats_lines(self.last))

    def do_set(self, text: str) -> None:
        name, _, value = text.removeprefix("parameter ").strip().partition(" ")
        name, value = name.lower().replace("-", "_"), value.strip()
        if not name:
            self.say("\n".join(f"{setting} {self.setting(setting)}" for setting in SETTINGS))
            return
        if name not in SETTINGS:
            hint = console.did_you_mean(name, SETTINGS) or "; /set lists them"
            raise ValueError(f"there is no setting {name}{hint}")
        if value:
            self.change(name, value)
        self.say(f"{name} {self.setting(name)}")

    def setting(self, name: str) -> str:
        """A setting's value as /set takes it."""
        value = self.session.thinking_budget if name == "thinking_budget" else getattr(self.session.params, name)
        if name == "stop":
            return " ".join(text.replace("\n", "\\n") for text in value) or "off"
        return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def change(self, name: str, value: str) -> None:
        """A setting from its text. `off` is for those that may be absent."""
        if name == "stop":
            parsed = () if value.lower() == "off" else (value.replace("\\n", "\n"),)
        elif value.lower() == "off" and name in ("thinking_budget", "seed"):
            parsed = None
        else:
            whole = name in ("top_k", "max_new_tokens", "seed", "thinking_budget")
            try:
                parsed = int(value) if whole else float(value)
            except ValueError:
                raise ValueError(f"/set {name} {value}: not a {'whole ' if whole else ''}number") from None
        if name == "thinking_budget":
            if parsed is not None and parsed < 1:
                raise ValueError(f"/set thinking_budget {value}: give at least 1 token, or off")
            self.session.thinking_budget = parsed
        else:
            self.session.params = replace(self.session.params, **{name: parsed})

    def do_save(self, name: str) -> None:
        if not self.session.messages:
            raise ValueError("there is nothing to save yet")
        path = _path(name) if name else self.file or Path(time.strftime("chat-%Y%m%d-%H%M%S.json"))
        if path.exists() and path != self.file:
            raise ValueError(f"/save {path}: it exists; give another name")
        saved_chat.save(self.session, path)
        self.file = path
        self.say(f"saved {path}; continue it later with /load {path}")

    def do_load(self, name: str) -> None:
        if not name:
            raise ValueError("/load needs the name of a file that /save wrote")
        path = _path(name)
        ours, left_out = saved_chat.load(self.session, path)
        self.file, self.last = path if ours else None, None
        count = len(self.session.messages)
        self.say(f"loaded {path}: {count} message{'' if count == 1 else 's'}")
        if left_out:
            context = f"{self.session.model.config.context_length:,} tokens"
            self.say(f"{left_out} earlier ones stayed in the file, to leave room in this model's context of {context}")


def _path(name: str) -> Path:
    """A file's name as a person types it: with quotes around it, or ~ for the home folder."""
    if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # no home directory, or no such user
        raise ValueError(f"{name}: {error}") from None


def chat(session: Session, first: str | None = None, **settings) -> None:
    """A chat on this terminal; the editor draws on standard error, or where that is redirected, on standard output."""
    screen = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    reader = PlainReader() if screen is None else Editor(screen, [*COMMANDS, *ALIASES])
    TerminalChat(session, reader, screen or sys.stderr, **settings).run(first)
