"""formats/gguf/: what is written reads back and is what llama.cpp writes; a stranger's file gets its one line."""

import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import TEXTS, write_checkpoint
from tokenizers import Tokenizer

from chat import Chat
from formats.checkpoint import open_checkpoint
from formats.gguf import reader, writer
from formats.gguf.names import config_from_metadata
from formats.gguf.reader import GGUF
from formats.gguf.tokenizer import from_metadata
from formats.gguf.types import dequantize, quantize
from formats.gguf.writer import TYPES, plan, write_gguf, write_qwen3c
from formats.tensors import TensorInfo
from formats.tokenizer_files import load_tokenizer
from formats.view import View

ASSETS = Path(os.environ.get("NANOQWEN_ASSETS", ""))
without_assets = pytest.mark.skipif("NANOQWEN_ASSETS" not in os.environ, reason="NANOQWEN_ASSETS is not set")

# Widths of whole blocks of 256, so that every K-format is used, and a vocabulary with room for the small tokenizer.
WIDE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
CHECKPOINTS = {
    "tied": oracle.config(**WIDE, tie_word_embeddings=True),
    "untied odd": oracle.config(vocab_size=512, tie_word_embeddings=False),
    "moe": oracle.config(**oracle.MOE, vocab_size=512),
    "qwen2": oracle.config(**oracle.QWEN2, vocab_size=512, tie_word_embeddings=True),
    "yarn": oracle.config(vocab_size=512, rope_scaling=oracle.YARN, rope_theta=1e6),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = {}
    for name, fields in CHECKPOINTS.items():
        path = paths[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        shards = {"max_shard_size": "200KB"} if name == "untied odd" else {}
        oracle.write(path, fields, dtype=torch.bfloat16 if name == "moe" else torch.float32, **shards)
        write_checkpoint(path)
    return {name: open_checkpoint(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def small_file(checkpoints, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_gguf(checkpoints["untied odd"], path, "q8_0")
    return path


# ---- other people's files ---------------------------------------------------------------------------------------


READ_BY_THE_PACKAGE = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
READ_BY_THE_PACKAGE += ["TQ1_0", "TQ2_0", "MXFP4"]


def by_package(path: Path, kinds: list[str], pre: str = "qwen2", **extra) -> dict[str, np.ndarray]:
    """A one-layer model that the gguf package writes, its matrices of the given types; the values it reads back."""
    random, values = np.random.default_rng(0), {}
    out = gguf.GGUFWriter(path, "qwen3")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 256}
    for key, value in sizes.items():
        out.add_uint32(f"qwen3.{key}", value)
    out.add_head_count(2)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_key_length(128)
    out.add_value_length(128)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(["a", "b", "ab", "<|im_end|>"])
    out.add_token_types([1, 1, 1, 3])
    out.add_token_merges(["a b"])
    for key, value in extra.items():
        out.add_uint32(key, value)
    for index, name in enumerate(("token_embd", *(f"blk.0.{part}" for part in writer.names.LAYER.values()))):
        if name.endswith(("gate_inp", "norm")):
            if not name.endswith("gate_inp"):
                out.add_tensor(f"{name}.weight", np.ones(128 if "_q_" in name or "_k_" in name else 256, np.float32))
            continue
        kind = gguf.GGMLQuantizationType[kinds[index % len(kinds)]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (256, 256 // block * size), np.uint8)
        with np.errstate(all="ignore"):
            values[name] = gguf.quants.dequantize(data, kind)
        out.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    out.add_tensor("output_norm.weight", np.ones(256, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return values


@pytest.mark.parametrize("kind", READ_BY_THE_PACKAGE)
def test_types_that_the_package_reads(kind, tmp_path):
    values = by_package(tmp_path / "model.gguf", [kind, "Q8_0"])
    found = GGUF(tmp_path / "model.gguf")
    assert kind in {tensor.format.name for tensor in found.stored.values()}
    for name, tensor in found:
        stored = found._places[name][0].removesuffix(".weight")
        if stored in values:
            assert np.array_equal(tensor.numpy(), values[stored], equal_nan=True), name


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"])
def test_names_that_llama_cpp_takes_for_qwens_splitting(pre, tmp_path):
    by_package(tmp_path / "model.gguf", ["Q8_0"], pre=pre)
    tokenizer, _ = GGUF(tmp_path / "model.gguf").tokenizer()
    assert tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"].startswith("(?i:'s|'t|'re")


ROPE = {
    "all columns": ({"rope.dimension_count": 8}, None),
    "half of them": ({"rope.dimension_count": 4}, "rope.dimension_count is 4, but Qwen rotates all 8 columns"),
    "no scaling": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    "linear by 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}, None),
    "linear without a word": ({"rope.scaling.factor": 4.0}, "rope.scaling.type is 'linear'"),
    "linear of old": ({"rope.scale_linear": 2.0}, "rope.scale_linear is 2, which is not implemented"),
    "attention": ({"rope.scaling.attn_factor": 0.5}, "rope.scaling.attn_factor is 0.5, which is not"),
    "a number for each layer": ({"attention.head_count_kv": [1, 1]}, None),
    "layers that differ": ({"attention.head_count_kv": [1, 2]}, "is [1, 2]; layers that differ are not implemented"),
}


@pytest.mark.parametrize("case", ROPE)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case):
    keys, line = ROPE[case]
    plain = {"block_count": 1, "attention.head_count": 2, "attention.head_count_kv": 1, "embedding_length": 16}
    plain |= {"feed_forward_length": 24, "context_length": 32, "attention.layer_norm_rms_epsilon": 1e-6}
    stored = {"token_embd.weight": SimpleNamespace(shape=(32, 16)), "blk.0.attn_q.weight": None}

    def config(**more) -> dict:
        metadata = {f"qwen3.{key}": value for key, value in (plain | more).items()}
        return config_from_metadata({"general.architecture": "qwen3"} | metadata, stored)

    if line is None:
        assert config(**keys) == config()
        return
    with pytest.raises(ValueError) as error:
        config(**keys)
    assert line in str(error.value)


def test_top_k_off_is_read(tmp_path):
    by_package(tmp_path / "model.gguf", ["Q8_0"])
    changed = {"general.sampling.top_k": -1}
    assert writer.names.generation_config_from_metadata(changed)["top_k"] == -1


def split(source: Path, folder: Path, count: int) -> list[Path]:
    """A GGUF in parts, as llama-gguf-split writes it: all metadata in the first, the counts in each."""
    reader, paths = gguf.GGUFReader(source), []
    shares = [reader.tensors[i::count] for i in range(count)]
    for number, share in enumerate(shares):
        paths.append(folder / f"model-{number + 1:05d}-of-{count:05d}.gguf")
        out = gguf.GGUFWriter(paths[-1], "qwen3")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                out.add_key_value(key, field.contents(), field.types[0], element)
        out.add_uint16("split.no", number)
        out.add_uint16("split.count", count)
        out.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in share:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return paths


def test_a_split_file_is_read_from_any_part(small_file, tmp_path):
    whole, parts = GGUF(small_file), split(small_file, tmp_path, 3)
    for part in parts:
        found = GGUF(part)
        assert found.config == whole.config and found.files == parts and found.tensors == whole.tensors | found.tensors
        assert {name: tensor.tolist() for name, tensor in found} == {name: tensor.tolist() for name, tensor in whole}
        assert found.tokenizer() == whole.tokenizer()
    parts[2].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has 3 parts; beside it model-00003-of-00003\.gguf are missing"):
        GGUF(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ValueError, match="by its metadata not part 3 of 3"):
        GGUF(parts[0])
    parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts .*NAME-00001-of-00003\.gguf"):
        GGUF(tmp_path / "first.gguf")


@pytest.mark.parametrize(
    ("count", "line"),
    [(5, r"model-00005-of-00005\.gguf are missing"), (7, r"model-00005-of-00007\.gguf and 2 more are missing")],
)
def test_missing_parts_are_named_or_counted(tmp_path, count, line):
    path = tmp_path / f"model-00001-of-{count:05d}.gguf"
    path.write_bytes(raw([pair("split.count", 2, struct.pack("<H", count))]))
    with pytest.raises(ValueError, match=line):
        GGUF(path)


def test_an_embedding_models_tokenizer_comes_back(checkpoints, tmp_path):
    """Qwen3-Embedding ends every text with <|endoftext|>, which is not its eos: llama.cpp's eos and eot."""
    path = shutil.copytree(checkpoints["tied"].path, tmp_path / "embedding")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    config = json.loads((path / "tokenizer_config.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    end = next(token for token in added if token != config["eos_token"])
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    template["special_tokens"] = {end: {"id": end, "ids": [added[end]], "tokens": [end]}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [level, template]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_gguf(open_checkpoint(path), tmp_path / "e.gguf", "f32")
    found = GGUF(tmp_path / "e.gguf")
    prefix = "tokenizer.ggml."
    assert found.metadata[prefix + "add_eos_token"] is True and found.metadata[prefix + "eos_token_id"] == added[end]
    assert found.metadata[prefix + "eot_token_id"] == added[config["eos_token"]]
    chat, theirs = Chat.from_pretrained(tmp_path / "e.gguf"), Tokenizer.from_file(str(path / "tokenizer.json"))
    assert chat.tokenizer.to_str() == Tokenizer.from_str(json.dumps(found.tokenizer()[0])).to_str()
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert chat.tokenizer.encode(text).ids == ids and ids[-1] == added[end]
    assert found.tokenizer()[1]["eos_token"] == config["eos_token"]


# ---- what is written reads back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip(checkpoints, name, type, tmp_path):
    source, path, seen = checkpoints[name], tmp_path / "model.gguf", []
    write_gguf(source, path, type, lambda tensor, size: seen.append(size))
    found = open_checkpoint(path)
    assert sum(seen) == sum(tensor.size for tensor in found.stored.values())
    fields = ("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    fields += ("intermediate_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    fields += ("tie_word_embeddings", *(key for key in oracle.MOE if key != "mlp_only_layers"))
    for field in (*fields, *(["head_dim"] if "head_dim" in source.config else [])):
        assert found.config.get(field) == source.config.get(field), field
    assert (found.config["rope_scaling"] or None) == (source.config["rope_scaling"] or None)
    assert set(found.tensors) == set(source.tensors)
    for tensor, info in found.tensors.items():
        values, stored = source.read(tensor), found.read(tensor)
        assert (stored.dtype, tuple(stored.shape)) == info == (stored.dtype, tuple(values.shape))
        format = found.stored[found._places[tensor][0]].format
        assert torch.equal(stored.float(), dequantize(quantize(values, format), format, values.shape)), tensor


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_packages_reader_sees_the_same(checkpoints, name, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(checkpoints[name], path, "q4_k_m")
    ours, theirs = GGUF(path), gguf.GGUFReader(path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert keys == list(ours.metadata)
    assert all(theirs.fields[key].contents() == ours.metadata[key] for key in keys)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.stored)
    for tensor in theirs.tensors:
        format, shape, start, size = ours.stored[tensor.name]
        assert (tensor.tensor_type, tensor.data_offset, tensor.n_bytes) == (format.id, start, size)
        assert tuple(tensor.shape.tolist()) == shape[::-1]


def test_the_packages_writer_is_read(checkpoints, tmp_path):
    """A file made with the gguf package from the same values is the same file, but for the keys left out here."""
    source, path = checkpoints["untied odd"], tmp_path / "theirs.gguf"
    write_gguf(source, tmp_path / "ours.gguf", "f16")
    ours = GGUF(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, kind in ours.types.items():
        if key != "general.architecture":
            element = gguf.GGUFValueType(ours.elements[key]) if key in ours.elements else None
            writer.add_key_value(key, ours.metadata[key], gguf.GGUFValueType(kind), element)
    for name, tensor in ours.stored.items():
        data = ours._data[name][tensor.start : tensor.start + tensor.size]
        writer.add_tensor(
            name, np.frombuffer(data, np.float16 if tensor.format.name == "F16" else np.float32).reshape(tensor.shape)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.read_bytes() == (tmp_path / "ours.gguf").read_bytes()


def test_a_gguf_is_a_source_too(checkpoints, tmp_path):
    write_gguf(checkpoints["moe"], tmp_path / "first.gguf", "bf16")
    for type in ("bf16", "q6_k"):
        write_gguf(open_checkpoint(tmp_path / "first.gguf"), tmp_path / "second.gguf", type)
        write_gguf(checkpoints["moe"], tmp_path / "straight.gguf", type)
        second, straight = GGUF(tmp_path / "second.gguf"), GGUF(tmp_path / "straight.gguf")
        assert second.metadata == straight.metadata
        assert list(second.stored) == list(straight.stored)
        assert all(torch.equal(second.read(name), straight.read(name)) for name in straight.tensors)


def test_blocks_that_have_the_type_already_are_copied(checkpoints, tmp_path):
    """As llama-quantize --allow-requantize copies them; packed again, most blocks of Q6_K would move once more."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_gguf(checkpoints["tied"], first, "q6_k")
    errors = write_gguf(open_checkpoint(first), second, "q4_0")
    source, found = GGUF(first), GGUF(second)
    assert found.format_of("model.embed_tokens.weight").name == "Q6_K" and errors["token_embd.weight"] == (0, 0)
    assert torch.equal(found.blocks("model.embed_tokens.weight"), source.blocks("model.embed_tokens.weight"))
    assert found.format_of("model.layers.0.mlp.up_proj.weight").name == "Q4_0" and errors["blk.0.ffn_up.weight"][0] > 0


def test_a_damaged_block_is_not_copied(checkpoints, tmp_path):
    path = tmp_path / "damaged.gguf"
    write_gguf(checkpoints["tied"], path, "q6_k")
    start = GGUF(path).stored["token_embd.weight"].start
    with path.open("r+b") as file:
        file.seek(start + 208)
        file.write(b"\xff\x7f")  # a scale that is NaN
    with pytest.raises(ValueError, match=r"embed_tokens\.weight cannot be Q6_K: a value is not finite"):
        write_gguf(open_checkpoint(path), tmp_path / "m.gguf", "q4_0")


def test_float64_is_written_as_the_converter_does(checkpoints, tmp_path):
    class Double(View):
        def read(self, name):
            return super().read(name).double()

    write_gguf(checkpoints["tied"], tmp_path / "a.gguf", "q4_0")
    write_gguf(Double(checkpoints["tied"]), tmp_path / "b.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_errors_are_those_of_the_values(checkpoints, tmp_path):
    source, path = checkpoints["tied"], tmp_path / "model.gguf"
    found = write_gguf(source, path, "q4_0")
    error = (
        GGUF(path).read("model.layers.1.mlp.up_proj.weight") - source.read("model.layers.1.mlp.up_proj.weight")
    ).abs()
    assert found["blk.1.ffn_up.weight"] == pytest.approx((error.max().item(), error.mean().item()), rel=1e-6)
    assert found["output_norm.weight"] == (0, 0)


def test_version_2_is_read(small_file, tmp_path):
    """Version 3 only added big-endian files."""
    content = bytearray(small_file.read_bytes())
    content[4] = 2
    (tmp_path / "m.gguf").write_bytes(content)
    assert GGUF(tmp_path / "m.gguf").config == GGUF(small_file).config


def test_a_model_of_the_hubs_cache_is_called_by_its_id(checkpoints, tmp_path):
    path = tmp_path / "models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(checkpoints["untied odd"].path, path)
    write_gguf(open_checkpoint(path), tmp_path / "m.gguf", "f32")
    assert GGUF(tmp_path / "m.gguf").metadata["general.name"] == "Qwen/Qwen3-0.6B"
    assert "general.basename" not in GGUF(tmp_path / "m.gguf").metadata


def test_dense_layers_among_experts_come_back(tmp_path):
    oracle.write(tmp_path / "m", oracle.config(**oracle.MOE | {"mlp_only_layers": [1]}, vocab_size=512))
    write_checkpoint(tmp_path / "m")
    write_gguf(open_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", "f32")
    assert GGUF(tmp_path / "m.gguf").config["mlp_only_layers"] == [1]


def test_the_model_card_is_used(checkpoints, tmp_path):
    path = tmp_path / "Qwen3-Small-Chat-v2"
    shutil.copytree(checkpoints["untied odd"].path, path)
    (path / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\nbase_model: Qwen/Qwen3-0.6B-Base\n---\n# Text\n")
    write_gguf(open_checkpoint(path), tmp_path / "m.gguf", "f32")
    metadata = GGUF(tmp_path / "m.gguf").metadata
    assert metadata["general.license"] == "mit"
    assert metadata["general.tags"] == ["a", "b"]
    assert metadata["general.base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen3-0.6B-Base"
    assert metadata["general.version"] == "v2"
    for card in ("---\nlicense: [\n---\n", "---\ntags: [[a, [b]]]\n---\n", "---\nlicense: {a: b}\n---\n"):
        (path / "README.md").write_text(card)
        with pytest.raises(ValueError, match="cannot be used as a model card"):
            write_gguf(open_checkpoint(path), tmp_path / "m.gguf", "f32")


# ---- which format each tensor gets -------------------------------------------------------------------------------


def formats_of(fields: dict, type: str, tied: bool = True) -> dict[str, str]:
    """name -> format for a model of which only the names and shapes exist."""
    hidden, experts = fields["hidden_size"], fields.get("num_experts", 0)
    shapes = {"model.embed_tokens.weight": (512, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (512, hidden)
    for layer in range(fields["num_hidden_layers"]):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{layer}.{part}.weight"] = (hidden, hidden)
        width = fields["moe_intermediate_size"] if experts else fields["intermediate_size"]
        for prefix in [f"mlp.experts.{expert}" for expert in range(experts)] or ["mlp"]:
            shapes[f"model.layers.{layer}.{prefix}.gate_proj.weight"] = (width, hidden)
            shapes[f"model.layers.{layer}.{prefix}.up_proj.weight"] = (width, hidden)
            shapes[f"model.layers.{layer}.{prefix}.down_proj.weight"] = (hidden, width)

    tensors = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
    checkpoint = SimpleNamespace(path=Path(), config=fields, tensors=tensors, shards={})
    return {tensor.name: tensor.format.name for tensor in plan(checkpoint, type)}


def test_q4_k_m_of_the_published_depth():
    found = formats_of(oracle.config(hidden_size=256, intermediate_size=512, num_hidden_layers=28), "q4_k_m")
    more = [layer for layer in range(28) if found[f"blk.{layer}.attn_v.weight"] == "Q6_K"]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert more == [layer for layer in range(28) if found[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert found["token_embd.weight"] == "Q6_K"
    assert found["output_norm.weight"] == "F32"
    assert {found[f"blk.{layer}.ffn_up.weight"] for layer in range(28)} == {"Q4_K"}


def test_an_untied_output_is_q6_k_and_the_embedding_is_not():
    found = formats_of(oracle.config(hidden_size=256, intermediate_size=512), "q4_0", tied=False)
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q6_K", "Q4_0")


def test_q4_k_s_spares_the_first_layers():
    found = formats_of(oracle.config(hidden_size=256, intermediate_size=512, num_hidden_layers=16), "q4_k_s")
    assert [layer for layer in range(16) if found[f"blk.{layer}.attn_v.weight"] == "Q5_K"] == [0, 1, 2, 3]
    assert [layer for layer in range(16) if found[f"blk.{layer}.ffn_down.weight"] == "Q5_K"] == [0, 1]


def test_rows_that_are_not_whole_blocks_fall_back():
    fields = oracle.config(hidden_size=320, intermediate_size=544, num_hidden_layers=5)
    assert formats_of(fields, "q4_k_m")["blk.0.ffn_up.weight"] == "Q5_0"
    assert formats_of(fields, "q5_k_m")["blk.0.ffn_up.weight"] == "Q5_1"
    assert formats_of(fields, "q6_k")["blk.0.ffn_up.weight"] == "Q8_0"
    assert formats_of(fields, "q4_k_m")["token_embd.weight"] == "Q8_0"
    fields = oracle.config(hidden_size=48, intermediate_size=112)
    for type in ("q8_0", "q4_0", "q4_k_m", "q6_k"):
        assert formats_of(fields, type)["blk.0.ffn_up.weight"] == "F16"


def test_eight_experts_spare_the_attention():
    fields = oracle.config(**oracle.MOE | {"moe_intermediate_size": 256}, hidden_size=256, intermediate_size=512)
    found = formats_of(fields, "q4_k_m")
    parts = ("attn_k", "attn_v", "attn_output", "attn_q", "ffn_gate_exps", "ffn_down_exps")
    assert [found[f"blk.0.{part}.weight"] for part in parts] == ["Q8_0", "Q8_0", "Q5_K", "Q4_K", "Q4_K", "Q4_K"]


def test_an_unknown_type_is_named(checkpoints):
    with pytest.raises(ValueError, match=r"type q3_k_m is not known.*q4_k_m"):
        plan(checkpoints["tied"], "q3_k_m")


# ---- the tokenizer -------------------------------------------------------------------------------------------------


def test_the_tokenizer_comes_back(checkpoints, small_file):
    source, (tokenizer, config) = checkpoints["untied odd"].path, GGUF(small_file).tokenizer()
    ours, theirs = Tokenizer.from_str(json.dumps(tokenizer)), Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
    original = json.loads((source / "tokenizer_config.json").read_text())
    assert config["chat_template"] == original["chat_template"]
    assert (config["eos_token"], config["pad_token"], config["bos_token"]) == ("<|im_end|>", "<|endoftext|>", None)
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    assert special == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_a_chat_of_a_file_has_the_tokenizer_of_its_json(small_file):
    tokenizer, _ = GGUF(small_file).tokenizer()
    chat = Chat.from_pretrained(small_file)
    assert chat.tokenizer.to_str() == Tokenizer.from_str(json.dumps(tokenizer)).to_str()
    assert chat.special_ids == {token["id"] for token in tokenizer["added_tokens"] if token["special"]}


@pytest.mark.parametrize("left", ["#v", "#version"])
def test_merges_that_look_like_a_comment(left):
    """The library leaves out a merge `#version x` that is one string."""
    alphabet = sorted({*"#versionx", left, left + "x"})
    metadata = {"model": "gpt2", "pre": "qwen2", "tokens": alphabet, "token_type": [1] * len(alphabet)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (metadata | {"merges": [f"{left} x"]}).items()}
    tokenizer, _ = from_metadata(metadata, len(alphabet))
    model = json.loads(Tokenizer.from_str(json.dumps(tokenizer)).to_str())["model"]
    assert model["merges"] == [[left, "x"]] and model["vocab"][left + "x"] == alphabet.index(left + "x")


@pytest.mark.parametrize("merge", ["a", "a b c", "a ", "b a", "x a", ""])
def test_a_merge_is_of_two_tokens_into_one(merge):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "b c"],
    }
    metadata |= {"tokenizer.ggml.token_type": [1] * 4, "tokenizer.ggml.merges": ["a b", merge]}
    with pytest.raises(ValueError, match=f"the merge '{merge}' is not of two tokens into one"):
        from_metadata(metadata, 4)
    with pytest.raises(ValueError, match=r"is not of two|^m\.gguf: its merges do not fit its tokens \(.*\)") as error:
        load_tokenizer("m.gguf", from_metadata(metadata, 4, check_merges=False)[0])
    assert "\n" not in str(error.value)


@without_assets
def test_the_published_tokenizer_comes_back(tmp_path):
    fields = oracle.config(vocab_size=151936, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=True)
    oracle.write(tmp_path / "m", fields, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ASSETS / "qwen3-0.6b" / name, tmp_path / "m")
    write_gguf(open_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", "bf16")
    found = GGUF(tmp_path / "m.gguf")
    tokenizer, config = found.tokenizer()
    ours, theirs = (
        Tokenizer.from_str(json.dumps(tokenizer)),
        Tokenizer.from_file(str(tmp_path / "m/tokenizer.json")),
    )
    corpus = (ASSETS / "corpus/tinyshakespeare.txt").read_text()[:200_000]
    for text in (*TEXTS, corpus, "<|fim_prefix|>x<tool_response> </tool_response>\u0958\u212b"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert found.generation_config["eos_token_id"] == [151645, 151643]
    assert {key: found.generation_config[key] for key in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    assert found.metadata["tokenizer.ggml.token_type"][151657] == 4  # <tool_call>
    assert found.metadata["tokenizer.ggml.token_type"][151669:] == [5] * 267
    assert found.metadata["tokenizer.ggml.tokens"][151669] == "[PAD151669]"
    assert len(config["chat_template"].encode()) == 4168


# ---- what cannot be written ---------------------------------------------------------------------------------------


def edited(source, path: Path, file: str, change) -> Path:
    """A copy of a checkpoint with one of its JSON files changed."""
    shutil.copytree(source.path, path)
    value = json.loads((path / file).read_text())
    change(value)
    (path / file).write_text(json.dumps(value))
    return path


TOKENIZER, CONFIG = "tokenizer.json", "config.json"
LINEAR, BARE_YARN = {"rope_type": "linear"}, {"type": "yarn"}


def other_split(tokenizer: dict) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "x"}


UNWRITABLE = {
    "another split": (TOKENIZER, other_split, "splits text otherwise"),
    "no NFC": (TOKENIZER, lambda t: t.update(normalizer=None), "not byte-level BPE after NFC"),
    "not BPE": (TOKENIZER, lambda t: t["model"].update(type="Unigram"), "not byte-level BPE"),
    "no tokenizer model": (TOKENIZER, lambda t: t.pop("model"), "cannot be written as GGUF"),
    "ids beyond the embedding": (TOKENIZER, lambda t: t["added_tokens"][0].update(id=512), "512 rows"),
    "many templates": ("tokenizer_config.json", lambda t: t.update(chat_template=[]), "not one string"),
    "unknown model": (CONFIG, lambda c: c.update(model_type="llama"), "model_type 'llama'"),
    "rope of another kind": (CONFIG, lambda c: c.update(rope_scaling=LINEAR), "rope_type 'linear'"),
    "yarn without factor": (CONFIG, lambda c: c.update(rope_scaling=BARE_YARN), "needs factor"),
    "no eps": (CONFIG, lambda c: c.pop("rms_norm_eps"), "no rms_norm_eps"),
    "text for a number": (CONFIG, lambda c: c.update(hidden_size="48"), "embedding_length cannot be '48'"),
    "experts not normalised": (CONFIG, lambda c: c.update(norm_topk_prob=False), "norm_topk_prob is false"),
    "experts missing": (CONFIG, lambda c: c.update(num_experts=9), "9 whole experts"),
    "experts too many": (CONFIG, lambda c: c.update(num_experts=4), "cannot be stacked"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_gguf_cannot_hold_is_refused(checkpoints, case, tmp_path):
    file, change, line = UNWRITABLE[case]
    path = edited(checkpoints["moe"], tmp_path / "m", file, change)
    with pytest.raises(ValueError, match=line) as error:
        write_gguf(open_checkpoint(path), tmp_path / "m.gguf", "q8_0")
    assert "\n" not in str(error.value)


def test_a_value_beyond_float16_names_its_tensor(checkpoints, tmp_path):
    class Large(View):
        def read(self, name):
            values = super().read(name).clone()
            return values.fill_(3e38) if name.endswith("layers.2.mlp.up_proj.weight") else values

    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight cannot be Q4_K: .*too large"):
        write_gguf(Large(checkpoints["tied"]), tmp_path / "m.gguf", "q4_k_m")


# ---- for qwen3.c ------------------------------------------------------------------------------------------------


def test_qwen3c_finds_everything_in_its_place(checkpoints, tmp_path, monkeypatch):
    source, path = checkpoints["tied"], tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"only runs Qwen3-0\.6B, hidden_size 1024 \(here 256"):
        write_qwen3c(source, path)
    names = ("model_type", "hidden_size", "vocab_size", "rms_norm_eps")
    monkeypatch.setattr(writer, "QWEN3C_CONFIG", {name: source.config[name] for name in names})
    monkeypatch.setattr(writer, "QWEN3C_ROPE_THETA", source.config["rope_theta"])
    monkeypatch.setattr(writer, "QWEN3C_HEAD", 50016)
    write_qwen3c(source, path)
    found = GGUF(path)
    names = list(found.stored)
    layer = ["attn_k", "attn_k_norm", "attn_norm", "attn_output", "attn_q", "attn_q_norm", "attn_v"]
    layer += ["ffn_down", "ffn_gate", "ffn_norm", "ffn_up"]
    expected = ["output", "output_norm", "token_embd"] + [f"blk.{i}.{part}" for i in range(3) for part in layer]
    assert names == [f"{name}.weight" for name in expected]
    assert found.stored["output.weight"].start == 50016
    data = np.fromfile(path, np.float32, offset=50016)
    embedding, norm = source.read("model.embed_tokens.weight").flatten(), source.read("model.norm.weight")
    values = [embedding, norm, embedding]  # without gaps, as the program maps it
    assert np.array_equal(data[: 2 * 512 * 256 + 256], torch.cat(values).numpy())
    header = dict(line.split("=", 1) for line in (tmp_path / "header.txt").read_text().splitlines())
    assert header["QWEN3_BLOCK_COUNT"] == "3"
    assert header["TOKENIZER_GGML_TOKENS"] == "ARRAY_TYPE=8,ARRAY_LENGTH=512"
    assert (tmp_path / "vocab.txt").read_text().splitlines() == found.metadata["tokenizer.ggml.tokens"]
    assert (tmp_path / "merges.txt").read_text().splitlines() == found.metadata["tokenizer.ggml.merges"]
    monkeypatch.setattr(writer, "QWEN3C_HEAD", 10016)
    with pytest.raises(ValueError, match="longer than the 10016 bytes"):
        write_qwen3c(source, path)


# ---- strangers' files ---------------------------------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def info(name: str, shape=(8, 32), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def raw(pairs=(), infos=None, data=bytes(1024), version=3, counts=(None, None), magic=b"GGUF", architecture="qwen3"):
    """A file of one tensor [8, 32] F32 in 1024 bytes, or of whatever is given."""
    infos = [info("token_embd.weight")] if infos is None else infos
    pairs = [pair("general.architecture", 8, string(architecture)), *pairs]
    tensors = len(infos) if counts[0] is None else counts[0]
    keys = len(pairs) if counts[1] is None else counts[1]
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def array(key: str, kind: int, count: int, payload: bytes = b"") -> bytes:
    return pair(key, 9, struct.pack("<IQ", kind, count) + payload)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


def two(offset: int, **second) -> list[bytes]:
    return [info("token_embd.weight"), info(**({"name": "output.weight"} | second), offset=offset)]


def word(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


HUGE = 1 << 62
HOSTILE = {
    "empty": (b"", "the file is empty"),
    "another format": (raw(magic=b"PK\3\4"), "the first four bytes"),
    "version 1": (raw(version=1), "version 1 is not supported"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "only the magic": (b"GGUF", "the file ends at 4"),
    "too many tensors": (raw(counts=(HUGE, None)), f"{HUGE} tensors cannot be in {len(raw()) - 16} bytes"),
    "too many pairs": (raw(counts=(None, HUGE)), f"{HUGE} metadata pairs cannot be"),
    "more pairs than there are": (raw(counts=(None, 3)), "impossible name|cannot be|the file ends"),
    "a key that never ends": (raw([struct.pack("<Q", HUGE)]), "the file ends at"),
    "an empty key": (raw([pair("", 4, bytes(4))]), "impossible name ''"),
    "a key with control characters": (raw([pair("a\nb", 4, bytes(4))]), "impossible name"),
    "a key twice": (raw([pair("a", 4, bytes(4)), pair("a", 4, bytes(4))]), "a occurs twice"),
    "a key that is not UTF-8": (raw([string(b"\xff\xfe") + struct.pack("<II", 4, 0)]), "not UTF-8"),
    "a text that never ends": (raw([pair("a", 8, struct.pack("<Q", HUGE))]), f"needs {HUGE} bytes"),
    "a text that is not UTF-8": (raw([pair("a", 8, string(b"\xc3"))]), "a is not UTF-8"),
    "an unknown value type": (raw([pair("a", 13, bytes(8))]), "unknown value type 13"),
    "an unknown element type": (raw([array("a", 99, 1, bytes(8))]), "unknown value type 99"),
    "a boolean of 2": (raw([pair("a", 7, b"\2")]), "boolean of value 2"),
    "an array that never ends": (raw([array("a", 4, HUGE)]), f"{HUGE} values of a cannot be"),
    "texts that never end": (raw([array("a", 8, HUGE)]), f"{HUGE} values of a cannot be"),
    "arrays without end": (raw([array("a", 9, HUGE)]), f"{HUGE} values of a cannot be"),
    "arrays in arrays": (raw([pair("a", 9, nested(9))]), "nests arrays more than 3 deep"),
    "alignment 0": (raw([word("general.alignment", 0)]), "general.alignment is 0"),
    "alignment 4": (raw([word("general.alignment", 4)]), "general.alignment is 4,"),
    "alignment 2^17": (raw([word("general.alignment", 1 << 17)]), "general.alignment is 131072"),
    "alignment 48": (raw([word("general.alignment", 48)]), "general.alignment is 48"),
    "alignment 2^31": (raw([word("general.alignment", 1 << 31)]), "general.alignment is 2147483648"),
    "alignment as text": (raw([pair("general.alignment", 8, string("32"))]), "general.alignment is '32'"),
    "a tensor without a name": (raw(infos=[info("")]), "impossible name ''"),
    "a tensor's name of 65 letters": (raw(infos=[info("a" * 65)]), "impossible name"),
    "a path": (raw(infos=[info("../token_embd.weight")]), "has path parts"),
    "an absolute path": (raw(infos=[info("/etc/passwd")]), "has path parts"),
    "a path of another system": (raw(infos=[info("a\\b")]), "has path parts"),
    "a tensor twice": (raw(infos=two(1024, name="token_embd.weight"), data=bytes(2048)), "occurs twice"),
    "no dimensions": (raw(infos=[info("token_embd.weight", ())]), "0 dimensions"),
    "five dimensions": (raw(infos=[info("token_embd.weight", (1,) * 5)]), "5 dimensions"),
    "a length of 0": (raw(infos=[info("token_embd.weight", (0, 32))]), "impossible shape"),
    "a length of 2^63": (raw(infos=[info("token_embd.weight", (1 << 63, 32))]), "impossible shape"),
    "lengths whose product is large": (raw(infos=[info("token_embd.weight", (1 << 39,) * 4)]), "but the file has"),
    "an unknown tensor type": (raw(infos=[info("token_embd.weight", kind=4)]), "of type number 4, which is newer"),
    "a type that is not read": (raw(infos=[info("token_embd.weight", kind=24)]), "of type I8, whose values"),
    "half a block": (raw(infos=[info("token_embd.weight", (8, 16), kind=8)]), "not whole Q8_0 blocks of 32"),
    "an odd offset": (raw(infos=two(1025), data=bytes(2056)), "not a multiple of 32"),
    "an overlap": (raw(infos=two(992), data=bytes(2048)), "overlaps the tensor before it"),
    "a gap": (raw(infos=two(1056), data=bytes(2080)), "leaves a gap before it"),
    "an offset out of the file": (raw(infos=[info("token_embd.weight", offset=1 << 40)]), "leaves a gap"),
    "a late start": (raw(infos=[info("token_embd.weight", offset=32)], data=bytes(1056)), "leaves a gap"),
    "data too short": (raw(data=bytes(1023)), "but the file has"),
    "bytes at the end": (raw(data=bytes(1025)), "1 bytes follow the last tensor"),
    "another architecture": (raw(architecture="llama"), "general.architecture is 'llama'"),
    "no keys": (raw(), "qwen3.block_count is missing"),
    "no embedding": (raw(infos=[info("output.weight")]), "no token_embd.weight"),
    "part of a split file": (raw([pair("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts of a model"),
    "blocks that are not there": (raw([word("qwen3.block_count", 4_000_000_000)]), "block_count is 4000000000"),
    "a negative count": (
        raw([pair("qwen3.block_count", 5, struct.pack("<i", -1))]),
        "block_count is '-1', not a whole number",
    ),
    "a text for a count": (raw([pair("qwen3.block_count", 8, string("x"))]), "block_count is 'x', not a whole number"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, tmp_path):
    data, line = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=line) as error:
        GGUF(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "least"), [(4, 4), (8, 8), (9, 12)])
def test_a_count_needs_room_for_its_least_values(tmp_path, kind, least):
    path, head = tmp_path / "short.gguf", array("a", kind, 10)
    data = raw([head])
    path.write_bytes(data[: data.index(head) + len(head)] + bytes(10 * least - 1))
    with pytest.raises(ValueError, match=f"10 values of a cannot be in {10 * least - 1} bytes"):
        GGUF(path)


def test_a_sparse_file_of_a_terabyte_ends_soon(tmp_path):
    """Zeros without end could be read as texts without end; the count is refused before."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw([array("a", 8, 1 << 36)]))
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="the limit is"):
        GGUF(path)


def metadata_file(path: Path, source: Path, changes: dict) -> Path:
    """A copy of a GGUF with values of its metadata exchanged for others of the same length in bytes."""
    data = source.read_bytes()
    for old, new in changes.items():
        assert len(old) == len(new) and data.count(old) >= 1
        data = data.replace(old, new, 1)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("block_count", 4, "block_count is 4, but the file has the tensors of 3 blocks"),
        ("attention.head_count", 0, "head_count is 0"),
        ("attention.value_length", 15, "value_length is not the key_length 16"),
    ],
)
def test_keys_that_the_tensors_contradict(small_file, tmp_path, key, value, line):
    old = word(f"qwen3.{key}", GGUF(small_file).metadata[f"qwen3.{key}"])
    with pytest.raises(ValueError, match=line):
        GGUF(metadata_file(tmp_path / "changed.gguf", small_file, {old: word(f"qwen3.{key}", value)}))


def test_tokenizers_that_do_not_agree(small_file, tmp_path):
    found = GGUF(small_file).metadata
    eos = pair("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", found["tokenizer.ggml.eos_token_id"]))
    kinds = struct.pack("<IQ5i", 5, 512, 1, 1, 1, 1, 1)
    merge = found["tokenizer.ggml.merges"][0]
    cases = [
        ({string("gpt2"): string("bert")}, "tokenizer.ggml.model is 'bert'"),
        ({string("qwen2"): string("llama")}, "tokenizer.ggml.pre is 'llama'"),
        ({string("!"): string("#")}, "holds a token twice"),
        ({eos: eos[:-4] + struct.pack("<I", 512)}, "eos_token_id is 512, but there are 512 tokens"),
        ({kinds: kinds[:-4] + struct.pack("<i", 6)}, "token_type does not fit"),
        ({string(merge): string(merge.replace(" ", "!", 1))}, "is not of two tokens into one"),
    ]
    for changes, line in cases:
        with pytest.raises(ValueError, match=line):
            GGUF(metadata_file(tmp_path / "changed.gguf", small_file, changes)).tokenizer()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(small_file, tmp_path_factory, data):
    """Whatever happened to the bytes: the checkpoint opens and gives tensors of the stated shapes, or a ValueError."""
    content = bytearray(small_file.read_bytes())
    head = GGUF(small_file).stored["token_embd.weight"].start if data.draw(st.booleans()) else 400
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, head - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        found = GGUF(path)
        found.tokenizer()
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    for name, (dtype, shape) in found.tensors.items():
        values = found.read(name)
        assert (values.dtype, tuple(values.shape)) == (dtype, shape)


def test_a_header_is_parsed_once_for_two_openings_that_share_no_memory(small_file, monkeypatch):
    parsed = []
    monkeypatch.setattr(reader, "_last", {})
    monkeypatch.setattr(reader.Head, "read_alignment", lambda head: parsed.append(head.path) or 32)
    first, second = GGUF(small_file), GGUF(small_file)
    assert len(parsed) == 1 and first.metadata == second.metadata
    a, b = (checkpoint.read("model.norm.weight") for checkpoint in (first, second))
    assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
