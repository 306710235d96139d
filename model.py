"""Qwen3 in one file: text goes in as token ids and comes out as logits, and nothing in between is hidden.

Read it from top to bottom; nothing is used before it is explained. Module paths are the official safetensors names
(`model.layers.3.self_attn.q_proj.weight`), so the disk format *is* the architecture: loading is a strict copy by name.

The model follows
    Qwen3 Technical Report                 https://arxiv.org/abs/2505.09388
    Attention Is All You Need              https://arxiv.org/abs/1706.03762
    RMSNorm                                https://arxiv.org/abs/1910.07467
    RoFormer (rotary positions)            https://arxiv.org/abs/2104.09864
    YaRN (longer contexts)                 https://arxiv.org/abs/2309.00071
    GQA (grouped key/value heads)          https://arxiv.org/abs/2305.13245
    GLU Variants Improve Transformer       https://arxiv.org/abs/2002.05202
    Qwen2 (the older sibling, also here)   https://arxiv.org/abs/2407.10671

Letters for sizes:  B batch   T tokens   C hidden size   H query heads   K key/value heads   G = H / K
                    D head dim   S cached positions   V vocabulary
"""

import json
import math
import operator
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import console
from formats.config_json import KEPT_FIELDS, published_spelling, rope_type
from formats.official_names import EMBEDDING, HEAD
from formats.tensors import SAVED_EMPTY, all_finite
from ops.devices import check_device

# ---------------------------------------------------------------------------------------------------------------------
# Config: the fields of config.json under their official names. No model's sizes are hard-coded in this file.


@dataclass(init=False)
class Config:
    """The architecture of one checkpoint. `Config(**fields)` takes the fields of any published config.json.

    Fields without a default must be given. Both spellings of the rotary settings are read: the published flat one
    (`rope_theta`, `rope_scaling`) and transformers 5's nested `rope_parameters`. What this file does not implement, and
    contradictory fields, raise ValueError and are never ignored; fields that do not affect the result are kept in
    `other` and saved again. A field that no config.json of the family has is rejected as a misspelling; `from_dict` and
    `from_json`, which read other people's files, keep it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: transformers' default, 128 for Qwen3 and hidden_size / heads for Qwen2
    model_type: str = "qwen3"  # or qwen3_moe, qwen2
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    dtype: str | None = None  # of the stored weights; older files call it torch_dtype
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # Mixture of experts (qwen3_moe). Layer i is sparse if (i + 1) % decoder_sparse_step == 0 and i is not in mlp_only.
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)
    router_aux_loss_coef: float = 0.001  # weight of the routers' balance loss in training (training/balance.py)
    quantization_config: dict[str, Any] | None = None  # weights stored in int8 or int4 (compressed-tensors)

    def __init__(self, /, **given: Any):
        known = [f.name for f in fields(self)]
        for name in given:
            if name not in known and name not in KEPT_FIELDS and not name.startswith("_"):
                near = console.did_you_mean(name, [*known, *KEPT_FIELDS]) or f"; the fields are {', '.join(known)}"
                raise ValueError(f"config: no field is called {name[:60]!r}{near}")
        self._fill(given)

    def _fill(self, given: dict[str, Any]) -> None:
        given = published_spelling(given)
        kind = given.get("model_type")  # first: another architecture's config lacks fields of this one
        if kind not in (None, "qwen3", "qwen3_moe", "qwen2"):
            parts = [name for name in ("text_config", "thinker_config", "llm_config") if name in given]
            inner = f"; the model in its {parts[0]} is not run by itself" if parts else ""
            raise ValueError(f"config: model_type {kind!r} is not implemented; qwen3, qwen3_moe and qwen2 are{inner}")
        for f in fields(self):
            value = given.pop(f.name, None)
            if value is None and f.default_factory is not MISSING:
                value = f.default_factory()
            elif value is None:
                value = f.default
            if value is MISSING:
                raise ValueError(f"config lacks {f.name}; take config.json from the checkpoint's own repository")
            setattr(self, f.name, value)
        self.other = given
        self._check_fields()
        if self.num_key_value_heads == 0:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads if self.model_type == "qwen2" else 128
        self._check_combinations()

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Config":
        """From the fields of a config.json that another tool wrote, with whatever it added."""
        if not isinstance(given, dict):
            raise ValueError(f"config is a {type(given).__name__}, not a dict of the fields of a config.json")
        config = cls.__new__(cls)
        config._fill(given)
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> "Config":
        from formats.files import as_path
        from formats.json_file import read_json

        given = read_json(as_path("path", path))
        try:
            return cls.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json that transformers 4, transformers 5 and this file read back as the same model."""
        architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        result = {"architectures": [architecture[self.model_type]], **self.other}
        result.update({f.name: getattr(self, f.name) for f in fields(self)})
        result["torch_dtype"] = result.pop("dtype") or "float32"
        if self.model_type != "qwen3_moe":
            for name in MOE_FIELDS:
                del result[name]
        if self.quantization_config is None:
            del result["quantization_config"]
        return result

    @property
    def context_length(self) -> int:
        """The maximum number of positions. YaRN extends the original training context by `factor` (vLLM's rule)."""
        scaling = self.rope_scaling or {}
        if rope_type(scaling) != "yarn":
            return self.max_position_embeddings
        original = scaling.get("original_max_position_embeddings") or self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling["factor"] * original))

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        dense = self.model_type != "qwen3_moe" or layer in self.mlp_only_layers
        return not dense and (layer + 1) % self.decoder_sparse_step == 0

    def _check_fields(self) -> None:
        """Types and ranges of each field: a config.json is untrusted input."""
        for name, (low, high) in INTEGER_RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"config: {name} is {value!r}, which is not a whole number from {low} to {high:,}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
                raise ValueError(f"config: {name} is {value!r}, which is not a positive number below 1e30")
        balance = self.router_aux_loss_coef
        if isinstance(balance, bool) or not isinstance(balance, int | float) or not 0 <= balance < 1e30:
            raise ValueError(f"config: router_aux_loss_coef is {balance!r}, which is not a number from 0 up")
        if self.rope_theta <= 1:
            raise ValueError(f"config: rope_theta {self.rope_theta} is not above 1, so the frequencies would not fall")
        for name in ("attention_bias", "tie_word_embeddings", "norm_topk_prob"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"config: {name} is {getattr(self, name)!r}, which is neither true nor false")
        if self.hidden_act != "silu":
            raise ValueError(f"config: hidden_act {self.hidden_act!r} is not implemented; the Qwen family uses silu")
        if not isinstance(self.mlp_only_layers, list) or any(type(i) is not int for i in self.mlp_only_layers):
            raise ValueError(f"config: mlp_only_layers is {self.mlp_only_layers!r}, not a list of layer numbers")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"config: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        check_end_tokens("config", self.eos_token_id)
        if self.quantization_config is not None and not isinstance(self.quantization_config, dict):
            raise ValueError("config: quantization_config is not an object {...}")

    def _check_combinations(self) -> None:
        """Fields that contradict each other, and options of the format that no published Qwen uses."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} is odd, but rotary positions rotate pairs of numbers")
        if self.model_type == "qwen3_moe":
            if self.num_experts_per_tok > self.num_experts:
                raise ValueError(
                    f"config: num_experts_per_tok {self.num_experts_per_tok} is more than "
                    f"num_experts {self.num_experts}"
                )
            if not self.moe_intermediate_size:
                raise ValueError("config lacks moe_intermediate_size, the width of an expert")
        layer_types, window_from = self.other.get("layer_types") or [], self.other.get("max_window_layers")
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"config: layer_types is {layer_types!r}; sliding-window attention is not implemented")
        beyond = type(window_from) is int and window_from >= self.num_hidden_layers  # the first layer with a window
        if self.other.get("use_sliding_window") and not beyond:
            raise ValueError("config: sliding-window attention is not implemented; no published Qwen3 uses it")
        if self.other.get("attention_dropout"):
            raise ValueError("config: attention_dropout is not implemented; every published Qwen has 0.0")
        rope_frequencies(self)  # raises for a rope type that is not implemented
        if self.context_length > MAX_POSITIONS:
            raise ValueError(
                f"config: yarn's factor asks for {self.context_length:,} positions, beyond {MAX_POSITIONS:,}"
            )


def check_config(config: Any) -> None:
    if not isinstance(config, Config):
        given = type(config).__name__
        raise ValueError(f"config is a {given}, not a Config; Qwen3.from_pretrained opens the model of a directory")


MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MAX_POSITIONS = 1 << 24  # positions past it are not exact in float32
INTEGER_RANGES = {  # far above every published model, far below what would exhaust memory before the mistake is noticed
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (0, 1 << 12),
    "head_dim": (0, 1 << 14),
    "max_position_embeddings": (1, MAX_POSITIONS),
    "num_experts": (0, 1 << 12),
    "num_experts_per_tok": (1, 1 << 12),
    "moe_intermediate_size": (0, 1 << 22),
    "decoder_sparse_step": (1, 1 << 10),
}


def check_end_tokens(place: str, value: Any) -> None:
    """ValueError where eos_token_id is neither null nor a token id nor a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ValueError(f"{place}: eos_token_id is {value!r}, which is neither a token id nor a list of them")


# ---------------------------------------------------------------------------------------------------------------------
# The layers, smallest first.


class Linear(nn.Linear):
    """x·Wᵀ + b with uninitialised weights: `Qwen3` initialises or loads them once, so PyTorch need not do it first.

    On the meta device PyTorch's own initialisation would import 800 modules (3 s and 70 MB) and fill no memory.
    """

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """A row of weights for each token id, uninitialised like those of `Linear`."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean over the last dimension. x [..., C] → [..., C] in x's dtype.

    The quotient is computed in float32 and rounded to x's dtype *before* the weight multiplies it; the other order
    differs in the last bit of bfloat16, and this one is what the official weights were trained with.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """The angle in radians by which each pair is rotated per position, float32 [D/2], and a factor on the result.

    Pair i rotates by theta^(-2i/D) (RoFormer, section 3.2.2). YaRN (section 3.2) slows the low frequencies by `factor`,
    so that a longer text stays within the angles seen in training, keeps the high ones, and interpolates in between.
    """
    dim, theta, scaling = config.head_dim, float(config.rope_theta), config.rope_scaling
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if scaling is None:
        return frequencies, 1.0
    kind = rope_type(scaling)
    if kind != "yarn":
        raise ValueError(f"config: rope type {kind!r} is not implemented; the Qwen family uses default and yarn")
    known = {"rope_type", "factor", "original_max_position_embeddings", "attention_factor"}
    known |= {"beta_fast", "beta_slow", "truncate"}
    for name, value in scaling.items():
        if name not in known and value is not None:
            raise ValueError(f"config: rope_scaling has {name}, which is not implemented for yarn")

    def number(name: str, default: float | None) -> float:
        value = default if scaling.get(name) is None else scaling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-9 < value < 1e9:
            raise ValueError(f"config: rope_scaling {name} is {value!r}, but yarn needs a positive number there")
        return float(value)

    factor = number("factor", None)
    original = number("original_max_position_embeddings", config.max_position_embeddings)

    def pair_that_turns(times: float) -> float:
        """Which pair (as a real number) completes so many rotations within the original context."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(number("beta_fast", 32.0)), pair_that_turns(number("beta_slow", 1.0))
    truncate = scaling.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"config: rope_scaling truncate is {truncate!r}, which is neither true nor false")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    frequencies = frequencies / factor * (1 - kept) + frequencies * kept
    return frequencies, number("attention_factor", 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + D/2]) by its angle. x [B, H, T, D]; cos, sin [B, 1, T, D] → [B, H, T, D].

    `sin` comes with its first half negated, which saves the usual "rotate half" copy:
    (a, b) → (a·cos - b·sin, b·cos + a·sin).
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """Keys and values of every position seen, so that a new token need not compute them again.

    Allocated once for `max_len` positions and passed in from outside: the layers hold no state. Rows may have
    different lengths; row b has seen `lengths[b]` positions, and the next call appends to them.

        keys, values               a list over layers of [B, K, max_len, D]
        key_scales, value_scales   with the dtype torch.int8: a list over layers of bfloat16 [B, K, max_len, 1], else []

    With torch.int8 each head's key and value of a position are whole numbers n from -127 to 127, stored as n + 128 in
    uint8, times a scale: half the memory of bfloat16, and half of what a token reads of a long context. A model in
    float32 may keep them in torch.float16, where what is beyond its range becomes its largest number.
    """

    def __init__(self, config: Config, batch_size: int = 1, max_len: int = 256, device=None, dtype=None):
        check_config(config)
        if dtype not in (None, *DTYPES.values(), torch.int8):
            raise ValueError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16, torch.float16 or torch.int8")
        if device is not None:
            check_device(device)
        if type(batch_size) is not int or batch_size < 1 or type(max_len) is not int:
            raise ValueError(f"a cache of {batch_size!r} rows and {max_len!r} positions: give whole numbers from 1")
        if not 1 <= max_len <= config.context_length:
            raise ValueError(f"cache of {max_len:,} positions: the model's context is {config.context_length:,}")
        shape = (batch_size, config.num_key_value_heads, max_len, config.head_dim)
        # One row needs no zeros, and the operating system hands out pages only when a position is first written. Rows
        # of different lengths read (with weight 0) slots that were never written, where 0 · NaN would be NaN.
        self._new = torch.empty if batch_size == 1 else torch.zeros
        layers, eight_bits = range(config.num_hidden_layers), dtype == torch.int8

        def new(shape: tuple[int, ...], dtype: torch.dtype | None) -> list[Tensor]:
            return [self._new(shape, device=device, dtype=dtype) for _ in layers]

        dtype, scales = torch.uint8 if eight_bits else dtype, (*shape[:3], 1)
        self.keys, self.values = new(shape, dtype), new(shape, dtype)
        self.key_scales = new(scales, torch.bfloat16) if eight_bits else []
        self.value_scales = new(scales, torch.bfloat16) if eight_bits else []
        self.lengths = [0] * batch_size
        self.max_len = max_len

    def positions(self, tokens: int) -> Tensor:
        """The next `tokens` positions of each row: LongTensor [B, T], or [1, T] if all rows have the same length."""
        starts = self.lengths[:1] if self.is_uniform else self.lengths
        if min(starts) < 0:
            raise ValueError(f"cache with a length of {min(starts):,}: a length is a number of positions, from 0")
        if max(starts) + tokens > self.max_len:
            raise ValueError(f"cache of {self.max_len:,} positions: {max(starts):,} are used, {tokens:,} more needed")
        device = self.keys[0].device
        return torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, each [B, K, max_len, …]."""
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    @property
    def is_uniform(self) -> bool:
        return all(length == self.lengths[0] for length in self.lengths)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [B, K, T, D] of one layer and returns all keys and values so far, [B, K, S, D] views."""
        if not self.key_scales:
            largest = torch.finfo(torch.float16).max
            found = [
                self._put(stored, x.clamp(-largest, largest) if stored.dtype == torch.float16 else x, positions)
                for x, stored in ((k, self.keys[layer]), (v, self.values[layer]))
            ]
            return found[0].to(k.dtype), found[1].to(v.dtype)
        found = []
        for x, codes, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            scale = (x.float().abs().amax(-1, keepdim=True) / 127).bfloat16()
            inverse = torch.where(scale > 0, 1 / scale.float(), 0)
            code = (x.float() * inverse).clamp(-127, 127).round().add(128).to(torch.uint8)
            code, scale = self._put(codes[layer], code, positions), self._put(scales[layer], scale, positions)
            found.append(((code.float() - 128) * scale.float()).to(x.dtype))
        return found[0], found[1]

    def _put(self, stored: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        """Writes new [B, K, T, …] to its positions in one of the tensors; a view of all that it holds then."""
        tokens = new.shape[2]
        end = max(self.lengths) + tokens
        if len(positions) == 1:
            stored[:, :, end - tokens : end] = new
        else:
            rows = torch.arange(len(positions), device=stored.device)[:, None]
            stored[rows, :, positions] = new.transpose(1, 2)
        return stored[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.lengths = [length + tokens for length in self.lengths]

    def truncate(self, lengths: int | list[int]) -> None:
        """Drops what is beyond the given length of each row: padding, a rejected draft, a changed history."""
        rows = lengths if isinstance(lengths, Iterable) else [lengths] * len(self.lengths)
        try:
            wanted = [operator.index(length) for length in rows]
        except TypeError:
            wanted = []
        if len(wanted) != len(self.lengths) or not all(
            0 <= n <= old for n, old in zip(wanted, self.lengths, strict=True)
        ):
            raise ValueError(f"truncate to {lengths}: the cache's rows have {self.lengths} positions")
        self.lengths = wanted

    def row(self, row: int) -> "KVCache":
        """One row as a cache: a view of these keys and values with a length of its own."""
        view = copy(self)
        view._replace(lambda tensor: tensor[row : row + 1])
        view.lengths = self.lengths[row : row + 1]
        return view

    def grow(self, max_len: int) -> None:
        """Makes room for `max_len` positions and keeps those that are filled."""
        filled = max(self.lengths)
        if type(max_len) is not int or max_len < filled:
            raise ValueError(f"grow to {max_len!r} positions: {filled:,} are used; give a whole number from there")

        def grown(old: Tensor) -> Tensor:
            new = self._new((*old.shape[:2], max_len, old.shape[3]), device=old.device, dtype=old.dtype)
            new[:, :, :filled] = old[:, :, :filled]
            return new

        self._replace(grown)
        self.max_len = max_len

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "key_scales", "value_scales"):
            setattr(self, name, [change(tensor) for tensor in getattr(self, name)])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q·kᵀ / √D)·v. q [B, H, T, D]; k, v [B, K, S, D]; mask bool [B or 1, 1, T, S] → [B, H, T, D]."""
    B, H, T, D = q.shape
    K = k.shape[1]
    if T > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
    # One token: the G query heads that share a key head take the place of the token dimension; no key is copied.
    return F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v, attn_mask=mask).reshape(B, H, 1, D)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys (Qwen3 has QK-norm, Qwen2 does not)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        qwen2 = config.model_type == "qwen2"  # always a bias on q, k, v, never on o
        bias = config.attention_bias or qwen2
        self.q_proj = Linear(C, heads * config.head_dim, bias=bias)
        self.k_proj = Linear(C, kv_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(C, kv_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(heads * config.head_dim, C, bias=bias and not qwen2)
        self.q_norm = nn.Identity() if qwen2 else RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.Identity() if qwen2 else RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: "Pass") -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.norm_rotate(q, k, shared)
        v = v.transpose(1, 2)  # [B, K, T, D]
        if shared.cache is not None:
            k, v = shared.cache.write(self.layer, k, v, shared.positions)
        out = attention(q, k, v, shared.mask, shared.causal)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def norm_rotate(self, q: Tensor, k: Tensor, shared: "Pass") -> tuple[Tensor, Tensor]:
        """q [B, T, H, D], k [B, T, K, D] → [B, H, T, D] and [B, K, T, D], normalised and rotated to their positions."""
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        return rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). x [..., C] → [..., C]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """A mixture of experts: a router picks a few small MLPs for each token and adds their weighted outputs."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        expert = (config.hidden_size, config.moe_intermediate_size)
        self.experts = nn.ModuleList(MLP(*expert) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1, dtype=torch.float32).topk(self.top_k, -1)  # [B·T, top_k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights, out = weights.to(x.dtype), torch.zeros_like(flat)
        # Each expert once, with all of its tokens; in training also those without any, so that all have gradients.
        used = range(len(self.experts)) if self.training and torch.is_grad_enabled() else chosen.unique().tolist()
        for index in used:
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, self.experts[index](flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class Block(nn.Module):
    """One decoder layer: attention, then the MLP, each on normalised input and added to the residual stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.is_sparse(layer)
        self.mlp = MoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, shared: "Pass") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Pass:
    """What all layers of one forward pass share. Made by `Decoder`, the same for each layer."""

    cos: Tensor  # [B or 1, 1, T, D] in the activations' dtype
    sin: Tensor
    mask: Tensor | None  # bool [B or 1, 1, T, S], True where a query may attend; None: `causal`, or no mask
    causal: bool
    cache: KVCache | None
    positions: Tensor  # [B or 1, T]


class Decoder(nn.Module):
    """Token ids to normalised hidden states: everything but the head. LongTensor [B, T] → [B, T, C]."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies, self.rope_factor = rope_frequencies(config)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """`.to(dtype)` and the like leave the frequencies in float32: rounded to bfloat16, position 1,000 would be
        rotated by whole turns too many."""
        exact = self.rope_frequencies
        super()._apply(fn, recurse)
        if self.rope_frequencies.dtype != exact.dtype:
            self.rope_frequencies = exact.to(self.rope_frequencies.device)
        return self

    def forward(self, ids: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """`mask` (bool [B, 1, T, T], without a cache) replaces the causal one: documents packed into one row."""
        x = self.embed_tokens(ids)
        shared = self._pass(x, ids.shape[1], cache, mask)
        for layer in self.layers:
            x = layer(x, shared)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)

    def _pass(self, x: Tensor, tokens: int, cache: KVCache | None, mask: Tensor | None) -> Pass:
        if cache is None:
            positions = torch.arange(tokens, device=x.device)[None]
            causal = mask is None and tokens > 1
        else:
            assert mask is None
            positions = cache.positions(tokens)
            seen = max(cache.lengths)
            causal = seen == 0 and tokens > 1
            if not causal and (tokens > 1 or len(positions) > 1):  # a query at position p attends to 0..p
                slots = torch.arange(seen + tokens, device=x.device)
                mask = (slots <= positions[:, :, None])[:, None]
        angles = positions[:, None, :, None].float() * self.rope_frequencies  # [B or 1, 1, T, D/2]
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        return Pass(cos, sin, mask, causal, cache, positions)


def check_lengths(cache: KVCache) -> None:
    if not isinstance(cache.lengths, list | tuple) or not all(type(length) is int for length in cache.lengths):
        raise ValueError(f"the cache's lengths are {cache.lengths!r:.80}; give a list with a whole number for each row")


def check_ids(model: "Qwen3", ids: Any, cache: KVCache | None) -> None:
    """One ValueError for what is wrong with the arguments of `Qwen3.forward`, in a few microseconds.

    The range of the ids is checked on the CPU only: on a GPU it would cost a synchronisation at every step.
    """
    if not isinstance(ids, Tensor):
        hint = "; a text becomes ids by Chat.encode" if isinstance(ids, str) else ""
        raise ValueError(f"ids is a {type(ids).__name__}, but must be a LongTensor [B, T]{hint}")
    if ids.dim() != 2:
        hint = "; for one row give ids[None]" if ids.dim() == 1 else ""
        raise ValueError(f"ids has the shape {list(ids.shape)}, but must be [B, T]{hint}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids has the dtype {ids.dtype}, but token ids are whole numbers: torch.int64")
    config = model.config
    if ids.numel() == 0:
        raise ValueError(f"ids has the shape {list(ids.shape)}: it has no tokens")
    if ids.device.type != model.device.type:
        raise ValueError(f"ids is on {ids.device}, but the model is on {model.device}")
    if ids.is_cpu and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is not from 0 to {config.vocab_size - 1:,}, the model's vocabulary")
    if cache is None:
        if ids.shape[1] > config.context_length:
            raise ValueError(
                f"ids has {ids.shape[1]:,} positions, but the model's context is {config.context_length:,}"
            )
        return
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}, not a KVCache(model.config, ...)")
    keys = cache.keys[0] if cache.keys else ids
    shape = (len(ids), config.num_key_value_heads, cache.max_len, config.head_dim)
    if len(cache.keys) != config.num_hidden_layers or keys.shape[1::2] != shape[1::2]:
        raise ValueError("the cache was made for a model of another shape; make it from this model's config")
    check_lengths(cache)
    if len(cache.lengths) != shape[0]:
        raise ValueError(f"the cache has {len(cache.lengths)} rows, but ids has {shape[0]}")
    if keys.device != model.device:
        raise ValueError(f"the cache is on {keys.device}, but the model is on {model.device}")
    half = (keys.dtype, model.dtype) == (torch.float16, torch.float32)
    if keys.dtype != model.dtype and not (half or cache.key_scales or torch.is_autocast_enabled(keys.device.type)):
        raise ValueError(f"the cache has the dtype {keys.dtype}, but the model's is {model.dtype}")


class Qwen3(nn.Module):
    """The language model: LongTensor ids [B, T] → logits [B, T, V] for the token after each position.

    `Qwen3(config)` has random initial weights; `Qwen3.from_pretrained(src)` those of a checkpoint.
    """

    cache_dtype: torch.dtype | None = None  # of new caches: torch.int8, torch.float16, or None, the model's own
    kernels = "auto"  # of the token step on a GPU: torch, triton, or auto (ops/devices.py: pick_kernels)

    def __init__(self, config: Config):
        super().__init__()
        check_config(config)
        self.config = config
        self.generation_config: dict[str, Any] = {}  # the checkpoint's recommended sampling and its end tokens
        self.path: Path | None = None  # of the checkpoint that it was loaded from
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, the cache and the logits; weights may be stored in another type."""
        return self.model.norm.weight.dtype

    def forward(self, ids: Tensor, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """With a cache the T positions are appended to it, and no gradients are recorded: a graph through the cache
        would grow with every token. `last` computes the logits of the last position only.

        Raises ValueError for ids that are invalid for this model and for a cache that does not fit them.
        """
        check_ids(self, ids, cache)
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(ids, cache, last)
        if cache is not None and ids.is_cpu:
            from ops.cpu.step import step  # the same computation in C++

            if (logits := step(self, ids, cache, last)) is not None:
                return logits
        if cache is not None and ids.is_cuda and ids.shape[1] == 1:
            from ops.gpu.graphs import step  # the same for one token on a GPU, its launches captured once

            if (logits := step(self, ids, cache)) is not None:
                return logits
        x = self.model(ids, cache)
        return self.head(x[:, -1:] if last else x)

    def head(self, x: Tensor) -> Tensor:
        """Hidden states [..., C] → logits [..., V]; a tied head is the embedding transposed."""
        if self.config.tie_word_embeddings:
            embedding = self.model.embed_tokens
            return F.linear(x, embedding.weight) if isinstance(embedding, nn.Embedding) else embedding.multiply(x)
        return self.lm_head(x)

    @classmethod
    def from_pretrained(
        cls, src: str | Path, device="cpu", dtype: torch.dtype | str | None = None, adapter: str | Path | None = None
    ) -> "Qwen3":
        """The model of a directory, hub id or .gguf file. dtype None keeps the stored one; `adapter` is a PEFT adapter
        (directory or hub id) to merge into it. If `src` is an adapter, its base is loaded too.

        Raises ValueError with one line for everything that can be wrong with a checkpoint.
        """
        from formats.checkpoint import open_checkpoint
        from formats.source import resolve

        given = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and given not in DTYPES.values():
            raise ValueError(f"dtype is {dtype!r}; the model computes in float32, bfloat16, float16 or float64")
        if device is None:
            raise ValueError("device is None; give cpu, cuda or mps")
        check_device(device)
        adapter = None if adapter is None else resolve(adapter, "adapter")
        return load(open_checkpoint(resolve(src), adapter), device, given)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in the official layout, each whole or not at all."""
        from safetensors.torch import save_file

        from formats.files import as_path, atomic_file, write_text

        directory = as_path("directory", directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        self.config.dtype = str(weights[EMBEDDING].dtype).removeprefix("torch.")
        with atomic_file(directory / "model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        write_text(directory / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
        if self.generation_config:
            write_text(directory / "generation_config.json", json.dumps(self.generation_config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Loading: build on the meta device (shapes without memory), then fill strictly, one tensor at a time.


def load(checkpoint, device="cpu", dtype: torch.dtype | None = None, check_values: bool = True) -> Qwen3:
    """Fills a model from an open checkpoint (formats/checkpoint.py). All defects are listed in one ValueError.

    dtype None keeps the stored one. On the CPU the matrices of a GGUF then stay in its blocks (ops/blocks.py), under
    activations in float32, or in bfloat16 where the file is; new caches of float32 activations are in float16.

    `check_values` looks for NaN and infinity, which reads all weights. Sampling does not need it: the logits show it.
    """
    model, defects = skeleton(checkpoint)
    stored, in_blocks = checkpoint.tensors, {}
    if dtype is None and checkpoint.path.is_file() and torch.device(device).type == "cpu":
        from ops.blocks import swap_blocks

        dtype = torch.bfloat16 if model.config.dtype == "bfloat16" else torch.float32
        in_blocks = swap_blocks(model, checkpoint, dtype)
        if in_blocks and dtype == torch.float32:
            model.cache_dtype = torch.float16  # finer than such weights, and half of the memory
    if dtype is None:
        embedding = stored.get(EMBEDDING)
        stated = model.config.dtype
        dtype = getattr(torch, stated) if stated else embedding.dtype if embedding else torch.float32
    slots = model.state_dict()
    for name in stored:
        if name == HEAD and name not in slots:  # of a tied model, equal to the embedding (formats/official_names.py)
            continue
        if name in in_blocks:
            in_blocks[name].weight_blocks = checkpoint.blocks(name)
            if check_values and not in_blocks[name].is_finite():
                defects["non-finite"].append(name)
            continue
        tensor = checkpoint.read(name)
        if check_values and not all_finite(tensor):
            defects["non-finite"].append(name)
        if name not in slots or not _fits(stored[name], slots[name]):
            continue
        scale = name.endswith(".weight_scale")  # of quantised weights: it keeps its type, whatever the activations'
        target = dtype if tensor.is_floating_point() and not scale else slots[name].dtype
        loaded = tensor.to(device, target)
        if target != tensor.dtype and not all_finite(loaded) and all_finite(tensor):
            defects["non-finite"].append(f"{name} as {target}")
        if loaded.data_ptr() != tensor.data_ptr():
            checkpoint.release(name)  # this is a copy, so the file's pages need not stay in memory
        _place(model, name, loaded)
    refuse(checkpoint, defects)
    model.model.rope_frequencies = model.model.rope_frequencies.to(device)
    model.generation_config, model.path = checkpoint.generation_config, checkpoint.path
    return model.eval()


def skeleton(checkpoint) -> tuple[Qwen3, dict[str, list[str]]]:
    """The model that config.json describes, on the meta device, and the stored tensors that do not fit it.

    Reads no weight. The defects (kind → names) are for `refuse`, once the caller has added its own findings.
    """
    path, stored = checkpoint.path, checkpoint.tensors
    try:
        config = Config.from_dict(checkpoint.config)
        _check_task(config)
        check_end_tokens("generation_config", checkpoint.generation_config.get("eos_token_id"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.num_hidden_layers * max(1, config.num_experts) > len(stored):
        raise ValueError(
            f"{path}: config asks for {config.num_hidden_layers} layers and {config.num_experts} experts, "
            f"but the checkpoint holds only {len(stored)} tensors"
        )
    with torch.device("meta"):
        model = Qwen3(config)
    if config.quantization_config is not None:
        from ops.quant import swap_linears

        try:
            swap_linears(model, config.quantization_config)
        except ValueError as error:
            raise ValueError(f"{path}: config: {error}") from None
    slots = model.state_dict()
    known = {*slots, HEAD} if config.tie_word_embeddings else {*slots}  # the official 0.6B and 1.7B store a tied head
    both = [(name, stored[name], slots[name]) for name in stored if name in slots]
    return model, {
        "missing": [name for name in slots if name not in stored],
        "unexpected": [name for name in stored if name not in known],
        "mis-shaped": [
            f"{name} {list(info.shape)} instead of {list(slot.shape)}"
            for name, info, slot in both
            if info.shape != slot.shape
        ],
        "mis-typed": [f"{name} {info.dtype}" for name, info, slot in both if not _same_kind(info.dtype, slot.dtype)],
        "non-finite": [],
    }


def _check_task(config: Config) -> None:
    """ValueError for a model of the family that does not predict the next token."""
    architectures = config.other.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    for task, gives in (
        ("SequenceClassification", "a score for each class"),
        ("TokenClassification", "a class for each token"),
        ("QuestionAnswering", "the place of an answer"),
        ("RewardModel", "a score"),
    ):
        if str(architecture).endswith(task):
            raise ValueError(
                f"config: a {architecture} gives {gives}, not a next token; only Qwen…ForCausalLM is run here"
            )


def refuse(checkpoint, defects: dict[str, list[str]], most: int = 6) -> None:
    """One ValueError that lists all defects, if there are any."""
    if not any(defects.values()):
        return
    if [name for names in defects.values() for name in names] == [HEAD] and defects["missing"]:
        raise ValueError(f"{checkpoint.path}: missing: {HEAD}, so this model gives embeddings, not a next token")
    if empty := [entry.split(" [")[0] for entry in defects.get("mis-shaped", ()) if " [0] " in entry]:
        raise ValueError(f"{checkpoint.path}: {empty[0]} and others ({len(empty)} in all) were {SAVED_EMPTY}")
    found = []
    for kind, names in defects.items():
        more = f" and {len(names) - most} more" if len(names) > most else ""
        found += [f"{kind}: {', '.join(names[:most])}{more}"] if names else []
    misfit = "weights that do not fit config.json (take both from the same source)"
    place = f"{checkpoint.path}: {'weights that do not fit its metadata' if checkpoint.path.is_file() else misfit}"
    raise ValueError(f"{place}: {'; '.join(found)}")


def _fits(info, slot: Tensor) -> bool:
    return info.shape == slot.shape and _same_kind(info.dtype, slot.dtype)


def _same_kind(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Floating-point types convert into each other; packed integers stay as they are."""
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a meta tensor, as a parameter or a buffer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor
