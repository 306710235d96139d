"""Experts stored as two tensors a layer, as transformers 5 holds them in memory, under the official names of each.

    mlp.experts.gate_up_proj   [experts, 2 * intermediate, hidden], the gate above the up projection
    mlp.experts.down_proj      [experts, hidden, intermediate]

(transformers, models/qwen3_moe/modeling_qwen3_moe.py; its save_pretrained splits them, other tools' savers do not.)
Some tools transpose the last two dimensions; config.json's hidden_size tells.
"""

import re
from typing import Any

import torch

from formats.tensors import TensorInfo
from formats.view import View

FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")


class SplitExperts(View):
    """A checkpoint each of whose experts has its own tensors."""

    def __init__(self, base: Any):
        super().__init__(base)
        self.tensors, self._stored = {}, {}
        for name, info in base.tensors.items():
            match = FUSED.fullmatch(name)
            if match is None or len(info.shape) != 3:
                self.tensors[name] = info
                continue
            experts, part = match.groups()
            parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            transposed = self._is_transposed(name, info.shape, hidden=2 if len(parts) == 2 else 1)
            rows, columns = info.shape[1:][::-1] if transposed else info.shape[1:]
            size = rows // len(parts)
            for expert in range(info.shape[0]):
                for place, own in enumerate(parts):
                    official = f"{experts}.{expert}.{own}.weight"
                    self.tensors[official] = TensorInfo(info.dtype, (size, columns))
                    self._stored[official] = name, expert, transposed, slice(place * size, (place + 1) * size)

    def _is_transposed(self, name: str, shape: tuple[int, ...], hidden: int) -> bool:
        """`hidden`: the dimension that has the hidden size as transformers stores it."""
        size = self.config.get("hidden_size")
        if size not in shape[1:] or (hidden == 2 and shape[1 if shape[2] == size else 2] % 2):
            raise ValueError(f"{self.path}: {name} has shape {list(shape)}, which does not fit hidden_size {size}")
        return shape[hidden] != size

    def read(self, name: str) -> torch.Tensor:
        if name not in self._stored:
            return self.base.read(name)
        stored, expert, transposed, rows = self._stored[name]
        weight = self.base.read(stored)[expert]
        return (weight.T if transposed else weight)[rows].contiguous()

    def release(self, name: str) -> None:
        self.base.release(self._stored[name][0] if name in self._stored else name)
