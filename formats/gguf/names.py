"""The two vocabularies of a Qwen checkpoint: the official (config.json, safetensors names) and GGUF's (keys, names).

Tensors keep their layout in both; only MoE experts differ, which GGUF stacks: one tensor [experts, rows, columns].
Sources: the official config.json files; gguf-py's constants and llama.cpp's converter, whose output these names equal.
"""

import re
from typing import Any

import numpy as np

from formats.config_json import published_spelling

# official module name -> GGUF's; each has ".weight", the attention projections of Qwen2 also ".bias"
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"down_proj": "ffn_down_exps", "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps"}

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MODEL_TYPES = {"qwen3": "qwen3", "qwen3moe": "qwen3_moe", "qwen2": "qwen2"}  # GGUF's architecture -> config.json's
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
    "bf16": 32,
}

STRANGERS = {  # tensors that a GGUF of these architectures can have besides
    "cls": ": the head of a reranker or classifier, which predicts no next token",
    "rope_freqs": ": factors on the rotary frequencies, which are not implemented",
}

_FROM_TOP = {ours: official for official, ours in TOP.items()}
_FROM_LAYER = {ours: official for official, ours in LAYER.items()}
_FROM_EXPERTS = {ours: official for official, ours in EXPERTS.items()}
_EXPERT = re.compile(r"model\.layers\.(0|[1-9]\d*)\.mlp\.experts\.(0|[1-9]\d*)\.(gate|up|down)_proj\.weight")
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")


def expert_count(config: dict) -> int:
    """The experts of one layer, 0 for a dense model. transformers 5 writes them as `num_local_experts`."""
    return published_spelling(config).get("num_experts") or 0


def gguf_name(official: str) -> str:
    """The GGUF name of an official tensor name (experts: of the tensor that the expert is stacked into)."""
    if match := _EXPERT.fullmatch(official):
        return f"blk.{match[1]}.{EXPERTS[match[3] + '_proj']}.weight"
    module, _, kind = official.rpartition(".")
    if kind in ("weight", "bias"):
        if module in TOP:
            return f"{TOP[module]}.{kind}"
        match = re.fullmatch(r"model\.layers\.(0|[1-9]\d*)\.(.+)", module)
        if match and match[2] in LAYER:
            return f"blk.{match[1]}.{LAYER[match[2]]}.{kind}"
    raise ValueError(f"the tensor {official} has no name in GGUF (only Qwen2, Qwen3 and Qwen3-MoE can be written)")


def expert_number(official: str) -> int | None:
    """Which expert's weight this is, None for every other tensor."""
    match = _EXPERT.fullmatch(official)
    return int(match[2]) if match else None


def official_places(stored: dict[str, Any], config: dict) -> dict[str, tuple[str, int | None]]:
    """official name -> (name in the file, expert's row of a stacked tensor or None), in the file's order."""
    places = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        match = _BLOCK.fullmatch(name)
        if module in _FROM_TOP and kind == "weight":
            places[f"{_FROM_TOP[module]}.weight"] = (name, None)
        elif match and match[2] in _FROM_LAYER:
            places[f"model.layers.{match[1]}.{_FROM_LAYER[match[2]]}.{match[3]}"] = (name, None)
        elif match and match[2] in _FROM_EXPERTS and match[3] == "weight":
            if len(tensor.shape) != 3 or tensor.shape[0] != config.get("num_experts"):
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not one matrix for each expert")
            for expert in range(tensor.shape[0]):
                official = f"model.layers.{match[1]}.mlp.experts.{expert}.{_FROM_EXPERTS[match[2]]}.weight"
                places[official] = (name, expert)
        else:
            what = next((what for start, what in STRANGERS.items() if name.startswith(start)), "")
            raise ValueError(f"the tensor {name} is not one of Qwen's{what} (give a GGUF of Qwen2, Qwen3 or Qwen3-MoE)")
    return places


KINDS = {int: "a whole number", float: "a number", str: "a text"}


def _get(metadata: dict, key: str, kind: type, default: Any = ...) -> Any:
    """One metadata value of a given type; a float is given as the shortest decimal of its 32 bits (1e-06)."""
    value = metadata.get(key, default)
    if value is ...:
        raise ValueError(f"the metadata key {key} is missing (convert the file again)")
    if value is default:
        return value
    if kind is float and type(value) in (int, float) and np.isfinite(value):
        return float(str(np.float32(value)))
    if kind is int and isinstance(value, list) and value:  # a number for each layer
        if any(one != value[0] for one in value):
            raise ValueError(f"the metadata key {key} is {str(value)[:40]}; layers that differ are not implemented")
        value = value[0]
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"the metadata key {key} is {str(value)[:40]!r}, not {KINDS[kind]} (convert it again)")
    return value


def config_from_metadata(metadata: dict, stored: dict) -> dict:
    """The fields of the official config.json. `stored`: name in the file -> something with `shape` and `format`."""
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"general.type is {str(kind)[:40]!r}: this GGUF holds no model (give the model's own file)")
    arch = _get(metadata, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {arch[:40]!r} (supported: {', '.join(ARCHITECTURES)})")
    if "token_embd.weight" not in stored or len(stored["token_embd.weight"].shape) != 2:
        raise ValueError("there is no token_embd.weight of two dimensions (give a whole model)")
    layers = _get(metadata, f"{arch}.block_count", int)
    found = {int(match[1]) for name in stored if (match := _BLOCK.fullmatch(name))}
    if not layers or len(found) != layers or max(found) != layers - 1:
        raise ValueError(f"{arch}.block_count is {layers}, but the file has the tensors of {len(found)} blocks")

    heads = _get(metadata, f"{arch}.attention.head_count", int)
    hidden = _get(metadata, f"{arch}.embedding_length", int)
    if not heads:
        raise ValueError(f"{arch}.attention.head_count is 0")
    head_dim = _get(metadata, f"{arch}.attention.key_length", int, hidden // heads)
    if _get(metadata, f"{arch}.attention.value_length", int, head_dim) != head_dim:
        raise ValueError(f"{arch}.attention.value_length is not the key_length {head_dim}, as in every Qwen")
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": MODEL_TYPES[arch],
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _get(metadata, f"{arch}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _get(metadata, f"{arch}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _get(metadata, f"{arch}.context_length", int),
        "rms_norm_eps": _get(metadata, f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": _get(metadata, f"{arch}.rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(metadata, arch, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "use_sliding_window": False,
        "tie_word_embeddings": "output.weight" not in stored,
        "torch_dtype": {0: "float32", 1: "float16", 32: "bfloat16"}.get(metadata.get("general.file_type"), "float32"),
    }
    if arch == "qwen3moe":
        config |= {
            "num_experts": _get(metadata, f"{arch}.expert_count", int),
            "num_experts_per_tok": _get(metadata, f"{arch}.expert_used_count", int),
            "moe_intermediate_size": _get(metadata, f"{arch}.expert_feed_forward_length", int),
            "norm_topk_prob": True,  # GGUF has no key for it: llama.cpp always normalises for this architecture
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" not in stored],
        }
    for name in ("bos", "eos"):
        token = _get(metadata, f"tokenizer.ggml.{name}_token_id", int, None)
        config |= {} if token is None else {f"{name}_token_id": token}
    return config


def _rope_scaling(metadata: dict, arch: str, head_dim: int) -> dict | None:
    """rope_scaling, by llama.cpp's rules: a factor without a type is linear, and 0 stands for 1."""
    rotated = _get(metadata, f"{arch}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise ValueError(f"{arch}.rope.dimension_count is {rotated}, but Qwen rotates all {head_dim} columns of a head")
    for key in ("rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor"):
        if (value := _get(metadata, f"{arch}.{key}", float, 1.0)) not in (0.0, 1.0):
            raise ValueError(f"{arch}.{key} is {value:g}, which is not implemented")
    kind = _get(metadata, f"{arch}.rope.scaling.type", str, "linear")
    if kind == "none" or (kind == "linear" and _get(metadata, f"{arch}.rope.scaling.factor", float, 1.0) in (0.0, 1.0)):
        return None
    if kind != "yarn":
        raise ValueError(f"{arch}.rope.scaling.type is {kind[:40]!r} (supported: yarn)")
    scaling = {
        "rope_type": "yarn",
        "factor": _get(metadata, f"{arch}.rope.scaling.factor", float),
        "original_max_position_embeddings": _get(metadata, f"{arch}.rope.scaling.original_context_length", int),
    }
    for field, key in YARN.items():
        value = _get(metadata, f"{arch}.rope.scaling.{key}", float, None)
        scaling |= {} if value is None else {field: value}
    return scaling


YARN = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


def generation_config_from_metadata(metadata: dict) -> dict:
    """generation_config.json. GGUF names one end token; llama.cpp also stops at these by their text, and so do we."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    generation = {}
    eos = _get(metadata, "tokenizer.ggml.eos_token_id", int, None)
    ends = [] if eos is None else [eos]
    for text in ("<|im_end|>", "<|endoftext|>"):
        if isinstance(tokens, list) and text in tokens and tokens.index(text) not in ends:
            ends.append(tokens.index(text))
    if ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for field in ("bos", "padding"):
        token = _get(metadata, f"tokenizer.ggml.{field}_token_id", int, None)
        generation |= {} if token is None else {"pad_token_id" if field == "padding" else "bos_token_id": token}
    for field, key in SAMPLING.items():
        place, kind = f"general.sampling.{key}", int if field == "top_k" else float
        value = -1 if metadata.get(place) == -1 else _get(metadata, place, kind, None)  # -1: off
        generation |= {} if value is None else {field: value, "do_sample": True}
    return generation
