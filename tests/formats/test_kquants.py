"""The block formats, held against the gguf package's codecs and against bytes that llama.cpp's own quantisers made."""

import base64
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from golden.make_kquants import ordinary, special
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.gguf import kquants, types
from formats.gguf.types import FORMATS, Packed, dequantize, quantize
from formats.gguf.writer import Pack, Planned
from formats.threads import map_in_threads
from ops.encode import gguf_packer

GOLDEN = json.loads((Path(__file__).parent.parent / "golden/kquants.json").read_text())
PACKED = [format.name for format in FORMATS.values() if format.pack]
UNPACKED = [format.name for format in FORMATS.values() if format.unpack]
# Where the float16 scales lie in a block.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def codec(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_the_packages(name):
    format = FORMATS[name]
    assert codec(name) == format.id
    assert gguf.GGML_QUANT_SIZES[codec(name)] == (format.block, format.size)


@pytest.fixture(params=["PyTorch", "C++"])
def pack(request) -> Pack:
    """Each of the two that make a tensor's bytes."""
    return types.pack if request.param == "PyTorch" else compiled()


def compiled() -> Pack:
    made = gguf_packer([Planned("a", [], (256,), FORMATS["Q4_K"])])
    if made is types.pack:
        pytest.skip("there is no C++ compiler here")
    return made


@pytest.mark.parametrize("name", PACKED)
def test_bytes_are_llama_cpps_for_weights(pack, name):
    data = pack(torch.from_numpy(ordinary(1 << 18)), FORMATS[name]).data.numpy().tobytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN[name]["ordinary"]


@pytest.mark.parametrize("name", PACKED)
def test_bytes_are_llama_cpps_for_blocks_unlike_weights(pack, name):
    data = pack(torch.from_numpy(special()), FORMATS[name]).data.view(15, -1)
    expected = torch.frombuffer(bytearray(base64.b64decode(GOLDEN[name]["special"])), dtype=torch.uint8).view(15, -1)
    wrong = (data != expected).any(1).nonzero().flatten().tolist()
    assert not wrong, f"blocks {wrong} of golden/make_kquants.py differ"


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_bytes_are_the_packages(name):
    values = np.random.default_rng(0).standard_normal((37, 96)).astype(np.float32)
    expected = gguf.quants.quantize(values, codec(name)).reshape(-1)
    assert np.array_equal(quantize(torch.from_numpy(values), FORMATS[name]).numpy(), expected.view(np.uint8))


def random_blocks(name: str, count: int, seed: int) -> torch.Tensor:
    """Random bytes with scales that are numbers: every bit pattern of everything else."""
    format, random = FORMATS[name], np.random.default_rng(seed)
    data = random.integers(0, 256, (count, format.size), dtype=np.uint8)
    for place in SCALES.get(name, (0,)):
        data[:, place : place + 2] = random.standard_normal((count, 1)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(data)


@pytest.mark.parametrize("name", UNPACKED)
def test_values_are_the_packages(name):
    format = FORMATS[name]
    rows = 2 * types.TILE // format.block + 3  # more than a tile
    data = random_blocks(name, rows, 1)
    expected = gguf.quants.dequantize(data.numpy(), codec(name))
    assert np.array_equal(dequantize(data.view(-1), format, (rows, format.block)).numpy(), expected)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_taken_exactly(pack, name, dtype):
    values = torch.from_numpy(ordinary(2048)).to(dtype)
    assert torch.equal(pack(values, FORMATS[name]).data, pack(values.float(), FORMATS[name]).data)


@pytest.mark.parametrize("name", PACKED)
def test_error_is_within_the_format(name):
    values = torch.from_numpy(ordinary(1 << 14))
    bits = {"8": 8, "6": 6, "5": 5, "4": 4}[name[1]]
    error = dequantize(quantize(values, FORMATS[name]), FORMATS[name], values.shape).sub_(values).abs_()
    spread = values.max() - values.min()
    assert error.max() <= spread / (1 << bits) * 1.1
    assert error.mean() > 0


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_values_that_no_scale_can_hold_are_refused(pack, name, value):
    values = torch.from_numpy(ordinary(1024))
    values[300] = value
    with pytest.raises(ValueError, match="not finite or too large"):
        pack(values, FORMATS[name])


@pytest.mark.parametrize("tile", [256, 512, 1 << 15])
@pytest.mark.parametrize("name", PACKED)
def test_tiles_do_not_matter(name, tile, monkeypatch):
    values = torch.from_numpy(ordinary(5 * 256))
    expected = quantize(values, FORMATS[name])
    monkeypatch.setattr(types, "TILE", tile)
    assert torch.equal(quantize(values, FORMATS[name]), expected)


@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 33])
@pytest.mark.parametrize("name", PACKED)
def test_compiled_blocks_do_not_depend_on_their_neighbours(name, blocks):
    """Several blocks are packed side by side; the last ones stand beside zeros, and nothing behind them is written."""
    pack, format = compiled(), FORMATS[name]
    values = torch.from_numpy(ordinary(40 * format.block))
    whole = pack(values, format).data
    padded = torch.cat((values[: blocks * format.block], torch.full((format.block,), torch.nan)))
    assert torch.equal(pack(padded[: -format.block], format).data, whole[: blocks * format.size])


def same(one: Packed, other: Packed) -> bool:
    equal = torch.equal(one.data, other.data) and one.largest == other.largest
    return equal and one.total == pytest.approx(other.total, rel=1e-5, abs=1e-35)


@pytest.mark.parametrize("name", PACKED)
def test_the_error_is_that_of_the_stored_values(pack, name):
    values = torch.from_numpy(np.concatenate((special(), ordinary(256))))
    found = pack(values, FORMATS[name])
    error = (dequantize(found.data, FORMATS[name], values.shape) - values).abs()
    assert found.largest == error.max() and found.total == pytest.approx(error.sum().item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PACKED),
    st.lists(st.floats(-60000, 60000, width=32), min_size=256, max_size=256),
    st.sampled_from([1.0, 2.0**-20, 2.0**-60, 2.0**-126, 2.0**-140]),
)
def test_any_finite_block_survives_and_both_give_the_same_bytes(name, block, factor):
    """Whatever the 256 values are, they come back finite and not further off than the block is wide."""
    values = torch.tensor(block) * factor
    packed, format = types.pack(values, FORMATS[name]), FORMATS[name]
    found = dequantize(packed.data, format, values.shape)
    assert found.isfinite().all()
    width = max(values.max(), values.new_zeros(())) - min(values.min(), 0)
    assert (found - values).abs().max() <= width + 1e-30
    assert packed.largest <= width + 1e-30
    assert same(compiled()(values, format), packed)


def test_sums_run_from_first_to_last():
    terms = torch.from_numpy(ordinary(32 * 3 * 100)).view(32, 3, 100) / 3
    total = terms[0].clone()
    for row in terms[1:]:
        total += row
    assert torch.equal(kquants.ordered_sum(terms), total)
    assert not torch.equal(terms.sum(0), total)  # else the detour would not be needed


def test_map_in_threads_keeps_order_and_the_number_of_threads():
    torch.set_num_threads(threads := 3)
    assert list(map_in_threads(lambda piece: piece * piece, range(50))) == [piece * piece for piece in range(50)]
    assert torch.get_num_threads() == threads


def test_map_in_threads_stays_a_few_pieces_ahead():
    taken = []
    results = map_in_threads(lambda piece: piece, (taken.append(piece) or piece for piece in range(100)))
    for piece in results:
        assert len(taken) <= piece + torch.get_num_threads() + 10
    assert len(taken) == 100
