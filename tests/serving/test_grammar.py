"""Grammars over the bundled tokenizer and the official one: what they let through, and that thinking stays free."""

import json
import os
from pathlib import Path

import pytest
import torch

from chat import Chat
from serving.grammar import Constraint, Grammars
from serving.tool_calls import Call, CallParser

ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", ""))
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "w": {"type": "string"}},
    "required": ["n", "w"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
BARE = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"n": -3, "w": "é\\n🙂"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module", params=["tiny", "qwen3-0.6b", "Qwen3-Coder"])
def grammars(request) -> Grammars:
    if request.param == "tiny":
        chat = Chat.from_pretrained("models/tiny")
        return Grammars(chat, 758, {734, 732})
    if "NANOQWEN_ASSETS" not in os.environ:
        pytest.skip("needs NANOQWEN_ASSETS, the official tokenizer")
    chat = Chat.from_pretrained(ASSETS / "qwen3-0.6b")
    if request.param == "Qwen3-Coder":
        chat.templates = {"default": (ASSETS / "templates/Qwen3-Coder.chat_template.jinja").read_text(encoding="utf-8")}
    return Grammars(chat, 151936, {151645, 151643})


def accepts(grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether a reply may be this text and end: each token has to survive the mask."""
    constraint = Constraint(grammars, grammars.matcher(grammar), opened=False, thinks=False, param="tools")
    tokens, logits = [], torch.zeros(grammars.vocab_size)
    for token in [*grammars.chat.encode(text), grammars.ends[0]]:
        if constraint.mask(tokens, logits)[token] == -torch.inf:
            return False
        tokens.append(token)
    return True


def test_json_of_a_schema(grammars):
    grammar = grammars.answer(SCHEMA)
    assert accepts(grammars, grammar, '{"n": 12, "w": "a b\\" é 🙂"}')
    for wrong in ('{"n": 1.5, "w": ""}', '{"n": 1}', '{"w": "", "n": 1}', "[]", "", '{"n": 1, "w": ""} x', "\n{}"):
        assert not accepts(grammars, grammar, wrong), wrong
    for word in ("<|im_end|>", "<think>"):  # as special tokens; a text in a string is none
        assert not accepts(grammars, grammar, '{"n": 1, "w": "' + word + '"}')
    anything = grammars.answer({"type": "object"})
    assert accepts(grammars, anything, '{"a": [1, {"b": null}]}') and not accepts(grammars, anything, "3")


def test_schemas_as_pydantic_writes_them(grammars):
    pydantic = pytest.importorskip("pydantic")

    class Step(pydantic.BaseModel):
        text: str
        weight: float | None = None

    class Plan(pydantic.BaseModel):
        """What to do."""

        steps: list[Step]
        kind: str = pydantic.Field(pattern="^[a-c]+$")

    grammar = grammars.answer(Plan.model_json_schema())
    assert accepts(grammars, grammar, '{"steps": [{"text": "x", "weight": 0.5}], "kind": "ab"}')
    assert not accepts(grammars, grammar, '{"steps": [{"weight": 0.5}], "kind": "ab"}')
    assert not accepts(grammars, grammar, '{"steps": [], "kind": "xy"}')


def test_what_a_grammar_cannot_follow_is_refused(grammars):
    for schema in (
        {"type": "number", "multipleOf": "x"},
        {"type": "object", "propertyNames": {"pattern": "a"}},
        {"$ref": "https://example.org/schema.json"},
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/definitions/none"},
        {"$ref": "#"},  # no text at all
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ):
        with pytest.raises(ValueError, match="can't be followed"):
            grammars.matcher(grammars.answer(schema))


def test_calls(grammars):
    if grammars._tags:
        pytest.skip("this template writes calls in tags")
    required = grammars.calls([TOOL, BARE])
    assert accepts(grammars, required, CALL) and accepts(grammars, required, f"{NOW}\n{CALL}")
    assert not accepts(grammars, grammars.calls([TOOL], parallel=False), f"{CALL}\n{CALL}")
    for wrong in ("Hello", f"Hello {CALL}", NOW.replace("now", "then"), NOW.replace("{}}", '{"x": 1}}'), CALL[:-1]):
        assert not accepts(grammars, required, wrong), wrong
    free = grammars.text_or_calls([TOOL])
    assert accepts(grammars, free, "Just text") and accepts(grammars, free, f"First\n{CALL}\n{CALL}")
    assert not accepts(grammars, free, CALL.replace("-3", '"x"'))
    either = grammars.answer(SCHEMA, [TOOL])
    assert accepts(grammars, either, CALL) and accepts(grammars, either, '{"n": 1, "w": ""}')
    assert not accepts(grammars, either, "text")


def test_calls_in_tags(grammars):
    if not grammars._tags:
        pytest.skip("this template writes calls as JSON")
    parameters = "<parameter=n>\n{}\n</parameter>\n<parameter=w>\n{}\n</parameter>\n"
    tags = f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"
    grammar = grammars.calls([TOOL])
    assert accepts(grammars, grammar, tags.format("12", "any <b>text</b>\nof lines"))
    assert not accepts(grammars, grammar, tags.format("twelve", "x"))
    (call,) = CallParser([TOOL]).push(tags.format("12", "34"))
    assert isinstance(call, Call) and json.loads(call.arguments) == {"n": 12, "w": "34"}


def test_thinking_is_free_and_comes_first(grammars):
    chat = grammars.chat
    for opened in (False, True):
        constraint = Constraint(grammars, grammars.matcher(grammars.answer(SCHEMA)), opened, thinks=True, param="tools")
        logits, tokens = torch.zeros(grammars.vocab_size), []
        text = "\nSo: what?\n</think>" if opened else "<think>\nSo: what?\n</think>"
        for token in chat.encode(text):
            mask = constraint.mask(tokens, logits)
            assert mask[token] == 0
            if tokens:
                assert mask[grammars.ends[0]] == -torch.inf  # a thinking that ends the reply would leave no JSON
            tokens.append(token)
        inserted = constraint.intervene(tokens)
        assert chat.decode(inserted) == "\n\n"
        tokens += inserted
        assert constraint.mask(tokens, logits)[chat.encode('{"n": ')[0]] == 0
        assert constraint.mask(tokens, logits)[chat.encode("S")[0]] == -torch.inf


def test_without_thinking_it_begins_at_once(grammars):
    constraint = Constraint(
        grammars, grammars.matcher(grammars.answer(SCHEMA)), opened=False, thinks=False, param="tools"
    )
    mask = constraint.mask([], torch.zeros(grammars.vocab_size))
    assert mask[grammars.chat.think_start_id] == -torch.inf and mask[grammars.chat.encode('{"n": ')[0]] == 0
