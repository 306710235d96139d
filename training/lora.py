"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): y = x·Wᵀ + (alpha/rank) · x·Aᵀ·Bᵀ with W frozen.

Only A [rank, in] and B [out, rank] are trained, in float32 whatever W is stored in, so the large matrices need neither
gradients nor optimizer states. B starts at zero, so the model starts as the one it adapts. W may be in 8 or 4 bits.

Adapters are saved in PEFT's layout (adapter_config.json, adapter_model.safetensors); the checkpoint beside them has
them merged into its weights.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import console
from formats.adapter import CONFIG, PREFIX, WEIGHTS
from model import Qwen3
from ops.quant import QuantizedLinear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapted(nn.Module):
    """A linear layer with its adapter: the base class of the two below, which define `product`, the frozen x·Wᵀ + b."""

    def adapt(self, rank: int, alpha: float, generator: torch.Generator, device: torch.device) -> None:
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=torch.float32)
        drawn = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # PEFT's
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()
        self.scale, self.enabled = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if not self.enabled:
            return y
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return y + F.linear(low, self.lora_B.weight.to(x.dtype)) * self.scale

    def added(self) -> Tensor:
        """What the adapter adds to the weight, float32."""
        return self.lora_B.weight.detach() @ self.lora_A.weight.detach() * self.scale


class LoRALinear(Adapted, nn.Linear):
    """Over a plain layer, whose weight keeps its official name."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapt(rank, alpha, generator, base.weight.device)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def merged(self) -> Tensor:
        """The weight with the adapter added, in the weight's dtype."""
        return (self.weight.detach().float() + self.added()).to(self.weight.dtype)


class QLoRALinear(Adapted, QuantizedLinear):
    """Over a layer in 8 or 4 bits (QLoRA, https://arxiv.org/abs/2305.14314), whose buffers keep their stored names."""

    def __init__(self, base: QuantizedLinear, rank: int, alpha: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = base.in_features, base.out_features, base.bits
        self._buffers, self.bias = dict(base._buffers), base.bias
        self.adapt(rank, alpha, generator, base.weight_packed.device)

    def product(self, x: Tensor) -> Tensor:
        y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged(self) -> Tensor:
        """The weight with the adapter added, in bfloat16."""
        return (self.dequantize() + self.added()).to(torch.bfloat16)


class FrozenProduct(torch.autograd.Function):
    """x·Wᵀ of a quantised layer. The backward pass dequantises the weight again, so nothing keeps it until then."""

    @staticmethod
    def forward(context, x: Tensor, layer: QuantizedLinear) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        context.layer, context.dtypes = layer, (x.dtype, dtype)
        return F.linear(x.to(dtype), layer.dequantize(dtype=dtype))

    @staticmethod
    def backward(context, grad: Tensor):
        dtype, product = context.dtypes
        return (grad.to(product) @ context.layer.dequantize(dtype=product)).to(dtype), None


def add_lora(model: Qwen3, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freezes the model and adds an adapter to every linear layer whose name is among `targets`.

    The initial values depend on the seed alone. ValueError for a name that no layer has.
    """
    model.requires_grad_(False)
    found = {name.rpartition(".")[2] for name, module in model.model.layers.named_modules() if _is_base(module)}
    for target in targets:
        if target not in found:
            near = console.did_you_mean(target, found)
            raise ValueError(
                f"lora.targets: the model has no linear layer {target}{near} (there are {', '.join(sorted(found))})"
            )
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(model.model.layers.named_modules()):
        if path.rpartition(".")[2] in targets and _is_base(module):
            if ".experts." in path:
                name = path.rpartition(".")[2]
                raise ValueError(f"lora.targets: {name} is one of many experts here; adapt q_proj to o_proj alone")
            kind = QLoRALinear if isinstance(module, QuantizedLinear) else LoRALinear
            model.model.layers.set_submodule(path, kind(module, rank, alpha, generator))


def _is_base(module: nn.Module) -> bool:
    """Whether a layer can get an adapter: the factors of other adapters are linear layers too, but can't."""
    return isinstance(module, nn.Linear | QuantizedLinear) and not isinstance(module, Adapted)


@contextmanager
def without_adapters(model: Qwen3) -> Iterator[None]:
    """Turns the adapters off: the reference model of DPO and GRPO."""
    adapters = [module for module in model.modules() if isinstance(module, Adapted)]
    for module in adapters:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapters:
            module.enabled = True


def merged_weights(model: Qwen3) -> dict[str, Tensor]:
    """The state dict of a plain model, under the official names: adapters merged, and quantised layers as bfloat16
    with all else."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    is_quantized = False
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            is_quantized = True
            for buffer in module._buffers:
                del weights[f"{name}.{buffer}"]
            weights[f"{name}.weight"] = module.dequantize()
        if isinstance(module, Adapted):
            weights[f"{name}.weight"] = module.merged()
    return {name: tensor.bfloat16() for name, tensor in weights.items()} if is_quantized else weights


def adapter_weights(model: Qwen3) -> dict[str, Tensor]:
    """A and B of every adapter under PEFT's names, float32."""
    return {PREFIX + name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def save_adapter(model: Qwen3, directory: Path, base: str, rank: int, alpha: float, targets: list[str]) -> None:
    """Writes the folder that PEFT's `PeftModel.from_pretrained(base_model, directory)` opens."""
    directory.mkdir()
    save_file(adapter_weights(model), directory / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank}
    config |= {"lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": sorted(targets), "bias": "none"}
    config |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    text = json.dumps(config, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def load_adapter(model: Qwen3, directory: Path) -> None:
    """Sets the adapters of a model to saved ones of the same ranks and targets."""
    path = directory / WEIGHTS
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read ({error}); continue from another checkpoint") from None
    slots = adapter_weights(model)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in slots.items()}:
        raise ValueError(f"{path}: holds adapters of other ranks or targets than this run's")
    for name, slot in slots.items():
        slot.copy_(saved[name])
