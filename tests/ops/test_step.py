"""The token step in C++ (ops/cpu/) against PyTorch's (model.py): the same logits, never stale, or not served."""

import copy
import errno
import gc
import os
import shutil
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import model as qwen3
from inference.decode import generate
from model import Config, KVCache, Linear, Qwen3
from ops.cpu import library as built
from ops.cpu import step as ops_step
from ops.cpu import variants
from ops.quant import quantize_
from ops.watch import invalidate

SIZES = {"vocab_size": 301, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 2048}
MOE = {"model_type": "qwen3_moe", "num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 33}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "plain": {},
    "one kv head": {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 6},
    "a kv head for each": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64},
    "no multiple of any vector": {"hidden_size": 37, "intermediate_size": 51, "head_dim": 10, "vocab_size": 103},
    "smaller than a vector": {"hidden_size": 3, "intermediate_size": 5, "head_dim": 2, "vocab_size": 2},
    "wide": {"hidden_size": 640, "intermediate_size": 1100, "head_dim": 128},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 12},
    "yarn": {"rope_scaling": YARN},
    "experts": {**MOE, "norm_topk_prob": True},
    "some experts": {**MOE, "mlp_only_layers": [1]},
}


def random_model(dtype=torch.float32, seed=0, **fields) -> Qwen3:
    """Weights large enough that each layer matters, norm weights far from one, biases far from zero."""
    torch.manual_seed(seed)
    model = Qwen3(Config(**{**SIZES, **HEADS, **fields})).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.copy_(torch.rand_like(p) * 3 - 0.5)
        else:
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1))
    frequencies = model.model.rope_frequencies
    model.to(dtype).model.rope_frequencies = frequencies
    return model


@pytest.fixture(autouse=True)
def step_or_skip(monkeypatch):
    """No gradients, and more threads than these small models would get."""
    ops_step.library.cache_clear()
    if ops_step.library() is None:
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setattr(ops_step, "BYTES_PER_THREAD", 1)
    with torch.no_grad():
        yield
    ops_step.library.cache_clear()


def keep_head(monkeypatch):
    """No quantised copy of the head, whose error would hide all others."""
    monkeypatch.setattr(ops_step, "copied_head", lambda *_: None)


@pytest.fixture
def in_pytorch(monkeypatch):
    """Calls a model as if the step did not exist."""

    def call(model: Qwen3, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(ops_step, "step", lambda *_: None)
            return model(ids, cache)

    return call


def is_served(model: Qwen3) -> bool:
    cache = KVCache(model.config, 1, 4, dtype=model.model.embed_tokens.weight.dtype)
    return ops_step.step(model, torch.tensor([[1]]), cache) is not None


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_float32_logits_and_cache_are_pytorchs(fields, threads, in_pytorch, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = random_model(**fields)
    assert is_served(model)
    for length in (0, 1, 17, 254):  # the last runs over the end of a block of positions
        ids = torch.randint(0, model.config.vocab_size, (1, length + 4))
        cache, expected_cache = (KVCache(model.config, 1, length + 5) for _ in range(2))
        for c in (cache, expected_cache) if length else ():
            in_pytorch(model, ids[:, :length], c)
        for position in range(length, length + 4):
            logits = model(ids[:, position : position + 1], cache)
            expected = in_pytorch(model, ids[:, position : position + 1], expected_cache)
            assert logits.shape == expected.shape and logits.dtype == expected.dtype
            assert error(logits, expected) < 1e-5
        assert cache.lengths == [length + 4]
        for ours, theirs in zip(cache.keys + cache.values, expected_cache.keys + expected_cache.values, strict=True):
            torch.testing.assert_close(ours[:, :, : length + 4], theirs[:, :, : length + 4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [f for n, f in SHAPES.items() if "experts" not in n])
def test_bfloat16_is_no_further_from_float32_than_pytorch_is(fields, in_pytorch):
    model, exact = random_model(torch.bfloat16, **fields), random_model(torch.bfloat16, **fields).float()
    ids = torch.randint(0, model.config.vocab_size, (1, 40))
    expected = exact(ids)[:, 20:]
    found = []
    for run in (model, lambda *a: in_pytorch(model, *a)):
        cache = KVCache(model.config, 1, 40, dtype=torch.bfloat16)
        in_pytorch(model, ids[:, :20], cache)
        found.append(torch.cat([run(ids[:, i : i + 1], cache) for i in range(20, 40)], 1))
    assert found[0].dtype == torch.bfloat16
    ours, theirs = ((logits.double() - expected).square().mean().sqrt() for logits in found)
    assert ours <= theirs


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize(
    "fields", [{}, {**MOE, "moe_intermediate_size": 48}, {"num_attention_heads": 3, "num_key_value_heads": 1}]
)
def test_a_few_tokens_at_once_are_the_same_bits_as_one_by_one(scheme, fields):
    model = random_model(**{"hidden_size": 144, "intermediate_size": 160, "head_dim": 16, **fields})
    if scheme:
        quantize_(model, scheme)
    ids = torch.randint(0, 301, (1, 280))
    alone = KVCache(model.config, 1, 300)
    expected = torch.cat([model(ids[:, i : i + 1], alone) for i in range(280)], 1)
    cache, at = KVCache(model.config, 1, 300), 0
    for count in (1, 3, 8, 5, 2, 7, 8, 4, *30 * [8], 2):  # over the border of a block of positions
        assert torch.equal(model(ids[:, at : at + count], cache), expected[:, at : at + count])
        at += count
    assert cache.lengths == [280]

    # Rows of a batch, of different lengths, two tokens each.
    batch = KVCache(model.config, 3, 300)
    batch.lengths = [270, 3, 40]
    for layer in range(len(batch.keys)):
        for ours, theirs in ((batch.keys, alone.keys), (batch.values, alone.values)):
            ours[layer][:] = theirs[layer]
    rows = torch.cat([ids[:, n : n + 2] for n in batch.lengths])
    together = model(rows, batch)
    for row, n in zip(together, (270, 3, 40), strict=True):
        assert torch.equal(row, expected[0, n : n + 2])
    assert batch.lengths == [272, 5, 42]


EVEN = {"hidden_size": 144, "intermediate_size": 208, "head_dim": 48}


@pytest.mark.parametrize(
    "scheme, fields",
    [(None, f) for n, f in SHAPES.items() if "experts" not in n]
    + [(scheme, {**EVEN, **f}) for scheme in ("int8", "int4") for f in ({}, {"model_type": "qwen2"})],
)
def test_a_prompt_is_no_further_from_float32_than_pytorch_is(scheme, fields, in_pytorch, monkeypatch):
    model = random_model(torch.bfloat16, **fields)
    if scheme:
        keep_head(monkeypatch)
        quantize_(model, scheme)
    exact = random_model(torch.bfloat16, **fields).float()
    for name, layer in model.named_modules():
        if isinstance(layer, ops_step.QuantizedLinear):
            exact.get_submodule(name).weight.copy_(layer.dequantize())
    ids = torch.randint(0, model.config.vocab_size, (2, 700))  # 16 of them come first, then more than one span
    found = []
    for run in (model, lambda *a: in_pytorch(model, *a)):
        caches = [KVCache(model.config, 1, 700, dtype=torch.bfloat16) for _ in ids]
        for row, cache in zip(ids, caches, strict=True):
            in_pytorch(model, row[None, :16], cache)
        found.append([run(row[None, 16:], cache) for row, cache in zip(ids, caches, strict=True)])
        found[-1] += [keys[:, :, 16:] for cache in caches for keys in cache.keys]
        assert caches[0].lengths == [700]
    cache = KVCache(model.config, 2, 700)
    in_pytorch(exact, ids[:, :16], cache)
    expected = [*in_pytorch(exact, ids[:, 16:], cache).split(1), *(keys[:, :, 16:] for keys in cache.keys)]
    for index in range(2):
        ours, theirs = ((logits[index].double() - expected[index]).square().mean().sqrt() for logits in found)
        assert ours <= 1.02 * theirs

    # A batch of different lengths, and the last logits alone.
    batch = KVCache(model.config, 2, 700, dtype=torch.bfloat16)
    single = [KVCache(model.config, 1, 700, dtype=torch.bfloat16) for _ in ids]
    for row, (n, cache) in enumerate(zip((30, 7), single, strict=True)):
        model(ids[row : row + 1, :n], cache)
        for ours, theirs in ((batch.keys, cache.keys), (batch.values, cache.values)):
            for layer in range(len(ours)):
                ours[layer][row, :, :n] = theirs[layer][0, :, :n]
    batch.lengths = [30, 7]
    together = model(ids[:, 100:620], batch, last=True)
    alone = torch.cat([model(ids[r : r + 1, 100:620], cache, last=True) for r, cache in enumerate(single)])
    assert together.shape == (2, 1, model.config.vocab_size)
    assert torch.equal(together, alone)


def test_64_greedy_tokens_are_pytorchs(in_pytorch):
    model, texts = random_model(hidden_size=200), []
    for run in (model, lambda *a: in_pytorch(model, *a)):
        cache, text = KVCache(model.config, 1, 80), [5]
        for _ in range(64):
            text.append(run(torch.tensor([text[-1:]]), cache).argmax(-1).item())
        texts.append(text)
    assert texts[0] == texts[1] and len(set(texts[0])) > 8


def test_many_positions_many_blocks(in_pytorch):
    model = random_model()
    caches = [KVCache(model.config, 1, 1400) for _ in range(2)]
    for cache in caches:
        torch.manual_seed(1)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_().mul_(2)
        cache.lengths = [1390]
    ids = torch.tensor([[7]])
    assert error(model(ids, caches[0]), in_pytorch(model, ids, caches[1])) < 1e-5


def replace_data(model):
    for p in model.parameters():
        p.data = p.data * 0.9


def assign_state(model):
    model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()}, assign=True)


def fill_in_place(model):
    for p in model.parameters():
        p.mul_(0.9)


def put_other_modules(model):
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        other = Linear(linear.in_features, linear.out_features, linear.bias is not None)
        other.load_state_dict({key: t * 0.9 for key, t in linear.state_dict().items()})
        model.set_submodule(name, other.requires_grad_(False))


def add_a_bias(model):
    model.model.layers[1].self_attn.o_proj.bias = nn.Parameter(torch.randn(model.config.hidden_size))


def swap_layers(model):
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


@pytest.mark.parametrize(
    "change", [replace_data, assign_state, fill_in_place, put_other_modules, add_a_bias, swap_layers]
)
def test_replaced_weights_are_used_at_once(change, in_pytorch):
    model, ids = random_model(), torch.tensor([[3]])
    before = model(ids, KVCache(model.config))
    change(model)
    expected = in_pytorch(model, ids, KVCache(model.config))
    assert error(expected, before) > 1e-3
    assert error(model(ids, KVCache(model.config)), expected) < 1e-5
    assert is_served(model)


def test_another_dtype_is_bound_again():
    model = random_model()
    assert is_served(model) and is_served(model.to(torch.bfloat16)) and is_served(model.float())
    assert not is_served(model.double())


def test_two_models_live_side_by_side(in_pytorch):
    models, ids = [random_model(seed=seed) for seed in (1, 2)], torch.tensor([[3]])
    for model in models * 2:
        assert error(model(ids, KVCache(model.config)), in_pytorch(model, ids, KVCache(model.config))) < 1e-5


def test_a_bound_model_can_be_freed():
    model = random_model()
    assert is_served(model)
    gone = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj = Linear(72, 100, bias=False)
    assert gone() is None  # a replaced weight is not kept
    gone = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    del model
    gc.collect()
    assert gone() is None


def test_what_is_not_served_goes_to_pytorch():
    ids = torch.tensor([[3]])
    model = random_model()
    seen = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    model(ids, KVCache(model.config))
    assert seen == [1]
    handle.remove()
    model(ids, KVCache(model.config))
    assert seen == [1] and is_served(model)
    with torch.enable_grad():
        cache = KVCache(model.config)
        assert not model.requires_grad_()(ids, cache).requires_grad, "a graph through the cache would grow for ever"
        assert not cache.keys[0].requires_grad and model(ids).requires_grad

    assert not is_served(random_model().to(torch.float64))
    mixed = random_model()
    mixed.model.norm.weight = nn.Parameter(mixed.model.norm.weight.bfloat16())
    assert not is_served(mixed)


def test_bad_input_raises_as_without_a_cache():
    model = random_model()
    for token in (301, -1):
        with pytest.raises(ValueError, match="token id"):
            model(torch.tensor([[token]]), KVCache(model.config))
    cache = KVCache(model.config, max_len=1)
    model(torch.tensor([[3]]), cache)
    with pytest.raises(ValueError, match="cache of 1 positions"):
        model(torch.tensor([[3]]), cache)
    assert cache.lengths == [1]


def transpose_data(model):
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        weight.data = weight.data.t().contiguous().t()


def another_eps(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5


def eps_of_one(model):
    model.model.layers[1].self_attn.q_norm.eps = 0.5


def parametrize_one(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(model.model.layers[1].mlp.down_proj, "weight", Half())


def subclass(model):
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[1].mlp.down_proj.__class__ = Doubled


def property_weight(model):
    class Computed(Linear):
        weight = property(lambda self: torch.ones(self.out_features, self.in_features))

    old = model.model.layers[1].mlp.down_proj
    new = Computed.__new__(Computed)
    nn.Module.__init__(new)
    new.in_features, new.out_features, new.bias = old.in_features, old.out_features, None
    model.model.layers[1].mlp.down_proj = new


def override_a_method(model):
    attention = model.model.layers[0].self_attn
    attention.norm_rotate = lambda q, k, shared: (2 * q.transpose(1, 2), k.transpose(1, 2))


def sparse_weight(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.relu().to_sparse(), requires_grad=False)


def bounded_embedding(model):
    model.model.embed_tokens.max_norm = 0.5


def prune_one(model):
    prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", amount=0.5)


def fewer_layers(model):
    model.model.layers = model.model.layers[:2]


@pytest.mark.parametrize(
    "change",
    [
        transpose_data,
        another_eps,
        eps_of_one,
        parametrize_one,
        subclass,
        property_weight,
        override_a_method,
        sparse_weight,
        bounded_embedding,
        prune_one,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("before", [False, True])
def test_what_is_no_plain_model_any_more_is_computed_as_pytorch_computes_it(change, before, in_pytorch):
    """Made before the first token or after it."""
    model, ids = random_model(hidden_size=120), torch.tensor([[3, 5]])
    plain = model(ids, KVCache(model.config)) if before else None
    change(model)
    expected = in_pytorch(model, ids, KVCache(model.config))
    assert error(model(ids, KVCache(model.config)), expected) < 1e-5
    assert plain is None or change is transpose_data or error(plain, expected) > 1e-3
    served = change is another_eps
    assert is_served(model) == served and (ops_step.why(model) is None) == served


def patched_mlp(self, x):
    return 2 * self.down_proj(self.up_proj(x))


def unrotated(x, cos, sin):
    return x


def doubled_queries(self, q, k, shared):
    return 2 * q.transpose(1, 2), k.transpose(1, 2)


@pytest.mark.parametrize(
    ("owner", "name", "function"),
    [
        (qwen3.MLP, "forward", patched_mlp),
        (qwen3.Attention, "norm_rotate", doubled_queries),
        (qwen3, "rotate", unrotated),
        (qwen3, "attention", lambda q, k, v, mask, causal: q),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("before", [False, True])
def test_a_class_or_a_function_of_the_model_that_is_replaced_is_called(
    owner, name, function, before, in_pytorch, monkeypatch
):
    model, ids = random_model(), torch.tensor([[3, 5]])
    plain = model(ids, KVCache(model.config)) if before else None
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        expected = in_pytorch(model, ids, KVCache(model.config))
        assert torch.equal(model(ids, KVCache(model.config)), expected)
        assert plain is None or error(plain, expected) > 1e-3
        assert "replaced" in ops_step.why(model) and ops_step.spans(model) is None
    assert is_served(model) and ops_step.why(model) is None


class Watching(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, kinds, arguments=(), named=None):
        self.seen += function is torch.nn.functional.scaled_dot_product_attention
        return function(*arguments, **named or {})


def test_a_mode_sees_every_operation_and_the_default_device_changes_none():
    """torch.set_default_device("meta") once ended the process; it is a mode too, but one that only makes tensors."""
    model, ids = random_model(), torch.tensor([[3, 5]])
    expected = model(ids, KVCache(model.config))
    cache, page = KVCache(model.config), [ops_step.spans(model).new_page()]
    with Watching() as mode:
        model(ids, KVCache(model.config))
    assert mode.seen == 3
    with torch.device("meta"):
        assert torch.equal(model(ids, cache), expected) and ops_step.why(model) is None
        assert torch.equal(ops_step.spans(model)([[3, 5]], [0], [page], [2]), expected[0])
        assert ops_step.spans(model).new_page().is_cpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_the_rotary_frequencies_exact(dtype, in_pytorch):
    model = random_model()
    exact = model.model.rope_frequencies.clone()
    assert torch.equal(model.to(dtype).model.rope_frequencies, exact)
    assert torch.equal(model.float().model.rope_frequencies, exact)
    assert model.to("meta").model.rope_frequencies.is_meta
    model = random_model()
    before = model(torch.tensor([[3, 5]]), KVCache(model.config))
    model.model.rope_frequencies = model.model.rope_frequencies.double()  # by hand: not copied, so never a stale copy
    model.model.rope_frequencies.mul_(3)
    expected = in_pytorch(model, torch.tensor([[3, 5]]), KVCache(model.config))
    assert (
        torch.equal(model(torch.tensor([[3, 5]]), KVCache(model.config)), expected) and error(before, expected) > 0.01
    )


def test_experts_cut_short_and_layers_taken_out_never_end_the_process(in_pytorch):
    model, ids = random_model(**MOE), torch.tensor([[3]])
    assert is_served(model)
    model.model.layers[1].mlp.experts = model.model.layers[1].mlp.experts[:2]
    with suppress(IndexError):  # PyTorch's, where a token wants an expert that is gone
        assert error(model(ids, KVCache(model.config)), in_pytorch(model, ids, KVCache(model.config))) < 1e-5
    assert "experts" in ops_step.why(model)
    model = random_model()
    fewer_layers(model)
    cache = KVCache(model.config)
    assert error(model(ids, cache), in_pytorch(model, ids, KVCache(model.config))) < 1e-5


def test_a_cache_that_is_not_the_models_never_reaches_the_step(in_pytorch):
    model, ids = random_model(), torch.tensor([[3]])
    good = KVCache(model.config, 1, 8)
    model(ids, good)
    assert not _step(model, ids, KVCache(model.config, 1, 8, dtype=torch.bfloat16))
    assert not _step(model, ids, KVCache(model.config, 1, 8, device="meta"))
    strided = KVCache(model.config, 1, 8)  # the shape and the dtype are right
    strided.keys[2] = torch.zeros(1, 2, 20, 8).transpose(2, 3)
    assert strided.keys[2].shape == good.keys[2].shape and not _step(model, ids, strided)
    assert error(model(ids, strided), in_pytorch(model, ids, KVCache(model.config, 1, 8))) < 1e-5
    for length in (-1, -(2**40), 9, 2**62):
        wrong = KVCache(model.config, 1, 8)
        wrong.lengths = [length]
        assert not _step(model, ids, wrong)
        with pytest.raises(ValueError, match="cache"):
            model(ids, wrong)
    short = KVCache(model.config, 1, 8)
    short.values = short.values[:2]
    assert not _step(model, ids, short)


def _step(model, ids, cache) -> bool:
    return ops_step.step(model, ids, cache) is not None


@pytest.mark.parametrize("scheme", [None, "int8", "int8-8", "int4", "int4-32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {**MOE, "moe_intermediate_size": 64}], ids=["dense", "experts"])
def test_the_same_bits_whatever_is_computed_together(scheme, dtype, fields):
    """1 to 40 tokens at a time, and as a batch of rows of different lengths."""
    sizes = {"hidden_size": 160, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}
    model = random_model(dtype, **sizes, **fields)
    if scheme:
        quantize_(model, scheme[:4], int(scheme[5:]) if scheme[5:] else None)
    ids = torch.randint(0, 301, (1, 290))
    alone = KVCache(model.config, 1, 290, dtype=dtype)
    expected = torch.cat([model(ids[:, i : i + 1], alone) for i in range(290)], 1)
    cache, at = KVCache(model.config, 1, 290, dtype=dtype), 0
    for count in (1, 40, 17, 2, 16, 39, 3, 33, 15, 31, 5, 28, 23, 37):
        assert torch.equal(model(ids[:, at : at + count], cache), expected[:, at : at + count]), count
        at += count
    whole = KVCache(model.config, 1, 290, dtype=dtype)
    assert at == 290 and torch.equal(model(ids, whole), expected)
    for other in (cache, whole):
        assert all(map(torch.equal, alone.keys + alone.values, other.keys + other.values))
    starts = [*range(20), 100, 250]
    batch = KVCache(model.config, len(starts), 290, dtype=dtype)
    batch.lengths = list(starts)
    for part, filled in ((batch.keys, alone.keys), (batch.values, alone.values)):
        for layer, tensor in enumerate(part):
            tensor[:] = filled[layer]
    for count in (1, 3, 30):
        rows = torch.cat([ids[:, n : n + count] for n in batch.lengths])
        together = model(rows, batch)
        for row, n in zip(together, [length - count for length in batch.lengths], strict=True):
            assert torch.equal(row, expected[0, n : n + count])


def test_quantised_weights_keep_their_scales_in_every_dtype(tmp_path, in_pytorch):
    model = random_model(torch.bfloat16, hidden_size=64, intermediate_size=96, head_dim=16)
    quantize_(model, "int8")
    scales = model.model.layers[0].mlp.up_proj.weight_scale.clone()
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(model.to(dtype).model.layers[0].mlp.up_proj.weight_scale, scales)
    assert is_served(model) and ops_step.why(model) is None


def test_quantised_models_in_inference_mode():
    with torch.inference_mode():
        model = random_model(hidden_size=64, intermediate_size=96, head_dim=16)
        quantize_(model, "int4")
        ids = torch.tensor([[3]])
        before = model(ids, KVCache(model.config))
        model.lm_head.weight.mul_(2)  # no version counts this; some numbers of the head tell
        assert error(model(ids, KVCache(model.config)), 2 * before.double()) < 0.01


def test_the_copied_head_follows_what_pytorch_cannot_see():
    model, ids = random_model(hidden_size=64, intermediate_size=96, head_dim=16), torch.tensor([[3]])
    quantize_(model, "int8")
    before = model(ids, KVCache(model.config)).clone()
    model.lm_head.weight.data.mul_(2)
    assert error(model(ids, KVCache(model.config)), 2 * before.double()) < 1e-4
    model.lm_head.weight.data[7, 40:] = 0  # a few numbers only: this is what `invalidate` is for
    invalidate(model)
    assert (model(ids, KVCache(model.config))[..., 7] - 2 * before[..., 7]).abs().item() > 1e-3


def test_why_says_in_words_what_is_not_served(monkeypatch):
    assert ops_step.why(random_model()) is None
    assert "float64" in ops_step.why(random_model(torch.float64))
    model = random_model()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hook" in ops_step.why(model)
    monkeypatch.setenv("NANOQWEN_STEP", "off")
    ops_step.library.cache_clear()
    assert ops_step.why(random_model()) == "NANOQWEN_STEP=off"


@pytest.mark.parametrize("harm", ["damaged", "cut off", "empty", "writable", "a link", "a pipe"])
def test_a_library_that_is_not_as_it_was_written_is_compiled_again(harm, tmp_path, monkeypatch, capfd):
    good = built.build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen")
    copies = []

    def compile_again(command, **_):
        copies.extend([command] if "-shared" in command else [])
        Path(command[-1]).write_bytes(good.read_bytes()[:-32])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(built.subprocess, "run", compile_again)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops_step.library.cache_clear()
    path = built.build(tmp_path / "nanoqwen")
    assert path == built.build(tmp_path / "nanoqwen") and len(copies) == 1
    new = path.with_suffix(".new")  # another file: the one that is loaded stays as it is
    if harm == "writable":
        shutil.copy(path, new)
        new.chmod(0o666)
    elif harm == "a pipe":  # to read it would never end
        os.mkfifo(new)
    elif harm == "a link":
        new.symlink_to(shutil.copy(good, tmp_path / "theirs.so"))
    else:
        content = path.read_bytes()
        wrong = {"damaged": content[:20000] + b"?" + content[20001:], "cut off": content[:-5000], "empty": b""}
        new.write_bytes(wrong[harm])
    new.replace(path)
    ops_step.library.cache_clear()
    assert ops_step.library() is not None and len(copies) == 2
    assert path.stat().st_mode & 0o777 == 0o600 and not path.is_symlink()


def test_a_folder_that_cannot_be_written_to_will_do_where_the_library_is(monkeypatch, capfd):
    """A container's read-only file system, a full disk."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(variants, "write_text", refuse)
    monkeypatch.setattr(variants, "read", lambda _: None)
    monkeypatch.setattr(variants, "measure", lambda *_: variants.by_hand("default"))
    ops_step.library.cache_clear()
    capfd.readouterr()
    assert is_served(random_model()) and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["NANOQWEN_STEP", "NANOQWEN_STEP_VARIANT", "NANOQWEN_HUGE_PAGES"])
@pytest.mark.parametrize("value", ["of", "ON", " off", "1"])
def test_a_setting_of_the_environment_that_there_is_none_of_is_a_mistake(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    ops_step.library.cache_clear()
    with pytest.raises(ValueError, match=f"{name}={value}: give"):
        ops_step.library()


def test_structs_of_another_layout_are_not_loaded(monkeypatch):
    monkeypatch.setattr(built, "layout", lambda: [8, 0])
    with pytest.raises(OSError, match="structs"):
        built.load(built.build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoqwen"))


def test_without_a_compiler_one_notice_and_pytorch(monkeypatch, tmp_path, capfd):
    model, ids = random_model(), torch.tensor([[3]])
    expected = model(ids, KVCache(model.config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path, compiler in (("", ""), (os.environ["PATH"], "false")):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("CXX", compiler)
        ops_step.library.cache_clear()
        capfd.readouterr()
        for _ in range(2):
            assert error(model(ids, KVCache(model.config)), expected) < 1e-5
        notices = [line for line in capfd.readouterr().err.splitlines() if "no compiled C++" in line]
        assert len(notices) == 1 and not is_served(model)
        assert not list(tmp_path.rglob("*.*"))


def test_switched_off(monkeypatch, capfd):
    monkeypatch.setenv("NANOQWEN_STEP", "off")
    ops_step.library.cache_clear()
    capfd.readouterr()
    assert not is_served(random_model()) and capfd.readouterr().err == ""


def test_several_processes_build_at_once(tmp_path):
    code = "import sys, ctypes; from pathlib import Path; from ops.cpu.library import build; "
    code += "ctypes.CDLL(str(build(Path(sys.argv[1])))).step_float32"
    run = [sys.executable, "-c", code, str(tmp_path / "new")]
    children = [subprocess.Popen(run, cwd=Path(__file__).parent.parent.parent) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert [file.suffix for file in (tmp_path / "new").iterdir()] == [".so"]


@pytest.mark.parametrize(
    "scheme, group_size", [("int8", None), ("int8", 8), ("int8", 4), ("int4", None), ("int4", 16), ("int4", 8)]
)
@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 320, "intermediate_size": 416, "head_dim": 32},  # chunks of 128 columns and what is left
        {"hidden_size": 48, "intermediate_size": 80, "head_dim": 24},
        {**MOE, "moe_intermediate_size": 160, "hidden_size": 64, "head_dim": 16, "norm_topk_prob": True},
        {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
    ],
)
def test_quantised_weights(scheme, group_size, fields, in_pytorch, monkeypatch):
    model = random_model(**fields)
    keep_head(monkeypatch)
    quantize_(model, scheme, group_size)
    assert is_served(model)
    caches = [KVCache(model.config, 1, 8) for _ in range(2)]
    for token in (3, 1, 4):
        ids = torch.tensor([[token]])
        assert (
            error(model(ids, caches[0]), in_pytorch(model, ids, caches[1])) < 4e-4
        )  # activations are rounded to 16 bits: 3e-5 to 2.2e-4, with the order of sums


def test_groups_that_end_within_a_word_of_codes_are_left_to_pytorch():
    model = random_model()
    quantize_(model, "int8", 2)
    assert not is_served(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme, hidden_size, largest", [("int8", 37, 0.007), ("int8", 64, 0.007), ("int4", 64, 0.09)])
def test_the_head_of_a_quantised_model_is_a_quantised_copy(scheme, hidden_size, largest, tied, in_pytorch):
    sizes = {"hidden_size": hidden_size, "intermediate_size": hidden_size, "head_dim": 16, "vocab_size": 1001}
    model, ids = random_model(**sizes, tie_word_embeddings=tied), torch.tensor([[3]])
    quantize_(model, scheme)
    expected = in_pytorch(model, ids, KVCache(model.config))

    def relative_error() -> float:
        difference = model(ids, KVCache(model.config)) - expected
        return (difference.norm() / expected.norm()).item()

    assert 0 < relative_error() < largest
    head = model.model.embed_tokens if tied else model.lm_head
    embedding = head.weight[3].clone()
    head.weight.mul_(0.5)  # the copy is renewed
    head.weight[3] = embedding if tied else head.weight[3]
    expected = in_pytorch(model, ids, KVCache(model.config))
    assert 0 < relative_error() < largest


# ---- keys and values in 8 bits ----


@pytest.mark.parametrize("shape", ["plain", "no multiple of any vector", "wide", "qwen2"])
def test_a_cache_of_8_bits_is_that_of_pytorch(shape, in_pytorch):
    model, ids = random_model(**SHAPES[shape]), torch.randint(SHAPES[shape].get("vocab_size", 301), (2, 300))
    cache, expected = (KVCache(model.config, 2, 320, dtype=torch.int8) for _ in range(2))
    logits = model(ids, cache)
    exact = in_pytorch(model, ids, expected)
    # Codes that fall to the other side of a half add up from layer to layer: 0.17 to 0.22 %, by seed and processor.
    assert logits.dtype == exact.dtype and (logits - exact).norm() < 4e-3 * exact.norm()
    for ours, theirs in zip(cache.keys + cache.values, expected.keys + expected.values, strict=True):
        assert ours.dtype == torch.uint8 and (ours[:, :, :300].int() - theirs[:, :, :300].int()).abs().max() <= 1
    full = model(ids, KVCache(model.config, 2, 320))
    assert 0 < (logits - full).norm() < 0.1 * full.norm()
    same = copy.deepcopy(expected)
    logits, exact = model(ids[:, :1], same), in_pytorch(model, ids[:, :1], expected)
    assert error(logits, exact) < 5e-4  # over the same codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_8_bits_gives_the_same_bits_however_it_is_filled(dtype):
    model, ids = random_model(dtype), torch.randint(301, (2, 290))
    caches = [KVCache(model.config, 2, 300, dtype=torch.int8) for _ in range(2)]
    whole = model(ids, caches[0])
    parts = [model(part, caches[1]) for part in ids.split([250, 1, 1, 20, 18], 1)]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert all(torch.equal(a[:, :, :290], b[:, :, :290]) for a, b in zip(*(c.tensors for c in caches), strict=True))
    alone = KVCache(model.config, 1, 290, dtype=torch.int8)
    assert torch.equal(model(ids[1:], alone)[0], whole[1])


@pytest.mark.parametrize("shape", ["plain", "no multiple of any vector", "qwen2"])
def test_float32_activations_may_have_a_cache_of_float16(shape, in_pytorch):
    model, ids = random_model(**SHAPES[shape]), torch.randint(SHAPES[shape].get("vocab_size", 301), (2, 290))
    for attn in (layer.self_attn for layer in model.model.layers):
        attn.v_proj.weight.data[0] *= 1e7  # beyond the range of float16
    caches = [KVCache(model.config, 2, 300, dtype=torch.float16) for _ in range(3)]
    whole = model(ids, caches[0])
    parts = [model(part, caches[1]) for part in ids.split([250, 1, 1, 20, 18], 1)]
    assert torch.equal(whole, torch.cat(parts, 1))
    exact = in_pytorch(model, ids, caches[2])
    assert exact.isfinite().all() and (whole - exact).norm() < 1e-3 * exact.norm()
    for ours, theirs in zip(caches[0].tensors, caches[2].tensors, strict=True):
        assert ours.dtype == torch.float16 and ours.max() <= 65504
        torch.testing.assert_close(ours[:, :, :290], theirs[:, :, :290], rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match=r"the cache has the dtype torch\.float16"):
        random_model(torch.bfloat16, **SHAPES[shape])(ids, KVCache(model.config, 2, 300, dtype=torch.float16))


def test_a_cache_of_8_bits_grows_and_views_rows_as_another_does():
    model, ids = random_model(), torch.randint(301, (3, 9))
    cache = KVCache(model.config, 3, 12, dtype=torch.int8)
    size = sum(tensor.nbytes for tensor in cache.tensors)
    assert size == (20 + 2) / (20 * 4) * sum(tensor.nbytes for tensor in KVCache(model.config, 3, 12).tensors)
    model(ids, cache)
    cache.truncate([5, 7, 9])
    cache.grow(40)
    found = torch.cat([model(ids[:1, :2], cache.row(row)) for row in range(2)])
    alone = []
    for row, length in ((0, 5), (1, 7)):
        fresh = KVCache(model.config, 1, 40, dtype=torch.int8)
        model(ids[row : row + 1, :length], fresh)
        alone.append(model(ids[:1, :2], fresh))
    assert torch.equal(found, torch.cat(alone))
    broken = KVCache(model.config, 1, 12, dtype=torch.int8)
    broken.key_scales = broken.key_scales[:2]
    assert not ops_step.step(model, ids[:1], broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_reply_has_the_models_own_bits(dtype):
    """`Running` against `model`: a prompt, single tokens, guesses that are taken back, over the border of a block."""
    model = random_model(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    ids = torch.randint(0, 301, (1, 300)).tolist()[0]
    caches = [KVCache(model.config, 1, 300, dtype=dtype) for _ in range(2)]
    run = ops_step.running(model, caches[0])
    for start, end, back in ((0, 240, 0), (240, 241, 0), (241, 249, 5), (244, 245, 0), (245, 261, 0), (261, 262, 0)):
        found = run(ids[start:end], min(3, end - start))
        expected = model(torch.tensor([ids[start:end]]), caches[1])[0]
        assert torch.equal(found, expected[-3:]) and caches[0].lengths == [end]
        for cache in caches:
            cache.truncate(end - back)
    assert run(ids[:39], 1) is None and run([301], 1) is None and run([-1], 1) is None and run([], 1) is None
    assert caches[0].lengths == [262]


@pytest.mark.parametrize("length", [-1, -300, 9, 2**62, 2**63, 1.5, True, None, "3", torch.tensor(3)])
def test_a_cache_with_lengths_that_are_none_is_one_error(length):
    """A reply with a length of -2 wrote before the cache and ended the process."""
    model = random_model()
    for call in (
        lambda cache: model(torch.tensor([[3, 4]]), cache),
        lambda cache: list(generate(model, [3] * 11, cache=cache)),
    ):
        cache = KVCache(model.config, 1, 10)
        cache.lengths = [length]
        with pytest.raises(ValueError, match=r"length|are used|the cache holds"):
            call(cache)


def test_a_cache_that_grows_during_a_reply_goes_on_as_what_it_is_then():
    model, caches = random_model(), [KVCache(random_model().config, 1, 8) for _ in range(2)]
    run, ids = ops_step.running(model, caches[0]), list(range(12))
    expected = model(torch.tensor([ids]), KVCache(model.config, 1, 12))[0]
    assert torch.equal(run(ids[:6], 6), expected[:6]) and run(ids[6:], 6) is None
    caches[0].grow(12)
    assert run(ids[6:], 6) is None  # it still has the old memory
    assert torch.equal(model(torch.tensor([ids[6:]]), caches[0])[0], expected[6:])


FORKS = """
import os, sys, torch
sys.path[:0] = ["tests/ops"]
from test_step import KVCache, ops_step, random_model
ops_step.BYTES_PER_THREAD = 1
torch.set_num_threads(2)
model, ids = random_model(), torch.arange(60)[None]
expected = model(ids, KVCache(model.config))
if (child := os.fork()) == 0:
    os._exit(not torch.equal(model(ids, KVCache(model.config)), expected))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    forked = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], timeout=300, check=False)
    assert forked.returncode == 0


def test_memory_that_was_given_back_is_not_read():
    """FSDP does so with weights between two passes."""
    model, ids = random_model(), torch.tensor([[3]])
    model(ids, KVCache(model.config))
    storage = model.model.layers[1].mlp.up_proj.weight.untyped_storage()
    for size in (0, 16):
        storage.resize_(size)
        assert "given back" in ops_step.why(model)
    model, cache = random_model(), KVCache(model.config)
    cache.values[1].untyped_storage().resize_(0)
    assert ops_step.step(model, ids, cache) is None and ops_step.running(model, cache) is None


def test_a_weight_that_is_replaced_during_a_reply_counts_for_the_next_one():
    model, ids = random_model(), list(range(20))
    cache, before = KVCache(model.config, 1, 40), random_model()(torch.tensor([list(range(20))]))[0]
    run = ops_step.running(model, cache)
    head = weakref.ref(model.lm_head.weight)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros_like(model.model.layers[0].mlp.up_proj.weight)
    gc.collect()
    junk = [torch.full((301, 72), 9.0) for _ in range(20)]  # where the old ones would have been
    assert error(run(ids, 20), before.double()) < 1e-5 and head() is None and junk
    assert not ops_step.running(model, KVCache(model.config, 1, 40))(ids, 1).any()
    del model, run


def test_a_cache_or_a_model_that_is_not_served_has_no_fast_reply(monkeypatch):
    model = random_model()
    assert ops_step.running(model, KVCache(model.config, 1, 8, dtype=torch.bfloat16)) is None
    assert ops_step.running(model, KVCache(model.config, 2, 8)) is None
    model.lm_head.register_forward_hook(lambda *_: None)
    assert ops_step.running(model, KVCache(model.config, 1, 8)) is None
    assert ops_step.running(lambda *_: None, None) is None
