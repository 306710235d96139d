"""The server beside llama.cpp's on this machine: `python bench.py serve`.

Both serve the same weights, in turns: A B A B. In each turn 1, 8 and 16 clients at once each send one request, with a
prompt of its own, and read the reply as a stream. From the arrival of the tokens come

    tokens/s        tokens of all replies in the time from the first request to the last token
    first token     seconds from a request to its first token: the median, and the largest
    between         milliseconds from one token to the next of the same reply: 99 % are at most this

One client is also compared with generate.py's loop in a process beside the server: both get the same prompts, one after
the other, and of each pair of replies the quotient counts. `--soak MINUTES` is another question, whether the server
lasts: benchmarks/soak.py.
"""

import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import console
from benchmarks.common import ROOT, cache_directory, describe_machine, finish, header, llama_program, start_worker
from benchmarks.server import Server
from benchmarks.speed import Row, convert, find_model, model_facts
from formats.source import DEFAULT_MODEL

ROUNDS = 3  # replies of a single client in a turn, of which the median counts
PAIRS = {"int8": "q8_0", "bf16": "bf16"}  # our precision beside llama.cpp's


class Reply(NamedTuple):
    """One reply as its client saw it, in seconds of one clock."""

    sent: float
    arrivals: list[float]
    tokens: int


def ask(port: int, body: dict) -> Reply:
    """Sends a request for a stream of text and notes when its tokens come.

    What came is looked at afterwards: client and server share the processors, and a client's time is not the server's.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    sent, pieces = time.perf_counter(), []
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise ValueError(f"status {reply.status}: {reply.read(300).decode(errors='replace')}")
        while piece := reply.read1(1 << 16):
            pieces.append((time.perf_counter(), piece))
    finally:
        connection.close()
    arrivals, tokens, rest = [], 0, b""
    for now, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"] and chunk["choices"][0].get("text"):
                arrivals.append(now)
    return Reply(sent, arrivals, tokens)


def request(seed: str, prompt: int, tokens: int) -> dict:
    rng = random.Random(seed)
    body = {"prompt": [rng.randrange(10, 700) for _ in range(prompt)], "max_tokens": tokens, "temperature": 0}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def at_once(port: int, clients: int, prompt: int, tokens: int, seed: object) -> list[Reply]:
    """One reply for each of so many clients, all asked at the same moment."""
    replies: list[Reply | Exception] = []
    barrier = threading.Barrier(clients)

    def client(number: int) -> None:
        body = request(f"{seed} {number}", prompt, tokens)
        barrier.wait()
        try:
            replies.append(ask(port, body))
        except Exception as error:
            replies.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reply in replies:
        if isinstance(reply, Exception):
            raise ValueError(f"a request failed: {reply}")
    return replies


def figures(replies: list[Reply]) -> dict[str, float]:
    """What a set of replies that were asked at once says of a server."""
    if not all(reply.arrivals for reply in replies):
        raise ValueError("a reply had no text, so its tokens could not be timed")
    first = [reply.arrivals[0] - reply.sent for reply in replies]
    gaps = sorted(b - a for reply in replies for a, b in zip(reply.arrivals, reply.arrivals[1:], strict=False))
    seconds = max(reply.arrivals[-1] for reply in replies) - min(reply.sent for reply in replies)
    longest = max(replies, key=lambda reply: reply.tokens)
    return {
        "tokens_per_second": sum(reply.tokens for reply in replies) / seconds,
        "decode": (longest.tokens - 1) / (longest.arrivals[-1] - longest.arrivals[0]),
        "first_token": median(first),
        "first_token_most": max(first),
        "between_p99": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))] if gaps else 0.0,
    }


def model_flags(model: str, precision: str) -> list[str]:
    """Of serve.py, and of generate.py."""
    return ["--model", model, *(["--quantize", "int8"] if precision == "int8" else ["--dtype", "bfloat16"])]


def ours(model: Path, precision: str, most: int) -> list[str]:
    flags = ["--port", "{port}", "--max-batch", str(most)]
    return [sys.executable, str(ROOT / "serve.py"), *model_flags(str(model), precision), *flags]


def theirs(program: str, gguf: Path, threads: int, most: int, positions: int) -> list[str]:
    flags = ["--parallel", str(most), "--ctx-size", str(most * positions), "--threads", str(threads)]
    return [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}", *flags, "--no-webui"]


# In a worker process that has torch and stays: generate.py's loop.


LOADED: dict[str, Any] = {}


def load(path: str, precision: str) -> None:
    from inference.flags import add_model_flags
    from inference.load import load_model
    from ops.cpu.step import settle

    parser = console.ArgumentParser(prog="serve.py")
    add_model_flags(parser)
    LOADED["model"], _ = load_model(Path(path), parser.parse_args(model_flags(path, precision)))
    settle(LOADED["model"])  # as the server's model is


def reply(ids: list[int], tokens: int) -> Reply:
    from generate import SamplingParams, generate

    sent, arrivals = time.perf_counter(), []
    for _ in generate(LOADED["model"], ids, SamplingParams(temperature=0, max_new_tokens=tokens)):
        arrivals.append(time.perf_counter())
    return Reply(sent, arrivals, len(arrivals))


# In the process that measures.


def ask_worker(worker: ProcessPoolExecutor, body: dict) -> Reply:
    return worker.submit(reply, body["prompt"], body["max_tokens"]).result()


def beside_generate(port: int, worker: ProcessPoolExecutor, options: Any, turn: int) -> list[dict[str, float]]:
    """Pairs of single replies to the same prompts: the server's tokens a second behind the first as a quotient of
    those of generate.py's loop, and how many seconds later its first token comes."""
    found = []
    for number in range(options.pairs + 1):
        body = request(f"pair {turn} {number}", options.prompt, options.tokens)
        programs = {"server": partial(ask, port, body), "loop": partial(ask_worker, worker, body)}
        order = sorted(programs, reverse=number % 2 == 1)
        each = {name: figures([programs[name]()]) for name in order}
        quotient = each["server"]["decode"] / each["loop"]["decode"]
        later = each["server"]["first_token"] - each["loop"]["first_token"]
        found.append({"decode": quotient, "first_token": later})
    return found[1:]  # nobody's first reply


def with_words(model: Path, directory: Path) -> Path:
    """The model with a token for each id. Random weights come with a small tokenizer, and say mostly ids without any
    text, whose arrival nobody could see; the word of such an id is its number."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    vocabulary = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    if len(known) > size // 2:
        return model
    vocabulary |= {f"w{token}": token for token in range(size) if token not in known}
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


def parse_arguments(arguments: list[str]) -> Any:
    parser = console.ArgumentParser(prog="bench.py serve", description="Measure the server beside llama-server.")
    add = parser.add_argument
    add("--model", metavar="SRC", help=f"a directory or hub id (default: {DEFAULT_MODEL} or its shape)")
    add("--precision", nargs="+", choices=list(PAIRS), default=list(PAIRS), help="default: int8 bf16")
    add("--clients", nargs="+", type=int, default=[1, 8, 16], metavar="N", help="at once (default: 1 8 16)")
    add("--prompt", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    add("--tokens", type=int, default=48, metavar="N", help="tokens of a reply (default: 48)")
    add("--repeats", type=int, default=2, metavar="N", help="turns of each server (default: 2)")
    add("--pairs", type=int, default=10, metavar="N", help="single replies beside generate.py's, a turn (default: 10)")
    add("--soak", type=float, metavar="MINUTES", help="instead: 32 clients for so long, and what is left of it")
    add("--out", type=Path, default=Path("runs/bench-serve"), metavar="DIR", help="where the report goes")
    options = parser.parse_args(arguments)
    for name in ("prompt", "tokens", "repeats", "pairs"):
        if not 1 <= getattr(options, name) <= 4096:
            raise ValueError(f"--{name} {getattr(options, name)}: give a number from 1 to 4096")
    if not all(1 <= clients <= 256 for clients in options.clients):
        raise ValueError("--clients: give numbers from 1 to 256")
    if options.soak is not None and not 0 < options.soak <= 1440:
        raise ValueError(f"--soak {options.soak}: give minutes from 0 to 1440")
    return options


def measure(options: Any, model: Path, threads: int, worker: ProcessPoolExecutor) -> list[dict]:
    """A row for each turn of each server: program, precision, and the figures under the number of clients."""
    program, most, rows = llama_program("llama-server"), max(options.clients), []
    if program is None:
        console.notice("llama-server is not here (NANOQWEN_LLAMA_CPP names its folder): only our own is measured")
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="converted-") as directory:
        model = with_words(model, Path(directory) / "model")
        for precision in options.precision:
            worker.submit(load, str(model), precision).result()
            servers = [("nanoqwen", precision, ours(model, precision, most), "/health")]
            if program is not None:
                gguf = convert(model, Row("llama.cpp", PAIRS[precision]), Path(directory))
                command = theirs(program, gguf, threads, most, options.prompt + options.tokens + 16)
                servers.append(("llama-server", PAIRS[precision], command, "/health"))
            for turn in range(options.repeats):
                for name, kind, command, ready in servers:
                    row = {"program": name, "precision": kind, "turn": turn, "clients": {}}
                    with Server(command, ready) as server:
                        at_once(server.port, 1, options.prompt, 8, seed=-1 - turn)  # nobody's first request
                        for clients in options.clients:
                            each = [
                                figures(
                                    at_once(server.port, clients, options.prompt, options.tokens, f"{turn} {again}")
                                )
                                for again in range(ROUNDS if clients == 1 else 1)
                            ]
                            row["clients"][str(clients)] = {name: median(one[name] for one in each) for name in each[0]}
                        if name == "nanoqwen" and 1 in options.clients:
                            row["beside_generate"] = beside_generate(server.port, worker, options, turn)
                    rows.append(row)
                    said = ", ".join(f"{n}: {f['tokens_per_second']:.1f}" for n, f in row["clients"].items())
                    console.notice(f"{name}/{kind}, turn {turn + 1}: tokens/s with clients {said}")
    return rows


def tables(rows: list[dict], clients: list[int]) -> dict[str, list[list[str]]]:
    """Medians over the turns, and the quotient of the two servers in each pair of turns."""
    servers = list(dict.fromkeys((row["program"], row["precision"]) for row in rows))
    found = {}
    for number in map(str, clients):
        body = []
        for program, precision in servers:
            runs = [
                row["clients"][number] for row in rows if (row["program"], row["precision"]) == (program, precision)
            ]
            middle = {name: median(run[name] for run in runs) for name in runs[0]}
            body.append(
                [
                    f"{program} {precision}",
                    f"{middle['tokens_per_second']:.1f}",
                    f"{middle['decode']:.1f}",
                    f"{middle['first_token']:.2f}",
                    f"{middle['first_token_most']:.2f}",
                    f"{1000 * middle['between_p99']:.0f}",
                ]
            )
        head = ["server", "tokens/s", "of one reply", "first token, s", "the last one's, s", "between, p99, ms"]
        found[f"{number} client{'s' * (number != '1')}"] = [head, *body]
    quotients = [["precision", *(f"{number} clients" for number in clients)]]
    alone = [["precision", "pairs", "tokens/s behind the first", "quarter to three quarters", "first token, ms later"]]
    for precision, other in PAIRS.items():
        mine = [row for row in rows if row["program"] == "nanoqwen" and row["precision"] == precision]
        peer = [row for row in rows if row["program"] == "llama-server" and row["precision"] == other]
        if mine:
            line = [f"{precision} / {other}"]
            for number in map(str, clients):
                pairs = zip(mine, peer, strict=False)
                each = [
                    a["clients"][number]["tokens_per_second"] / b["clients"][number]["tokens_per_second"]
                    for a, b in pairs
                ]
                line.append(f"{median(each):.2f}" if each else "not measured")
            quotients.append(line)
        pairs = [pair for row in mine for pair in row.get("beside_generate", ())]
        if len(pairs) > 1:
            decode = [pair["decode"] for pair in pairs]
            low, middle, high = quantiles(decode, n=4, method="inclusive")
            later = 1000 * median(pair["first_token"] for pair in pairs)
            alone.append([precision, str(len(pairs)), f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{later:.1f}"])
    found["Tokens/s of ours to llama-server's"] = quotients
    found["One client beside generate.py's loop: quotients of single replies to the same prompts"] = alone
    return found


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if options.soak is not None:
        from benchmarks.soak import soak

        soak(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with start_worker() as worker:
        model, name = find_model(options.model, worker)
        facts = worker.submit(model_facts, str(model)).result()
        threads = int(os.environ.get("OMP_NUM_THREADS") or facts["threads"])
        machine = worker.submit(describe_machine, threads).result()
        rows = measure(options, model, threads, worker)
    program = llama_program("llama-server")
    report = header(machine, "serve", arguments) | {"model": {"name": name, **facts}, "rows": rows}
    if program:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        build = re.search(r"version: (.+)", said.stdout + said.stderr)
        report["versions"]["llama.cpp"] = build[1] if build else "unknown"
    settings = f"{name}; prompts of {options.prompt} tokens, replies of {options.tokens}; {threads} threads; "
    notes = [f"{settings}medians of {options.repeats} turns, alternated."]
    finish(report, options.out / "report", "The server", tables(rows, options.clients), notes)
