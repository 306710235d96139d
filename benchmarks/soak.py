"""Whether the server lasts: `python bench.py serve --soak MINUTES`, exit status 0 if it does, else 1.

32 clients send requests of all kinds without a pause. Some go away in mid-stream, by a reset or as a process that is
killed; some read slowly, some send half a request, some only nonsense. What has to hold:

    no reply lost   each that was waited for has come whole, and each is the one that the same request got before
    memory flat     in the last two thirds of the time a fitted line rises by no more than FLAT; by then the caches have
                    taken what --memory lets them
    nothing left    at the end no row is taken, there are no more threads than in the first third and no more open files
                    than before, and every page of keys and values belongs to a kept cache

Time in which this process stood still (a suspended machine, SIGSTOP) counts as none: the clients' requests of such a
moment are asked again.
"""

import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import console
from benchmarks.common import ROOT
from benchmarks.hostile import ask_all
from benchmarks.server import Server
from formats.source import BUNDLED_MODEL

CLIENTS = 32
REQUESTS = 400  # different ones; each is sent again and again
KINDS = {"whole": 30, "stream": 30, "gone": 10, "killed": 3, "slow": 5, "half": 5, "malformed": 6}
MALFORMED = 50  # bodies of one visit
QUESTIONS = ("What is 12 + 30?", "What is 47 * 8?", "Tell me a story.", "Who are you?", "Which is larger, 9.11 or 9.9?")
EVERY = 5.0  # seconds between two looks at the server
FLAT = 0.05  # of the memory, and 8 MB
PATIENCE = 600.0  # seconds; a machine that stood still may make every answer late
STILL = 3.0  # seconds without a tick in which this process did not run
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset, as a killed client's machine does
KILLED = """\
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    connection.sendall(sys.stdin.buffer.read())
    print(connection.recv(1), flush=True)
    connection.recv(1 << 20, socket.MSG_WAITALL)
"""


class Clock:
    """Seconds in which this process ran. `stops` counts the stretches in which it did not."""

    def __init__(self):
        self.seconds, self.stops = 0.0, 0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            if now - last > STILL:
                self.stops += 1
            else:
                self.seconds += now - last
            last = now


class Load:
    """What the clients did, counted."""

    def __init__(self, port: int, seconds: float):
        self.port, self.clock, self.end = port, Clock(), seconds
        self.done: Counter = Counter()
        self.lost: list[str] = []
        self.texts: dict[int, Any] = {}  # the reply to each request

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while self.clock.seconds < self.end and len(self.lost) < 10:
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            stops = self.clock.stops
            try:
                getattr(self, kind)(rng)
            except Exception as error:
                time.sleep(0.5)  # the clock's next tick
                if self.clock.stops > stops:
                    kind = "interrupted"
                else:
                    self.lost.append(f"{kind}: {type(error).__name__}: {error}"[:300])
            self.done[kind] += 1

    def request(self, number: int) -> dict:
        rng = random.Random(f"request {number}")
        messages = [{"role": "user", "content": rng.choice(QUESTIONS) + " Please." * rng.randrange(20)}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "You are a careful helper. " * 10})
        body = {"messages": messages, "max_tokens": rng.randrange(4, 120), "seed": rng.randrange(100)}
        body |= {"temperature": rng.choice((0, 1.0)), "n": rng.choice((1, 1, 1, 3))}
        if rng.random() < 0.1:
            body["response_format"] = {"type": "json_object"}
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 5}
        return body

    def post(self, body: dict) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def check(self, number: int, texts: list) -> None:
        assert self.texts.setdefault(number, texts) == texts, f"request {number} got another reply than before"

    def whole(self, rng: random.Random) -> None:
        number = rng.randrange(REQUESTS)
        connection = self.post(self.request(number))
        reply = connection.getresponse()
        found = json.loads(reply.read())
        connection.close()
        assert reply.status == 200, f"status {reply.status}"
        messages = [choice["message"] for choice in found["choices"]]
        ends = [choice["finish_reason"] for choice in found["choices"]]
        self.check(number, [[m.get("reasoning", ""), m["content"], end] for m, end in zip(messages, ends, strict=True)])

    def stream(self, rng: random.Random, pause: float = 0.0) -> None:
        number = rng.randrange(REQUESTS)
        body = self.request(number)
        connection = self.post(body | {"stream": True})
        raw, texts = b"", [["", "", None] for _ in range(body["n"])]
        reply = connection.getresponse()
        for line in reply:
            raw = line if line.strip() else raw
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text, delta = texts[choice["index"]], choice["delta"]
                    text[0] += delta.get("reasoning", "")
                    text[1] += delta.get("content", "")
                    text[2] = choice["finish_reason"]
            if pause:
                time.sleep(pause)
        connection.close()
        assert reply.status == 200 and raw == b"data: [DONE]\n", f"status {reply.status}, ends {raw[-80:]!r}"
        self.check(number, texts)

    def slow(self, rng: random.Random) -> None:
        self.stream(rng, pause=0.02)

    def gone(self, rng: random.Random) -> None:
        connection = self.post(self.request(rng.randrange(REQUESTS)) | {"stream": rng.random() < 0.7})
        if rng.random() < 0.7:
            time.sleep(rng.random() * 0.3)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()

    def killed(self, rng: random.Random) -> None:
        """A client of its own process, killed in mid-stream."""
        body = json.dumps(self.request(rng.randrange(REQUESTS)) | {"stream": True, "max_tokens": 400}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        command = [sys.executable, "-S", "-c", KILLED, str(self.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                process.stdin.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                process.stdin.close()
                assert process.stdout.readline(), "no answer"
                time.sleep(rng.random() * 0.2)
            finally:
                process.kill()

    def half(self, rng: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"[: rng.randrange(1, 66)]
            )
            time.sleep(rng.random() * 0.5)

    def malformed(self, rng: random.Random) -> None:
        for status, count in ask_all(self.port, MALFORMED, rng.getrandbits(40), most_seconds=PATIENCE).items():
            self.done[f"malformed, {status}"] += count


class Sample(NamedTuple):
    """What the server's process and its own metrics say at one moment."""

    seconds: float
    megabytes: float
    threads: int
    files: int
    rows: float  # replies that wait or run
    tokens: float
    kept: float  # MB of caches
    running: float


def look(server: Server, seconds: float) -> Sample:
    status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    told = server.get("/metrics", PATIENCE)[1].decode()
    metrics = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(metrics[f"nanoqwen_{name}"])

    files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    kept, running = (value(f'cache_bytes{{of="{of}"}}') / 2**20 for of in ("kept", "running"))
    megabytes, threads = int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])
    rows = value("queue") + value("batch")
    return Sample(seconds, megabytes, threads, files, rows, value("generated_tokens_total"), kept, running)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def defects(samples: list[Sample], before: Sample, end: Sample, lost: list[str]) -> list[str]:
    """What is wrong after a soak, in words. `before`: the idle server, warm; `end`: idle again."""
    found = [f"{len(lost)} requests were lost, the first: {lost[0]}"] if lost else []
    third = len(samples) // 3
    first, rest = samples[:third], samples[third:]
    if third:
        rise = slope(rest) * (rest[-1].seconds - rest[0].seconds)
        if rise > FLAT * median(sample.megabytes for sample in rest) + 8:
            found.append(f"memory grew by {rise:.0f} MB")
    if end.rows:
        found.append(f"{end.rows:.0f} rows are taken")
    if end.running:
        found.append(f"{end.running:.2f} MB of keys and values belong to no kept cache")
    if end.files > before.files:
        found.append(f"{end.files} files are open, {before.files} before")
    if end.threads > (most := max((sample.threads for sample in first), default=end.threads)):
        found.append(f"{end.threads} threads, in the first third at most {most}")
    return found


def slope(samples: list[Sample]) -> float:
    """MB a second, by least squares."""
    return linear_regression([s.seconds for s in samples], [s.megabytes for s in samples]).slope


def soak(options: Any) -> None:
    """Prints what the clients did and what is left of it; exit status 1 where anything is lost or kept."""
    model = str(options.model or BUNDLED_MODEL)
    command = [sys.executable, str(ROOT / "serve.py"), "--model", model, "--port", "{port}", "--memory", "32"]
    seconds, samples, shown = options.soak * 60, [], 0.0
    with Server(command, "/health") as server:
        warm = Load(server.port, 0)
        for kind in ("whole", "stream", "malformed"):  # threads that start with the first work
            getattr(warm, kind)(random.Random(0))
        before, start = look(server, 0), time.monotonic()
        load = Load(server.port, seconds)
        threads = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(EVERY, seconds / 50))
            samples.append(now := look(server, load.clock.seconds))
            if now.seconds - shown > 60:
                shown, done = now.seconds, load.done
                console.notice(
                    f"{shown / 60:.0f} min: {sum(done[kind] for kind in KINDS):,} requests, {now.megabytes:.1f} MB, "
                    f"caches {now.kept + now.running:.1f} MB, {now.threads} threads, {now.files} files"
                )
        took = time.monotonic() - start
        wait(lambda: not look(server, 0).rows, 60)
        wait(lambda: look(server, 0).files <= before.files, 40)  # half-sent requests are cut off after 30 s
        end = look(server, load.clock.seconds)
    report(load, samples, before, end, took)


def report(load: Load, samples: list[Sample], before: Sample, end: Sample, took: float) -> None:
    done, third = load.done, len(samples) // 3
    kinds = {kind: done[kind] for kind in KINDS}
    bodies = {name.removeprefix("malformed, "): count for name, count in done.items() if "," in name}
    print(f"{CLIENTS} clients in {end.seconds / 60:.1f} minutes: {sum(kinds.values()):,} requests, {listed(kinds)}")
    print(f"malformed bodies: {sum(bodies.values()):,}, answered with {listed(bodies)}")
    if load.clock.stops:
        stood = (took - end.seconds) / 60
        print(f"stood still: {load.clock.stops} times, {stood:.1f} minutes; asked again: {done['interrupted']}")
    print(f"different requests: {len(load.texts)}, the reply to each always the same; lost: {len(load.lost)}")
    print(f"tokens: {end.tokens:,.0f}, {end.tokens / end.seconds:,.0f} a second")
    for name, part in (("in the first third", samples[:third]), ("after it", samples[third:])):
        values = [sample.megabytes for sample in part]
        if len(part) > 1:
            rise = f"{60 * slope(part):+.2f} MB a minute"
            print(f"memory {name}: {values[0]:.1f} to {values[-1]:.1f} MB, median {median(values):.1f}, {rise}")
    for name, what in (
        ("megabytes", "memory, MB"),
        ("threads", "threads"),
        ("files", "files"),
        ("kept", "kept caches, MB"),
        ("running", "running caches, MB"),
    ):
        most = max(getattr(sample, name) for sample in samples)
        print(f"{what}: {getattr(before, name):.4g} before, {most:.4g} at most, {getattr(end, name):.4g} at the end")
    found = defects(samples, before, end, load.lost)
    print("; ".join(found) or "No reply lost, memory flat, nothing left over.")
    if found:
        raise SystemExit(1)


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
