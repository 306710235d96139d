"""Tool calls in a model's text, cut into pieces at every place."""

import json

import pytest

from serving.tool_calls import Call, CallParser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"s": {"type": "string"}, "x": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "g"}},
]
ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 3, "s": "é</tool"}}\n</tool_call>'
PARAMETERS = "<parameter=s>\n12\n</parameter>\n<parameter=x>\n12\n</parameter>\n"
TAGS = f"<tool_call>\n<function=f>\n{PARAMETERS}</function>\n</tool_call>"


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    parser = CallParser(TOOLS)
    found = [one for piece in pieces for one in parser.push(piece)] + parser.finish()
    calls = [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, Call)]
    assert parser.count == len(calls)
    return "".join(one for one in found if isinstance(one, str)), calls


@pytest.mark.parametrize(
    "text, shown, calls",
    [
        (ONE, "", [("f", {"x": 3, "s": "é</tool"})]),
        (f"Let me see.\n{ONE}", "Let me see.", [("f", {"x": 3, "s": "é</tool"})]),
        (f"{ONE}\n{ONE}", "", [("f", {"x": 3, "s": "é</tool"})] * 2),
        (f"{ONE}\n\n", "", [("f", {"x": 3, "s": "é</tool"})]),
        ('<tool_call>{"name": "g"}</tool_call>', "", [("g", {})]),
        (TAGS, "", [("f", {"s": "12", "x": 12})]),
        ("<tool_call>\n<function=g>\n</function>\n</tool_call>", "", [("g", {})]),
        # What is no call is text, to the letter.
        ("a < b, <tool> and <tool_call", "a < b, <tool> and <tool_call", []),
        (ONE[:-3], ONE[:-3], []),
        ('<tool_call>\n{"name": "f", }\n</tool_call> x ', '<tool_call>\n{"name": "f", }\n</tool_call> x ', []),
        (
            '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            [],
        ),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',) * 2 + ([],),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>",) * 2 + ([],),
        ("<tool_call><function=f>junk</function></tool_call>",) * 2 + ([],),
        ("text \n\n ", "text \n\n ", []),
        (f"<tool_call>no</tool_call>{ONE}", "<tool_call>no</tool_call>", [("f", {"x": 3, "s": "é</tool"})]),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text, shown, calls):
    assert parsed([text]) == (shown, calls)
    if len(text) < 1000:
        assert parsed(list(text)) == (shown, calls)
        for cut in range(1, len(text)):
            assert parsed([text[:cut], text[cut:]]) == (shown, calls)


def test_text_is_held_back_no_longer_than_it_has_to():
    parser = CallParser(TOOLS)
    assert parser.push("Hello <b>there") == ["Hello <b>there"]
    assert parser.push(" <tool") == [] and parser.push("box> ") == [" <toolbox>"]
    assert parser.push("x") == [" x"]
