"""The blocks of a GGUF in place: their products in C++ (ops/cpu/blocks.cpp), in PyTorch, and models that keep them."""

import ctypes

import gguf
import numpy as np
import oracle
import pytest
import torch
from test_chat import write_checkpoint
from torch import nn

from formats.checkpoint import open_checkpoint
from formats.gguf import writer
from formats.gguf.types import FORMATS, quantize
from inference.decode import new_cache
from inference.load import describe, parameters
from inference.session import weight_bytes_per_token
from model import Qwen3, load
from ops.blocks import TYPES, BlockEmbedding, BlockLinear, Blocks
from ops.cpu import step as ops_step
from ops.cpu.library import Linear
from ops.cpu.variants import FORMS
from ops.quant import quantize_

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
MODELS = {
    "tied": oracle.config(**WIDE, tie_word_embeddings=True),
    "untied, of odd widths": oracle.config(
        vocab_size=512, hidden_size=96, intermediate_size=160, head_dim=32, tie_word_embeddings=False
    ),
    "moe": oracle.config(**{**oracle.MOE, **WIDE, "moe_intermediate_size": 256, "norm_topk_prob": True}),
}


@pytest.fixture(scope="module")
def library():
    loaded = ops_step.library()
    if loaded is None:
        pytest.skip("there is no C++ compiler here")
    loaded.product.argtypes = [ctypes.POINTER(Linear), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    return loaded


def weights(name: str, rows: int, columns: int) -> torch.Tensor:
    """The blocks [rows, bytes] of random weights of very different sizes."""
    torch.manual_seed(rows + columns)
    values = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    values[0, :32] = 0
    return quantize(values, FORMATS[name]).view(rows, -1)


def values_of(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """As the gguf package has them, in float64."""
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).astype(np.float64))


def product(library, name: str, blocks: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x), len(blocks)), torch.nan)
    w = Linear(blocks.data_ptr(), None, None, len(blocks), x.shape[1], blocks.shape[1], 32, 0, FORMS[name])
    assert library.product(w, x.data_ptr(), len(x), out.data_ptr(), 1) == 0
    return out


@pytest.mark.parametrize("columns", [256, 768, 32, 352, 1056])
@pytest.mark.parametrize("name", TYPES)
def test_products_are_those_of_the_packages_values(library, name, columns):
    if columns % FORMATS[name].block:
        pytest.skip("no whole blocks")
    blocks = weights(name, 70, columns)
    values = values_of(name, blocks)
    x = torch.randn(40, columns) * torch.logspace(-1, 1, 40)[:, None]
    x[3] = 0
    # Each activation is off by at most half a step of its group, and a float32 sum by some of its own steps.
    groups = x.abs().split(16 if name == "Q6_K" else 32, 1)
    step = torch.cat([part.amax(1, keepdim=True).expand_as(part) / 32639 for part in groups], 1).double()
    limit = step / 2 @ values.abs().T if FORMATS[name].dtype is None else 0
    limit = limit + 1e-6 * (x.double().abs() @ values.abs().T)
    found = product(library, name, blocks, x)
    assert ((found - x.double() @ values.T).abs() <= limit).all()
    for count in (1, 2, 3, 5, 17, 39):
        assert torch.equal(product(library, name, blocks, x[:count].clone()), found[:count])


@pytest.mark.parametrize("name", TYPES)
def test_what_is_not_finite_stays_visible(library, name):
    x = torch.randn(2, 512)
    x[0, 300], x[1, 5] = torch.nan, torch.inf
    assert not product(library, name, weights(name, 5, 512), x).isfinite().any()


@pytest.mark.parametrize("name", TYPES)
def test_pytorch_computes_the_same_layer(name):
    torch.manual_seed(0)
    linear, embedding = nn.Linear(256, 40), nn.Embedding(40, 256)
    layer, rows = BlockLinear(linear, FORMATS[name]), BlockEmbedding(embedding, FORMATS[name], torch.float32)
    layer.weight_blocks = rows.weight_blocks = weights(name, 40, 256)
    values, x = values_of(name, layer.weight_blocks), torch.randn(3, 2, 256)
    torch.testing.assert_close(layer(x).double(), x.double() @ values.T + linear.bias, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[0, 39], [7, 7]])
    assert torch.equal(rows(ids).double(), values[ids])
    assert torch.equal(layer.state_dict()["weight"].double(), values)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A .gguf of each model and type, made when it is asked for."""
    made = {}

    def file(model: str, type: str):
        if (model, type) not in made:
            path = tmp_path_factory.mktemp("model")
            oracle.write(path, MODELS[model])
            write_checkpoint(path)
            made[model, type] = path / "model.gguf"
            writer.write_gguf(open_checkpoint(path), made[model, type], type)
        return made[model, type]

    return file


@pytest.mark.parametrize(
    ("model", "type"),
    [("tied", type) for type in ("f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m")]
    + [("untied, of odd widths", type) for type in ("q4_k_m", "q5_k_m", "q4_1")]
    + [("moe", type) for type in ("bf16", "q8_0", "q4_k_m", "q6_k")],
)
def test_a_model_keeps_its_blocks_and_computes_with_their_values(files, library, model, type):
    path = files(model, type)
    kept, exact = Qwen3.from_pretrained(path), Qwen3.from_pretrained(path, dtype=torch.float32).double()
    assert ops_step.why(kept) is None and any(isinstance(m, Blocks) for m in kept.modules())
    assert not any(isinstance(m, Blocks) for m in exact.modules())
    ids = torch.randint(0, 512, (1, 40))

    def distance(logits: torch.Tensor) -> float:
        return ((logits.double() - expected).norm() / expected.norm()).item()

    near = 0.2 if kept.dtype == torch.bfloat16 else 6e-3  # these weights magnify what is rounded
    with torch.no_grad():
        expected = exact(ids)
        assert distance(kept(ids)) < near  # without a cache PyTorch computes
        cache = new_cache(kept, 40)
        together = kept(ids, cache)
        assert distance(together) < near
        one_by_one = new_cache(kept, 40)
        alone = torch.cat([kept(ids[:, i : i + 1], one_by_one) for i in range(40)], 1)
        assert torch.equal(alone, together)
        batch = new_cache(kept, 40, 3)
        assert torch.equal(kept(ids.repeat(3, 1), batch)[2:], together)


def test_blocks_are_read_where_they_are_mapped(files):
    path = files("tied", "q4_k_m")
    checkpoint = open_checkpoint(path)
    model = load(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, Blocks):
            assert module.weight_blocks.data_ptr() == checkpoint.blocks(f"{name}.weight").data_ptr()
    assert model.dtype == torch.float32 and "Q4_K" in describe(model)
    assert parameters(model) == parameters(Qwen3.from_pretrained(path, dtype=torch.float32))
    sizes = [tensor.size for name, tensor in checkpoint.stored.items()]
    assert weight_bytes_per_token(model) == pytest.approx(sum(sizes), rel=1e-3)


def test_what_is_saved_again_has_the_values(files, tmp_path):
    model = Qwen3.from_pretrained(files("moe", "q4_k_m"))
    model.save_pretrained(tmp_path)
    saved, exact = Qwen3.from_pretrained(tmp_path), Qwen3.from_pretrained(files("moe", "q4_k_m"), dtype=torch.float32)
    assert saved.dtype == torch.float32
    for name, value in exact.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def test_blocks_are_not_quantised_again(files):
    with pytest.raises(ValueError, match="int8: the weights are in Q8_0 blocks already"):
        quantize_(Qwen3.from_pretrained(files("tied", "q8_0")), "int8")


def test_a_scale_that_is_not_finite_is_found(files, tmp_path):
    path = tmp_path / "broken.gguf"
    data = bytearray(files("tied", "q8_0").read_bytes())
    checkpoint = open_checkpoint(files("tied", "q8_0"))
    place = checkpoint.stored["blk.1.ffn_up.weight"].start + 34 * 5
    data[place : place + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"non-finite: model\.layers\.1\.mlp\.up_proj\.weight"):
        Qwen3.from_pretrained(path)
