"""Bodies that mean two things or nothing, nest deeply, or have schemas that can't be held: a 400 that says which."""

import json
import re
import string

import openai
import pytest

EVERY_TOKEN = b",".join(b'"%d": -100' % token for token in range(758))


@pytest.mark.parametrize(
    "body, told, param",
    [
        (b'{"prompt": "x", "max_tokens": 1, "prompt": "y"}', "'prompt' is there twice", None),
        (b'{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}', "'5' is there twice", None),
        (b'{"prompt": "x", "temperature": NaN}', "NaN", None),
        (b'{"prompt": "x", "top_p": -Infinity}', "-Infinity", None),
        (b'{"prompt": "x", "temperature": 1e999}', "1e999", None),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "digits", None),
        (b'{"prompt": "x", "seed": 9223372036854775808}', "seed", "seed"),
        (b'{"prompt": "\\ud83d"}', "surrogate", "prompt"),
        (b'{"prompt": "x", "stop": ["\\uDC00"]}', "surrogate", "stop"),
        (b'{"prompt": "x", "\\ud800": 1}', "surrogate", "\ud800"),
        (b'{"prompt": [' + b'"a",' * 3000 + b'"b"]}', "at most 2,048", "prompt"),
        (b'{"prompt": [' + b'"a",' * 300 + b'"b"]}', "at most 256", "prompt"),
        (b'{"prompt": "x", "n": 9, "logit_bias": {%s}}' % EVERY_TOKEN, "every token", "logit_bias"),
    ],
)
def test_json_that_means_two_things_or_nothing_is_a_400(http, body, told, param):
    reply = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and told in reply.json()["error"]["message"], reply.text
    assert reply.json()["error"]["param"] == param
    emoji = b'{"prompt": "\\ud83d\\ude42", "max_tokens": 1}'
    assert http.post("/v1/completions", content=emoji, headers={"content-type": "application/json"}).status_code == 200


OBJECT = '{"items":'


def nested(levels: int, begin: str, end: str) -> str:
    return begin * levels + "1" + end * levels


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", nested(10_000, "[", "]")),
        ("messages", nested(900, OBJECT, "}")),
        ("tools", f'[{{"type": "function", "function": {{"name": "f", "parameters": {nested(120, OBJECT, "}")}}}}}]'),
        ("response_format", f'{{"type": "json_schema", "json_schema": {{"schema": {nested(400, OBJECT, "}")}}}}}'),
        ("messages", json.dumps([
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": nested(700, OBJECT, "}")}}
            ]},
            {"role": "tool", "content": "x"},
        ])),
    ],
    ids=["lists", "objects", "tools", "schema", "arguments in a text"],
)  # fmt: skip
def test_what_is_nested_deeply_is_a_400(http, field, value):
    messages = '"messages": [{"role": "user", "content": "x"}], ' * (field != "messages")
    body = f'{{{messages}"max_tokens": 1, "{field}": {value}}}'
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400 and re.search("deep|recursion|tokens", reply.json()["error"]["message"]), reply.text


@pytest.mark.parametrize(
    "schema, told",
    [
        ({"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in string.ascii_lowercase]}, "patterns"),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}, "too complex"),
        ({"$ref": "#"}, "no text"),
    ],
    ids=["patterns", "many fields", "itself"],
)
def test_a_schema_that_cannot_be_held_is_a_400_that_names_it(client, schema, told):
    """The first would take an hour, the second is found out in the middle of its reply."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "models/tiny", "messages": [{"role": "user", "content": "x"}], "response_format": form}
    with pytest.raises(openai.BadRequestError, match=told) as found:
        client.chat.completions.create(**asked, max_tokens=40, extra_body={"enable_thinking": False}, timeout=60)
    assert found.value.param == "response_format"
    eight = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "^[a-c]$"} for i in range(8)}}
    form["json_schema"]["schema"] = eight | {"required": ["p7"]}
    reply = client.chat.completions.create(**asked, max_tokens=200, extra_body={"enable_thinking": False}, seed=1)
    assert json.loads(reply.choices[0].message.content)["p7"] in "abc"
