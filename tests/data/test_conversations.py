"""Rows of other people's data: their shapes, what of them is learnt, and bad ones."""

import json
from pathlib import Path

import pytest

import data.documents
from chat import Chat
from data.conversations import conversation, last_number, preference, question
from data.sources import IGNORED, Listed, Pair, Row, WrittenRows, read_items, records

ROOT = Path(__file__).parent.parent.parent
ASK, TELL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
AGAIN, BYE = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Goodbye!"}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(ROOT / "models" / "tiny")


# --- shapes ---


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASK, TELL], "prompt_id": "x"}, [ASK, TELL]),
        ({"messages": [ASK, TELL, AGAIN]}, [ASK, TELL]),
        ({"instruction": "Hi", "context": "", "response": "Hello!", "category": "x"}, [ASK, TELL]),
        ({"instruction": "Hi", "input": None, "output": "Hello!", "text": "x"}, [ASK, TELL]),
        ({"instruction": "Hi", "input": "there", "output": "Hello!"}, [ASK | {"content": "Hi\n\nthere"}, TELL]),
        ({"prompt": "Hi", "completion": "Hello!"}, [ASK, TELL]),
        ({"instruction": "Hi", "input": "", "output": ""}, None),
    ],
)
def test_conversations(record, expected):
    found = conversation(record)
    assert (found and found.messages) == expected


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}, [ASK]),
        ({"prompt": [ASK], "chosen": [TELL], "rejected": [TELL | {"content": "What?"}]}, [ASK]),
        ({"prompt": "Hi", "chosen": [ASK, TELL], "rejected": [ASK, TELL | {"content": "What?"}]}, [ASK]),
        ({"chosen": [ASK, TELL], "rejected": [ASK, TELL | {"content": "What?"}]}, [ASK]),
        ({"chosen": HH.format("Hello!"), "rejected": HH.format("What?")}, [ASK, TELL, AGAIN]),
    ],
)
def test_preferences(record, asked):
    found = preference(record)
    assert (found.asked.messages, found.chosen, found.rejected) == (asked, TELL, TELL | {"content": "What?"})


def test_pairs_that_differ_in_more_than_the_last_answer_are_no_pairs():
    other = HH.replace("Hi", "Hey").format("What?")
    assert preference({"chosen": HH.format("x"), "rejected": other}) is None
    assert preference({"chosen": HH.format("x"), "rejected": HH.format("x")}) is None


def test_questions():
    asked, is_right = question({"question": "Hi", "answer": "2+3=<<2+3=5>>5 ... so 1000+5\n#### 1,005"})
    assert asked.messages == [ASK]
    assert is_right("It is 1005.") and is_right("5, no: $1,005.00") and not is_right("1005 or 5") and not is_right("")


@pytest.mark.parametrize(
    ("text", "number"),
    [("-7", "-7"), ("5-3", "3"), ("10-12=-2", "-2"), ("9.11 > 9.9.", "9.9"), ("x3y 4", "4"), ("1,234,567", "1234567")],
)
def test_last_number(text, number):
    assert str(last_number(text)) == number


@pytest.mark.parametrize(
    ("read", "record", "said"),
    [
        (conversation, 5, "is 5, not an object"),
        (conversation, {"text": "x"}, "has the fields text, but a conversation is messages or one of instruction"),
        (conversation, {"messages": "x"}, "messages is 'x', not a list"),
        (conversation, {"messages": [{"role": "bot", "content": "x"}]}, "no message with a role of system, user"),
        (conversation, {"messages": [{"role": "user", "content": 3}]}, "message of user whose content is no text"),
        (conversation, {"messages": [ASK]}, "no turn of the assistant"),
        (conversation, {"messages": [TELL]}, "no turn of the assistant after"),
        (conversation, {"instruction": " ", "output": "x"}, "instruction is ' ', not a text"),
        (preference, {"prompt": "Hi", "chosen": "x"}, "a preference has chosen and rejected"),
        (preference, {"chosen": "x", "rejected": "y"}, "has no prompt"),
        (preference, {"chosen": [], "rejected": "y"}, "chosen is \\[\\], not a list of messages"),
        (question, {"question": "Hi", "answer": "none"}, "answer has no number"),
        (question, {"problem": "Hi", "answer": "3"}, "a question has question and answer"),
    ],
)
def test_bad_rows(read, record, said):
    with pytest.raises(ValueError, match=said):
        read(record)


# --- what is learnt ---


def texts(chat: Chat, row: Row) -> tuple[str, list[str]]:
    """All of a row, and each stretch of it that is learnt."""
    learnt, before = [], IGNORED
    for target in row.targets:
        if target != IGNORED:
            learnt = [*learnt, []] if before == IGNORED else learnt
            learnt[-1].append(int(target))
        before = target
    whole = [*map(int, row.ids), int(row.targets[-1])]
    return chat.decode(whole), [chat.decode(ids) for ids in learnt]


def test_each_turn_is_learnt_behind_the_prompt_that_it_is_written_for(chat):
    """Qwen3's template writes the empty thinking before the last turn alone, so two turns need two rows."""
    rows = WrittenRows(chat).conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    (last, learnt_last), (first, learnt_first) = (texts(chat, row) for row in rows)
    assert last == chat.render_text([ASK, TELL, AGAIN], thinking=False) + "Goodbye!<|im_end|>"
    assert first == chat.render_text([ASK], thinking=False) + "Hello!<|im_end|>"
    assert learnt_last == ["Goodbye!<|im_end|>"] and learnt_first == ["Hello!<|im_end|>"]
    (only,) = WrittenRows(chat, turns="last").conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    assert texts(chat, only) == (last, learnt_last)


def test_thinking_is_learnt_with_the_answer(chat):
    (row,) = WrittenRows(chat).conversation({"messages": [ASK, TELL | {"reasoning_content": "Hm."}]})
    assert texts(chat, row)[1] == ["<think>\nHm.\n</think>\n\nHello!<|im_end|>"]
    (same,) = WrittenRows(chat).conversation(
        {"messages": [ASK, TELL | {"content": "<think>\nHm.\n</think>\n\nHello!"}]}
    )
    assert texts(chat, same) == texts(chat, row)


def test_turns_share_a_row_where_the_template_lets_them():
    tokenizer = (ROOT / "models" / "tiny" / "tokenizer.json").read_text()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    chat = Chat("here", tokenizer, {"eos_token": "<|im_end|>"}, template)
    (row,) = WrittenRows(chat).conversation({"messages": [ASK, TELL, AGAIN, BYE]})
    whole, learnt = texts(chat, row)
    assert whole + "\n" == chat.render_text([ASK, TELL, AGAIN, BYE], add_generation_prompt=False)
    assert learnt == ["Hello!<|im_end|>", "Goodbye!<|im_end|>"]


def test_both_answers_of_a_pair_have_one_prompt(chat):
    record = {"chosen": [ASK, TELL | {"reasoning_content": "Hm."}], "rejected": [ASK, TELL]}
    (pair,) = WrittenRows(chat).preference(record)
    assert texts(chat, pair.chosen)[1] == ["<think>\nHm.\n</think>\n\nHello!<|im_end|>"]
    assert texts(chat, pair.rejected)[1] == ["<think>\n\n</think>\n\nHello!<|im_end|>"]


# --- files ---


def read(path, chat: Chat, kind: str = "conversation", longest: int = 99, **options):
    chosen = {"split": "train", "subset": None, "limit": None, "out": Path("nowhere")} | options
    return read_items(str(path), records(str(path), **chosen), getattr(WrittenRows(chat), kind), longest)


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DOLLY = [{"instruction": f"Say {n}", "context": "", "response": str(n)} for n in range(7)]


def test_the_same_rows_in_every_kind_of_file(tmp_path, chat, capsys):
    import pyarrow
    import pyarrow.parquet

    write_lines(tmp_path / "a.jsonl", *DOLLY)
    (tmp_path / "a.json").write_text(json.dumps(DOLLY))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOLLY), tmp_path / "a.parquet")
    digests = {read(tmp_path / f"a.{kind}", chat)[1] for kind in ("jsonl", "json", "parquet")}
    assert len(digests) == 1
    assert "a.jsonl: 7 rows, 7 to learn from\n" in capsys.readouterr().err
    assert read(tmp_path / "a.jsonl", chat, limit=6)[1] not in digests


def test_rows_that_are_too_long_are_counted(tmp_path, chat, capsys):
    path = write_lines(tmp_path / "a.jsonl", *DOLLY, {"prompt": "x" * 500, "completion": "y"})
    assert len(read(path, chat)[0]) == 7
    assert "8 rows, 7 to learn from; left out: 1 longer than 99 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing to learn from"):
        read(path, chat, longest=3)


def test_a_bad_row_is_named(tmp_path, chat):
    path = write_lines(tmp_path / "a.jsonl", *DOLLY, {"instruction": 4, "response": "x"})
    with pytest.raises(ValueError, match=r"a\.jsonl: line 8: instruction is 4, not a text"):
        read(path, chat)
    path.write_text('{"instruction": "x"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1 is not JSON"):
        read(path, chat)
    with pytest.raises(ValueError, match=r"no file matches .*; give JSON lines"):
        read(tmp_path / "absent.jsonl", chat)


def test_pairs_that_teach_nothing_are_counted(tmp_path, chat, capsys):
    pairs = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
    items, _ = read(write_lines(tmp_path / "a.jsonl", *pairs), chat, "preference")
    assert len(items) == 1 and isinstance(items[0], Pair)
    assert "2 rows, 1 to learn from; left out: 1 without an answer or a difference" in capsys.readouterr().err


def test_a_stream_is_copied_into_the_run(tmp_path, chat, monkeypatch):
    """So that going on needs no hub."""
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", *DOLLY)
    first = read(tmp_path / "set", chat, limit=5, out=tmp_path / "run")
    assert len(first[0]) == 5 and len(list((tmp_path / "run").glob("rows-*.jsonl"))) == 1
    monkeypatch.setattr(data.documents, "_data_set", None)
    assert read(tmp_path / "set", chat, limit=5, out=tmp_path / "run")[1] == first[1]


def test_without_the_hub_one_line(tmp_path, chat, monkeypatch):
    import socket

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", lambda *given, **named: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(ValueError, match=r"owner/name: .*hub"):
        read("owner/name", chat, out=tmp_path)


def test_every_item_comes_once_an_epoch():
    source = Listed(list(range(10)), [], 4, seed=3)
    seen = [item for step in range(10) for item in source.rows(step)]
    assert [sorted(seen[start : start + 10]) for start in range(0, 40, 10)] == 4 * [list(range(10))]
    assert seen[:10] != seen[10:20]
    assert Listed(list(range(10)), [], 4, seed=3).rows(7) == source.rows(7)
