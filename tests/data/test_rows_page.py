"""docs/rows.md: each row that it shows is read as it says."""

import json
import re
from pathlib import Path

import pytest

from chat import Chat
from data import conversations
from data.sources import WrittenRows

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "rows.md").read_text()
BLOCKS = re.findall(r"^```jsonl (\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SHOWN = [(kind, line) for kind, block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def rows() -> WrittenRows:
    return WrittenRows(Chat.from_pretrained(ROOT / "models" / "tiny"))


@pytest.mark.parametrize(("kind", "line"), SHOWN, ids=range(len(SHOWN)))
def test_a_row_of_the_page_is_read(rows, kind, line):
    record = json.loads(line)
    if kind == "prompts":
        assert conversations.prompt(record).messages[0]["content"] == "What is 473 + 89?"
        return
    read = {"sft": rows.conversation, "dpo": rows.preference, "grpo": rows.question}[kind]
    assert len(read(record)) == (2 if "tool_calls" in line else 1)


def test_every_kind_is_shown():
    assert {kind for kind, _ in SHOWN} == {"sft", "dpo", "grpo", "prompts"} and len(SHOWN) > 15
