"""What fewer bits cost: `python bench.py quality --model models/tiny`.

Each scheme's logits beside those of the same weights in float32, over unseen questions with their gold traces, token by
token as they would be decoded: the relative error ‖l - l₀‖ / ‖l₀‖ of the logits (each position's mean taken away, as
softmax does not see it), the mean KL divergence KL(p₀ ‖ p) in nats per token, and how often the likeliest token is the
same. The error of random weights says little; take trained ones.

Where llama-server is at hand, a second table: how near a .gguf file's logits are to those of its own numbers in
float32, ours beside llama.cpp's.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import console
from benchmarks.common import ROOT, cache_directory, llama_program, run_script
from formats.source import BUNDLED_MODEL, resolve

CACHE = "float32, keys and values in 8 bits (--kv int8)"
SCHEMES = {
    CACHE: (),
    "bf16": ("--to", "bf16"),
    "int8": ("--to", "int8"),
    "int8, groups of 32": ("--to", "int8", "--group-size", "32"),
    "int4": ("--to", "int4"),
    "GGUF q8_0": ("--to", "gguf", "--type", "q8_0"),
    "GGUF q4_0": ("--to", "gguf", "--type", "q4_0"),
    "GGUF q4_k_m": ("--to", "gguf", "--type", "q4_k_m"),
}
FILES = ("f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k")
POSITIONS = 300  # of the second table: llama-server answers one at a time


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED_MODEL), metavar="SRC", help="default: the bundled model")
    parser.add_argument("--count", type=int, default=110, metavar="N", help="conversations (default: 110)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"--count {options.count}: give at least 1")

    import torch

    from benchmarks.divergence import compare, conversations, logits
    from chat import Chat
    from model import Qwen3

    model = resolve(options.model)
    texts = conversations(Chat.from_pretrained(model), options.count)
    exact = logits(Qwen3.from_pretrained(model, dtype=torch.float32), texts)
    print(f"{len(exact):,} tokens of {options.count} conversations\n")
    print("| scheme | relative error of the logits, % | KL to float32, nats a token | same likeliest token, % |")
    print("|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="quality-") as folder:
        for name in options.schemes:
            flags = SCHEMES[name]
            path = Path(folder) / ("model.gguf" if "gguf" in flags else "model")
            if name == CACHE:
                tried = Qwen3.from_pretrained(model, dtype=torch.float32)
                tried.cache_dtype = torch.int8
            else:
                run_script(ROOT / "convert.py", *flags, "--model", str(model), "--out", str(path), "--force")
                tried = Qwen3.from_pretrained(path)
            error, divergence, same = compare(logits(tried, texts), exact)
            print(f"| {name} | {100 * error:.3f} | {divergence:.2e} | {100 * same:.2f} |", flush=True)
        program = llama_program("llama-server")
        if program is None:
            console.notice("llama-server is not here (NANOQWEN_LLAMA_CPP names its folder): files are not compared")
        else:
            compare_files(program, model, texts, Path(folder))


def compare_files(program: str, model: Path, texts: list[list[int]], folder: Path) -> None:
    from benchmarks.divergence import beside_llama

    ends = itertools.accumulate(map(len, texts))
    texts = [ids for ids, end in zip(texts, ends, strict=True) if end <= POSITIONS] or [texts[0][:POSITIONS]]
    print(f"\nRelative error of the logits beside the same file's numbers in float32, {sum(map(len, texts))} tokens\n")
    print("| file | nanoqwen, % | llama.cpp, % |\n|---|--:|--:|")
    for kind in FILES:
        path = folder / f"{kind}.gguf"
        run_script(ROOT / "convert.py", "--to", "gguf", "--type", kind, "--model", str(model), "--out", str(path))
        ours, theirs = beside_llama(program, path, texts)
        print(f"| {kind} | {100 * ours:.3f} | {100 * theirs:.3f} |", flush=True)
        path.unlink()
