"""The token step in C++: builds ops/cpu/step.cpp, binds a model's tensors to it by address and runs some tokens.

`model.py` asks here first when tokens meet a cache on the CPU. The weights stay where they are, memory-mapped files
included, and are read in place. What the C++ file does not cover (mixed dtypes, other layers, hooks; many tokens in
float32, of experts, or on a processor without bfloat16 products) is not served, and PyTorch computes it.

The library is compiled once for this machine, in a few seconds, into $XDG_CACHE_HOME/nanoqwen (~/.cache/nanoqwen) with
$CXX or the first of c++, g++ and clang++. Without a compiler one notice says so. NANOQWEN_STEP=off keeps to PyTorch.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import weakref
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.compressed_tensors import packed_columns
from ops.memory import release_file_pages
from ops.quant import QuantizedLinear

SOURCE = Path(__file__).with_name("step.cpp")
HEADERS = ("vectors.h", "matmul.h")
FEW = 16  # tokens that step.cpp takes row by row, in both of its dtypes
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
FLAGS += ("-fvisibility-inlines-hidden", "-fno-semantic-interposition")
TUNED = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())  # the first that compiles
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
HEAD_GROUP = 16  # columns that share a scale in a head of 4 bits: with 32, int4 would err more than Q4_0 does
HEAD_SLICE = 1 << 14  # rows
BYTES_PER_THREAD = 1 << 20  # of weights: with less to read, a second thread costs more than it brings

# ---------------------------------------------------------------------------------------------------------------------
# The structs of step.cpp, field by field.


class Linear(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("weight", "bias", "scale")]
    _fields_ += [(name, c_int64) for name in ("rows", "columns", "row_bytes", "bits", "groups")]


class Attention(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    _fields_ += [("q_norm", c_void_p), ("k_norm", c_void_p)]


class MLP(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("gate_proj", "up_proj", "down_proj")]


class Block(ctypes.Structure):
    _fields_ = [("input_layernorm", c_void_p), ("self_attn", Attention), ("post_attention_layernorm", c_void_p)]
    _fields_ += [("gate", Linear), ("experts", POINTER(MLP))]


class Qwen3(ctypes.Structure):
    SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    _fields_ = [(name, c_int64) for name in (*SIZES, "widest_mlp", "num_experts", "num_experts_per_tok")]
    _fields_ += [("norm_topk_prob", c_int64), ("rms_norm_eps", c_float), ("rope_factor", c_float)]
    _fields_ += [("rope_frequencies", c_void_p), ("embed_tokens", c_void_p), ("layers", POINTER(Block))]
    _fields_ += [("norm", c_void_p), ("lm_head", Linear)]


class KVCache(ctypes.Structure):
    _fields_ = [("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p))]
    _fields_ += [("max_len", c_int64), ("lengths", POINTER(c_int64))]


class Tokens(ctypes.Structure):
    _fields_ = [("ids", c_void_p), ("B", c_int64), ("T", c_int64), ("outputs", c_int64), ("logits", c_void_p)]


# ---------------------------------------------------------------------------------------------------------------------
# Building.


@cache
def library() -> ctypes.CDLL | None:
    """The compiled step.cpp; None, with one notice for the whole process, where it cannot be had."""
    from console import notice

    if os.environ.get("NANOQWEN_STEP") == "off":
        return None
    try:
        loaded = ctypes.CDLL(str(build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen")))
    except (OSError, RuntimeError, ValueError) as error:
        notice(f"no C++ token step, so decoding runs in PyTorch and is slower: {error}")
        return None
    for name in DTYPES.values():
        getattr(loaded, "step_" + name).argtypes = (POINTER(Qwen3), POINTER(KVCache), POINTER(Tokens), c_int)
        getattr(loaded, "quantize_" + name).argtypes = (c_void_p, POINTER(Linear), c_int)
    return loaded


def build(directory: Path) -> Path:
    """Compiles step.cpp into `directory` unless it is there. ValueError or OSError where that is not possible."""
    from console import notice
    from formats.files import atomic_file

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise ValueError("no C++ compiler is installed (c++, g++ or clang++)")
    version = Path(compiler).resolve().stat()
    code = [path.read_bytes() for path in (SOURCE, *map(SOURCE.with_name, HEADERS))]
    key = (code, FLAGS, TUNED, compiler, version.st_size, version.st_mtime_ns, _processor())
    path = directory / f"step-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    notice(f"compiling {SOURCE.name} for this machine, once")
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:  # each process has its own; of several at once the last one stays
        for tuned in TUNED:
            command = [compiler, *FLAGS, *tuned, str(SOURCE), "-o", str(temporary)]
            result = subprocess.run(command, check=False, capture_output=True, text=True)
            if result.returncode == 0:
                break
        else:
            raise ValueError(f"{compiler} does not compile {SOURCE.name}: {result.stderr.strip()[:200]}")
    return path


def _processor() -> str:
    """What -march=native depends on, as one home directory may be shared by different machines."""
    described = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return repr((platform.platform(), platform.processor(), sorted({x for x in lines if x.startswith(described)})))


# ---------------------------------------------------------------------------------------------------------------------
# Binding.


class NotServed(Exception):
    """Something in a model that step.cpp does not cover."""


class Bound:
    """A model as step.cpp sees it, and how to tell that the model is no longer what was bound.

    It refers to tensors by address only, so that a weight that is replaced is freed, and never used again.
    """

    def __init__(self, model: nn.Module, loaded: ctypes.CDLL):
        owned = [(owner._modules, name) for owner in model.modules() for name in owner._modules]
        self.containers = [(owner, name, owner[name]) for owner, name in owned if owner[name]._modules]
        self.leaves = [(owner, name) for owner, name in owned if not owner[name]._modules]
        self.seen = self._look()
        self.kept: list[Any] = []  # what the structs point to, besides tensors
        self.bytes = 0  # of weights that a token reads
        self.copied: tuple | None = None  # the head of which there is a quantised copy, and its version
        self.copy_bytes = 0
        try:
            self.struct = self._bind(model, loaded)
        except NotServed:
            self.struct = None

    def is_current(self) -> bool:
        """Whether all modules and tensors are still where they were. Asked before each token: 0.1 ms for 28 layers."""
        changed = self.copied and getattr(self.copied[0](), "_version", None) != self.copied[1]
        return not changed and self._look() == self.seen

    def _look(self) -> tuple | None:
        if any(owner.get(name) is not module for owner, name, module in self.containers):
            return None
        modules = [module for _, _, module in self.containers] + [owner.get(name) for owner, name in self.leaves]
        if None in modules:
            return None
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        places = list(map(Tensor.data_ptr, tensors)), [t.dtype for t in tensors], [t.nbytes for t in tensors]
        return (*places, list(map(type, modules)), any(map(_is_hooked, modules)))

    def _bind(self, model: nn.Module, loaded: ctypes.CDLL) -> Qwen3:
        config, decoder = model.config, model.model
        if self.seen is None or self.seen[-1]:
            raise NotServed("hooks")
        self.dtype = decoder.embed_tokens.weight.dtype
        if self.dtype not in DTYPES:
            raise NotServed(self.dtype)
        C, V = config.hidden_size, config.vocab_size
        self.cache_shape = (config.num_key_value_heads, config.head_dim)
        sparse = [config.is_sparse(layer) for layer in range(config.num_hidden_layers)]
        struct = Qwen3(**{name: getattr(config, name) for name in Qwen3.SIZES})
        struct.widest_mlp = max(config.moe_intermediate_size if any(sparse) else 0, config.intermediate_size)
        struct.num_experts, struct.num_experts_per_tok = 0, 1  # a dense MLP is a single expert, always chosen
        if any(sparse):
            struct.num_experts, struct.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        struct.norm_topk_prob, struct.rms_norm_eps = config.norm_topk_prob, config.rms_norm_eps
        frequencies = decoder.rope_frequencies.float().contiguous()
        struct.rope_frequencies, struct.rope_factor = self._keep(frequencies).data_ptr(), decoder.rope_factor
        struct.embed_tokens = self._address(decoder.embed_tokens.weight, V, C)
        struct.layers = self._keep((Block * len(sparse))(*map(self._block, decoder.layers, [config] * len(sparse))))
        struct.norm = self._norm(decoder.norm, C)
        struct.lm_head = self._head(model, loaded)
        return struct

    def _head(self, model: nn.Module, loaded: ctypes.CDLL) -> Linear:
        """The output head; for a quantised model a copy in as many bits, or it would be half of what a token reads."""
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        rows, columns = model.config.vocab_size, model.config.hidden_size
        bits = min((m.bits for m in model.modules() if isinstance(m, QuantizedLinear)), default=None)
        before = self.bytes
        struct = self._linear(head, rows, columns)
        if bits is None or struct.scale is not None:
            return struct
        bits = 8 if columns % HEAD_GROUP else bits
        copy = Linear(rows=rows, columns=columns, bits=bits, groups=columns // HEAD_GROUP if bits == 4 else 1)
        packed = self._keep(torch.empty(rows, packed_columns(columns, bits), dtype=torch.int32))
        scale = self._keep(torch.empty(rows, copy.groups, dtype=torch.bfloat16))
        copy.weight, copy.scale, copy.row_bytes = packed.data_ptr(), scale.data_ptr(), 4 * packed.shape[1]
        quantize = getattr(loaded, "quantize_" + DTYPES[self.dtype])
        for start in range(0, rows, HEAD_SLICE):  # the original is read slice by slice and never stands in memory whole
            part = head.weight[start : start + HEAD_SLICE]
            some = Linear(rows=len(part), columns=columns, bits=bits, groups=copy.groups, row_bytes=copy.row_bytes)
            some.weight, some.scale = packed[start:].data_ptr(), scale[start:].data_ptr()
            quantize(part.data_ptr(), some, torch.get_num_threads())
            release_file_pages(part)
        self.copied, self.copy_bytes = (weakref.ref(head.weight), head.weight._version), packed.nbytes + scale.nbytes
        self.bytes = before + self.copy_bytes
        return copy

    def _block(self, block: nn.Module, config: Any) -> Block:
        C, D = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads * D, config.num_key_value_heads * D
        attn, mlp = block.self_attn, block.mlp
        struct = Block(self._norm(block.input_layernorm, C))
        struct.post_attention_layernorm = self._norm(block.post_attention_layernorm, C)
        struct.self_attn = Attention(
            self._linear(attn.q_proj, heads, C),
            self._linear(attn.k_proj, kv_heads, C),
            self._linear(attn.v_proj, kv_heads, C),
            self._linear(attn.o_proj, C, heads),
            self._norm(attn.q_norm, D),
            self._norm(attn.k_norm, D),
        )
        if config.is_sparse(attn.layer):
            struct.gate = self._linear(mlp.gate, config.num_experts, C)
            experts = [self._mlp(expert, config.moe_intermediate_size, C) for expert in mlp.experts]
        else:
            experts = [self._mlp(mlp, config.intermediate_size, C)]
        struct.experts = self._keep((MLP * len(experts))(*experts))
        return struct

    def _mlp(self, mlp: nn.Module, width: int, C: int) -> MLP:
        up = self._linear(mlp.gate_proj, width, C), self._linear(mlp.up_proj, width, C)
        return MLP(*up, self._linear(mlp.down_proj, C, width))

    def _linear(self, module: nn.Module, rows: int, columns: int) -> Linear:
        bias = getattr(module, "bias", None)
        struct = Linear(bias=None if bias is None else self._address(bias, rows), rows=rows, columns=columns)
        if type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
            struct.weight, struct.bits = self._address(module.weight, rows, columns), 8 * self.dtype.itemsize
            struct.row_bytes = columns * self.dtype.itemsize
        elif isinstance(module, QuantizedLinear):
            words, groups = packed_columns(columns, module.bits), module.weight_scale.shape[1]
            whole_words = columns // groups % (32 // module.bits) == 0  # a word of codes has one scale
            if columns % groups or not (whole_words or (module.bits == 8 and groups == 1)):
                raise NotServed(f"{groups} groups in {columns} columns")
            struct.weight = self._address(module.weight_packed, rows, words, dtype=torch.int32)
            struct.scale = self._address(module.weight_scale, rows, groups, dtype=torch.bfloat16)
            struct.row_bytes, struct.bits, struct.groups = 4 * words, module.bits, groups
        else:
            raise NotServed(type(module))
        self.bytes += rows * struct.row_bytes
        return struct

    def _norm(self, module: nn.Module, size: int) -> int | None:
        if type(module) is nn.Identity:
            return None
        if type(module).__name__ != "RMSNorm":
            raise NotServed(type(module))
        return self._address(module.weight, size)

    def _address(self, tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> int:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()
        if not plain or tensor.shape != shape or tensor.dtype != (dtype or self.dtype):
            raise NotServed(f"{type(tensor)} {tensor.dtype} {tensor.shape}")
        return tensor.data_ptr()

    def _keep(self, thing: Any) -> Any:
        self.kept.append(thing)
        return thing

    def step(self, loaded: ctypes.CDLL, ids: Tensor, cache: Any, last: bool) -> Tensor | None:
        """Logits [B, T or 1, V]; the cache is T positions longer. None: PyTorch must do it, or say what is wrong."""
        (B, T), keys, values, lengths = ids.shape, cache.keys, cache.values, cache.lengths
        vocab_size, layers = self.struct.lm_head.rows, self.struct.num_hidden_layers
        many = self.dtype is torch.bfloat16 and not self.struct.num_experts and loaded.serves_many_tokens()
        if not (B * T > 0 and (many or B * T <= FEW)) or len(lengths) != B or len(keys) != layers:
            return None
        if max(lengths) + T > cache.max_len or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            return None
        shape = (B, self.cache_shape[0], cache.max_len, self.cache_shape[1])
        if any(t.shape != shape or t.dtype != self.dtype or not t.is_contiguous() for t in (*keys, *values)):
            return None
        places, ids = c_void_p * layers, ids.contiguous()
        logits = torch.empty(B, 1 if last else T, vocab_size, dtype=self.dtype)
        keys, values = places(*map(Tensor.data_ptr, keys)), places(*map(Tensor.data_ptr, values))
        seen = KVCache(keys, values, shape[2], (c_int64 * B)(*lengths))
        tokens = Tokens(ids.data_ptr(), B, T, logits.shape[1], logits.data_ptr())
        threads = max(1, min(torch.get_num_threads(), B * T * self.bytes // BYTES_PER_THREAD))
        getattr(loaded, "step_" + DTYPES[self.dtype])(self.struct, seen, tokens, threads)
        cache.advance(T)
        return logits


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


_bound: weakref.WeakKeyDictionary[nn.Module, Bound] = weakref.WeakKeyDictionary()


def step(model: nn.Module, ids: Tensor, cache: Any, last: bool = False) -> Tensor | None:
    """`model(ids, cache, last)` for ids [B, T] and a cache of B rows on the CPU → logits in the model's dtype.

    None where the model, the cache or the machine is not served here: then model.py goes on in PyTorch.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or (loaded := library()) is None:
        return None
    bound = _bound.get(model)
    if bound is None or not bound.is_current():
        bound = _bound[model] = Bound(model, loaded)
    if bound.struct is None or type(ids) is not Tensor or ids.dtype != torch.int64 or ids.dim() != 2:
        return None
    return bound.step(loaded, ids, cache, last)


def head_copy_bytes(model: nn.Module) -> int:
    """Of the quantised copy that is read in the place of this model's output head; 0 where there is none."""
    bound = _bound.get(model)
    return bound.copy_bytes if bound is not None and bound.is_current() else 0
