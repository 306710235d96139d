"""Weight-only quantised linear layers: int8 or int4 weights, activations in the model's own type.

At batch 1 a token costs one read of every weight, so fewer bytes are more tokens a second. A group of columns of a row
shares one scale s (bfloat16), and each weight is stored as a whole number q with w ≈ q * s; q is in -128..127 or -8..7.

The scale is not simply max|w| / 127: of a few candidates it is the one with the least squared error. Its sign is free,
so that the largest weight can take the code on the longer side, and a smaller range that clips the largest weight
often wins. (llama.cpp's Q4_0 chooses its sign the same way, without the search: ggml/src/ggml-quants.c.)

model.py knows nothing of this: `swap_linears` replaces its `nn.Linear`s by modules whose buffers have the stored names
of compressed-tensors (formats/compressed_tensors.py), `quantize_` quantises a loaded model in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from formats.compressed_tensors import (
    BITS,
    Scheme,
    dequantize,
    largest_group,
    pack,
    packed_columns,
    read_quantization_config,
)
from formats.threads import map_in_threads

SCALE_DTYPE = torch.bfloat16

# Range of the codes that the largest weight of a group is mapped to, as multiples of 2^(bits-1).
CANDIDATES = {4: (0.86, 0.93, 1.0, 1.06, 1.13, 1.2), 8: (0.984, 0.988, 0.992, 0.996, 1.0)}

CHUNK = 1 << 19  # weights that a thread works on at a time: few enough for the cache
SLICE = 1 << 21  # weights that are dequantised at a time in a forward pass


def quantize(weight: torch.Tensor, bits: int, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, columns] → codes int8 [rows, columns] and scales bfloat16 [rows, groups]; w ≈ code * scale.

    `group_size` divides the columns; None is one group for each row. A group of zeros has the scale 0.
    """
    rows, columns = weight.shape
    group_size = group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, columns // group_size, dtype=SCALE_DTYPE, device=weight.device)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float().reshape(-1, group_size).T.contiguous()  # [G, groups]
        code, scale = _quantize_groups(chunk, bits)
        codes[start : start + step] = code.T.reshape(-1, columns)
        scales[start : start + step] = scale.view(-1, columns // group_size)
    return codes, scales


def _quantize_groups(weights: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weights float32 [G, groups] → codes [G, groups] as floats and scales bfloat16 [groups], least squared error."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    least, greatest = weights.aminmax(dim=0)
    largest = torch.where(-least > greatest, least, greatest)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.zeros_like(largest)
    difference = torch.empty_like(weights)
    for candidate in CANDIDATES[bits]:
        scale = (largest / (low * candidate)).to(SCALE_DTYPE).float()
        torch.mul(weights, _reciprocal(scale), out=difference)
        difference.round_().clamp_(low, high).mul_(scale).sub_(weights)
        error = difference.square_().sum(0)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    codes = (weights * _reciprocal(best_scale)).round_().clamp_(low, high)
    return codes, best_scale.to(SCALE_DTYPE)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


class QuantizedLinear(nn.Module):
    """y = x·Wᵀ + b with W in 8 or 4 bits, in the layout that formats/compressed_tensors.py explains."""

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, device=None):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, scheme.bits
        words, groups = packed_columns(in_features, scheme.bits), scheme.groups(in_features)
        self.register_buffer("weight_packed", torch.empty(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=SCALE_DTYPE, device=device))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device=device))
        self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> "QuantizedLinear":
        """The same layer with its weight quantised."""
        layer = cls(linear.in_features, linear.out_features, scheme, device="meta")
        codes, layer.weight_scale = quantize(linear.weight.detach(), scheme.bits, scheme.group_size)
        layer.weight_packed = pack(codes, scheme.bits)
        layer.weight_shape = torch.tensor(linear.weight.shape)
        layer.bias = linear.bias
        return layer

    def _apply(self, fn, recurse=True):
        """`.to(dtype)` and the like convert what belongs to the activations; scales keep their type, as codes do."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        kept = self.weight_scale if scale.is_meta else scale.to(self.weight_scale.device)
        self.weight_scale = kept.to(SCALE_DTYPE)
        return self

    def dequantize(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows `start` to `stop` of the weight, [rows, in_features]."""
        rows = slice(start, stop)
        return dequantize(self.weight_packed[rows], self.weight_scale[rows], self.bits, self.in_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]. A slice of rows at a time: the whole weight is never dequantised in memory."""
        step = max(1, SLICE // self.in_features)
        parts = [
            F.linear(x, self.dequantize(start, start + step, x.dtype)) for start in range(0, self.out_features, step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        groups = self.weight_scale.shape[1]
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={groups}, bias={self.bias is not None}"
        )


def _linears(model: nn.Module, scheme: Scheme) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not scheme.ignores(n)]


def swap_linears(model: nn.Module, quantization_config: dict[str, Any]) -> None:
    """Replaces a model's linear layers by empty quantised ones, to be filled by their stored names.

    `quantization_config` is the entry of config.json. ValueError for a form that is not implemented.
    """
    scheme = read_quantization_config(quantization_config)
    for name, linear in _linears(model, scheme):
        layer = QuantizedLinear(linear.in_features, linear.out_features, scheme, linear.weight.device)
        layer.bias = linear.bias
        model.set_submodule(name, layer)


def choose_scheme(quantization: str, shapes: dict[str, tuple[int, ...]], group_size: int | None = None) -> Scheme:
    """The scheme for a model whose linear layers (module path → weight shape) are given: "int8" or "int4".

    int8 has one scale for each row unless `group_size` is given. int4 has groups of 32, at 4.5 bits a weight the size
    of Q4_0 with a smaller error; where 32 does not divide all rows, 16 or 8. The output head and the routers of a
    mixture of experts stay as they are: both are small, and an error there moves every token.
    """
    # The head is named even where it is tied and not stored: transformers makes a layer for it and would quantise that.
    ignore = ("lm_head", *(name for name in shapes if name.endswith(".mlp.gate")))
    columns = sorted({shape[1] for name, shape in shapes.items() if name not in ignore})
    if group_size is None and quantization == "int4":
        group_size = largest_group(*columns)
    for count in columns:
        if group_size and count % group_size:
            fix = f"{largest_group(*columns)} divides all rows of this model"
            raise ValueError(f"--group-size {group_size} does not divide rows of {count} weights; {fix}")
    return Scheme(BITS[quantization], group_size, ignore)


def quantize_(model: nn.Module, quantization: str, group_size: int | None = None) -> Scheme:
    """Quantises a loaded model's linear layers in place, a few at a time. ValueError where a group does not fit, or
    the weights are in the blocks of a GGUF."""
    if kept := [m.format.name for m in model.modules() if hasattr(m, "weight_blocks")]:
        raise ValueError(f"{quantization}: the weights are in {kept[0]} blocks already; leave --quantize out")
    linears = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    scheme = choose_scheme(quantization, linears, group_size)

    def layer(named: tuple[str, nn.Linear]) -> tuple[str, QuantizedLinear]:
        return named[0], QuantizedLinear.from_linear(named[1], scheme)

    for name, quantized in map_in_threads(layer, _linears(model, scheme)):
        model.set_submodule(name, quantized)
    return scheme
