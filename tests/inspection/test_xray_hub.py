"""The course's data sets, small and in their true form, from a hub of our own."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")

from local_hub import Hub, use
from xray_sets import findings, make, sentence, tree

from chat import Chat
from inspection.xray.examine import Settings, examine


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    use(server.url, tmp_path, monkeypatch)
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
