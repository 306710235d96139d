"""Shards of token ids: the format read strictly, the order, tokenising into them, downloading them."""

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from configs import schema
from data import fineweb, shards, texts
from data.shards import Shard, Windows, documents, histogram, inspect, write_shard
from data.sources import Shards

TINY = Path(__file__).parent.parent / "models" / "tiny"


def header(magic: int, version: int, count: int) -> bytes:
    return np.array([magic, version, count, *[0] * 253], dtype="<i4").tobytes()


@pytest.mark.parametrize(("vocabulary", "dtype", "magic"), [(65536, "<u2", 20240520), (65537, "<u4", 20240801)])
def test_a_shard_comes_back_and_its_bytes_are_the_format(tmp_path, vocabulary, dtype, magic):
    ids = [0, vocabulary - 1, 7, 300]
    write_shard(tmp_path / "a.bin", ids, vocabulary)
    version = {20240520: 1, 20240801: 7}[magic]
    assert (tmp_path / "a.bin").read_bytes() == header(magic, version, 4) + np.array(ids, dtype=dtype).tobytes()
    assert Shard(tmp_path / "a.bin").read(1, 10, vocabulary).tolist() == ids[1:]
    with pytest.raises(ValueError, match=f"token 1 is {vocabulary - 1:,}, outside of the vocabulary"):
        Shard(tmp_path / "a.bin").read(0, 4, vocabulary - 1)
    with pytest.raises(ValueError, match="token ids"):
        write_shard(tmp_path / "b.bin", [vocabulary], vocabulary)
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes are too few"),
        (header(20240520, 1, 0)[:-1], "1,023 bytes are too few"),
        (header(1, 1, 2) + bytes(4), "magic number 1 is no shard's"),
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
        assert len(row.ids) == 5 and row.targets == [i + 1 for i in row.ids]
    assert [row.ids[0] for row in source.validation_rows(0)] == [0, 5]
    assert len(source.validation_rows(3)) == 1 and source.validation_rows(4) == []
    with pytest.raises(ValueError, match="no file matches"):
        Shards(str(tmp_path / "x_*.bin"), None, 0, 2, 5, 64)


def test_documents_stay_apart():
    ids = torch.tensor([[5, 6, 0, 7, 0, 8]])
    expected = ["100000", "110000", "001000", "001100", "000010", "000011"]
    rows = train.document_mask(ids, 0)[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == expected


def test_document_lengths():
    assert documents(np.array([9, 9, 0, 5, 0, 6, 6, 0]), 0).tolist() == [2, 1, 2, 0]
    assert documents(np.array([0, 5]), 0).tolist() == [1]
    assert documents(np.array([5, 5]), 0).tolist() == [2]
    assert documents(np.array([], dtype=int), 0).tolist() == []
    assert histogram(np.array([0, 1, 5, 6, 7])).splitlines()[-1].split()[:4] == ["4", "-", "7", "3"]


# --- texts to shards ---


@pytest.fixture
def sources(tmp_path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {n} ü"}) + "\n" for n in range(300)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", "second"], "n": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("a whole file\nis one document 🍓", encoding="utf-8")
    return [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt")]


def test_texts_become_shards_and_come_back(tmp_path, sources):
    tokenizer = texts.load_tokenizer(TINY)
    documents_in = [text for source in sources for text in texts.read_documents(source, "text", "train", None)]
    assert len(documents_in) == 303 and documents_in[-1].endswith("🍓")
    stream = texts.token_stream(documents_in, tokenizer)
    paths = texts.write_shards(stream, tmp_path / "out", "train", 1000, tokenizer.get_vocab_size())
    assert [path.name for path in paths[:2]] == ["train_000000.bin", "train_000001.bin"]
    lengths = [len(Shard(path)) for path in paths]
    assert lengths[:-1] == [1000] * (len(paths) - 1) and 0 < lengths[-1] <= 1000
    ids = np.concatenate([Shard(path).tokens for path in paths])
    end = tokenizer.token_to_id(texts.END_OF_TEXT)
    parts = np.split(ids, np.flatnonzero(ids == end))[1:]
    assert [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts] == documents_in
    assert "one document" in inspect(paths[-1], TINY, 50)
    assert f"{lengths[-1]:,} tokens, uint16" in inspect(paths[-1], None, 2)


def test_the_end_of_a_text_is_for_validation():
    assert texts.parted(["0123456789"], 0.2) == (["01234567"], ["89"])
    assert texts.parted(["a", "b", "c", "d"], 0.25) == (["a", "b", "c"], ["d"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"tex', "line 2 is not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "line 1 has no text under 'text'"),
        ("x.jsonl", b"[1]\n", "line 1 has no text"),
        ("x.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("x.parquet", b"PAR1 nothing", "not Parquet"),
        ("x.doc", b"", "the kinds of files are"),
    ],
)
def test_bad_texts_get_their_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        list(texts.read_documents(str(tmp_path / name), "text", "train", None))


def test_what_is_neither_file_nor_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor the id"):
        texts.read_documents(str(tmp_path / "absent.txt"), "text", "train", None)


# --- downloads ---


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local stand-in for the hub with one small shard; `breaks` bytes after which it hangs up, once."""
    content = header(20240520, 1, 5000) + np.arange(5000, dtype="<u2").tobytes()
    monkeypatch.setattr(fineweb, "shard_bytes", lambda number: len(content))

    class Handler(http.server.BaseHTTPRequestHandler):
        breaks, ranges, asked, sent = 0, True, [], content

        def do_GET(self):
            asked = self.headers.get("Range")
            Handler.asked.append((self.path, asked))
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and Handler.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(Handler.sent) - start))
            self.end_headers()
            end, Handler.breaks = start + Handler.breaks if Handler.breaks else None, 0
            self.wfile.write(Handler.sent[start:end])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", Handler, content
        running.shutdown()


def fetch(monkeypatch, out: Path, url: str) -> None:
    monkeypatch.setattr("sys.argv", ["fineweb.py", "--out", str(out), "--shards", "1", "--url", url])
    fineweb.main()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(tmp_path, monkeypatch, server, ranges):
    url, handler, content = server
    handler.breaks, handler.ranges, handler.asked = 3000, ranges, []
    path = tmp_path / "fineweb_train_000001.bin"
    with pytest.raises(ValueError, match="run the same command again"):
        fetch(monkeypatch, tmp_path, url)
    assert not path.exists() and (tmp_path / "fineweb_train_000001.bin.part").stat().st_size == 3000
    fetch(monkeypatch, tmp_path, url)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert handler.asked == [("/fineweb_train_000001.bin", None), ("/fineweb_train_000001.bin", "bytes=3000-")]
    fetch(monkeypatch, tmp_path, url)
    assert len(handler.asked) == 2  # what is there is not asked for again


def test_a_file_of_another_size_or_kind_gets_no_name(tmp_path, monkeypatch, server):
    url, handler, content = server
    handler.sent = content[:-2]
    with pytest.raises(ValueError, match="this shard has 11,024"):
        fetch(monkeypatch, tmp_path, url)
    handler.sent = bytes(len(content))
    with pytest.raises(ValueError, match="magic number 0"):
        fetch(monkeypatch, tmp_path, url)
    assert not list(tmp_path.iterdir())


def test_no_server_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run the same command again"):
        fetch(monkeypatch, tmp_path, "http://127.0.0.1:9")


def test_shard_numbers():
    assert fineweb.parse_range("0-2,7") == [0, 1, 2, 7] and fineweb.parse_range("103") == [103]
    assert fineweb.shard_name(0) == "fineweb_val_000000.bin" and fineweb.shard_name(12) == "fineweb_train_000012.bin"
    assert fineweb.shard_bytes(1) == 200_001_024 and fineweb.shard_bytes(103) == 1024 + 2 * 55_324_043
    for text in ("", "a", "1-", "104", "0-9999999999", "-3"):
        with pytest.raises(ValueError, match="--shards"):
            fineweb.parse_range(text)


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
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["source"] == "shards"
    assert shards.END_OF_TEXT == texts.END_OF_TEXT
