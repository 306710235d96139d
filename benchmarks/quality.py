"""What fewer bits cost: `python bench.py quality --model models/tiny`.

Each scheme's logits beside those of the same weights in float32, over unseen questions with their gold traces, token by
token as they would be decoded: the relative error ‖l - l₀‖ / ‖l₀‖ of the logits (each position's mean taken away, as
softmax does not see it), the mean KL divergence KL(p₀ ‖ p) in nats per token, and how often the likeliest token is the
same. The error of random weights says little; take trained ones.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import console
from benchmarks.common import ROOT, cache_directory, run_script
from chat import Chat
from data.corpus.examples import completion, unseen_examples
from data.corpus.tokenizer import TINY, pieces_of
from formats.source import BUNDLED_MODEL, resolve
from inference.decode import new_cache
from model import Qwen3

SCHEMES = {
    "bf16": ("--to", "bf16"),
    "int8": ("--to", "int8"),
    "int8, groups of 32": ("--to", "int8", "--group-size", "32"),
    "int4": ("--to", "int4"),
    "GGUF q8_0": ("--to", "gguf", "--type", "q8_0"),
    "GGUF q4_0": ("--to", "gguf", "--type", "q4_0"),
    "GGUF q4_k_m": ("--to", "gguf", "--type", "q4_k_m"),
}
AT_ONCE = 16  # tokens of a forward pass, few enough to be computed as one by one


def conversations(chat: Chat, count: int) -> list[list[int]]:
    """Unseen questions and their gold replies, as ids."""
    pieces = pieces_of(TINY)  # whose spelling the traces show; any model's tokenizer reads them as text
    return [
        [*chat.render(example.messages, example.thinking), *chat.encode(completion(example))]
        for example in unseen_examples(0, count, pieces)
    ]


@torch.inference_mode()
def logits(model: Qwen3, texts: list[list[int]]) -> torch.Tensor:
    """[all tokens, V] in float32, each position's mean taken away."""
    found = []
    for ids in texts:
        cache = new_cache(model, len(ids))
        for start in range(0, len(ids), AT_ONCE):
            found.append(model(torch.tensor([ids[start : start + AT_ONCE]]), cache)[0].float())
    found = torch.cat(found)
    return found - found.mean(-1, keepdim=True)


def compare(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """Relative error, KL(exact || found) in nats per token, share of equal likeliest tokens."""
    error = (found - exact).norm() / exact.norm()
    logp, logq = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = (logp.exp() * (logp - logq)).sum(-1).mean()
    return error.item(), divergence.item(), (found.argmax(-1) == exact.argmax(-1)).float().mean().item()


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(BUNDLED_MODEL), metavar="SRC", help="default: the bundled model")
    parser.add_argument("--count", type=int, default=110, metavar="N", help="conversations (default: 110)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"--count {options.count}: give at least 1")
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
            run_script(ROOT / "convert.py", *flags, "--model", str(model), "--out", str(path), "--force")
            error, divergence, same = compare(logits(Qwen3.from_pretrained(path), texts), exact)
            print(f"| {name} | {100 * error:.3f} | {divergence:.2e} | {100 * same:.2f} |", flush=True)
