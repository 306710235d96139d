"""The loss of a language model's head without its logits: only a chunk of them is ever in memory.

Modelled on "Cut Your Losses in Large-Vocabulary Language Models" (https://arxiv.org/abs/2411.09009), with PyTorch's own
matrix products and over positions instead of the vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ops.devices import pick_kernels

# Bytes of a chunk of logits: in smaller ones the head's matrix is read, and its gradient written, more often.
CHUNK_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
CACHED = 1 << 20  # numbers that a CPU works on at once, so that they stay in its caches


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0, reduction: str = "sum", kernels: str = "torch"
) -> Tensor:
    """-log softmax(x·Wᵀ)[target] of each position ("none") or their sum, logits only for `chunk` positions at a time
    (0: as many as CHUNK_BYTES allows). Under autocast the products are in its dtype; the rest is float32.

    x [N, C], weight [V, C], targets LongTensor [N] -> float32 [] or [N]. Differentiable once in x and weight.
    `kernels`: of the softmax, see ops/devices.py: pick_kernels.
    """
    assert reduction in ("sum", "none")
    errors = _errors
    if pick_kernels(kernels, x.device, "kernels") == "triton":
        from ops.gpu.kernels import cross_entropy_errors as errors
    arguments = (x, weight, targets, chunk, reduction == "sum", errors, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(*arguments)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropies of x·Wᵀ, chunk by chunk.

    For their sum the gradients of every position are computed in the forward pass, where the logits are available. For
    single ones each weight in the loss is known only in the backward pass, and the logits are computed a second time.
    """

    @staticmethod
    def forward(
        context, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, summed: bool, errors: Callable, learns: bool
    ) -> Tensor:
        """x [N, C], weight [V, C], targets [N] -> float32 [] or [N]. Not `learns`: under no_grad, of which the context
        says nothing here."""
        kind = x.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        chunk = chunk or max(1, CHUNK_BYTES.get(kind, 1 << 28) // (len(weight) * product.itemsize))
        context.summed, context.settings = summed, (chunk, product, errors)
        needed = context.needs_input_grad[:2] if summed and learns else (False, False)
        losses, grad_x, grad_weight = _in_chunks(x, weight, targets, None, needed, *context.settings)
        context.weight_dtype = weight.dtype
        context.save_for_backward(*((grad_x, grad_weight) if summed else (x, weight, targets)))
        return losses.sum() if summed else losses

    @staticmethod
    def backward(context, grad: Tensor):
        if context.summed:
            grad_x, grad_weight = context.saved_tensors
            grad_x = grad_x if grad_x is None else grad_x.mul_(grad.to(grad_x.dtype))
            grad_weight = grad_weight if grad_weight is None else _times(grad_weight, grad)
        else:
            needed = context.needs_input_grad[:2]
            _, grad_x, grad_weight = _in_chunks(*context.saved_tensors, grad, needed, *context.settings)
        grad_weight = grad_weight if grad_weight is None else grad_weight.to(context.weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: Tensor | None,
    needed: tuple[bool, bool],
    chunk: int,
    product: torch.dtype,
    errors: Callable,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropies float32 [N], and where `needed` the gradients in x and weight of their sum, each times its share
    (float32 [N]; None: 1). That of weight is float32, or of the product's dtype if one chunk is all."""
    needs_x, needs_weight = needed
    losses = torch.empty(len(x), device=x.device)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and len(x) == 0 else None
    head = weight.to(product)
    # One allocation for all chunks: on a CPU new pages of memory cost as much time as the arithmetic on them.
    logits = torch.empty(min(chunk, len(x)), len(weight), dtype=product, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            rows = x[part].to(product)
            error = torch.mm(rows, head.T, out=logits[: len(rows)])
            losses[part] = errors(error, targets[part], None if shares is None else shares[part])
            if needs_x:
                grad_x[part] = error @ head
            if needs_weight and start == 0:
                first = error.T @ rows
                grad_weight = first if len(x) <= chunk else first.float()
            elif needs_weight and product == torch.float32:
                grad_weight.addmm_(error.T, rows)
            elif needs_weight:
                partial = torch.mm(error.T, rows, out=first)
                for rows in _cached_rows(head):
                    grad_weight[rows] += partial[rows].float()
    return losses, grad_x, grad_weight


def _errors(logits: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
    """The cross-entropies of logits [N, V], float32 [N]. The logits become their gradients, each row times its share:
    softmax minus the one-hot target. (`torch.logsumexp` alone takes five times as long on a CPU as all of this.)"""
    losses = torch.empty(len(logits), device=logits.device)
    for part in _cached_rows(logits):
        scores, wanted = logits[part].float(), targets[part, None]
        probabilities = scores.softmax(-1)
        normalizer = scores.amax(-1) - probabilities.amax(-1).log()
        losses[part] = normalizer - scores.gather(-1, wanted)[:, 0]
        probabilities.scatter_add_(-1, wanted, probabilities.new_full((), -1.0).expand_as(wanted))
        logits[part] = probabilities if shares is None else probabilities.mul_(shares[part, None])
    return losses


def _times(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix [V, C] times a float32 [], in float32; in place if it is that already."""
    if matrix.dtype == torch.float32:
        return matrix.mul_(factor)
    result = torch.empty_like(matrix, dtype=torch.float32)
    for rows in _cached_rows(matrix):
        torch.mul(matrix[rows].float(), factor, out=result[rows])
    return result


def _cached_rows(matrix: Tensor) -> Iterator[slice]:
    """Rows that are worked on together: on a CPU as many as its caches hold, else all."""
    count = max(1, CACHED // matrix.shape[-1]) if matrix.is_cpu else len(matrix)
    return (slice(start, start + count) for start in range(0, len(matrix), count))
