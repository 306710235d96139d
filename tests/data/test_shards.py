"""Shards of token ids: the format read strictly, the order, tokenising into them, downloading them."""

import http.server
import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import train
from data import documents, fineweb, inspection, shard_format, shards, texts
from data.shard_format import Shard, Windows, write_shard
from data.sources import Shards
from formats import download
from training import schema
from training.batches import document_mask

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "models" / "tiny"


def header(magic: int, version: int, count: int) -> bytes:
    return np.array([magic, version, count, *[0] * 253], dtype="<i4").tobytes()


@pytest.mark.parametrize(("vocabulary", "dtype", "magic"), [(65536, "<u2", 20240520), (65537, "<u4", 20240801)])
def test_a_shard_comes_back_and_its_bytes_are_the_format(tmp_path, vocabulary, dtype, magic):
    ids = [0, vocabulary - 1, 7, 300]
    write_shard(tmp_path / "a.bin", ids, vocabulary)
    version = {20240520: 1, 20240801: 7}[magic]
    assert (tmp_path / "a.bin").read_bytes() == header(magic, version, 4) + np.array(ids, dtype=dtype).tobytes()
    assert Shard(tmp_path / "a.bin").read(1, 10, vocabulary).tolist() == ids[1:]
    with pytest.raises(ValueError, match=f"token 1 is {vocabulary - 1:,}, outside the vocabulary"):
        Shard(tmp_path / "a.bin").read(0, 4, vocabulary - 1)
    with pytest.raises(ValueError, match="ids from"):
        write_shard(tmp_path / "b.bin", [vocabulary], vocabulary)
    with pytest.raises(ValueError, match="ids from -1"):
        write_shard(tmp_path / "b.bin", [0, -1], vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes are too few"),
        (header(20240520, 1, 0)[:-1], "1,023 bytes are too few"),
        (header(1, 1, 2) + bytes(4), "magic number 1 is not that of a shard"),
        (header(20240520, 2, 2) + bytes(4), "version 2"),
        (header(20240801, 1, 1) + bytes(4), "version 1"),
        (header(20240520, 1, 3) + bytes(4), "3 tokens"),
        (header(20240520, 1, 1) + bytes(4), "1 tokens"),
        (header(20240520, 1, -2) + bytes(4), "-2 tokens"),
        (header(20240520, 1, 2**31 - 1), "2,147,483,647 tokens"),
    ],
)
def test_a_hostile_shard_gets_its_line(tmp_path, content, said):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match="bad.bin: .*" + said.replace("'", ".")):
        Shard(tmp_path / "bad.bin")


def test_an_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path):
    for name, (start, count) in {"a": (0, 23), "b": (100, 6), "c": (200, 3), "d": (300, 9)}.items():
        write_shard(tmp_path / f"{name}.bin", np.arange(start, start + count), 50304)
    windows = Windows(sorted(tmp_path.glob("*.bin")), 4, 50304, seed=3)
    expected = {tuple(range(s, s + 5)) for s in (0, 4, 8, 12, 16, 100, 300, 304)}
    epochs = [[tuple(windows.row(e * 8 + i).tolist()) for i in range(8)] for e in range(3)]
    assert len(windows) == 8 and all(set(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Windows(sorted(tmp_path.glob("*.bin")), 4, 50304, seed=3)
    assert [tuple(again.row(i).tolist()) for i in (17, 3, 9)] == [epochs[2][1], epochs[0][3], epochs[1][1]]
    in_order = Windows(sorted(tmp_path.glob("*.bin")), 4, 50304, seed=3, shuffle=False)
    assert [int(in_order.row(i)[0]) for i in range(8)] == [0, 4, 8, 12, 16, 100, 300, 304]
    with pytest.raises(ValueError, match="no shard has the 31 tokens"):
        Windows([tmp_path / "a.bin"], 30, 50304, 0)


def test_rows_of_shards_predict_the_next_token(tmp_path):
    write_shard(tmp_path / "t_0.bin", np.arange(40), 64)
    source = Shards(str(tmp_path / "t_*.bin"), str(tmp_path / "t_*.bin"), 0, 2, 5, 64)
    for row in source.rows(0) + source.rows(99) + source.validation_rows(1):
        assert row.ids.shape == (5,) and row.targets.tolist() == (row.ids + 1).tolist()
    assert [row.ids[0] for row in source.validation_rows(0)] == [0, 5]
    assert len(source.validation_rows(3)) == 1 and source.validation_rows(4) == []
    with pytest.raises(ValueError, match="no file matches"):
        Shards(str(tmp_path / "x_*.bin"), None, 0, 2, 5, 64)


def test_documents_stay_apart():
    ids = torch.tensor([[5, 6, 0, 7, 0, 8]])
    expected = ["100000", "110000", "001000", "001100", "000010", "000011"]
    rows = document_mask((ids == 0).cumsum(1))[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == expected


def test_more_shards_than_a_process_may_open(tmp_path):
    """FineWeb's sets have a thousand."""
    write_shard(tmp_path / "s_0000.bin", np.arange(12), 64)
    for number in range(1, 100):
        (tmp_path / f"s_{number:04d}.bin").symlink_to("s_0000.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
        source = Shards(str(tmp_path / "s_*.bin"), None, 0, 50, 5, 64)
        rows = [row for step in range(4) for row in source.rows(step)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert source.tokens == 1200 and len({tuple(row.ids) for row in rows}) == 2


def test_other_contents_have_another_fingerprint(tmp_path):
    ids = np.arange(1_000_000) % 60_000
    write_shard(tmp_path / "a.bin", ids, 65536)
    write_shard(tmp_path / "b.bin", ids, 65536)
    write_shard(tmp_path / "c.bin", (ids + 1) % 60_000, 65536)
    write_shard(tmp_path / "d.bin", [*ids[:-1], 5], 65536)
    digests = [Shard(tmp_path / f"{name}.bin").fingerprint() for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    for number in range(20):  # any token of a small one
        write_shard(tmp_path / "a.bin", [*range(number), 60, *range(number + 1, 20)], 64)
        digests.append(Shard(tmp_path / "a.bin").fingerprint())
    assert len(set(digests)) == 23


def test_a_shard_that_shrinks_is_named(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(100), 128)
    shard = Shard(tmp_path / "a.bin")
    write_shard(tmp_path / "a.bin", np.arange(10), 128)
    with pytest.raises(ValueError, match=r"a\.bin: it has been shortened"):
        shard.read(5, 20, 128)


def test_ids_piece_by_piece_are_the_same_file(tmp_path, monkeypatch):
    ids = np.arange(1000)
    write_shard(tmp_path / "a.bin", ids, 1000)
    assert shard_format.write_pieces(tmp_path / "b.bin", np.split(ids, [1, 1, 700]), 1000) == 1000
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    monkeypatch.setattr(shard_format, "MOST_TOKENS", 999)
    with pytest.raises(ValueError, match="more than 999 tokens"):
        shard_format.write_pieces(tmp_path / "c.bin", [ids[:500], ids[500:]], 1000)
    assert not (tmp_path / "c.bin").exists()


def test_the_whole_file_can_be_checked(tmp_path):
    write_shard(tmp_path / "a.bin", [*range(5000), 50256, 3, 50300], 65536)
    Shard(tmp_path / "a.bin").check(50301)
    with pytest.raises(ValueError, match="token 5,002 is 50,300, outside the vocabulary of 50,257"):
        Shard(tmp_path / "a.bin").check(50257)


# --- the command: what it shows ---


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    """`python data/shards.py …` as typed, somewhere else."""
    return subprocess.run(
        [sys.executable, ROOT / "data" / "shards.py", *map(str, arguments)],
        env={**os.environ, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def shown(*arguments) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(inspection.report(*arguments))
    return out.getvalue()


def test_document_lengths():
    for ids, expected in [([9, 9, 0, 5, 0, 6, 6, 0], [2, 1, 2, 0]), ([0, 5], [1]), ([5, 5], [2]), ([], [])]:
        assert inspection.document_lengths(np.array(ids, dtype=int), 0).tolist() == expected


def test_the_histogram_counts_by_powers_of_two():
    out = io.StringIO()
    Console(file=out, width=99).print(inspection.histogram(np.array([1, 4, 5, 6, 7, 16, 31, 1 << 40])))
    lines = [line.split() for line in out.getvalue().splitlines()[1:]]
    assert lines[0] == ["1", "1", "█" * 10]
    assert lines[2] == ["4", "to", "7", "4", "█" * 40]
    assert lines[3] == ["8", "to", "15", "0"]
    assert lines[4] == ["16", "to", "31", "2", "█" * 20]
    assert lines[-1][0] == f"{1 << 40:,}" and lines[-1][3] == "1"
    assert inspection.bar(1e-9) == "▏" and inspection.bar(0) == ""


def test_what_inspect_shows(tmp_path):
    tokenizer = texts.load_tokenizer(TINY)
    end = tokenizer.token_to_id(shard_format.END_OF_TEXT)
    first, hostile = tokenizer.encode("[red]one\ntwo").ids, tokenizer.encode("three \x1b[2J").ids
    write_shard(tmp_path / "a.bin", [7, 8, end, *first, end, *hostile], 768)
    text = shown(tmp_path / "a.bin", TINY, None, 9)
    assert "version 1, uint16 (magic 20240520)" in text
    assert f"{4 + len(first + hostile)} in {1024 + 2 * (4 + len(first + hostile)):,} bytes" in text
    assert f"2 begin, each after token {end:,}; one began earlier" in text
    assert f"longest {max(len(first), len(hostile))} tokens" in text
    assert "[red]one↵two" in text and "\x1b" not in text and "three \ufffd[2J" in text
    ids = shown(tmp_path / "a.bin", None, str(end), 1)
    assert " ".join(map(str, first)) in ids and "three" not in ids
    assert "0 begin, each after token 50,256; one began earlier" in shown(tmp_path / "a.bin", None, None, 1)
    with pytest.raises(ValueError, match="--separator end: without --tokenizer"):
        shown(tmp_path / "a.bin", None, "end", 1)
    write_shard(tmp_path / "b.bin", [1, 2, 900], 1000)
    with pytest.raises(ValueError, match="token 2 is 900, outside the vocabulary"):
        shown(tmp_path / "b.bin", TINY, None, 1)
    write_shard(tmp_path / "empty.bin", [], 70000)
    assert "version 7, uint32" in shown(tmp_path / "empty.bin", None, None, 3)


def test_the_command_line(tmp_path):
    write_shard(tmp_path / "a.bin", [50256, 1, 2, 50256, 3], 50257)
    done = command("inspect", tmp_path / "a.bin")
    assert done.returncode == 0 and "2 begin, each after token 50,256" in done.stdout and not done.stderr
    (tmp_path / "a.bin").write_bytes(b"x")
    for arguments in [("inspect", tmp_path / "a.bin"), ("inspect", "absent"), ("download", "104"), ()]:
        done = command(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


# --- texts to shards ---


@pytest.fixture
def sources(tmp_path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {n} ü"}) + "\n" for n in range(600)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", "second"], "n": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes("a whole file\r\nis one <|endoftext|> document 🍓".encode())
    return [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt")]


def tokenized(monkeypatch, out: Path, sources: list[str], *flags: str) -> list[Path]:
    arguments = ["tokenize", *sources, "--tokenizer", str(TINY), "--out", str(out), "--processes", "1", *flags]
    monkeypatch.setattr("sys.argv", ["shards.py", *arguments])
    shards.main()
    return sorted(out.glob("*.bin"))


def documents_in(paths: list[Path]) -> list[str]:
    """The texts that shards hold, by their separators."""
    tokenizer = texts.load_tokenizer(TINY)
    ids = np.concatenate([Shard(path).tokens for path in paths])
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.token_to_id(shard_format.END_OF_TEXT)))
    assert not len(parts[0])
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts[1:]]


def test_texts_become_shards_and_come_back(tmp_path, monkeypatch, sources, capsys):
    paths = tokenized(monkeypatch, tmp_path / "out", sources, "--shard-tokens", "1000")
    lengths = [len(Shard(path)) for path in paths]
    assert [path.name for path in paths[:2]] == ["train_000000.bin", "train_000001.bin"] and len(paths) > 3
    assert lengths[:-1] == [1000] * (len(paths) - 1) and 0 < lengths[-1] <= 1000
    expected = [*(f"line {n} ü" for n in range(600)), "first", "second"]
    assert documents_in(paths) == [*expected, "a whole file\r\nis one <|endoftext|> document 🍓"]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"{paths[0]}  1,000 tokens" and "a second" in printed.err
    with pytest.raises(ValueError, match=r"train_000000\.bin already exists"):
        tokenized(monkeypatch, tmp_path / "out", sources)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "val_000003.bin").touch()
    with pytest.raises(ValueError, match=r"val_000003\.bin already exists"):
        tokenized(monkeypatch, tmp_path / "other", sources, "--validation", "0.1")
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_the_files_are_the_same_for_every_number_of_processes(tmp_path, sources):
    tokenizer = texts.load_tokenizer(TINY)
    made = []
    for processes in (1, 2):
        read = [text for source in sources for text in documents.read_documents(source, "text", "train", None)]
        stream = texts.token_stream(read, tokenizer, 5, processes)
        out = tmp_path / str(processes)
        made.append([path.read_bytes() for path, _ in texts.write_shards(stream, out, "train", 1111, 768)])
    assert made[0] == made[1] and len(made[0]) > 3


def test_a_stream_is_cut_where_it_shall_be():
    pieces = [np.arange(0, 3), np.arange(3, 4), np.arange(4, 14), np.arange(14, 16)]
    for size in range(1, 18):
        parts = [np.concatenate(list(part)).tolist() for part in texts.cut(iter(pieces), size)]
        assert parts == [list(range(start, min(start + size, 16))) for start in range(0, 16, size)]


def test_the_end_is_for_validation(tmp_path, monkeypatch, sources):
    paths = tokenized(monkeypatch, tmp_path / "one", [sources[2]], "--validation", "0.25")
    whole = Path(sources[2]).read_bytes().decode()
    assert [path.name for path in paths] == ["train_000000.bin", "val_000000.bin"]
    assert documents_in(paths) == [whole[: int(len(whole) * 0.75)], whole[int(len(whole) * 0.75) :]]
    paths = tokenized(monkeypatch, tmp_path / "many", sources, "--validation", "0.1", "--documents", "50")
    assert documents_in(paths[:1]) == [f"line {n} ü" for n in range(45)]
    assert documents_in(paths[1:]) == [f"line {n} ü" for n in range(45, 50)]


@pytest.mark.parametrize(("documents", "share", "train"), [(3, 0.1, 2), (2, 0.01, 1), (2, 0.99, 1), (20, 0.1, 18)])
def test_each_part_has_a_document(tmp_path, monkeypatch, documents, share, train):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(documents)))
    paths = tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / "a.jsonl")], "--validation", str(share))
    assert documents_in(paths[:1]) == [f"line {n}" for n in range(train)]
    assert documents_in(paths[1:]) == [f"line {n}" for n in range(train, documents)]


def test_shards_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    """Whatever happens behind the first of them."""
    lines = "".join(json.dumps({"text": f"line {n} " * 50}) + "\n" for n in range(300))
    (tmp_path / "a.jsonl").write_text(lines + "oops\n")
    with pytest.raises(ValueError, match="line 301 is not JSON"):
        tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / "a.jsonl")], "--shard-tokens", "100")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "a.jsonl").write_text(lines)
    real = texts.write_shards
    monkeypatch.setattr(
        texts,
        "write_shards",
        lambda stream, out, name, *rest: real(iter([]) if name == "val" else stream, out, name, *rest),
    )
    with pytest.raises(ValueError, match="no document for val"):
        tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / "a.jsonl")], "--validation", "0.1")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match="too short to be split"):
        tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / "b.txt")], "--validation", "0.1")


def test_a_folder_is_streamed_as_a_data_set(tmp_path, monkeypatch, sources):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(Path(sources[0]).read_bytes())
    paths = tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / "set")], "--documents", "7")
    assert documents_in(paths) == [f"line {n} ü" for n in range(7)]
    with pytest.raises(ValueError, match="row 1 has no text under 'body'"):
        tokenized(monkeypatch, tmp_path / "b", [str(tmp_path / "set")], "--field", "body")
    with pytest.raises(ValueError, match="can't be opened as a data set"):
        tokenized(monkeypatch, tmp_path / "c", [str(tmp_path / "set")], "--split", "nothing")


def test_a_vocabulary_past_uint16_is_marked(tmp_path):
    stream = iter([np.array([151643, 1, 2], dtype=np.uint32)])
    ((path, tokens),) = texts.write_shards(stream, tmp_path, "train", 10, 151669)
    assert tokens == 3 and Shard(path).magic == 20240801 and Shard(path).tokens.tolist() == [151643, 1, 2]


def test_a_tokenizer_that_would_cut_pad_or_has_gaps(tmp_path):
    content = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["model"]["vocab"]["far"] = 70000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = texts.load_tokenizer(tmp_path / "tokenizer.json")
    assert len(loaded.encode("one two three four").ids) > 2
    assert texts.vocabulary_of(loaded) == 70001 > loaded.get_vocab_size()
    with pytest.raises(ValueError, match="--separator <s>: the tokenizer has no such token"):
        texts.separator_of(loaded, "<s>")
    (tmp_path / "tokenizer.json").write_text("{")
    for path, said in [(tmp_path, "can't be read"), (tmp_path / "absent", "no tokenizer.json there")]:
        with pytest.raises(ValueError, match=said):
            texts.load_tokenizer(path)


def test_the_published_counts_of_tinyshakespeare(tmp_path):
    """By GPT-2's tokenizer, split 90/10 by characters; nanoGPT's data/shakespeare/readme.md."""
    if "NANOQWEN_ASSETS" not in os.environ:
        pytest.skip("NANOQWEN_ASSETS names no folder with the corpus and GPT-2's tokenizer")
    assets = Path(os.environ["NANOQWEN_ASSETS"])
    text = assets / "corpus" / "tinyshakespeare.txt"
    done = command("tokenize", text, "--tokenizer", assets / "gpt2", "--out", tmp_path, "--validation", 0.1)
    assert done.returncode == 0, done.stderr
    lengths = [len(Shard(tmp_path / f"{part}_000000.bin")) - 1 for part in ("train", "val")]  # without the separator
    assert lengths == [301_966, 36_059]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"tex', "line 2 is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "line 1 has no text under 'text'"),
        ("x.jsonl", b"[1]\n", "line 1 has no text"),
        ("x.jsonl", b"\n\n" + b"[" * 100_000, "line 3 is not JSON"),
        ("x.jsonl", b'{"text": "\\ud83c alone"}\n', "line 1 is no Unicode text"),
        ("x.jsonl", b"\n", "no document for train"),
        ("x.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("x.txt", b"", "is empty"),
        ("x.parquet", b"PAR1 nothing", "can't be read as Parquet"),
        ("x.doc", b"text", "the kinds of files are"),
    ],
)
def test_bad_texts_get_their_line(tmp_path, monkeypatch, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        tokenized(monkeypatch, tmp_path / "out", [str(tmp_path / name)])
    assert not list(tmp_path.glob("out/*"))


def test_a_parquet_file_of_other_columns(tmp_path, monkeypatch, sources):
    for field, said in [("body", "has no column body but text, n"), ("n", "row 1 has no text under 'n'")]:
        with pytest.raises(ValueError, match=said):
            tokenized(monkeypatch, tmp_path / "out", [sources[1]], "--field", field)
    cut_off = Path(sources[1]).read_bytes()
    Path(sources[1]).write_bytes(cut_off[:4] + bytes(len(cut_off) - 300) + cut_off[-296:])
    with pytest.raises(ValueError, match="can't be read as Parquet"):
        tokenized(monkeypatch, tmp_path / "out", [sources[1]])


def test_bad_flags_and_sources_are_refused(tmp_path, monkeypatch, sources):
    for flags, said in [
        (["--validation", "1"], "--validation 1.0"),
        (["--shard-tokens", "0"], "--shard-tokens 0"),
        (["--shard-tokens", "2147483648"], "--shard-tokens 2147483648"),
        (["--documents", "-1"], "--documents -1"),
        (["--processes", "0"], "--processes 0"),
        (["--separator", "<s>"], "--separator <s>"),
    ]:
        with pytest.raises(ValueError, match=said):
            tokenized(monkeypatch, tmp_path / "out", sources, *flags)
    for source in ("absent.txt", "a/b/c", "./a", "/dev/null"):
        with pytest.raises(ValueError, match=f"{source}: "):
            tokenized(monkeypatch, tmp_path / "out", [source])


def test_a_data_set_is_asked_for_at_the_hub(tmp_path):
    done = command("tokenize", "a/b", "--tokenizer", TINY, "--out", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "a/b: the hub can't be reached" in done.stderr and done.stderr.count("\n") == 1


# --- downloads ---


@pytest.fixture
def server(monkeypatch):
    """A local stand-in for the hub with one small shard; `breaks` bytes after which it hangs up, once."""
    content = header(20240520, 1, 5000) + np.arange(5000, dtype="<u2").tobytes()
    monkeypatch.setattr(fineweb, "shard_bytes", lambda number: len(content))

    class Handler(http.server.BaseHTTPRequestHandler):
        breaks, ranges, shift, states_length, asked, sent = 0, True, 0, True, [], content

        def do_GET(self):
            asked = self.headers.get("Range")
            Handler.asked.append((self.path, asked))
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and Handler.ranges else 0
            if "absent" in self.path:
                return self.send_error(404)
            if "blobs" not in self.path:  # as the hub does, which keeps large files elsewhere
                self.send_response(302)
                self.send_header("Location", "/blobs/1")
                return self.end_headers()
            self.send_response(206 if start else 200)
            if Handler.states_length:
                self.send_header("Content-Length", str(len(Handler.sent) - start))
            if start:
                span = f"bytes {start + Handler.shift}-{len(Handler.sent) - 1}/{len(Handler.sent)}"
                self.send_header("Content-Range", span)
            self.end_headers()
            end, Handler.breaks = start + Handler.breaks if Handler.breaks else None, 0
            return self.wfile.write(Handler.sent[start:end])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Handler.asked = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield Handler
        running.shutdown()


def fetch(monkeypatch, out: Path, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["shards.py", "download", "1", "--out", str(out), *flags])
    shards.main()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(tmp_path, monkeypatch, server, ranges, capsys):
    server.breaks, server.ranges = 3000, ranges
    path = tmp_path / "fineweb_train_000001.bin"
    with pytest.raises(ValueError, match="3,000 of 11,024 bytes arrived; run the command again"):
        fetch(monkeypatch, tmp_path)
    assert not path.exists() and (tmp_path / "fineweb_train_000001.bin.part").stat().st_size == 3000
    fetch(monkeypatch, tmp_path)
    assert path.read_bytes() == server.sent and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert capsys.readouterr().out == f"{path}\n"
    first = ("/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_train_000001.bin", None)
    assert server.asked == [first, ("/blobs/1", None), (first[0], "bytes=3000-"), ("/blobs/1", "bytes=3000-")]
    fetch(monkeypatch, tmp_path)
    assert len(server.asked) == 4  # what is there is not asked for again


def test_a_file_of_another_size_or_kind_gets_no_name(tmp_path, monkeypatch, server):
    good, other_ids = server.sent, bytearray(server.sent)
    other_ids[-2:] = b"\xff\xff"
    for sent, said in [
        (good[:-2], "this file has 11,024 bytes, but the server sends 11022"),
        (bytes(len(good)), "magic number 0"),
        (bytes(other_ids), "token 4,999 is 65,535, outside the vocabulary of 50,257"),
    ]:
        server.sent = sent
        with pytest.raises(ValueError, match=said):
            fetch(monkeypatch, tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_server_that_never_ends_fills_no_disk(tmp_path, monkeypatch, server):
    content, server.sent, server.states_length = server.sent, server.sent + bytes(1 << 20), False
    fetch(monkeypatch, tmp_path)
    [path] = tmp_path.iterdir()
    assert path.read_bytes() == content


def test_a_part_that_was_not_asked_for_is_not_taken(tmp_path, monkeypatch, server):
    (tmp_path / "fineweb_train_000001.bin.part").write_bytes(server.sent[:2000])
    server.shift = 1
    with pytest.raises(ValueError, match="another range"):
        fetch(monkeypatch, tmp_path)
    assert (tmp_path / "fineweb_train_000001.bin.part").read_bytes() == server.sent[:2000]


def test_what_can_not_be_reached_is_one_line(tmp_path, monkeypatch, server):
    with pytest.raises(ValueError, match=r"can't be reached .*run the command again"):
        fetch(monkeypatch, tmp_path, "--url", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="404 Not Found"):
        fetch(monkeypatch, tmp_path, "--url", os.environ["HF_ENDPOINT"] + "/absent")
    with pytest.raises(ValueError, match="not an address"):
        fetch(monkeypatch, tmp_path, "--url", "file:///etc")
    assert download.REACH_SECONDS < 8
    monkeypatch.setattr(download, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="no answer within"):
        fetch(monkeypatch, tmp_path, "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert not list(tmp_path.iterdir())


def test_shard_numbers():
    assert fineweb.parse_numbers(["7", "0-2", "1"]) == [0, 1, 2, 7] and fineweb.parse_numbers(["103"]) == [103]
    assert fineweb.shard_name(0) == "fineweb_val_000000.bin" and fineweb.shard_name(12) == "fineweb_train_000012.bin"
    assert fineweb.shard_bytes(1) == 200_001_024 and fineweb.shard_bytes(103) == 1024 + 2 * 55_324_043
    for text in ("", "a", "1-", "104", "3-2", "0-9999999999", "-3", "²"):
        with pytest.raises(ValueError, match="download"):
            fineweb.parse_numbers([text])


# --- training on them ---


def test_a_run_on_shards_and_its_stand_in(tmp_path, capsys):
    config = {
        "stage": "pretrain",
        "train": {
            "steps": 3,
            "save_every": 3,
            "batch": 4,
            "accumulate": 2,
            "sequence": 16,
            "threads": 1,
            "device": "cpu",
        },
        "model": {
            "tokenizer": str(TINY),
            "config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
        },
        "data": {"source": "auto", "train": str(tmp_path / "t_*.bin"), "validation": str(tmp_path / "t_*.bin")},
        "optimizer": {"lr": 0.01},
    }
    config["data"]["mask_documents"] = True
    config["data"]["corpus_tokenizer"] = str(TINY)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    train.Trainer(schema.load(path, [f"train.out={tmp_path / 'absent'}", "train.sequence=256"]), False).train()
    assert "no file matches" in capsys.readouterr().err
    write_shard(tmp_path / "t_0.bin", np.random.default_rng(0).integers(0, 700, 2000), 758)
    train.Trainer(schema.load(path, [f"train.out={tmp_path / 'run'}"]), False).train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [64, 128, 192] and "validation_loss" in records[-1]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert saved["source"] == "shards" and saved["tokens"] == 2000
    write_shard(tmp_path / "t_0.bin", np.random.default_rng(1).integers(0, 700, 2000), 758)
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        train.Trainer(schema.load(path, [f"train.out={tmp_path / 'run'}"]), True)
    write_shard(tmp_path / "t_1.bin", np.arange(700), 758)
    with pytest.raises(ValueError, match=r"data\.tokens: 2000 -> 2700"):
        train.Trainer(schema.load(path, [f"train.out={tmp_path / 'run'}"]), True)
