"""convert.py as a user runs it on checkpoints that transformers writes: there and back, verified, refused, killed."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import gguf
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import console
import convert
from formats import conversion
from formats.checkpoint import open_checkpoint
from formats.safetensors_write import plan_shards
from model import Qwen3

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "tied": oracle.config(vocab_size=800, tie_word_embeddings=True),
    "untied": oracle.config(vocab_size=800),
    "moe": oracle.config(vocab_size=800, **oracle.MOE | {"mlp_only_layers": [1]}),
    "qwen2": oracle.config(vocab_size=800, **oracle.QWEN2, tie_word_embeddings=True),
    "sharded": oracle.config(vocab_size=800),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Small checkpoints in float32, each with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        oracle.write(folder / name, fields, **({"max_shard_size": "200KB"} if name == "sharded" else {}))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(ROOT / "models" / "tiny" / file, folder / name)
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `python convert.py ARGUMENTS` in this process: (exit status, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            console.run(convert.main)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refuse(run):
    """Runs a command that must fail and returns its one line."""

    def refuse(*arguments) -> str:
        status, out, err = run(*arguments)
        assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("convert.py: error: "), err
        return err

    return refuse


def run_apart(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "convert.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)


def assert_same_tensors(a: Path, b: Path) -> None:
    """Both hold the same names, dtypes, shapes and bits."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    assert {n: tuple(i) for n, i in first.tensors.items()} == {n: tuple(i) for n, i in second.tensors.items()}
    for name in first.tensors:
        assert torch.equal(first.read(name).view(torch.uint8), second.read(name).view(torch.uint8)), name


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(torch.arange(3, 43)[None] * 7 % 800)
    return getattr(out, "logits", out)


# ---- dtypes and shards ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32"])
def test_dtypes_equal_torch_s_casts(models, tmp_path, run, name, to):
    from transformers import AutoModelForCausalLM

    status, out, _ = run("--to", to, "--model", models / name, "--out", tmp_path / "out")
    assert status == 0 and "embed_tokens" in out and "largest error" in out
    dtype = convert.DTYPES[to]
    source, result = open_checkpoint(models / name), open_checkpoint(tmp_path / "out")
    assert set(result.tensors) == set(source.tensors)
    for tensor in source.tensors:
        assert torch.equal(result.read(tensor), source.read(tensor).to(dtype)), tensor
    assert result.config["torch_dtype"] == str(dtype).removeprefix("torch.")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (models / name / file).read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = Qwen3.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-4, rtol=1e-4)


def test_shards_and_their_index(models, tmp_path, run):
    out = tmp_path / "out"
    assert run("--to", "bf16", "--model", models / "untied", "--out", out, "--max-shard-size", "60kB")[0] == 0
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        tensors = load_file(out / shard)  # the library's own reader
        assert set(tensors) == {name for name, file in weight_map.items() if file == shard}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000
    assert run("--to", "safetensors", "--model", out, "--out", tmp_path / "joined")[0] == 0
    assert_same_tensors(out, tmp_path / "joined")
    assert (tmp_path / "joined" / "model.safetensors").exists()


def test_tensors_are_aligned_to_their_items(models, tmp_path, run):
    """Readers view the file's bytes as int64 and int32, which must lie at multiples of 8 and 4."""
    assert run("--to", "int4", "--model", models / "moe", "--out", tmp_path / "out")[0] == 0
    record = json.loads((tmp_path / "out" / "model_context.json").read_text())["results"]["."]
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert all(place["offset"] % tensors[name].dtype.itemsize == 0 for name, place in record["tensors"].items())
    assert plan_shards(tensors, 10**9)[0].size == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path, length):
    """640 bytes are stored as 80 02, a pickle's first two bytes."""
    save_file({"a": torch.arange(3)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].ljust(length)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).read("a").tolist() == [0, 1, 2]


def test_values_beyond_float16_are_counted(models, tmp_path, run):
    source = shutil.copytree(models / "tied", tmp_path / "large")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = 1e5
    tensors["model.embed_tokens.weight"][5, 5] = -7e4
    save_file(tensors, source / "model.safetensors")
    for to in (["fp16", "--out", tmp_path / "fp16"], ["gguf", "--type", "f16", "--out", tmp_path / "f16.gguf"]):
        status, out, err = run("--to", *to, "--model", source)
        assert status == 0 and "inf" not in out
        assert "4 values in 2 tensors are beyond float16's 65,504" in err and "up" in err.partition("most in")[2]
    assert run("--to", "bf16", "--model", source, "--out", tmp_path / "bf16")[2].startswith("try it: ")


def test_a_redundant_head_is_written_once(models, tmp_path, run):
    source = shutil.copytree(models / "tied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    assert run("--to", "safetensors", "--model", source, "--out", tmp_path / "out")[0] == 0
    assert_same_tensors(models / "tied", tmp_path / "out")


@pytest.mark.parametrize("to", ["fp32", "int8", "gguf"])
def test_a_head_that_differs_is_kept(models, tmp_path, run, to):
    """transformers 5 does not tie what the file holds apart, so neither the model nor what it is converted to does."""
    source = shutil.copytree(models / "tied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, source / "model.safetensors")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    status, _, err = run("--to", to, "--model", source, "--out", out, *(["--type", "f32"] if to == "gguf" else []))
    assert status == 0 and err.count("differs from the embedding") == 1
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert not torch.equal(expected.lm_head.weight, expected.model.embed_tokens.weight)
    model = Qwen3.from_pretrained(out, dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    assert torch.allclose(model.lm_head.weight, expected.lm_head.weight, rtol=0.01)  # bfloat16 beside int8
    assert to == "int8" or torch.allclose(logits(model), logits(expected), atol=1e-4)


# ---- quantised ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantised_checkpoints_run_here_and_in_transformers(models, tmp_path, run, name, to):
    status, out, _ = run("--to", to, "--model", models / name, "--out", tmp_path / "out")
    assert status == 0 and to in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"] and config["torch_dtype"] == "bfloat16"
    source, ours = Qwen3.from_pretrained(models / name), Qwen3.from_pretrained(tmp_path / "out", dtype=torch.float32)
    error = (logits(ours) - logits(source)).norm() / logits(source).norm()
    assert error < {"int8": 0.15, "int4": 0.7}[to]  # random weights with norms far from one amplify every error
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed: not read by transformers")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs(torch.tensor([[1]]))  # the library decompresses on the first call …
    torch.nn.Module.float(theirs)  # … and keeps a mixture's experts, rounded to bfloat16
    torch.testing.assert_close(logits(ours), logits(theirs), atol=5e-2 if name == "moe" else 2e-4, rtol=1e-3)


def test_a_quantised_checkpoint_converts_on(models, tmp_path, run):
    assert run("--to", "int8", "--model", models / "moe", "--out", tmp_path / "int8")[0] == 0
    assert run("--to", "fp32", "--model", tmp_path / "int8", "--out", tmp_path / "fp32")[0] == 0
    assert run("--to", "gguf", "--type", "f32", "--model", tmp_path / "int8", "--out", tmp_path / "f32.gguf")[0] == 0
    quantised, plain = (Qwen3.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("int8", "fp32"))
    torch.testing.assert_close(logits(quantised), logits(plain))
    assert "quantization_config" not in json.loads((tmp_path / "fp32" / "config.json").read_text())
    assert torch.equal(logits(plain), logits(Qwen3.from_pretrained(tmp_path / "f32.gguf")))


def test_group_size(models, tmp_path, run, refuse):
    arguments = ["--model", models / "untied", "--out", tmp_path / "out"]
    assert run("--to", "int4", "--group-size", 8, *arguments)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 8
    line = refuse("--to", "int4", "--group-size", 64, *arguments, "--force")
    assert "--group-size 64 does not divide rows of 48 weights" in line
    assert run("--verify", tmp_path / "out")[0] == 0  # a refusal leaves the earlier result alone


# ---- GGUF ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("type", "dtype"), [("f32", "fp32"), ("bf16", "bf16"), ("f16", "fp16")])
def test_gguf_and_back_is_bit_identical(models, tmp_path, run, name, type, dtype):
    plain, file, back = tmp_path / "plain", tmp_path / "m.gguf", tmp_path / "back"
    assert run("--to", dtype, "--model", models / name, "--out", plain)[0] == 0
    assert run("--to", "gguf", "--type", type, "--model", plain, "--out", file)[0] == 0
    assert run("--to", "safetensors", "--model", file, "--out", back)[0] == 0
    if name == "moe":  # GGUF keeps routers in float32
        assert torch.equal(logits(Qwen3.from_pretrained(plain).float()), logits(Qwen3.from_pretrained(back).float()))
    else:
        assert_same_tensors(plain, back)
    config = json.loads((back / "config.json").read_text())
    for field in ("model_type", "hidden_size", "num_key_value_heads", "num_hidden_layers", "tie_word_embeddings"):
        assert config[field] == MODELS[name][field]
    text = "What is 473 + 89?<|im_end|>\n<think> strawberry </think>"
    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (plain, back))
    assert old.encode(text).ids == new.encode(text).ids


@pytest.mark.parametrize("type", ["q8_0", "q4_0", "q6_k", "q4_k_m"])
def test_a_quantised_gguf_comes_back_as_its_dequantised_values(models, tmp_path, run, type):
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    status, out, _ = run("--to", "gguf", "--type", type, "--model", models / "tied", "--out", file)
    assert status == 0 and "exact" in out
    assert run("--to", "safetensors", "--model", file, "--out", back)[0] == 0
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for ours, theirs in (("model.layers.1.mlp.up_proj", "blk.1.ffn_up"), ("model.embed_tokens", "token_embd")):
        tensor = stored[f"{theirs}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(open_checkpoint(back).read(f"{ours}.weight"), expected.reshape(-1, 48))
    # The stated errors are those of the file as another reader sees it.
    record = json.loads((tmp_path / "model_context.json").read_text())["results"]["m.gguf"]
    source = open_checkpoint(models / "tied").read("model.layers.1.mlp.up_proj.weight")
    error = (open_checkpoint(back).read("model.layers.1.mlp.up_proj.weight") - source).abs()
    assert record["tensors"]["blk.1.ffn_up.weight"]["largest_error"] == pytest.approx(error.max().item(), rel=1e-4)
    assert record["tensors"]["blk.1.ffn_up.weight"]["mean_error"] == pytest.approx(error.mean().item(), rel=1e-4)


# ---- the record ----


def test_the_record_names_source_and_result(models, tmp_path, run):
    assert run("--to", "int4", "--model", models / "sharded", "--out", tmp_path / "out")[0] == 0
    entry = json.loads((tmp_path / "out" / "model_context.json").read_text())["results"]["."]
    assert entry["to"] == "int4" and entry["tool"].startswith("nanoqwen ")
    assert entry["source"]["path"] == str(models / "sharded")
    for name, file in entry["source"]["files"].items():
        assert file["sha256"] == sha256((models / "sharded" / name).read_bytes()).hexdigest()
    index = {"model.safetensors.index.json"}  # says nothing that the shards do not
    assert set(entry["source"]["files"]) == {file.name for file in (models / "sharded").iterdir()} - index
    for name, file in entry["files"].items():
        assert file["sha256"] == sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    assert set(entry["files"]) == {file.name for file in (tmp_path / "out").iterdir()} - {"model_context.json"}
    assert set(entry["tensors"]) == set(open_checkpoint(tmp_path / "out").tensors)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_verify_names_the_changed_tensor(models, tmp_path, run, refuse):
    out, file = tmp_path / "out", tmp_path / "m.gguf"
    assert run("--to", "int4", "--model", models / "moe", "--out", out, "--max-shard-size", "30kB")[0] == 0
    assert run("--to", "gguf", "--model", models / "moe", "--out", file)[0] == 0
    for result, record in ((out, out / "model_context.json"), (file, tmp_path / "model_context.json")):
        status, text, _ = run("--verify", result)
        assert status == 0 and "every byte is as written" in text
        entry = json.loads(record.read_text())["results"]["." if result.is_dir() else "m.gguf"]
        for name, place in list(entry["tensors"].items())[:: len(entry["tensors"]) // 6]:
            path = record.parent / place["file"]
            for position in (place["offset"], place["offset"] + place["bytes"] - 1):
                flip(path, position)
                assert f"tensor {name} in {path.name}" in refuse("--verify", result)
                flip(path, position)
        for path in [record.parent / name for name in entry["files"]]:
            flip(path, 9)
            assert path.name in refuse("--verify", result)
            flip(path, 9)
        assert run("--verify", result)[0] == 0


def test_verify_finds_missing_longer_and_forged(models, tmp_path, run, refuse):
    out = tmp_path / "out"
    assert run("--to", "bf16", "--model", models / "tied", "--out", out)[0] == 0
    record = (out / "model_context.json").read_text()
    with (out / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "model.safetensors has" in refuse("--verify", out)
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refuse("--verify", out)
    (out / "model_context.json").write_text(record.replace('"bf16"', '"fp16"'))
    assert "the record itself was changed" in refuse("--verify", out)
    for hostile in ("{}", "[", '{"results": {".": {"files": 3}}}', '{"results": []}'):
        (out / "model_context.json").write_text(hostile)
        assert "model_context.json" in refuse("--verify", out)
    from formats.record import sign

    entry = sign({"files": {"../secret": {"bytes": 1, "sha256": ""}}, "tensors": {}})
    (out / "model_context.json").write_text(json.dumps({"results": {".": entry}}))
    assert "the record itself was changed" in refuse("--verify", out)
    (out / "model_context.json").unlink()
    assert "there is no" in refuse("--verify", out)
    assert "no such file" in refuse("--verify", tmp_path / "absent")


# ---- refusals ----


def test_flags(models, refuse, tmp_path):
    model = ["--model", models / "tied", "--out", tmp_path / "out"]
    assert "--to is missing" in refuse(*model)
    assert "'int3' is not one of gguf" in refuse("--to", "int3", *model)
    assert "'q3_x' is not one of f32" in refuse("--to", "gguf", "--type", "q3_x", *model)
    assert "belong to --to gguf" in refuse("--to", "bf16", "--type", "q8_0", *model)
    assert "belong to --to gguf" in refuse("--to", "int4", "--for", "qwen3.c", *model)
    assert "leave --type out" in refuse("--to", "gguf", "--type", "f32", "--for", "qwen3.c", *model)
    assert "--group-size belongs to" in refuse("--to", "gguf", "--group-size", 32, *model)
    assert "is not a multiple of 8" in refuse("--to", "int4", "--group-size", 12, *model)
    assert "is not a multiple of 8" in refuse("--to", "int4", "--group-size", "-32", *model)
    assert "is not a size like" in refuse("--to", "bf16", "--max-shard-size", "0GB", *model)
    assert "is not a size like" in refuse("--to", "bf16", "--max-shard-size", "5 apples", *model)
    assert "a GGUF is one file" in refuse("--to", "gguf", "--max-shard-size", "5GB", *model)
    assert "--verify takes no other flags" in refuse("--verify", tmp_path, "--force")
    assert "ends in .gguf" in refuse("--to", "gguf", *model)
    assert "must not end in .gguf" in refuse("--to", "bf16", "--model", models / "tied", "--out", tmp_path / "m.gguf")
    assert "qwen3.c only runs" in refuse("--to", "gguf", "--for", "qwen3.c", *model)
    assert list(tmp_path.iterdir()) == []


def test_a_result_never_lands_on_its_source(models, tmp_path, run, refuse):
    source = shutil.copytree(models / "tied", tmp_path / "deep" / "source")
    link, hard = tmp_path / "link", tmp_path / "hard.gguf"
    link.symlink_to(source)
    before = {file: file.read_bytes() for file in source.iterdir()}
    for out, words in [
        (source, "that is the source itself"),
        (source / "." / "..", "holds the source"),
        (link, "that is the source itself"),
        (tmp_path / "deep", "holds the source"),
        (link / "inside", "is inside the source"),
        (source / "sub" / ".." / "inside", "is inside the source"),
    ]:
        assert words in refuse("--to", "bf16", "--model", source, "--out", out, "--force")
        assert words in refuse("--to", "bf16", "--model", link, "--out", out, "--force")
    assert "is inside" in refuse("--to", "gguf", "--model", source, "--out", source / "m.gguf", "--force")
    file = tmp_path / "m.gguf"
    assert run("--to", "gguf", "--model", source, "--out", file)[0] == 0
    os.link(file, hard)
    (tmp_path / "soft.gguf").symlink_to(file)
    for out in (file, hard, tmp_path / "soft.gguf"):
        assert "that is the source itself" in refuse("--to", "gguf", "--model", file, "--out", out, "--force")
    assert "holds the source" in refuse("--to", "bf16", "--model", file, "--out", tmp_path, "--force")
    assert {file: file.read_bytes() for file in source.iterdir()} == before


def test_nothing_is_replaced_without_force(models, tmp_path, run, refuse):
    out, file = tmp_path / "out", tmp_path / "m.gguf"
    arguments = ["--model", models / "tied", "--out"]
    for to, place in (("bf16", out), ("gguf", file)):
        assert run("--to", to, *arguments, place)[0] == 0
        assert "exists already" in refuse("--to", to, *arguments, place)
        assert run("--to", to, *arguments, place, "--force")[0] == 0
        assert run("--verify", place)[0] == 0
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_text("meow")
    assert "was not written by a conversion" in refuse("--to", "bf16", *arguments, precious, "--force")
    (tmp_path / "notes.txt").write_text("x")
    assert "not a directory" in refuse("--to", "bf16", *arguments, tmp_path / "notes.txt", "--force")
    assert (precious / "cat.jpg").read_text() == "meow"


def test_a_full_disk_is_seen_before_the_work(models, tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": conversion.SPARE_DISK + 1000}))
    for to, out in (("fp32", tmp_path / "out"), ("int4", tmp_path / "out"), ("gguf", tmp_path / "m.gguf")):
        line = refuse("--to", to, "--model", models / "tied", "--out", out)
        assert "needs" in line and "are free in" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["gguf", "fp32", "int4"])
def test_a_disk_that_gets_full_during_the_work(models, tmp_path, refuse, to):
    """By a limit on the size of a file, which ends a write as a full disk does."""
    out, limits = tmp_path / ("m.gguf" if to == "gguf" else "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        line = refuse("--to", to, "--model", models / "tied", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"convert.py: error: --out {out}: file too large; choose another place\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 7}', None])
def test_a_record_that_is_none_is_seen_before_the_work(models, tmp_path, refuse, content):
    file = tmp_path / "model_context.json"
    file.mkdir() if content is None else file.write_text(content)
    line = refuse("--to", "gguf", "--model", models / "tied", "--out", tmp_path / "m.gguf")
    assert f"{file}: not a record of results; move it away" in line
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_below_a_file(models, tmp_path, refuse):
    (tmp_path / "notes").write_text("x")
    for to, out in (("fp32", tmp_path / "notes" / "out"), ("gguf", tmp_path / "notes" / "a" / "m.gguf")):
        assert f"{tmp_path / 'notes'} is a file" in refuse("--to", to, "--model", models / "tied", "--out", out)


def corrupt(name: str, directory: Path) -> str:
    """Damages a checkpoint and returns the words that the refusal must have."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    data = weights.read_bytes()
    if name == "truncated":
        weights.write_bytes(data[:-5])
        return "ends 5 bytes past the end of the file"
    if name == "trailing":
        weights.write_bytes(data + b"more")
        return "belong to no tensor"
    if name == "not safetensors":
        weights.write_bytes(b"\x80\x02" + data)
        return "a pickle, which can run code"
    if name == "missing":
        del tensors["model.layers.2.self_attn.k_proj.weight"]
        save_file(tensors, weights)
        return "missing: model.layers.2.self_attn.k_proj.weight"
    if name == "unexpected":
        save_file(tensors | {"model.layers.0.extra": torch.zeros(2)}, weights)
        return "unexpected: model.layers.0.extra"
    if name == "mis-shaped":
        tensors["model.norm.weight"] = torch.zeros(47)
        save_file(tensors, weights)
        return "mis-shaped: model.norm.weight [47] instead of [48]"
    if name == "integers":
        tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int32)
        save_file(tensors, weights)
        return "mis-typed: model.norm.weight"
    if name == "scheme":
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(8, dtype=torch.uint8)
        save_file(tensors, weights)
        config.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "hqq"}}))
        return "quantised by hqq are not read here"
    if name == "NaN":
        tensors["model.layers.0.mlp.gate_proj.weight"][3, 4] = torch.nan
        save_file(tensors, weights)
        return "model.layers.0.mlp.gate_proj.weight holds NaN or infinite values"
    config.write_text(
        {
            "no JSON": "{",
            "no config fields": "{}",
            "other architecture": json.dumps(fields | {"model_type": "llama"}),
            "enormous": json.dumps(fields | {"num_hidden_layers": 10**12}),
            "negative": json.dumps(fields | {"hidden_size": -48}),
        }[name]
    )
    return {
        "no JSON": "not valid JSON",
        "no config fields": "config lacks vocab_size",
        "other architecture": "model_type 'llama' is not implemented",
        "enormous": "num_hidden_layers is 1000000000000",
        "negative": "hidden_size is -48",
    }[name]


CORRUPTIONS = ["truncated", "trailing", "not safetensors", "missing", "unexpected", "mis-shaped", "integers", "NaN"]
CORRUPTIONS += ["scheme", "no JSON", "no config fields", "other architecture", "enormous", "negative"]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damaged_checkpoints_are_refused_and_leave_nothing(models, tmp_path, refuse, name):
    source = shutil.copytree(models / "tied", tmp_path / "source")
    words = corrupt(name, source)
    for to, out in (("bf16", "out"), ("int4", "out"), ("gguf", "m.gguf")):
        assert words in refuse("--to", to, "--model", source, "--out", tmp_path / out)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_damaged_quantised_checkpoints_are_refused(models, tmp_path, run, refuse):
    good = tmp_path / "good"
    assert run("--to", "int4", "--model", models / "tied", "--out", good)[0] == 0
    name = "model.layers.0.mlp.up_proj.weight"
    for change, words in [
        ({f"{name}_shape": torch.tensor([10**12, 48])}, "the stated shape is"),
        ({f"{name}_shape": torch.tensor([112, 47])}, "the stated shape is"),
        ({f"{name}_shape": torch.zeros(2)}, "tensors of types or shapes that pack-quantized does not have"),
        ({f"{name}_packed": torch.zeros(112, 6)}, "tensors of types or shapes that pack-quantized does not have"),
        ({f"{name}_scale": torch.zeros(112, 5)}, "the stated shape is"),
        ({f"{name}_scale": None}, f"{name}_scale is missing"),
    ]:
        source = shutil.copytree(good, tmp_path / "source", dirs_exist_ok=True)
        tensors = load_file(good / "model.safetensors") | change
        save_file({n: t for n, t in tensors.items() if t is not None}, source / "model.safetensors")
        assert words in refuse("--to", "bf16", "--model", source, "--out", tmp_path / "out")


# ---- as a process ----


def test_the_command_from_another_folder(models, tmp_path):
    """Default names, the bundled form of SRC, plain text through a pipe."""
    command = [sys.executable, str(ROOT / "convert.py"), "--to", "gguf", "--type", "q4_0", "--model", models / "untied"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ended.returncode == 0
    assert ended.stderr == "try it: python generate.py --model untied-q4_0.gguf\n"
    assert (tmp_path / "untied-q4_0.gguf").exists() and "wrote untied-q4_0.gguf" in ended.stdout
    ended = run_apart("--to", "int4", "--model", tmp_path / "absent")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and ended.stdout == ""
    assert run_apart("--help").returncode == 0


@pytest.mark.parametrize(("to", "name"), [("int4", "out"), ("gguf", "m.gguf")])
def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path, run, to, name):
    """SIGKILL as soon as the temporary name appears, and at later moments, while some MB are still being written."""
    source = oracle.config(vocab_size=30_000, hidden_size=256, num_hidden_layers=2, tie_word_embeddings=True)
    oracle.write(tmp_path / "source", source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "models" / "tiny" / file, tmp_path / "source")
    out = tmp_path / "results" / name
    command = [sys.executable, str(ROOT / "convert.py"), "--to", to, "--model", tmp_path / "source", "--out", out]
    killed = 0
    for delay in (0.0, 0.05):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not any(out.parent.glob(".*.tmp")):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            assert not out.exists() or run("--verify", out)[0] == 0  # it may have ended a moment before
        shutil.rmtree(out.parent, ignore_errors=True)
    assert killed
    assert run(*command[2:])[0] == 0 and run("--verify", out)[0] == 0


def test_memory_stays_small_whatever_the_size(tmp_path):
    """A checkpoint of a few hundred MB converts with hardly more than what PyTorch itself takes."""
    fields = oracle.config(vocab_size=40_000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=4)
    oracle.write(tmp_path / "source", fields, dtype=torch.bfloat16, max_shard_size="100MB")
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    assert size > 350_000_000
    measure = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import convert, sys\n"
    baseline = int(subprocess.check_output([sys.executable, "-c", program + measure], text=True))
    for to in ("bf16", "int4"):
        flags = ["--to", to, "--model", str(tmp_path / "source"), "--out", str(tmp_path / to)]
        code = f"{program}sys.argv[1:] = {flags}\nconvert.main()\n{measure}"
        peak = int(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1])
        assert peak - baseline < 120_000_000, f"{to}: {(peak - baseline) / 1e6:.0f} MB above the baseline"
