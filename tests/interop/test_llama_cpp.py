"""llama.cpp, through llama-cpp-python, opens what is written here and goes on with the same tokens (`make interop`)."""

import oracle
import pytest
import torch
from test_chat import TEXTS, write_checkpoint

from formats.checkpoint import open_checkpoint
from formats.gguf.writer import write_gguf
from generate import SamplingParams, generate
from model import Qwen3

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make interop installs it)")

F32 = 0  # ggml's type of the cache, whose rounding would otherwise be in the way
HEADS = {"vocab_size": 512, "hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
CHECKPOINTS = {
    "dense tied": oracle.config(**HEADS, tie_word_embeddings=True, rope_theta=1e6),
    "dense untied": oracle.config(**HEADS, rope_theta=1e6),
    "experts": oracle.config(**oracle.MOE | {"moe_intermediate_size": 64}, **HEADS),
    "qwen2": oracle.config(**HEADS | oracle.QWEN2 | {"num_attention_heads": 2, "num_key_value_heads": 1}),
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path):
    oracle.write(tmp_path / "model", CHECKPOINTS[request.param])
    write_checkpoint(tmp_path / "model")
    return open_checkpoint(tmp_path / "model")


def llama(path):
    options = {"n_ctx": 128, "n_threads": 2, "type_k": F32, "type_v": F32, "flash_attn": False, "logits_all": True}
    return llama_cpp.Llama(str(path), verbose=False, **options)


def test_greedy_tokens_and_logits_are_equal(checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path, "f32")
    ids = list(range(3, 19))
    for source in (checkpoint.path, path):
        model = Qwen3.from_pretrained(source)
        params = SamplingParams(temperature=0, max_new_tokens=32)
        expected = list(generate(model, ids, params))
        theirs = llama(path)
        found = []
        for token in theirs.generate(ids, temp=0):
            found.append(token)
            if len(found) == len(expected):
                break
        assert found == expected
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        scores = torch.from_numpy(theirs.scores[: len(ids)].copy())
        assert (scores - logits).abs().max() <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("type", ["q8_0", "q4_k_m", "q6_k"])
def test_quantised_files_open_and_mean_the_same_values(type, tmp_path):
    """llama.cpp rounds activations to 8 bits where weights are quantised, so its logits are only near."""
    oracle.write(tmp_path / "model", oracle.config(**HEADS | {"hidden_size": 256, "intermediate_size": 512}))
    write_checkpoint(tmp_path / "model")
    path, ids = tmp_path / "model.gguf", list(range(3, 35))
    write_gguf(open_checkpoint(tmp_path / "model"), path, type)
    theirs = llama(path)
    theirs.eval(ids)
    with torch.no_grad():
        logits = Qwen3.from_pretrained(path)(torch.tensor([ids]))[0]
    scores = torch.from_numpy(theirs.scores[: len(ids)].copy())
    similarity = torch.nn.functional.cosine_similarity(scores, logits)
    assert similarity.mean() > 0.99
    assert similarity.min() > 0.9


def test_text_gives_the_same_ids(checkpoint, tmp_path):
    """Where the text is already NFC: llama.cpp does not normalise."""
    from tokenizers import Tokenizer

    path = tmp_path / "model.gguf"
    write_gguf(checkpoint, path, "f32")
    theirs, ours = llama(path), Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    for text in map(ours.normalizer.normalize_str, TEXTS):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.encode(text).ids
