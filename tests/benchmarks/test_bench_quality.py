"""benchmarks/quality.py: the figures are what they say, and fewer bits err more."""

import pytest
import torch

from benchmarks.common import llama_program
from benchmarks.divergence import beside_llama, compare, conversations, logits
from chat import Chat
from formats.checkpoint import open_checkpoint
from formats.gguf.writer import write_gguf
from formats.source import BUNDLED_MODEL
from model import Qwen3
from ops.quant import quantize_


def test_equal_logits_have_no_error_and_known_ones_a_known_divergence():
    exact = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert compare(exact, exact) == (0, 0, 1)
    error, divergence, same = compare(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), exact)
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).softmax(0)
    assert error == pytest.approx(1.0) and same == 1.0
    assert divergence == pytest.approx((0.5 * (0.5 / p).log()).sum().item() / 2)


def test_a_cache_of_8_bits_errs_a_little(one_thread):
    texts = conversations(Chat.from_pretrained(BUNDLED_MODEL), 2)
    model = Qwen3.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    exact = logits(model, texts)
    model.cache_dtype = torch.int8
    assert 0 < compare(logits(model, texts), exact)[0] < 0.03


def test_fewer_bits_err_more(one_thread):
    texts = conversations(Chat.from_pretrained(BUNDLED_MODEL), 4)
    exact = logits(Qwen3.from_pretrained(BUNDLED_MODEL, dtype=torch.float32), texts)
    assert len(exact) == sum(map(len, texts))
    errors = []
    for scheme, group_size in ((None, None), ("int8", None), ("int4", None)):
        model = Qwen3.from_pretrained(BUNDLED_MODEL)
        if scheme:
            quantize_(model, scheme, group_size)
        errors.append(compare(logits(model, texts), exact)[:2])
    assert sorted(errors) == errors and 0 < errors[0][0] < 0.01 and errors[2][0] < 0.3


@pytest.mark.skipif(llama_program("llama-server") is None, reason="llama-server is not here")
def test_a_file_is_computed_more_exactly_than_by_llama_cpp(tmp_path, one_thread):
    path = tmp_path / "q8_0.gguf"
    write_gguf(open_checkpoint(BUNDLED_MODEL), path, "q8_0")
    texts = conversations(Chat.from_pretrained(BUNDLED_MODEL), 1)
    ours, theirs = beside_llama(llama_program("llama-server"), path, texts)
    assert ours < 1e-3 < theirs < 0.1
