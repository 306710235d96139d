"""Malformed requests for the server, for the soak (soak.py) and the tests.

Each body is a valid one with something wrong in it, or no JSON at all. Whatever it is, the answer is a status that the
client can act on, in OpenAI's form; and the server is as it was before.
"""

import copy
import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALID = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "max_tokens": 2,
        "stop": ["x"],
        "seed": 1,
        "tools": [TOOL],
        "tool_choice": "auto",
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"prompt": "hi", "max_tokens": 2, "echo": True, "logprobs": 1},
    "/v1/embeddings": {"input": ["a", "b"], "dimensions": 3},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**63, -(2**70), 10**400, "", "x", "\ud800", "\x00", "<|im_end|>"),
    *(
        "é" * 2000,
        [],
        {},
        [[]],
        [{}],
        {"": ""},
        [None],
        {"type": None},
        "9" * 50,
        [[1, "a"]],
        {"role": "user"},
        [1e999],
    ),
]
ANSWERS = {200, 400, 404, 408, 411, 413, 415}


def requests(count: int, seed: int = 0) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """(path, body, headers)"""
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(list(VALID))
        body = json.loads(json.dumps(VALID[path]))
        headers = {"content-type": "application/json"}
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            _spoil(body, rng)
        raw = json.dumps(body).encode()
        kind = rng.randrange(12)
        if kind == 0:
            raw = raw[: rng.randrange(len(raw))]
        elif kind == 1:
            raw = bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
        elif kind == 2:
            at = rng.randrange(len(raw))
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif kind == 3:
            deep = rng.choice((50, 5_000, 200_000))
            raw = b'{"messages": ' * rng.randrange(2) + rng.choice((b"[", b'{"a":')) * deep
        elif kind == 4:
            headers["content-type"] = rng.choice(
                ("text/plain", "", "application/xml", "application/json; charset=utf-16")
            )
        elif kind == 5:
            raw = rng.choice(
                (raw.decode().encode("utf-16"), b"\xef\xbb\xbf" + raw, b"null", b"[]", b'"x"', b"", b"NaN")
            )
        yield path, raw, headers


def _spoil(value: Any, rng: random.Random) -> None:
    """Puts something odd at some depth of a JSON value."""
    while True:
        places = list(value) if isinstance(value, dict) else range(len(value))
        if not places:
            return
        place = rng.choice(list(places))
        if isinstance(value[place], dict | list) and value[place] and rng.random() < 0.6:
            value = value[place]
            continue
        what = rng.randrange(4)
        if what == 0 and isinstance(value, dict):
            value[rng.choice(("", "Model", "messages ", "beams", "n", "stream_options", "$ref", "type"))] = (
                copy.deepcopy(rng.choice(ODD))
            )
        elif what == 1:
            del value[place]
        else:
            value[place] = copy.deepcopy(rng.choice(ODD))
        return


def ask_all(port: int, count: int, seed: int = 0, most_seconds: float = 1.0) -> Counter:
    """How often each status came. AssertionError at the first answer that should not be."""
    found: Counter = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        for path, body, headers in requests(count, seed):
            start = time.perf_counter()
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            text, seconds = reply.read(), time.perf_counter() - start
            shown = f"{path} {body[:300]!r} {headers}"
            assert reply.status in ANSWERS, f"{reply.status} {text[:300]!r} for {shown}"
            if reply.status != 200:
                error = json.loads(text)["error"]
                assert error["message"] and error["type"] and {"param", "code"} <= set(error), shown
                assert seconds < most_seconds, f"{seconds:.2f} s for {shown}"
            found[reply.status] += 1
    finally:
        connection.close()
    return found
