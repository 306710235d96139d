"""Fused operations in Triton, each one pass over memory where PyTorch's own make several: norms, rotary positions, the
gated MLP, the cross-entropy of a large vocabulary; forward and backward.

    operation              its twin, the same arithmetic from PyTorch's operations
    rms_norm               model.py: RMSNorm, and Block's addition in front of it
    norm_rotate            model.py: Attention.norm_rotate
    swiglu                 model.py: MLP
    cross_entropy_errors   ops/cross_entropy.py: _errors

A GPU does such an operation as fast as it reads and writes memory, so an intermediate result that never leaves the
registers is time saved (the case for it, with measurements: Liger Kernel, https://arxiv.org/abs/2410.10989). Values are
rounded to the tensors' dtype where the twins round them, everything between is float32.

`use(model)` puts these in the place of the modules' own forward functions; no name of a weight changes.
ops/gpu/graphs.py has the step of one token. Importing this file needs Triton, which comes with PyTorch's CUDA build for
Linux. Without a GPU its interpreter runs the same code very slowly: set TRITON_INTERPRET=1 before the import.
"""

from types import MethodType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ops.gpu import token_kernels
from ops.gpu.token_kernels import norm_rotated

WIDEST = 1 << 16  # columns of a row that one program holds in registers

# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm, with the addition to the residual stream in front of it.


@triton.jit
def _norm_forward(x, residual, weight, y, h, scales, eps, columns, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, place = column < columns, row * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty)
        tl.store(h + place, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    tl.store(scales + row, scale)
    quotient = (value * scale).to(h.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (quotient * gain).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad_y, grad_h, h, weight, scales, grad_x, grad_weight, rows, columns, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """With q = h·s: dh = s·(g·w - q·mean(g·w·q)), dw = Σ g·q; each program adds up dw over the rows it takes."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place, scale = tl.cast(row, tl.int64) * columns + column, tl.load(scales + row)
        grad = tl.load(grad_y + place, mask=inside, other=0.0).to(tl.float32)
        quotient = tl.load(h + place, mask=inside, other=0.0).to(tl.float32) * scale
        total += grad * quotient.to(h.dtype.element_ty).to(tl.float32)
        grad *= gain
        grad = scale * (grad - quotient * (tl.sum(grad * quotient, 0) / columns))
        if ADD:
            grad += tl.load(grad_h + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + tl.program_id(0) * columns + column, total, mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float):
        added, columns = residual is not None, x.shape[-1]
        x, residual = x.contiguous(), residual.contiguous() if added else x
        h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype)) if added else x
        y = torch.empty_like(x, dtype=torch.promote_types(h.dtype, weight.dtype))
        scales = torch.empty(x.numel() // columns, dtype=torch.float32, device=x.device)
        options = _options(columns, ADD=added)
        with torch.cuda.device_of(x):
            _norm_forward[(len(scales),)](x, residual, weight, y, h, scales, eps, columns, **options)
        context.save_for_backward(h, weight, scales)
        context.options, context.dtypes = options, (x.dtype, residual.dtype)
        return (y, h) if added else y

    @staticmethod
    def backward(context, grad_y: Tensor, grad_h: Tensor | None = None):
        h, weight, scales = context.saved_tensors
        columns, added = h.shape[-1], context.options["ADD"]
        grad_y, grad_h = grad_y.contiguous(), grad_h.contiguous() if added else grad_y
        grad_x, programs = torch.empty_like(h), _programs(h, len(scales))
        grad_weight = torch.empty(programs, columns, dtype=torch.float32, device=h.device)
        with torch.cuda.device_of(h):
            arguments = (grad_y, grad_h, h, weight, scales, grad_x, grad_weight, len(scales), columns)
            _norm_backward[(programs,)](*arguments, **context.options)
        of_x, of_residual = context.dtypes
        return grad_x.to(of_x), grad_x.to(of_residual) if added else None, grad_weight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """x [..., C], weight [C] → the normed x; with a residual [..., C]: (the normed sum, the sum)."""
    return _RMSNorm.apply(x, residual, weight, eps)


# ---------------------------------------------------------------------------------------------------------------------
# The norm of each head's query or key, and its rotary position.


@triton.jit
def _rotate_forward(x, weight, cos, sin, y, eps, heads, size, table_rows, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """One token: [heads, size]."""
    token, head, d = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, start, table = (head < heads) & (d < size), (token * heads + head) * size, (token % table_rows) * size
    dtype: tl.constexpr = y.dtype.element_ty
    result = norm_rotated(x, start, inside, weight, cos + table, sin + table, d, size, eps, dtype, True)
    tl.store(y + start + d, result, mask=inside)


@triton.jit
def _rotate_backward(
    grad_y, x, weight, cos, sin, grad_x, grad_weight, eps, tokens, heads, size, table_rows,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rotation's transpose, then the norm's gradient; each program adds up dw over the tokens it takes."""
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, partner = (head < heads) & (d < size), (d + size // 2) % size
    gain = tl.load(weight + d, mask=d < size, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        start, table = tl.cast(token, tl.int64) * heads * size + head * size, (token % table_rows) * size
        value = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / size + eps)[:, None]
        quotient = value * scale
        grad = tl.load(grad_y + start + d, mask=inside, other=0.0).to(tl.float32)
        turned = tl.load(grad_y + start + partner, mask=inside, other=0.0).to(tl.float32)
        grad *= tl.load(cos + table + d, mask=d < size, other=0.0).to(tl.float32)
        grad += turned * tl.load(sin + table + partner, mask=d < size, other=0.0).to(tl.float32)
        total += tl.sum(grad * quotient.to(x.dtype.element_ty).to(tl.float32), 0)
        grad *= gain
        grad = scale * (grad - quotient * (tl.sum(grad * quotient, 1) / size)[:, None])
        tl.store(grad_x + start + d, grad.to(grad_x.dtype.element_ty), mask=inside)
    d = tl.arange(0, BLOCK)
    tl.store(grad_weight + tl.program_id(0) * size + d, total, mask=d < size)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float):
        B, T, heads, size = x.shape
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x, dtype=torch.promote_types(torch.promote_types(x.dtype, weight.dtype), cos.dtype))
        sizes = (heads, size, cos.numel() // size)
        options = _options(size, rows=heads, HEADS=triton.next_power_of_2(heads))
        with torch.cuda.device_of(x):
            _rotate_forward[(B * T,)](x, weight, cos, sin, y, eps, *sizes, **options)
        context.save_for_backward(x, weight, cos, sin)
        context.eps, context.sizes, context.options = eps, sizes, options
        return y

    @staticmethod
    def backward(context, grad: Tensor):
        x, weight, cos, sin = context.saved_tensors
        tokens = x.shape[0] * x.shape[1]
        grad_x, programs = torch.empty_like(x), _programs(x, tokens)
        grad_weight = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            arguments = (grad.contiguous(), x, weight, cos, sin, grad_x, grad_weight, context.eps, tokens)
            _rotate_backward[(programs,)](*arguments, *context.sizes, **context.options)
        return grad_x, grad_weight.sum(0).to(weight.dtype), None, None, None


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x [B, T, H, D], weight [D]; cos, sin [B or 1, 1, T, D] as model.py's `rotate` takes them → [B, H, T, D]."""
    return _NormRotate.apply(x, weight, cos, sin, eps).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# silu(gate)·up.


@triton.jit
def _swiglu_forward(gate, up, y, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(y + place, (silu * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad_y, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    grad = tl.load(grad_y + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + place, (grad * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + place, (grad * g * sigmoid).to(grad_up.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    BLOCK = 2048

    @staticmethod
    def forward(context, gate: Tensor, up: Tensor):
        gate, up = gate.contiguous(), up.contiguous()
        y, grid = torch.empty_like(gate), (triton.cdiv(gate.numel(), _SwiGLU.BLOCK),)
        with torch.cuda.device_of(gate):
            _swiglu_forward[grid](gate, up, y, gate.numel(), BLOCK=_SwiGLU.BLOCK)
        context.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(context, grad: Tensor):
        gate, up = context.saved_tensors
        grads, grid = (torch.empty_like(gate), torch.empty_like(up)), (triton.cdiv(gate.numel(), _SwiGLU.BLOCK),)
        with torch.cuda.device_of(gate):
            _swiglu_backward[grid](grad.contiguous(), gate, up, *grads, gate.numel(), BLOCK=_SwiGLU.BLOCK)
        return grads


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, both [..., I] of one dtype."""
    return _SwiGLU.apply(gate, up)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy and its gradient, in place of the logits.


@triton.jit
def _cross_entropy(logits, targets, shares, losses, columns, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """One row: the largest logit and the sum of exponentials in one pass, the gradient over the logits in a second."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    share = tl.load(shares + row) if SHARES else 1.0
    largest = tl.full([], float("-inf"), tl.float32)
    total, wanted = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(value - larger), 0)
        wanted += tl.sum(tl.where(column == target, value, 0.0), 0)
        largest = larger
    normalizer = largest + tl.log(total)
    tl.store(losses + row, normalizer - wanted)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        error = (tl.exp(value - normalizer) - tl.where(column == target, 1.0, 0.0)) * share
        tl.store(logits + column, error.to(logits.dtype.element_ty), mask=column < columns)


def cross_entropy_errors(logits: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
    """The cross-entropies of logits [N, V], float32 [N]. The logits become gradients, each row times its share."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    options = {"num_warps": 8, "BLOCK": min(8192, triton.next_power_of_2(logits.shape[1]))}
    arguments = (logits, targets, losses if shares is None else shares, losses, logits.shape[1])
    with torch.cuda.device_of(logits):
        _cross_entropy[(len(logits),)](*arguments, SHARES=shares is not None, **options)
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# How they get into a model.


def _options(columns: int, rows: int = 1, **constants: Any) -> dict[str, Any]:
    """Launch options of a kernel whose programs hold whole rows: a warp for every 512 numbers, up to 16."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(1, block * triton.next_power_of_2(rows) // 512)), **constants}


def _programs(x: Tensor, rows: int) -> int:
    """How many programs share the rows where each keeps a sum: a few for each multiprocessor."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return max(1, min(rows, 4 * processors))


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.eps)


def _norm_rotate(attention: nn.Module, q: Tensor, k: Tensor, shared: Any) -> tuple[Tensor, Tensor]:
    pairs = ((q, attention.q_norm), (k, attention.k_norm))
    return tuple(norm_rotate(x, norm.weight, shared.cos, shared.sin, norm.eps) for x, norm in pairs)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _block(block: nn.Module, x: Tensor, step: Any) -> Tensor:
    norm = block.post_attention_layernorm
    y, x = rms_norm(x, norm.weight, norm.eps, block.self_attn(block.input_layernorm(x), step))
    return x + block.mlp(y)


def _quantized_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Few tokens: the weights go from memory into the product as they are. Many: dequantised for the matrix library."""
    flat = x.reshape(-1, layer.in_features)
    if len(flat) > token_kernels.MOST_ROWS or not token_kernels.serves(layer, x.dtype):
        return type(layer).forward(layer, x)
    return token_kernels.linear(flat, (layer,)).view(*x.shape[:-1], layer.out_features)


FUSED = {  # of model.py's and ops/quant.py's classes, by name: which method is replaced by what
    "RMSNorm": ("forward", _norm),
    "Attention": ("norm_rotate", _norm_rotate),
    "MLP": ("forward", _mlp),
    "Block": ("forward", _block),
    "QuantizedLinear": ("forward", _quantized_linear),
}


def use(model: nn.Module) -> None:
    """Puts the fused operations into a Qwen3 in place; its weights and their names stay as they are."""
    for module in model.modules():
        kind = type(module).__name__
        if kind not in FUSED or (kind == "Attention" and type(module.q_norm) is nn.Identity):
            continue
        if kind in ("RMSNorm", "Block") and model.config.hidden_size > WIDEST:
            continue
        name, function = FUSED[kind]
        setattr(module, name, MethodType(function, module))
