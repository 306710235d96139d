"""Small checkpoints written by transformers in the official layout, and its models as the oracle."""

import copy
import json
from pathlib import Path

import torch
import transformers

BASE = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
}
MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "head_dim": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def config(**changes) -> dict:
    """A config.json in the published flat form; a value of None for head_dim leaves the field out."""
    result = copy.deepcopy({**BASE, **changes})  # transformers writes into the dicts it is given
    return {name: value for name, value in result.items() if not (name == "head_dim" and value is None)}


def write(directory: Path, fields: dict, seed: int = 0, dtype=torch.float32, **saving):
    """Writes a random checkpoint of this config with transformers, config.json as given, and returns its model.

    Norm weights lie far from one and biases far from zero: with their usual initial values a forgotten norm, a wrong
    rounding order or a lost bias would not show.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.08)
    model = model.to(dtype)
    model.save_pretrained(directory, **saving)
    (directory / "config.json").write_text(json.dumps(fields | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    return model
