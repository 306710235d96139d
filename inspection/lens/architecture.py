"""The model itself, from its config and the headers of its files: no weight is read, nothing but headers is downloaded.

Counts follow model.py operation by operation. A multiplication and an addition are two FLOPs; those of a token leave
out attention over the context, which grows with it and is given per position.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from formats.gguf import names
from formats.safetensors_read import MAX_HEADER, parse_header
from inspection.auditing import find_tree
from inspection.findings import Unexamined
from inspection.remote_gguf import parse_head
from inspection.tree import Entry
from model import Config

MAX_CONFIG = 1 << 24
CONTEXTS = (1024, 4096, 16384, 32768, 131072)


class Operation(NamedTuple):
    """One operation of a part. Sizes are of one token; `parameters` are those it holds, `used` those it reads."""

    kind: str
    name: str
    shape: list[int]
    """Of the weight, [out, in] or [size]; empty where there is none."""
    parameters: int
    used: int
    flops: int


def linear(name: str, out: int, into: int, bias: bool = False, copies: int = 1, used: int | None = None) -> Operation:
    size = out * into + out * bias
    active = copies if used is None else used
    return Operation("Linear", name, [out, into], size * copies, size * active, 2 * out * into * active)


def norm(name: str, size: int, times: int = 1) -> Operation:
    return Operation("RMSNorm", name, [size], size, size, 4 * size * times)


def block_operations(config: Config, layer: int) -> list[Operation]:
    """A decoder layer in the order of Block.forward."""
    C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    qwen2 = config.model_type == "qwen2"
    bias = config.attention_bias or qwen2
    operations = [norm("input_layernorm", C)]
    operations += [
        linear(f"self_attn.{name}_proj", heads * D, C, bias) for name, heads in (("q", H), ("k", K), ("v", K))
    ]
    if not qwen2:
        operations += [norm("self_attn.q_norm", D, H), norm("self_attn.k_norm", D, K)]
    operations.append(Operation("RoPE", "self_attn.rotate", [], 0, 0, 6 * (H + K) * D // 2))
    operations.append(Operation("Attention", "self_attn.attention", [], 0, 0, 0))
    operations.append(linear("self_attn.o_proj", C, H * D, bias and not qwen2))
    operations.append(norm("post_attention_layernorm", C))
    if config.is_sparse(layer):
        experts, active, width = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        operations.append(linear("mlp.gate", experts, C))
        operations.append(Operation("TopK", "mlp.router", [], 0, 0, experts))
    else:
        experts, active, width = 1, 1, config.intermediate_size
    each = f"mlp.experts.0…{experts - 1}" if config.is_sparse(layer) else "mlp"
    operations += [linear(f"{each}.{name}_proj", width, C, copies=experts, used=active) for name in ("gate", "up")]
    operations.append(Operation("SiLU", f"{each}.act", [], 0, 0, 5 * width * active))
    operations.append(linear(f"{each}.down_proj", C, width, copies=experts, used=active))
    return operations


def architecture(
    config: Config, dtype_bytes: float | None = None, stored: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`lens.json`'s architecture. `dtype_bytes`: of a parameter, else of the config's dtype; `stored`: what the files'
    headers say (`read_headers`)."""
    size = dtype_bytes or {"float32": 4}.get(config.dtype or "float32", 2)
    V, C = config.vocab_size, config.hidden_size
    kinds: dict[str, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault("sparse" if config.is_sparse(layer) else "dense", []).append(layer)
    embedding = Operation("Embedding", "model.embed_tokens", [V, C], V * C, C, 0)
    head = linear("lm_head", V, C)
    if config.tie_word_embeddings:
        head = head._replace(parameters=0, name="lm_head (the embedding again)")
    blocks = [
        {"kind": kind, "layers": layers, "operations": [o._asdict() for o in block_operations(config, layers[0])]}
        for kind, layers in kinds.items()
    ]
    everything = [embedding, norm("model.norm", C), head]
    parts: Counter[str] = Counter()
    figures = {name: Counter() for name in ("parameters", "used", "flops")}
    counted: Counter[str] = Counter()

    def count(operation: Operation, part: str, times: int = 1, copies: int = 1) -> None:
        counted[operation.kind] += times * copies
        parts[part] += operation.parameters * times
        for name, total in figures.items():
            total[part] += getattr(operation, name) * times

    for operation, part in zip(everything, ("embedding", "norms", "head"), strict=True):
        count(operation, part)
    for kind, layers in kinds.items():
        for operation in block_operations(config, layers[0]):
            expert = kind == "sparse" and operation.name.startswith("mlp.experts")
            copies = config.num_experts if expert and operation.kind == "Linear" else 1
            part = (
                "norms"
                if operation.kind == "RMSNorm"
                else "attention"
                if "self_attn" in operation.name
                else "experts"
                if expert
                else "router"
                if kind == "sparse"
                else "MLP"
            )
            count(operation, part, len(layers), copies)
    total, used = sum(figures["parameters"].values()), sum(figures["used"].values())
    per_position = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "model_type": config.model_type,
        "blocks": config.num_hidden_layers,
        "operations": dict(counted),
        "parameters": total,
        "active_parameters": used,
        "bytes": round(total * size) if stored is None else stored["bytes"],
        "flops_per_token": sum(figures["flops"].values()),
        "attention_flops_per_position": per_position,
        "parts": [
            {"part": part, "parameters": parts[part], "used": figures["used"][part], "flops": figures["flops"][part]}
            for part in parts
        ],
        "outer": [o._asdict() for o in everything],
        "stacks": blocks,
        "cache_bytes_per_position": 2 * cache,
        "cache": [{"positions": n, "bytes": 2 * cache * n} for n in CONTEXTS if n <= config.context_length]
        + [{"positions": config.context_length, "bytes": 2 * cache * config.context_length}],
        "context": config.context_length,
        "stored": stored,
    }


def read_architecture(src: str) -> dict[str, Any]:
    """Of SRC: a directory, hub id, .gguf file or a config.json by itself. ValueError where it says too little."""
    tree = find_tree(src, False, Path())
    config, headers, whole = None, [], True
    for entry in tree.entries:
        name = entry.path.rpartition("/")[2]
        if "/" in entry.path:
            continue
        try:
            if name == "config.json" or (len(tree.entries) == 1 and name.endswith(".json")):
                config = json.loads(entry.read(MAX_CONFIG))
            elif name.endswith(".safetensors"):
                whole = whole and _add_headers(headers, entry)
            elif name.endswith(".gguf") and len(tree.entries) == 1:
                config, headers = _gguf(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{src}: {entry.path}: {error}") from None
        except Unexamined as error:
            raise ValueError(f"{src}: {entry.path}: {error.args[-1]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{src}: no config.json in it, which says what the model is")
    try:
        described = Config.from_dict(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{src}: {error}") from None
    stored = None
    if headers and whole:
        kinds: Counter[str] = Counter()
        for kind, size in headers:
            kinds[kind] += size
        stored = {"bytes": sum(kinds.values()), "tensors": len(headers), "types": dict(kinds)}
    return {"source": src, **architecture(described, stored=stored)}


def _add_headers(headers: list[tuple[str, int]], entry: Entry) -> bool:
    """Whether a file's header could be read; over the network only so many bytes are, and the config says enough."""
    try:
        headers += _safetensors(entry)
    except Unexamined:
        return False
    return True


def _safetensors(entry: Entry) -> Iterator[tuple[str, int]]:
    """(type, bytes) of each tensor, from the header alone."""
    with entry.open() as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, entry.size - 8):
            raise ValueError("not a whole safetensors file")
        infos, ranges = parse_header(entry.path, stream.read(length), entry.size - 8 - length)
    return [(str(infos[name].dtype).removeprefix("torch."), ranges[name][1] - ranges[name][0]) for name in infos]


def _gguf(entry: Entry) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    with entry.open() as stream:
        head = parse_head(entry.path, stream, entry.size)
    config = names.config_from_metadata(head.metadata, head.tensors)
    return config, [(tensor.format.name, tensor.size) for tensor in head.tensors.values()]
