"""EXPERIMENTAL: one token under a CUDA graph, the launches of all layers recorded once and sent to the GPU as one.

Never measured on a GPU yet: only checked against PyTorch on a CPU and in Triton's interpreter (`make gpu` checks it).

At batch 1 a token of Qwen3-0.6B takes a fast GPU less time than Python needs to ask for it, kernel by kernel. A graph
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/) repeats the same launches with the same addresses, so
nothing in it may depend on its position: positions are a tensor on the device, and attention looks at a
window of the cache that is wide enough for now. There is a graph for each width, a power of two.

`model.py` asks here first when one token for each row meets a cache on the GPU, as it asks ops/cpu/step.py on the CPU.
What is not covered (a mixture of experts, hooks, mixed dtypes) continues in PyTorch as before. `linear` and `attend`
are the twins of those in ops/gpu/token_kernels.py and take their place where `model.kernels` says "torch".
NANOQWEN_STEP=off turns the graphs off. Nothing is copied but the head of a quantised model, as on the CPU.
"""

import os
import weakref
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.devices import pick_kernels
from ops.head import copied_head, output_head
from ops.quant import QuantizedLinear
from ops.watch import Watch

WINDOW = 128  # the narrowest
KERNELS = "ops.gpu.kernels"  # whose methods may take the place of model.py's: they compute the same


def linear(
    x: Tensor,
    modules: tuple[nn.Module, ...],
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x [B, in] → [B, the modules' out_features side by side]; normed before, gated and added to afterwards."""
    x = x if norm is None else norm(x)
    parts = [F.linear(x, m.weight) if isinstance(m, nn.Embedding) else m(x) for m in modules]
    out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return out if residual is None else residual + out


def attend(
    qkv: Tensor,
    attention: Any,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
) -> Tensor:
    """qkv [B, (H + 2K)·D] of a new token for each row → attention's output [B, H·D].

    Row b's token is at positions[b] (on the device); its key and value are stored there. cos, sin [max_len, D];
    keys, values [B, K, max_len, D], without NaN; attention looks at the first `window` positions and masks the later.
    """
    B, K, _, D = keys.shape
    q, k, v = qkv.view(B, 1, -1, D).split((qkv.shape[1] // D - 2 * K, K, K), 2)
    shared = SimpleNamespace(cos=cos[positions][:, None, None], sin=sin[positions][:, None, None])
    q, k = attention.norm_rotate(q, k, shared)
    rows = torch.arange(B, device=keys.device)
    keys[rows, :, positions], values[rows, :, positions] = k[:, :, 0], v[:, 0]
    mask = (torch.arange(window, device=keys.device) <= positions[:, None])[:, None, None]
    q, keys, values = q.reshape(B, K, -1, D), keys[:, :, :window], values[:, :, :window]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).reshape(B, -1)


class TokenStep:
    """The step of one model with one cache. Its tensors stay where they are: that is what a graph is recorded with."""

    def __init__(self, model: nn.Module, cache: Any, kernels: str):
        decoder = model.model
        rows, device, dtype = len(cache.lengths), model.device, model.dtype
        self.model, self.kernels, self.rows = weakref.ref(model), model.kernels, rows
        self.keys, self.values = list(cache.keys), list(cache.values)
        self.records = device.type == "cuda"
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.lengths: list[int] | None = None  # what `positions` holds on the device
        self.watch = Watch(model, allowed=KERNELS)
        self.reason = self.watch.reason or _reason(model, cache)
        if self.reason is not None:
            return
        # The old tensors are held here, so that a graph that has become stale reads nobody else's memory.
        self.kept = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
        self.linear, self.attend = linear, attend
        if kernels == "triton":
            from ops.gpu import token_kernels

            if rows <= token_kernels.MOST_ROWS:
                self.linear, self.attend = token_kernels.linear, token_kernels.attend
        with torch.inference_mode(False), torch.no_grad():
            self.ids = torch.zeros(rows, dtype=torch.long, device=device)
            self.positions = torch.zeros(rows, dtype=torch.long, device=device)
            table = decoder._pass(torch.empty(0, dtype=dtype, device=device), cache.max_len, None, None)
            self.cos, self.sin = (t.to(dtype).view(cache.max_len, -1).contiguous() for t in (table.cos, table.sin))
            self.copy = copied_head(model, self.watch.changes)
        self.head = output_head(model) if self.copy is None else self.copy.layer
        if self.attend is attend:  # masked slots have weight 0, and 0 · NaN would be NaN
            for tensor in (*self.keys, *self.values):
                tensor[:, :, max(cache.lengths) :].zero_()

    def run(self, model: nn.Module, window: int) -> Tensor:
        """The launches of one token: logits [B, V] for `ids` at `positions`, which are one further afterwards."""
        x = F.embedding(self.ids, model.model.embed_tokens.weight)
        for layer, keys, values in zip(model.model.layers, self.keys, self.values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = self.linear(x, (attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm)
            y = self.attend(qkv, attention, self.cos, self.sin, self.positions, keys, values, window)
            x = self.linear(y, (attention.o_proj,), residual=x)
            y = self.linear(x, (mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm, gated=True)
            x = self.linear(y, (mlp.down_proj,), residual=x)
        logits = self.linear(x, (self.head,), model.model.norm)
        self.positions += 1
        return logits

    def __call__(self, model: nn.Module, ids: Tensor, cache: Any) -> Tensor | None:
        """Logits [B, 1, V], the cache one position longer; None where the model is no longer what was recorded."""
        window = min(cache.max_len, max(WINDOW, 1 << max(cache.lengths).bit_length()))
        self.ids.copy_(ids[:, 0])
        if self.lengths != cache.lengths:
            self.positions.copy_(torch.tensor(cache.lengths))
        recorded = self.graphs.get(window)
        if recorded is not None:
            recorded[0].replay()
        # The GPU is at work meanwhile.
        moved = _places(cache.keys + cache.values) != _places(self.keys + self.values) or not self.watch.is_current()
        if moved or not (self.copy is None or self.copy.is_current(output_head(model).weight)):
            return None
        if recorded is not None:
            logits = recorded[1].clone()
        else:  # the first token of a window also compiles and warms up what is recorded for the next one
            logits = self.run(model, window)
            if self.records:
                self._record(model, window)
        cache.advance(1)
        self.lengths = list(cache.lengths)
        return logits[:, None]

    def _record(self, model: nn.Module, window: int) -> None:
        from console import notice

        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.run(model, window)
            self.graphs[window] = graph, logits
        except RuntimeError as error:
            self.reason = f"no CUDA graph could be recorded: {str(error).splitlines()[0]}"
            notice(f"no CUDA graph, so decoding goes kernel by kernel and is slower: {str(error).splitlines()[0]}")


def _places(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _reason(model: nn.Module, cache: Any) -> str | None:
    """Why `run` does not cover this model and cache: dense, each group of layers of one kind, one dtype, one device."""
    config = model.config
    if any(hasattr(layer.mlp, "experts") for layer in model.model.layers):
        return "a mixture of experts"
    shape = (len(cache.lengths), config.num_key_value_heads, cache.max_len, config.head_dim)
    tensors = [*cache.keys, *cache.values]
    if len(tensors) != 2 * len(model.model.layers):
        return "a cache of another number of layers"
    if any(t.shape != shape or not t.is_contiguous() for t in tensors):
        return "a cache of another shape"
    floats = [t for t in model.parameters() if t.is_floating_point()]
    if {t.dtype for t in (*floats, *tensors)} != {model.dtype}:
        return "tensors of several dtypes"
    if {t.device for t in (*model.parameters(), *model.buffers(), *tensors)} != {model.device}:
        return "tensors on several devices"
    groups = [
        group
        for layer in model.model.layers
        for attention, mlp in ((layer.self_attn, layer.mlp),)
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    ]
    groups += [] if config.tie_word_embeddings else [(model.lm_head,)]
    if any(len(set(map(_kind, group))) != 1 or None in map(_kind, group) for group in groups):
        return "linear layers of several kinds that one kernel would read"
    return None


def _kind(module: nn.Module) -> tuple | None:
    """What has to be the same of matrices that are read by one kernel; None for a layer of another class."""
    if isinstance(module, QuantizedLinear):
        groups = module.weight_scale.shape[1]
        plain = module.in_features % groups == 0 and module.weight_packed.is_contiguous()
        return (module.bits, groups, module.bias is None) if plain else None
    if isinstance(module, nn.Linear) and module.weight.is_contiguous():
        return (module.weight.dtype, module.bias is None)
    return None


_steps: weakref.WeakKeyDictionary[Any, TokenStep] = weakref.WeakKeyDictionary()  # by cache


def step(model: nn.Module, ids: Tensor, cache: Any) -> Tensor | None:
    """`model(ids, cache)` for ids [B, 1] on the GPU → logits [B, 1, V] in the model's dtype.

    None where the model, the cache or the machine is not served here: then model.py continues in PyTorch.
    """
    if type(ids) is not Tensor or ids.dtype != torch.int64 or min(cache.lengths) < 0:
        return None
    off = os.environ.get("NANOQWEN_STEP") == "off" or torch.compiler.is_compiling()
    if off or torch.is_autocast_enabled(ids.device.type) or len(ids) != len(cache.lengths):
        return None
    if max(cache.lengths) >= cache.max_len or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    known = _steps.get(cache)
    if known is None or known.model() is not model or known.rows != len(ids) or known.kernels != model.kernels:
        known = _steps[cache] = TokenStep(model, cache, pick_kernels(model.kernels, ids.device, "kernels"))
    if known.reason is not None:
        return None
    logits = known(model, ids, cache)
    if logits is None:
        del _steps[cache]  # something moved: this token goes through PyTorch, the next one is bound anew
    return logits


def why(model: nn.Module) -> str | None:
    """Why this model's last tokens went through PyTorch kernel by kernel, in a few words; None if they did not."""
    if os.environ.get("NANOQWEN_STEP") == "off":
        return "NANOQWEN_STEP=off"
    return next((known.reason for known in _steps.values() if known.model() is model and known.reason), None)
