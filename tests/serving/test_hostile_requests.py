"""Clients that are wrong, slow, gone or strangers: each is answered or cut off, and nobody else notices."""

import asyncio
import copy
import json
import socket
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
import torch
from conftest import wait_until_idle

from benchmarks import hostile
from serving import app, endpoints, run

ENDLESS = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "logit_bias": {"734": -100, "732": -100},
    "temperature": 1.0,
    "seed": 1,
}


def test_malformed_bodies_are_answered(running, capfd):
    found = hostile.ask_all(running.port, 400)
    assert found[400] > 200 and found[200] > 5 and set(found) <= hostile.ANSWERS
    wait_until_idle(running.service)
    told = capfd.readouterr().err
    assert "defect" not in told and "<|im_end|>" not in told and "hi" not in told.split()


def test_a_model_that_is_not_finite_is_named_and_ends_nothing(tiny, serving, capfd):
    """Its logits under a prompt once ended the process: the likeliest of NaN were looked for behind the end."""
    model, chat = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    asked = {"/v1/completions": {"prompt": "one two", "max_tokens": 0, "echo": True, "logprobs": 5}}
    asked |= {"/v1/embeddings": {"input": "one"}, "/v1/chat/completions": {"messages": ENDLESS["messages"]}}
    with serving(model=(model, chat), pooling=True) as broken:
        for path, body in asked.items():
            answer = httpx.post(broken.url + path, json=body, timeout=60)
            assert answer.status_code == 500 and "up_proj.weight" in answer.json()["error"]["message"], path
    assert "defect" not in capfd.readouterr().err


def head(path: str, length: int, more: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def chat_request(**fields) -> bytes:
    body = json.dumps({**ENDLESS, **fields}).encode()
    return head("/v1/chat/completions", len(body)) + body


def connect(running) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    return found


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


@pytest.mark.parametrize("stream", (True, False))
def test_a_client_that_goes_frees_its_row_at_once(running, stream):
    with connect(running) as connection:
        connection.sendall(chat_request(stream=stream))
        wait_for(lambda: running.service.engine.running)
    wait_until_idle(running.service, 2)


def test_clients_that_wait_in_the_queue_may_go_too(serving):
    with serving(max_batch=1) as running:
        first = connect(running)
        first.sendall(chat_request(stream=True))
        wait_for(lambda: running.service.engine.running)
        others = [connect(running) for _ in range(5)]
        for other in others:
            other.sendall(chat_request())
        wait_for(lambda: running.service.accepted == 6)
        for other in others:
            other.close()
        wait_for(lambda: running.service.accepted == 1 and not running.service.engine.waiting)
        first.close()
        wait_until_idle(running.service)


def test_a_full_queue_is_a_429_with_retry_after(serving):
    with serving(max_batch=1, queue=2) as running:
        waiting = [connect(running) for _ in range(3)]
        for connection in waiting:
            connection.sendall(chat_request(stream=True))
        wait_for(lambda: running.service.accepted == 3)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as found:
                client.chat.completions.create(model="models/tiny", messages=ENDLESS["messages"])
            assert int(found.value.response.headers["retry-after"]) >= 1 and found.value.code == "queue_full"
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="models/tiny", messages=ENDLESS["messages"], n=50)
        for connection in waiting:
            connection.close()
        wait_until_idle(running.service)


def slow_reader(running) -> socket.socket:
    """A client that has asked for 8,000 tokens with their alternatives, and reads none."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(60)
    slow.connect(("127.0.0.1", running.port))
    slow.sendall(chat_request(stream=True, logprobs=True, top_logprobs=20, n=8))
    wait_for(lambda: running.service.accepted)
    return slow


def test_a_reader_that_takes_nothing_is_cut_off(serving, monkeypatch):
    """Its row is free before its reply would end, and what it has not read is bounded."""
    monkeypatch.setattr(app, "SEND_SECONDS", 0.5)
    with serving() as running, slow_reader(running) as slow:
        wait_until_idle(running.service, 120)
        assert b"[DONE]" not in read_all(slow)


def test_a_reader_that_falls_behind_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(endpoints, "BACKLOG", 50)
    with serving() as running, slow_reader(running) as slow:
        wait_until_idle(running.service, 120)
        told = read_all(slow)  # what was sent before, then why it ends
        assert b"too slowly" in told and b'"finish_reason":"length"' not in told


def test_requests_that_are_half_sent_end(serving, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.6)
    with serving() as running:
        with connect(running) as connection:  # a body that stops
            connection.sendall(head("/v1/completions", 1000) + b'{"prompt":')
            assert b" 408 " in read_all(connection).partition(b"\r\n")[0]
        with connect(running) as connection:  # a head that comes a byte at a time
            start = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for byte in b"POST /v1/completions HTTP/1.1\r\nX: " + b"y" * 200:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - start < 5
        with connect(running) as connection:  # nothing at all
            assert read_all_or_reset(connection) == b""
        with connect(running) as connection:  # no HTTP
            connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
            assert b" 400 " in read_all(connection)
        assert httpx.get(f"{running.url}/health").status_code == 200


def read_all_or_reset(connection: socket.socket) -> bytes:
    try:
        return read_all(connection)
    except ConnectionResetError:
        return b""


def test_a_body_above_the_limit_is_a_413(running):
    with connect(running) as connection:  # told before it is sent
        connection.sendall(head("/v1/completions", 1 << 40))
        assert b" 413 " in read_all(connection).partition(b"\r\n")[0]
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(running) as connection:  # and in chunks, which do not say how many come
        connection.sendall(chunked + b"Transfer-Encoding: chunked\r\n\r\n")

        def send():
            try:
                for _ in range(200):
                    connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            except OSError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        assert b" 413 " in connection.recv(4096)
        with suppress(OSError):  # the server may have closed it before
            connection.shutdown(socket.SHUT_RDWR)
        sender.join(20)


def test_other_ways_to_say_http(running, serving):
    """HTTP/1.0 without a Host, a body in chunks, HEAD; and what is answered to no HTTP at all."""
    body = b'{"prompt": "What is", "max_tokens": 1}'
    kind = b"Content-Type: application/json\r\n"
    old = b"POST /v1/completions HTTP/1.0\r\n" + kind + b"Content-Length: %d\r\n\r\n" % len(body) + body
    begin = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + kind
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = begin + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    gzip = begin + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    bad = begin + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    asked = {old: 200, chunked: 200, gzip: 415, bad: 400, b"\x16\x03\x01\r\n\r\n": 400}
    asked[b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"] = 200
    for raw, status in asked.items():
        with connect(running) as connection:
            connection.sendall(raw)
            told, _, rest = read_all(connection).partition(b"\r\n\r\n")
        assert told.startswith(b"HTTP/1.1 %d " % status), (raw, told)
        assert raw.startswith(b"HEAD") or json.loads(rest), (raw, rest)
    with serving(guard={"key": "k", "hosts": None}) as guarded, connect(guarded) as connection:
        connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: [\r\nConnection: close\r\nAuthorization: Bearer k\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("stream", (True, False))
def test_a_client_may_close_its_sending_half(running, stream):
    """As `nc -N` does: it gets its answer. One that closes both halves is test_a_client_that_goes_frees_its_row."""
    request = chat_request(stream=stream, max_tokens=60)
    with connect(running) as connection:
        connection.sendall(request)
        wait_for(lambda: running.service.engine.running)
        connection.shutdown(socket.SHUT_WR)
        told = read_all(connection)
    assert (b"data: [DONE]" if stream else b'"finish_reason":"length"') in told
    assert told.count(b"HTTP/1.1 200 OK") == 1 and told.endswith(b"0\r\n\r\n" if stream else b"}")


def test_more_connections_than_the_server_takes_are_a_503(serving, monkeypatch):
    monkeypatch.setattr(app, "MOST_CONNECTIONS", 2)
    with serving() as running, connect(running), connect(running):
        wait_for(lambda: len(running.server.server_state.connections) == 2)
        reply = httpx.get(f"{running.url}/health")
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "too_many_connections"
    monkeypatch.undo()
    with serving() as running:
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_wrong_key_is_a_401(serving):
    with serving(guard={"key": "secret", "hosts": None}) as running:
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/nothing"):
            for headers in (
                {},
                {"authorization": "Bearer no"},
                {"authorization": "secret"},
                {"authorization": "Basic secret"},
            ):
                reply = httpx.get(f"{running.url}{path}", headers=headers)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{running.url}/health").status_code == httpx.get(running.url).status_code == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0) as client:
            assert client.models.list().data
        wrong = openai.OpenAI(base_url=f"{running.url}/v1", api_key="Secret", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_pages_of_other_origins_are_not_answered(http):
    """A page that makes its own name point here (DNS rebinding), and one that posts across origins."""
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200
    for origin in ("https://evil.example", "null"):
        assert http.get("/v1/models", headers={"origin": origin}).status_code == 403
    assert http.get("/v1/models", headers={"origin": str(http.base_url).rstrip("/")}).status_code == 200
    reply = http.options("/v1/chat/completions", headers={"access-control-request-method": "POST"})
    assert reply.status_code == 405 and not any(name.startswith("access-control") for name in reply.headers)


def test_paths_and_methods_that_are_none(http):
    for reply, status in ((http.get("/v2"), 404), (http.get("/v1/completions"), 405), (http.put("/v1/models"), 405)):
        assert reply.status_code == status and reply.json()["error"]["type"]


@pytest.mark.usefixtures("idle")
def test_a_stream_may_be_cut_at_any_byte(running):
    """Characters of several tokens come whole, and each event is JSON by itself."""
    begun = {"role": "assistant", "content": "é 日本語 🙂 ñ"}
    body = {
        "messages": [{"role": "user", "content": "é 日本 🙂"}, begun],
        "continue_final_message": True,
        "stream": True,
    }
    tokenizer = running.service.chat
    wanted = {str(token): 60 for token in set(tokenizer.encode("日本🙂é"))}
    body |= {"logit_bias": wanted, "temperature": 1.5, "seed": 3, "max_tokens": 80, "logprobs": True, "top_logprobs": 2}
    raw = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).content
    assert raw.isascii() and raw.endswith(b"data: [DONE]\n\n")  # so that each cut is valid UTF-8
    events = raw.decode().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    tokens = [
        bytes(e["bytes"]) for chunk in chunks for e in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert b"".join(tokens).decode("utf-8", "replace") == text and len(tokens) == 80
    assert any(not token.isascii() for token in tokens)
    for cut in range(0, len(raw), 401):
        pieces = [
            json.loads(e.removeprefix("data: "))
            for e in raw[:cut].decode("utf-8").split("\n\n")[:-1]
            if "[DONE]" not in e
        ]
        assert pieces == chunks[: len(pieces)]


def test_a_defect_is_a_500_and_the_next_request_is_served(serving, monkeypatch, capfd):
    with serving() as running:
        engine, step = running.service.engine, running.service.engine.step
        monkeypatch.setattr(engine, "step", lambda: 1 / 0 if engine.waiting or engine.running else step())
        ask = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "stream": False}
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=ask, timeout=60)
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
        streamed = httpx.post(f"{running.url}/v1/chat/completions", json={**ask, "stream": True}, timeout=60)
        assert '"error":{"message"' in streamed.text and streamed.status_code == 200
        monkeypatch.setattr(engine, "step", step)
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=ask, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == "12 + 30 = 42."
        wait_until_idle(running.service)


def test_a_prompt_that_is_far_too_long_is_refused_at_once(http):
    for path, body in (
        ("/v1/completions", {"prompt": "word " * 1_500_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 1_500_000}]}),
    ):
        start = time.monotonic()
        reply = http.post(path, json=body)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
        assert time.monotonic() - start < 2  # the body itself takes a part of a second
    name = "x" * 1_000_000
    assert len(http.post("/v1/completions", json={"prompt": "x", name: 1}).text) < 1000


def test_a_server_that_ends_waits_for_replies_and_no_longer(serving):
    start = None
    with serving() as running, connect(running) as connection:
        connection.sendall(chat_request(stream=True, n=8, logprobs=True, top_logprobs=20))
        wait_for(lambda: running.service.engine.running)
        start = time.monotonic()
    assert time.monotonic() - start < 10  # conftest.py's servers give running replies two seconds


def test_nothing_is_left_over(serving):
    """No thread and no row, whatever the clients did."""
    before = set(threading.enumerate())
    with serving(max_batch=2) as running:
        for number in range(6):
            with connect(running) as connection:
                connection.sendall(chat_request(stream=number % 2 == 0, n=2))
                time.sleep(0.05)
        wait_until_idle(running.service)
    assert set(threading.enumerate()) <= before


def test_a_client_that_leaves_answers_unread_is_cut_off_before_its_stream(monkeypatch):
    class Full:
        aborted = False

        def get_write_buffer_size(self) -> int:
            return 1

        def abort(self) -> None:
            self.aborted = True

    async def send(message) -> None:
        assert message["type"] == "http.response.start"

    monkeypatch.setattr(app, "SEND_SECONDS", 0.05)
    transport = Full()
    waiting = app.send_events(lambda outlet: pytest.fail("began"), {"state": {"transport": transport}}, send)
    with pytest.raises(app.Gone):
        asyncio.run(asyncio.wait_for(waiting, 10))
    assert transport.aborted
