"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): y = x·Wᵀ + (alpha/rank) · x·Aᵀ·Bᵀ with W frozen.

Only A [rank, in] and B [out, rank] are trained, in float32 whatever W is stored in, so that neither gradients nor the
optimizer's states of the large matrices are needed. B begins at zero: the model begins as the one it adapts.

Adapters are saved as PEFT does (adapter_config.json, adapter_model.safetensors); the checkpoint beside them has them
added to its weights.
"""

import difflib
import hashlib
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

from model import Qwen3

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """A linear layer with its adapter; the weight keeps its official name and is not trained."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        drawn = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # PEFT's
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()
        self.scale, self.enabled = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.enabled:
            return y
        low = F.linear(x, self.lora_A.weight.to(x.dtype))
        return y + F.linear(low, self.lora_B.weight.to(x.dtype)) * self.scale

    def merged(self) -> Tensor:
        """The weight with the adapter added, in the weight's dtype."""
        added = self.lora_B.weight.detach() @ self.lora_A.weight.detach() * self.scale
        return (self.weight.detach().float() + added).to(self.weight.dtype)


def add_lora(model: Qwen3, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Freezes the model and puts an adapter to every linear layer whose name is among `targets`.

    The initial values depend on the seed alone. ValueError for a name that no layer has.
    """
    model.requires_grad_(False)
    found = {name.rpartition(".")[2] for name, module in model.model.layers.named_modules() if _is_plain(module)}
    for target in targets:
        if target not in found:
            near = (difflib.get_close_matches(target, sorted(found), 1) or sorted(found))[0]
            raise ValueError(f"lora.targets: the model has no linear layer {target}; did you mean {near}?")
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(model.model.layers.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in targets and _is_plain(module):
            if ".experts." in path:
                raise ValueError(f"lora.targets: {name} is one of many experts here; adapt q_proj to o_proj alone")
            owner = model.model.layers.get_submodule(parent)
            setattr(owner, name, LoRALinear(module, rank, alpha, generator))


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, LoRALinear)


@contextmanager
def without_adapters(model: Qwen3) -> Iterator[None]:
    """The model as it was before: the reference of preference and reward training."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for module in adapters:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapters:
            module.enabled = True


def merged_weights(model: Qwen3) -> dict[str, Tensor]:
    """The state dict of a plain model, under the official names."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.merged()
    return weights


def adapter_weights(model: Qwen3) -> dict[str, Tensor]:
    """A and B of every adapter under PEFT's names, float32."""
    return {PEFT_PREFIX + name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def save_adapter(model: Qwen3, directory: Path, base: str, rank: int, alpha: float, targets: list[str]) -> None:
    """Writes the folder that PEFT's `PeftModel.from_pretrained(base_model, directory)` opens."""
    directory.mkdir()
    save_file(adapter_weights(model), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank}
    config |= {"lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": sorted(targets), "bias": "none"}
    config |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    text = json.dumps(config, indent=2) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")


def load_adapter(model: Qwen3, directory: Path) -> None:
    """Sets the adapters of a model to saved ones of the same ranks and targets."""
    path = directory / "adapter_model.safetensors"
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read ({error}); go on from another checkpoint") from None
    slots = adapter_weights(model)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in slots.items()}:
        raise ValueError(f"{path}: holds adapters of other ranks or targets than this run's")
    for name, slot in slots.items():
        slot.copy_(saved[name])


def weights_hash(model: Qwen3) -> str:
    """What tells these weights from others, adapters left aside."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
