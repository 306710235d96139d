"""The metadata of a GGUF file that is to be written: `general.*`, the architecture's keys and the tokenizer's.

Keys, types of values and their order are those of llama.cpp's converter. What it takes from the model card, and how it
reads a name, size and base model out of a directory's name, is the gguf package's own work (gguf.Metadata).
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats.config_json import published_spelling, rope_type
from formats.gguf import names
from formats.gguf.tokenizer import to_metadata
from formats.gguf.types import ARRAY, BOOL, FLOAT32, INT32, LETTERS, STRING, UINT32
from formats.json_file import read_json

QUANTIZATION_VERSION = 2
MAX_CARD = 10_000_000  # bytes of README.md


class Value(NamedTuple):
    """One metadata value and its GGUF type; `element` is the type of the elements of an array."""

    kind: int
    value: Any
    element: int | None = None


Pairs = dict[str, Value]


def string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def pack(key: str, value: Value) -> bytes:
    """The bytes of one pair."""

    def one(kind: int, item: Any) -> bytes:
        return string(item) if kind == STRING else struct.pack("<" + LETTERS[kind], item)

    head = string(key) + struct.pack("<I", value.kind)
    try:
        if value.kind != ARRAY:
            return head + one(value.kind, value.value)
        count = struct.pack("<IQ", value.element, len(value.value))
        return head + count + b"".join(one(value.element, item) for item in value.value)
    except (struct.error, AttributeError, UnicodeEncodeError):
        raise ValueError(f"{key} cannot be {str(value.value)[:60]!r} in GGUF") from None


def pairs(checkpoint: Any, type: str, shapes: dict[str, tuple[int, ...]]) -> Pairs:
    """All metadata for `checkpoint` written as `type`. `shapes`: the tensors' GGUF names and shapes."""
    config = published_spelling(checkpoint.config)
    arch = {official: ours for ours, official in names.MODEL_TYPES.items()}.get(config.get("model_type"))
    if arch is None:
        raise ValueError(f"{checkpoint.path}: model_type {config.get('model_type')!r} cannot be written as GGUF")
    result = {"general.architecture": Value(STRING, arch), "general.type": Value(STRING, "model")}
    result |= _general(checkpoint, shapes)
    result |= _architecture(checkpoint.path, config, arch, names.FILE_TYPES[type])
    result["general.quantization_version"] = Value(UINT32, QUANTIZATION_VERSION)
    rows = shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else 0
    return result | _tokenizer(checkpoint, rows)


def _general(checkpoint: Any, shapes: dict[str, tuple[int, ...]]) -> Pairs:
    """Name, size, licence, base models, tags: from the model card, or from the GGUF that the checkpoint is."""
    if checkpoint.path.is_file():
        skipped = ("architecture", "type", "alignment", "file_type", "quantization_version")
        return {
            key: Value(kind, checkpoint.metadata[key], checkpoint.elements.get(key))
            for key, kind in checkpoint.types.items()
            if key.startswith("general.") and key.removeprefix("general.") not in skipped
        }
    import gguf

    card = checkpoint.path / "README.md"
    if card.is_file() and card.stat().st_size > MAX_CARD:
        raise ValueError(f"{card}: {card.stat().st_size:,} bytes is too large for a model card")
    writer = gguf.GGUFWriter(None, "")
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 0)
    total, shared, expert, experts = writer.get_total_parameter_count()
    try:
        metadata = gguf.Metadata.load(None, checkpoint.path, None, total)
        metadata.name = metadata.name or checkpoint.path.resolve().name
        if checkpoint.path.parent.name == "snapshots":  # in the hub's cache, where the folder is called by its commit
            metadata.name = checkpoint.path.parent.parent.name.removeprefix("models--").replace("--", "/")
            metadata.basename = metadata.finetune = metadata.version = None
        metadata.size_label = metadata.size_label or gguf.size_label(total, shared, expert, experts)
        metadata.sampling_penalty_repeat = checkpoint.generation_config.get("repetition_penalty")
        metadata.set_gguf_meta_model(writer)
        found = {
            key: Value(int(value.type), value.value, STRING if isinstance(value.value, list) else None)
            for key, value in writer.kv_data[0].items()
            if key not in ("general.architecture", "general.type")
        }
        for key, value in found.items():
            pack(key, value)
    except Exception as error:  # untrusted YAML, in a parser that expects a well-formed one
        raise ValueError(f"{card}: cannot be used as a model card ({str(error)[:80]}); fix or remove it") from None
    return found


def _architecture(path: Path, config: dict, arch: str, file_type: int) -> Pairs:
    """`qwen3.*` and general.file_type from config.json."""

    def need(name: str) -> Any:
        if config.get(name) is None:
            raise ValueError(f"{path}: config.json has no {name} (take the config.json of the published model)")
        return config[name]

    rope, theta = config.get("rope_scaling") or {}, config.get("rope_theta")
    keys = {
        "block_count": Value(UINT32, need("num_hidden_layers")),
        "context_length": Value(UINT32, need("max_position_embeddings")),
        "embedding_length": Value(UINT32, need("hidden_size")),
        "feed_forward_length": Value(UINT32, need("intermediate_size")),
        "attention.head_count": Value(UINT32, need("num_attention_heads")),
        "attention.head_count_kv": Value(UINT32, config.get("num_key_value_heads") or need("num_attention_heads")),
    }
    keys |= _rope_scaling(path, rope)
    keys |= {} if theta is None else {"rope.freq_base": Value(FLOAT32, theta)}
    keys["attention.layer_norm_rms_epsilon"] = Value(FLOAT32, need("rms_norm_eps"))
    if arch == "qwen3moe":
        if not config.get("norm_topk_prob", False):
            raise ValueError(f"{path}: norm_topk_prob is false, but GGUF has no key for it and llama.cpp normalises")
        keys["expert_count"] = Value(UINT32, need("num_experts"))
        keys["expert_used_count"] = Value(UINT32, need("num_experts_per_tok"))
    if config.get("head_dim") is not None:
        keys |= {f"attention.{name}_length": Value(UINT32, config["head_dim"]) for name in ("key", "value")}
    result = {f"{arch}.{key}": value for key, value in keys.items()}
    result["general.file_type"] = Value(UINT32, file_type)
    if arch == "qwen3moe":
        result[f"{arch}.expert_feed_forward_length"] = Value(UINT32, need("moe_intermediate_size"))
    return result


def _rope_scaling(path: Path, rope: dict) -> Pairs:
    kind = rope_type(rope)
    if kind == "default":
        return {}
    if kind != "yarn":
        raise ValueError(f"{path}: rope_type {kind!r} cannot be written as GGUF (supported: default, yarn)")
    if rope.get("factor") is None or rope.get("original_max_position_embeddings") is None:
        raise ValueError(f"{path}: yarn in config.json needs factor and original_max_position_embeddings")
    keys = {
        "rope.scaling.type": Value(STRING, "yarn"),
        "rope.scaling.factor": Value(FLOAT32, rope["factor"]),
        "rope.scaling.original_context_length": Value(UINT32, rope["original_max_position_embeddings"]),
    }
    for name, key in names.YARN.items():
        keys |= {} if rope.get(name) is None else {f"rope.scaling.{key}": Value(FLOAT32, rope[name])}
    return keys


def _tokenizer(checkpoint: Any, rows: int) -> Pairs:
    path = checkpoint.text_path
    if path.is_file():
        tokenizer, tokenizer_config = checkpoint.tokenizer()
    else:
        tokenizer, tokenizer_config = read_json(path / "tokenizer.json"), read_json(path / "tokenizer_config.json")
        template = path / "chat_template.jinja"
        if template.is_file() and "chat_template" not in tokenizer_config:
            tokenizer_config["chat_template"] = template.read_text(encoding="utf-8")
    try:
        parts = to_metadata(tokenizer, tokenizer_config, checkpoint.config, rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path}: the tokenizer cannot be written as GGUF: {error}") from None
    kinds = {bool: BOOL, int: UINT32, str: STRING}
    elements = {"tokenizer.ggml.token_type": INT32}
    return {
        key: Value(ARRAY, value, elements.get(key, STRING))
        if isinstance(value, list)
        else Value(kinds[type(value)], value)
        for key, value in parts.items()
    }
