"""Muon and AdamW behind one `step`, their learning rates, and their state in checkpoints."""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from model import Qwen3
from training import schema

TOGETHER = 2**22  # elements of matrices that Muon makes orthogonal at a time: many small ones, or one large


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP may have sharded; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole in every process: Muon's products must not be summed in parts."""
    return tensor.redistribute(placements=[Replicate()]) if isinstance(tensor, DTensor) else tensor


def sharded_like(model: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor, sharded as `model` is."""
    return distribute_tensor(tensor, model.device_mesh, model.placements) if isinstance(model, DTensor) else tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon, but matrices of one shape are orthogonalised together, and in `dtype`.

    PyTorch's takes them one by one, always in bfloat16. There a change in the last bit of a gradient changes the update
    by 2^-9, so runs whose gradients are summed in another order would diverge; and small matrices (96 x 96) take five
    times as long one by one as together.

    The update is that of https://kellerjordan.github.io/posts/muon/, scaled to the size of AdamW's by 0.2 times the
    root of the longer side (https://arxiv.org/abs/2502.16982), so that one learning rate serves both.
    """

    def __init__(self, params, dtype: torch.dtype, **settings):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in of_shape.items():
                size = max(1, TOGETHER // shape.numel())
                for start in range(0, len(matrices), size):
                    self._step(matrices[start : start + size], group)

    def _step(self, matrices: list[Tensor], group: dict) -> None:
        """The update of matrices of one shape."""
        averages = []
        for p in matrices:
            p.grad = replicated(p.grad)
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            average = state["momentum_buffer"]
            averages.append(p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average)
        stacked = torch.stack(averages).to(self.dtype)
        updates = orthogonal(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for p, update in zip(matrices, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Matrices [number, rows, columns] with their singular values moved to about 1, between 0.7 and 1.2.

    A step of Newton and Schulz applies the odd polynomial a s + b s^3 + c s^5 to all singular values s at once.
    """
    a, b, c = coefficients
    upright = x.size(-2) > x.size(-1)
    x = x.mT if upright else x  # the square below is of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if upright else x


class Optimizers:
    """Muon for the hidden matrices and AdamW for embeddings, head and norms, or AdamW for all, stepped as one.

    `dtype` is that of the run's matrix products, and so of Muon's.
    """

    def __init__(self, model: Qwen3, settings: schema.Optimizer, dtype: torch.dtype):
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = {name: p for name, p in named.items() if p.ndim == 2 and ".layers." in name}
        matrices = {name: p for name, p in named.items() if p.ndim == 2 and name not in hidden}
        vectors = {name: p for name, p in named.items() if p.ndim < 2}
        decay, other_lr = settings.weight_decay, settings.lr if settings.embedding_lr is None else settings.embedding_lr
        groups = [(matrices, other_lr, decay), (vectors, other_lr, 0.0)]
        if settings.name == "adamw":
            groups.insert(0, (hidden, settings.lr, decay))
        self.names = {id(p): name for name, p in named.items()}
        groups = [{"params": list(p.values()), "lr": lr, "weight_decay": wd} for p, lr, wd in groups if p]
        self.all: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=1e-8, fused=True)
        }
        if settings.name == "muon":
            self.all["muon"] = Muon(
                hidden.values(), dtype, lr=settings.lr, weight_decay=decay, momentum=settings.momentum
            )
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; clears the gradients."""
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`muon.model.layers.0.mlp.up_proj.weight.momentum_buffer` and the like."""
        return {
            f"{kind}.{self.names[id(p)]}.{key}": full_tensor(value.detach())
            for kind, optimizer in self.all.items()
            for p, slots in optimizer.state.items()
            for key, value in slots.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Full tensors, each sharded as its parameter is."""
        for kind, optimizer in self.all.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    prefix = f"{kind}.{self.names[id(p)]}."
                    slots = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
                    if slots:
                        placed = replicated(p) if kind == "muon" else p
                        optimizer.state[p] = {
                            key: t.clone() if t.ndim == 0 else sharded_like(placed, t.to(p.device, copy=True))
                            for key, t in slots.items()
                        }


def learning_rate_factor(step: int, steps: int, settings: schema.Schedule) -> float:
    """The share of the peak learning rate at a step from 1 to `steps`."""
    warmup = settings.warmup * steps
    if step < warmup:
        return step / warmup
    if settings.name == "wsd":
        decay = settings.decay * steps
        left = min(1.0, (steps - step + 1) / decay) if decay else 1.0
    else:
        left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
    return settings.final + (1 - settings.final) * left
