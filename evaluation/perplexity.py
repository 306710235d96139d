"""Perplexity of a text, by one of two protocols that are both in use and give different numbers.

disjoint    windows of `window` tokens side by side, each predicted from its own beginning (vLLM's checks): every
            window's first token has no context, so the value is higher
sliding     each token is predicted from up to `window` - `stride` tokens before it or more (Hugging Face's
            documentation on the perplexity of fixed-length models): nearer to what a reader of the whole would get
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from inference.likelihood import Scorer


class Perplexity(NamedTuple):
    value: float
    """exp of the mean negative log likelihood of a token."""
    bits_per_byte: float
    """Of the predicted tokens' bytes: comparable between tokenizers."""
    tokens: int
    """That were predicted."""
    windows: int


def windows(tokens: int, window: int, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """(begin, first predicted, end) of each window; `stride` None: disjoint ones. A window's first token is never
    predicted."""
    step = window if stride is None else stride
    seen = 1
    for begin in range(0, max(tokens - 1, 0), step):
        end = min(begin + window, tokens)
        first = begin + 1 if stride is None else max(seen, begin + 1)
        if first < end:
            yield begin, first, end
        seen = end
        if end == tokens:
            return


def perplexity(
    scorer: Scorer,
    ids: list[int],
    sizes: list[int],
    window: int,
    stride: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Of a text with these ids, whose tokens have these `sizes` in bytes.

    Raises ValueError for a window that is too small or too large.
    """
    context = scorer.model.config.max_position_embeddings
    if not 2 <= window <= context:
        raise ValueError(f"--window {window}: give from 2 to the model's context of {context:,} tokens")
    if stride is not None and not 1 <= stride < window:
        raise ValueError(f"--stride {stride}: give from 1 to {window - 1}, less than --window")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; a perplexity needs at least two")
    total, count, number, read = 0.0, 0, 0, 0
    for begin, first, end in windows(len(ids), window, stride):
        values = scorer.logprobs(ids[begin:first], ids[first:end])
        total, count, number = total - math.fsum(values), count + len(values), number + 1
        read += sum(sizes[first:end])
        progress(end)
    bits = total / math.log(2)
    return Perplexity(math.exp(total / count), bits / max(read, 1), count, number)


def read_text(file: str | None) -> str:
    """A UTF-8 file as it is; without one the bundled one: Lincoln, Carroll and Dickens, in the public domain."""
    path = Path(file) if file else Path(__file__).resolve().parent.parent / "data" / "passage.txt"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; convert it first") from None
