"""Quantised linears and their layout on disk, against a brute-force twin, the gguf package and the library itself."""

import importlib.util
import math

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from formats.compressed_tensors import (
    Scheme,
    dequantize,
    largest_group,
    pack,
    packed_columns,
    quantization_config,
    read_quantization_config,
    unpack,
)
from model import Config, Qwen3
from ops.quant import SCALE_DTYPE, QuantizedLinear, choose_scheme, quantize, quantize_, swap_linears

library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


def pack_slowly(integers: list[list[int]], bits: int) -> list[list[int]]:
    """One integer after the other into the next free bits of a row, 32 bits to a signed word."""
    rows = []
    for row in integers:
        number = sum((value + (1 << bits - 1)) << bits * i for i, value in enumerate(row))
        words = [(number >> 32 * i) & 0xFFFFFFFF for i in range(math.ceil(len(row) * bits / 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return rows


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_is_what_the_format_says(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack(integers, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert packed.tolist() == pack_slowly(integers.tolist(), bits)
    assert torch.equal(unpack(packed, bits, columns), integers)


@library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [8, 33, 96])
def test_packing_is_the_library_s(bits, columns):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    integers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, columns), dtype=torch.int8)
    assert torch.equal(pack(integers, bits), pack_to_int32(integers, bits))


@library
@pytest.mark.parametrize("scheme", [Scheme(4, 32, ("lm_head",)), Scheme(8, None, ()), Scheme(8, 128, ("a.b",))])
def test_the_library_reads_the_config(scheme):
    from compressed_tensors.quantization import QuantizationConfig

    theirs = QuantizationConfig.model_validate(quantization_config(scheme))
    weights = theirs.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, tuple(theirs.ignore)) == scheme
    assert weights.symmetric and theirs.format == "pack-quantized" and theirs.quantization_status == "compressed"
    # … and what the library writes, with all of its defaults spelled out, is read here.
    assert read_quantization_config(theirs.model_dump(mode="json")) == scheme


def weights_like(kind: str) -> torch.Tensor:
    torch.manual_seed(3)
    if kind == "normal":
        return torch.randn(64, 512) * 0.02
    if kind == "heavy-tailed":
        return torch.distributions.StudentT(4.0).sample((64, 512)) * 0.02
    return torch.randn(64, 512) * torch.logspace(-3, 0, 512)  # columns of very different sizes


def relative_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return ((restored - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "uneven"])
@pytest.mark.parametrize(("bits", "theirs"), [(4, "Q4_0"), (8, "Q8_0")])
def test_error_is_no_larger_than_llama_cpp_s_at_the_same_size(kind, bits, theirs):
    weight, type = weights_like(kind), gguf.GGMLQuantizationType[theirs]
    codes, scale = quantize(weight, bits, 32)
    ours = dequantize(pack(codes, bits), scale, bits, 512)
    reference = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), type), type))
    assert relative_error(weight, ours) < relative_error(weight, reference)
    assert codes.numel() * bits // 8 + scale.numel() * 2 == gguf.quants.quantize(weight.numpy(), type).nbytes


@pytest.mark.parametrize(("bits", "group_size"), [(4, 8), (4, 16), (8, None), (8, 24)])
def test_every_weight_is_within_a_step_or_clipped(bits, group_size):
    torch.manual_seed(0)
    weight = torch.randn(7, 48)
    weight[2] = 0
    weight[3, :24] = 0
    codes, scale = quantize(weight, bits, group_size)
    assert scale.dtype == SCALE_DTYPE and scale.isfinite().all()
    steps = scale.float().abs().repeat_interleave(group_size or 48, dim=1)
    error = (dequantize(pack(codes, bits), scale, bits, 48) - weight).abs()
    edge = (codes == -(1 << bits - 1)) | (codes == (1 << bits - 1) - 1)
    assert (error[~edge] <= steps[~edge] * 0.5001).all()
    assert not (codes[2].any() or codes[3, :24].any())


def test_chunks_do_not_show(monkeypatch):
    weight = torch.randn(50, 64)
    whole = quantize(weight, 4, 32)
    monkeypatch.setattr("ops.quant.CHUNK", 64 * 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(weight, 4, 32), strict=True))


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_product_with_the_dequantised_weight(bits, group_size, dtype, bias, monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(48, 31, bias=bias, dtype=dtype)
    layer = QuantizedLinear.from_linear(linear, Scheme(bits, group_size))
    weight = layer.dequantize(dtype=dtype)
    for shape in [(1, 48), (5, 48), (2, 3, 48)]:
        x = torch.randn(shape).to(dtype)
        expected = nn.functional.linear(x.float(), weight.float(), linear.bias.float() if bias else None)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for slice_size in (1 << 21, 48 * 4):  # all rows at once, then four at a time
            monkeypatch.setattr("ops.quant.SLICE", slice_size)
            out = layer(x)
            assert out.dtype == dtype and out.shape == expected.shape
            torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


SIZES = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
MOE = {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def test_quantised_at_load_and_read_from_disk_are_the_same_model():
    torch.manual_seed(0)
    config = Config(**SHAPE, **MOE, mlp_only_layers=[1])
    model = Qwen3(config).eval()
    scheme = quantize_(model, "int4")
    assert scheme == Scheme(4, 8, ("lm_head", "model.layers.0.mlp.gate"))
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.layers[0].mlp.gate, nn.Linear)
    assert isinstance(model.model.layers[0].mlp.experts[2].down_proj, QuantizedLinear)
    with torch.device("meta"):
        empty = Qwen3(config)
    swap_linears(empty, quantization_config(scheme))
    stored = model.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in empty.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in stored.items()
    }
    assert stored["model.layers.1.mlp.down_proj.weight_shape"].tolist() == [48, 40]
    empty.load_state_dict(stored, assign=True)
    empty.model.rope_frequencies = model.model.rope_frequencies
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), empty(ids))


def test_quantised_logits_stay_near_the_model_s():
    torch.manual_seed(0)
    config, ids = Config(**SHAPE), torch.arange(30)[None]
    errors = {}
    for quantization, group_size in [("int8", 8), ("int8", None), ("int4", None)]:
        torch.manual_seed(1)
        model = Qwen3(config).eval()
        with torch.no_grad():
            before = model(ids)
            quantize_(model, quantization, group_size)
            errors[quantization, group_size] = relative_error(before, model(ids))
    assert errors["int8", 8] < errors["int8", None] < 0.02 < errors["int4", None] < 0.25


@pytest.mark.parametrize(
    ("quantization", "columns", "group_size", "words"),
    [
        ("int4", 48, 32, "--group-size 32 does not divide rows of 48 weights; 16 divides all rows"),
        ("int8", 40, 24, "--group-size 24 does not divide rows of 40 weights; 8 divides all rows"),
        ("int4", 36, None, "int4 needs rows of a multiple of 8 weights"),
    ],
)
def test_groups_that_do_not_fit(quantization, columns, group_size, words):
    with pytest.raises(ValueError, match=words):
        choose_scheme(quantization, {"model.layers.0.mlp.up_proj": (8, columns)}, group_size)


def test_a_config_whose_groups_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="groups of 32 do not fill rows of 48 weights"):
        swap_linears(Qwen3(Config(**SHAPE)), good())


def test_largest_group():
    assert [largest_group(1024, 3072), largest_group(64, 48), largest_group(40)] == [32, 16, 8]


def good() -> dict:
    return quantization_config(Scheme(4, 32, ("lm_head",)))


def changed(*path_and_value) -> dict:
    config = good()
    *path, last, value = path_and_value
    table = config
    for key in path:
        table = table[key]
    table[last] = value
    return config


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "quantization_config is not an object"),
        (changed("quant_method", "gptq"), "quant_method is 'gptq', which is not implemented"),
        (changed("format", "int-quantized"), "format is 'int-quantized'"),
        (changed("quantization_status", "frozen"), "quantization_status is 'frozen'"),
        (changed("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is"),
        (changed("config_groups", {}), "0 config_groups"),
        (changed("config_groups", {"a": {}, "b": {}}), "2 config_groups"),
        (changed("config_groups", "group_0", "targets", ["re:.*q_proj"]), "targets is"),
        (changed("config_groups", "group_0", "input_activations", {"num_bits": 8}), "input_activations is"),
        (changed("config_groups", "group_0", "weights", None), "weights is not an object"),
        (changed(*WEIGHTS, "num_bits", 3), "num_bits is '3'"),
        (changed(*WEIGHTS, "num_bits", True), "num_bits is 'True'"),
        (changed(*WEIGHTS, "symmetric", False), "symmetric is 'False'"),
        (changed(*WEIGHTS, "type", "float"), "type is 'float'"),
        (changed(*WEIGHTS, "group_size", 12), "group_size is '12'"),
        (changed(*WEIGHTS, "group_size", 10**12), "group_size is"),
        (changed(*WEIGHTS, "group_size", "32"), "group_size is"),
        (changed(*WEIGHTS, "strategy", "tensor"), "strategy is 'tensor'"),
        (changed(*WEIGHTS, "strategy", "channel"), "strategy is 'channel'"),
        (changed(*WEIGHTS, "actorder", "group"), "actorder is 'group'"),
        (changed("ignore", "lm_head"), "ignore is not a list"),
        (changed("ignore", ["re:(a+)+$"]), "of regular expressions only"),
    ],
)
def test_other_schemes_are_refused_in_one_line(config, words):
    with pytest.raises(ValueError) as error:
        read_quantization_config(config)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_ignore_patterns():
    scheme = read_quantization_config(changed("ignore", ["lm_head", r"re:.*mlp\.gate$", "re:^model.layers.3.*"]))
    ignored = ["lm_head", "model.layers.0.mlp.gate", "model.layers.3.self_attn.q_proj"]
    kept = ["model.layers.0.mlp.gate_proj", "lm_head2", "model.layers.2.self_attn.q_proj"]
    assert all(map(scheme.ignores, ignored)) and not any(map(scheme.ignores, kept))
