"""GGUF, llama.cpp's container: a strict reader, and the checkpoint that such a file holds.

The format (ggml/docs/gguf.md), little-endian: the magic "GGUF", version, number of tensors, number of key-value pairs;
the pairs; for each tensor its name, shape (innermost dimension first), type and offset; then, padded to
`general.alignment`, the tensors' bytes in the same order. Every count, length and offset is checked against the size of
the file before it is used, and the tensors must fill the file exactly.

The names are translated in formats/gguf/names.py, the tokenizer in formats/gguf/tokenizer.py, the blocks of quantised
values are explained in formats/gguf/kquants.py, and formats/gguf/writer.py writes what this file reads.
"""

import io
import mmap
import struct
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch

from formats.gguf import names, types
from formats.gguf.files import part_names
from formats.gguf.tokenizer import from_metadata
from formats.mapping import map_file, release
from formats.mistaken import mistaken
from formats.tensors import TensorInfo

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

# Far above any real file (Qwen3-235B: 1,131 tensors, some 300,000 strings), and read within seconds.
MAX_PAIRS, MAX_TENSORS, MAX_VALUES, MAX_NESTING = 1 << 14, 1 << 16, 1 << 22, 3
MAX_NAME = 64  # GGML_MAX_NAME


class Tensor(NamedTuple):
    """One tensor as the file describes it: its shape in torch's order and where its bytes are in the file."""

    format: types.Format
    shape: tuple[int, ...]
    start: int
    size: int


def padded(size: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-size // alignment) * alignment


class Head:
    """The head of one GGUF file: `metadata`, `types` (of its values), `elements` (of its arrays), `tensors`."""

    def __init__(self, path: str | Path, data: mmap.mmap | bytes):
        self.path, self.data, self.size = path, data, len(data)
        self.position, self.values = 0, 0
        if data[:4] != MAGIC:
            if found := mistaken(bytes(data[:64])):
                raise ValueError(f"{path}: {found}")
            self.fail(f"the first four bytes are {bytes(data[:4])!r}, not {MAGIC!r}", "give a .gguf file")
        self.position = 4
        version = self.number("I", "the version")
        if version not in (2, 3):
            big = version in (2 << 24, 3 << 24)
            self.fail(
                f"version {version} is not supported" + (" (a big-endian file)" if big else ""),
                "give a little-endian GGUF of version 2 or 3",
            )
        tensor_count = self.count("Q", MAX_TENSORS, 24, "tensors")
        pair_count = self.count("Q", MAX_PAIRS, 13, "metadata pairs")
        self.metadata = self.read_metadata(pair_count)
        self.alignment = self.read_alignment()
        self.tensors = self.read_tensors(tensor_count)

    def fail(self, problem: str, fix: str = "download or convert the file again") -> NoReturn:
        raise ValueError(f"{self.path}: {problem} ({fix})")

    def take(self, size: int, what: str) -> int:
        """Moves past `size` bytes and returns where they begin."""
        start = self.position
        if size > self.size - start:
            self.fail(f"{what} needs {size} bytes at {start}, but the file ends at {self.size}")
        self.position = start + size
        return start

    def number(self, letter: str, what: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.data, self.take(struct.calcsize("<" + letter), what))
        return value

    def count(self, letter: str, limit: int, least_size: int, what: str) -> int:
        """A count of things that take at least `least_size` bytes each."""
        count = self.number(letter, f"the count of {what}")
        if count > limit or count * least_size > self.size - self.position:
            self.fail(f"{count} {what} cannot be in {self.size - self.position} bytes (the limit is {limit})")
        return count

    def string(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def strings(self, count: int, key: str) -> list[str]:
        """An array of strings. A vocabulary has 300,000: hence a loop without calls; `string` names what is wrong."""
        data, position, result = self.data, self.position, []
        read_length = struct.Struct("<Q").unpack_from
        while len(result) < count:
            start = position + 8
            end = start + read_length(data, position)[0] if start <= self.size else self.size + 1
            try:
                if end > self.size:
                    raise UnicodeError
                result.append(data[start:end].decode("utf-8"))
            except UnicodeError:
                self.position = position
                return [*result, self.string(key)]  # which fails
            position = end
        self.position = position
        return result

    def value(self, kind: int, key: str, nesting: int = 0) -> Any:
        if kind in types.LETTERS:
            if kind == 7 and self.position < self.size and self.data[self.position] > 1:
                self.fail(f"{key} is a boolean of value {self.data[self.position]}")
            return self.number(types.LETTERS[kind], key)
        if kind == types.STRING:
            return self.string(key)
        if kind != types.ARRAY:
            self.fail(f"{key} has the unknown value type {kind}")
        if nesting == MAX_NESTING:
            self.fail(f"{key} nests arrays more than {MAX_NESTING} deep")
        kind = self.number("I", key)
        self.elements.setdefault(key, kind)
        letter = types.LETTERS.get(kind)
        least_size = struct.calcsize("<" + letter) if letter else {types.STRING: 8, types.ARRAY: 12}.get(kind, 1)
        count = self.count("Q", MAX_VALUES - self.values, least_size, f"values of {key}")
        self.values += count
        if letter and kind != 7:
            start = self.take(count * least_size, key)
            return np.frombuffer(self.data, np.dtype(letter).newbyteorder("<"), count, start).tolist()
        if kind == types.STRING:
            return self.strings(count, key)
        return [self.value(kind, key, nesting + 1) for _ in range(count)]

    def read_metadata(self, count: int) -> dict[str, Any]:
        metadata, self.types, self.elements = {}, {}, {}
        for index in range(count):
            key = self.string(f"the name of metadata pair {index}")
            if not key or len(key) > 0xFFFF or not key.isascii() or not key.isprintable():
                self.fail(f"metadata pair {index} has the impossible name {key[:80]!r}")
            if key in metadata:
                self.fail(f"the metadata key {key} occurs twice")
            self.types[key] = self.number("I", f"the type of {key}")
            metadata[key] = self.value(self.types[key], key)
        return metadata

    def read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
        return alignment

    def read_tensor_info(self, index: int) -> tuple[str, types.Format, tuple[int, ...], int]:
        name = self.string(f"the name of tensor {index}")
        if not name or len(name) > MAX_NAME or not name.isascii() or not name.isprintable():
            self.fail(f"tensor {index} has the impossible name {name[:80]!r}")
        if any(part in name for part in ("/", "\\", "..")):
            self.fail(f"the tensor name {name!r} has path parts")
        dimensions = self.number("I", f"the number of dimensions of {name}")
        if not 1 <= dimensions <= 4:
            self.fail(f"{name} has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
        kind = self.number("I", f"the type of {name}")
        try:
            format = types.format_of(kind)
        except ValueError as error:
            self.fail(f"{name} is of {error}", "give another quantisation of this model")
        if 0 in shape or any(length >= 1 << 40 for length in shape):
            self.fail(f"{name} has the impossible shape {list(shape)}")
        if shape[-1] % format.block:
            self.fail(f"the rows of {name} have {shape[-1]} values, not whole {format.name} blocks of {format.block}")
        return name, format, shape, self.number("Q", f"the offset of {name}")

    def read_tensors(self, count: int) -> dict[str, Tensor]:
        infos = [self.read_tensor_info(index) for index in range(count)]
        begin = end = padded(self.position, self.alignment)
        tensors = {}
        for name, format, shape, offset in infos:
            if name in tensors:
                self.fail(f"the tensor {name} occurs twice")
            start, expected = begin + offset, padded(end, self.alignment)
            if offset % self.alignment:
                self.fail(f"the offset {offset} of {name} is not a multiple of {self.alignment}")
            if start != expected:
                problem = "overlaps the tensor before it" if start < expected else "leaves a gap before it"
                self.fail(f"{name} at {start} {problem}, which ends at {end}")
            size = format.bytes(shape)
            end = start + size
            if end > self.size:
                self.fail(f"{name} ends at {end}, but the file has {self.size} bytes")
            tensors[name] = Tensor(format, shape, start, size)
        if self.size > padded(end, self.alignment):
            self.fail(f"{self.size - end} bytes follow the last tensor, which ends at {end}")
        return tensors


def parse(path: str | Path, stream: BinaryIO, size: int) -> Head:
    """The header of an open GGUF file, or of one in memory, of any architecture."""
    try:
        data: mmap.mmap | bytes = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except io.UnsupportedOperation:
        stream.seek(0)
        data = stream.read(size)
    return Head(path, data)


# The header that was parsed last, for whoever opens the same file next: a chat is opened just before its model. It
# holds no mapping, so that two models of a file do not share memory.
_last: dict[tuple, Head] = {}


def _head(path: Path) -> Head:
    status = path.stat()
    if not status.st_size:
        raise ValueError(f"{path}: the file is empty (download or convert it again)")
    key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    data, known = map_file(path), _last.pop(key, None)
    if known is not None:
        known.data = data
        return known
    head = Head(path, data)
    kept = copy(head)
    kept.data, kept.metadata = b"", dict(head.metadata)
    _last.clear()
    _last[key] = kept
    return head


def _open_parts(path: Path) -> list[Head]:
    """The headers of all parts of this file's model."""
    head = _head(path)
    count = head.metadata.get("split.count", 0)
    if type(count) is not int or count < 2:
        return [head]
    parts = [path.with_name(name) for name in part_names(path.name)]
    if len(parts) != count:
        wanted = f"NAME-00001-of-{count:05d}.gguf"
        raise ValueError(f"{path}: one of {count} parts of a model; give all of them their names again ({wanted}, …)")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ValueError(f"{path}: the model has {count} parts; beside it {', '.join(missing[:4])}{more} are missing")
    heads = [head if part == path else _head(part) for part in parts]
    names = [name for head in heads for name in head.tensors]
    for number, (part, head) in enumerate(zip(parts, heads, strict=True)):
        if (head.metadata.get("split.no"), head.metadata.get("split.count")) != (number, count):
            raise ValueError(f"{part}: by its metadata not part {number + 1} of {count}, as its name says")
    if len(set(names)) != len(names) or heads[0].metadata.get("split.tensors.count", len(names)) != len(names):
        raise ValueError(
            f"{path}: the parts hold {len(names)} tensors, not those of one model; take all from the same source"
        )
    return heads


class GGUF:
    """A checkpoint in a .gguf file, or in the parts of one, of the architecture qwen3, qwen3moe or qwen2, under its
    official names.

    Everything but the tensors' values is read and checked when it is opened; a file that is not right in every respect
    is a `ValueError` that names the file and the place. The tensors stay in the file (memory-mapped) until `read`.

    `path`: the file that was named; `files`: it, or all parts. `metadata`: the GGUF keys; `types`, `elements`: the GGUF
    types of the values and of the arrays' elements. `config`, `generation_config`: the fields of the official JSON
    files. `tensors`: official name -> (dtype, shape) of what `read` returns, in the file's order; the experts, which
    GGUF stacks, each under their own name.
    """

    def __init__(self, path: str | Path):
        self.path = self.text_path = Path(path)
        heads = _open_parts(self.path)
        self.files = [head.path for head in heads]
        self.metadata, self.types, self.elements = heads[0].metadata, heads[0].types, heads[0].elements
        self.alignment = heads[0].alignment
        self.stored = {name: tensor for head in heads for name, tensor in head.tensors.items()}
        self._data = {name: head.data for head in heads for name in head.tensors}
        try:
            self.config = names.config_from_metadata(self.metadata, self.stored)
            self.generation_config = names.generation_config_from_metadata(self.metadata)
            self._places = names.official_places(self.stored, self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.tensors = {name: self._info(*place) for name, place in self._places.items()}

    def _info(self, stored_name: str, expert: int | None) -> TensorInfo:
        format, shape = self.stored[stored_name][:2]
        return TensorInfo(format.dtype or torch.float32, shape if expert is None else shape[1:])

    def _range(self, name: str) -> tuple[int, int]:
        """Where the bytes of a tensor begin and how many they are."""
        stored_name, expert = self._places[name]
        _, shape, start, size = self.stored[stored_name]
        if expert is None:
            return start, size
        return start + expert * (size // shape[0]), size // shape[0]

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its official name: F32, F16 and BF16 as stored (a view of the file), others dequantised to
        float32."""
        format, shape, data = self.format_of(name), self.tensors[name].shape, self._bytes(name)
        return data.view(format.dtype).view(shape) if format.dtype else types.dequantize(data, format, shape)

    def format_of(self, name: str) -> types.Format:
        """The type that a tensor is stored in."""
        return self.stored[self._places[name][0]].format

    def blocks(self, name: str) -> torch.Tensor:
        """A matrix as it is stored: uint8 [rows, bytes of a row], a view of the file."""
        return self._bytes(name).view(self.tensors[name].shape[0], -1)

    def _bytes(self, name: str) -> torch.Tensor:
        start, size = self._range(name)
        return torch.frombuffer(self._data[self._places[name][0]], dtype=torch.uint8, count=size, offset=start)

    def release(self, name: str) -> None:
        """Releases the memory of a tensor's pages; its values stay readable (from the file again)."""
        start, size = self._range(name)
        release(self._data[self._places[name][0]], start, start + size)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in file order, one in memory at a time: use each before asking for the next."""
        for name in self.tensors:
            yield name, self.read(name)
            self.release(name)

    def tokenizer(self, check_merges: bool = True) -> tuple[dict, dict]:
        """(tokenizer.json, tokenizer_config.json) as Hugging Face's tokenizers would have them: equal ids for every
        text. Raises ValueError where the file holds another tokenizer than Qwen's byte-level BPE. `check_merges`:
        False for load_tokenizer (formats/tokenizer_files.py), which checks them by itself."""
        try:
            return from_metadata(self.metadata, self.config["vocab_size"], check_merges)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
