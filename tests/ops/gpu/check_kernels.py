"""Each fused operation against its twin, forward and backward, on odd shapes, in float32 and bfloat16.

Run by tests/ops/test_kernels.py, or for the GPU alone: `python -m pytest tests/ops/gpu/check_kernels.py`. A process of
its own because TRITON_INTERPRET=1 has to be set before Triton is imported.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from formats.compressed_tensors import Scheme
from model import Config, KVCache, Linear, Qwen3, RMSNorm, rotate
from ops.cross_entropy import _errors, linear_cross_entropy
from ops.gpu import graphs
from ops.quant import QuantizedLinear, quantize_

DEVICE = os.environ.get("NANOQWEN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed")

from ops.gpu import kernels, token_kernels  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = {"vocab_size": 301, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 2048}


@pytest.fixture(autouse=True)
def rounds_to_nearest(monkeypatch):
    """The interpreter's conversion to bfloat16 cuts off; a GPU's rounds to the nearest, ties to even."""
    torch.manual_seed(0)
    if DEVICE != "cpu":
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    def convert(values, source, target, _mode, otherwise=interpreter._convert_float):
        if (source, target) == (float32, bfloat16):
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (bfloat16, float32):
            return torch.tensor(values.view("uint16")).view(torch.bfloat16).float().numpy()
        return otherwise(values, source, target, _mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def same(found: torch.Tensor, expected: torch.Tensor, units: float = 2) -> None:
    """Equal up to some units in the last place of the largest value; float32 sums take another order."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    largest = expected.detach().abs().max().item() or 1.0
    unit = 2.0**-8 if expected.dtype == torch.bfloat16 else 2.0**-20
    difference = (found.detach().double() - expected.detach().double()).abs().max().item()
    assert difference <= units * unit * largest, f"{difference} of {largest}"


def both_ways(fused, twin, *inputs: torch.Tensor, units: float = 2) -> None:
    """Outputs and the gradients of all inputs."""
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    found, expected = fused(*inputs), twin(*copies)
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
    for mine, its in zip(found, expected, strict=True):
        same(mine, its)
    grads = [torch.randn_like(out) for out in expected]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, grads)
    for x, copy in zip(inputs, copies, strict=True):
        if x.requires_grad:
            same(x.grad, copy.grad, units)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 48), (9, 80), (1, 5120)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
def test_rms_norm(shape, added, dtype):
    norm = RMSNorm(shape[-1], 1e-6).to(DEVICE, dtype)
    weight = randn(shape[-1], dtype=dtype)

    def twin(x, weight, residual=None):
        h = x if residual is None else x + residual
        y = torch.func.functional_call(norm, {"weight": weight}, h)
        return y if residual is None else (y, h)

    def fused(x, weight, residual=None):
        return kernels.rms_norm(x, weight, norm.eps, residual)

    inputs = [randn(*shape, dtype=dtype), weight, *([randn(*shape, dtype=dtype)] if added else [])]
    both_ways(fused, twin, *inputs)


def test_bfloat16_is_rounded_where_the_model_rounds_it():
    """Not only once at the end: then a fifth of all values would differ in their last bit."""
    x, gain = randn(1, 3, 50, 40, dtype=torch.bfloat16), randn(40, dtype=torch.bfloat16)
    cos, sin = torch.rand(2, 1, 1, 3, 40, device=DEVICE).bfloat16()
    expected = gain * F.rms_norm(x, (40,), None, 1e-6)
    assert (kernels.rms_norm(x, gain, 1e-6) != expected).float().mean() < 0.01
    found, expected = kernels.norm_rotate(x, gain, cos, sin, 1e-6), rotate(expected.transpose(1, 2), cos, sin)
    assert (found != expected).float().mean() < 0.01


def test_rms_norm_of_a_row_far_from_one_and_of_a_view():
    x, weight = torch.randn(6, 40, device=DEVICE)[::2, 3:] * 1e4, randn(37)
    same(kernels.rms_norm(x, weight, 1e-6), weight * F.rms_norm(x, (37,), None, 1e-6))


def test_rms_norm_under_autocast_takes_two_dtypes():
    x, residual, weight = randn(3, 20, dtype=torch.bfloat16), randn(3, 20), randn(20)
    both_ways(
        lambda x, r, w: kernels.rms_norm(x, w, 1e-6, r),
        lambda x, r, w: (w * F.rms_norm(x + r, (20,), None, 1e-6), x + r),
        x,
        residual,
        weight,
    )


@DTYPES
@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 48), (6, 2, 80), (4, 1, 128), (3, 3, 6)])
@pytest.mark.parametrize("rows", [1, 2], ids=["one length", "each row its own"])
def test_norm_and_rotation(heads, kv_heads, size, rows, dtype):
    config = Config(
        **{**SIZES, **HEADS, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    )
    attention = Qwen3(config).to(DEVICE, dtype).model.layers[0].self_attn
    angles = (torch.rand(rows, 1, 5, size // 2, device=DEVICE) * 100).double()
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    step = type("Step", (), {"cos": cos, "sin": sin})
    q, k = randn(2, 5, heads, size, dtype=dtype), randn(2, 5, kv_heads, size, dtype=dtype)
    gains = randn(size, dtype=dtype), randn(size, dtype=dtype)

    def twin(q, k, *gains):
        weights = {"q_norm.weight": gains[0], "k_norm.weight": gains[1]}
        with torch.nn.utils.stateless._reparametrize_module(attention, weights):
            return attention.norm_rotate(q, k, step)

    def fused(q, k, *gains):
        return tuple(kernels.norm_rotate(x, g, cos, sin, 1e-6) for x, g in zip((q, k), gains, strict=True))

    both_ways(fused, twin, q, k, *gains, units=3)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 2500)], ids=str)
def test_swiglu(shape, dtype):
    both_ways(
        kernels.swiglu, lambda g, u: F.silu(g) * u, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), units=3
    )


@DTYPES
@pytest.mark.parametrize("rows, words", [(1, 1), (5, 301), (2, 9001)])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shares"])
def test_cross_entropy(rows, words, shared, dtype):
    logits = (randn(rows, words) * 10).detach().to(dtype)
    logits[:, -1] = 70.0  # the largest comes last, in the second block of a long row
    targets = torch.randint(words, (rows,), device=DEVICE)
    shares = torch.randn(rows, device=DEVICE) if shared else None
    copy = logits.clone()
    same(kernels.cross_entropy_errors(logits, targets, shares), _errors(copy, targets, shares))
    same(logits, copy)


@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy(reduction, dtype):
    targets = torch.randint(301, (7,), device=DEVICE)

    def loss(kernels):
        return lambda x, head: linear_cross_entropy(x, head, targets, 3, reduction, kernels)

    both_ways(loss("triton"), loss("torch"), randn(7, 20, dtype=dtype), randn(301, 20, dtype=dtype), units=4)


def layer_of(columns: int, rows: int, kind: str, dtype: torch.dtype, bias: bool = False) -> torch.nn.Module:
    layer = Linear(columns, rows, bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns) / columns**0.5)
    if bias:
        layer.bias.copy_(torch.randn(rows))
    layer.to(dtype)
    groups = {"int8": (8, None), "int8 in groups": (8, 24), "int4": (4, 32), "int4 in groups of 8": (4, 8)}
    return (layer if kind == "plain" else QuantizedLinear.from_linear(layer, Scheme(*groups[kind]))).to(DEVICE)


KINDS = {"plain": 75, "int8": 75, "int8 in groups": 72, "int4": 96, "int4 in groups of 8": 72}


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 8])
@torch.no_grad()
def test_linear(kind, tokens, dtype):
    columns = KINDS[kind]
    x, residual = randn(tokens, columns, dtype=dtype), randn(tokens, 37, dtype=dtype)
    norm = RMSNorm(columns, 1e-6).to(DEVICE, dtype)
    norm.weight.copy_(torch.rand(columns) + 0.5)
    three = [layer_of(columns, rows, kind, dtype, bias=True) for rows in (19, 5, 6)]
    two = [layer_of(columns, 21, kind, dtype) for _ in range(2)]
    one = [layer_of(columns, 37, kind, dtype)]
    for options in ({"modules": three, "norm": norm}, {"modules": two, "norm": norm, "gated": True}):
        same(token_kernels.linear(x, **options), graphs.linear(x, **options), 4)
    same(token_kernels.linear(x, one, residual=residual), graphs.linear(x, one, residual=residual), 4)


@DTYPES
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
@torch.no_grad()
def test_linear_of_wide_rows(kind, dtype):
    x, layer = randn(1, 2080, dtype=dtype), layer_of(2080, 9, kind, dtype)
    same(token_kernels.linear(x, (layer,)), graphs.linear(x, (layer,)), 4)


@DTYPES
@pytest.mark.parametrize(
    "heads, kv_heads, size, model_type", [(1, 1, 48, "qwen2"), (6, 2, 80, "qwen3"), (16, 1, 128, "qwen3")]
)
@pytest.mark.parametrize("positions", [(0,), (64, 3), (511,)], ids=str)
@torch.no_grad()
def test_attention_of_a_token(heads, kv_heads, size, positions, model_type, dtype):
    B, max_len = len(positions), 512
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "model_type": model_type}
    attention = Qwen3(Config(**{**SIZES, **HEADS, **sizes})).to(DEVICE, dtype).model.layers[0].self_attn
    for p in attention.parameters():
        p.copy_(torch.rand_like(p) + 0.5)
    angles = (torch.rand(max_len, size // 2, device=DEVICE) * 100).double()
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    qkv, at = randn(B, (heads + 2 * kv_heads) * size, dtype=dtype), torch.tensor(positions, device=DEVICE)
    caches = [torch.randn(B, kv_heads, max_len, size, device=DEVICE).to(dtype) for _ in range(2)]
    copies = [cache.clone() for cache in caches]
    for cache in caches:  # what no token has written yet may hold anything
        for row, position in enumerate(positions):
            cache[row, :, position:] = torch.nan
    window = token_kernels.SHORT if max(positions) < token_kernels.SHORT else max_len
    found = token_kernels.attend(qkv, attention, cos, sin, at, *caches, window)
    same(found, graphs.attend(qkv, attention, cos, sin, at, *copies, window), 4)
    for cache, copy in zip(caches, copies, strict=True):
        for row, position in enumerate(positions):
            same(cache[row, :, : position + 1], copy[row, :, : position + 1])
            assert position + 1 == max_len or cache[row, :, position + 1 :].isnan().all()


def random_model(dtype=torch.float32, **fields) -> Qwen3:
    model = Qwen3(Config(**{**SIZES, **HEADS, **fields})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.rand_like(p) + 0.5)
    return model.to(DEVICE, dtype)


@DTYPES
@pytest.mark.parametrize("fields", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}], ids=["qwen3", "qwen2"])
def test_a_model_with_the_kernels_in_it(fields, dtype):
    """The same logits and gradients under the same names, and the weights saved under the same names."""
    model = random_model(dtype, **fields)
    ids, names = torch.randint(301, (2, 9), device=DEVICE), list(model.state_dict())
    expected = model(ids)
    torch.manual_seed(1)
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    kernels.use(model)
    found = model(ids)
    (found * direction).sum().backward()
    same(found, expected, 8)
    assert list(model.state_dict()) == names
    for name, p in model.named_parameters():
        same(p.grad, grads[name], 16)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_a_quantized_model_with_the_kernels_in_it(quantization):
    model = random_model(hidden_size=64, intermediate_size=96)
    quantize_(model, quantization)
    ids = torch.randint(301, (1, 3), device=DEVICE)
    expected = model(ids)
    kernels.use(model)
    same(model(ids), expected, 8)


@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (3, torch.bfloat16)], ids=["fp32", "bf16, three rows"])
@torch.no_grad()
def test_tokens_through_the_static_step(rows, dtype):
    """Triton's kernels under ops/gpu/graphs.py (on a GPU recorded and replayed) against model.py's own way."""
    model = random_model(dtype, vocab_size=61, intermediate_size=52, num_attention_heads=2, num_hidden_layers=1)
    model.kernels = "triton"
    caches = [KVCache(model.config, rows, 300, device=DEVICE, dtype=dtype) for _ in range(2)]
    prompt = torch.randint(61, (rows, 258), device=DEVICE)
    for cache in caches:
        model.model(prompt, cache)
    for length in (5, 254):  # attention in one part and in many; on a GPU into a third window
        for cache in caches:
            cache.truncate([length - row for row in range(rows)])
        for _ in range(3 if DEVICE == "cuda" else 1):
            ids = torch.randint(61, (rows, 1), device=DEVICE)
            found, expected = graphs.step(model, ids, caches[0]), model.head(model.model(ids, caches[1]))
            same(found, expected, 8)
            assert caches[0].lengths == caches[1].lengths
        for cache in caches:
            cache.lengths = [258] * rows
    if DEVICE == "cuda":
        assert len(graphs._steps[caches[0]].graphs) > 0
