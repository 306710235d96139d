"""Serve a Qwen3 under the OpenAI API: `python serve.py --model Qwen/Qwen3-0.6B`, then http://127.0.0.1:8000.

    request -> ids -> the engine's batch -> ids -> text, reasoning, tool calls -> JSON or a stream

This file is the command. In serving/: the HTTP side (app.py), the endpoints and their fields, the thread that owns the
model, grammars and tool calls, and the chat page at `/`. In inference/engine.py: many replies side by side.
"""

import os
import sys
from ipaddress import ip_address

import console
from inference.flags import add_model_flags, add_sampling_flags
from inference.params import sampling_flags

EXAMPLES = """\
  python serve.py --model models/tiny                         the page at http://127.0.0.1:8000
  python serve.py --model Qwen/Qwen3-4B --quantize int8       with less memory
  python serve.py --host 0.0.0.0 --api-key KEY                for other machines (or NANOQWEN_API_KEY)
"""


def parse_arguments(arguments: list[str]):
    parser = console.ArgumentParser(
        prog="serve.py",
        usage="serve.py [--model SRC] [options]",
        description="Serve a Qwen3 model under the OpenAI API, with a chat page at /.",
        examples=EXAMPLES,
    )
    add_model_flags(parser)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="address to listen at (default: 127.0.0.1, this machine)")
    add("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 is any free one")
    add("--api-key", metavar="KEY", help="what clients must send (default: NANOQWEN_API_KEY, else none)")
    add("--no-api-key", action="store_true", help="let other machines ask without a key")
    add = parser.add_argument_group("limits").add_argument
    add("--max-batch", type=int, default=16, metavar="N", help="replies at once (default: 16)")
    add("--context", type=int, metavar="N", help="most tokens of prompt and reply together (default: the model's)")
    add("--memory", type=int, metavar="MB", help="for the caches of replies (default: half of what is free)")
    add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    options.sampling = sampling_flags(options)
    for name, low, high in (
        ("port", 0, 65535),
        ("max_batch", 1, 4096),
        ("context", 2, 1 << 30),
        ("memory", 1, 1 << 30),
    ):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a number from {low:,} to {high:,}")
    options.api_key = options.api_key if options.api_key is not None else os.environ.get("NANOQWEN_API_KEY") or None
    if options.api_key is not None and not (
        options.api_key.isascii() and options.api_key.strip() == options.api_key != ""
    ):
        raise ValueError("--api-key: give ASCII characters without white space around them")
    if options.api_key is not None and options.no_api_key:
        raise ValueError("--no-api-key contradicts the key that is given; leave one of them out")
    if not is_loopback(options.host) and options.api_key is None and not options.no_api_key:
        raise ValueError(f"--host {options.host} lets other machines ask: add --api-key KEY, or --no-api-key")
    return options


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    options = parse_arguments(sys.argv[1:])

    # These import PyTorch, which takes seconds: only now that the arguments are right.
    from formats.source import resolve_default
    from inference.load import describe, load_model
    from serving.app import LOOPBACK, create_app
    from serving.embedding import has_pooling
    from serving.run import bind, run
    from serving.service import Service

    listening = bind(options.host, options.port)
    path = resolve_default(options.model)
    model, chat = load_model(path, options)
    name = options.model or path.name
    limits = {"max_batch": options.max_batch, "context": options.context, "pooling": has_pooling(path)}
    memory = options.memory and options.memory << 20
    service = Service(name, model, chat, options.sampling, **limits, memory=memory)
    address, port = listening.getsockname()[:2]

    def ready() -> None:
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        what = f"{describe(model)}; {options.max_batch} replies at once; chat page at /, API at /v1"
        console.notice(f"serve.py: {where} serves {name}: {what}")

    guarded = is_loopback(options.host) and options.api_key is None
    run(create_app(service, options.api_key, LOOPBACK | {options.host} if guarded else None), listening, ready)


if __name__ == "__main__":
    console.run(main)
