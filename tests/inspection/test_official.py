"""Official templates are known by hashes: they are recognised, and a changed one is compared line by line."""

import json
import os
from pathlib import Path

import pytest

from inspection import official, templates
from inspection.findings import Ledger

ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", "/nowhere"))
OWN = "{% for m in messages %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OWN += "\n{% if tools %}\nT\n{% endif %}"


@pytest.fixture(scope="module")
def prompts():
    sandbox = templates.TemplateSandbox()
    return lambda text: templates.examine(Ledger(), "t", text, sandbox, {})


def texts() -> dict[str, str]:
    """The official templates, under the names that the project gives them."""
    folder, configs = ASSETS / "templates", ASSETS / "configs"
    first = json.loads((configs / "Qwen3-Reranker-0.6B.tokenizer_config.json").read_text())["chat_template"]
    return {
        "Qwen3 (0.6B to 235B-A22B)": json.loads((ASSETS / "qwen3-0.6b" / "tokenizer_config.json").read_text())[
            "chat_template"
        ],
        "Qwen3, first published (Embedding, Reranker)": first,
        **{file.name.partition(".chat_template")[0]: file.read_text() for file in folder.glob("*.jinja")},
    }


@pytest.mark.skipif(not ASSETS.is_dir(), reason="NANOQWEN_ASSETS is not set")
def test_the_hashes_are_those_of_the_published_texts(prompts):
    found = texts()
    assert set(found) == set(official.known())
    for name, text in found.items():
        assert official.known()[name] == official.fingerprint(text, prompts(text)), name


@pytest.mark.skipif(not ASSETS.is_dir(), reason="NANOQWEN_ASSETS is not set")
def test_changed_official_templates(prompts):
    for name, text in texts().items():
        lines = text.split("\n")
        changed = [*lines[:20], lines[20] + " {# x #}", *lines[21:]]
        found = official.difference("\n".join(changed), prompts("\n".join(changed)))
        assert (found.name, found.own, found.missing) == (name, [21], [21])
        added = text + "\n{{ 'Answer in rhymes.' }}"
        found = official.difference(added, prompts(added))
        assert found.name == name and len(found.own) == 1 and not found.missing and len(found.prompts) >= 5


def test_a_template_of_ones_own(monkeypatch, prompts):
    known = {"ours": official.fingerprint(OWN, prompts(OWN))}
    monkeypatch.setattr(official, "known", lambda: known)
    assert official.name_of(OWN) == "ours" and official.name_of(OWN + " ") is None
    other = OWN.replace("\nT\n", "\nTools\n")
    found = official.difference(other, prompts(other))
    assert found == ("ours", [6], [6], ["tools", "tool result"])
    assert official.sentence(found) == (
        "most like that of ours, but line 6 is not in it and its line 6 is missing; "
        "prompts differ for: tools, tool result"
    )
    assert official.difference("{{ messages }}", {}) is None
    assert official.difference("\n" * 300_000, {}) is None
    assert (
        official.ranges([1, 2, 3, 7]) == "1-3, 7" and official.ranges(range(1, 40, 2), 2) == "1, 3 and 18 more places"
    )
