"""torch.compile for what PyTorch computes of a model: norms, rotation and MLPs, each a graph that all layers share.

The attention itself stays outside: it writes into the cache, whose lengths change with every token, and its kernel is
fused as it is. On a CPU the token step in C++ (ops/cpu/step.py) still computes the tokens that it supports, and where
PyTorch computes there, four layers of the 0.6B shape in bfloat16 were no faster compiled than in eager mode.
"""

from importlib.util import find_spec

import torch
from torch import nn

from ops.compiler import find_compiler


def compile_(model: nn.Module, place: str, backend: str = "inductor") -> None:
    """Compiles the layers of a Qwen3 in place; the first passes then take seconds longer. `place` names the option.

    Raises ValueError where what torch.compile needs is missing: Triton for CUDA, else a C++ compiler.
    """
    device = model.device
    if backend == "inductor" and device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(f"{place}: torch.compile needs Triton for CUDA, which is not installed; leave {place} out")
    if backend == "inductor" and device.type != "cuda" and find_compiler() is None:
        raise ValueError(f"{place}: torch.compile needs a C++ compiler, and there is none; leave {place} out")
    options = {"dynamic": True, "fullgraph": True, "backend": backend}
    for layer in model.model.layers:
        layer.input_layernorm.compile(**options)
        layer.post_attention_layernorm.compile(**options)
        if hasattr(layer.mlp, "up_proj"):  # a mixture of experts asks its router first which experts to run
            layer.mlp.compile(**options)
        layer.self_attn.norm_rotate = torch.compile(layer.self_attn.norm_rotate, **options)
