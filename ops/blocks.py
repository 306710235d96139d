"""Weights that stay in the blocks of a GGUF file, where they lie: the token step in C++ computes with them in place.

What the step does not serve is computed in PyTorch from dequantised rows, a slice at a time, so that the whole weight
is never in memory in another type. model.py knows nothing of this: `swap_blocks` replaces its matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from formats.gguf import types
from formats.gguf.types import Format

TYPES = ("F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")  # that can stay
SLICE = 1 << 21  # weights that are dequantised at a time in a forward pass


class Blocks(nn.Module):
    """A matrix [rows, columns] as the bytes of a GGUF tensor type: `weight_blocks`, uint8 [rows, bytes of a row]."""

    def __init__(self, rows: int, columns: int, format: Format, device=None):
        super().__init__()
        self.shape, self.format = (rows, columns), format
        blocks = torch.empty(rows, format.bytes((columns,)), dtype=torch.uint8, device=device)
        self.register_buffer("weight_blocks", blocks, persistent=False)

    def dequantize(self, rows: slice | torch.Tensor = slice(None), dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Some rows of the weight, [rows, columns]."""
        data = self.weight_blocks[rows].contiguous()
        return types.dequantize(data.view(-1), self.format, (len(data), self.shape[1])).to(dtype)

    def is_finite(self) -> bool:
        return types.all_finite(self.weight_blocks.flatten(), self.format)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] → x·Wᵀ [..., rows]."""
        step = max(1, SLICE // self.shape[1])
        parts = [self.dequantize(slice(i, i + step), x.dtype) for i in range(0, self.shape[0], step)]
        return torch.cat([F.linear(x, part) for part in parts], -1)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """As values under the official name: what `save_pretrained` writes can be read everywhere."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        is_meta = self.weight_blocks.is_meta
        destination[f"{prefix}weight"] = torch.empty(self.shape, device="meta") if is_meta else self.dequantize()

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.format.name}"


class BlockLinear(Blocks):
    """y = x·Wᵀ + b."""

    def __init__(self, linear: nn.Linear, format: Format):
        super().__init__(linear.out_features, linear.in_features, format, linear.weight.device)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        out = self.multiply(x)
        return out if self.bias is None else out + self.bias


class BlockEmbedding(Blocks):
    """A row for each token id, in `dtype`. A tied head multiplies by the same matrix."""

    def __init__(self, embedding: nn.Embedding, format: Format, dtype: torch.dtype):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, format, embedding.weight.device)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] → [..., columns]."""
        return self.dequantize(ids.flatten(), self.dtype).view(*ids.shape, -1)


def swap_blocks(model: nn.Module, checkpoint: Any, dtype: torch.dtype) -> dict[str, Blocks]:
    """Replaces the matrices of a model on the meta device that are not stored in `dtype` by empty ones in blocks.

    Returns them by the official name of their weight.
    """
    found = {}
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear | nn.Embedding) or name not in checkpoint.tensors:
            continue
        format = checkpoint.format_of(name)
        if not format or format.name not in TYPES or format.dtype == dtype:
            continue
        if checkpoint.tensors[name].shape == module.weight.shape:
            linear = isinstance(module, nn.Linear)
            found[name] = BlockLinear(module, format) if linear else BlockEmbedding(module, format, dtype)
            model.set_submodule(path, found[name])
    return found
