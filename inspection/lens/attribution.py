"""Where a token came from: how many bits each span of the text before it was worth.

Leave-one-out is exact: the span is taken out, the text closes up, and the log probability is computed again; bits(span)
= log2 p(token | all) - log2 p(token | all but the span). Beside it stand two approximations that need a single
backward pass: the length of the gradient at the span's embeddings, and gradient times input (Simonyan et al. 2013,
https://arxiv.org/abs/1312.6034; Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713), with the rank correlation of
each with the exact values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inference.likelihood import Scorer
from inspection.lens.spans import Span
from inspection.lens.trace import LN2, hooked
from model import Qwen3

GROUP = 16  # tokens whose backward passes share a forward pass


def leave_one_out(
    scorer: Scorer, ids: Sequence[int], begin: int, spans: Sequence[Span], progress: Callable[[int], None]
) -> list[list[float | None]]:
    """bits[span][token] for the tokens ids[begin:]; None where the span does not lie before the token, or nothing else
    does: a probability needs a text before it.

    One pass a span gives its bits for all tokens; what precedes the span is computed once (inference/likelihood.py).
    """
    whole = scorer.logprobs(ids[:begin], ids[begin:])
    found: list[list[float | None]] = [[] for _ in spans]
    # From the last span to the first: each text shares with the one before all that precedes its own span.
    for number, index in enumerate(sorted(range(len(spans)), key=lambda i: -spans[i].start), 1):
        span = spans[index]
        first = max(begin, span.end, 0 if span.start else span.end + 1)
        context = [*ids[: span.start], *ids[span.end : first]]
        without = scorer.logprobs(context, ids[first:])
        gap: list[float | None] = [None] * (first - begin)
        found[index] = gap + [(a - b) / LN2 for a, b in zip(whole[first - begin :], without, strict=True)]
        progress(number)
    return found


def gradients(
    model: Qwen3, ids: Sequence[int], begin: int, spans: Sequence[Span], progress: Callable[[int], None]
) -> tuple[list[list[float]], list[list[float]]]:
    """(norms, products)[token][span] for the tokens ids[begin:], in bits: the sum over the span's tokens of the
    gradient's length, and of gradient · embedding, both of log2 p(token).

    Each token needs a backward pass of its own. A pass covers only the positions before the end of its token's group,
    as a gradient never reaches later ones, and the head's part of it is computed for the whole group at once.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # or their gradients would be computed too
        parameter.requires_grad_(False)
    norms, products = [], []
    try:
        for first in range(begin, len(ids), GROUP):
            last = min(first + GROUP, len(ids))
            x, hidden = _embedded_pass(model, ids[: last - 1])
            for place, direction in enumerate(_head_gradients(model, hidden, ids, first, last), first):
                (gradient,) = torch.autograd.grad(hidden[place - 1], x, direction, retain_graph=place + 1 < last)
                lengths = gradient[0].float().norm(dim=-1) / LN2
                dots = (gradient[0].float() * x[0].detach().float()).sum(-1) / LN2
                norms.append([float(lengths[s.start : s.end].sum()) for s in spans])
                products.append([float(dots[s.start : s.end].sum()) for s in spans])
                progress(place + 1 - begin)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return norms, products


def _embedded_pass(model: Qwen3, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(x, hidden): the embeddings [1, T, C] as a leaf, and the last hidden states [T, C] that a graph leads to."""
    kept: list[Tensor] = []

    def embedded(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    with torch.enable_grad(), hooked([model.model.embed_tokens.register_forward_hook(embedded)]):
        hidden = model.model(torch.tensor([list(ids)], device=model.device))[0]
    return kept[0], hidden


def _head_gradients(model: Qwen3, hidden: Tensor, ids: Sequence[int], first: int, last: int) -> Tensor:
    """The gradients of ln p of the tokens ids[first:last] at the hidden states that predict them, [tokens, C]."""
    with torch.enable_grad():
        states = hidden[first - 1 : last - 1].detach().requires_grad_()
        targets = torch.tensor(list(ids[first:last]), device=hidden.device)[:, None]
        logprobs = model.head(states).float().log_softmax(-1).gather(1, targets)
        (found,) = torch.autograd.grad(logprobs.sum(), states)  # each depends on its own state alone
    return found


def attribution(
    model: Qwen3, ids: Sequence[int], begin: int, spans: Sequence[Span], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """A row for each token of ids[begin:]: `total_bits` is the sum of its spans' bits."""
    total = len(spans) + len(ids) - begin
    exact = leave_one_out(Scorer(model), ids, begin, spans, lambda done: progress(done, total))
    norms, products = gradients(model, ids, begin, spans, lambda done: progress(len(spans) + done, total))
    rows = []
    for at in range(len(ids) - begin):
        entries = [
            {"span": s, "bits": exact[s][at], "gradient_norm": norms[at][s], "gradient_x_input": products[at][s]}
            for s in range(len(spans))
            if exact[s][at] is not None
        ]
        bits = [entry["bits"] for entry in entries]
        rows.append(
            {
                "token": begin + at,
                "total_bits": sum(bits),
                "spans": entries,
                "agreement": {
                    "gradient_norm": rank_correlation(list(map(abs, bits)), [e["gradient_norm"] for e in entries]),
                    "gradient_x_input": rank_correlation(bits, [e["gradient_x_input"] for e in entries]),
                },
            }
        )
    return rows


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's, from -1 to 1, equal values sharing their mean rank; None for fewer than three or a constant."""
    if len(a) < 3:
        return None
    x, y = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks
