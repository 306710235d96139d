"""Whole files equal to those of llama.cpp's converter and quantiser, for every type and kind of model.

NANOQWEN_LLAMA_CPP names a folder with convert_hf_to_gguf.py and a build of llama-quantize (in build/bin or bin, beside
or below it); NANOQWEN_ASSETS the official files, since the converter only knows published tokenizers. The converter
also wants sentencepiece in the environment.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from golden.make_kquants import golden

from formats.checkpoint import open_checkpoint
from formats.gguf.writer import CONVERTED, TYPES, plan, write_gguf
from ops.encode import gguf_packer

ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", ""))
TOOLS = Path(os.environ.get("NANOQWEN_LLAMA_CPP", ""))
pytestmark = [
    pytest.mark.skipif("NANOQWEN_LLAMA_CPP" not in os.environ, reason="NANOQWEN_LLAMA_CPP is not set"),
    pytest.mark.skipif("NANOQWEN_ASSETS" not in os.environ, reason="NANOQWEN_ASSETS is not set"),
]

WIDTHS = {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "rope_theta": 1e6}
WIDTHS |= {"bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16"}
EXPERTS = oracle.MOE | {"moe_intermediate_size": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CARD = """---
license: apache-2.0
license_link: https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/LICENSE
base_model:
- Qwen/Qwen3-0.6B-Base
language: [en, "no"]
tags: [chat]
---
"""
MODELS = {  # folder (the name is metadata, too) -> (config, whether sharded)
    "Qwen3-Tied": (oracle.config(**WIDTHS, num_hidden_layers=3, tie_word_embeddings=True), False),
    "Qwen3-Untied-Chat-v2": (oracle.config(**WIDTHS, num_hidden_layers=9), True),
    "odd-0.1B": (
        oracle.config(
            **WIDTHS | {"hidden_size": 320, "intermediate_size": 544, "head_dim": 40},
            num_hidden_layers=5,
            tie_word_embeddings=True,
            rope_scaling=YARN,
        ),
        False,
    ),
    "moe16": (oracle.config(**WIDTHS, **EXPERTS | {"num_experts": 16}, num_hidden_layers=9), True),
    "moe8": (oracle.config(**WIDTHS, **EXPERTS, num_hidden_layers=2, tie_word_embeddings=True), False),
    "Qwen2-Small": (
        oracle.config(**WIDTHS | oracle.QWEN2, num_hidden_layers=10, tie_word_embeddings=True),
        False,
    ),
}


def tool(*names: str) -> Path:
    for folder in (TOOLS, TOOLS.parent, TOOLS / "llama", TOOLS / "llama.cpp"):
        for name in names:
            if (folder / name).exists():
                return folder / name
    pytest.fail(f"NANOQWEN_LLAMA_CPP={TOOLS} holds none of {', '.join(names)}")


def run(*command) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Path:
    fields, sharded = MODELS[request.param]
    path = tmp_path_factory.mktemp("models") / request.param
    oracle.write(path, fields, dtype=torch.bfloat16, **({"max_shard_size": "50MB"} if sharded else {}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ASSETS / "qwen3-0.6b" / name, path)
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture(scope="module")
def converted(model) -> dict[str, Path]:
    """What the converter writes, in all of its types that we write."""
    if importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("convert_hf_to_gguf.py wants sentencepiece, which is not installed")
    converter, files = tool("convert_hf_to_gguf.py"), {}
    for type in CONVERTED:
        files[type] = model.parent / f"{model.name}.{type}.gguf"
        run(sys.executable, converter, model, "--outtype", type, "--outfile", files[type])
    return files


def first_difference(ours: Path, theirs: Path) -> int | None:
    a, b = ours.read_bytes(), theirs.read_bytes()
    if a == b:
        return None
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("type", TYPES)
def test_the_whole_file_is_equal(model, converted, type, tmp_path):
    if type in CONVERTED:
        theirs = converted[type]
    else:
        theirs = tmp_path / "theirs.gguf"
        run(tool("build/bin/llama-quantize", "bin/llama-quantize"), converted["f32"], theirs, type, 2)
    checkpoint = open_checkpoint(model)
    write_gguf(checkpoint, tmp_path / "ours.gguf", type, pack=gguf_packer(plan(checkpoint, type)))
    assert first_difference(tmp_path / "ours.gguf", theirs) is None


def test_the_golden_bytes_are_made_by_this_llama_cpp():
    library = tool("build/bin/libggml-base.so", "bin/libggml-base.so")
    stored = json.loads((Path(__file__).parent.parent / "golden/kquants.json").read_text())
    assert golden(ctypes.CDLL(str(library))) == stored
