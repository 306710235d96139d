"""Writes a checkpoint as GGUF, byte-identical to what llama.cpp's converter and quantiser write for it.

    write_gguf(checkpoint, path, type, on_tensor=None)    type: f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q4_k_s q4_k_m ...
    write_qwen3c(checkpoint, path, on_tensor=None)        f32 for the C program qwen3.c, with its text files beside it
    plan(checkpoint, type)                                the tensors to be written, with names, formats and sizes

`checkpoint` is what `open_checkpoint` returns. `path` is written directly: the caller gives a temporary name and
renames. Tensors pass through one at a time and in pieces, so memory does not grow with the model.
`on_tensor(name, bytes)` is called as bytes reach the file, some MB at a time; the call returns, for each tensor,
(largest, mean) of the absolute error of its stored values. `pack` makes the bytes: the one of formats/gguf/types.py, or
what does the same faster (ops/encode.py).

convert_hf_to_gguf.py writes f32, f16, bf16 and q8_0; llama-quantize makes the others out of its bf16 or f32 file, with
the tensors and two keys in another order. Both orders are kept here: the files can be compared with cmp.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from formats.config_json import published_spelling
from formats.gguf import metadata, names, types
from formats.gguf.reader import DEFAULT_ALIGNMENT, MAGIC, padded
from formats.threads import map_in_threads

TYPES = tuple(names.FILE_TYPES)
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # written by the converter, all others by the quantiser
DEFAULT_FORMAT = {"q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}  # the others are named like their format
READ = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)  # the others pass through float32, as there
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are not whole blocks of 256
OnTensor = Callable[[str, int], None]
Pack = Callable[[torch.Tensor, types.Format], types.Packed]


@dataclass
class Planned:
    """One tensor of the file to be: the official names it is read from (experts: all of a kind) and how it is kept."""

    name: str
    sources: list[str]
    shape: tuple[int, ...]
    format: types.Format = field(default_factory=lambda: types.FORMATS["F32"])

    @property
    def size(self) -> int:
        return self.format.bytes(self.shape)


def plan(checkpoint: Any, type: str) -> list[Planned]:
    """Every tensor of the GGUF in its order, with its format."""
    if type not in TYPES:
        raise ValueError(f"the GGUF type {type} is not known (give one of {', '.join(TYPES)})")
    tensors = _stacked(checkpoint)
    if type in CONVERTED:
        for tensor in tensors:
            tensor.format = _converted_format(tensor, type)
    else:
        tensors.sort(key=_quantizer_order)
        _choose_formats(tensors, type, checkpoint.config)
    return tensors


def _stacked(checkpoint: Any) -> list[Planned]:
    """The tensors in the converter's order: shard by shard and by name; experts when the last one of a layer came."""
    officials = list(checkpoint.tensors)
    if checkpoint.path.is_dir():
        officials.sort(key=lambda official: (checkpoint.shards.get(official, ""), official))
    experts = names.expert_count(checkpoint.config)
    tensors, pending = [], {}
    for official in officials:
        name, shape = names.gguf_name(official), checkpoint.tensors[official].shape
        if names.expert_number(official) is None:
            tensors.append(Planned(name, [official], shape))
            continue
        layer = pending.setdefault(name.rpartition(".ffn_")[0], {})
        layer.setdefault(name, []).append(official)
        if sum(map(len, layer.values())) == 3 * experts:
            for kind in names.EXPERTS.values():
                tensors.append(_stack(checkpoint, f"{name.rpartition('.ffn_')[0]}.{kind}.weight", layer, experts))
            del pending[name.rpartition(".ffn_")[0]]
    if pending:
        raise ValueError(f"{checkpoint.path}: {', '.join(pending)} do not have {experts} whole experts")
    return tensors


def _stack(checkpoint: Any, name: str, layer: dict[str, list[str]], experts: int) -> Planned:
    sources = sorted(layer.get(name, []), key=names.expert_number)
    shapes = {checkpoint.tensors[source].shape for source in sources}
    if [names.expert_number(source) for source in sources] != list(range(experts)) or len(shapes) != 1:
        raise ValueError(f"{checkpoint.path}: {name} cannot be stacked from {len(sources)} of {experts} equal experts")
    return Planned(name, sources, (experts, *shapes.pop()))


def _stays_f32(tensor: Planned) -> bool:
    return len(tensor.shape) == 1 or not tensor.name.endswith(".weight") or "_norm." in tensor.name


def _converted_format(tensor: Planned, type: str) -> types.Format:
    if _stays_f32(tensor) or tensor.name.endswith("ffn_gate_inp.weight"):
        return types.FORMATS["F32"]
    format = types.FORMATS[type.upper()]
    return types.FORMATS["F16"] if tensor.shape[-1] % format.block else format


def _quantizer_order(tensor: Planned) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(match[1]) if match else -1, tensor.name


def _choose_formats(tensors: list[Planned], type: str, config: dict) -> None:
    """llama_tensor_get_type of llama.cpp's src/llama-quant.cpp, for Qwen's tensors and the types written here."""
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    layers, experts = config["num_hidden_layers"], names.expert_count(config)
    values = [tensor for tensor in tensors if tensor.name.endswith("attn_v.weight")]
    down = 0
    for tensor in tensors:
        if _stays_f32(tensor) or tensor.name.endswith("ffn_gate_inp.weight"):
            continue
        name = DEFAULT_FORMAT.get(type, type.upper())
        part = tensor.name.split(".")[-2]
        if part == "output" or (tied and part == "token_embd"):
            name = "Q8_0" if tensor.shape[-1] % types.FORMATS[name].block else "Q6_K"
        elif part == "attn_v":
            name = _attention_value_format(name, type, values.index(tensor), len(values))
            name = "Q8_0" if experts == 8 else name
        elif part == "attn_k" and experts == 8:
            name = "Q8_0"
        elif part == "attn_output" and experts == 8 and type in ("q4_k_s", "q4_k_m"):
            name = "Q5_K"
        elif part.startswith("ffn_down"):
            layer = _quantizer_order(tensor)[0] if experts > 1 else down
            down += 1
            if type in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
                name = "Q6_K"
            elif type == "q4_k_s" and layer < layers // 8:
                name = "Q5_K"
        if tensor.shape[-1] % types.FORMATS[name].block:
            name = FALLBACK.get(name, name)
        if tensor.shape[-1] % types.FORMATS[name].block:
            name = "F16"
        tensor.format = types.FORMATS[name]


def _attention_value_format(name: str, type: str, index: int, count: int) -> str:
    if type in ("q4_k_m", "q5_k_m") and _more_bits(index, count):
        return "Q6_K"
    return "Q5_K" if type == "q4_k_s" and index < 4 else name


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


# ---- the file ---------------------------------------------------------------------------------------------------


def write_gguf(
    checkpoint: Any, path: Path, type: str, on_tensor: OnTensor | None = None, pack: Pack = types.pack
) -> dict[str, tuple[float, float]]:
    """Writes `checkpoint` to `path`. Returns name -> (largest, mean) absolute error.

    Raises ValueError where the checkpoint has something that GGUF or the type cannot hold.
    """
    with path.open("wb") as file:
        return write_to(file, checkpoint, type, on_tensor, pack)


def write_to(
    file: BinaryIO, checkpoint: Any, type: str, on_tensor: OnTensor | None = None, pack: Pack = types.pack
) -> dict[str, tuple[float, float]]:
    """`write_gguf` into anything that has `write` and `tell`."""
    tensors = plan(checkpoint, type)
    file.write(_head(pairs(checkpoint, type, tensors), tensors))
    return _write_data(file, checkpoint, tensors, on_tensor, pack)


def pairs(checkpoint: Any, type: str, tensors: list[Planned]) -> metadata.Pairs:
    """The metadata of the planned file, in order."""
    found = metadata.pairs(checkpoint, type, {tensor.name: tensor.shape for tensor in tensors})
    if type not in CONVERTED:  # the quantiser sets these two again, at the end
        for key in ("general.quantization_version", "general.file_type"):
            found[key] = found.pop(key)
    return found


def _head(pairs: metadata.Pairs, tensors: list[Planned]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    parts += [metadata.pack(key, value) for key, value in pairs.items()]
    offset = 0
    for tensor in tensors:
        count = len(tensor.shape)
        parts.append(metadata.string(tensor.name))
        parts.append(struct.pack(f"<I{count}QIQ", count, *tensor.shape[::-1], tensor.format.id, offset))
        offset += padded(tensor.size, DEFAULT_ALIGNMENT)
    return b"".join(parts)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(padded(file.tell(), DEFAULT_ALIGNMENT) - file.tell()))


def _pieces(checkpoint: Any, tensors: list[Planned]) -> Iterator[tuple[Planned, str, torch.Tensor]]:
    """All values of the file in order, a piece at a time, with the tensor they belong to and where they come from."""
    for tensor in tensors:
        format = tensor.format
        for source in tensor.sources:
            if format.pack and checkpoint.format_of(source) == format:  # the blocks of another .gguf: as they are
                values, length = checkpoint.blocks(source).reshape(-1), types.PIECE // format.block * format.size
            else:
                values, length = checkpoint.read(source).reshape(-1), types.PIECE
                if not values.dtype.is_floating_point:
                    raise ValueError(f"{checkpoint.path}: {source} is {values.dtype}, not a float that GGUF holds")
            for piece in values.split(length):
                yield tensor, source, piece if piece.dtype in READ else piece.float()
            del values
            checkpoint.release(source)


def _write_data(
    file: BinaryIO, checkpoint: Any, tensors: list[Planned], on_tensor: OnTensor | None, pack: Pack
) -> dict[str, tuple[float, float]]:
    def packed(piece: tuple[Planned, str, torch.Tensor]) -> tuple[Planned, types.Packed]:
        tensor, source, values = piece
        try:
            if values.dtype == torch.uint8:
                if not types.all_finite(values, tensor.format):
                    raise ValueError("a value is not finite")
                return tensor, types.Packed(values, 0.0, 0.0)
            return tensor, pack(values, tensor.format)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {source} cannot be {tensor.format.name}: {error}") from None

    largest, total = Counter(), Counter()
    current = None
    for tensor, piece in map_in_threads(packed, _pieces(checkpoint, tensors)):
        if tensor is not current:
            _pad(file)
            current = tensor
        file.write(piece.data.numpy())
        largest[tensor.name] = max(largest[tensor.name], piece.largest)
        total[tensor.name] += piece.total
        if on_tensor:
            on_tensor(tensor.name, len(piece.data))
    _pad(file)
    return {tensor.name: (largest[tensor.name], total[tensor.name] / math.prod(tensor.shape)) for tensor in tensors}


# ---- for qwen3.c ------------------------------------------------------------------------------------------------

# What https://github.com/gigit0000/qwen3.c (run.c) has as constants: it maps the weights without reading the header.
QWEN3C_HEAD = 5951648  # where the data begin
QWEN3C_ROWS, QWEN3C_MERGES = 151936, 151386
QWEN3C_ROPE_THETA = 1e6
QWEN3C_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": QWEN3C_ROWS,
    "rms_norm_eps": 1e-6,
}


def write_qwen3c(checkpoint: Any, path: Path, on_tensor: OnTensor | None = None) -> None:
    """Writes `path` (f32) and header.txt, vocab.txt and merges.txt beside it, for the C program qwen3.c.

    The program finds the weights at fixed places: the output matrix first, also where it is tied, the layers in
    numerical order, each layer's tensors by name, and the first byte of all at `QWEN3C_HEAD`, up to which a metadata
    value fills the file. Raises ValueError for a model that does not have Qwen3-0.6B's widths (any depth is right).
    """
    config = published_spelling(checkpoint.config)
    for name, wanted in (QWEN3C_CONFIG | {"rope_theta": QWEN3C_ROPE_THETA}).items():
        if config.get(name) != wanted:
            raise ValueError(
                f"{checkpoint.path}: qwen3.c only runs Qwen3-0.6B, {name} {wanted} (here {config.get(name)})"
            )
    if config["rope_scaling"] is not None:
        raise ValueError(f"{checkpoint.path}: qwen3.c does not know YaRN (remove rope_scaling from config.json)")
    tensors = plan(checkpoint, "f32")
    if not any(tensor.name == "output.weight" for tensor in tensors):
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(Planned("output.weight", embedding.sources, embedding.shape))
    tensors.sort(key=_quantizer_order)
    pairs = metadata.pairs(checkpoint, "f32", {tensor.name: tensor.shape for tensor in tensors})
    pairs = {key: value for key, value in pairs.items() if not key.startswith("general.sampling.")}
    texts = _qwen3c_texts(checkpoint.path, pairs, tensors)
    with path.open("wb") as file:
        file.write(_head(_filled(checkpoint.path, pairs, tensors), tensors))
        _write_data(file, checkpoint, tensors, on_tensor, types.pack)
    for name, text in texts.items():
        path.with_name(name).write_text(text, encoding="utf-8")


def _filled(path: Path, pairs: metadata.Pairs, tensors: list[Planned]) -> metadata.Pairs:
    """The pairs with a filler, so that the data begin at QWEN3C_HEAD; where there is no room, less of what it skips."""
    card = tuple(
        f"general.{name}" for name in ("author", "url", "license", "base_model", "tags", "languages", "dataset")
    )
    for optional in ((), card, (*card, "tokenizer.chat_template")):
        kept = {key: value for key, value in pairs.items() if not key.startswith(optional)}
        empty = kept | {"qwen3c.filler": metadata.Value(types.STRING, "")}
        room = QWEN3C_HEAD - len(_head(empty, tensors))
        if room >= 0:
            return kept | {"qwen3c.filler": metadata.Value(types.STRING, " " * room)}
    raise ValueError(f"{path}: the metadata are longer than the {QWEN3C_HEAD} bytes that qwen3.c skips")


def _qwen3c_texts(path: Path, pairs: metadata.Pairs, tensors: list[Planned]) -> dict[str, str]:
    tokens, merges = (pairs[f"tokenizer.ggml.{name}"].value for name in ("tokens", "merges"))
    kept = sum(not merge.startswith("#") for merge in merges)  # the program skips the others as comments
    if kept > QWEN3C_MERGES or any(len(token.encode()) > 500 or not token.strip() for token in tokens):
        raise ValueError(f"{path}: qwen3.c has no room for these tokens and {kept} merges (it knows Qwen3's own)")
    lines = ["MAGIC=GGUF", "VERSION=3", f"TENSOR_COUNT={len(tensors)}"]
    for key, (kind, value, element) in pairs.items():
        if kind == types.ARRAY:
            lines.append(f"{_c_name(key)}=ARRAY_TYPE={element},ARRAY_LENGTH={len(value)}")
        elif kind != types.STRING:  # a text could hold lines that look like keys
            lines.append(f"{_c_name(key)}={value}")
    return {
        "header.txt": "\n".join(lines) + "\n",
        "vocab.txt": "\n".join(tokens) + "\n",
        "merges.txt": "\n".join(merges) + "\n",
    }


def _c_name(key: str) -> str:
    return re.sub(r"[.-]", "_", key).upper()
