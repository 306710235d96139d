"""The tensors that a config.json promises, by official name and shape: checkpoints are held against it."""

from typing import Any

from formats.checkpoint import TensorInfo

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen2")
LARGEST = 1 << 24  # of any count or width; the largest real one is 262,144


def official_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official tensor name → shape. ValueError for a config that lacks or contradicts a field."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"config: model_type {kind!r} is not implemented; {', '.join(MODEL_TYPES)} are")
    hidden, layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    if layers > 4096:
        raise ValueError(f"config: num_hidden_layers {layers} is beyond any model of this family")
    shapes = {"model.embed_tokens.weight": (_count(config, "vocab_size"), hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config, layer).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _layer(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads, qwen2 = config["hidden_size"], _count(config, "num_attention_heads"), config["model_type"] == "qwen2"
    head_dim = _count(config, "head_dim", hidden // heads if qwen2 else 128)
    rows = {"q": heads * head_dim, "k": _count(config, "num_key_value_heads", heads) * head_dim}
    rows["v"] = rows["k"]
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for letter, count in rows.items():
        shapes[f"self_attn.{letter}_proj.weight"] = (count, hidden)
        if qwen2 or config.get("attention_bias"):
            shapes[f"self_attn.{letter}_proj.bias"] = (count,)
    shapes["self_attn.o_proj.weight"] = (hidden, rows["q"])
    if config.get("attention_bias") and not qwen2:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if not qwen2:
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if not _is_sparse(config, layer):
        return shapes | _mlp("mlp", hidden, _count(config, "intermediate_size"))
    # transformers 5 writes num_local_experts, the published files num_experts.
    experts = _count(config, "num_experts" if "num_experts" in config else "num_local_experts")
    if experts > 1 << 14:
        raise ValueError(f"config: num_experts {experts} is beyond any model of this family")
    shapes["mlp.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        shapes |= _mlp(f"mlp.experts.{expert}", hidden, _count(config, "moe_intermediate_size"))
    return shapes


def _mlp(path: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    return {f"{path}.gate_proj.weight": wide, f"{path}.up_proj.weight": wide, f"{path}.down_proj.weight": narrow}


def _is_sparse(config: dict[str, Any], layer: int) -> bool:
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config: mlp_only_layers is {dense!r}, not a list of layer numbers")
    sparse = config["model_type"] == "qwen3_moe" and layer not in dense
    return sparse and (layer + 1) % _count(config, "decoder_sparse_step", 1) == 0


def _count(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"config: {key} is {value!r}, which is not a whole number from 1 to {LARGEST:,}")
    return value


def check_tensors(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """ValueError in one line for tensors that are missing, unexpected or mis-shaped beside the config."""
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > len(tensors):
        raise ValueError(f"config asks for {layers:,} layers, but the checkpoint holds only {len(tensors):,} tensors")
    expected = official_shapes(config)
    unexpected = [name for name in tensors if name not in expected and not _is_redundant_head(config, name)]
    defects = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": unexpected,
        "mis-shaped": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not floating-point": [
            name for name in expected if name in tensors and not tensors[name].dtype.is_floating_point
        ],
    }
    found = [f"{kind}: {', '.join(names[:4])} ({len(names)} in all)" for kind, names in defects.items() if names]
    if found:
        raise ValueError(f"the tensors do not fit config.json; {'; '.join(found)}")


def _is_redundant_head(config: dict[str, Any], name: str) -> bool:
    """The official 0.6B and 1.7B store the head although it is tied to the embedding."""
    return name == "lm_head.weight" and config.get("tie_word_embeddings") is True
