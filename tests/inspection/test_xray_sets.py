"""The X-ray of generated sets: every planted fault is found with its row, and no clean set is accused."""

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xray_sets import assistant, findings, hh, make, sentence, tree, user, write_rows

from chat import Chat
from data.shard_format import write_shard
from data.sources import IGNORED, WrittenRows, read_items, records
from inspection.xray import fix, report
from inspection.xray.examine import Settings, examine, query
from inspection.xray.rubric import load

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(ROOT / "models" / "tiny")


@pytest.fixture
def look(chat, tmp_path):
    """look(rows or file, **settings) -> the report."""
    opened = []

    def look(source, name: str = "rows.jsonl", **settings):
        if not isinstance(source, str | Path):
            write_rows(tmp_path / name, source)
            source = tmp_path / name
        found = examine(str(source), Settings(**settings), chat)
        opened.append(found)
        look.last = found
        return found.report

    yield look
    for found in opened:
        found.close()


# --- clean sets of every shape ---


SHAPES = {
    "pretraining": "pretraining",
    "dolly": "sft",
    "alpaca": "sft",
    "prompt": "sft",
    "messages": "chat",
    "sharegpt": "chat",
    "preference": "preference",
    "hh": "preference",
    "choices": "eval",
    "gsm8k": "eval",
    "rag": "rag",
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_clean_set_of_every_shape_is_not_accused(look, name, suffix):
    found = look([make(name, i) for i in range(60)], f"rows.{suffix}", mask_rows=20)
    assert found["shape"] == SHAPES[name]
    assert findings(found) == {}
    assert found["verdict"]["train"] == "yes"
    assert (found["rows"], found["rows_read"], found["complete"]) == (60, 60, True)
    assert found["duplicates"]["exact"] == found["duplicates"]["near"] == 0


CLEAN = {
    "chinese": ("sft", lambda i: {"instruction": f"解释{i}号定律", "output": f"第{i}号定律说能量{i}守恒"}),
    "japanese": ("chat", lambda i: {"messages": [user(f"{i}番目の法則は何?"), assistant(f"保存の{i}番の法則です")]}),
    "emoji": ("sft", lambda i: {"prompt": f"🎉 {sentence(i)} 👩‍👩‍👧?", "completion": f"✅ {sentence(90 + i)}"}),
    "code": (
        "sft",
        lambda i: {"prompt": sentence(i), "completion": f"```python\nf({i}, '<br>')\n```\n{sentence(90 + i)}"},
    ),
    "boolean": ("rag", lambda i: {"question": sentence(i), "passage": sentence(90 + i, 30), "answer": i % 2 == 0}),
    "prompts": ("eval", lambda i: {"prompt": sentence(i)}),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_sets_of_other_languages_and_kinds_are_not_accused(look, name):
    shape, row = CLEAN[name]
    found = look([row(i) for i in range(30)], mask_rows=30)
    assert (found["shape"], findings(found), found["verdict"]["train"]) == (shape, {}, "yes")
    if name == "prompts":
        assert found["intended_use"].startswith("Prompts without answers") and found["verdict"]["task"] == "prompts"


def containers(rows: list[dict]) -> dict[str, bytes]:
    """The same rows in every form that is not one of write_rows'."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = pa.Table.from_pylist(rows)
    made = {"lines.json": lines, "list.jsonl": json.dumps(rows), "pretty.json": json.dumps(rows, indent=1)}
    made["windows.jsonl"] = "\ufeff" + lines.replace("\n", "\r\n")
    for name, mark in (("semicolon.csv", ";"), ("tab.csv", "\t"), ("bar.csv", "|"), ("comma.csv", ",")):
        made[name] = pd.DataFrame(rows).to_csv(index=False, sep=mark, lineterminator="\r\n")
    made = {name: text.encode() for name, text in made.items()}
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        made["packed.jsonl" + suffix] = pack(lines.encode())
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        sink = pa.BufferOutputStream()
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        made[name] = sink.getvalue().to_pybytes()
    return made


def test_the_same_rows_in_every_container(look, tmp_path):
    rows = [make("dolly", i) for i in range(20)]
    rows[7]["response"], rows[9] = 'Two "lines";\nwith, all | marks.\tA tab.', rows[8]
    expected = None
    for name, content in containers(rows).items():
        (tmp_path / name).write_bytes(content)
        found = look(tmp_path / name, mask_rows=20)
        figures = {name: {kind: of["total"] for kind, of in units.items()} for name, units in found["lengths"].items()}
        shown = (found["shape"], found["rows"], findings(found), figures, found["mask"]["target_tokens"])
        expected = expected or shown
        assert shown == expected, name
    assert expected[:3] == ("sft", 20, {"duplicate": [9]})


def test_a_folder_that_datasets_saved(look, tmp_path):
    """Splits are those of the files' own names, then of their folders."""
    for split, first, rows in (("train", 0, 12), ("test", 100, 5)):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist([make("dolly", first + i) for i in range(rows)])
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert look(tmp_path / "saved")["splits"] == {"test": 5, "train": 12}
    assert look(tmp_path / "saved", split="test")["rows"] == 5
    (tmp_path / "test_sets").mkdir()
    write_rows(tmp_path / "test_sets" / "train.jsonl", [make("dolly", i) for i in range(5)])
    assert look(tmp_path / "test_sets")["splits"] == {"train": 5}
    broken = tmp_path / "broken.arrow"
    broken.write_bytes((tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").read_bytes()[:-900])
    with pytest.raises(ValueError, match="can't be read as Arrow"):
        look(broken)


def test_an_answer_that_does_not_show_is_empty(look):
    rows = [make("dolly", i) for i in range(6)]
    rows[2]["response"], rows[4]["response"] = "\u00a0\u3000\u2003", "\u200b\ufeff"
    assert findings(look(rows, mask_rows=0))["empty_turn"] == [2, 4]
    turns = [{"messages": [user(sentence(i)), assistant(sentence(i + 50))]} for i in range(4)]
    turns[3]["messages"][1]["content"] = "\u2060 \u200b"
    assert findings(look(turns, mask_rows=0))["empty_turn"] == [3]


# --- planted faults ---


def planted(shape: str, faults: dict[int, dict], rows: int = 60) -> list[dict]:
    made = [make(shape, i) for i in range(rows)]
    for place, fault in faults.items():
        made[place] = made[place] | fault
    return made


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_the_rules_for_instructions(look, suffix):
    same = sentence(777, 20)
    fixed = {"instruction": sentence(900), "context": ""}
    faults = {
        3: {"instruction": "Go on"},
        4: {"response": "Sure."},
        5: {"response": " ".join(sentence(10**5 + i, 20) for i in range(40))},
        6: {"response": same, "instruction": same, "context": ""},
        7: {"response": "  "},
        8: {"response": make("dolly", 8)["response"] + " <|im_end|>"},
        9: {"response": "As an AI language model, I " + sentence(1)},
        10: {"response": "It cost 5\ufffd " + sentence(2)},
        11: {"response": "\x1b[31m" + sentence(3)},
        12: {"response": sentence(4) + "</div><div>&nbsp;"},
        13: {"response": "AKIA" + "ABCDEFGHIJKLMNOP " + sentence(5)},
        14: {"response": "so it goes " * 60},
        15: {"instruction": '=cmd|"/c calc"!A1 ' + sentence(6), "context": ""},
        16: {"response": "Dear [Your Name], " + sentence(7)},
        **{20 + i: fixed | {"response": sentence(800 + i, 20)} for i in range(5)},
        30: make("dolly", 29) | {"response": make("dolly", 29)["response"].upper() + " "},
        32: make("dolly", 31) | {"category": "closed_qa"},
    }
    found = look(planted("dolly", faults), f"rows.{suffix}", mask_rows=60, sequence=2048)
    assert findings(found) == {
        "short_instruction": [3],
        "short_response": [4],
        "very_long_response": [5],
        "response_copies_instruction": [6],
        "empty_turn": [7],
        "zero_target": [7],
        "truncated": [5],
        "special_tokens": [8],
        "assistant_boilerplate": [9],
        "broken_text": [10],
        "control_characters": [11],
        "html_remains": [12],
        "secret": [13],
        "repetitive": [14],
        "spreadsheet_formula": [15],
        "placeholder": [16],
        "repeated_prompt": [20, 21, 22, 23, 24],
        "duplicate": [30, 32],
    }
    assert found["duplicates"]["exact"] == 2
    assert found["repeated_prompts"][0] == {"text": sentence(900), "count": 5, "first_row": 20}
    assert found["verdict"]["train"] == "after-fixes"
    assert found["verdict"]["rows_to_leave_out"] == len({6, 7, 8, 13, 30, 32})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_rules_for_conversations(look, suffix):
    rows = [make("messages", i) for i in range(40)]
    one, two, *rest = rows[5]["messages"]
    rows[5] = {"messages": [one, one | user("And?"), two, *rest]}
    rows[6] = {"messages": [assistant("Hello there, what can I do?"), *rows[6]["messages"]]}
    rows[7] = {"messages": [rows[7]["messages"][0], assistant("")]}
    rows[8] = {"messages": [rows[8]["messages"][0]]}
    rows[9] = {"messages": [{"role": "system", "content": "Be brief."}, *rows[9]["messages"]]}
    thinking = "<think>\n\n" + sentence(5) + "\n</think>\n\n"
    rows[10]["messages"][3] = assistant(thinking + sentence(6))
    found = findings(look(rows, f"rows.{suffix}", mask_rows=40, sequence=4096))
    assert found.pop("role_alternation") == [5, 6]
    assert found.pop("empty_turn") == [7]
    assert found == {"not_trainable": [8], "zero_target": [7, 8]}


def test_fields_that_hold_something_else(look):
    """Each row of the wrong kind is named; none ends the reading."""
    odd = [5, "text", {"a": 1}, [None], [3], [[]], [{"role": 5}], [{"role": "user"}], True]
    rows = [make("messages", i) for i in range(10)] + [{"messages": value} for value in odd]
    found = findings(look(rows, mask_rows=30, keep_rows=True, sequence=4096))
    assert set(found["not_trainable"]) | set(found.get("empty_turn", [])) == set(range(10, 19))
    rows = [make("preference", i) for i in range(10)] + [
        {"prompt": "What is it?", "chosen": v, "rejected": 1} for v in odd
    ]
    found = findings(look(rows, mask_rows=30))
    assert set(found["not_trainable"]) | set(found.get("empty_turn", [])) == set(range(10, 19))


def test_the_rules_for_pairs(look):
    rows = [make("hh", i) for i in range(40)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[4]["rejected"] = "\n\nHuman: Something else?" + rows[4]["rejected"]
    rows[5]["rejected"] = hh(sentence(15), sentence(16), sentence(15), "")
    found = look(rows, mask_rows=0)
    named = findings(found)
    assert named.pop("equal_pair") == [3]
    assert 4 in named.pop("different_prompts")
    assert 5 in named.get("empty_turn", []) + named.get("not_trainable", []) + named.get("different_prompts", [5])
    assert "length_bias" not in named
    longer = [make("preference", i) | {"chosen": sentence(10**6 + i, 30)} for i in range(40)]
    found = look(longer, mask_rows=0)
    assert findings(found) == {"length_bias": list(range(40))}
    assert found["pairs"]["chosen_longer_share"] == 1


def test_the_rules_for_questions(look):
    rows = planted("choices", {3: {"answer": 4}, 4: {"choices": ["red", "red", "blue", "x"]}, 5: {"question": "Why?"}})
    assert findings(look(rows)) == {"label_out_of_range": [3], "equal_choices": [4], "short_instruction": [5]}
    arc = [
        {
            "question": sentence(i),
            "choices": {"text": ["a b", "c d"], "label": ["A", "B"]},
            "answerKey": "B" if i else "C",
        }
        for i in range(10)
    ]
    assert findings(look(arc)) == {"label_out_of_range": [0]}


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_of_other_writers(look, tmp_path, kind):
    rows = planted("dolly", {3: {"response": "ok"}, 5: make("dolly", 4)})
    table = pa.Table.from_pylist(rows)
    table = pa.table({name: table[name].cast(kind) for name in table.column_names})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = look(tmp_path / "rows.parquet", mask_rows=5, keep_rows=True)
    assert findings(found) == {"short_response": [3], "duplicate": [5]}
    assert {column["type"] for column in found["columns"]} == {"string"}


def test_columns_of_types_that_duckdb_does_not_have(look, tmp_path):
    columns = {"text": [sentence(i) for i in range(3)], "half": pa.array([1.5, None, 2], pa.float16())}
    pq.write_table(pa.table(columns | {"months": pa.array([1, 2, None], pa.float16())}), tmp_path / "rows.parquet")
    found = look(tmp_path / "rows.parquet", keep_rows=True)
    assert findings(found) == {} and [column["nulls"] for column in found["columns"]] == [0, 1, 1]
    _, rows = query(look.last.scan, "SELECT half, months FROM data")
    assert list(rows) == [("1.5", "1.0"), (None, "2.0"), ("2.0", None)]


def test_two_columns_of_one_name_are_one_line(look, tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="two columns are called 'text'; rename one of them"):
        look(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.json"])
def test_utf_16_is_one_line(look, tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "a b"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match="is UTF-16; convert it to UTF-8"):
        look(tmp_path / name)


def test_a_tree_whose_roots_name_no_parent(look, monkeypatch):
    from inspection.xray import reading

    monkeypatch.setattr(reading, "BATCH_ROWS", 5)
    rows = tree(2) + [
        {name: value for name, value in row.items() if name != "parent_id"} | {"message_id": f"root {place}"}
        for place, row in enumerate(tree(8)[30::5] * 3)
    ]
    found = look(rows)
    assert found["tree"]["trees"] == 8 and "orphan" not in findings(found)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trees(look, suffix):
    rows = tree(8)
    found = look(rows, f"tree.{suffix}")
    assert found["shape"] == "tree" and findings(found) == {}
    assert {name: found["tree"][name] for name in ("trees", "messages", "paths", "deepest", "ranked")} == {
        "trees": 8,
        "messages": 40,
        "paths": 16,
        "deepest": 4,
        "ranked": 24,
    }
    assert found["tree"]["languages"] == {"en": 20, "es": 20}
    rows[6]["role"] = "prompter"  # under a prompter, and above one
    rows[13]["parent_id"] = "nobody"
    rows[20]["role"] = "assistant"  # a root; its two answers are assistants' too
    found = findings(look(rows, f"broken.{suffix}"))
    assert found == {"role_alternation": [6, 8, 20, 21, 22], "orphan": [13]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_tree_is_learnt_as_the_trainer_learns_it(look, chat, tmp_path, suffix):
    """Its paths, the better answer first, and each answer once; train.py and the X-ray make the same rows of them."""
    rows = tree(3)
    dice = random.Random(1)
    dice.shuffle(rows)
    found = look(rows, f"tree.{suffix}")
    write_rows(tmp_path / f"own.{suffix}", rows)
    source = records(str(tmp_path / f"own.{suffix}"), "train", None, None, tmp_path)
    made, said = [], []
    for _, record in source:
        made += WrittenRows(chat).conversation(record)
        said.append([(message["role"], message["content"], message.get("weight")) for message in record["messages"]])
    assert len(said) == 6  # two paths a tree
    texts = {row["message_id"]: row for row in rows}
    for longer, shorter in zip(said[::2], said[1::2], strict=True):  # rank 0 has the question below it
        assert [role for role, _, _ in longer] == ["user", "assistant", "user", "assistant"]
        assert [role for role, _, _ in shorter] == ["user", "assistant"]
        assert [weight for _, _, weight in longer] == [None, 1, None, 1] and shorter[0] == longer[0]
    answers = [text for path in said for role, text, weight in path if weight == 1]
    assert sorted(answers) == sorted(row["text"] for row in texts.values() if row["role"] == "assistant")
    assert found["mask"]["target_tokens"] == sum(int((row.targets != IGNORED).sum()) for row in made)
    assert found["mask"]["training_rows"] == len(made) and found["mask"]["zero_target_rows"] == 0


def test_messages_without_their_parent_are_named(tmp_path):
    rows = tree(1)
    rows[1]["parent_id"] = "nobody"
    write_rows(tmp_path / "own.jsonl", rows)
    found = [record for _, record in records(str(tmp_path / "own.jsonl"), "train", None, None, tmp_path)]
    lost = [record for record in found if isinstance(record, Exception)]
    assert len(lost) >= 1 and all("answers a message that is not there" in str(error) for error in lost)


def test_an_own_rule_takes_its_place(look, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "- {name: junk, condition: \"category = 'junk'\", severity: high, reason: Not wanted.}\n"
        "- {name: short_response, condition: null}\n"
        "- {name: elsewhere, condition: no_such_column > 1}\n"
    )
    found = look(planted("dolly", {3: {"category": "junk"}, 4: {"response": "ok"}}), rules=own)
    assert findings(found) == {"junk": [3]}
    assert list(found["rules_skipped"]) == ["elsewhere"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not YAML"),
        ("name: x", "a list of rules"),
        ("- {name: x, severity: bad}", "severity is 'bad'"),
        ("- {name: x, colour: red}", "unknown field colour"),
        ("- {name: 'x y'}", "no rule with a name"),
    ],
)
def test_a_bad_rules_file_is_one_line(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "own.yaml")


# --- duplicates, leakage ---


def changed(text: str, count: int) -> str:
    """The text with `count` words in a row exchanged, of which each takes three 3-grams with it at most."""
    words = text.split()
    return " ".join([*words[:-count], *(f"other{place}" for place in range(count))])


def jaccard(one: str, other: str, n: int = 3) -> float:
    sets = []
    for text in (one, other):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_at_known_similarity(look):
    texts = [sentence(i, 60) for i in range(300)]
    similar = {}
    for number in range(200, 300):
        texts[number] = changed(texts[number - 200], 1 + number % 25)
        similar[number] = jaccard(texts[number], texts[number - 200])
    expected = {row for row, value in similar.items() if value >= 0.7}
    assert 20 < len(expected) < 80
    found = look([{"text": text} for text in texts])
    assert findings(found) == {"near_duplicate": sorted(expected)}
    assert found["duplicates"]["near"] == len(expected)
    for pair in found["duplicates"]["nearest"]:
        assert pair["other_row"] == pair["row"] - 200
        assert pair["jaccard"] == pytest.approx(similar[pair["row"]], abs=1e-3)
    none = look([{"text": text} for text in texts], near=0.3, near_rows=150)
    assert none["duplicates"]["near"] == 0 and none["duplicates"]["near_rows_compared"] == 150


def test_leakage_names_the_rows_and_the_words(look, tmp_path):
    held_out = [make("gsm8k", 10_000 + i) for i in range(30)]
    write_rows(tmp_path / "held_out.jsonl", held_out)
    rows = [make("dolly", i) for i in range(60)]
    clean = look(rows, against=str(tmp_path / "held_out.jsonl"))
    assert clean["leakage"] == [] and findings(clean) == {}
    rows[5]["response"] += " " + held_out[3]["question"]
    rows[9]["context"] = "Note: " + held_out[7]["answer"].upper()
    found = look(rows, against=str(tmp_path / "held_out.jsonl"))
    assert findings(found) == {"leakage": [5, 9]}
    one, other = found["leakage"]
    assert (one["row"], one["other_row"], one["ngram"]) == (5, 3, held_out[3]["question"].removesuffix("."))
    assert (other["row"], other["other_row"]) == (9, 7) and other["ngram"] in rows[9]["context"]


def test_a_form_that_many_rows_share_is_no_leakage(look, tmp_path):
    form = "Answer the following question in one short sentence and then stop: "
    write_rows(
        tmp_path / "held_out.jsonl", [{"question": form + sentence(10**6 + i), "answer": "7"} for i in range(30)]
    )
    rows = [make("dolly", i) | {"instruction": form + sentence(i)} for i in range(30)]
    assert look(rows, against=str(tmp_path / "held_out.jsonl"))["leakage"] == []


# --- figures ---


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_figures_equal_pandas(look, chat, suffix):
    rows = [make("dolly", i) | {"note": "x" * (i % 7) if i % 3 else None, "score": i / 3} for i in range(500)]
    found = look(rows, f"rows.{suffix}", near_rows=0, mask_rows=0)
    frame = pd.DataFrame(rows)
    for name, units in found["lengths"].items():
        column = frame[name].fillna("") if suffix == "csv" else frame[name].dropna()
        tokens = column.map(lambda text: len(chat.encode(text)))
        for unit, values in (("characters", column.str.len()), ("tokens", tokens)):
            shown = units[unit]
            assert (shown["max"], shown["total"]) == (values.max(), values.sum())
            assert shown["median"] == pytest.approx(values.median())
            assert shown["p95"] == pytest.approx(values.quantile(0.95))
            assert sum(shown["histogram"]["counts"]) == len(column)
            counts, _ = np.histogram(values, shown["histogram"]["edges"])
            assert counts.tolist() == shown["histogram"]["counts"]
    assert set(found["lengths"]) == {"instruction", "context", "response", "category", "note"}


def test_limit_says_that_only_a_part_was_read(look):
    rows = [make("dolly", i) for i in range(50)]
    found = look(rows, limit=20)
    assert (found["rows"], found["rows_read"], found["complete"]) == (None, 20, False)
    assert "only 20 rows" in found["verdict"]["reasons"][-1]
    assert "all figures are of this part" in report.markdown(found) and "20 read" in report.html(found)
    found = look(rows, "rows.parquet", limit=20)
    assert (found["rows"], found["rows_read"], found["complete"]) == (50, 20, False)
    assert look(rows, limit=50)["rows_read"] == 50


# --- masks ---


@pytest.mark.parametrize("name", ["dolly", "alpaca", "messages", "hh", "preference", "gsm8k"])
def test_masks_are_those_of_the_trainer(look, chat, name):
    rows = [make(name, i) for i in range(30)]
    found = look(rows, mask_rows=30, sequence=300)["mask"]
    written = WrittenRows(chat)
    make_items = written.preference if name in ("hh", "preference") else written.conversation
    items, _ = read_items("rows", iter((str(i), row) for i, row in enumerate(rows)), make_items, 10**9)
    trained = [row for item in items for row in (item if hasattr(item, "chosen") else (item,))]
    fitting = [row for row in trained if row.length <= 300]
    assert found["training_rows"] == len(fitting)
    assert found["target_tokens"] == sum(int((np.asarray(row.targets) != IGNORED).sum()) for row in fitting)
    for example in found["examples"]:
        learnt = "".join(span["text"] for span in example["spans"] if span["learnt"])
        whole = "".join(span["text"] for span in example["spans"])
        row = trained[example["row"] * (len(trained) // len(rows))]
        targets = [int(target) for target in row.targets if target != IGNORED]
        assert learnt == chat.decode(targets)
        assert whole == chat.decode([*map(int, row.ids), int(row.targets[-1])])


def test_a_set_from_which_nothing_is_learnt(look):
    rows = [make("dolly", i) | {"response": ""} for i in range(30)]
    found = look(rows, mask_rows=30)
    assert found["mask"]["zero_target_rows"] == 30 and found["mask"]["target_tokens"] == 0
    assert found["verdict"]["train"] == "no"


def test_a_row_whose_mask_is_all_zero(look):
    rows = [make("messages", i) for i in range(20)]
    for message in rows[4]["messages"]:
        message["weight"] = 0
    rows[6]["messages"] = [user(sentence(1)), user(sentence(2))]
    found = look(rows, mask_rows=20, sequence=2048)
    assert findings(found)["zero_target"] == [4, 6] and found["mask"]["zero_target_rows"] == 2


def test_what_is_remembered_does_not_grow_with_the_rows(look, monkeypatch):
    from inspection.xray import reading, scan

    for room, name, value in ((scan, "PROMPTS", 50), (scan, "BUFFERED", 100), (reading, "BATCH_ROWS", 100)):
        monkeypatch.setattr(room, name, value)
    rows = [{"instruction": f"Why {i}?", "output": sentence(i) if i % 3 else "ok"} for i in range(3000)]
    found = look(rows, mask_rows=10)
    state = look.last.scan
    assert len(state.prompts) <= 100 and len(state._sample) <= 64 and sum(map(len, state._broken.values())) <= 200
    assert all(len(shown) <= 3 for shown in state.snippets.values()) and len(state.mask_examples) <= 3
    assert findings(found)["short_response"] == list(range(0, 3000, 3))


# --- shards ---


def test_shards(look, tmp_path, chat):
    end = chat.tokenizer.token_to_id("<|endoftext|>")
    documents = [chat.encode(sentence(i, 5 + i % 9)) for i in range(50)]
    documents[7] = documents[3]
    ids = [token for document in documents for token in (end, *document)]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train_000000.bin", ids[:300], 1 << 16)
    write_shard(folder / "train_000001.bin", ids[300:], 1 << 16)
    found = look(folder)
    assert (found["shape"], found["rows"], found["shards"]["tokens"]) == ("shards", 50, len(ids))
    lengths = [len(document) for document in documents]
    assert found["lengths"]["ids"]["tokens"]["median"] == np.median(lengths)
    assert found["lengths"]["ids"]["tokens"]["total"] == sum(lengths)
    assert findings(found) == {"duplicate": [7]}
    size = sum(len(chat.decode(document).encode()) for document in documents)
    assert found["shards"]["bytes_per_token"] == pytest.approx(size / sum(lengths))
    ids[20] = 60_000
    write_shard(folder / "train_000000.bin", ids[:300], 1 << 16)
    found = look(folder)
    assert found["shards"]["tokens_out_of_range"] == 1
    assert findings(found)["token_out_of_range"] == [1]


# --- SQL, fix, reports ---


def test_sql_sees_the_columns_and_ours(look, chat):
    rows = planted("dolly", {5: {"response": "ok"}, 7: make("dolly", 6)})
    look(rows, keep_rows=True, mask_rows=60)
    scan = look.last.scan
    names, found = query(
        scan, "SELECT category, _row, _findings, _duplicate_of FROM data WHERE len(_findings) > 0 ORDER BY _row"
    )
    assert names == ["category", "_row", "_findings", "_duplicate_of"]
    assert list(found) == [("open_qa", 5, ["short_response"], None), ("open_qa", 7, ["duplicate"], 6)]
    _, found = query(scan, "SELECT sum(_targets), sum(_tokens), count(*) FROM data")
    targets, tokens, count = next(iter(found))
    assert targets == look.last.report["mask"]["target_tokens"] and count == 60
    assert tokens == sum(spread["tokens"]["total"] for spread in look.last.report["lengths"].values())


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "COPY data TO '/tmp/x.csv'",
        "ATTACH '/tmp/x.db'",
        "DROP TABLE rows",
        "SELECT 1; SELECT 2",
        "SELEC",
        "SELECT * FROM elsewhere",
        "INSTALL httpfs",
    ],
)
def test_sql_only_reads_the_rows(look, sql):
    look([make("dolly", i) for i in range(5)], keep_rows=True, mask_rows=0)
    with pytest.raises(ValueError, match="--sql"):
        list(query(look.last.scan, sql)[1])


def test_columns_whose_types_change_and_whose_names_are_alike(look, monkeypatch):
    from inspection.xray import reading

    monkeypatch.setattr(reading, "BATCH_ROWS", 10)
    rows = [{"text": sentence(i), "Text": i, "_row": "x", "score": i if i < 15 else f"n{i}"} for i in range(40)]
    rows[30]["late"] = {"a": [1]}
    found = look(rows, keep_rows=True)
    assert findings(found) == {}
    columns = {column["name"]: column["type"] for column in found["columns"]}
    assert columns["score"] == "int64 or string" and "late" in columns
    _, result = query(look.last.scan, 'SELECT count(*), max("Text_1"), any_value("_row_1"), max(_row) FROM data')
    assert list(result) == [(40, 39, "x", 39)]


@pytest.mark.parametrize("out", ["clean.jsonl", "clean.parquet", "folder"])
def test_fix_writes_the_rows_that_pass_with_a_record(look, tmp_path, out):
    faults = {
        3: {"response": ""},
        4: make("dolly", 2),
        5: {"response": make("dolly", 5)["response"] + "<|im_start|>"},
        6: {"response": "ok"},
    }
    rows = planted("dolly", faults)
    write_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    look(tmp_path / "rows.jsonl", mask_rows=60)
    found = look.last
    made = fix.write(tmp_path / out, found.parts, None, found.scan, found.rules, "rows.jsonl")
    assert (made["rows_read"], made["rows_kept"], made["rows_left_out"]) == (61, 57, 4)
    (file,) = map(Path, made["files"])
    kept = pq.read_table(file).to_pylist() if out.endswith("parquet") else [json.loads(line) for line in file.open()]
    assert kept == [row for place, row in enumerate(rows) if place not in (3, 4, 5)]
    record = json.loads(Path(made["record"]).read_text())
    assert {entry["row"]: entry["rules"] for entry in record["left_out"]} == {
        3: ["empty_turn", "zero_target"],
        4: ["duplicate"],
        5: ["special_tokens"],
        60: ["unreadable"],
    }
    assert set(findings(look(file, mask_rows=60))) == {"short_response"}


HOSTILE = "<script>alert(1)</script> [x](javascript:alert(2)) ![y](http://evil/z.png) | a | `b` "
HOSTILE += "\x1b]0;t\x07 \u202e =HYPERLINK(1)"


def test_reports_escape_strangers_text(look):
    rows = planted("dolly", {3: {"instruction": HOSTILE + sentence(3), "response": "ok"}, 4: {"category": HOSTILE}})
    rows = [{HOSTILE: "x", **row} for row in rows]
    found = look(rows, mask_rows=5)
    page = report.html(found)
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    text = report.markdown(found)
    assert "<script" not in text and "\x1b" not in text and "http://" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    from rich.console import Console

    console = Console(width=100, record=True, file=__import__("io").StringIO())
    console.print(report.terminal(found))
    assert "\x1b" not in console.export_text() and "\u202e" not in console.export_text()


def test_the_report_fits_its_schema(look, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "schemas" / "xray.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in ("pretraining", "messages", "hh"):
        found = look([make(name, i) for i in range(25)], mask_rows=5)
        jsonschema.validate(json.loads(json.dumps(found)), schema)


# --- hostile files ---


def test_rows_that_cannot_be_read_are_findings(look, tmp_path):
    good = [json.dumps(make("dolly", i)).encode() for i in range(10)]
    bad = [b"{", b'{"instruction": "\xff"}', b"[" * 10_000 + b"]" * 10_000, b"[1, 2]", b'"text"', b"9" * 5000, b"\x00"]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*good, *bad, b"", good[0][:-1] + b', "x": "\\ud800"}']))
    found = look(tmp_path / "rows.jsonl")
    assert findings(found)["unreadable"] == list(range(10, 17))
    assert found["rows_read"] == 18
    reasons = [row["why"] for finding in found["findings"] if finding["id"] == "unreadable" for row in finding["shown"]]
    assert any("not JSON" in why for why in reasons) and any("UTF-8" in why for why in reasons)


def test_a_giant_row_is_a_finding_and_is_not_kept(look, tmp_path, monkeypatch):
    from inspection.xray import reading

    monkeypatch.setattr(reading, "ROW_BYTES", 10_000)
    rows = [json.dumps(make("pretraining", i)) for i in range(5)]
    rows.insert(2, json.dumps({"text": "x" * 1_000_000}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert findings(look(tmp_path / "rows.jsonl")) == {"oversized": [2]}
    lines = [f"{sentence(i)},1" for i in range(5)]
    lines.insert(4, "y" * 100_000 + ",1")
    (tmp_path / "rows.csv").write_text("\n".join(["text,n", *lines]))
    assert findings(look(tmp_path / "rows.csv")) == {"oversized": [4]}


def test_a_bomb_is_read_in_pieces(look, tmp_path):
    import gzip

    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(json.dumps(make("pretraining", 1)).encode() + b"\n")
        for _ in range(80):
            file.write(b" " * (1 << 20))  # one line of 80 MB
        file.write(b"\n" + json.dumps(make("pretraining", 2)).encode())
    found = look(tmp_path / "rows.jsonl.gz")
    assert findings(found) == {} and found["rows_read"] == 2


def test_a_parquet_file_whose_rows_unpack_to_too_much_is_one_line(look, tmp_path):
    table = pa.table({"text": ["x" * (40 << 20)]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(ValueError, match="unpacks to"):
        look(tmp_path / "bomb.parquet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.parquet", b"PAR1 not really", "Parquet"),
        ("rows.jsonl", b"", "empty"),
        ("rows.jsonl", b"\n\n", "no row could be read"),
        ("rows.jsonl", b"nonsense", "no row could be read"),
        ("rows.json", b"{}", "a list of records"),
        ("rows.json", b"[" * 100_000, "not JSON"),
        ("rows.csv", b"a,a\n1,2\n", "name each column once"),
        ("rows.docx", b"x", "kinds of files"),
        ("rows.jsonl.gz", b"\x1f\x8bbroken", "unpacked"),
        ("rows.jsonl", b'{"n": 1}', "no column holds text"),
        ("rows.bin", b"x" * 2000, "magic"),
    ],
)
def test_a_file_that_is_none_is_one_line(look, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        look(tmp_path / name)


def test_a_parquet_file_damaged_in_its_middle_gives_what_was_read(look, tmp_path):
    rows = [make("pretraining", i) for i in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=500)
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    middle = pq.ParquetFile(tmp_path / "rows.parquet").metadata.row_group(5).column(0).data_page_offset
    content[middle : middle + 400] = b"\xff" * 400
    (tmp_path / "rows.parquet").write_bytes(content)
    found = look(tmp_path / "rows.parquet", near_rows=0, mask_rows=0)
    assert found["rows_read"] == 4000 and findings(found) == {"unreadable": list(range(2500, 3000))}
