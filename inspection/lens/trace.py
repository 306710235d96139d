"""One forward pass of model.py, watched by hooks from outside: what each layer holds, and where each head looks.

Nothing is added to the model for it. The pass is the plain one, without a cache, so that every position is computed as
training computes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import Qwen3

LN2 = 0.6931471805599453
ROWS = 64  # positions whose logits are in memory at once


class Trace(NamedTuple):
    """Of N tokens; the rows of `logits` and `layers` are the positions that were asked for."""

    bits: list[float | None]
    """-log2 p of each token behind those before it, [N]; None for the first."""
    entropy_bits: list[float | None]
    """Of the distribution that each token was drawn from, [N]."""
    ranks: list[int | None]
    """1 for the likeliest token, [N]."""
    logits: Tensor
    """float32 [rows, V]"""
    layers: list[tuple[list[int], list[float]]]
    """For each layer, embedding first and last layer last: the likeliest token of each row and its probability, through
    the last norm and the head (the logit lens, nostalgebraist 2020)."""
    residual_norms: list[list[float]]
    """The length of the residual stream behind the embedding and behind each layer, [layers + 1][N]."""
    attention: list[Tensor]
    """float32 [H, rows, N] for each layer; a row sums to 1."""


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(
    model: Qwen3, ids: Sequence[int], rows: Sequence[int], progress: Callable[[int], None] = lambda n: None
) -> Trace:
    """Watches the pass over `ids`; `rows` are the positions whose logits, layers and attention are kept."""
    decoder, chosen = model.model, torch.tensor(list(rows))
    states: list[Tensor] = []
    attention: list[Tensor] = []

    def embedded(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        states.append(output[0])

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        states.append(output[0])
        progress(len(states) - 1)

    def before(module: nn.Module, inputs: tuple) -> None:
        attention.append(attention_rows(module, *inputs, chosen))

    handles = [decoder.embed_tokens.register_forward_hook(embedded)]
    for layer in decoder.layers:
        handles += [layer.register_forward_hook(after), layer.self_attn.register_forward_pre_hook(before)]
    device = model.device
    with hooked(handles):
        hidden = decoder(torch.tensor([list(ids)], device=device))[0]
    targets = torch.tensor([*ids[1:], 0], device=device)
    bits, entropy, ranks = [], [], []
    for start in range(0, len(ids), ROWS):
        logits = model.head(hidden[start : start + ROWS]).float()
        logprobs, wanted = logits.log_softmax(-1), targets[start : start + ROWS, None]
        bits += (logprobs.gather(1, wanted)[:, 0] / -LN2).tolist()
        entropy += (-(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1) / LN2).tolist()
        ranks += ((logits > logits.gather(1, wanted)).sum(-1) + 1).tolist()
    layers = []
    for state in states:
        logits = model.head(decoder.norm(state[chosen])).float()
        best = logits.softmax(-1).max(-1)
        layers.append((best.indices.tolist(), best.values.tolist()))
    return Trace(
        [None, *bits[:-1]],
        [None, *entropy[:-1]],
        [None, *ranks[:-1]],
        model.head(hidden[chosen]).float(),
        layers,
        [state.float().norm(dim=-1).tolist() for state in states],
        attention,
    )


def attention_rows(module: nn.Module, x: Tensor, shared: Any, rows: Tensor) -> Tensor:
    """The attention that the queries at `rows` pay to every position: float32 [H, rows, N], softmax(q·kᵀ / √D)."""
    B, T, _ = x.shape
    q, k = (project(x).view(B, T, -1, module.head_dim) for project in (module.q_proj, module.k_proj))
    q, k = (heads[0].float() for heads in module.norm_rotate(q, k, shared))  # [H, T, D], [K, T, D]
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q[:, rows] @ k.transpose(1, 2) / module.head_dim**0.5
    hidden = torch.arange(T)[None] > rows[:, None]
    return scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(-1)
