"""GGUF's types, in one table each: of metadata values, and of tensors.

The tensor types that we write, or meet most, are explained in formats/gguf/kquants.py; every other one that the gguf
package can dequantise (IQ1_S to IQ4_XS, TQ1_0, MXFP4, …) is read by that package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from formats import tensors
from formats.gguf.kquants import (
    pack_k_offset,
    pack_offset,
    pack_q6_k,
    pack_q8_0,
    pack_symmetric,
    unpack_k_offset,
    unpack_offset,
    unpack_q2_k,
    unpack_q3_k,
    unpack_q6_k,
    unpack_q8_0,
    unpack_symmetric,
)

# Types of metadata values: the struct letters of those with a fixed size, then the two that have a length.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}

TILE = 1 << 17  # values processed at a time: the temporaries stay in the cache
PIECE = 1 << 22  # values that one thread is given at a time


@dataclass(frozen=True)
class Format:
    """One type of tensor data. `block` values take `size` bytes; `dtype` is torch's, None where values are in blocks.

    `pack(x)`: float32 [blocks, block] -> uint8 [blocks, size]. `unpack(data)`: the inverse.
    """

    name: str
    id: int
    block: int
    size: int
    dtype: torch.dtype | None = None
    pack: Callable[[torch.Tensor], torch.Tensor] | None = None
    unpack: Callable[[torch.Tensor], torch.Tensor] | None = None
    scales: tuple[int, ...] = ()  # where in a block the float16 scales are: the only parts that may not be finite

    def bytes(self, shape: tuple[int, ...]) -> int:
        """The bytes of a tensor whose rows are whole blocks."""
        count = 1
        for length in shape:
            count *= length
        return count // self.block * self.size


FORMATS = {
    format.name: format
    for format in (
        Format("F32", 0, 1, 4, torch.float32),
        Format("F16", 1, 1, 2, torch.float16),
        Format("BF16", 30, 1, 2, torch.bfloat16),
        Format("Q8_0", 8, 32, 34, None, pack_q8_0, unpack_q8_0, (0,)),
        Format("Q4_0", 2, 32, 18, None, partial(pack_symmetric, bits=4), partial(unpack_symmetric, bits=4), (0,)),
        Format("Q4_1", 3, 32, 20, None, partial(pack_offset, bits=4), partial(unpack_offset, bits=4), (0, 2)),
        Format("Q5_0", 6, 32, 22, None, partial(pack_symmetric, bits=5), partial(unpack_symmetric, bits=5), (0,)),
        Format("Q5_1", 7, 32, 24, None, partial(pack_offset, bits=5), partial(unpack_offset, bits=5), (0, 2)),
        Format("Q2_K", 10, 256, 84, None, None, unpack_q2_k, (80, 82)),
        Format("Q3_K", 11, 256, 110, None, None, unpack_q3_k, (108,)),
        Format("Q4_K", 12, 256, 144, None, partial(pack_k_offset, bits=4), partial(unpack_k_offset, bits=4), (0, 2)),
        Format("Q5_K", 13, 256, 176, None, partial(pack_k_offset, bits=5), partial(unpack_k_offset, bits=5), (0, 2)),
        Format("Q6_K", 14, 256, 210, None, pack_q6_k, unpack_q6_k, (208,)),
    )
}
BY_ID = {format.id: format for format in FORMATS.values()}


def quantize(values: torch.Tensor, format: Format) -> torch.Tensor:
    """The bytes (uint8, flat) of values of any float type in a format, one tile after the other.

    The values are whole blocks. Raises ValueError for values that the format cannot hold.
    """
    if format.dtype:
        return values.to(format.dtype).contiguous().view(-1).view(torch.uint8)
    blocks = values.reshape(-1, format.block)
    out = torch.empty(len(blocks), format.size, dtype=torch.uint8)
    rows = TILE // format.block
    for start in range(0, len(blocks), rows):
        out[start : start + rows] = format.pack(blocks[start : start + rows].float())
    return out.view(-1)


class Packed(NamedTuple):
    """Values in a format: their bytes (uint8, flat), and the largest and the sum of |stored - value|."""

    data: torch.Tensor
    largest: float
    total: float


def pack(values: torch.Tensor, format: Format) -> Packed:
    """`quantize`, and the error that it makes."""
    data = quantize(values, format)
    if format.dtype in (values.dtype, torch.float32):
        return Packed(data, 0.0, 0.0)
    error = dequantize(data, format, values.shape).sub_(values).abs_()
    return Packed(data, error.max().item(), error.sum(dtype=torch.float64).item())


@lru_cache(maxsize=64)
def format_of(id: int) -> Format:
    """The tensor type of a number in a file. ValueError names one whose values cannot be read here."""
    if id in BY_ID:
        return BY_ID[id]
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(id)
    except ValueError:
        raise ValueError(f"type number {id}, which is newer than the gguf package here, or none") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"type {kind.name}, whose values the gguf package can't read") from None
    return Format(kind.name, id, block, size, None, None, partial(_dequantize_by_package, kind=kind))


def _dequantize_by_package(data: torch.Tensor, kind: int) -> torch.Tensor:
    import gguf

    with np.errstate(all="ignore"):  # what is not finite is found by whoever asked
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind))


def all_finite(data: torch.Tensor, format: Format) -> bool:
    """Whether no value of a tensor's bytes is NaN or infinite, for a type of numbers or one that lists its `scales`."""
    if format.dtype:
        return tensors.all_finite(data.view(format.dtype))
    blocks = data.view(-1, format.size)
    halves = [blocks[:, at : at + 2].contiguous().view(torch.float16) for at in format.scales]
    return all(map(tensors.all_finite, halves))


def dequantize(data: torch.Tensor, format: Format, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 values of a tensor's bytes (uint8)."""
    if format.dtype:
        return data.view(format.dtype).view(shape).float()
    blocks = data.view(-1, format.size)
    values = torch.empty(len(blocks), format.block)
    rows = TILE // format.block
    for start in range(0, len(blocks), rows):
        values[start : start + rows] = format.unpack(blocks[start : start + rows])
    return values.view(shape)
