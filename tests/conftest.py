"""Fixtures that several rooms' tests share."""

import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest

forked: list[str] = []  # where this process forked after PyTorch was imported


def note_fork() -> None:
    if "torch" in sys.modules:
        forked.append("".join(traceback.format_stack(limit=8)))


os.register_at_fork(before=note_fork)


@pytest.fixture(autouse=True)
def no_fork():
    """PyTorch's threads and locks do not survive a fork, and its CUDA build refuses to train in one: see runs.py."""
    forked.clear()
    yield
    assert not forked, f"this test forks a process that has PyTorch: {forked[0]}"


@pytest.fixture(scope="module")
def one_thread():
    """Many small tensors: torch's own threads would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Qwen3 of two layers with random weights, its tokenizer and its template; copy it before you change it."""
    import torch
    from test_chat import write_checkpoint

    from model import Config, Qwen3

    path = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Qwen3(Config(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=True))
    model.generation_config = {"eos_token_id": [2, 0], "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium through playwright; where either is missing, the tests of the pages say so and skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
