"""Croissant: read through mlcroissant and compared with what is there; written, and valid."""

import json
from pathlib import Path

import pytest
from xray_sets import make, write_rows

from inspection.xray import croissant
from inspection.xray.examine import Settings, examine

mlcroissant = pytest.importorskip("mlcroissant")


def look(source: Path) -> dict:
    found = examine(str(source), Settings(near_rows=0), None)
    found.close()
    return found.report


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train.parquet", [make("pretraining", i) for i in range(20)])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    return folder


def test_what_is_written_is_valid_and_agrees(folder):
    report = look(folder)
    assert report["croissant"] is None and report["license"] == "mit"
    croissant.write(folder / "croissant.json", report, [folder / "train.parquet"])
    read = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    rows = [dict(row) for row in read.records("rows")]
    assert len(rows) == 20 and rows[3]["rows/text" if "rows/text" in rows[3] else "rows/0"] in (
        make("pretraining", 3)["text"],
        make("pretraining", 3)["text"].encode(),
    )
    again = look(folder)["croissant"]
    assert again["valid"] is True and again["differences"] == []


def test_differences_are_named(folder):
    croissant.write(folder / "croissant.json", look(folder), [folder / "train.parquet"])
    content = json.loads((folder / "croissant.json").read_text())
    fields = content["recordSet"][0]["field"]
    fields[0]["source"]["extract"]["column"] = "body"
    fields[2]["dataType"] = "sc:Text"
    content["license"] = "https://creativecommons.org/licenses/by-nc/4.0/"
    (folder / "croissant.json").write_text(json.dumps(content))
    differences = "\n".join(look(folder)["croissant"]["differences"])
    for said in (
        "states a column body, which is not there",
        "does not state the column text",
        "states score as Text, but it is double",
        "states the licence https://creativecommons.org/licenses/by-nc/4.0/, the card mit",
    ):
        assert said in differences


@pytest.mark.parametrize(
    "content", ['{"conformsTo": 1}', '{"conformsTo": "x", "@context": ' + "[" * 500 + "]" * 500 + "}", "[]", "{"]
)
def test_a_broken_croissant_is_no_crash(folder, content):
    (folder / "croissant.json").write_text(content)
    found = look(folder)["croissant"]
    assert found is None or (found["valid"] is False and found["differences"])
