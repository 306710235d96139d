"""EXPERIMENTAL: one token through a layer in five kernels, Triton's share of ops/gpu/graphs.py (twins in PyTorch).
Never measured on a GPU yet: compiled for one, and checked against the twins in Triton's interpreter.

At batch 1 a token is one read of every weight, and on a fast GPU even the time between two kernels counts: at 4.8 TB/s
a layer of Qwen3-0.6B (31 MB) takes 7 µs, a launch within a CUDA graph one or two. So there are two operations only:

    linear   norm → product with one, two or three matrices (bf16, int8, int4) → silu·up → + residual; one kernel
    attend   q/k-norm, rotary position, cache, attention; one kernel, and for long contexts a second one

    linear(norm, q k v) → attend → linear(o, + residual) → linear(norm, gate up, silu) → linear(down, + residual)

The attention over a long context is split into parts for many multiprocessors, and their softmax sums are joined
afterwards, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/; FlashAttention: https://arxiv.org/abs/2205.14135).
The sizes of the blocks below are estimates; none has been tuned on a GPU yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ops.quant import QuantizedLinear

MOST_ROWS = 16  # tokens at once; with more a matrix library does better
SLOTS = 32  # cached positions that a program looks at in one turn
SHORT = 128  # up to how many positions attention stays in one part; beyond there are 16 to 64

# ---------------------------------------------------------------------------------------------------------------------
# Linear layers.


@triton.jit
def _stored(weight, n, inside, start, row_size, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows n of a matrix from column `start` on, as they are stored: [rows, BLOCK_K], with 4 bits half as many."""
    PER: tl.constexpr = 2 if BITS == 4 else 1
    place = start // PER + tl.arange(0, BLOCK_K // PER)
    # Where a row is padded to whole words, the padding meets an x of 0.
    return tl.load(weight + n * row_size + place[None, :], mask=inside & (place < row_size)[None, :], other=0)


@triton.jit
def _scales(
    scale, n, inside, start, columns, groups, group_size, BITS: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):
    """The scales [rows, BLOCK_K / GROUP] that belong to `_stored`. A scale's group holds one or more GROUPs."""
    if BITS > 8:
        result = 0
    else:
        place = start + tl.arange(0, BLOCK_K // GROUP) * GROUP
        result = tl.load(
            scale + n * groups + (place // group_size)[None, :], mask=inside & (place < columns)[None, :], other=0.0
        )
    return result


@triton.jit
def _values(stored, scale, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """float32 [BLOCK_N, BLOCK_K]: (code - 2^(bits-1)) · scale; the layout is formats/compressed_tensors.py's."""
    if BITS > 8:
        result = stored.to(tl.float32)
    else:
        code = tl.interleave(stored & 15, stored >> 4) if BITS == 4 else stored
        code = code.to(tl.float32) - (1 << BITS - 1)
        code = tl.reshape(code, [BLOCK_N, BLOCK_K // GROUP, GROUP]) * scale.to(tl.float32)[:, :, None]
        result = tl.reshape(code, [BLOCK_N, BLOCK_K])
    return result


@triton.jit(do_not_specialize=["rows_a", "rows_b", "rows_c"])  # so that they are of one type
def _linear(
    x, gain, residual, out, weight_a, weight_b, weight_c, scale_a, scale_b, scale_c, bias_a, bias_b, bias_c,
    rows_a, rows_b, rows_c, tokens, columns, row_size, groups, group_size, eps,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one of the matrices times all tokens. Each program norms the tokens for itself: they are few, and
    in the cache. Of the weights, the next block is on its way while one is multiplied, the first during the norm."""
    block, width = tl.program_id(0), rows_a
    weight, scale, bias, rows, before = weight_a, scale_a, bias_a, rows_a, 0
    if not GATED:
        blocks_a, blocks_b, width = tl.cdiv(rows_a, BLOCK_N), tl.cdiv(rows_b, BLOCK_N), rows_a + rows_b + rows_c
        if block >= blocks_a + blocks_b:
            weight, scale, bias, rows, before = weight_c, scale_c, bias_c, rows_c, rows_a + rows_b
            block -= blocks_a + blocks_b
        elif block >= blocks_a:
            weight, scale, bias, rows, before = weight_b, scale_b, bias_b, rows_b, rows_a
            block -= blocks_a
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside, token = n < rows, tl.arange(0, TOKENS)[:, None]
    dtype = out.dtype.element_ty
    stored = _stored(weight, n, inside, 0, row_size, BITS, BLOCK_K)
    scales = _scales(scale, n, inside, 0, columns, groups, group_size, BITS, BLOCK_K, GROUP)
    if GATED:
        stored_up = _stored(weight_b, n, inside, 0, row_size, BITS, BLOCK_K)
        scales_up = _scales(scale_b, n, inside, 0, columns, groups, group_size, BITS, BLOCK_K, GROUP)
    if NORM:
        squares = tl.zeros([TOKENS, BLOCK_K], tl.float32)
        for start in range(0, columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            value = tl.load(x + token * columns + k, mask=(token < tokens) & (k < columns), other=0.0).to(tl.float32)
            squares += value * value
        norm = tl.rsqrt(tl.sum(squares, 1) / columns + eps)[:, None]
    total = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    total_up = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k, following = start + tl.arange(0, BLOCK_K)[None, :], start + BLOCK_K
        value = tl.load(x + token * columns + k, mask=(token < tokens) & (k < columns), other=0.0).to(tl.float32)
        if NORM:
            value = (value * norm).to(dtype).to(tl.float32)
            value = (value * tl.load(gain + k, mask=k < columns, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        now = _values(stored, scales, BITS, BLOCK_N, BLOCK_K, GROUP)
        stored = _stored(weight, n, inside, following, row_size, BITS, BLOCK_K)
        scales = _scales(scale, n, inside, following, columns, groups, group_size, BITS, BLOCK_K, GROUP)
        if TOKENS == 1:
            total += tl.sum(now * value, 1)[:, None]
        else:
            total = tl.dot(now, tl.trans(value), total, input_precision=PRECISION)
        if GATED:
            now = _values(stored_up, scales_up, BITS, BLOCK_N, BLOCK_K, GROUP)
            stored_up = _stored(weight_b, n, inside, following, row_size, BITS, BLOCK_K)
            scales_up = _scales(scale_b, n, inside, following, columns, groups, group_size, BITS, BLOCK_K, GROUP)
            if TOKENS == 1:
                total_up += tl.sum(now * value, 1)[:, None]
            else:
                total_up = tl.dot(now, tl.trans(value), total_up, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    result = total.to(dtype).to(tl.float32)
    if GATED:
        result = (result * tl.sigmoid(result)).to(dtype).to(tl.float32) * total_up.to(dtype).to(tl.float32)
    token = tl.arange(0, TOKENS)[None, :]
    place, stays = token * width + before + n, inside & (token < tokens)
    if ADD:
        result = result.to(dtype).to(tl.float32) + tl.load(residual + place, mask=stays, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(dtype), mask=stays)


def serves(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `linear` takes this layer: unquantised in the activations' dtype, or quantised as ops/quant.py does."""
    if isinstance(module, QuantizedLinear):
        return module.in_features % module.weight_scale.shape[1] == 0 and module.weight_packed.is_contiguous()
    return isinstance(module, nn.Linear | nn.Embedding) and module.weight.dtype == dtype


def _parts(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Stored weights, scales, bias and bits of a layer. What a layer lacks is not read."""
    bias = getattr(module, "bias", None)
    if isinstance(module, QuantizedLinear):
        return module.weight_packed.view(torch.uint8), module.weight_scale, bias, module.bits
    return module.weight, module.weight, bias, 16


def linear(
    x: Tensor,
    modules: tuple[nn.Module, ...],
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x [B, in], B up to MOST_ROWS → [B, the modules' out_features side by side]. Twin: `linear` in ops/gpu/graphs.py.

    The one to three modules (linear layers, or an embedding as a head) are all of one kind and width. `norm` is put in
    front, `gated` makes silu(first)·second of two, and `residual` [B, out] is added at the end.
    """
    x = x.contiguous()
    (tokens, columns), count = x.shape, len(modules)
    padded = [*modules, *modules[:1] * (3 - count)]
    weights, scales, biases, (bits, *_) = zip(*map(_parts, padded), strict=True)
    rows = [len(weight) for weight in weights[:count]] + [0] * (3 - count)
    groups = scales[0].shape[1] if bits < 16 else 1
    group_size = columns if groups == 1 else columns // groups
    widest = 1024 if tokens == 1 else 128 if gated else 256  # so that registers do not spill, see tests/ops/gpu
    block_k = max(16, min(widest, triton.next_power_of_2(columns)))
    block_n = 16 if tokens > 1 else 4 if bits == 16 or gated else 8
    blocks = [triton.cdiv(count, block_n) for count in (rows[:1] if gated else rows)]
    out = torch.empty(tokens, rows[0] if gated else sum(rows), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _linear[(sum(blocks),)](
            x, x if norm is None else norm.weight, x if residual is None else residual, out,
            *weights, *scales, *(weights if biases[0] is None else biases),
            *rows, tokens, columns, weights[0].shape[1], groups, group_size, 0.0 if norm is None else norm.eps,
            NORM=norm is not None, GATED=gated, ADD=residual is not None, BIAS=biases[0] is not None, BITS=bits,
            TOKENS=1 if tokens == 1 else max(16, triton.next_power_of_2(tokens)), BLOCK_N=block_n, BLOCK_K=block_k,
            GROUP=block_k if groups == 1 else min(block_k, group_size & -group_size),
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Attention of one token to a cache.


@triton.jit
def norm_rotated(x, start, inside, gain, cos, sin, d, size, eps, dtype: tl.constexpr, NORM: tl.constexpr):
    """Heads [heads, size] at x + start, normed and turned to their position; rounded to `dtype` where model.py does.

    d is [1, BLOCK]; cos and sin point to the position's row. The other number of each pair is read a second time rather
    than moved between threads.
    """
    partner = (d + size // 2) % size
    value = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(x + start + partner, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / size + eps)[:, None]
        gain_d = tl.load(gain + d, mask=d < size, other=0.0).to(tl.float32)
        value = ((value * scale).to(x.dtype.element_ty).to(tl.float32) * gain_d).to(dtype).to(tl.float32)
        gain_d = tl.load(gain + partner, mask=d < size, other=0.0).to(tl.float32)
        turned = ((turned * scale).to(x.dtype.element_ty).to(tl.float32) * gain_d).to(dtype).to(tl.float32)
    value *= tl.load(cos + d, mask=d < size, other=0.0).to(tl.float32)
    turned *= tl.load(sin + d, mask=d < size, other=0.0).to(tl.float32)
    return (value.to(dtype).to(tl.float32) + turned.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _attend(
    qkv, q_gain, k_gain, cos, sin, positions, keys, values, out, parts, sums, eps, heads, kv_heads, size, max_len,
    root, G, SPLITS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row of the batch, one key head with its G query heads, one part of the positions."""
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    share = tl.cdiv(tl.cdiv(position + 1, SPLITS), SLOTS) * SLOTS
    low = split * share
    high = tl.minimum(low + share, position + 1)
    dtype = keys.dtype.element_ty
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, SIZE)[None, :]
    qkv += row * (heads + 2 * kv_heads) * size
    cos += position * size
    sin += position * size
    q = norm_rotated(qkv, (kv * G + head) * size, (head < G) & (d < size), q_gain, cos, sin, d, size, eps, dtype, NORM)
    # One row of keys would do, but Triton's broadcasts want the block's own shape to begin with.
    first = tl.zeros([1, 1], tl.int32)
    new_k = norm_rotated(qkv, first + (heads + kv) * size, d < size, k_gain, cos, sin, d, size, eps, dtype, NORM)
    new_v = tl.load(qkv + (heads + kv_heads + kv) * size + d, mask=d < size, other=0.0)
    start = (row * kv_heads + kv) * max_len * size
    q, largest = q.to(tl.float32), tl.full([HEADS], float("-inf"), tl.float32)
    total, result = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, SIZE], tl.float32)
    for begin in range(low, high, SLOTS):
        slot = begin + tl.arange(0, SLOTS)[:, None]
        place, seen = start + slot * size + d, (slot < position) & (slot < high) & (d < size)
        # The newest position is not in memory yet, and another part's program never reads it from there.
        k = tl.load(keys + place, mask=seen, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=seen, other=0.0).to(tl.float32)
        k = tl.where(slot == position, new_k.to(tl.float32), k)
        v = tl.where(slot == position, new_v.to(tl.float32), v)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * root
        slot = begin + tl.arange(0, SLOTS)[None, :]
        score = tl.where(slot < high, score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        weight, kept = tl.exp(score - larger[:, None]), tl.exp(largest - larger)
        total, result = total * kept + tl.sum(weight, 1), result * kept[:, None]
        result = tl.dot(weight, v, result, input_precision=PRECISION)
        largest = larger
    if (low <= position) & (position < high):
        tl.store(keys + start + position * size + d, new_k, mask=d < size)
        tl.store(values + start + position * size + d, new_v, mask=d < size)
    place, inside = row * heads + kv * G + head, (head < G) & (d < size)
    if SPLITS == 1:
        tl.store(out + place * size + d, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(parts + (place * SPLITS + split) * size + d, result, mask=inside)
        head = tl.arange(0, HEADS)
        place = ((row * heads + kv * G + head) * SPLITS + split) * 2
        tl.store(sums + place, largest, mask=head < G)
        tl.store(sums + place + 1, total, mask=head < G)


@triton.jit
def _join(parts, sums, out, size, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """One head: the parts' results, each by its share of the softmax's sum. A part without positions has none."""
    head, split, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, SIZE)[None, :]
    largest = tl.load(sums + (head * SPLITS + split) * 2)
    factor = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(factor * tl.load(sums + (head * SPLITS + split) * 2 + 1), 0)
    part = tl.load(parts + (head * SPLITS + split[:, None]) * size + d, mask=d < size, other=0.0)
    result = tl.sum(part * factor[:, None], 0) / total
    d = tl.arange(0, SIZE)
    tl.store(out + head * size + d, result.to(out.dtype.element_ty), mask=d < size)


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
    """qkv [B, (H + 2K)·D] of a new token for each row → attention's output [B, H·D]. The twin is ops/gpu/graphs.py's.

    Row b's token is at positions[b] (on the device) and sees the cache's earlier ones; its key and value are stored
    there. cos, sin [max_len, D]; keys, values [B, K, max_len, D]; `window` is at least the largest position + 1.
    """
    B, K, max_len, D = keys.shape
    H = qkv.shape[1] // D - 2 * K
    splits = 1 if window <= SHORT else max(16, min(64, triton.next_power_of_2(window // 256)))
    out = torch.empty(B, H * D, dtype=qkv.dtype, device=qkv.device)
    parts = torch.empty(B * H * splits * D if splits > 1 else 0, dtype=torch.float32, device=qkv.device)
    sums = torch.empty(B * H * splits * 2 if splits > 1 else 0, dtype=torch.float32, device=qkv.device)
    normed, size = type(attention.q_norm) is not nn.Identity, max(16, triton.next_power_of_2(D))
    gains = (attention.q_norm.weight, attention.k_norm.weight) if normed else (cos, cos)
    with torch.cuda.device_of(qkv):
        _attend[(B, K, splits)](
            qkv, *gains, cos, sin, positions, keys, values, out, parts, sums, attention.q_norm.eps if normed else 0.0,
            H, K, D, max_len, D**-0.5, H // K, SPLITS=splits, HEADS=max(16, triton.next_power_of_2(H // K)),
            SIZE=size, SLOTS=SLOTS, NORM=normed, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            num_warps=8, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _join[(B * H,)](parts, sums, out, D, SPLITS=splits, SIZE=size, num_warps=4)
    return out
