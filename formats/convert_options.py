"""The arguments of convert.py, in a file of their own: parsing them needs no PyTorch."""

import argparse
import re
from pathlib import Path

import console

# Of a GGUF, as formats/gguf/writer.py writes them.
TYPES = ("f32", "f16", "q4_0", "q4_1", "q8_0", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "bf16")
QUANTIZED = ("int8", "int4")
TARGETS = ("gguf", "safetensors", "fp32", "fp16", "bf16", *QUANTIZED)
EXAMPLES = """\
  python convert.py --to gguf --type q8_0 --model Qwen/Qwen3-0.6B    one .gguf file, identical to llama.cpp's
  python convert.py --to int4 --model RUN                            weight-only, as vLLM and transformers read it
  python convert.py --to safetensors --model model.gguf              back from GGUF
  python convert.py --verify OUT                                     check that nothing has changed
"""


def parse_size(text: str) -> int:
    """5GB, 500MB, 2GiB or a number of bytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B)?", text, re.IGNORECASE | re.ASCII)
    power = " KMGT".index((match[2] or " ").upper()) if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB")
    return size


def parse_group_size(text: str) -> int:
    size = int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else 0
    if size < 8 or size % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 (vLLM's kernels know 32, 64 and 128)")
    return size


def parse_arguments() -> argparse.Namespace:
    parser = console.ArgumentParser(
        usage="convert.py --to TARGET [--model SRC] [--out PATH] [options]",
        description="The same model in another container or precision.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--to", choices=TARGETS, help="a container, or a precision in the official layout")
    add("--model", metavar="SRC", help="directory, hub id or .gguf file (default: Qwen/Qwen3-0.6B)")
    add("--adapter", metavar="DIR", help="a PEFT adapter (LoRA) to merge into it first: directory or hub id")
    add("--out", type=Path, metavar="PATH", help="file or directory of the result (default: named after the model)")
    add("--force", action="store_true", help="replace an earlier result")
    add("--verify", type=Path, metavar="OUT", help="instead: check a result against its model_context.json")
    add = parser.add_argument_group("--to gguf").add_argument
    add("--type", choices=TYPES, metavar="TYPE", help=f"{', '.join(TYPES)} (default: q8_0)")
    add("--for", dest="reader", choices=["qwen3.c"], help="F32 GGUF and text files as qwen3.c maps them")
    add = parser.add_argument_group("other targets").add_argument
    add("--group-size", type=parse_group_size, metavar="N", help="weights that share a scale (int4: 32, int8: a row)")
    add("--max-shard-size", type=parse_size, metavar="SIZE", help="of one safetensors file (default: 5GB)")
    options = parser.parse_args()
    if problem := combination_problem(options):
        parser.error(problem)
    options.max_shard_size = options.max_shard_size or 5 * 10**9
    if options.to == "gguf" and not options.reader:
        options.type = options.type or "q8_0"
    return options


def combination_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags that are each valid."""
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    if options.verify:
        return "--verify takes no other flags: it reads a result and changes nothing" if given != {"verify"} else None
    if not options.to:
        return f"--to is missing: one of {', '.join(TARGETS)}"
    if options.to != "gguf" and given & {"type", "reader"}:
        return f"--type and --for belong to --to gguf, not to --to {options.to}"
    if options.type and options.reader:
        return f"--type {options.type} with --for {options.reader}: that program reads only F32; leave --type out"
    if options.group_size and options.to not in QUANTIZED:
        return f"--group-size belongs to --to int8 and int4, not to --to {options.to}"
    if options.max_shard_size and options.to == "gguf":
        return "--max-shard-size belongs to safetensors; a GGUF is one file"
    return None
