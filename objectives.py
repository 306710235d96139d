"""From a batch to a loss: what each stage of training minimises.

The logits of Qwen3's vocabulary are the largest tensor of a training step (4 x 512 tokens x 151,936 x 4 bytes =
1.2 GB, and as much again for their gradient). `linear_cross_entropy` never holds more than a chunk of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import Qwen3

# Bytes of a chunk of logits: fewer would read the head's matrix, and write its gradient, more often.
CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
CACHED = 1 << 20  # numbers that are worked on at once on a CPU, so that they stay in its caches
IGNORED = -100  # the target of a position that teaches nothing: padding, the prompt


class Batch(NamedTuple):
    """ids [B, T]; targets [B, T], the token that follows each position or IGNORED; mask bool [B, 1, T, T] or None."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None

    @property
    def target_count(self) -> int:
        return int((self.targets != IGNORED).sum())


def _softmax_errors(logits: Tensor, targets: Tensor) -> Tensor:
    """Makes logits [N, V] the gradient of their cross-entropies: softmax minus the one-hot target. Returns the sum of
    the cross-entropies, float32 []. `torch.logsumexp` would take five times as long on a CPU as all of this."""
    total = torch.zeros((), device=logits.device)
    for piece, wanted in zip(*_pieces(logits, targets), strict=True):
        scores, places = piece.float(), torch.arange(len(wanted), device=logits.device)
        shares = scores.softmax(-1)
        normalizer = scores.amax(-1) - shares.amax(-1).log()
        total += (normalizer - scores[places, wanted]).sum()
        shares[places, wanted] -= 1
        piece.copy_(shares)
    return total


def _pieces(wide: Tensor, other: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two tensors cut alike into groups of rows that fit the caches of a CPU; one group elsewhere."""
    rows = max(1, CACHED // wide.shape[-1]) if wide.is_cpu else len(wide)
    return wide.split(rows), other.split(rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of x·Wᵀ, with both gradients computed chunk by chunk on the way forward."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """x [N, C], weight [V, C], targets [N] -> float32 []"""
        device = x.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        chunk = chunk or max(1, CHUNK_BYTES.get(device, 1 << 28) // (len(weight) * product.itemsize))
        needs_x, needs_weight = context.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), device=x.device)
        head = weight.to(product)
        # The chunks share their memory: on a CPU new pages cost as much time as the arithmetic on them.
        logits = torch.empty(min(chunk, len(x)), len(weight), dtype=product, device=x.device)
        share = torch.empty_like(head) if needs_weight and product != torch.float32 else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), chunk):
                rows, wanted = x[start : start + chunk].to(product), targets[start : start + chunk]
                error = torch.mm(rows, head.T, out=logits[: len(rows)])
                total += _softmax_errors(error, wanted)
                if needs_x:
                    grad_x[start : start + chunk] = error @ head
                if share is not None:
                    torch.mm(error.T, rows, out=share)
                    for place, part in zip(*_pieces(grad_weight, share), strict=True):
                        place.add_(part.float())
                elif needs_weight:
                    grad_weight.addmm_(error.T, rows)
        context.save_for_backward(grad_x, grad_weight)
        context.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(context, grad: Tensor):
        grad_x, grad_weight = context.saved_tensors
        if grad_x is not None:
            grad_x = grad_x.mul_(grad.to(grad_x.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(context.weight_dtype)
        return grad_x, grad_weight, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """The sum over positions of -log softmax(x·Wᵀ)[target], logits only for `chunk` positions at a time (0: as many
    as CHUNK_BYTES allows).

    x [N, C], weight [V, C], targets LongTensor [N] without IGNORED -> float32 []. Differentiable once in x and weight.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, chunk)


def next_token_loss(model: Qwen3, batch: Batch) -> Tensor:
    """The sum of the losses over the batch's targets, float32 []. Pretraining and SFT."""
    x = model.model(batch.ids, mask=batch.mask)
    taught = batch.targets != IGNORED
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    return linear_cross_entropy(x[taught], head.weight, batch.targets[taught])


class Objective(nn.Module):
    """A model together with its loss, Batch -> float32 []: what is trained in one or in many processes."""

    def __init__(self, model: Qwen3):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return next_token_loss(self.model, batch)
