"""From a batch to a loss: what each stage of training minimises.

The logits of Qwen3's vocabulary are the largest tensor of a training step (4 x 512 tokens x 151,936 x 4 bytes =
1.2 GB, and as much again for their gradient). `linear_cross_entropy` never holds more than a chunk of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import Qwen3

LOGITS_AT_ONCE = 1 << 25  # 128 MB in float32; fewer would read the head's matrix more often
IGNORED = -100  # the target of a position that teaches nothing: padding, the prompt


class Batch(NamedTuple):
    """ids [B, T]; targets [B, T], the token that follows each position or IGNORED; mask bool [B, 1, T, T] or None."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None

    @property
    def target_count(self) -> int:
        return int((self.targets != IGNORED).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of x·Wᵀ, with both gradients computed chunk by chunk on the way forward."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """x [N, C], weight [V, C], targets [N] -> float32 []"""
        product = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        needs_x, needs_weight = context.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), device=x.device)
        head = weight.to(product)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk):
                rows, wanted = x[start : start + chunk].to(product), targets[start : start + chunk]
                logits = (rows @ head.T).float()
                normalizer = logits.logsumexp(-1, keepdim=True)
                places = torch.arange(len(wanted), device=x.device)
                total += (normalizer[:, 0] - logits[places, wanted]).sum()
                if not (needs_x or needs_weight):
                    continue
                error = logits.sub_(normalizer).exp_()  # d loss / d logits is softmax minus the one-hot target
                error[places, wanted] -= 1
                error = error.to(product)
                if needs_x:
                    grad_x[start : start + chunk] = (error @ head).to(x.dtype)
                if needs_weight and product == torch.float32:
                    grad_weight.addmm_(error.T, rows)
                elif needs_weight:
                    grad_weight += error.T @ rows
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
    as LOGITS_AT_ONCE allows).

    x [N, C], weight [V, C], targets LongTensor [N] without IGNORED -> float32 []. Differentiable once in x and weight.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, chunk or max(1, LOGITS_AT_ONCE // len(weight)))


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
