"""Checkpoints as other tools store them: other names, other quantised forms, packed here from the formulas."""

import json
import math
import re
from pathlib import Path

import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_chat import write_checkpoint

from chat import Chat
from formats.checkpoint import open_checkpoint
from formats.dequantize import unpacked
from model import Qwen3

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "head_dim": 32}
IDS = torch.arange(3, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        out = model(IDS)
    return getattr(out, "logits", out).float()


@pytest.fixture
def plain(tmp_path) -> Path:
    """An untied float32 checkpoint with a tokenizer."""
    oracle.write(tmp_path / "plain", oracle.config(**SIZES))
    return write_checkpoint(tmp_path / "plain")


def rewrite(path: Path, weights: dict[str, torch.Tensor], **fields) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))


# ---- files ----


def shard(path: Path, stem: str = "model") -> list[Path]:
    """model.safetensors cut into three shards, without an index."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = [path / f"{stem}-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, file in enumerate(shards):
        save_file(dict(list(weights.items())[i::3]), file)
    return shards


@pytest.mark.parametrize("stem", ["model", "qwen3.v2"])
def test_shards_need_no_index(plain, stem):
    expected = logits(Qwen3.from_pretrained(plain))
    shards = shard(plain, stem)
    assert open_checkpoint(plain).files == shards
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    moved = shards[1].rename(plain / "elsewhere")
    with pytest.raises(ValueError, match=rf"of 3 shards {stem}-00002-of-00003\.safetensors is missing"):
        Qwen3.from_pretrained(plain)
    moved.rename(shards[1])
    save_file({"model.norm.weight": torch.ones(64)}, shards[1])
    with pytest.raises(ValueError, match=r"model\.norm\.weight is also in|missing: "):
        Qwen3.from_pretrained(plain)


def test_the_only_safetensors_file_is_the_model(plain):
    expected = logits(Qwen3.from_pretrained(plain))
    file = (plain / "model.safetensors").rename(plain / "Qwen3 final (1).safetensors")
    save_file({"step": torch.ones(1)}, plain / "trainer.safetensors")
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    save_file({"a": torch.ones(1)}, plain / "ema.safetensors")
    with pytest.raises(ValueError, match=r"2 models in it \(Qwen3 final \(1\)\.safetensors, ema\.safetensors\)"):
        Qwen3.from_pretrained(plain)
    file.rename(plain / "model.safetensors")  # the official name needs no guess
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)


def test_shards_that_share_a_tensor(plain):
    expected = logits(Qwen3.from_pretrained(plain))
    first, second, _ = shard(plain)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    for holder in (first, second):  # an index may name either
        files = [(one, file) for file in sorted(plain.glob("*.safetensors")) for one in load_file(file)]
        index = {one: file.name for one, file in files} | {name: holder.name}
        (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    (plain / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    save_file(load_file(second) | {name: tensor + 1}, second)
    with pytest.raises(ValueError, match=r"is also in model-00001-of-00003\.safetensors, with other values"):
        Qwen3.from_pretrained(plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "torch.float32", "dtype": "float32"},
        {"torch_dtype": "auto", "dtype": None},
        {"torch_dtype": "fp32", "dtype": "float"},
        {"dtype": "float8_e4m3fn"},
        {"hidden_act": "swish"},
    ],
)
def test_fields_under_other_spellings(plain, fields):
    expected = logits(Qwen3.from_pretrained(plain))
    rewrite(plain, load_file(plain / "model.safetensors"), **fields)
    model = Qwen3.from_pretrained(plain)
    assert model.dtype == torch.float32 and torch.equal(logits(model), expected)


def test_tensors_that_were_saved_empty_are_named(plain):
    weights = load_file(plain / "model.safetensors")
    rewrite(plain, {name: torch.empty(0) if "mlp" in name else tensor for name, tensor in weights.items()})
    with pytest.raises(ValueError, match=r"proj\.weight.*9 in all\) were saved empty, as DeepSpeed's ZeRO-3"):
        Qwen3.from_pretrained(plain)


# ---- names ----


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod.").replace(
            "layers.2.", "layers.2._fsdp_wrapped_module."
        ),
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: name.removeprefix("model."),
        lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer.").replace(
            "embed_tokens.", "embed_tokens.modules_to_save.default."
        ),
    ],
)
def test_a_uniform_prefix_has_one_meaning(plain, rename):
    expected, weights = logits(Qwen3.from_pretrained(plain)), load_file(plain / "model.safetensors")
    rewrite(plain, {rename(name): tensor for name, tensor in weights.items()})
    model = Qwen3.from_pretrained(plain)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(plain / "again")
    assert set(load_file(plain / "again" / "model.safetensors")) == set(weights)


def test_what_peft_wrapped_is_its_base_or_named(plain):
    """A PEFT model's own state_dict: with the original of what was trained as a whole, or with an unmerged adapter."""
    expected, weights = logits(Qwen3.from_pretrained(plain)), load_file(plain / "model.safetensors")
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    head = wrapped.pop("base_model.model.lm_head.weight")
    wrapped["base_model.model.lm_head.modules_to_save.default.weight"] = head
    wrapped["base_model.model.lm_head.original_module.weight"] = torch.zeros_like(head)
    rewrite(plain, wrapped)
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    rewrite(plain, weights | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 64)})
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default\.weight is part of an adapter beside its base"):
        Qwen3.from_pretrained(plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_one_tensor_a_layer(tmp_path, transposed):
    """transformers 5's own layout, which its save_pretrained undoes and other savers do not."""
    reference = oracle.write(tmp_path, oracle.config(**oracle.MOE, **SIZES))
    fused = {name: tensor.detach().clone() for name, tensor in reference.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    if transposed:
        fused = {name: tensor.mT if ".experts." in name else tensor for name, tensor in fused.items()}
    expected = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, fused)
    found = dict(open_checkpoint(tmp_path))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: info.shape for name, info in open_checkpoint(tmp_path).tensors.items()
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.allclose(logits(Qwen3.from_pretrained(tmp_path)), logits(reference), atol=1e-4)
    rewrite(tmp_path, fused, hidden_size=66)
    with pytest.raises(ValueError, match=r"experts\.(gate_up|down)_proj has shape .* does not fit hidden_size 66"):
        open_checkpoint(tmp_path)


def test_rotary_frequencies_as_a_buffer(plain):
    expected, weights = logits(Qwen3.from_pretrained(plain)), load_file(plain / "model.safetensors")
    tables = {f"model.rotary_emb.{name}": torch.ones(16) for name in ("original_inv_freq", "cos_cached", "sin_cached")}
    rewrite(plain, weights | tables | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)


def test_a_prefix_that_only_some_have_is_named(plain):
    weights = load_file(plain / "model.safetensors")
    rewrite(plain, {(f"module.{name}" if ".1." in name else name): tensor for name, tensor in weights.items()})
    with pytest.raises(ValueError, match=r"unexpected: module\.model\.layers\.1"):
        Qwen3.from_pretrained(plain)
    rewrite(plain, {"_orig_mod.model.norm.weight": weights["model.norm.weight"].clone(), **weights})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored under two names"):
        Qwen3.from_pretrained(plain)


def test_qwen3_embedding(tmp_path):
    """The official Qwen3-Embedding-0.6B: the bare decoder's names, tied. -8B is not tied and has no head at all."""
    reference = oracle.write(tmp_path, oracle.config(**SIZES, tie_word_embeddings=True))
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    rewrite(tmp_path, bare, architectures=["Qwen3Model"])
    model = Qwen3.from_pretrained(tmp_path)
    assert torch.allclose(logits(model), logits(reference), atol=1e-4)
    rewrite(tmp_path, bare, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight, so this model gives embeddings"):
        Qwen3.from_pretrained(tmp_path)


def test_a_classifier_is_named(plain):
    weights = load_file(plain / "model.safetensors")
    del weights["lm_head.weight"]
    rewrite(plain, weights | {"score.weight": torch.zeros(2, 64)}, architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(ValueError, match="a Qwen3ForSequenceClassification gives a score for each class"):
        Qwen3.from_pretrained(plain)


# ---- quantised forms: each packs a weight [rows, columns] and returns its tensors and what they stand for ----


def fp8(weight: torch.Tensor, block: int = 48) -> tuple[dict, torch.Tensor]:
    """DeepSeek-V3's: the scale of a block is its largest magnitude / 448; edge blocks are smaller."""
    rows, columns = weight.shape
    scale = torch.empty(math.ceil(rows / block), math.ceil(columns / block))
    stored, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale[i, j] = (weight[place].abs().max() / 448).bfloat16().float()
            stored[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            meant[place] = stored[place].float() * scale[i, j]
    return {"weight": stored, "weight_scale_inv": scale.bfloat16()}, meant


def rowwise(kind: torch.dtype, most: float):
    def pack(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / most
        q = weight / scale
        stored = (q.round() if kind == torch.int8 else q).to(kind)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale

    return pack


def grouped(weight: torch.Tensor, bits: int, group: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, scales, zeros of an asymmetric quantisation, [rows, columns] and [rows, groups]; `group` of each column."""
    count, top = int(group.max()) + 1, 2**bits - 1
    low = torch.stack([weight[:, group == g].amin(1) for g in range(count)], 1).clamp(max=0)
    high = torch.stack([weight[:, group == g].amax(1) for g in range(count)], 1).clamp(min=0)
    scales = ((high - low) / top).half()
    zeros = (-low / scales.float()).round().clamp(1, top)
    q = (weight / scales.float()[:, group] + zeros[:, group]).round().clamp(0, top)
    return q.int(), scales, zeros.int(), (q - zeros[:, group]) * scales.float()[:, group]


def words(codes: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """[rows, columns] → int32 [rows, columns * bits / 32], one value after the other as Python integers."""
    per, packed = 32 // bits, []
    for row in codes.tolist():
        line = []
        for start in range(0, len(row), per):
            values = [row[start + (order[i] if order else i)] for i in range(per)]
            word = sum(value << bits * i for i, value in enumerate(values))
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def gptq(bits: int, acted: bool, version: int = 1):
    def pack(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        group = torch.arange(weight.shape[1]) // 32
        if acted:
            group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(1))]
        q, scales, zeros, meant = grouped(weight, bits, group)
        parts = {"qweight": words(q, bits).T, "qzeros": words(zeros.T - int(version == 1), bits), "scales": scales.T}
        return parts | {"g_idx": group.int()}, meant

    return pack


def awq(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    q, scales, zeros, meant = grouped(weight, 4, torch.arange(weight.shape[1]) // 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map
    return {"qweight": words(q.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scales.T}, meant


def mlx(bits: int):
    def pack(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        rows, columns = weight.shape
        low, high = weight.view(rows, -1, 32).aminmax(dim=-1)
        scales, biases = ((high - low) / (2**bits - 1)).half(), low.half()
        q = ((weight.view(rows, -1, 32) - biases.float()[..., None]) / scales.float()[..., None]).round()
        q = q.clamp(0, 2**bits - 1).int()
        meant = (q * scales.float()[..., None] + biases.float()[..., None]).view(rows, columns)
        stream = [sum(value << bits * i for i, value in enumerate(row)) for row in q.view(rows, columns).tolist()]
        data = b"".join(value.to_bytes(columns * bits // 8, "little") for value in stream)
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint32).view(rows, -1)
        return {"weight": packed, "scales": scales, "biases": biases}, meant

    return pack


def whole_fp8(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.ones(())}, stored.float() * scale


def renamed(packed: tuple[dict, torch.Tensor]) -> tuple[dict, torch.Tensor]:
    return {"weight": packed[0]["weight"], "weight_scale": packed[0]["weight_scale_inv"]}, packed[1]


def compressed(form: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}}


def method(name: str, **fields) -> dict:
    return {"quantization_config": {"quant_method": name, **fields}}


FORMS = {
    "fp8": (fp8, method("fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[48, 48])),
    "gptq int4": (gptq(4, acted=False), method("gptq", bits=4, group_size=32, desc_act=False, sym=False)),
    "gptq desc_act": (
        gptq(4, acted=True),
        method("gptq", bits=4, group_size=32, desc_act=True, checkpoint_format="gptq"),
    ),
    "gptq int8": (gptq(8, acted=False), method("gptq", bits=8, group_size=32, desc_act=False, sym=True)),
    "gptq v2": (gptq(4, acted=False, version=2), method("gptq", bits=4, group_size=32, checkpoint_format="gptq_v2")),
    "awq": (awq, method("awq", bits=4, group_size=32, version="gemm", zero_point=True)),
    "mlx 4": (
        mlx(4),
        {"quantization": {"group_size": 32, "bits": 4}, "quantization_config": {"group_size": 32, "bits": 4}},
    ),
    "mlx 6": (mlx(6), {"quantization": {"group_size": 32, "bits": 6}}),
    "mlx 3": (mlx(3), {"quantization": {"group_size": 32, "bits": 3}}),
    "fp8 tensors": (whole_fp8, method("fp8", activation_scheme="static")),  # AutoFP8's and vLLM's
    "float8 blocks": (lambda w: renamed(fp8(w)), compressed("float-quantized", block_structure=[48, 48])),
    "float8 rows": (rowwise(torch.float8_e4m3fn, 448), compressed("float-quantized")),
    "int8 rows": (rowwise(torch.int8, 127), compressed("int-quantized")),
}


def quantise(path: Path, form: str) -> dict[str, torch.Tensor]:
    """Puts a form in the place of the linear layers' weights; returns what all weights stand for."""
    pack, fields = FORMS[form]
    stored, meant = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        is_linear = tensor.dim() == 2 and "layers" in name
        if not is_linear and not (form.startswith("mlx") and tensor.dim() == 2):  # MLX packs embedding and head too
            stored[name] = meant[name] = tensor
            continue
        parts, meant[name] = pack(tensor)
        stored |= {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in parts.items()}
    rewrite(path, stored, **fields)
    return meant


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_form_is_read_as_what_it_stands_for(plain, form):
    meant = quantise(plain, form)
    checkpoint = open_checkpoint(plain)
    assert checkpoint.tensors.keys() == meant.keys()
    for name, values in checkpoint:
        assert torch.equal(values, meant[name].float()), name
    model = Qwen3.from_pretrained(plain)
    assert "quantization_config" not in model.config.to_dict()
    expected = Qwen3.from_pretrained(plain)
    expected.load_state_dict(meant)
    assert torch.equal(logits(model), logits(expected))
    for name, tensor in Qwen3.from_pretrained(plain, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, meant[name].bfloat16()), name


def test_transformers_reads_the_same_fp8(plain):
    meant = quantise(plain, "fp8")
    layer = transformers.integrations.finegrained_fp8.Fp8Dequantize(None)
    weights = load_file(plain / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"):  # whole blocks there
        q, scale = weights[f"{name}.weight"][:48, :48], weights[f"{name}.weight_scale_inv"][:1, :1]
        theirs = layer._dequantize_one(q, scale, output_dtype=torch.float32)
        assert torch.equal(theirs, meant[f"{name}.weight"][:48, :48])


@pytest.mark.parametrize("form", ["fp8", "gptq desc_act", "awq", "mlx 4"])
@pytest.mark.parametrize("to", ["bf16", "int8", "gguf"])
def test_a_quantised_form_converts_on(plain, form, to, monkeypatch, capsys):
    import sys

    import console
    import convert

    meant, out = quantise(plain, form), plain.parent / ("out.gguf" if to == "gguf" else "out")
    arguments = ["convert.py", "--to", to, "--model", str(plain), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments + (["--type", "f32"] if to == "gguf" else []))
    with pytest.raises(SystemExit) as ended:
        console.run(convert.main)
    assert ended.value.code == 0, capsys.readouterr().err
    for name, values in unpacked(open_checkpoint(out)):
        close = values.float() - meant[name].float()
        assert close.abs().max() <= {"gguf": 0, "bf16": 0.02, "int8": 0.05}[to] * meant[name].abs().max(), name


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (method("bitsandbytes", load_in_4bit=True), "quantised by bitsandbytes are not read here"),
        (method("mxfp4"), "quantised by mxfp4 are not read here"),
        (method("modelopt", quant_algo="NVFP4"), "quantised by modelopt"),
        (method("auto-round", bits=4), "quantised by auto-round"),
        (method("gptq", bits=3), "GPTQ weights of 3 bits"),
        (method("gptq", bits=4, checkpoint_format="marlin"), "GPTQ weights in the format marlin"),
        (method("awq"), "quantization_config.bits is None"),
        (method("awq", bits=4, version="gemv"), "AWQ weights of the kind gemv"),
        (method("fp8", weight_block_size=[128]), "weight_block_size is [128]"),
        ({"quantization": {"group_size": 64, "bits": 4, "model.norm": {"group_size": 32}}}, "groups of several sizes"),
        (method(None), "does not name (no quant_method)"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "MLX weights of the mode mxfp4"),
        (compressed("nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
    ],
)
def test_other_methods_are_named(plain, fields, line):
    packed = {"model.layers.0.mlp.up_proj.weight": torch.zeros(160, 32, dtype=torch.uint8)}
    rewrite(plain, load_file(plain / "model.safetensors") | packed, **fields)
    with pytest.raises(ValueError) as error:
        Qwen3.from_pretrained(plain)
    assert line in str(error.value) and "\n" not in str(error.value) and str(plain) in str(error.value)


@pytest.mark.parametrize(
    ("form", "owner"),
    [("gptq int4", "GPTQ or AWQ"), ("fp8", "FP8"), ("float8 rows", "compressed-tensors or FP8")],
)
def test_quantised_weights_without_a_config_are_named(plain, form, owner):
    quantise(plain, form)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantised by {owner}, but there is no quantization_config"):
        Qwen3.from_pretrained(plain)


@pytest.mark.parametrize(("form", "name"), [("gptq int4", "quantize_config.json"), ("awq", "quant_config.json")])
def test_how_it_was_quantised_may_stand_in_a_file_of_its_own(plain, form, name):
    quantise(plain, form)
    expected, config = logits(Qwen3.from_pretrained(plain)), json.loads((plain / "config.json").read_text())
    how = {key: value for key, value in config.pop("quantization_config").items() if key != "quant_method"}
    (plain / "config.json").write_text(json.dumps(config))
    (plain / name).write_text(json.dumps(how))
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)


def test_eight_bits_without_their_scale_are_no_weights(plain):
    """Read as they stand they would be numbers of another size, and the replies nonsense."""
    quantise(plain, "fp8")
    weights = load_file(plain / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale_inv"]
    rewrite(plain, weights)
    with pytest.raises(ValueError, match=r"up_proj\.weight is float8_e4m3fn, but .*up_proj\.weight_scale_inv, which"):
        Qwen3.from_pretrained(plain)
    rewrite(plain, weights, **compressed("int-quantized", symmetric=False))
    with pytest.raises(ValueError, match="asymmetric weights of compressed-tensors"):
        Qwen3.from_pretrained(plain)


@pytest.mark.parametrize("form", ["bitsandbytes", "gptq", "fp8", "compressed-tensors", "torchao", None])
def test_plain_weights_beside_a_quantization_config_are_plain(plain, form, capsys):
    """A merged adapter's config often keeps that of the 4-bit base which it was trained on."""
    expected, weights = logits(Qwen3.from_pretrained(plain)), load_file(plain / "model.safetensors")
    form_of_packed = {"format": "pack-quantized", "config_groups": {}}
    rewrite(plain, weights, quantization_config={"quant_method": form, "bits": 4} | form_of_packed)
    model = Qwen3.from_pretrained(plain)
    assert torch.equal(logits(model), expected) and model.config.quantization_config is None
    assert f"no weight is quantised, although config.json says so ({form})" in capsys.readouterr().err


def test_biases_of_zeros_that_the_model_does_not_have(plain):
    """AutoGPTQ stores them for every layer, in the official Qwen2.5-*-GPTQ-Int4 too."""
    quantise(plain, "gptq int4")
    expected, weights = logits(Qwen3.from_pretrained(plain)), load_file(plain / "model.safetensors")
    biases = {f"model.layers.0.{name}.bias": torch.zeros(64) for name in ("mlp.down_proj", "self_attn.o_proj")}
    rewrite(plain, weights | biases)
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    biases["model.layers.0.mlp.down_proj.bias"][3] = 1
    rewrite(plain, weights | biases)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        Qwen3.from_pretrained(plain)


@pytest.mark.parametrize(
    ("start", "line"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "git lfs pull"),
        (b"<!doctype html><html><body>Sign in</body></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "m.gguf"])
def test_a_file_of_another_kind_is_called_what_it_is(plain, name, start, line):
    (plain / name).write_bytes(start)
    with pytest.raises(ValueError, match=line) as error:
        if name == "m.gguf":
            open_checkpoint(plain / name)
        Chat.from_pretrained(plain)
        Qwen3.from_pretrained(plain)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("form", ["C64", "F4", "F6_E2M3"])
def test_types_of_the_format_that_no_model_has_are_named(plain, form):
    start, rest = (plain / "model.safetensors").read_bytes().split(b'"F32"', 1)
    start = (int.from_bytes(start[:8], "little") + len(form) - 3).to_bytes(8, "little") + start[8:]
    (plain / "model.safetensors").write_bytes(start + f'"{form}"'.encode() + rest)
    with pytest.raises(ValueError, match=f"is of the type {form}, which is not read here; take the model's 16-bit"):
        Qwen3.from_pretrained(plain)


def test_containers_under_each_others_names(plain):
    weights = plain / "model.safetensors"
    (plain / "m.gguf").write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match="a safetensors file by its first bytes"):
        open_checkpoint(plain / "m.gguf")
    weights.write_bytes(b"GGUF\3\0\0\0" + bytes(90))
    with pytest.raises(ValueError, match=r"give it a name that ends in \.gguf"):
        Qwen3.from_pretrained(plain)


DAMAGE = {
    # Two scales for 160 rows would be blocks of 80, were they not stated to be of 48.
    "float8 blocks": ("weight_scale", lambda t: t[:2, :1], "the scales are not one for each block"),
    "fp8": ("weight_scale_inv", lambda t: t[:, :1].repeat(1, 7), "the scales are not one for each block"),
    "gptq int4": ("g_idx", lambda t: t + 9, "g_idx names a group beyond"),
    "gptq desc_act": ("scales", lambda t: None, "scales is missing"),
    "gptq int8": ("qzeros", lambda t: t[:, :1], "do not form one matrix of 8 bits"),
    "awq": ("qweight", lambda t: t[:-1], "do not form one matrix of 4 bits"),
    "mlx 4": ("biases", lambda t: t[:, :1], "do not form one quantised matrix"),
    "mlx 6": ("weight", lambda t: t[:, :7], "do not give this shape"),
}


@pytest.mark.parametrize("form", DAMAGE)
def test_parts_that_do_not_fit_each_other_are_named(plain, form):
    leaf, change, line = DAMAGE[form]
    quantise(plain, form)
    weights, name = load_file(plain / "model.safetensors"), f"model.layers.1.mlp.up_proj.{leaf}"
    changed = change(weights.pop(name))
    rewrite(plain, weights | ({} if changed is None else {name: changed}))
    with pytest.raises(ValueError) as error:
        Qwen3.from_pretrained(plain)
    assert line in str(error.value) and "model.layers.1.mlp.up_proj" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model_type": "qwen3_vl", "text_config": {"vocab_size": 5}}, "'qwen3_vl' is not implemented"),
        ({"model_type": "qwen3_omni_moe", "thinker_config": {}}, "in its thinker_config is not run by itself"),
        ({"model_type": "gpt2", "n_embd": 768}, "'gpt2' is not implemented"),
        ({"model_type": []}, "[] is not implemented"),
    ],
)
def test_another_architecture_is_named_before_the_fields_that_it_lacks(plain, fields, line):
    """Its config.json need not have a single field of Qwen3's."""
    (plain / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError) as error:
        Qwen3.from_pretrained(plain)
    assert line in str(error.value) and "lacks" not in str(error.value)


@pytest.mark.parametrize("form", ["Qwen3ForSequenceClassification", ["Qwen2ForRewardModel"]])
def test_the_task_is_read_from_a_text_and_from_a_list(plain, form):
    rewrite(plain, load_file(plain / "model.safetensors"), architectures=form)
    with pytest.raises(ValueError, match="not a next token"):
        Qwen3.from_pretrained(plain)
    for unread in (5, [], [None], {"a": 1}, ""):  # says nothing about the task
        rewrite(plain, load_file(plain / "model.safetensors"), architectures=unread)
        Qwen3.from_pretrained(plain)


ZEROS, BLOCK = "all zeros, so its download did not finish", b"\0" * 4096


@pytest.mark.parametrize(
    ("start", "line"),
    [
        (b"", "empty, so its download did not finish"),
        (BLOCK, ZEROS),
        (b"Entry not found", "a text ('Entry not found'), perhaps a server's message"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a text ('<?xml"),
        (b'{"error":"Repository not found"}', "a text ('{\"error"),
        (b"../../blobs/" + b"5f" * 32, "a text ('../../blobs/5f5f"),
        (b"\xfd7zXZ\0\0\4" + b"x" * 90, "compressed by xz"),
        (b"BZh9" + b"\x91x" * 90, "compressed by bzip2"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 90, "a 7z archive"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 90, "HDF5"),
        (b"\0\5\x16\7" + b"x" * 90, "AppleDouble"),
    ],
)
def test_no_weights_but_what_else(plain, start, line):
    (plain / "model.safetensors").write_bytes(start)
    with pytest.raises(ValueError) as error:
        open_checkpoint(plain)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model.safetensors.incomplete", "an unfinished download; finish it"),
        ("model.safetensors.crdownload", "an unfinished download; finish it"),
        ("weights.npz", "MLX's form in NumPy arrays"),
        ("onnx/model_q4.onnx", "ONNX, which needs onnxruntime"),
        ("openvino_model.bin", "OpenVINO's"),
        ("tf_model.h5", "TensorFlow's or Flax's"),
        ("__0_0.distcp", "a shard of FSDP; join them"),
        ("zero_to_fp32.py", "DeepSpeed's, beside its sharded state"),
        ("pytorch_model.bin", "only pickle weights"),
    ],
)
def test_weights_in_another_form_are_named(plain, name, line):
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / "model.safetensors").rename(plain / name)
    with pytest.raises(ValueError) as error:
        open_checkpoint(plain)
    assert line in str(error.value) and Path(name).name in str(error.value)


def test_names_that_a_machine_has_changed(plain):
    """What macOS writes beside a file, a browser's second copy, an editor's byte order mark."""
    expected = logits(Qwen3.from_pretrained(plain))
    weights = (plain / "model.safetensors").rename(plain / "Weights.Safetensors")
    (plain / "._Weights.Safetensors").write_bytes(b"\0\5\x16\7")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (plain / file).write_bytes(b"\xef\xbb\xbf" + (plain / file).read_bytes())
    template = Chat.from_pretrained(plain).templates["default"]
    (plain / "chat_template.jinja").write_text(template, encoding="utf-8-sig")
    assert torch.equal(logits(Qwen3.from_pretrained(plain)), expected)
    assert Chat.from_pretrained(plain).templates == {"default": template}
    weights.rename(plain / "model.safetensors")
    for other in ("Config.json", "config (1).json", "config copy.json"):
        (plain / "config.json").rename(plain / other)
        with pytest.raises(ValueError, match=f"config.json: no such file.*; rename {re.escape(other)}"):
            open_checkpoint(plain)
        (plain / other).rename(plain / "config.json")
