"""PEFT adapters: merged as PEFT merges them (its own merge_and_unload gave the same bits), or refused by name."""

import json
import re
import sys
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_chat import write_checkpoint

import console
import convert
import generate
from formats.checkpoint import open_checkpoint
from formats.source import resolve
from model import Qwen3

pytestmark = pytest.mark.usefixtures("one_thread")
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture
def base(tmp_path) -> Path:
    oracle.write(tmp_path / "base", oracle.config(vocab_size=512), dtype=torch.bfloat16)
    return write_checkpoint(tmp_path / "base")


def adapter(path: Path, base: Path | None, weights: dict[str, torch.Tensor], **settings) -> Path:
    """Writes a folder as PEFT does; weights by official module name and part."""
    path.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base and str(base), "r": 4, "lora_alpha": 8}
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    save_file(named, path / "adapter_model.safetensors")
    return path


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, torch.Tensor]:
    a, b = random(rank, columns, seed=len(module)), random(rows, rank, seed=rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def product(weights: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]


SETTINGS = {
    "plain": ({}, {Q: 2.0, DOWN: 2.0}),
    "rslora": ({"use_rslora": True}, {Q: 4.0, DOWN: 8 / 6**0.5}),
    "alphas by name": ({"alpha_pattern": {"self_attn.q_proj": 20}}, {Q: 5.0, DOWN: 8 / 6}),
    "alphas by expression": ({"alpha_pattern": {r".*layers\.\d+.mlp.*": 3, "k_proj": 99}}, {Q: 2.0, DOWN: 0.5}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sum_is_pefts(base, tmp_path, name):
    settings, scales = SETTINGS[name]
    weights = pair(Q, 64, 48) | pair(DOWN, 48, 112, rank=4 if name == "plain" else 6)
    path = adapter(tmp_path / "a", base, weights, rank_pattern={"down_proj": 6}, **settings)
    plain, merged = open_checkpoint(base), open_checkpoint(path)
    assert merged.tensors == plain.tensors
    for tensor, values in merged:
        module = tensor.removesuffix(".weight")
        added = product(weights, module) * scales[module] if module in scales else 0
        assert torch.equal(values, (plain.read(tensor).float() + added).bfloat16()), tensor
        assert (module in scales) != torch.equal(values, plain.read(tensor))


def test_dora(base, tmp_path):
    length = random(64).abs() + 1
    weights = pair(Q, 64, 48) | {f"{Q}.lora_magnitude_vector": length}
    merged = open_checkpoint(adapter(tmp_path / "a", base, weights, use_dora=True)).read(f"{Q}.weight").float()
    assert torch.allclose(merged.norm(dim=1), length, rtol=0.01)
    whole = open_checkpoint(base).read(f"{Q}.weight").float() + 2 * product(weights, Q)
    assert torch.allclose(torch.nn.functional.normalize(merged), torch.nn.functional.normalize(whole), atol=0.01)


def test_modules_that_were_trained_whole(base, tmp_path):
    """A resized vocabulary: embedding and head are saved whole, with more rows than the base has."""
    whole = {f"{EMBEDDING}.weight": random(520, 48), f"{HEAD}.modules_to_save.weight": random(520, 48, seed=1)}
    model = Qwen3.from_pretrained(adapter(tmp_path / "a", base, whole | pair(Q, 64, 48)))
    assert model.config.vocab_size == 520 and model(torch.tensor([[515]])).shape[-1] == 520
    assert torch.equal(model.lm_head.weight, random(520, 48, seed=1).bfloat16())


def test_an_embedding_and_a_head(base, tmp_path):
    a, b = random(4, 512), random(48, 4)
    weights = {f"{EMBEDDING}.lora_embedding_A": a, f"{EMBEDDING}.lora_embedding_B": b, **pair(HEAD, 512, 48)}
    plain, merged = open_checkpoint(base), open_checkpoint(adapter(tmp_path / "a", base, weights))
    name = f"{EMBEDDING}.weight"
    assert torch.equal(merged.read(name), (plain.read(name).float() + 2 * (b @ a).T).bfloat16())
    name = f"{HEAD}.weight"
    assert torch.equal(merged.read(name), (plain.read(name).float() + 2 * product(weights, HEAD)).bfloat16())


@pytest.mark.parametrize("name", ["default", "weight", "my-adapter"])
def test_the_name_that_peft_knows_an_adapter_by(base, tmp_path, name):
    """Written by torch.save and others straight from the state_dict, where PEFT's own files leave it out."""
    plain = pair(Q, 64, 48) | {
        f"{EMBEDDING}.lora_embedding_A": random(4, 512),
        f"{EMBEDDING}.lora_embedding_B": random(48, 4),
        f"{Q}.lora_magnitude_vector": random(64).abs(),
        f"{HEAD}.weight": random(512, 48, seed=1),
    }
    named = {re.sub(r"(\.lora_\w+)", rf"\1.{name}", key): value for key, value in plain.items()}
    named[f"{HEAD}.modules_to_save.{name}.weight"] = named.pop(f"{HEAD}.weight")
    if name != "weight":  # an embedding's parts have no leaf, so this one can't be told from none
        assert not set(named) & set(plain)
    first, second = (open_checkpoint(adapter(tmp_path / n, base, w)) for n, w in (("a", plain), ("b", named)))
    for key in first.tensors:
        assert torch.equal(first.read(key), second.read(key)), key
    other = {key.replace("lora_A.", "lora_A.other."): value for key, value in pair(DOWN, 48, 112).items()}
    with pytest.raises(ValueError, match=rf"2 adapters in it \(.*{name}.*\); save the one you want"):
        open_checkpoint(adapter(tmp_path / "c", base, named | other))


def test_a_tied_head_that_was_adapted_is_a_head_of_its_own(tmp_path):
    oracle.write(tmp_path / "base", oracle.config(tie_word_embeddings=True))
    weights = pair(HEAD, 331, 48)
    model = Qwen3.from_pretrained(adapter(tmp_path / "a", tmp_path / "base", weights))
    assert not model.config.tie_word_embeddings
    tied = model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied + 2 * product(weights, HEAD))
    embedding = {f"{EMBEDDING}.lora_embedding_A": random(4, 331), f"{EMBEDDING}.lora_embedding_B": random(48, 4)}
    with pytest.raises(ValueError, match="adapts the embedding, to which the base ties its head"):
        open_checkpoint(adapter(tmp_path / "b", tmp_path / "base", embedding))


def run(command, monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        console.run(command.main)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("to", ["bf16", "gguf", "int8"])
def test_the_commands_take_an_adapter_with_or_without_its_base(base, tmp_path, monkeypatch, capsys, to):
    path = adapter(tmp_path / "a", base, pair(Q, 64, 48))
    outs = [tmp_path / f"{name}{'.gguf' if to == 'gguf' else ''}" for name in ("alone", "beside")]
    for out, source in zip(outs, (["--model", path], ["--model", base, "--adapter", path]), strict=True):
        status, _, err = run(convert, monkeypatch, capsys, "--to", to, *source, "--out", out)
        assert status == 0, err
    first, second = map(open_checkpoint, outs)
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.tensors)
    question = ["--raw", "--temperature", "0", "--max-new-tokens", "12", "a b c"]
    said = [run(generate, monkeypatch, capsys, "--model", path, *question)[1]]
    said.append(run(generate, monkeypatch, capsys, "--model", base, "--adapter", path, *question)[1])
    if to == "bf16":
        said.append(run(generate, monkeypatch, capsys, "--model", outs[0], *question)[1])
    assert len(set(said)) == 1 and said[0] != run(generate, monkeypatch, capsys, "--model", base, *question)[1]


def test_an_adapter_over_quantised_weights(base, tmp_path, monkeypatch, capsys):
    assert run(convert, monkeypatch, capsys, "--to", "int4", "--model", base, "--out", tmp_path / "int4")[0] == 0
    weights = pair(Q, 64, 48)
    merged = open_checkpoint(adapter(tmp_path / "a", tmp_path / "int4", weights)).read(f"{Q}.weight")
    close = merged - 2 * product(weights, Q) - open_checkpoint(base).read(f"{Q}.weight").float()
    assert merged.dtype == torch.float32 and close.abs().max() < 0.05


def test_a_base_beside_the_adapter_is_found(base, tmp_path):
    path = adapter(tmp_path / "a", None, pair(Q, 64, 48), base_model_name_or_path="../base")
    assert resolve(path) == path and open_checkpoint(path).path.samefile(base)


REFUSED = {
    "no base": ({"base_model_name_or_path": None}, "no base_model_name_or_path; give the base as --model BASE"),
    "a base that is gone": ({"base_model_name_or_path": "/no/where"}, "/no/where ... --model BASE --adapter DIR"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    "invoked": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is [5]"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "an endless expression": ({"alpha_pattern": {"(a+)+b": 2}}, "alpha_pattern has the expression '(a+)+b'"),
    "another rank": ({"r": 16}, "q_proj.weight of rank 4, but ... says r 16"),
    "alpha a text": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_named(base, tmp_path, name, monkeypatch, capsys):
    settings, words = REFUSED[name]
    path = adapter(tmp_path / "a", base, pair(Q, 64, 48), **settings)
    status, out, err = run(convert, monkeypatch, capsys, "--to", "bf16", "--model", path, "--out", tmp_path / "out")
    assert status == 2 and out == "" and err.count("\n") == 1 and str(path) in err
    for word in words.split(" ... "):
        assert word in err


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (pair("model.layers.9.mlp.up_proj", 112, 48), "adapts model.layers.9.mlp.up_proj.weight, which"),
        (pair(Q, 64, 50), "q_proj.weight [64, 48]: lora_A [4, 50]"),
        ({f"{Q}.lora_A.weight": random(4, 48)}, "of its adapter has only lora_A"),
        ({f"{Q}.lora_A.weight": random(0), f"{Q}.lora_B.weight": random(0)}, "zero_to_fp32.py makes them whole"),
        ({f"{Q}.lora_bias_extra": random(4)}, "is not part of a LoRA adapter"),
        ({f"{Q}.weight": random(64, 40)}, "does not fit the base's [64, 48]"),
    ],
)
def test_an_adapter_of_another_model_is_named(base, tmp_path, weights, words):
    with pytest.raises(ValueError) as error:
        open_checkpoint(adapter(tmp_path / "a", base, weights))
    assert words in str(error.value) and "adapter_model.safetensors" in str(error.value)


def test_pickles_and_adapters_of_adapters_are_refused(base, tmp_path):
    path = adapter(tmp_path / "a", base, pair(Q, 64, 48))
    twice = adapter(tmp_path / "b", path, pair(Q, 64, 48))
    with pytest.raises(ValueError, match="is an adapter itself"):
        open_checkpoint(twice)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match="only pickle weights"):
        open_checkpoint(path)


def test_a_whole_model_is_no_adapter(base):
    with pytest.raises(
        ValueError, match=r"not an adapter, which has an adapter_config\.json; a whole model is given as"
    ):
        open_checkpoint(base, base)


def test_our_own_adapters_are_read(base, tmp_path):
    from training.lora import add_lora, merged_weights, save_adapter

    model = Qwen3.from_pretrained(base)
    add_lora(model, 2, 6.0, ["q_proj", "down_proj"], seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    save_adapter(model, tmp_path / "adapter", str(base), 2, 6.0, ["q_proj", "down_proj"])
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    for name, values in open_checkpoint(tmp_path / "adapter"):
        assert torch.equal(values, merged_weights(model)[name]), name
