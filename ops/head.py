"""The output head of a quantised model: a token reads a copy in as many bits as the layers have, or the head alone
would be half of what it reads. One copy for each model, for the token step on a CPU and on a GPU."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from formats.compressed_tensors import Scheme
from ops.quant import QuantizedLinear
from ops.watch import version

GROUP = 16  # columns that share a scale in 4 bits: with 32, int4 would err more than Q4_0 does
SAMPLE = 64  # rows


class HeadCopy:
    """The copy, and how to tell that it is one of this weight."""

    def __init__(self, weight: Tensor, layer: QuantizedLinear):
        self.layer, self.weight, self.version = layer, weakref.ref(weight), version(weight)
        self.shape, self.stride, self.place = weight.shape, weight.stride(), weight.data_ptr()
        self.sample = _sample(weight)

    @property
    def nbytes(self) -> int:
        return self.layer.weight_packed.nbytes + self.layer.weight_scale.nbytes

    def is_current(self, weight: Tensor) -> bool:
        """Whether the weight is the one that was copied: as far as PyTorch tells, and on a CPU some of its numbers. The
        rest is what ops/watch.py: invalidate is for."""
        same = weight is self.weight() and version(weight) == self.version
        same &= (weight.shape, weight.stride(), weight.data_ptr()) == (self.shape, self.stride, self.place)
        return same and (self.sample is None or torch.equal(self.sample, _sample(weight)))


def _sample(weight: Tensor) -> Tensor | None:
    if not weight.is_cpu:
        return None  # a look at a GPU's memory would wait for it
    some = weight.detach()[:: max(1, len(weight) // SAMPLE), :16].contiguous()
    return some.view(torch.uint8).clone()  # bytes: NaN is equal to itself


_copies: weakref.WeakKeyDictionary[nn.Module, tuple[HeadCopy, int]] = weakref.WeakKeyDictionary()


def output_head(model: nn.Module) -> nn.Module:
    """The layer whose weight the logits come from."""
    return model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head


def copied_head(
    model: nn.Module, changes: int, quantize: Callable[[Tensor, Scheme], QuantizedLinear] | None = None
) -> HeadCopy | None:
    """The copy of a quantised model's head, made anew where the head is no longer what it was made from.

    None where the head stays as it is. `changes`: of ops/watch.py: Watch. `quantize` takes the place of PyTorch's way.
    """
    bits = min((m.bits for m in model.modules() if isinstance(m, QuantizedLinear)), default=None)
    head = output_head(model)
    if bits is None or isinstance(head, QuantizedLinear):
        return None
    known, counted = _copies.get(model, (None, None))
    if known is None or counted != changes or not known.is_current(head.weight):
        bits = 8 if head.weight.shape[1] % GROUP else bits
        scheme = Scheme(bits, GROUP if bits == 4 else None)
        known = HeadCopy(head.weight, (quantize or _quantize)(head.weight, scheme))
        _copies[model] = known, changes
    return known


def _quantize(weight: Tensor, scheme: Scheme) -> QuantizedLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return QuantizedLinear.from_linear(layer, scheme)
