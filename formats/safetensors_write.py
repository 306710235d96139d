"""Write safetensors as a stream: the header first, from just names, types and shapes, then the tensors piece by piece.

The safetensors library's own `save_file` needs every tensor in memory at once. The layout is the official one:
`model.safetensors`, or shards `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from formats.shards import INDEX
from formats.tensors import DTYPES, TensorInfo

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where the bytes of a tensor are: file name, offset in the file, size."""

    file: str
    offset: int
    size: int


class Shard(NamedTuple):
    """One file to be written: its name, its first bytes (length and JSON header), each tensor's offset, its size."""

    name: str
    head: bytes
    places: dict[str, Place]
    size: int


def plan_shards(tensors: dict[str, TensorInfo], max_size: int) -> list[Shard]:
    """Splits tensors, in their order, into files of at most `max_size` bytes; a larger tensor gets its own file."""
    groups, filled = [[]], 0
    for name, info in tensors.items():
        size = _size(info)
        if groups[-1] and filled + size > max_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [_plan_shard(name, {t: tensors[t] for t in group}) for name, group in zip(names, groups, strict=True)]


def _size(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _plan_shard(name: str, tensors: dict[str, TensorInfo]) -> Shard:
    header, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    # Wide types first, as the safetensors library orders them, so that each tensor is aligned to its item size.
    for tensor, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[tensor] = end
        end += _size(info)
        header[tensor] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[tensor], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = {tensor: Place(name, len(head) + offsets[tensor], _size(info)) for tensor, info in tensors.items()}
    return Shard(name, head, places, len(head) + end)


def index_text(shards: list[Shard]) -> str:
    """The index of several shards: which file holds which tensor."""
    weight_map = {tensor: shard.name for shard in shards for tensor in shard.places}
    total = sum(place.size for shard in shards for place in shard.places.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


class SafetensorsWriter:
    """Writes planned shards into a directory: `append` takes the next values of a tensor, tensors come in any order."""

    def __init__(self, directory: Path, shards: list[Shard]):
        self.directory, self._shards = directory, shards
        self._places = {name: place for shard in shards for name, place in shard.places.items()}
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {name: hashlib.sha256() for name in self._places}
        self._written = dict.fromkeys(self._places, 0)

    def sha256(self, name: str) -> str:
        """The digest of a tensor's bytes, once they are all written."""
        assert self._written[name] == self._places[name].size, f"{name} was not completely written"
        return self._hashes[name].hexdigest()

    def __enter__(self) -> "SafetensorsWriter":
        for shard in self._shards:
            self._files[shard.name] = (self.directory / shard.name).open("wb")
            self._files[shard.name].write(shard.head)
        return self

    def append(self, name: str, values: torch.Tensor) -> int:
        """Writes the next values of a tensor; returns how many bytes they were."""
        data = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
        place, file = self._places[name], self._files[self._places[name].file]
        assert self._written[name] + len(data) <= place.size, name
        file.seek(place.offset + self._written[name])
        file.write(data)
        self._hashes[name].update(data)
        self._written[name] += len(data)
        return len(data)

    def __exit__(self, failed: type | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if failed is None:
            assert all(self._written[name] == place.size for name, place in self._places.items())
            if len(self._shards) > 1:
                (self.directory / INDEX).write_text(index_text(self._shards), encoding="utf-8")
