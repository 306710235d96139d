"""What choosing a token costs: `python bench.py sampling`.

Microseconds of `sample` per token for each kind of setting, over the logits of a vocabulary of Qwen3's size: flat ones,
as random weights give them (the worst case for top-p, which then keeps most of the vocabulary), and peaked ones, as
trained weights do. The penalties look at a prompt of 1,024 tokens and a reply of --history. Before each call other
memory goes through the processor's caches, as the weights do between two tokens; without that a call takes a third of
its time. Each figure is the median of the repeats.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import console
from inference.params import SamplingParams, Uniforms

VOCABULARY, PROMPT = 151936, 1024
PENALTIES = {"presence_penalty": 1.0, "frequency_penalty": 0.1, "repetition_penalty": 1.1}
SETTINGS = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, no seed": {"temperature": 0.7, "seed": None},
    "top-k 20": {"top_k": 20},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.5": {"top_p": 0.5},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 20, top-p 0.95, min-p 0.05": {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    "top-p 0.95, min-p 0.05": {"top_p": 0.95, "min_p": 0.05},
    "presence penalty": {"presence_penalty": 1.0},
    "frequency penalty": {"frequency_penalty": 0.1},
    "repetition penalty": {"repetition_penalty": 1.1},
    "temperature 0.7, top-p 0.95, all penalties": {"temperature": 0.7, "top_p": 0.95, **PENALTIES},
}
PASSING = 256 << 20  # bytes
LOGITS = {"flat": 0.6, "peaked": 4.0}  # standard deviation


def median_seconds(call: Callable[[], Any], before: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py sampling", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--repeats", type=int, default=40, metavar="N", help="calls per figure (default: 40)")
    add("--history", type=int, default=4096, metavar="N", help="tokens of the reply so far (default: 4096)")
    add(
        "--token-ms", type=float, metavar="X", help="also as a share of X ms, a token's time as bench.py speed gives it"
    )
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.history) < 1:
        raise ValueError("--repeats and --history: give at least 1")
    if options.token_ms is not None and not options.token_ms > 0:
        raise ValueError(f"--token-ms {options.token_ms}: give the milliseconds of a token")

    import numpy as np
    import torch

    from inference.sampling import Said, sample, top_logprobs
    from ops.cpu.library import library

    if options.threads:
        torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    prompt, reply = (torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (PROMPT, options.history))
    said = Said(prompt, reply)
    logits = [(scale * torch.randn(VOCABULARY, generator=generator)).bfloat16() for scale in LOGITS.values()]

    passing = np.ones(PASSING // 8)
    library()  # which decoding has loaded

    def row(label: str, call: Callable[[torch.Tensor], Any]) -> None:
        seconds = [median_seconds(partial(call, each), passing.sum, options.repeats) for each in logits]
        shares = [f" ({one / options.token_ms * 1e3:.1%})" if options.token_ms else "" for one in seconds]
        cells = [f"{one * 1e6:,.0f}{share}" for one, share in zip(seconds, shares, strict=True)]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)

    def choose(params: SamplingParams, uniforms: Uniforms, each: torch.Tensor) -> int:
        return sample(each, params, uniforms, said)

    share = " (share of a token)" if options.token_ms else ""
    print(f"| setting | {' | '.join(f'{name} logits, µs{share}' for name in LOGITS)} |\n|---|{'--:|' * len(LOGITS)}")
    for label, setting in SETTINGS.items():
        params = SamplingParams(**{"seed": 1, **setting})
        row(label, partial(choose, params, params.uniforms()))
    row("log probabilities of the 20 likeliest, besides", lambda each: top_logprobs(each, 0, 20))
