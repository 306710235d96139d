"""ops/compiled.py: compiled layers give the same logits, whatever the cache holds, and few graphs serve all of them."""

from pathlib import Path

import pytest
import torch
import torch._dynamo

import ops.cpu.step
from inference.decode import generate
from inference.params import SamplingParams
from model import KVCache, Qwen3
from ops.compiled import compile_

TINY = Path(__file__).resolve().parent.parent.parent / "models" / "tiny"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_compiled_layers_give_the_same_logits_with_a_cache(monkeypatch):
    """The capture of the graphs is what can go wrong; with `aot_eager` PyTorch's own kernels run them."""
    monkeypatch.setattr(ops.cpu.step, "library", lambda: None)  # PyTorch computes
    torch._dynamo.reset()
    plain, compiled, graphs = Qwen3.from_pretrained(TINY), Qwen3.from_pretrained(TINY), []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile_(compiled, "--compile", backend=backend)
    caches = [KVCache(plain.config, 1, 128, dtype=plain.model.embed_tokens.weight.dtype) for _ in range(2)]
    ids = torch.arange(60)[None] + 5
    with torch.inference_mode():
        for start, end in ((0, 20), (20, 21), (21, 22), (22, 27), (27, 28), (28, 60)):
            one, other = (model(ids[:, start:end], c) for model, c in zip((plain, compiled), caches, strict=True))
            assert torch.allclose(one.float(), other.float(), atol=1e-3, rtol=1e-3)
    assert 0 < len(graphs) <= 3 * 4, "norm, rotation and MLP, each for one token, for several, and one in reserve"
    params = SamplingParams(temperature=0, max_new_tokens=12)
    assert list(generate(compiled, range(5, 25), params)) == list(generate(plain, range(5, 25), params))


def test_without_a_compiler_the_option_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"--compile: torch[.]compile needs a C"):
        compile_(Qwen3.from_pretrained(TINY), "--compile")
