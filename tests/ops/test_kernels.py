"""Triton's kernels (ops/gpu/) against their twins in PyTorch, and the static token step.

Without a GPU the kernels run in Triton's interpreter, a process of its own as that is decided at import; with one, on
the GPU as well. The interpreter cuts bfloat16 off where a GPU rounds to the nearest, so the tests round for it.
"""

import gc
import os
import re
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model import Config, KVCache, Qwen3
from ops import devices
from ops.devices import pick_kernels
from ops.gpu import graphs
from ops.quant import QuantizedLinear, quantize_
from ops.watch import invalidate
from training.lora import add_lora

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu")]
SIZES = {"vocab_size": 101, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 2048}
SHAPES = {
    "plain": {},
    "one kv head": {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 6},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "qwen2": {"model_type": "qwen2", "head_dim": 12},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it is for Linux only")
@pytest.mark.parametrize("device", PLACES)
def test_the_kernels_agree_with_pytorch(device):
    """tests/ops/gpu/check_kernels.py, each of whose tests holds one operation against its twin."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/ops/gpu/check_kernels.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANOQWEN_TEST_DEVICE": device, **interpret}
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it is for Linux only")
def test_the_kernels_compile_for_an_h200(tmp_path):
    """Also without a GPU. No kernel spills registers, none loads packed weights byte by byte."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "tests/ops/gpu/compile_kernels.py"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    names = {line.split()[0] for line in result.stdout.splitlines()}
    sources = [(ROOT / "ops" / "gpu" / name).read_text() for name in ("kernels.py", "token_kernels.py")]
    jitted = {name for text in sources for name in re.findall(r"@triton\.jit.*\ndef (\w+)", text)}
    assert jitted - names == {"_stored", "_scales", "_values", "norm_rotated"}, "a kernel that was not compiled"


# ---------------------------------------------------------------------------------------------------------------------
# The step of one token with its positions on the device, as a CUDA graph needs it, in PyTorch's operations.


def random_model(dtype=torch.float32, **fields) -> Qwen3:
    torch.manual_seed(0)
    model = Qwen3(Config(**{**SIZES, **HEADS, **fields})).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else torch.rand_like(p) + 0.5)
    frequencies = model.model.rope_frequencies
    model.to(dtype).model.rope_frequencies = frequencies
    return model


def held_against_the_model(model: Qwen3, lengths: list[int], tolerance: float, max_len: int = 400) -> None:
    """Tokens through `graphs.step` behind rows of these lengths: the logits and the cache of model.py's own way."""
    dtype = model.model.embed_tokens.weight.dtype
    caches = [KVCache(model.config, len(lengths), max_len, dtype=dtype) for _ in range(2)]
    if max(lengths):
        prompt = torch.randint(101, (len(lengths), max(lengths)))
        for cache in caches:
            model.model(prompt, cache)
            cache.truncate(lengths)
    for _ in range(3):
        ids = torch.randint(101, (len(lengths), 1))
        found, expected = graphs.step(model, ids, caches[0]), model.head(model.model(ids, caches[1]))
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert caches[0].lengths == caches[1].lengths
    for mine, its in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        for row, length in enumerate(caches[0].lengths):
            stored, expected = mine[row, :, :length], its[row, :, :length]
            assert (stored - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("lengths", [[0], [5], [127], [300], [397], [9, 1, 130], [40] * 5], ids=str)
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_a_static_token_is_the_models(lengths, fields):
    held_against_the_model(random_model(**fields), lengths, 2e-6)


@pytest.mark.parametrize("lengths", [[126], [9, 1, 130]], ids=str)
@torch.no_grad()
def test_a_static_token_in_bfloat16(lengths):
    held_against_the_model(random_model(torch.bfloat16), lengths, 0.03)


class StandIn:
    """Of torch.cuda.CUDAGraph and the recording with it: nothing that is recorded happens then; a replay does it."""

    def __init__(self):
        StandIn.made.append(self)

    def __enter__(self):
        self.positions = StandIn.step.positions.clone()

    def __exit__(self, *_):
        StandIn.step.positions.copy_(self.positions)

    def replay(self):
        StandIn.replays += 1
        step = StandIn.step
        ((window, logits),) = [(window, logits) for window, (graph, logits) in step.graphs.items() if graph is self]
        logits.copy_(step.run(step.model(), window))


@torch.inference_mode()
def test_replayed_tokens_are_the_models_also_after_a_jump_and_into_another_window(monkeypatch):
    model = random_model()
    caches, prompt = [KVCache(model.config, 2, 300) for _ in range(2)], torch.randint(101, (2, 123))
    for cache in caches:
        model.model(prompt, cache)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    StandIn.step = graphs._steps[caches[0]] = graphs.TokenStep(model, caches[0], "torch")
    StandIn.step.records, StandIn.made, StandIn.replays, pairs = True, [], 0, []
    for token in range(15):
        if token == 9:
            for cache in caches:
                cache.truncate([100, 131])
        ids = torch.randint(101, (2, 1))
        pairs.append((graphs.step(model, ids, caches[0]), model.head(model.model(ids, caches[1]))))
    assert sorted(StandIn.step.graphs) == [128, 256] and len(StandIn.made) == 2 and StandIn.replays == 13
    for found, expected in pairs:  # compared last: no token may change the logits of an earlier one
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_where_recording_fails_decoding_goes_on(monkeypatch, capsys):
    model, ids = random_model(), torch.tensor([[3]])
    cache, other = KVCache(model.config, 1, 10), KVCache(model.config, 1, 10)
    step = graphs._steps[cache] = graphs.TokenStep(model, cache, "torch")
    step.records = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graph\nhere")))
    torch.testing.assert_close(graphs.step(model, ids, cache), model.head(model.model(ids, other)))
    assert graphs.step(model, ids, cache) is None and "no CUDA graph" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_a_static_token_of_a_quantized_model_has_a_quantized_head(quantization):
    model = random_model(hidden_size=64, intermediate_size=96)
    quantize_(model, quantization)
    ids, caches = torch.tensor([[7]]), [KVCache(model.config, 1, 9) for _ in range(2)]
    found, x = graphs.step(model, ids, caches[0]), model.model(ids, caches[1])
    head = graphs._steps[caches[0]].head
    assert isinstance(head, QuantizedLinear) and head.bits == (8 if quantization == "int8" else 4)
    torch.testing.assert_close(found, head(x))
    model.lm_head.weight.mul_(2)  # in place: another token is never computed with the old copy
    assert graphs.step(model, ids, caches[0]) is None
    caches[0].truncate(0)
    torch.testing.assert_close(graphs.step(model, ids, caches[0]), 2 * found, rtol=1e-2, atol=1e-2)


def grow(model, cache):
    cache.grow(20)


def replace_layer(model, cache):
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(72, 100)


def replace_weight(model, cache):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.clone()


def hook(model, cache):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def override(model, cache):
    model.model.norm.forward = lambda x: x


def another_eps(model, cache):
    model.model.layers[1].self_attn.q_norm.eps = 0.1


def transpose(model, cache):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.t().contiguous().t()


def say_so(model, cache):
    model.lm_head.weight.data.mul_(2)
    invalidate(model)


CHANGES = [grow, replace_layer, replace_weight, hook, override, another_eps, transpose, say_so]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_is_seen_before_the_next_token(change):
    model = random_model()
    cache, ids = KVCache(model.config, 1, 10), torch.tensor([[3]])
    assert graphs.step(model, ids, cache) is not None
    change(model, cache)
    assert graphs.step(model, ids, cache) is None and cache.lengths == [1]
    assert (graphs.step(model, ids, cache) is None) == (change in (hook, override, transpose))


@torch.no_grad()
def test_what_is_not_served_is_left_to_pytorch(monkeypatch):
    ids = torch.tensor([[3]])
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sparse, model = random_model(**experts), random_model()
    assert graphs.step(sparse, ids, KVCache(sparse.config, 1, 4)) is None
    assert graphs.step(model, ids, KVCache(model.config, 1, 4, dtype=torch.bfloat16)) is None
    assert graphs.step(model, ids, KVCache(model.config, 2, 4)) is None
    add_lora(adapted := random_model(), 2, 4.0, ["q_proj"], seed=0)
    assert graphs.step(adapted, ids, KVCache(adapted.config, 1, 4)) is None
    full = KVCache(model.config, 1, 1)
    assert graphs.step(model, ids, full) is not None
    assert graphs.step(model, ids, full) is None
    with torch.autocast("cpu"):
        assert graphs.step(model, ids, KVCache(model.config, 1, 4)) is None
    monkeypatch.setenv("NANOQWEN_STEP", "off")
    assert graphs.step(model, ids, KVCache(model.config, 1, 4)) is None


@torch.no_grad()
def test_nothing_is_kept_of_a_cache_or_a_model_that_is_gone():
    model = random_model()
    cache = KVCache(model.config, 1, 10)
    graphs.step(model, torch.tensor([[3]]), cache)
    keys, weight = weakref.ref(cache.keys[0]), weakref.ref(model.model.norm)
    del cache
    assert keys() is None
    del model
    gc.collect()
    assert weight() is None


def test_which_kernels_run_where(monkeypatch):
    assert pick_kernels("auto", "cpu", "--kernels") == "torch" == pick_kernels("torch", "cuda", "--kernels")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "gcc")
    assert pick_kernels("auto", "cuda:1", "--kernels") == "triton"
    with pytest.raises(ValueError, match="--kernels triton: Triton's kernels run on CUDA, but the device is cpu"):
        pick_kernels("triton", "cpu", "--kernels")
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert pick_kernels("auto", "cuda", "--kernels") == "torch"
    with pytest.raises(ValueError, match=r"--kernels triton: Triton .* is not installed here"):
        pick_kernels("triton", "cuda", "--kernels")
