"""How a tensor is converted: to another dtype, to int8 or int4, to a GGUF's blocks; and the error that this makes."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from formats.compressed_tensors import dequantize, pack, packed_columns
from formats.gguf import types
from formats.gguf.writer import Pack, Planned
from formats.tensors import TensorInfo
from ops import quant
from ops.cpu.library import library
from ops.cpu.variants import FORMS

EMBEDDING = "model.embed_tokens.weight"


class Errors:
    """|stored - source| over the values of one tensor, or of all tensors of one kind."""

    def __init__(self, count: int, largest: float = 0.0, mean: float = 0.0):
        self.tensors, self.count, self.overflowed = 1, count, 0
        self.largest, self.sum = largest, mean * count
        self.squares = self.source_squares = 0.0

    def add(self, source: torch.Tensor, stored: torch.Tensor) -> None:
        """Values that became infinite are counted separately: their error would hide all others."""
        source = source.float()
        difference = (stored.float() - source).abs_()
        largest = difference.max().item()
        if math.isinf(largest):
            self.overflowed += int(difference.isinf().sum())
            largest = difference.masked_fill_(difference.isinf(), 0.0).max().item()
        self.largest = max(self.largest, largest)
        self.sum += difference.sum().item()
        self.squares += difference.square_().sum().item()
        self.source_squares += source.square().sum().item()

    def merge(self, other: "Errors") -> None:
        self.largest = max(self.largest, other.largest)
        for name in ("tensors", "count", "overflowed", "sum", "squares", "source_squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def exact(self) -> bool:
        return self.largest == 0 and self.overflowed == 0

    def to_dict(self) -> dict[str, float]:
        """`relative_error`: the root of the squared errors over the squared values."""
        result = {"largest_error": self.largest, "mean_error": self.sum / max(1, self.count)}
        if self.source_squares:
            result["relative_error"] = math.sqrt(self.squares / self.source_squares)
        return result | ({"overflowed": self.overflowed} if self.overflowed else {})


class Cast:
    """Each tensor in a dtype of its own: `dtypes`, by official name."""

    def __init__(self, dtypes: dict[str, torch.dtype]):
        self.dtypes = dtypes

    def outputs(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        """The tensors that are stored for this one."""
        return {name: TensorInfo(self.dtypes[name], info.shape)}

    def encode(self, name: str, values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Some rows of a tensor → what is stored of them, and what a reader gets back (None: the same values)."""
        cast = values.to(self.dtypes[name])
        return {name: cast}, None if cast.dtype in (values.dtype, torch.float32) else cast

    def type_of(self, name: str) -> str:
        return str(self.dtypes[name]).removeprefix("torch.")


class Quantize(Cast):
    """The linear layers in "int8" or "int4" (ops/quant.py), all else in bfloat16."""

    def __init__(self, tensors: dict[str, TensorInfo], quantization: str, group_size: int | None):
        super().__init__(dict.fromkeys(tensors, torch.bfloat16))
        matrices = [name for name, info in tensors.items() if len(info.shape) == 2 and name != EMBEDDING]
        linears = {name.removesuffix(".weight"): tensors[name].shape for name in matrices}
        self.quantization, self.scheme = quantization, quant.choose_scheme(quantization, linears, group_size)
        self.quantized = {f"{module}.weight" for module in linears if not self.scheme.ignores(module)}

    def outputs(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        if name not in self.quantized:
            return super().outputs(name, info)
        rows, columns = info.shape
        return {
            f"{name}_packed": TensorInfo(torch.int32, (rows, packed_columns(columns, self.scheme.bits))),
            f"{name}_scale": TensorInfo(quant.SCALE_DTYPE, (rows, self.scheme.groups(columns))),
            f"{name}_shape": TensorInfo(torch.int64, (2,)),
        }

    def encode(self, name: str, values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        if name not in self.quantized:
            return super().encode(name, values)
        codes, scale = quant.quantize(values, self.scheme.bits, self.scheme.group_size)
        packed = pack(codes, self.scheme.bits)
        restored = dequantize(packed, scale, self.scheme.bits, values.shape[1])
        return {f"{name}_packed": packed, f"{name}_scale": scale}, restored

    def type_of(self, name: str) -> str:
        return self.quantization if name in self.quantized else super().type_of(name)


def lossless(checkpoint: Any) -> Cast:
    """Each tensor in the dtype that `checkpoint` gives it.

    A GGUF keeps norms in float32 beside 16-bit matrices; where all of them fit the matrices' dtype exactly, they are
    cast back, so that a round trip restores the checkpoint.
    """
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    matrices = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1}
    if checkpoint.path.is_file() and len(matrices) == 1:
        (dtype,) = matrices
        vectors = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 1]
        if all(_fits(checkpoint.read(name), dtype) for name in vectors):
            dtypes |= dict.fromkeys(vectors, dtype)
    return Cast(dtypes)


def _fits(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def gguf_packer(planned: Iterable[Planned]) -> Pack:
    """What makes the bytes of these tensors: pack.cpp where there are blocks and a compiler, else PyTorch."""
    if not any(tensor.format.pack for tensor in planned) or (loaded := library()) is None:
        return types.pack

    def pack_blocks(values: torch.Tensor, format: types.Format) -> types.Packed:
        if not format.pack:
            return types.pack(values, format)
        values = values.contiguous()
        data = torch.empty(format.bytes(values.shape), dtype=torch.uint8)
        error = torch.zeros(2, dtype=torch.float64)
        function = getattr(loaded, f"pack_{str(values.dtype).removeprefix('torch.')}")
        count = values.numel() // format.block
        if not function(FORMS[format.name], values.data_ptr(), count, data.data_ptr(), error.data_ptr()):
            raise ValueError("a value is not finite or too large for the float16 scale of a block")
        return types.Packed(data, *error.tolist())

    return pack_blocks
