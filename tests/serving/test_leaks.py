"""A server that runs for months: after a request nothing of it is left, neither Python's objects nor C's memory."""

import ctypes
import gc
import http.client
import json
import platform
import socket
import sys

import pytest
from conftest import wait_until_idle

from serving.app import Gate

ROUND = 100  # requests
LEAK, BLOCKS = 1000, 20  # bytes of malloc, or small objects, of each request that would be found


class MallInfo(ctypes.Structure):
    """glibc's mallinfo2(3)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def live_bytes() -> tuple[int, int]:
    """What this process uses: bytes of malloc, without its holes, and blocks of Python's own allocator."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd, sys.getallocatedblocks()


def request(number: int) -> tuple[str, dict | None]:
    """No two are equal: what is kept by its contents would be kept of each."""
    words = f"Number {number}: what is {number % 13} + {number % 17}?"
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 3, "seed": number, "temperature": 1}
    path, kind = "/v1/chat/completions", number % 10
    if kind == 1:
        body |= {"stream": True, "logprobs": True, "top_logprobs": 3}
    elif kind == 2:
        schema = {"type": "object", "properties": {f"n{number}": {"type": "integer"}}, "additionalProperties": False}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    elif kind == 3:
        tool = {"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object"}}}
        body |= {"tools": [tool], "tool_choice": "required", "stream": True, "stream_options": {"include_usage": True}}
    elif kind == 4:
        path, body = "/v1/completions", {"prompt": words, "max_tokens": 2, "echo": True, "logprobs": 1}
    elif kind == 5:
        body |= {"n": 2, "stop": [f"{number}"], "logit_bias": {str(number % 700): 3}, "presence_penalty": 0.5}
    elif kind == 6:
        body[f"unknown{number}"] = 1
    elif kind == 7:
        path, body = f"/nothing/{number}", None
    elif kind == 8:
        path, body = "/tokenize", {"prompt": words}
    elif kind == 9:
        body |= {"stream": True, "max_tokens": 400}
    return path, body


def ask(running, number: int) -> None:
    path, body = request(number)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        connection.request(
            "POST" if body else "GET", path, body and json.dumps(body), {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        if body and body.get("max_tokens") == 400:  # a client that goes
            reply.read(10)
            connection.sock.shutdown(socket.SHUT_RDWR)
        else:
            reply.read()
    finally:
        connection.close()


def growth(running, numbers: range) -> tuple[float, float]:
    """Bytes of malloc and blocks of Python that each of these requests leaves behind."""
    before = live_bytes()
    for number in numbers:
        ask(running, number)
    wait_until_idle(running.service)
    after = live_bytes()
    return tuple((b - a) / len(numbers) for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
@pytest.mark.usefixtures("one_thread")
def test_a_request_leaves_nothing_behind(serving, monkeypatch):
    """A leak shows in each round, a table that is enlarged once only in one: the round with the least counts."""
    with serving(memory=1 << 20, max_batch=4) as running:
        least_bytes = least_blocks = float("inf")
        for number in range(6):
            grown = growth(running, range(ROUND * number, ROUND * (number + 1)))
            least_bytes, least_blocks = min(least_bytes, grown[0]), min(least_blocks, grown[1])
            if number and least_bytes < LEAK / 2 and least_blocks < BLOCKS / 2:
                break
        else:
            raise AssertionError(f"each request leaves {least_bytes:,.0f} bytes and {least_blocks:.1f} blocks behind")
        leaked, check = [], Gate.check

        def leaking(*of):
            leaked.append((bytearray(LEAK), *([None] for _ in range(BLOCKS // 2))))
            check(*of)

        monkeypatch.setattr(Gate, "check", leaking)
        grown = growth(running, range(9000, 9000 + ROUND))
        assert grown[0] - least_bytes > LEAK / 2 and grown[1] - least_blocks > BLOCKS / 2
