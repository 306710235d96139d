"""What choosing a token costs: `python bench.py sampling`.

Microseconds of `sample` per token for each kind of setting, over the logits of a vocabulary of Qwen3's size: flat ones,
as random weights give them (the worst case for top-p, which then keeps most of the vocabulary), and peaked ones, as
trained weights do. The history that the penalties look at is 4,096 tokens. Each figure is the median of the repeats.
"""

import statistics
import time
from array import array

import torch

import console
from inference.params import SamplingParams
from inference.sampling import sample

VOCABULARY = 151936
SETTINGS = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top-k 20": {"top_k": 20},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 20, top-p 0.95, min-p 0.05": {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    "top-p 0.95, both penalties": {"top_p": 0.95, "presence_penalty": 1.0, "repetition_penalty": 1.1},
}
LOGITS = {"flat": 0.6, "peaked": 4.0}  # standard deviation


def measure(logits: torch.Tensor, params: SamplingParams, repeats: int) -> float:
    """Median seconds of one call."""
    history = array("q", torch.randint(0, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(0)).tolist())
    generator, seconds = params.generator(), []
    for _ in range(repeats):
        start = time.perf_counter()
        sample(logits, params, generator, history[:1024], history[1024:])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(arguments: list[str]) -> None:
    parser = console.ArgumentParser(prog="bench.py sampling", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--repeats", type=int, default=200, metavar="N", help="calls per figure (default: 200)")
    add(
        "--token-ms", type=float, metavar="X", help="also as a share of X ms, a token's time as bench.py speed gives it"
    )
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: give at least 1")
    if options.token_ms is not None and not options.token_ms > 0:
        raise ValueError(f"--token-ms {options.token_ms}: give the milliseconds of a token")
    if options.threads:
        torch.set_num_threads(options.threads)
    share = " (share of a token)" if options.token_ms else ""
    print(f"| setting | {' | '.join(f'{name} logits, µs{share}' for name in LOGITS)} |\n|---|{'--:|' * len(LOGITS)}")
    for label, setting in SETTINGS.items():
        cells, params = [], SamplingParams(seed=1, **setting)
        for scale in LOGITS.values():
            logits = (scale * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))).bfloat16()
            seconds = measure(logits, params, options.repeats)
            share = f" ({seconds / options.token_ms * 1e3:.1%})" if options.token_ms else ""
            cells.append(f"{seconds * 1e6:,.0f}{share}")
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
