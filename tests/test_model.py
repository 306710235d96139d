"""model.py against transformers: every published config cut down, and shapes that nobody published."""

import copy
import json
import os
from pathlib import Path

import oracle
import pytest
import torch
import transformers

from model import Config, KVCache, Qwen3, RMSNorm, rope_frequencies

ASSETS = os.environ.get("NANOQWEN_ASSETS")
PUBLISHED = sorted(Path(ASSETS, "configs").glob("*.config.json")) if ASSETS else []
PUBLISHED = [path for path in PUBLISHED if "model_type" in json.loads(path.read_text())]
TOLERANCE = 1e-5  # of the largest logit

SHAPES = {
    "head_dim is not hidden / heads": oracle.config(head_dim=24),
    "one key head": oracle.config(num_attention_heads=6, num_key_value_heads=1, hidden_size=50),
    "as many key heads": oracle.config(num_key_value_heads=4, tie_word_embeddings=True),
    "attention bias": oracle.config(attention_bias=True),
    "odd sizes": oracle.config(hidden_size=37, intermediate_size=61, vocab_size=101, head_dim=10),
    "moe": oracle.config(**oracle.MOE),
    "moe with dense layers": oracle.config(**oracle.MOE | {"decoder_sparse_step": 2}, num_hidden_layers=4),
    "moe with mlp_only": oracle.config(**oracle.MOE | {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "yarn": oracle.config(rope_scaling=oracle.YARN),
    "yarn with its other fields": oracle.config(
        rope_scaling=oracle.YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
    ),
    "qwen2": oracle.config(**oracle.QWEN2),
    "qwen2 tied": oracle.config(**oracle.QWEN2, tie_word_embeddings=True, num_key_value_heads=1),
}


def cut_down(path: Path) -> dict:
    """A published config with a 32nd of its widths and 3 layers; head counts and odd ratios stay."""
    fields = json.loads(path.read_text())
    fields |= {name: fields[name] // 32 for name in ("hidden_size", "intermediate_size")}
    if "num_experts" in fields:
        fields |= {"moe_intermediate_size": fields["moe_intermediate_size"] // 32}
    return fields | {"num_hidden_layers": 3, "head_dim": 32, "vocab_size": 997, "eos_token_id": 2, "bos_token_id": 1}


def both(tmp_path: Path, fields: dict, **options):
    reference = oracle.write(tmp_path / "checkpoint", fields, **options)
    return reference, Qwen3.from_pretrained(tmp_path / "checkpoint")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < TOLERANCE, f"{error:.2e} of the largest logit"


@pytest.mark.skipif(not ASSETS, reason="NANOQWEN_ASSETS is not set: the published configs are not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name.removesuffix(".config.json"))
@torch.inference_mode()
def test_published_configs_have_transformers_logits(path, tmp_path):
    reference, model = both(tmp_path, cut_down(path))
    ids = torch.randint(0, 997, (2, 33), generator=torch.Generator().manual_seed(1))
    assert_close(model(ids), reference(ids).logits)
    assert_close(in_steps(model, ids, (20, 1, 5, 1, 1, 5)), model(ids))


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
@torch.inference_mode()
def test_other_shapes_have_transformers_logits(fields, tmp_path):
    reference, model = both(tmp_path, fields)
    ids = torch.randint(0, fields["vocab_size"], (2, 150), generator=torch.Generator().manual_seed(1))
    plain = model(ids)
    assert_close(plain, reference(ids).logits)
    # Sums in another order: over 150 positions float32 itself, transformers' included, is 1.5e-5 from the exact logits.
    exact, cached = copy.deepcopy(model).double()(ids), in_steps(model, ids, (99, 1, 49, 1))
    for logits in (plain, cached):
        assert (logits - exact).abs().max() / exact.abs().max() < 2e-5


@pytest.mark.parametrize("name", ["one key head", "moe", "yarn", "qwen2"])
@torch.inference_mode()
def test_a_ragged_batch_gives_what_each_row_gives_alone(name, tmp_path):
    oracle.write(tmp_path, SHAPES[name])
    model = Qwen3.from_pretrained(tmp_path)
    rows = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 7, 1, 23)]
    cache = KVCache(model.config, len(rows), 64)
    for tensor in cache.keys + cache.values:
        assert not tensor.any(), "what was never written must not be NaN, since rows of other lengths look at it"
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits = model(padded, cache)
    cache.truncate([len(row) for row in rows])
    for row, ids in enumerate(rows):
        assert_close(logits[row, : len(ids)], model(ids[None])[0])
    more = torch.randint(0, 300, (len(rows), 6), generator=torch.Generator().manual_seed(9))
    together = torch.cat([model(more[:, :1], cache), model(more[:, 1:4], cache), model(more[:, 4:], cache)], 1)
    for row, ids in enumerate(rows):
        alone = model(torch.cat((ids, more[row]))[None])[0, len(ids) :]
        assert_close(together[row], alone)
    one = cache.row(1)
    assert_close(model(more[1:2, :1], one)[0, 0], model(torch.cat((rows[1], more[1], more[1, :1]))[None])[0, -1])


@pytest.mark.parametrize("name", ["head_dim is not hidden / heads", "moe", "qwen2 tied"])
@torch.inference_mode()
def test_64_greedy_tokens_are_those_of_transformers(name, tmp_path):
    reference, model = both(tmp_path, SHAPES[name])
    ids = [5, 17, 101, 3, 77]
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    theirs = reference.generate(torch.tensor([ids]), **options)[0, 5:].tolist()
    cache, ours = KVCache(model.config, 1, 80), []
    logits = model(torch.tensor([ids]), cache)
    for _ in range(64):
        logits[..., 2] = -torch.inf  # the end token, which min_new_tokens forbids
        ours.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[ours[-1]]]), cache)
    assert ours == theirs


@pytest.mark.parametrize("size", [7, 33, 128, 1024])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_rms_norm_in_bfloat16_is_equal_to_the_bit(size, scale):
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(50, size, generator=generator) * scale).bfloat16()
    theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(size, eps=1e-6).bfloat16()
    theirs.weight.data = (1 + 2 * torch.randn(size, generator=generator)).bfloat16()
    ours = RMSNorm(size, 1e-6).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_is_as_close_to_float32_as_transformers(dtype, tmp_path):
    reference, model = both(tmp_path, oracle.config(), dtype=dtype)
    ids = torch.arange(60)[None]
    exact = oracle_in_float32(tmp_path / "checkpoint", ids)
    theirs, ours = reference(ids).logits.float(), model(ids).float()
    assert model(ids).dtype == dtype
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def oracle_in_float32(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits


def in_steps(model: Qwen3, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Logits of ids that go through a cache in pieces; what is left goes in one by one."""
    cache, out, start = KVCache(model.config, len(ids), ids.shape[1]), [], 0
    for length in (*lengths, *[1] * (ids.shape[1] - sum(lengths))):
        out.append(model(ids[:, start : start + length], cache))
        start += length
    return torch.cat(out, 1)


@torch.inference_mode()
def test_the_cache_grows_forgets_and_refuses_to_overflow(tmp_path):
    oracle.write(tmp_path, oracle.config())
    model = Qwen3.from_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    cache = KVCache(model.config, 1, 20)
    model(ids[:, :18], cache)
    with pytest.raises(ValueError, match="20 positions"):
        model(ids[:, 18:22], cache)
    cache.truncate(10)
    cache.grow(40)
    assert_close(model(ids[:, 10:], cache), model(ids)[:, 10:])
    with pytest.raises(ValueError, match="context is 512"):
        KVCache(model.config, 1, 513)


# ---- configs ----


@pytest.mark.parametrize("nested", [False, True])
def test_both_spellings_of_the_rotary_settings_load(nested):
    flat = oracle.config(rope_theta=5e5, rope_scaling=oracle.YARN)
    fields = dict(flat)
    if nested:
        fields["rope_parameters"] = {"rope_theta": fields.pop("rope_theta"), **fields.pop("rope_scaling")}
        fields["dtype"] = fields.pop("torch_dtype")
    config = Config(**fields)
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (5e5, oracle.YARN, "float32")
    theirs, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](transformers.Qwen3Config(**flat))
    ours, our_factor = rope_frequencies(config)
    assert torch.equal(ours, theirs) and our_factor == pytest.approx(factor)


@pytest.mark.skipif(not ASSETS, reason="NANOQWEN_ASSETS is not set: the published configs are not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name.removesuffix(".config.json"))
def test_published_configs_survive_a_round_trip(path, tmp_path):
    config = Config.from_json(path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert Config.from_json(tmp_path / "config.json") == config
    theirs, again = (transformers.AutoConfig.from_pretrained(p) for p in (path, tmp_path))
    drop = ("transformers_version", "_name_or_path")
    left, right = ({k: v for k, v in c.to_dict().items() if k not in drop} for c in (theirs, again))
    assert left == right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not implemented"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not implemented"),
        ({"rope_scaling": oracle.YARN | {"mscale": 0.7}}, "mscale"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding-window"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding-window"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**oracle.config(**changes))


DEFAULT_ROPE = {"rope_type": "default"}
CONTRADICTIONS = {
    "nested default beside yarn": ({"rope_parameters": DEFAULT_ROPE, "rope_scaling": oracle.YARN}, "rope_parameters"),
    "flat default beside yarn": ({"rope_scaling": DEFAULT_ROPE, "rope_parameters": oracle.YARN}, "rope_parameters"),
    "two factors": ({"rope_parameters": oracle.YARN | {"factor": 2.0}, "rope_scaling": oracle.YARN}, "rope_parameters"),
    "two thetas": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0, but rope_parameters.rope_theta"),
    "theta inside": ({"rope_scaling": oracle.YARN | {"rope_theta": 7.0}}, "rope_scaling.rope_theta is 7.0"),
    "two types": ({"rope_scaling": oracle.YARN | {"type": "linear"}}, "rope_scaling.type is 'linear'"),
    "two dtypes": ({"dtype": "bfloat16"}, "torch_dtype is 'float32', but dtype is 'bfloat16'"),
    "two contexts": (
        {"rope_scaling": oracle.YARN, "original_max_position_embeddings": 64},
        "is 64, but rope_scaling.o",
    ),
    "a factor alone": ({"rope_scaling": {"factor": 4.0}}, "no rope_type"),
    "by kind of layer": ({"rope_parameters": {"full_attention": oracle.YARN}}, "full_attention"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_and_both_sides_named(name):
    changes, words = CONTRADICTIONS[name]
    with pytest.raises(ValueError) as error:
        Config.from_dict(oracle.config(**changes))
    assert words in str(error.value), error.value


def test_two_spellings_that_agree_are_one():
    outside = oracle.config(rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=32)
    assert Config.from_dict(outside).rope_scaling == oracle.YARN  # as transformers reads it
    assert Config.from_dict(oracle.config(torch_dtype="torch.bfloat16")).dtype == "bfloat16"
    older = {"type": "yarn", **{key: value for key, value in oracle.YARN.items() if key != "rope_type"}}
    both = {"rope_scaling": older, "rope_parameters": oracle.YARN | {"rope_theta": 10000, "attention_factor": None}}
    assert Config(**oracle.config(**both)) == Config(**oracle.config(rope_scaling=oracle.YARN))
    plain = Config(**oracle.config(rope_parameters={"rope_theta": 10000.0}, rope_scaling=oracle.YARN))
    assert plain.rope_scaling == oracle.YARN


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("hiden_size", "hidden_size"), ("rope_tetha", "rope_theta"), ("num_attn_heads", "num_attention_heads")],
)
def test_a_misspelt_field_is_refused_by_hand_and_kept_from_a_file(wrong, right, tmp_path):
    fields = oracle.config() | {wrong: 7}
    with pytest.raises(ValueError, match=f"'{wrong}'; did you mean {right}"):
        Config(**fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = Config.from_json(tmp_path / "config.json")
    assert config.other[wrong] == 7 and config.to_dict()[wrong] == 7


@pytest.mark.skipif(not ASSETS, reason="NANOQWEN_ASSETS is not set: the published configs are not here")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name.removesuffix(".config.json"))
def test_the_fields_of_a_published_config_are_taken_by_hand(path):
    fields = json.loads(path.read_text())
    assert Config(**fields) == Config.from_json(path)
    assert Config(**transformers.AutoConfig.for_model(**fields).to_dict()) == Config(**fields)


TRANSFORMERS_4 = {  # what PreTrainedConfig.to_dict() of 4.57.1 holds besides the fields of transformers 5
    **{"torchscript": False, "pruned_heads": {}, "is_decoder": False, "cross_attention_hidden_size": None},
    **{"add_cross_attention": False, "tie_encoder_decoder": False, "finetuning_task": None, "prefix": None},
    **{"task_specific_params": None, "tokenizer_class": None, "sep_token_id": None, "decoder_start_token_id": None},
    **{"tf_legacy_loss": False, "use_bfloat16": False, "max_length": 20, "min_length": 0, "do_sample": False},
    **{"early_stopping": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None},
    **{"encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "output_scores": False},
    **{"return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None},
    **{"remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None},
    **{"begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0},
}


@pytest.mark.parametrize("kind", ["Qwen3Config", "Qwen2Config", "Qwen3MoeConfig"])
def test_the_fields_of_transformers_own_configs_are_taken_by_hand(kind):
    for fields in ({}, {"output_attentions": True, "num_labels": 3, "use_cache": False, "torch_dtype": "bfloat16"}):
        given = getattr(transformers, kind)(**fields).to_dict()
        config = Config(**given)
        assert (config.hidden_size, config.num_hidden_layers) == (given["hidden_size"], given["num_hidden_layers"])
        assert Config(**given | TRANSFORMERS_4) == config


def test_yarn_raises_the_context():
    """vLLM: max_model_len = original_max_position_embeddings * factor."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = Config(**oracle.config(max_position_embeddings=40960, rope_scaling=yarn))
    assert config.context_length == 131072 and config.max_position_embeddings == 40960
    KVCache(config, 1, 131072, device="meta")
    with pytest.raises(ValueError, match="context is 131,072"):
        KVCache(config, 1, 131073, device="meta")
    assert Config(**oracle.config()).context_length == 512
    with pytest.raises(ValueError, match="yarn's factor asks for"):
        Config(**oracle.config(rope_scaling=yarn | {"factor": 1e6}))


# ---- loading and saving ----


def test_shards_load_like_one_file_and_our_save_opens_in_transformers(tmp_path):
    reference = oracle.write(tmp_path / "sharded", oracle.config(**oracle.MOE), max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    model = Qwen3.from_pretrained(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "ours")
    ids = torch.arange(20)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.inference_mode():
        assert_close(model(ids), reference(ids).logits)
        assert torch.equal(again(ids).logits, reference(ids).logits)
        assert torch.equal(Qwen3.from_pretrained(tmp_path / "ours")(ids), model(ids))


def test_a_redundant_head_is_compared_and_shared(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    reference = oracle.write(tmp_path, oracle.config(tie_word_embeddings=True))
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert_close(Qwen3.from_pretrained(tmp_path)(ids), reference(ids).logits)
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors")
    model = Qwen3.from_pretrained(tmp_path)
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert_close(model(ids), theirs(ids).logits)
        model.save_pretrained(tmp_path / "again")
        assert_close(Qwen3.from_pretrained(tmp_path / "again")(ids), theirs(ids).logits)
    del weights["model.embed_tokens.weight"]  # the head alone is both, as in transformers
    save_file(weights, tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert_close(
            Qwen3.from_pretrained(tmp_path)(ids),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits,
        )


def test_all_defects_of_a_checkpoint_are_listed_together(tmp_path):
    from safetensors.torch import load_file, save_file

    oracle.write(tmp_path, oracle.config())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.extra.weight"] = torch.zeros(3)
    weights["model.norm.weight"] = torch.zeros(7)
    weights["lm_head.weight"][5, 5] = torch.nan
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = -torch.inf
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Qwen3.from_pretrained(tmp_path)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight",
        "unexpected: model.extra.weight",
        "mis-shaped: model.norm.weight [7] instead of [48]",
        "non-finite: lm_head.weight, model.layers.0.mlp.up_proj.weight",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_loading_converts_to_the_asked_dtype_and_leaves_the_file_alone(tmp_path):
    oracle.write(tmp_path, oracle.config(), dtype=torch.bfloat16)
    before = (tmp_path / "model.safetensors").read_bytes()
    stored, widened = Qwen3.from_pretrained(tmp_path), Qwen3.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in stored.parameters():
            parameter.zero_()  # the file is mapped copy-on-write
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_random_model_trains(tmp_path):
    """The gradient reaches every parameter, and one step lowers the loss."""
    torch.manual_seed(0)
    model = Qwen3(Config(**oracle.config(**oracle.MOE | {"num_experts_per_tok": 8})))
    ids = torch.randint(0, 331, (4, 20))

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = loss()
    first.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    optimizer.step()
    assert loss() < first


@pytest.mark.skipif(
    "NANOQWEN_MODEL" not in os.environ, reason="NANOQWEN_MODEL does not name real Qwen3-0.6B-Base weights"
)
@torch.inference_mode()
def test_the_real_base_model_gives_the_published_logits():
    expected = json.loads(Path(ASSETS, "expected_outputs.json").read_text())["qwen3_0.6b_base_logits_fp32"]
    model = Qwen3.from_pretrained(os.environ["NANOQWEN_MODEL"], dtype=torch.float32)
    logits = model(torch.tensor([expected["input_ids"]]))[0]
    assert torch.allclose(logits.mean(-1), torch.tensor(expected["logits_mean_over_vocab"]), atol=1e-4, rtol=1e-4)
    assert torch.allclose(logits[0, :30], torch.tensor(expected["logits_0_0_first30"]), atol=1e-4, rtol=1e-4)


def test_a_dtype_or_device_that_no_model_can_have(tmp_path):
    oracle.write(tmp_path, oracle.config())
    assert Qwen3.from_pretrained(tmp_path, dtype="bfloat16").lm_head.weight.dtype == torch.bfloat16
    for dtype in ("int3", torch.int8, torch.float8_e4m3fn):  # int8 would cut every weight to a whole number
        with pytest.raises(ValueError, match="the model computes in float32"):
            Qwen3.from_pretrained(tmp_path, dtype=dtype)
    for device in ("tpu", None, 3.0):
        with pytest.raises(ValueError, match="give cpu, cuda or mps"):
            Qwen3.from_pretrained(tmp_path, device=device)
