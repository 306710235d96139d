"""The chat of a terminal: its commands, its editor, its history, and saved chats from strangers."""

import io
import json
import os
import stat
import threading

import pytest
import torch
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from chat import Chat
from inference import editor
from inference.editor import Editor, disk_history
from inference.params import SamplingParams
from inference.session import Session
from inference.terminal import ALIASES, COMMANDS, TerminalChat
from model import Qwen3


@pytest.fixture(scope="module")
def session(tiny_checkpoint) -> Session:
    model, chat = Qwen3.from_pretrained(tiny_checkpoint), Chat.from_pretrained(tiny_checkpoint)
    return Session(model, chat, SamplingParams(seed=1, max_new_tokens=8), name="tiny")


class Typed:
    """A reader whose messages are known; an exception among them is raised."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def read(self) -> str:
        if not self.messages:
            raise EOFError
        message = self.messages.pop(0)
        if isinstance(message, BaseException):
            raise message
        return message


def typed(session: Session, *messages, **settings) -> str:
    """What the screen shows after these messages in a fresh chat."""
    session.reset()
    screen = io.StringIO()
    TerminalChat(session, Typed(*messages), screen, **settings).run()
    return screen.getvalue()


def questions(session: Session) -> list[str]:
    return [message["content"] for message in session.messages if message["role"] == "user"]


def test_what_is_a_command_and_what_is_a_message(session):
    for message in ("/home/x is my path", "/etc/passwd", " /help", "// a comment", "/3 is a third", "/", "a\n/help"):
        typed(session, message)
        assert questions(session) == [message]
    typed(session, "//help me")
    assert questions(session) == ["/help me"]
    shown = typed(session, "/hlep", "/Quitt now", "/etc", "/xyzzyx\n")
    assert not questions(session)
    assert "no command /hlep; did you mean /help? (//hlep sends it" in shown
    assert "did you mean /quit?" in shown and shown.count("/help lists them") >= 1
    typed(session, "/think What is 2 + 2?", "/no_think And now?", "/unknown_word\nof a pasted block")
    assert questions(session) == ["/think What is 2 + 2?", "/no_think And now?", "/unknown_word\nof a pasted block"]


def test_every_command_is_there_and_in_the_help(session):
    shown = typed(session, "/help", "/?")
    for name in COMMANDS:
        assert shown.count(f"\n{name}") == 2 and hasattr(TerminalChat, f"do_{name[1:]}")
    assert set(ALIASES.values()) <= set(COMMANDS)
    shown = typed(session, "hello", "/reset the temperature", "/retry now", "/quit smoking")
    assert questions(session) == ["hello"] and len(session.messages) == 2
    assert "/reset takes nothing after it (//reset ... sends it as a message)" in shown and "/quit takes" in shown
    for leave in ("/quit", "/exit", "/bye", "/QUIT"):
        typed(session, leave, "hello")
        assert not session.messages


def test_ctrl_c_clears_twice_leaves(session):
    shown = typed(session, KeyboardInterrupt(), "one", KeyboardInterrupt(), "two", *[KeyboardInterrupt()] * 2, "three")
    assert questions(session) == ["one", "two"] and "Ctrl-C again" in shown


def test_settings_are_shown_changed_and_checked(session):
    before = session.params
    try:
        shown = typed(
            session, "/set", "/set temperature 0.25", "/set top-k 7", "/set parameter min_p 0.1", "/set seed off"
        )
        assert "max_new_tokens 8" in shown and "thinking_budget off" in shown
        assert (session.params.temperature, session.params.top_k, session.params.min_p) == (0.25, 7, 0.1)
        assert session.params.seed is None
        typed(session, "/set stop END\\n", "/set thinking_budget 5")
        assert session.params.stop == ("END\n",) and session.thinking_budget == 5
        typed(session, "/set stop off", "/set thinking_budget off")
        assert session.params.stop == () and session.thinking_budget is None
        shown = typed(
            session, "/set temprature 1", "/set top_k 1.5", "/set top_p 7", "/set thinking_budget 0", "/set top_k"
        )
        session.params = before
        shown_values = typed(session, "/set", "/set stop a\\nb", "/set seed off", "/set temperature 1")
        assert "\nstop off\n" in shown_values and "stop a\\nb\nseed off\ntemperature 1\n" in shown_values
        assert "None" not in shown_values and "()" not in shown_values
        session.params = before
        for said in ("did you mean temperature?", "not a whole number", "from 0 to 1", "at least 1 token", "top_k 7"):
            assert said in shown
        assert session.params.top_p == before.top_p
    finally:
        session.params = before


def test_thinking_takes_its_advised_settings_along_unless_others_were_chosen(session):
    before = session.params
    try:
        session.params = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=8)  # the checkpoint's
        shown = typed(session, "/think off")
        assert not session.thinking and (session.params.temperature, session.params.top_p) == (0.7, 0.8)
        assert "thinking is off" in shown
        typed(session, "/set temperature 0.1", "/think on")
        assert session.thinking and (session.params.temperature, session.params.top_p) == (0.1, 0.8)
        typed(session, "/no_think", "/think")
        assert session.thinking
    finally:
        session.params, session.thinking = before, True


def test_retry_stats_system_and_reset(session, capsys):
    shown = typed(session, "/retry", "/stats", "hello", "/stats", "/stats on", "/retry", "/stats maybe")
    assert questions(session) == ["hello"]
    assert "no reply yet" in shown and "prompt" in shown and "give on or off" in shown
    assert capsys.readouterr().err.count("tok/s") >= 1, "after each reply, once it is on"
    shown = typed(session, "/system", "/system Be brief.", "hello", "/reset", "/system")
    assert shown.count("no system message") == 1 and shown.count("system message: Be brief.") == 2
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    typed(session, "/system off")
    assert not session.messages
    session.params, before = SamplingParams(seed=1, max_new_tokens=8), session.params
    typed(session, "one", "two", remembers=False)
    assert questions(session) == ["two"]
    session.params = before


def test_what_is_wrong_with_a_message_does_not_end_the_chat(session):
    shown = typed(session, "one", "word " * 300, "half a pair \ud800", "two")
    assert questions(session) == ["one", "two"]
    assert "The chat is full: the prompt has" in shown and "surrogate" in shown
    shown = typed(session, "word " * 400)
    assert "The message is too long: the prompt has" in shown and "/load" not in shown


def test_a_reply_can_not_take_over_the_terminal(monkeypatch, capsys):
    from inference.answers import Printer

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    printer = Printer()
    printer("answer", "a\x1b]0;title\x07\x9bb\x7f\tc\nd")
    assert capsys.readouterr().out == "a␛]0;title␇\ufffdb␡\tc\nd"


# ---- saved chats ----


def test_a_saved_chat_goes_on_as_it_was(session, tmp_path):
    path = tmp_path / "my chats" / "one.json"
    before, session.params = session.params, SamplingParams(seed=5, temperature=0.5, max_new_tokens=8, stop=("zz",))
    try:
        shown = typed(session, "/save", "/system Be brief.", "hello", "more", f"/save {path}")
        messages, params = session.messages, session.params
        assert "nothing to save yet" in shown and f"saved {path}" in shown
        assert json.loads(path.read_text())["schema"] == "nanoqwen/chat/1"
        session.params, session.system = before, []
        shown = typed(session, f"/load {path}")
        assert session.messages == messages and session.params == params and "5 messages" in shown
        answer = session.ask("and?")
        fresh = Session(session.model, session.chat, params)
        fresh.messages = messages
        assert fresh.ask("and?").token_ids == answer.token_ids
        shown = typed(session, "hello", f"/save {path}")
        assert "it exists; give another name" in shown, "another chat's file"
        typed(session, f"/load {path}", "hello", "/save")
        assert len(json.loads(path.read_text())["messages"]) == 7, "the chat's own file"
    finally:
        session.params, session.system = before, []


def test_a_chat_that_filled_the_context_goes_on_with_its_latest_turns(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, long = tmp_path / "full.json", "word " * 12
    shown = typed(session, "/system Be brief.", *[f"{number} {long}" for number in range(99)], f"/save {path}")
    assert "/save and /load it, which continues" in shown
    stored = json.loads(path.read_text())["messages"]
    context = session.model.config.context_length
    try:
        shown = typed(session, f"/load {path}")
        kept = session.messages
        assert f"{len(stored) - len(kept)} earlier ones stayed in the file" in shown and len(kept) < len(stored)
        assert kept[0] == stored[0] and kept[1]["role"] == "user" and kept[1:] == stored[1 - len(kept) :]
        used = len(session.chat.render(kept))
        more = len(session.chat.render([kept[0], *stored[-len(kept) - 1 :]]))
        assert used <= context - context // 8 < more, "as many as leave an eighth free"
        shown = typed(session, f"/load {path}", "and?", "/save")
        assert len(questions(session)) == len(kept) // 2 + 1 and "saved chat-" in shown
        assert json.loads(path.read_text())["messages"] == stored, "the file keeps all"
    finally:
        session.set_system(None)
    words = 100 * (context - 30) // len(session.chat.encode("word " * 100))
    whole = {"messages": [{"role": "user", "content": "word " * words}]}
    path.write_text(json.dumps(whole))
    typed(session, f"/load {path}")
    assert session.messages == whole["messages"], "a single turn that fits, however little is left"
    session.reset()


STRANGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "not JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no messages": b"{}",
    "messages null": b'{"messages": null}',
    "no message": b'{"messages": []}',
    "a number": b'{"messages": [1]}',
    "tool": b'{"messages": [{"role": "tool", "content": "x"}]}',
    "late system": b'{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
    "content": b'{"messages": [{"role": "user", "content": [1]}]}',
    "no content": b'{"messages": [{"role": "user"}]}',
    "half a pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "schema": b'{"schema": "nanoqwen/lens/1", "messages": [{"role": "user", "content": "x"}]}',
    "settings": b'{"messages": [{"role": "user", "content": "x"}], "settings": 5}',
    "temperature": b'{"messages": [{"role": "user", "content": "x"}], "settings": {"temperature": "hot"}}',
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "settings": {"temperature": NaN}}',
    "thinking": b'{"messages": [{"role": "user", "content": "x"}], "settings": {"thinking": "yes"}}',
    "budget": b'{"messages": [{"role": "user", "content": "x"}], "settings": {"thinking_budget": 0}}',
    "too long": b'{"messages": [{"role": "user", "content": "' + b"word " * 400 + b'"}]}',
    "escapes": b'{"messages": [{"role": "\\u001b[2J", "content": "x"}]}',
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_file_is_one_line_and_changes_nothing(session, tmp_path, name):
    path = tmp_path / "chat.json"
    path.write_bytes(STRANGE[name])
    before = (session.params, session.thinking, session.thinking_budget)
    shown = typed(session, "hello", f"/load {path}")
    assert questions(session) == ["hello"] and (session.params, session.thinking, session.thinking_budget) == before
    lines = shown.splitlines()
    assert len(lines) == 3 and lines[2].startswith(f"{path}: ") and "\x1b" not in shown


def test_files_that_can_not_be_read_or_written(session, tmp_path):
    (tmp_path / "folder").mkdir()
    shown = typed(session, "hello", "/load", f"/load {tmp_path}/none", f"/load {tmp_path}/folder", "/save /dev/null/x")
    assert shown.count("\n") == 6 and "no such file" in shown and "not a file" in shown and "/dev/null" in shown
    bare = tmp_path / "rows.json"
    bare.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    typed(session, f"/load {bare}", "hello", "/save")
    assert json.loads(bare.read_text())["messages"] == [{"role": "user", "content": "x"}], "not ours to overwrite"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # /save without a name


# ---- the editor ----


@pytest.fixture
def edit():
    """Keys -> the messages that the editor reads from them. `later`: for the last one, when the history is loaded."""

    def read(keys: str, count: int = 1, history=None, later: str = "") -> list[str]:
        with create_pipe_input() as pipe:
            pipe.send_text(keys)
            guard = threading.Timer(20, pipe.send_text, ["\x03"])  # so that nothing waits for ever
            guard.start()
            reader = Editor(io.StringIO(), COMMANDS, history or InMemoryHistory(), input=pipe, output=DummyOutput())
            try:
                messages = [reader.read() for _ in range(count - bool(later))]
                if later:
                    threading.Timer(0.7, pipe.send_text, [later]).start()
                    messages.append(reader.read())
                return messages
            finally:
                guard.cancel()

    return read


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("hello\n", "hello"),
        ("ab\x1b[D\x1b[Dx\r", "xab"),  # cursor keys
        ("x" * 9000 + "\r", "x" * 9000),  # a terminal's own line ends at 4,095 bytes
        ("\x1b[200~one\ntwo\r\n/three\n\x1b[201~\r", "one\ntwo\n/three\n"),  # a bracketed paste
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("a\\b\r", "a\\b"),
        ('"""one\rtwo"""\r', "one\ntwo"),
        ('"""a"""\r', "a"),
        ('say """a""" twice\r', 'say """a""" twice'),
        ("/he\t\r", "/help"),
        ("über 你好 👋\r", "über 你好 👋"),
    ],
)
def test_keys_make_a_message(edit, keys, message):
    assert edit(keys) == [message]


def test_earlier_messages_come_back_and_ctrl_keys_do_what_they_do(edit):
    assert edit("one\rtwo\r", 3, later="\x1b[A\x1b[A\r") == ["one", "two", "one"]
    with pytest.raises(KeyboardInterrupt):
        edit("half\x03")
    with pytest.raises(EOFError):
        edit("\x04")


def test_the_history_is_private_bounded_and_never_in_the_way(edit, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    edit("my secret\rsecond\x1b\rline\r", 2, disk_history())
    path = tmp_path / "state/nanoqwen/history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert edit("", 1, disk_history(), later="\x1b[A\x1b[A\x1b[A\r") == ["my secret"]
    path.chmod(0o644)
    disk_history().store_string("x" * (editor.LONGEST_ENTRY + 1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size < 1000
    path.write_text("".join(f"\n# then\n+message {i}\n" for i in range(60_000)))
    assert path.stat().st_size > editor.HISTORY_BYTES
    history = disk_history()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size <= editor.HISTORY_BYTES // 2
    messages = list(history.load_history_strings())
    assert messages[0] == "message 59999" and all(message.startswith("message ") for message in messages)
    assert [entry.name for entry in path.parent.iterdir()] == ["history"]


@pytest.mark.parametrize("case", ["a folder", "a pipe", "read-only", "no home"])
def test_without_a_place_for_the_history_it_lasts_as_long_as_the_chat(edit, tmp_path, monkeypatch, case):
    folder = tmp_path / "nanoqwen"
    folder.mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if case == "a folder":
        (folder / "history").mkdir()
    elif case == "a pipe":
        os.mkfifo(folder / "history")
    elif case == "read-only":
        monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    else:
        monkeypatch.setenv("XDG_STATE_HOME", "relative")

        def homeless():
            raise RuntimeError("no home directory")

        monkeypatch.setattr(editor.Path, "home", homeless)
    history = disk_history()
    assert isinstance(history, InMemoryHistory)
    assert edit("one\r", 1, history) == ["one"] and history.get_strings() == ["one"]


def test_a_disk_that_fills_up_does_not_end_the_chat(edit, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    history = disk_history()
    for place in ("/dev/full", str(tmp_path / "gone" / "history"), str(tmp_path)):
        history.filename = place
        history.store_string("one")
    assert list(history.load_history_strings()) == [], "a folder by now"
    assert edit("one\rtwo\r", 2, history) == ["one", "two"]


def test_the_banner_says_what_the_model_is(session, tiny_checkpoint):
    from inference.load import describe
    from ops.quant import quantize_

    shown = typed(session)
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    assert shown.startswith(f"tiny: {parameters:,} parameters, context 256 tokens, float32 on cpu\n")
    packed = Qwen3.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    quantize_(packed, "int8")
    assert describe(packed) == f"{parameters:,} parameters, context 256 tokens, int8 weights, bfloat16 on cpu"
