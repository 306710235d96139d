"""Whether a model is still what a fast path was built from: the token step in C++, a recorded CUDA graph.

A fast path reads weights by address, and goes around `forward`. So it serves modules of exactly the known classes, and
asks before each pass whether anything is different that PyTorch can see: modules, hooks, modes, overridden methods and
functions, the attributes that the arithmetic reads, and of each tensor the address, shape, strides, dtype and device.
What PyTorch can't see is a write into memory through `.data`, NumPy or a pointer. Weights are read in place, so that is
safe too, except for what was *copied* (a quantised output head): after such a write call `invalidate(model)`.
"""

import sys
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ops.blocks import BlockEmbedding, BlockLinear
from ops.quant import QuantizedLinear

# Classes of model.py that are served, and which attributes of theirs the arithmetic reads.
ATTRIBUTES = {
    "Qwen3": (),
    "Decoder": ("rope_factor",),
    "Block": (),
    "Attention": ("layer", "head_dim"),
    "MLP": (),
    "MoE": ("top_k", "norm_topk_prob"),
    "RMSNorm": ("eps",),
    "Linear": (),
    "Embedding": ("max_norm",),
    "QuantizedLinear": ("bits", "in_features", "out_features"),
    "BlockLinear": ("format", "shape"),
    "BlockEmbedding": ("format", "shape"),
}
STORED = (QuantizedLinear, BlockLinear, BlockEmbedding)
TORCH = (nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList)
FUNCTIONS = ("attention", "rotate")  # of model.py, which the layers call by name
OWN = {"kernels", "_compiled_call_impl"}  # class attributes that an instance may set: they compute the same

_changes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def invalidate(model: nn.Module) -> None:
    """Tells the fast paths that a model's weights were written to in a way that PyTorch can't see."""
    _changes[model] = _changes.get(model, 0) + 1


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; those made in inference mode do not count it."""
    return None if tensor.is_inference() else tensor._version


class Watch:
    """What a model's modules and tensors are, and whether they still are it.

    `reason` says why the model is not one that a fast path may serve (None: it may): a module of another class, a hook,
    a method that an instance overrides, unless the function is one of `allowed` (a module's name). It keeps no leaf
    module and no tensor alive, so that a weight that is replaced is freed.
    """

    def __init__(self, model: nn.Module, allowed: str = ""):
        self.model, self.config, self.changes = weakref.ref(model), model.config, _changes.get(model, 0)
        owned = [(owner._modules, name) for owner in model.modules() for name in owner._modules]
        self.containers = [(owner, name, owner[name]) for owner, name in owned if owner[name]._modules]
        self.places = owned
        self.code = [(place, name, place.get(name)) for place, name in _code(model)]
        modules = [model, *[owner[name] for owner, name in owned]]
        # Between two tokens all of this is in no cache, so that what counts is how many places are looked at.
        self.empty = [inside for m in modules for inside in _insides(m) if not inside]  # they keep nothing alive
        self.holders = [index for index, m in enumerate(modules) if m._parameters or m._buffers]
        self.owners = list({id(owner): owner for owner, _ in owned}.values())
        self.attributes = [
            (owner, name, attribute)
            for owner, name in owned
            for attribute in ATTRIBUTES.get(type(owner[name]).__name__, ())
        ]
        self.reason = _reason(model, allowed)
        self.seen = None if self.reason else self._look()

    def is_current(self) -> bool:
        """Asked before each pass: 0.3 ms for 28 layers, and some times as long where the caches hold weights."""
        model = self.model()
        if model is None or _changes.get(model, 0) != self.changes:
            return False
        return all(place.get(name) is known for place, name, known in self.code) and self._look() == self.seen

    def _look(self) -> tuple | None:
        """None where something is hooked or gone, or has no address."""
        if any(owner.get(name) is not module for owner, name, module in self.containers):
            return None
        modules = [self.model(), *[owner.get(name) for owner, name in self.places]]
        if None in modules or any(self.empty) or is_watched():
            return None
        attributes = [m.__dict__ for m in modules]
        holders = [attributes[index] for index in self.holders]
        tensors = [t for a in holders for t in (*a["_parameters"].values(), *a["_buffers"].values()) if t is not None]
        try:
            places = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a sparse tensor has none
            return None
        return (
            list(map(type, modules)),
            list(map(len, attributes)),
            [a.get("forward") for a in attributes],
            list(map(len, self.owners)),
            [owner[name].__dict__.get(attribute) for owner, name, attribute in self.attributes],
            list(map(type, tensors)),
            places,
            [t.shape for t in tensors],
            list(map(Tensor.stride, tensors)),
            [t.dtype for t in tensors],
            [t.device for t in tensors],
            self.config.tie_word_embeddings,
        )


def _insides(module: nn.Module) -> tuple[dict, ...]:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return (module._parameters, module._buffers, module._modules, *hooks)


def has_no_memory(tensor: Tensor) -> bool:
    """Whether a tensor has no address: a sparse one, one of torch.func.vmap."""
    return tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_watched() -> bool:
    """Whether something is called before or after every module, or watches every operation."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    watched = torch._C._len_torch_dispatch_stack()  # a TorchDispatchMode: profilers, counters of operations
    if torch._C._len_torch_function_stack():  # a TorchFunctionMode; torch.set_default_device is one that only adds
        watched += any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    return bool(everywhere or watched)


def _code(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where each function stands that a fast path takes the place of: (namespace, name)."""
    source = sys.modules[type(model).__module__]
    yield from ((vars(source), name) for name in FUNCTIONS)
    for kind in dict.fromkeys(map(type, model.modules())):
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)] if issubclass(kind, nn.Module) else ():
            yield from ((vars(base), name) for name, value in vars(base).items() if isinstance(value, FunctionType))


def _reason(model: nn.Module, allowed: str) -> str | None:
    source = sys.modules[type(model).__module__]
    for name in FUNCTIONS:
        if getattr(getattr(source, name, None), "__module__", None) != source.__name__:
            return f"{source.__name__}.{name} was replaced"
    known = {getattr(source, name, None) for name in ATTRIBUTES} | {*STORED, *TORCH}
    written = {source.__name__, *(kind.__module__ for kind in (*STORED, *TORCH))}
    for path, module in model.named_modules():
        kind, name = type(module), path or "the model"
        if kind not in known or type(model).__name__ != "Qwen3":
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        if kind is not nn.ModuleList and kind.forward.__module__ not in written:
            return f"{kind.__name__}.forward was replaced"
        functions = [(key, value) for key, value in vars(kind).items() if isinstance(value, FunctionType)]
        for key, value in functions if kind.__module__ == source.__name__ else ():
            if value.__code__.co_filename != source.__file__:
                return f"{kind.__name__}.{key} was replaced"
        for key, value in module.__dict__.items():
            if key in OWN or not hasattr(kind, key) or getattr(value, "__module__", None) == allowed:
                continue
            if getattr(getattr(value, "_torchdynamo_orig_callable", None), "__func__", None) is not getattr(kind, key):
                return f"{name} has a {key} of its own"
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
                return f"{name}.{key} is a {type(tensor).__qualname__}"
            if tensor is not None and has_no_memory(tensor):
                return f"{name}.{key} has no memory of its own (a tensor that is sparse, or of vmap)"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"{name} has a max_norm"
    hooked = is_watched() or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return "a hook looks at its modules or operations" if hooked else None
