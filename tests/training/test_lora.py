"""Adapters: what is trained, what is merged, and that PEFT opens them."""

import json
from pathlib import Path

import pytest
import torch

from data.corpus.tokenizer import TINY
from formats.compressed_tensors import Scheme
from model import Qwen3
from ops.quant import QuantizedLinear
from training.lora import (
    TARGETS,
    LoRALinear,
    QLoRALinear,
    add_lora,
    load_adapter,
    merged_weights,
    save_adapter,
    without_adapters,
)

IDS = torch.arange(300, 330).view(2, 15)

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(rank: int = 4, targets: list[str] = list(TARGETS), dtype=torch.float32, trained: bool = True) -> Qwen3:  # noqa: B006
    model = Qwen3.from_pretrained(TINY, dtype=dtype)
    add_lora(model, rank, 8.0, targets, seed=0)
    if trained:
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.05)
    return model


def plain(weights: dict) -> Qwen3:
    model = Qwen3.from_pretrained(TINY, dtype=torch.float32)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_a_trained_one_can_be_left_out():
    base = Qwen3.from_pretrained(TINY, dtype=torch.float32)(IDS)
    assert torch.equal(adapted(trained=False)(IDS), base)
    model = adapted()
    assert not torch.allclose(model(IDS), base, atol=0.1)
    with without_adapters(model):
        assert torch.equal(model(IDS), base)
    assert not torch.allclose(model(IDS), base, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_an_adapter_adds_alpha_by_rank_times_its_product(kind):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 24), torch.randn(3, 16)
    layer = layer if kind is LoRALinear else QuantizedLinear.from_linear(layer, Scheme(8, None))
    adapter = kind(layer, 4, 6.0, torch.Generator().manual_seed(1))
    adapter.lora_B.weight.normal_()
    added = x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T * 6 / 4
    torch.testing.assert_close(adapter(x), layer(x) + added)
    assert layer.bias.abs().min() > 0


@torch.no_grad()
def test_merged_weights_are_a_plain_model_of_the_same_logits():
    model = adapted()
    torch.testing.assert_close(plain(merged_weights(model))(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_only_the_adapters_of_the_targets_are_trained():
    model = adapted(targets=["q_proj", "down_proj"], dtype=torch.bfloat16, trained=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * model.config.num_hidden_layers
    assert all(".q_proj.lora_" in name or ".down_proj.lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in trained} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def test_the_first_values_depend_on_the_seed_alone():
    first = dict(adapted(trained=False).named_parameters())
    torch.manual_seed(99)
    again = dict(adapted(trained=False).named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not p.any() for name, p in first.items() if "lora_B" in name)
    assert all(p.any() for name, p in first.items() if "lora_A" in name)


def test_saved_and_loaded(tmp_path):
    model, other = adapted(), adapted(trained=False)
    save_adapter(model, tmp_path / "adapter", "base", 4, 8.0, list(TARGETS))
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(model(IDS), other(IDS))
    with pytest.raises(ValueError, match="adapters of other ranks or targets"):
        load_adapter(adapted(rank=2), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: can't be read"):
        load_adapter(other, tmp_path / "adapter")


def test_the_names_are_those_of_peft(tmp_path):
    from safetensors import safe_open

    save_adapter(adapted(), tmp_path / "adapter", "Qwen/Qwen3-0.6B", 4, 8.0, ["q_proj"])
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        assert file.get_slice(name).get_shape() == [4, 96]
    assert name.replace("lora_A", "lora_B") in names and len(names) == 4 * 7 * 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"


def test_experts_have_no_adapters():
    from model import Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = Qwen3(Config(vocab_size=32, **sizes, head_dim=8, **experts))
    with pytest.raises(ValueError, match="gate_proj is one of many experts"):
        add_lora(model, 2, 4.0, list(TARGETS), 0)
    model = Qwen3(Config(vocab_size=32, **sizes, head_dim=8, **experts))
    add_lora(model, 2, 4.0, ["q_proj"], 0)
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 1


@torch.no_grad()
def test_peft_opens_it(tmp_path):
    """Where peft is installed: the same logits from the base model with the adapter, and merged by PEFT."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = adapted()
    save_adapter(model, tmp_path / "adapter", str(TINY), 4, 8.0, list(TARGETS))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in merged_weights(model).items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
    by_config = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(by_config(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)


def test_a_run_leaves_merged_weights_and_its_adapter(tmp_path):
    from chat import Chat
    from train import Trainer
    from training import schema

    text = f"stage: sft\nmodel: {{init: {TINY}, tokenizer: {TINY}}}\ntrain: {{out: {tmp_path / 'run'}, steps: 2, "
    text += "save_every: 2, batch: 2, sequence: 256, threads: 1, device: cpu, dtype: bfloat16, validate_batches: 1}\n"
    (tmp_path / "a.yaml").write_text(text + "lora: {rank: 2}\noptimizer: {name: adamw, lr: 0.01}\n")
    trainer = Trainer(schema.load(tmp_path / "a.yaml"), resume=False)
    trainer.train()
    latest: Path = tmp_path / "run" / "latest"
    saved, base = Qwen3.from_pretrained(latest), Qwen3.from_pretrained(TINY)
    assert saved.config.dtype == "bfloat16"
    moved = [name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])]
    assert moved and all(name.split(".")[-2] in TARGETS for name in moved)
    again = Qwen3.from_pretrained(TINY)
    add_lora(again, 2, trainer.settings.lora.alpha, list(TARGETS), seed=5)
    load_adapter(again, latest / "adapter")
    merged = merged_weights(again)
    assert all(torch.equal(merged[name], tensor) for name, tensor in saved.state_dict().items())
    Chat.from_pretrained(latest)
