"""The token step in C++: binds a model's tensors to ops/cpu/step.cpp by address and runs tokens through it.

`model.py` asks here first when tokens meet a cache on the CPU, of a prompt or of a reply. The weights stay where they
are, memory-mapped files included, and are read in place. What the C++ file does not cover (mixed dtypes, other classes
of layers, hooks) is not served, and PyTorch computes it: `why` says what the reason is.

A token's logits have the same bits whatever is computed beside it: alone, in a prompt, as a guess, in a batch.
"""

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from formats.compressed_tensors import Scheme, packed_columns
from ops.blocks import Blocks
from ops.cpu import variants
from ops.cpu.library import (
    BLOCK,
    DTYPES,
    MLP,
    Attention,
    Block,
    Chosen,
    KVCache,
    Linear,
    Qwen3,
    Tokens,
    Unavailable,
    library,
)
from ops.head import copied_head, output_head
from ops.memory import HUGE_PAGE, HugePages, ask_for_huge_pages, release_file_pages
from ops.quant import SCALE_DTYPE, QuantizedLinear
from ops.watch import Watch

HEAD_SLICE = 1 << 14  # rows
FEW = 16  # tokens of a pass that is limited by memory
MOVE_AFTER = 16  # passes before weights move into huge pages
MOVE_SHARE = 0.2  # of a pass's time, that each of the next ones spends on it
BYTES_PER_THREAD = 1 << 20  # of weights: with less to read, a second thread costs more than it brings


class NotServed(Exception):
    """Something in a model that step.cpp does not cover."""


class Bound:
    """A model as step.cpp sees it. It refers to weights by address only, so that one that is replaced is freed."""

    def __init__(self, model: nn.Module, loaded: ctypes.CDLL):
        self.watch = Watch(model)
        self.kept: list[Any] = []  # what the structs point to
        self.bytes = 0  # of weights that a token reads
        self.places: list[tuple[int, int]] = []  # of the large ones among them: address, bytes
        self.passes = 0  # of one token or a few
        self.huge: HugePages | None = None
        self.credit, self.move_rate = 0.0, 0.0  # seconds that may be spent on moving; bytes a second, once known
        self.copy = None  # of the head
        self.struct, self.reason = None, self.watch.reason
        if self.reason is None:
            try:
                self.struct = self._bind(model, loaded)
            except NotServed as error:
                self.reason = str(error)

    def is_current(self, model: nn.Module) -> bool:
        """Whether all modules and tensors are still where they were."""
        if not self.watch.is_current():
            return False
        return self.copy is None or self.copy.is_current(output_head(model).weight)

    def _bind(self, model: nn.Module, loaded: ctypes.CDLL) -> Qwen3:
        config, decoder = model.config, model.model
        self.dtype = model.dtype
        if self.dtype not in DTYPES:
            raise NotServed(f"weights of {self.dtype}; float32 and bfloat16 are served")
        embedding = decoder.embed_tokens
        V, C = self.vocabulary, _ = embedding.shape if isinstance(embedding, Blocks) else embedding.weight.shape
        self.cache_shape = (config.num_key_value_heads, config.head_dim)
        struct = Qwen3(**{name: getattr(config, name) for name in Qwen3.SIZES})
        struct.hidden_size, struct.num_hidden_layers = C, len(decoder.layers)
        struct.num_experts, struct.num_experts_per_tok = 0, 1  # a dense MLP is a single expert, always chosen
        for mlp in (layer.mlp for layer in decoder.layers if type(layer.mlp).__name__ == "MoE"):
            struct.num_experts, struct.num_experts_per_tok = mlp.gate.out_features, mlp.top_k
            struct.norm_topk_prob = mlp.norm_topk_prob
        self.routing = (struct.num_experts, struct.num_experts_per_tok, bool(struct.norm_topk_prob))
        self.eps = struct.rms_norm_eps = decoder.norm.eps
        struct.rope_frequencies = self._address(decoder.rope_frequencies, config.head_dim // 2, dtype=torch.float32)
        struct.rope_factor = decoder.rope_factor
        struct.embed_tokens = self._linear(embedding, V, C)
        self.bytes, self.places = 0, []  # a token reads one row of it
        layers = [self._block(block, index, config, C) for index, block in enumerate(decoder.layers)]
        struct.layers = self._keep((Block * len(layers))(*layers))
        struct.norm = self._norm(decoder.norm, C)
        struct.lm_head = self._head(model, loaded, C)
        self.ids = min(self.vocabulary, struct.lm_head.rows)  # token ids end there
        return struct

    def _head(self, model: nn.Module, loaded: ctypes.CDLL, C: int) -> Linear:
        """The output head, or its quantised copy (ops/head.py)."""
        head = output_head(model)
        rows = self.vocabulary if model.config.tie_word_embeddings else head.out_features
        before = self.bytes, len(self.places)
        struct = self._linear(head, rows, C)
        self.copy = copied_head(model, self.watch.changes, quantizer(loaded))
        if self.copy is None:
            return struct
        self.bytes, self.places = before[0], self.places[: before[1]]
        return self._linear(self.copy.layer, rows, C)

    def _block(self, block: nn.Module, index: int, config: Any, C: int) -> Block:
        D = config.head_dim
        heads, kv_heads = config.num_attention_heads * D, config.num_key_value_heads * D
        attn, mlp = block.self_attn, block.mlp
        if attn.layer != index or attn.head_dim != D:
            raise NotServed(f"layer {index} has the attention of another")
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
        if type(mlp).__name__ == "MoE":
            if (len(mlp.experts), mlp.top_k, bool(mlp.norm_topk_prob)) != self.routing or mlp.top_k > len(mlp.experts):
                raise NotServed(f"layer {index} has {len(mlp.experts)} experts, routed otherwise than in other layers")
            struct.gate = self._linear(mlp.gate, len(mlp.experts), C)
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
        if isinstance(module, nn.Linear | nn.Embedding):
            struct.weight, struct.bits = self._address(module.weight, rows, columns), 8 * self.dtype.itemsize
            struct.row_bytes = columns * self.dtype.itemsize
        elif isinstance(module, QuantizedLinear):
            words, groups = packed_columns(columns, module.bits), module.weight_scale.shape[1]
            whole_words = columns // groups % (32 // module.bits) == 0  # a word of codes has one scale
            if columns % groups or not (whole_words or (module.bits == 8 and groups == 1)):
                raise NotServed(f"{groups} groups in {columns} columns")
            struct.weight = self._address(module.weight_packed, rows, words, dtype=torch.int32)
            struct.scale = self._address(module.weight_scale, rows, groups, dtype=SCALE_DTYPE)
            struct.row_bytes, struct.bits, struct.groups = 4 * words, module.bits, groups
        elif isinstance(module, Blocks):
            struct.row_bytes, struct.blocks = module.weight_blocks.shape[1], variants.FORMS[module.format.name]
            struct.bits = 32  # F32 has no form of its own
            struct.weight = self._address(module.weight_blocks, rows, struct.row_bytes, dtype=torch.uint8)
        else:
            raise NotServed(f"a {type(module).__name__} among the layers")
        self.bytes += rows * struct.row_bytes
        if rows * struct.row_bytes >= 1 << 16:
            self.places.append((struct.weight, rows * struct.row_bytes))
        return struct

    def _norm(self, module: nn.Module, size: int) -> int | None:
        if type(module) is nn.Identity:
            return None
        if module.eps != self.eps:
            raise NotServed(f"norms with an eps of {module.eps} and of {self.eps}")
        return self._address(module.weight, size)

    def _address(self, tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> int:
        if tensor.shape != shape or tensor.dtype != (dtype or self.dtype):
            what = f"{list(tensor.shape)} of {tensor.dtype}"
            raise NotServed(f"a tensor {what} where {list(shape)} of {dtype or self.dtype} was expected")
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
            raise NotServed(f"a tensor {list(shape)} that is not in the CPU's memory row by row")
        if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.itemsize:
            raise NotServed(f"a tensor {list(shape)} whose memory was given back")  # as FSDP does between two passes
        return tensor.data_ptr()

    def _keep(self, thing: Any) -> Any:
        self.kept.append(thing)
        return thing

    def step(self, loaded: ctypes.CDLL, ids: Tensor, cache: Any, last: bool) -> Tensor | None:
        """Logits [B, T or 1, V]; the cache is T positions longer. None: PyTorch must do it, or say what is wrong."""
        (B, T), lengths, max_len, D = ids.shape, cache.lengths, cache.max_len, self.cache_shape[1]
        if not B * T or not all(type(n) is int and 0 <= n <= max_len - T for n in lengths):
            return None
        if int(ids.min()) < 0 or int(ids.max()) >= self.ids:
            return None
        counts = [(n + T - 1) // BLOCK + 1 for n in lengths]
        if (blocks := self.blocks_of(cache, B, counts)) is None:
            return None
        outputs = 1 if last else T
        half = cache.keys[0].dtype == torch.float16
        batch = Batch(self, blocks, counts, max_len * D, half)
        logits = batch.run(loaded, ids.flatten().tolist(), [T] * B, [outputs] * B, lengths)
        cache.advance(T)
        return logits.view(B, outputs, self.struct.lm_head.rows)

    def blocks_of(self, cache: Any, B: int, counts: list[int]) -> list[np.ndarray] | None:
        """What `_run` wants of a cache of B rows, `counts` blocks of each; None where it is not one for this model."""
        (K, D), layers, max_len, keys, values = (
            self.cache_shape,
            self.struct.num_hidden_layers,
            cache.max_len,
            cache.keys,
            cache.values,
        )
        if len(cache.lengths) != B or len(keys) != layers or len(values) != layers:
            return None
        scales, dtype = (cache.key_scales, cache.value_scales), torch.uint8 if cache.key_scales else keys[0].dtype
        half = (dtype, self.dtype) == (torch.float16, torch.float32)
        if dtype not in (torch.uint8, self.dtype) and not half:
            return None
        if list(map(len, scales)) not in ([0, 0], [layers, layers]):
            return None
        for part, width, kind in ((keys + values, D, dtype), (scales[0] + scales[1], 1, SCALE_DTYPE)):
            for tensor in part:
                fits = tensor.shape == (B, K, max_len, width) and tensor.dtype == kind
                if not fits or not tensor.is_cpu or not tensor.is_contiguous():
                    return None
        places = np.concatenate([np.arange(count) * BLOCK + K * max_len * row for row, count in enumerate(counts)])
        parts = [part for part in (keys, values, *scales) if part]
        begin = [np.array([tensor.data_ptr() for tensor in part])[:, None] for part in parts]
        if not all(map(np.all, begin)):  # memory that was given back
            return None
        return [at + places * (part[0].shape[3] * part[0].itemsize) for at, part in zip(begin, parts, strict=True)]

    def page(self, dtype: torch.dtype | None) -> Tensor:
        """What `Spans.new_page` says."""
        K, D = self.cache_shape
        part = K * BLOCK * D
        if dtype == torch.int8:  # the codes, then their scales
            part, dtype = K * BLOCK * (D + SCALE_DTYPE.itemsize), torch.uint8
        page = torch.empty(self.struct.num_hidden_layers, 2, part, dtype=dtype or self.dtype, device="cpu")
        if wants_huge_pages():
            ask_for_huge_pages(page)
        return page

    def paged(self, pages: list[list[Tensor]]) -> "Batch":
        """Sequences in the pages of `Spans`."""
        K, D = self.cache_shape
        one = pages[0][0]
        part = one.stride(1) * one.itemsize
        layers = np.arange(self.struct.num_hidden_layers)[:, None] * (2 * part)
        keys = layers + np.array([page.data_ptr() for row in pages for page in row])
        blocks = [keys, keys + part]
        if one.dtype == torch.uint8:
            blocks += [keys + K * BLOCK * D, keys + part + K * BLOCK * D]
        return Batch(self, blocks, list(map(len, pages)), BLOCK * D, one.dtype == torch.float16)

    def run(self, loaded: ctypes.CDLL, held: KVCache, given: Tokens, tokens: int) -> None:
        """So many tokens in all through step.cpp."""
        threads = max(1, min(torch.get_num_threads(), tokens * self.bytes // BYTES_PER_THREAD))
        start = time.perf_counter()
        if getattr(loaded, "step_" + DTYPES[self.dtype])(self.struct, held, given, threads):
            raise MemoryError(f"not enough memory for {tokens:,} tokens and their attention")
        if tokens <= FEW:
            self._move_to_huge_pages(time.perf_counter() - start)

    def _move_to_huge_pages(self, seconds: float) -> None:
        """After some tokens of a reply, so that a short one does not pay for it, and for a share of each pass's time:
        to get a page of 2 MB takes 0.2 ms or, of a virtual machine's host, 5."""
        self.passes += 1
        if self.huge is None and self.passes == MOVE_AFTER and wants_huge_pages():
            self.huge = HugePages(self.places)
        if self.huge is None or not self.huge.left:
            return
        self.credit += MOVE_SHARE * seconds
        pages = int(self.credit * self.move_rate / HUGE_PAGE) if self.move_rate else 1
        if pages:
            start = time.perf_counter()
            moved = self.huge.move(pages * HUGE_PAGE)
            took = time.perf_counter() - start
            self.credit, self.move_rate = self.credit - took, moved / took

    def settle(self) -> None:
        """Moves at once what is still to be moved."""
        if wants_huge_pages():
            self.huge = self.huge or HugePages(self.places)
            self.huge.move(sum(high - low for low, high in self.huge.left))


class Batch:
    """Some sequences' keys and values and their next tokens, as step.cpp wants them. For more than one pass, since to
    make it anew takes longer than all else that a token needs of Python.

    blocks        addresses of keys, of values and (8 bits) of the scales of both, int64 [layers, blocks of all]
    blocks_each   how many of these blocks are each sequence's
    stride        numbers from one head's keys to those of the next
    half          whether keys and values are float16
    """

    def __init__(self, bound: Bound, blocks: Sequence[np.ndarray], blocks_each: list[int], stride: int, half: bool):
        self.bound, B = bound, len(blocks_each)
        blocks = list(map(np.ascontiguousarray, blocks))
        first, strides = np.concatenate(([0], np.cumsum(blocks_each))), np.full(B, stride)
        self.lengths, self.starts, self.outputs = (
            np.zeros(B, np.int64),
            np.zeros(B + 1, np.int64),
            np.zeros(B, np.int64),
        )
        self.ids = np.zeros(0, np.int64)
        self.held = KVCache(*_addresses(*blocks), *[None] * (4 - len(blocks)), half, blocks[0].shape[1])
        self.held.first, self.held.strides, self.held.lengths = _addresses(first, strides, self.lengths)
        self.given = Tokens(None, *_addresses(self.starts, self.outputs), B)
        self._kept = blocks, first, strides

    def run(
        self, loaded: ctypes.CDLL, ids: list[int], counts: list[int], outputs: list[int], lengths: list[int]
    ) -> Tensor:
        """Logits [all outputs, V] of the last `outputs[b]` of each sequence's next `counts[b]` ids, where it has
        `lengths[b]` positions now. `ids`: those of all, one sequence after another."""
        if len(ids) != len(self.ids):
            self.ids = np.empty(len(ids), np.int64)
            self.given.ids = self.ids.ctypes.data
        self.ids[:], self.lengths[:], self.outputs[:] = ids, lengths, outputs
        self.starts[1:] = list(accumulate(counts))
        rows = self.bound.struct.lm_head.rows
        logits = torch.empty(sum(outputs), rows, dtype=self.bound.dtype, device="cpu")
        self.given.logits = logits.data_ptr()
        self.bound.run(loaded, self.held, self.given, len(ids))
        return logits


class Running:
    """One sequence in a cache: `model(ids, cache)` without what `serving` asks before each pass.

    Between two tokens neither the model's Python objects nor PyTorch's code are in the processor's caches, and to look
    at all of them takes 2 ms, a tenth of a small model's token. So the model is the one of the beginning: its weights
    are kept alive, and a module, weight or hook that is replaced meanwhile is not noticed.
    """

    def __init__(self, model: nn.Module, bound: Bound, cache: Any, batch: Batch):
        self.bound, self.cache, self.batch, self.loaded = bound, cache, batch, library()
        self.max_len, self.weights = cache.max_len, weights_of(model)
        self.keys, self.kept = cache.keys, cache.tensors

    def __call__(self, ids: Sequence[int], outputs: int) -> Tensor | None:
        """Logits [outputs, V] of the last ids, all of which the cache then holds. None for what `model` refuses."""
        cache, count = self.cache, len(ids)
        length = cache.lengths[0]
        if type(length) is not int or not 0 <= length < length + count <= self.max_len or cache.keys is not self.keys:
            return None  # a cache that was changed or has grown meanwhile
        if not 0 <= min(ids) <= max(ids) < self.bound.ids:
            return None
        logits = self.batch.run(self.loaded, ids, [count], [outputs], [length])
        cache.advance(count)
        return logits


def weights_of(model: nn.Module) -> list[Any]:
    """What has to be kept for as long as the C++ step may read a model that it is not asked about any more."""
    return [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]


def running(model: nn.Module, cache: Any) -> Running | None:
    """For the tokens of one reply; None where the model or the cache, of one row, is not served here."""
    if not isinstance(model, nn.Module) or model.device.type != "cpu" or (bound := serving(model)) is None:
        return None
    count = (cache.max_len - 1) // BLOCK + 1
    if (blocks := bound.blocks_of(cache, 1, [count])) is None:
        return None
    stride, half = cache.max_len * bound.cache_shape[1], cache.keys[0].dtype == torch.float16
    return Running(model, bound, cache, Batch(bound, blocks, [count], stride, half))


def _addresses(*arrays: np.ndarray) -> list[int]:
    assert all(array.dtype == np.int64 for array in arrays)
    return [array.ctypes.data for array in arrays]


def quantizer(loaded: ctypes.CDLL) -> Callable[[Tensor, Scheme], QuantizedLinear]:
    """A function like QuantizedLinear.from_linear for one large weight, which is never in memory as a whole."""

    def quantize(weight: Tensor, scheme: Scheme) -> QuantizedLinear:
        rows, columns = weight.shape
        layer = QuantizedLinear(columns, rows, scheme, device="cpu")
        packed, scale, bits = layer.weight_packed, layer.weight_scale, scheme.bits
        if wants_huge_pages():
            ask_for_huge_pages(packed)
        for start in range(0, rows, HEAD_SLICE):
            part = weight.detach()[start : start + HEAD_SLICE]
            some = Linear(rows=len(part), columns=columns, bits=bits, groups=scale.shape[1])
            some.weight, some.scale, some.row_bytes = (
                packed[start:].data_ptr(),
                scale[start:].data_ptr(),
                4 * packed.shape[1],
            )
            if getattr(loaded, "quantize_" + DTYPES[weight.dtype])(part.data_ptr(), some, torch.get_num_threads()):
                raise MemoryError("not enough memory to quantise the output head")
            release_file_pages(part)
        return layer

    return quantize


_bound: weakref.WeakKeyDictionary[nn.Module, Bound] = weakref.WeakKeyDictionary()


def bind(model: nn.Module, loaded: ctypes.CDLL) -> Bound:
    bound = _bound.get(model)
    if bound is None or not bound.is_current(model):
        bound = _bound[model] = Bound(model, loaded)
    return bound


def step(model: nn.Module, ids: Tensor, cache: Any, last: bool = False) -> Tensor | None:
    """`model(ids, cache, last)` for ids [B, T] and a cache of B rows on the CPU → logits in the model's dtype.

    None where the model, the cache or the machine is not served here: then model.py continues in PyTorch.
    """
    bound = serving(model)
    if bound is None or type(ids) is not Tensor or ids.dtype != torch.int64 or ids.dim() != 2:
        return None
    return bound.step(library(), ids, cache, last)


def serving(model: nn.Module) -> Bound | None:
    """The model bound to the C++ step, where that computes its tokens."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or (loaded := library()) is None:
        return None
    bound = bind(model, loaded)
    return None if bound.struct is None else bound


class Spans:
    """Tokens of some sequences, any number of each, in one pass; of the model as it is now (see Running)."""

    def __init__(self, model: nn.Module, bound: Bound):
        self.bound, self.loaded, self.kept = bound, library(), weights_of(model)
        self.cache_dtype = model.cache_dtype
        self._batch: Batch | None = None  # of the latest pass
        self._pages: list[tuple[list[Tensor], int]] = []  # those of its sequences, and how many they were

    def new_page(self) -> Tensor:
        """Memory for keys and values of BLOCK positions of one sequence, [layers, 2, numbers]; not initialised."""
        return self.bound.page(self.cache_dtype)

    def __call__(
        self, ids: list[list[int]], lengths: list[int], pages: list[list[Tensor]], outputs: list[int]
    ) -> Tensor:
        """→ logits [all outputs, V] in the model's dtype.

        Sequence b has `lengths[b]` positions in its `pages[b]` (of `new_page`, BLOCK each; only ever appended to), and
        room after them for its `ids[b]`, the last `outputs[b]` of which have logits. Raises ValueError for an id
        outside of the vocabulary.
        """
        counts, flat = list(map(len, ids)), list(chain.from_iterable(ids))
        if not 0 <= min(flat) <= max(flat) < self.bound.ids:
            raise ValueError(f"token ids from {min(flat)} to {max(flat)}: not all are of the model's vocabulary")
        room = [BLOCK * len(row) - length - count for row, length, count in zip(pages, lengths, counts, strict=True)]
        assert min(room) >= 0 and all(0 <= n <= count for n, count in zip(outputs, counts, strict=True))
        same = len(pages) == len(self._pages)
        if not (same and all(a is b and len(a) == n for a, (b, n) in zip(pages, self._pages, strict=True))):
            self._batch, self._pages = self.bound.paged(pages), [(row, len(row)) for row in pages]
        return self._batch.run(self.loaded, flat, counts, outputs, lengths)


def spans(model: nn.Module) -> Spans | None:
    """None where the model is not served here."""
    return None if (bound := serving(model)) is None else Spans(model, bound)


def wants_huge_pages() -> bool:
    """Whether weights are to move into huge pages here: measured, or NANOQWEN_HUGE_PAGES=on or off."""
    gain = (Chosen.variant or {}).get("huge_page_gain", 1)
    return {"on": True, "off": False}.get(os.environ.get("NANOQWEN_HUGE_PAGES", ""), gain >= variants.HUGE_PAGES_WORTH)


def variant(model: nn.Module) -> str | None:
    """Which variant of the row products computes this model's tokens on a CPU, in words; None where PyTorch does."""
    bound = _bound.get(model)
    if bound is None or bound.struct is None or Chosen.variant is None:
        return None
    said = variants.describe(Chosen.variant)
    if bound.huge is not None and bound.huge.moved:
        said += f"; {bound.huge.moved / 1e6:,.0f} MB in huge pages"
    return said


def settle(model: nn.Module) -> None:
    """Brings a model's weights at once to where decoding moves them bit by bit: for a server, or a measurement."""
    if (bound := serving(model)) is not None:
        bound.settle()


def why(model: nn.Module) -> str | None:
    """Why it is PyTorch that computes this model's tokens on a CPU, in a few words; None where the C++ step does."""
    if (loaded := library()) is None:
        return Unavailable.reason
    return bind(model, loaded).reason


def head_copy_bytes(model: nn.Module) -> int:
    """Of the quantised copy that is read in the place of this model's output head; 0 where there is none."""
    bound = _bound.get(model)
    return bound.copy.nbytes if bound is not None and bound.copy is not None and bound.is_current(model) else 0
