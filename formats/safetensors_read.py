"""A directory in the official layout: strict checks first, then one tensor at a time by its official name.

The safetensors format (https://github.com/huggingface/safetensors#format): 8 bytes of header length N, little-endian,
N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, contiguous and without holes. Files are
untrusted, so every count, offset and name is checked against the file's size before anything is read.
Weights are memory-mapped: nothing is copied until it is changed, and `release` frees the pages.
"""

import json
import math
import re
from collections.abc import Iterator
from os.path import lexists
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch

from formats.json_file import read_json
from formats.mapping import map_file, release
from formats.mistaken import PICKLE_SUFFIXES, mistaken, other_weights
from formats.shards import INDEX, SINGLE, weight_files
from formats.tensors import DTYPES, OTHER_DTYPES, WHAT_NOW, TensorInfo

MAX_HEADER = 32_000_000  # bytes; the names of 10^5 tensors stay far below, and parsing it stays within a gigabyte
MAX_NAME = 256  # characters; the official names stay below 60
SHARD_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")


# Where older AutoGPTQ and AutoAWQ say how they quantised; newer ones, in config.json.
SEPARATE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class SafetensorsFile:
    """One .safetensors file, its header checked, its data mapped copy-on-write (in-place changes stay private)."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors, self._offsets = _read_header(path)
        self._map = map_file(path)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapping."""
        dtype, shape = self.tensors[name]
        start, end = self._offsets[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=start).view(shape)

    def release(self, name: str) -> None:
        """Releases the memory of a tensor's pages; its values stay readable (from the file again)."""
        release(self._map, *self._offsets[name])


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Names, types, shapes and absolute byte ranges of a safetensors file, in the order of their bytes."""
    if not path.is_file():
        raise ValueError(f"{path}: not a file, or a link to one that is gone; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        is_whole = len(start) == 8 and 0 < length <= min(size - 8, MAX_HEADER)
        # A header of, say, 640 bytes begins like a pickle too: 640 is 0x0280, stored as 80 02.
        pickle = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if pickle and not (is_whole and file.peek(1)[:1] == b"{"):
            raise ValueError(f"{path}: a pickle, which can run code and is never opened; get the safetensors version")
        if not is_whole:
            rest = file.peek(56)[:56]
            if not rest.startswith(b"{") and (found := mistaken(start + rest)):
                raise ValueError(f"{path}: {found}")
            _fail(path, f"not a whole safetensors file (header of {length:,} bytes, file of {size:,})")
        header = file.read(length)
    infos, offsets = parse_header(path, header, size - 8 - length)
    base = 8 + length
    return infos, {name: (base + a, base + b) for name, (a, b) in offsets.items()}


def parse_header(
    path: str | Path, header: bytes, data: int
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Names, types, shapes and byte ranges within the `data` bytes after a header, in the order of their bytes."""
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fail(path, f"the safetensors header is not valid JSON ({str(error)[:80]})")
    if not isinstance(entries, dict):
        _fail(path, "the safetensors header is not a JSON object")
    entries.pop("__metadata__", None)
    infos, offsets = {}, {}
    for name, entry in entries.items():
        infos[name], offsets[name] = _read_entry(path, name, entry, data)
    order = sorted(offsets, key=offsets.__getitem__)
    end = 0
    for name in order:
        if offsets[name][0] != end:
            kind = "overlaps the one before it" if offsets[name][0] < end else "leaves a hole before it"
            _fail(path, f"tensor {name} {kind}")
        end = offsets[name][1]
    if end != data:
        _fail(path, f"{data - end:,} bytes belong to no tensor")
    return {name: infos[name] for name in order}, offsets


def _fail(path: str | Path, problem: str) -> NoReturn:
    raise ValueError(f"{path}: {problem}; download or save the file again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _read_entry(path: str | Path, name: str, entry: Any, data: int) -> tuple[TensorInfo, tuple[int, int]]:
    if len(name) > MAX_NAME or not name.isprintable():
        _fail(path, f"a tensor has the impossible name {name[:80]!r}")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        _fail(path, f"tensor {name} lacks dtype, shape or data_offsets")
    if isinstance(dtype, str) and dtype in OTHER_DTYPES:
        raise ValueError(f"{path}: tensor {name} is of the type {dtype}, which is not read here; {WHAT_NOW}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fail(path, f"tensor {name} has dtype {str(dtype)[:40]!r}, which is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, (*shape, start, end))):
        _fail(path, f"tensor {name} has an impossible shape or offset")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end > data:
        _fail(path, f"tensor {name} ends {end - data:,} bytes past the end of the file")
    if end - start != needed:
        _fail(path, f"tensor {name} of shape {shape} needs {needed:,} bytes but has {end - start:,}")
    return TensorInfo(DTYPES[dtype], tuple(shape)), (start, end)


class Checkpoint:
    """A directory in the official layout: config.json and the weights in one .safetensors file or in shards.

    An index, where there is one, must agree with the shards; without one their own headers say what they hold.

    `tensors` maps each stored name to its dtype and shape without reading any weight, `shards` to the file it is in.
    """

    def __init__(self, path: Path):
        self.path = self.text_path = path
        self.config = read_json(path / "config.json")
        for name, method in SEPARATE.items():
            if self.config.get("quantization_config") is None and (path / name).is_file():
                self.config["quantization_config"] = {"quant_method": method} | read_json(path / name)
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if lexists(generation) else {}
        self.files = _weight_files(path)
        self._parts = [SafetensorsFile(file) for file in self.files]
        self._part: dict[str, SafetensorsFile] = {}
        copies = set()
        for part in self._parts:
            for name in part.tensors:
                first = self._part.setdefault(name, part)
                if first is not part:
                    if not _same(first, part, name):
                        _fail(part.path, f"tensor {name} is also in {first.path.name}, with other values")
                    copies.add((name, part.path.name))
        self.tensors = {name: part.tensors[name] for name, part in self._part.items()}
        self.shards = {name: part.path.name for name, part in self._part.items()}
        _check_index(path, self.shards, copies)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored; a view of the memory-mapped file."""
        return self._part[name].read(name)

    def release(self, name: str) -> None:
        """Releases the pages of one tensor, for iteration over files larger than memory."""
        self._part[name].release(name)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in file order, one in memory at a time: use each before asking for the next."""
        for name in self.tensors:
            yield name, self.read(name)
            self.release(name)


def _same(first: SafetensorsFile, second: SafetensorsFile, name: str) -> bool:
    """Whether two files hold the same bytes under a name, as shards do that share a tensor."""
    if first.tensors[name] != second.tensors[name]:
        return False
    values = [file.read(name).reshape(-1).view(torch.uint8) for file in (first, second)]
    same = torch.equal(*values)
    for file in (first, second):
        file.release(name)
    return same


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, after the index's names were checked. Pickles are refused, not read."""
    if lexists(path / INDEX) and not lexists(path / SINGLE):  # a dangling link counts as there
        return [path / shard for shard in sorted(set(_weight_map(path / INDEX).values()))]
    try:
        files = weight_files(file.name for file in path.iterdir())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if files:
        return [path / name for name in files]
    names = [file.name for file in path.iterdir()]
    pickles = sorted(name for name in names if PurePath(name).suffix in PICKLE_SUFFIXES and "openvino" not in name)
    if pickles:
        raise ValueError(
            f"{path}: only pickle weights ({pickles[0]}), which can run code and are never opened; "
            "get the safetensors version of this model"
        )
    if found := other_weights([*names, *(file.name for file in path.glob("onnx/*.onnx"))]):
        raise ValueError(f"{path}: no safetensors, {found}")
    raise ValueError(f"{path}: no weights; neither {SINGLE} nor {INDEX} nor another .safetensors file is there")


def _weight_map(index: Path) -> dict[str, str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index}: no weight_map that names the shard of each tensor")
    for shard in set(map(str, shards.values())):
        # A plain name only: a path could point anywhere on the reader's disk.
        if not SHARD_NAME.fullmatch(shard):
            raise ValueError(f"{index}: shard {shard[:80]!r} is not the plain name of a .safetensors file beside it")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index}: shard {shard} is not there; download it again")
    return shards


def _check_index(path: Path, actual: dict[str, str], copies: set[tuple[str, str]]) -> None:
    """Where there are shards, the index and the shards' own headers must name the same tensors in the same places, or
    in those of their copies."""
    index = path / INDEX
    if (path / SINGLE).exists() or not index.exists():
        return
    stated = _weight_map(index)
    wrong = [
        name
        for name in {**stated, **actual}
        if stated.get(name) != actual.get(name) and (name, stated.get(name)) not in copies
    ]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{index}: tensor {name} is stated in {stated.get(name, 'no file')} but is in "
            f"{actual.get(name, 'no file')} ({len(wrong)} such tensors); the index belongs to other shards"
        )
