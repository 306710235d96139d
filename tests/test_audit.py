"""audit.py as it is used: exit statuses, comparisons, what it writes, a hub by range requests, hostile input."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import torch
from local_hub import Hub, use
from markupsafe import escape
from repositories import CASES, Call, base, build, edit_json, set_template
from runs import CONFIG
from safetensors.torch import save_file

import audit
from formats import record
from formats.checkpoint import open_checkpoint
from formats.gguf import writer
from formats.gguf.reader import GGUF
from inspection import auditing, contents, croissant, manifest, templates, weights
from inspection.findings import FINDINGS, Ledger
from inspection.tree import local_tree
from model import Config

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny"
ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", ""))
PUBLISHED = Path(os.environ.get("NANOQWEN_TEMPLATES", ""))
needs_assets = pytest.mark.skipif("NANOQWEN_ASSETS" not in os.environ, reason="NANOQWEN_ASSETS is not set")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit status, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["audit.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            audit.console.run(audit.main)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def repository(tiny_checkpoint, tmp_path):
    return base(tmp_path / "repository", tiny_checkpoint)


def ids(found: dict, *severities: str) -> set[str]:
    return {one["id"] for one in found["findings"] if not severities or one["severity"] in severities}


# ---- the manifest and the reports ------------------------------------------------------------------------------------


def test_the_bundled_model(run, tmp_path):
    status, out, err = run(TINY, "--json", "--out", tmp_path / "out")
    found = json.loads(out)
    assert (status, err) == (0, "") and not ids(found, "high", "medium")
    manifest.validate(found)
    assert found["parameter_count"] == 479_264 and found["dtypes"] == {"BF16": 479_264}
    assert found["safe_to_load"] is True and found["requires_trust_remote_code"] is False
    assert found["license"] == "apache-2.0" and found["evidence"]["license"]["status"] == "claimed"
    assert (
        found["evidence"]["parameter_count"]["status"] == "verified"
        and found["evidence"]["evals"]["status"] == "absent"
    )
    assert [one["number"] for one in found["questions"]] == list(range(1, 14))
    sizes = {file["path"]: file["bytes"] for file in found["files"]}
    assert sizes == {file.name: file.stat().st_size for file in (TINY).iterdir()}
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in found["files"])
    low, high = found["norms"]["model.layers.N.input_layernorm.weight"]
    assert 0 < low <= high and found["evidence"]["norms"]["status"] == "verified"
    behaviour = found["behaviour"]
    assert behaviour["top_logits"] == sorted(behaviour["top_logits"], reverse=True) and behaviour["perplexity"] > 1
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"model_context.json", "audit.md", "audit.html", "bom.cdx.json"}
    assert json.loads((tmp_path / "out" / "model_context.json").read_text()) == found
    page, text = ((tmp_path / "out" / name).read_text() for name in ("audit.html", "audit.md"))
    for one in found["questions"]:
        assert one["question"] in text and escape(one["question"]) in page
    bom = json.loads((tmp_path / "out" / "bom.cdx.json").read_text())
    assert bom["specVersion"] == "1.6" and bom["metadata"]["component"]["type"] == "machine-learning-model"
    assert {one["name"] for one in bom["components"] if one["type"] == "file"} == set(sizes)


def test_the_schema_refuses_what_is_missing_or_of_another_kind(run):
    found = json.loads(run(TINY, "--json")[1])
    for key in ("repo", "safe_to_load", "evidence", "questions", "schema"):
        with pytest.raises(ValueError, match=key):
            manifest.validate({name: value for name, value in found.items() if name != key})
    for key, value in (("parameter_count", "many"), ("schema", "nanoqwen/model_context/2"), ("questions", [])):
        with pytest.raises(ValueError):
            manifest.validate({**found, key: value})
    jsonschema.Draft202012Validator.check_schema(json.loads(manifest.SCHEMA_FILE.read_text()))


def test_every_finding_has_a_case_or_is_no_accusation():
    covered = {case.finding for case in CASES}
    elsewhere = {"template-differs", "base-differs", "changed", "added", "removed", "lineage-broken"}  # below
    accusing = {id for id, (severity, _) in FINDINGS.items() if severity in ("high", "medium")}
    assert accusing - covered <= elsewhere, accusing - covered - elsewhere


def test_results_with_and_without_raw_outputs(run, repository):
    entry = {"task": "families", "metric": "accuracy", "value": 0.9, "outputs": "outputs.jsonl"}
    (repository / "evals.json").write_text(json.dumps([entry]))
    index = "model-index:\n- results:\n  - dataset: {name: GSM8K}\n    metrics: [{type: acc, value: 0.5}]\n"
    (repository / "README.md").write_text(f"---\nlicense: apache-2.0\n{index}---\n")
    found = json.loads(run(repository, "--json")[1])
    assert [(one["dataset"], one["value"], one["raw_outputs"]) for one in found["evals"]] == [
        ("GSM8K", 0.5, False),
        ("families", 0.9, False),
    ]
    assert "evals-unproven" in ids(found) and found["evidence"]["evals"]["status"] == "claimed"
    (repository / "outputs.jsonl").write_text("{}\n")
    found = json.loads(run(repository, "--json")[1])
    assert all(one["raw_outputs"] for one in found["evals"]) and "evals-unproven" not in ids(found)


def test_strangers_text_in_the_reports(run, tiny_checkpoint, tmp_path):
    path = base(tmp_path / "a<script>", tiny_checkpoint)
    evil = "<script>alert(1)</script>|`[x](http://y)\u202e"
    (path / "README.md").write_text(f"---\nlicense: '{evil}'\ndatasets: ['{evil}']\n---\n")
    status, out, _ = run(path, "--out", tmp_path / "out")
    assert status == 0 and "\u202e" not in out
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script>alert" not in page and "\u202e" not in page
    assert "<script" not in (tmp_path / "out" / "audit.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "SRC"),
        (("no/such/path/at/all",), "no such directory"),
        (("{repo}", "--base", "{repo}", "--verify", "{repo}"), "one comparison"),
        (("{repo}", "--verify", "{repo}"), "there is no model_context.json"),
        (("{repo}", "--base", "nowhere/at/all"), "--base"),
        (("{repo}", "--out", "{repo}/config.json"), "is a file"),
    ],
)
def test_wrong_usage_is_one_line_and_2(run, repository, arguments, said):
    status, _, err = run(*(text.format(repo=repository) for text in arguments))
    assert status == 2 and said in err and err.count("\n") == 1


# ---- no false alarm --------------------------------------------------------------------------------------------------


@needs_assets
def test_official_configs(tmp_path):
    for file in sorted((ASSETS / "configs").glob("*.config.json")):
        name = file.name.removesuffix(".config.json")
        path = tmp_path / name
        path.mkdir()
        shutil.copy(file, path / "config.json")
        ledger = auditing.Audit(local_tree(path)).ledger
        assert ledger.status == 0, (name, ledger.sorted())
        published = {"Qwen3-0.6B": 596_049_920, "Qwen3-32B": 32_762_123_264, "Qwen3-30B-A3B": 30_532_122_624}
        assert ledger.facts["parameters_of_config"] == published.get(name, ledger.facts["parameters_of_config"])


@needs_assets
def test_the_official_tokenizer_and_templates(tmp_path):
    ledger = auditing.Audit(local_tree(ASSETS / "qwen3-0.6b")).ledger
    assert ledger.status == 0 and "template-official" in {one.id for one in ledger.findings}, ledger.sorted()
    for file in sorted((ASSETS / "templates").glob("*.jinja")):
        shutil.copy(file, tmp_path / "chat_template.jinja")
        ledger = auditing.Audit(local_tree(tmp_path)).ledger
        assert ledger.status == 0 and "template-official" in {one.id for one in ledger.findings}, ledger.sorted()


@pytest.mark.skipif(
    "NANOQWEN_TEMPLATES" not in os.environ, reason="NANOQWEN_TEMPLATES (llama.cpp's models/templates) is not set"
)
def test_published_templates_of_other_families():
    files = sorted(PUBLISHED.glob("*.jinja"))
    assert len(files) >= 60
    sandbox, tokens = templates.TemplateSandbox(), {"bos_token": "<s>", "eos_token": "</s>"}
    for file in files:
        ledger = Ledger()
        templates.examine(ledger, file.name, file.read_text("utf-8"), sandbox, tokens)
        assert not list(ledger.accusations()), (file.name, ledger.sorted())


def test_parameters_of_a_config_are_those_of_the_model():
    from model import Qwen3

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    for more in (
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"model_type": "qwen2"},
        experts,
        {**experts, "mlp_only_layers": [1]},
    ):
        config = Config(**sizes, **heads, **more)
        with torch.device("meta"):
            model = Qwen3(config)
        assert weights.parameters_of_config(config)[0] == sum(p.numel() for p in model.parameters()), more


# ---- against a base --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", writer.TYPES)
def test_every_gguf_type_is_proven_and_one_nibble_is_found(run, monkeypatch, tmp_path, type):
    monkeypatch.setattr(auditing.behaviour, "MOST", 0)  # what the model says is not the question here
    tiny, file = TINY, tmp_path / "m.gguf"
    writer.write_gguf(open_checkpoint(tiny), file, type)
    status, out, _ = run(file, "--base", tiny, "--json")
    found = json.loads(out)
    assert status == 0 and "base-metadata" not in ids(found), out
    assert [(one["status"], one["repo"]) for one in found["lineage"]] == [("verified", "tiny")]
    place = GGUF(file).stored["blk.2.attn_k.weight"]
    content = bytearray(file.read_bytes())
    content[place.start + place.size // 2] ^= 0x10
    file.write_bytes(content)
    status, out, _ = run(file, "--base", tiny)
    assert (
        status == 1
        and f"tensor blk.2.attn_k.weight: 1 bytes differ, the first at {place.start + place.size // 2:,}" in out
    )


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int8", "32"), ("int4", None), ("int4", "16")])
def test_a_quantised_directory_is_proven_and_one_bit_is_found(run, monkeypatch, capsys, tmp_path, kind, group):
    monkeypatch.setattr(auditing.behaviour, "MOST", 0)
    out, flags = tmp_path / "q", ("--group-size", group) if group else ()
    convert(monkeypatch, capsys, "--to", kind, "--model", TINY, "--out", out, *flags)
    status, text, _ = run(out, "--base", TINY, "--json")
    found = json.loads(text)
    said = [(one["relation"], one["status"]) for one in found["lineage"]]
    assert status == 0 and (f"quantized to {kind}", "verified") in said and "base-metadata" not in ids(found), text
    assert "byte-identical (46 tensors)" in run(out, "--base", TINY)[1]
    name = "model.layers.2.mlp.up_proj.weight"
    file = out / "model.safetensors"
    start, _ = auditing.Audit(local_tree(out)).ledger.facts["safetensors"]["model.safetensors"][1][f"{name}_packed"]
    content = bytearray(file.read_bytes())
    place = len(content) - weights_size(out) + start + 5
    content[place] ^= 0x80
    file.write_bytes(content)
    status, text, _ = run(out, "--base", TINY)
    assert status == 1 and f"tensor {name} is not what the base gives, by up to" in text
    assert "45 of 46 tensors are byte-identical" in text


def weights_size(path: Path) -> int:
    """Bytes of the tensors in a directory's only file."""
    offsets = auditing.Audit(local_tree(path)).ledger.facts["safetensors"]["model.safetensors"][1]
    return max(end for _, end in offsets.values())


def test_weights_that_another_tool_rounded_accuse_nobody(run, monkeypatch, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(auditing.behaviour, "MOST", 0)
    out = tmp_path / "q"
    convert(monkeypatch, capsys, "--to", "int8", "--model", TINY, "--out", out)
    (out / record.NAME).unlink()
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight_packed"
    bytes_of = tensors[name].view(torch.uint8)
    bytes_of[0, 0] += 1 if bytes_of[0, 0] < 128 else -1  # towards zero or away: one step at most
    save_file(tensors, out / "model.safetensors")
    status, text, _ = run(out, "--base", TINY)
    assert "45 of 46 tensors are byte-identical" in text
    assert (status == 0 and "1 rounded differently" in text) or "steps of its scale" in text
    shutil.copytree(TINY, tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", rope_theta=77.0)
    assert "rope_theta differs" in run(out, "--base", tmp_path / "other")[1]


def test_a_gguf_of_another_base_or_other_metadata(run, tiny_checkpoint, tmp_path):
    file = tmp_path / "m.gguf"
    writer.write_gguf(open_checkpoint(tiny_checkpoint), file, "q8_0")
    assert run(file, "--base", TINY)[0] == 1
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_checkpoint, renamed)
    edit_json(renamed / "config.json", rope_theta=5000.0)
    status, out, _ = run(file, "--base", renamed)
    assert status == 0 and "base-metadata" in out and "qwen3.rope.freq_base" in out


def test_a_copy_a_cast_and_a_change(run, tiny_checkpoint, repository):
    assert "byte-identical" in run(repository, "--base", tiny_checkpoint)[1]
    from safetensors.torch import load_file, save_file

    file = repository / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    edit_json(repository / "config.json", torch_dtype="bfloat16")
    status, out, _ = run(repository, "--base", tiny_checkpoint)
    assert status == 0 and f"{len(tensors)} equal after a cast" in out
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file)
    status, out, _ = run(repository, "--base", tiny_checkpoint)
    assert status == 1 and "tensor model.norm.weight differs by up to 1" in out


def test_a_changed_template_is_compared_line_by_line(run, tiny_checkpoint, repository, tmp_path):
    text = json.loads((repository / "tokenizer_config.json").read_text())["chat_template"]
    set_template(repository, text.replace("assistant", "helper", 1))
    status, out, _ = run(repository, "--base", tiny_checkpoint, "--out", tmp_path / "out")
    assert status == 1 and "template-differs" in out and "prompts differ" in out
    assert "Template: tokenizer_config.json" in (tmp_path / "out" / "audit.html").read_text()
    set_template(repository, text + "{# a note #}")
    assert "all fixtures give the same prompt" in run(repository, "--base", tiny_checkpoint)[1]


# ---- against a manifest ----------------------------------------------------------------------------------------------


def test_one_changed_byte_is_named(run, repository, tmp_path):
    out = tmp_path / "out"
    assert run(repository, "--out", out)[0] == 0
    status, text, _ = run(repository, "--verify", out)
    assert status == 0 and "logits of the fixed prompt differ by at most 0" in text
    file = repository / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    status, text, _ = run(repository, "--verify", out)
    last = max(
        auditing.Audit(local_tree(repository)).ledger.facts["safetensors"]["model.safetensors"][1].items(),
        key=lambda one: one[1],
    )[0]
    assert status == 1 and f"model.safetensors: tensor {last} changed" in text
    (repository / "LICENSE").unlink()
    (repository / "new.txt").write_text("new")
    (repository / "README.md").write_text((repository / "README.md").read_text().replace("Tests", "tests"))
    found = json.loads(run(repository, "--verify", out, "--json")[1])
    said = {(one["id"], one["file"]) for one in found["findings"]}
    assert {("removed", "LICENSE"), ("added", "new.txt"), ("changed", "README.md")} <= said


def test_a_manifest_inside_the_repository_is_not_a_change(run, repository):
    assert run(repository, "--out", repository)[0] == 0
    assert run(repository, "--verify", repository)[0] == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "nanoqwen/model_context/1", "files": [1]}', "[" * 100_000])
def test_a_manifest_that_is_none(run, repository, tmp_path, text):
    (tmp_path / "model_context.json").write_text(text)
    status, _, err = run(repository, "--verify", tmp_path)
    assert status == 2 and "model_context.json" in err and err.count("\n") == 1


# ---- what convert.py and train.py write ------------------------------------------------------------------------------


def convert(monkeypatch, capsys, *arguments) -> None:
    import convert

    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()
    capsys.readouterr()


def test_a_conversion_proves_its_lineage(run, monkeypatch, capsys, repository, tmp_path):
    source, out = repository, tmp_path / "out"
    convert(monkeypatch, capsys, "--to", "bf16", "--model", source, "--out", out)
    manifest.validate(json.loads((out / "model_context.json").read_text()))
    found = json.loads(run(out, "--json")[1])
    lineage = found["lineage"][0]
    assert (lineage["relation"], lineage["repo"], lineage["status"]) == ("converted from", str(source), "verified")
    assert lineage["record"]["to"] == "bf16" and lineage["record"]["commit"]
    assert run(out, "--verify", out)[0] == 0
    assert run(out, "--out", out)[0] == 0 and record.verify(out)  # an audit into the same folder keeps the record
    manifest.validate(json.loads((out / "model_context.json").read_text()))
    edit_json(source / "config.json", note=1)
    status, text, _ = run(out)
    assert status == 1 and "lineage-broken" in text and "config.json" in text


def test_a_converted_gguf_and_a_changed_byte(run, monkeypatch, capsys, tiny_checkpoint, tmp_path):
    file = tmp_path / "m.gguf"
    convert(monkeypatch, capsys, "--to", "gguf", "--type", "q8_0", "--model", tiny_checkpoint, "--out", file)
    found = json.loads(run(file, "--json")[1])
    assert found["status"] == 0 and [one["status"] for one in found["lineage"]] == ["verified"]
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    status, out, _ = run(file)
    assert status == 1 and "lineage-broken" in out


def test_a_training_run_proves_its_lineage(run, monkeypatch, tmp_path):
    import train

    settings = {**CONFIG, "model": {"init": str(TINY), "tokenizer": str(TINY)}}
    settings["train"] = {**CONFIG["train"], "out": str(tmp_path / "run"), "steps": 2, "save_every": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "run.yaml")])
    train.main()
    found = json.loads(run(tmp_path / "run" / "latest", "--json")[1])
    (lineage,) = found["lineage"]
    assert (lineage["relation"], lineage["status"]) == ("trained from", "verified")
    assert lineage["record"]["stage"] == "sft" and lineage["record"]["steps"] == 2
    assert lineage["record"]["data"]["source"] and lineage["record"]["commit"]


# ---- on the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(repository, tmp_path, monkeypatch):
    servers = []

    def serve(**more: bytes) -> Hub:
        files = {file.name: file.read_bytes() for file in repository.iterdir()} | more
        server = Hub(files)
        use(server.url, tmp_path, monkeypatch)
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_hub_repository_is_read_by_range_requests(run, server, repository):
    from safetensors.torch import load_file, save

    tensors = {f"t{at}.weight": torch.zeros(1024, 1024) for at in range(3)}
    pickled = repository.parent / "m.bin"
    torch.save({"a": torch.ones(600_000), "b": Call(os.system, "true")}, pickled)
    hub = server(
        **{
            "extra.safetensors": save(tensors),
            "pytorch_model.bin": pickled.read_bytes(),
            "big.json": b"[" + b"1," * 900_000 + b"1]",
        }
    )
    status, out, _ = run("org/name", "--json")
    found = json.loads(out)
    files = {file["path"]: file for file in found["files"]}
    assert status == 1 and "pickle-import" in ids(found)  # in the middle of a large zip
    assert hub.sent < 1_000_000 and sum(map(len, hub.files.values())) > 15_000_000
    assert files["extra.safetensors"]["examined"] and not files["big.json"]["examined"]
    assert "bytes over the network" in found["coverage"] and found["revision"] == "a" * 40
    assert found["parameter_count"] == sum(
        tensor.numel() for tensor in load_file(repository / "model.safetensors").values()
    )
    assert found["evidence"]["behaviour"]["status"] == "absent"


def test_a_good_hub_repository_ends_with_0_and_deep_reads_the_weights(run, server):
    server()
    assert run("org/name")[0] == 0
    found = json.loads(run("org/name@v1", "--deep", "--json")[1])
    assert found["status"] == 0 and found["revision"] == "b" * 40 and found["repo"] == "org/name" and found["tensors"]


def large_gguf(path: Path, seed: int = 0) -> Path:
    """A .gguf with a vocabulary of Qwen3's size and 24 MB of weights, as llama.cpp orders its keys."""
    import gguf
    import numpy as np

    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzĠäß中"))
    tokens = ["".join(random.choice(letters, size)) for size in random.integers(1, 14, 150_000)]
    file = gguf.GGUFWriter(path, "qwen3")
    file.add_name("A model")
    sizes = {"block_count": 1, "context_length": 2048, "embedding_length": 256, "feed_forward_length": 256}
    for name, value in (sizes | {"attention.head_count": 2, "attention.head_count_kv": 1}).items():
        file.add_uint32(f"qwen3.{name}", value)
    file.add_array("tokenizer.ggml.tokens", tokens)
    file.add_array("tokenizer.ggml.token_type", [1] * len(tokens))
    file.add_array("tokenizer.ggml.merges", [f"{a[:3]} {b[:3]}" for a, b in pairwise(tokens)])
    file.add_uint32("tokenizer.ggml.eos_token_id", 7)
    file.add_string("tokenizer.chat_template", "{{ ''.__class__ }}")
    weights = np.zeros((len(tokens), 170), np.uint8)
    file.add_tensor("token_embd.weight", weights, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for at in range(40):
        file.add_tensor(f"blk.0.t{at}.weight", np.ones((4, 256), np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def test_a_large_gguf_on_the_hub_is_read_to_its_template_and_tensors(run, server, tmp_path):
    content = large_gguf(tmp_path / "m.gguf").read_bytes()
    hub = server(**{"m.gguf": content})
    hub.files = {"m.gguf": content, "README.md": hub.files["README.md"]}
    status, out, _ = run("org/name", "--json")
    found = json.loads(out)
    local = auditing.Audit(local_tree(tmp_path / "m.gguf")).ledger.facts
    assert status == 1 and "template-attribute" in ids(found) and hub.sent < 1_000_000 < len(content) // 8
    assert found["parameter_count"] == local["parameter_count"] and found["dtypes"] == local["dtypes"]
    (entry,) = [file for file in found["files"] if file["path"] == "m.gguf"]
    assert not entry["examined"] and "of its vocabulary; --deep reads all" in str(found)
    hub.sent = 0
    assert run("org/name", "--deep")[0] == 1 and hub.sent > len(content)
    for cut in (len(content) // 2, 4_000_000):  # in the weights, in the vocabulary
        hub.files["m.gguf"], hub.sent = content[:cut], 0
        found = json.loads(run("org/name", "--json")[1])
        assert hub.sent < 1_000_000 and not ids(found, "high") - {"template-attribute"}, cut
        assert not any(file["examined"] for file in found["files"] if file["path"] == "m.gguf")


def test_a_linked_data_sets_croissant_answers_question_four(run, server, repository):
    hub = server()
    hub.files["README.md"] = b"---\nlicense: mit\ndatasets: [org/data, org/none]\n---\n# A model\n"
    fields = [{"name": "default/text"}, {"name": "default/label"}]
    document = {"recordSet": [{"@id": "default", "field": fields}], "license": "https://example.org/licenses/odc-by/"}
    hub.pages["/api/datasets/org/data/croissant"] = json.dumps(document).encode()
    hub.pages["/datasets/org/data/resolve/main/README.md"] = b"# Data\nEach row has a text."
    found = json.loads(run("org/name", "--json")[1])
    answer = found["questions"][3]
    assert answer["number"] == 4 and answer["status"] == "claimed", answer
    assert "org/data: 2 fields, of which the README does not name label" in answer["answer"]
    assert "licenses/odc-by" in answer["answer"] and "org/none" in answer["answer"], answer
    hub.pages["/api/datasets/org/data/croissant"] = b"[" * 100_000
    assert json.loads(run("org/name", "--json")[1])["questions"][3]["status"] in ("claimed", "absent")


def test_what_croissant_says_that_the_readme_does_not(tmp_path):
    fields = [{"name": "default/text"}, {"name": "default/label"}]
    document = {
        "recordSet": [{"@id": "default", "field": fields}],
        "license": "https://choosealicense.com/licenses/mit/",
    }
    said = croissant.difference(document, "The text of each row.")
    assert "2 fields" in said and "label" in said and "licenses/mit" in said and " text" not in said.split("name ")[1]
    assert croissant.difference(document, "text and label, MIT") == "2 fields, all named in the README"
    for broken in ([], {"recordSet": 1}, {"recordSet": [{"field": [1]}], "license": []}):
        assert croissant.difference(broken, "")


def test_a_snapshot_in_the_hubs_cache_is_no_folder_of_strange_links(repository, tmp_path):
    folder = tmp_path / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(repository.iterdir())):
        file.rename(folder / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    tree = local_tree(snapshot)
    assert auditing.Audit(tree).ledger.status == 0 and (tree.repo, tree.revision) == ("org/name", "a" * 40)
    (snapshot / "more.txt").symlink_to("/etc/passwd")
    assert auditing.Audit(local_tree(snapshot)).ledger.status == 1


def test_a_hub_that_does_not_answer(run, tmp_path, monkeypatch):
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    status, _, err = run("org/name")
    assert status == 2 and "can't be reached" in err and err.count("\n") == 1


# ---- hostile input ---------------------------------------------------------------------------------------------------


def test_nothing_is_run(tiny_checkpoint, tmp_path):
    """Every way in which a repository could run code leaves its mark, and none does."""
    path, mark = base(tmp_path / "repository", tiny_checkpoint), tmp_path / "mark"
    call = Call(os.system, f"touch {mark}")
    for protocol in range(6):
        (path / f"p{protocol}.bin").write_bytes(pickle.dumps(call, protocol))
    torch.save(call, path / "pytorch_model.bin")
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (path / "modeling.py").write_text(code)
    (path / "conftest.py").write_text(code)
    edit_json(path / "config.json", auto_map={"AutoModel": "modeling.Model"})
    (path / "run.yaml").write_text(f"!!python/object/apply:os.system ['touch {mark}']")
    set_template(path, f"{{{{ cycler.__init__.__globals__.os.popen('touch {mark}').read() }}}}")
    ledger = auditing.Audit(local_tree(path)).ledger
    assert ledger.status == 1 and not mark.exists()
    assert {"pickle-import", "remote-code", "yaml-tag", "template-attribute"} <= {one.id for one in ledger.findings}


def test_files_of_a_few_bytes_and_beginnings_of_every_format(tmp_path):
    """What a format's first bytes promise need not follow: each such file ends in a format or in a reason."""
    beginnings = [
        *contents.MAGIC,
        *contents.UNKNOWN_PACKERS,
        b"GGUF\3\0\0\0",
        b"PK\3\4",
        b"\x93NUMPY\1\0",
        b"\x80\4",
        b"MZ",
    ]
    beginnings += [
        b"\x78\x9c\x01",
        b"RIFF0000WEBP",
        b"0000ftyp",
        b"\x89HDF\r\n\x1a\n",
        b"\2\0\0\0\0\0\0\0{}",
        b"\xff\xfea",
    ]
    texts = {bytes([first]) for first in range(256)} | {bytes([first, 0x78]) for first in range(256)}
    texts |= {text[:end] for text in beginnings for end in range(len(text) + 1)}
    for suffix in (".bin", ".json", ".safetensors", ".gguf", ".py"):
        for number, text in enumerate(sorted(texts)):
            file = tmp_path / f"{number}{suffix}"
            file.write_bytes(text)
            (entry,) = local_tree(file).entries
            found = contents.examine(Ledger(), entry)
            assert found.examined or found.note, (text, suffix)
            file.unlink()


def test_more_objects_and_tensors_than_memory_holds_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "MAX_MEMORY", 10_000)
    monkeypatch.setattr(contents, "MAX_TENSORS", 50)
    (tmp_path / "many.json").write_text(json.dumps([{} for _ in range(50)]))
    (tmp_path / "few.json").write_text(json.dumps(["text"] * 50))
    for name, tensors in (("a", 30), ("b", 30), ("c", 10)):
        save_file({f"{name}{at}": torch.ones(1) for at in range(tensors)}, tmp_path / f"{name}.safetensors")
    files = {file.path: file for file in auditing.Audit(local_tree(tmp_path)).ledger.files}
    examined = {path for path, file in files.items() if file.examined}
    assert examined == {"few.json", "a.safetensors"}
    assert "bytes of memory" in files["many.json"].note and "more than 50 tensors" in files["b.safetensors"].note


def test_a_large_tokenizer_is_read_and_one_that_memory_does_not_hold_is_left_out(tmp_path):
    """33 MB, as Gemma 3's, and characters that are four bytes wide in memory."""
    text = json.dumps({"model": {"vocab": {"word": 0, "\u00e9": 1}}, "note": "x" * (33 << 20)}, ensure_ascii=False)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "word", "pad_token": "nothing"}))
    (tmp_path / "wide.json").write_bytes(b'["\xf0\x9f\x98\x80' + b"x" * (60 << 20) + b'"]')
    ledger = auditing.Audit(local_tree(tmp_path)).ledger
    assert ledger.facts["tokens"] == 2
    assert [one.what for one in ledger.accusations()] == ["pad_token 'nothing' is not a token of the tokenizer"]
    assert [file.path for file in ledger.unexamined()] == ["wide.json"]


def test_weights_of_another_architecture_beside_the_model_are_named(run, repository):
    """As an mmproj file: its values are not read, those of the model are."""
    writer.write_gguf(open_checkpoint(repository), repository / "mmproj.gguf", "f32")
    content = (repository / "mmproj.gguf").read_bytes()
    (repository / "mmproj.gguf").write_bytes(content.replace(b"qwen3", b"clip3"))
    status, out, _ = run(repository)
    assert status == 0 and "values of the weights read except those of mmproj.gguf" in out and "perplexity" in out


def test_a_script_in_what_a_notebook_shows(tmp_path):
    for name, html in (("bad", "<img src=x onerror=alert(1)>"), ("good", "<img src=x>")):
        output = {"output_type": "display_data", "data": {"text/html": [html]}, "metadata": {}}
        cells = [{"cell_type": "code", "source": ["1\n"], "metadata": {}, "outputs": [output], "execution_count": 1}]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    found = auditing.Audit(local_tree(tmp_path)).ledger.findings
    assert [one.file for one in found if one.id == "other-code"] == ["bad.ipynb"]


def test_constants_of_a_template_are_bounded():
    from inspection.constants import value_of

    parse = templates.template_environment().parse

    def value(text):
        return value_of(parse("{{ " + text + " }}").body[0].nodes[0])

    assert value("'a' ~ ['b', 'c']|join('-') + 'D'|lower") == "ab-cd" and value("'%s!' % 'x'") == "x!"
    assert value("'abc'[::-1]") == "cba" and value("2 * 3 ** 2") == 18 and value("'{}'.format('y')") == "y"
    for text in ("'a' * 10 ** 10", "9 ** 9 ** 9", "'%999999999d' % 1", "'aa'|replace('a', 'a' * 4000)", "x ~ 'a'"):
        assert value(text) is None
    assert value("'a'|center(1000000000)") is None and value("1 // 0") is None


def test_a_card_that_is_too_large_is_not_called_missing(run, repository):
    (repository / "README.md").write_text("---\nlicense: mit\n---\n" + "text " * 1_000_000)
    status, out, _ = run(repository, "--json")
    found = json.loads(out)
    assert status == 2 and "card-missing" not in ids(found) and "too-large" in ids(found)


def test_bombs_stay_within_time_and_memory(tiny_checkpoint, tmp_path):
    """All at once, in a process of its own whose memory is bounded."""
    path = base(tmp_path / "repository", tiny_checkpoint)
    for case in CASES:
        if case.name in (
            "zip_bomb",
            "gzip_bomb",
            "pipe",
            "file_of_holes",
            "link_in_a_circle",
            "archives_in_archives",
            "python_that_nests_deep",
        ):
            case.change(path, True)
    (path / "deep.json").write_text("[" * 1_000_000)
    (path / "wide.json").write_text("[" + "[]," * 3_000_000 + "[]]")
    (path / "deep.ipynb").write_text('{"cells": ' + "[" * 100_000 + "]" * 100_000 + "}")
    (path / "deep.jinja").write_text("{{ " + "(" * 60_000 + "1" + ")" * 60_000 + " }}")
    (path / "lines.txt").write_text("\n" * 1_000_000 + "import x(")
    (path / "lines.sh").write_text("#!/bin/sh\n" + "curl " * 60_000 + "\n" * 1_000_000)
    (path / "pickle.pkl").write_bytes(b"\x80\x04" + b"N0" * 1_600_000 + b".")
    (path / "long.pkl").write_bytes(b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x")
    (path / "header.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{" + bytes(100))
    (path / "count.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") * 2 + bytes(64)
    )
    with zipfile.ZipFile(path / "many.zip", "w") as archive:
        for number in range(20_001):
            archive.writestr(str(number), b"")
    (path / "README.md").write_text(
        "---\n" + "a: &a [" + "x," * 50_000 + "]\n---\n" + "#" * 500_000 + "\n- **" * 50_000
    )

    # The peak of this program alone: what getrusage says of a child begins with its parent's peak.
    code = "import re, runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: "
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys; del sys.argv[0]; exec({code!r})", ROOT / "audit.py", path, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(result.stdout)
    assert result.returncode == 1 and result.stderr.strip().isdigit(), result.stderr
    unseen = {file["path"] for file in found["files"] if not file["examined"]}
    assert {
        "events",
        "table.csv",
        "pickle.pkl",
        "long.pkl",
        "header.safetensors",
        "count.gguf",
        "many.zip",
        "deep.py",
    } <= unseen
    assert int(result.stderr) < 1_000_000, f"{int(result.stderr):,} kB"


def test_a_case_can_be_built_twice(tiny_checkpoint, tmp_path):
    """The corpus is the same each time: docs/audit-scanners.md is made from it."""
    for bad in (True, False):
        path = build(tmp_path, CASES[0], bad, tiny_checkpoint)
        assert (path / "config.json").is_file()
