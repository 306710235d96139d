"""Whether the server lasts: `python bench.py serve --soak MINUTES`.

32 clients send requests of all kinds without a pause. Some go away in mid-stream by a reset, some read slowly, some
send half a request or nonsense. At the end every reply that was waited for has come whole, no row is taken, no thread
is left over, and the memory is what it was after the first tenth of the time.
"""

import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import console
from benchmarks.common import ROOT
from benchmarks.server import Server
from formats.source import BUNDLED_MODEL

CLIENTS = 32
QUESTIONS = ("What is 12 + 30?", "What is 47 * 8?", "Tell me a story.", "Who are you?", "Which is larger, 9.11 or 9.9?")
GROWTH = 1.2  # of the memory, and 64 MB: what an allocator may keep
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset, as a killed client's machine does


class Load:
    """What the clients did, counted."""

    def __init__(self, port: int, seconds: float):
        self.port, self.deadline = port, time.monotonic() + seconds
        self.done: Counter = Counter()
        self.lost: list[str] = []

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.deadline and len(self.lost) < 10:
            kind = rng.choices(("whole", "stream", "gone", "slow", "half", "odd"), (30, 30, 15, 5, 5, 5))[0]
            try:
                getattr(self, kind)(rng)
            except Exception as error:
                self.lost.append(f"{kind}: {type(error).__name__}: {error}"[:300])
            self.done[kind] += 1

    def request(self, rng: random.Random, stream: bool) -> dict:
        messages = [{"role": "user", "content": rng.choice(QUESTIONS) + " Please." * rng.randrange(20)}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "You are a careful helper. " * 10})
        body = {"messages": messages, "max_tokens": rng.randrange(4, 120), "stream": stream, "seed": rng.randrange(100)}
        body |= {"temperature": rng.choice((0, 1.0)), "n": rng.choice((1, 1, 1, 3))}
        if rng.random() < 0.1:
            body["response_format"] = {"type": "json_object"}
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 5}
        return body

    def post(self, body: dict) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def whole(self, rng: random.Random) -> None:
        body = self.request(rng, stream=False)
        connection = self.post(body)
        reply = connection.getresponse()
        found = json.loads(reply.read())
        connection.close()
        assert reply.status == 200, f"status {reply.status}"
        assert len(found["choices"]) == body["n"] and all(choice["finish_reason"] for choice in found["choices"])

    def stream(self, rng: random.Random, pause: float = 0.0) -> None:
        connection = self.post(self.request(rng, stream=True))
        raw = b""
        reply = connection.getresponse()
        for line in reply:
            raw += line
            if pause:
                time.sleep(pause)
        connection.close()
        assert reply.status == 200 and raw.endswith(b"data: [DONE]\n\n"), f"status {reply.status}, ends {raw[-80:]!r}"

    def slow(self, rng: random.Random) -> None:
        self.stream(rng, pause=0.02)

    def gone(self, rng: random.Random) -> None:
        connection = self.post(self.request(rng, stream=rng.random() < 0.7))
        if rng.random() < 0.7:
            time.sleep(rng.random() * 0.3)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()

    def half(self, rng: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"[: rng.randrange(1, 66)]
            )
            time.sleep(rng.random() * 0.5)

    def odd(self, rng: random.Random) -> None:
        connection = self.post({"messages": rng.choice((None, [], "x", [{"role": "user"}])), "n": rng.choice((0, "x"))})
        reply = connection.getresponse()
        error = json.loads(reply.read())["error"]
        connection.close()
        assert reply.status == 400 and error["message"], f"status {reply.status}"


def figures(server: Server) -> dict[str, float]:
    """Of the server's process and its own metrics."""
    status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    told = server.get("/metrics")[1].decode()
    values = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))
    return {
        "megabytes": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "files": len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())),
        **{name: float(values[f"nanoqwen_{name}"]) for name in ("queue", "batch", "generated_tokens_total")},
    }


def soak(options: Any) -> None:
    """Prints what the clients did and what is left of it; ValueError where anything is lost or kept."""
    model = str(options.model or BUNDLED_MODEL)
    command = [sys.executable, str(ROOT / "serve.py"), "--model", model, "--port", "{port}", "--memory", "32"]
    seconds = options.soak * 60
    with Server(command, "/health") as server:
        load = Load(server.port, seconds)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        time.sleep(seconds / 10)
        early, shown = figures(server), time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                now = figures(server)
                console.notice(
                    f"{(shown - start) / 60:.0f} min: {sum(load.done.values()):,} requests, {now['megabytes']:.0f} MB"
                )
        took = time.monotonic() - start
        deadline = time.monotonic() + 60
        while (late := figures(server))["batch"] + late["queue"] and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        late = figures(server)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in load.done.most_common())
    print(f"{sum(load.done.values()):,} requests of {CLIENTS} clients in {took / 60:.1f} minutes: {kinds}")
    print(f"{late['generated_tokens_total']:,.0f} tokens, {late['generated_tokens_total'] / took:,.0f} a second")
    for name in ("megabytes", "threads", "files"):
        print(f"{name}: {early[name]:.0f} after a tenth of the time, {late[name]:.0f} at the end")
    print(f"rows taken: {late['batch']:.0f}, waiting: {late['queue']:.0f}; lost: {len(load.lost)}")
    if load.lost:
        raise ValueError(f"requests were lost, the first: {load.lost[0]}")
    if late["batch"] or late["queue"] or late["threads"] > early["threads"] + 2:
        raise ValueError("rows or threads are left over")
    if late["megabytes"] > GROWTH * early["megabytes"] + 64:
        raise ValueError("the memory grew")
