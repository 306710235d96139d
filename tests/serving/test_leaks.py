"""A server that runs for months: after a request nothing of it is left, neither Python's objects nor C's memory."""

import ctypes
import gc
import http.client
import json
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
from conftest import wait_until_idle

from serving.app import Gate

LEAK = 100  # bytes of each request that are found
LIMIT = (0.5, 0.6 * LEAK)  # blocks of Python's allocator and bytes of malloc that a request may seem to leave behind
ROUND, ROUNDS, MOST = 48, 5, 40  # requests; rounds that a line is fitted to; rounds until the caches have to be full
C = ctypes.CDLL(None)


class MallInfo(ctypes.Structure):
    """glibc's mallinfo2(3)."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def live() -> tuple[int, int]:
    """What this process uses: blocks of Python's allocator, and bytes of malloc without its holes; 0 where the C
    library can't tell."""
    gc.collect()
    if not hasattr(C, "mallinfo2"):
        return sys.getallocatedblocks(), 0
    C.mallinfo2.restype = MallInfo
    found = C.mallinfo2()
    return sys.getallocatedblocks(), found.uordblks + found.hblkhd


def request(number: int) -> tuple[str, dict | str | None]:
    """No two are equal: what is kept by its contents would be kept of each."""
    words = f"Number {number}: what is {number % 13} + {number % 17}?"
    body = {"messages": [{"role": "user", "content": words}], "max_tokens": 3, "seed": number, "temperature": 1}
    path, kind, plain = "/v1/chat/completions", number % 12, {"enable_thinking": False, "max_tokens": 6}
    if kind == 1:
        body |= {"stream": True, "logprobs": True, "top_logprobs": 3}
    elif kind == 2:
        schema = {"type": "object", "properties": {f"n{number}": {"type": "integer"}}, "additionalProperties": False}
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, **plain}
    elif kind == 3:
        tool = {"type": "function", "function": {"name": f"f{number}", "parameters": {"type": "object"}}}
        body |= {"tools": [tool], "tool_choice": "required", "stream": True, **plain}
        body |= {"stream_options": {"include_usage": True}}
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
    elif kind == 10:
        body = f'{{"messages": [{number}'
    elif kind == 11:
        body |= {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 8}
    return path, body


def ask(running, number: int) -> None:
    path, body = request(number)
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    data = body if isinstance(body, str | None) else json.dumps(body)
    try:
        connection.request("POST" if data else "GET", path, data, {"Content-Type": "application/json"})
        if number % 12 == 11:  # slow: the server's socket is full meanwhile
            time.sleep(0.03)
        reply = connection.getresponse()
        if number % 12 == 9:  # gone in mid-stream
            reply.read(10)
            connection.sock.shutdown(socket.SHUT_RDWR)
        else:
            reply.read()
    finally:
        connection.close()


class Growth:
    """What requests leave behind: a line fitted to the rounds."""

    def __init__(self, running):
        self.running, self.number, self.points = running, 0, []

    def round(self) -> None:
        for _ in range(ROUND):
            ask(self.running, self.number)
            self.number += 1
        wait_until_idle(self.running.service)
        self.points.append(live())

    def slopes(self) -> list[float]:
        """Of the last rounds, for each request. The median of all pairs' (Theil and Sen's): a table that is enlarged
        once is a step and no slope."""
        last = self.points[-ROUNDS - 1 :]
        return [
            statistics.median((b[at] - a[at]) / (j - i) / ROUND for (i, a), (j, b) in combinations(enumerate(last), 2))
            for at in range(2)
        ]


@pytest.mark.usefixtures("one_thread")
def test_a_request_leaves_nothing_behind(serving, monkeypatch):
    """Until the caches are full each round leaves less; a leak leaves the same in every one, for ever."""
    with serving(memory=1 << 20, max_batch=4) as running, ThreadPoolExecutor(1) as one:
        loop = running.service.worker.loop
        loop.call_soon_threadsafe(loop.set_default_executor, one)  # several threads fill a malloc cache each
        running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        growth = Growth(running)
        for count in range(MOST):
            growth.round()
            if count >= ROUNDS and all(slope < most for slope, most in zip(growth.slopes(), LIMIT, strict=True)):
                break
        else:
            blocks, size = growth.slopes()
            raise AssertionError(f"each request leaves {blocks:.2f} objects of Python and {size:.0f} bytes behind")

        leaked, check = [], Gate.check
        C.malloc.restype = ctypes.c_void_p

        def leaking(*of):
            leaked.append((bytes(LEAK), C.malloc(ctypes.c_size_t(LEAK))))
            check(*of)

        monkeypatch.setattr(Gate, "check", leaking)
        for _ in range(ROUNDS + 1):
            growth.round()
        blocks, size = growth.slopes()
        C.free.argtypes = (ctypes.c_void_p,)
        for _, address in leaked:
            C.free(address)
        assert blocks > LIMIT[0]
        assert size > LIMIT[1] or not hasattr(C, "mallinfo2")
