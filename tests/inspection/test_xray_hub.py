"""The course's data sets, small and in their true form, from a hub of our own."""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

datasets = pytest.importorskip("datasets")

from huggingface_hub import constants  # noqa: E402
from xray_sets import findings, make, sentence, tree  # noqa: E402

from chat import Chat  # noqa: E402
from inspection.xray.examine import Settings, examine  # noqa: E402

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves data sets: {id: {file name: bytes}}."""

    def __init__(self, sets: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sets, self.requests, self.cards, self.croissants = sets, [], {}, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = unquote(self.path)
        self.server.requests.append((self.command, path))
        if match := re.match(r"/api/datasets/([^/]+/[^/?]+)/croissant", path):
            found = self.server.croissants.get(match[1])
            return self.answer(200 if found else 404, found or {})
        if match := re.match(r"/api/datasets/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?|$)", path):
            if (files := self.server.sets.get(match[1])) is None:
                return self.refuse("RepoNotFound")
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            card = self.server.cards.get(match[1], {})
            return self.answer(
                200,
                {"id": match[1], "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False},
            )
        if match := re.match(r"/api/datasets/([^/]+/[^/?]+)/tree/[^/?]+/?([^?]*)", path):
            return self.answer(200, self.entries(match[1], match[2]))
        if match := re.match(r"/api/datasets/([^/]+/[^/?]+)/paths-info/", path):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]+)", unquote(body))
            files = self.server.sets[match[1]]
            return self.answer(200, [self.entry(name, files[name]) for name in wanted if name in files])
        if match := re.match(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.*?)(?:\?|$)", path):
            content = self.server.sets.get(match[1], {}).get(match[2])
            return self.refuse("EntryNotFound") if content is None else self.file(content)
        return self.refuse("EntryNotFound")

    do_HEAD = do_POST = do_GET

    @staticmethod
    def entry(name: str, content: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def entries(self, repo: str, folder: str) -> list[dict]:
        files = self.server.sets[repo]
        inside = [name for name in files if name.startswith(folder)]
        folders = {str(parent) for name in inside for parent in Path(name).parents if str(parent) not in (".", folder)}
        made = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return made + [self.entry(name, files[name]) for name in inside]

    def file(self, content: bytes):
        start, stop = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(stop, int(match[2]) + 1 if match[2] else stop)
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    def answer(self, status: int, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, reason: str):
        self.send_response(404)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub({})
    for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
        if hasattr(datasets.config, {"ENDPOINT": "HF_ENDPOINT"}.get(name, name)):
            monkeypatch.setattr(datasets.config, {"ENDPOINT": "HF_ENDPOINT"}.get(name, name), value)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(Path(__file__).resolve().parents[2] / "models" / "tiny")


def look(name: str, chat: Chat, **settings) -> dict:
    found = examine(name, Settings(**{"mask_rows": 10} | settings), chat)
    found.close()
    return found.report


def test_dolly(hub, chat):
    rows = [make("dolly", i) for i in range(60)]
    rows[7]["response"] = "ok"
    hub.sets["databricks/databricks-dolly-15k"] = {"databricks-dolly-15k.jsonl": json_lines(rows)}
    hub.cards["databricks/databricks-dolly-15k"] = {"license": "cc-by-sa-3.0", "language": ["en"]}
    found = look("databricks/databricks-dolly-15k", chat)
    assert (found["shape"], found["rows"], found["license"]) == ("sft", 60, "cc-by-sa-3.0")
    assert found["commercial_use"] == "yes, with conditions"
    assert found["address"] == "https://huggingface.co/datasets/databricks/databricks-dolly-15k"
    assert findings(found) == {"short_response": [7]}
    part = look("databricks/databricks-dolly-15k", chat, limit=20)
    assert (part["rows"], part["rows_read"], part["complete"]) == (None, 20, False)


def test_ultrachat(hub, chat):
    rows = [
        {"prompt": make("messages", i)["messages"][0]["content"], "prompt_id": str(i)} | make("messages", i)
        for i in range(40)
    ]
    rows[3]["messages"] = rows[3]["messages"][1:]
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    hub.sets["HuggingFaceH4/ultrachat_200k"] = {
        f"data/{split}-00000-of-00001.parquet": parquet(rows[10 * place : 10 * place + 10])
        for place, split in enumerate(splits)
    }
    card = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits) + "---\n"
    hub.sets["HuggingFaceH4/ultrachat_200k"]["README.md"] = card.encode()
    hub.cards["HuggingFaceH4/ultrachat_200k"] = {"license": "mit"}
    found = look("HuggingFaceH4/ultrachat_200k", chat)
    assert (found["shape"], found["signature_column"], found["commercial_use"]) == ("chat", "messages", "yes")
    assert found["splits"] == dict.fromkeys(splits, 10)
    assert findings(found)["role_alternation"] == [3]
    assert look("HuggingFaceH4/ultrachat_200k", chat, split="test_gen")["rows"] == 10


def test_oasst(hub, chat):
    hub.sets["OpenAssistant/oasst1"] = {"data/train-00000-of-00001.parquet": parquet(tree(10))}
    hub.cards["OpenAssistant/oasst1"] = {"license": "apache-2.0"}
    found = look("OpenAssistant/oasst1", chat)
    assert (found["shape"], found["tree"]["trees"], found["tree"]["languages"]) == ("tree", 10, {"en": 25, "es": 25})
    assert findings(found) == {}


def test_hh_rlhf(hub, chat):
    rows = [make("hh", i) for i in range(40)]
    rows[5]["rejected"] = rows[5]["chosen"]
    test = json_lines([make("hh", 99)])
    hub.sets["Anthropic/hh-rlhf"] = {"helpful-base/train.jsonl": json_lines(rows), "helpful-base/test.jsonl": test}
    hub.cards["Anthropic/hh-rlhf"] = {"license": "mit"}
    found = look("Anthropic/hh-rlhf", chat)
    assert (found["shape"], found["rows"]) == ("preference", 41)
    assert found["splits"] == {"train": 40, "test": 1}
    assert {name: len(rows) for name, rows in findings(found).items()} == {"equal_pair": 1, "zero_target": 1}


def test_fineweb(hub, chat):
    rows = [
        {
            "text": f"{sentence(i, 40)}",
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2013-20",
            "url": f"http://example.org/{i}",
            "date": "2013-05-18T05:48:54Z",
            "file_path": "s3://commoncrawl/x.warc.gz",
            "language": "en",
            "language_score": 0.97,
            "token_count": 40,
        }
        for i in range(50)
    ]
    rows[9]["text"] = rows[2]["text"]
    hub.sets["HuggingFaceFW/fineweb"] = {"sample/10BT/000_00000.parquet": parquet(rows)}
    hub.cards["HuggingFaceFW/fineweb"] = {"license": "odc-by"}
    found = look("HuggingFaceFW/fineweb", chat, limit=40)
    assert (found["shape"], found["signature_column"], len(found["columns"])) == ("pretraining", "text", 9)
    assert findings(found) == {"duplicate": [9]} and found["verdict"]["train"] == "after-fixes"


def test_a_set_that_is_not_there_is_one_line(hub, chat):
    with pytest.raises(ValueError, match="neither a file or folder here nor a data set on the hub"):
        look("nobody/nothing", chat)
