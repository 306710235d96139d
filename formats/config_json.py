"""The spellings of config.json: published files, transformers 4 and transformers 5 name some fields differently."""

from typing import Any

ORIGINAL = "original_max_position_embeddings"

# Fields of published files and of transformers' own configs that do not affect the result.
KEPT_FIELDS = (
    *("architectures", "torch_dtype", "rope_parameters", "num_local_experts", "transformers_version", "use_cache"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_dropout", "auto_map"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing"),
    *("id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("is_decoder", "pretraining_tp", "name_or_path", "task_specific_params", "tokenizer_class", "classifier_dropout"),
    *("qkv_bias", "mlp_bias", "shared_expert_intermediate_size", "use_qk_norm", "model_name", "unsloth_fixed"),
    *("unsloth_version", "quantization", "sep_token_id", "decoder_start_token_id", "add_cross_attention"),
    # to_dict() of transformers 4 has these too: a generation_config.json's and those of other architectures
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "suppress_tokens"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "torchscript"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens", "cross_attention_hidden_size", "pruned_heads"),
    *("tie_encoder_decoder", "finetuning_task", "prefix", "tf_legacy_loss", "use_bfloat16"),
)
# Other names of the same; None: nothing is stated that the weights don't say themselves.
DTYPE_SPELLINGS = {"auto": None, "float8_e4m3fn": None, "float8_e5m2": None, "float": "float32", "double": "float64"}
DTYPE_SPELLINGS |= {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def published_spelling(given: dict[str, Any]) -> dict[str, Any]:
    """The fields as the published files spell them, where transformers 5 writes others (nested rope, renamed names).

    ValueError where a file has both spellings and they disagree: there is no telling which one was meant.
    """
    given = dict(given)
    for name in ("torch_dtype", "dtype"):
        if isinstance(dtype := given.get(name), str):
            dtype = dtype.removeprefix("torch.")  # as str(torch.bfloat16) has it
            given[name] = DTYPE_SPELLINGS.get(dtype, dtype)
    if given.get("hidden_act") == "swish":
        given["hidden_act"] = "silu"
    for new, old in (("num_local_experts", "num_experts"), ("torch_dtype", "dtype")):
        if (value := given.pop(new, None)) is not None:
            given[old] = agreed({new: value, old: given.get(old)})
    flat, nested = (_rope_settings(name, given.get(name)) for name in ("rope_scaling", "rope_parameters"))
    given.pop("rope_parameters", None)
    thetas = {"rope_theta": given.get("rope_theta"), "rope_scaling.rope_theta": flat.get("rope_theta")}
    given["rope_theta"] = agreed(thetas | {"rope_parameters.rope_theta": nested.get("rope_theta")})
    stated = {name: _scaling(settings) for name, settings in (("rope_scaling", flat), ("rope_parameters", nested))}
    scaling = agreed({name: value or None for name, value in stated.items()})
    if rope_type(scaling or {}) == "default":
        scaling = None
    elif (
        trained := given.pop(ORIGINAL, None)
    ) is not None:  # beside the settings, where Phi-3 and transformers keep it
        stated = {ORIGINAL: trained, f"rope_scaling.{ORIGINAL}": scaling.get(ORIGINAL)}
        scaling = scaling | {ORIGINAL: agreed(stated)}
    given["rope_scaling"] = scaling
    return given


def agreed(values: dict[str, Any]) -> Any:
    """The one value that all spellings of a field state; None states nothing."""
    stated = {name: value for name, value in values.items() if value is not None}
    (first, value), *others = stated.items() or [("", None)]
    for name, other in others:
        if other != value:
            raise ValueError(f"config: {first} is {value!r}, but {name} is {other!r}; remove the one that is wrong")
    return value


def _rope_settings(name: str, settings: Any) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"config: {name} is {settings!r}, which is neither null nor an object {{...}}")
    for key, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(f"config: {name} has separate settings for {key}; only one for all layers is implemented")
    kind = agreed({f"{name}.{key}": settings.get(key) for key in ("rope_type", "type")})
    if kind is None and settings.get("factor") is not None:
        raise ValueError(f"config: {name} has a factor but no rope_type; the Qwen family uses yarn")
    return settings


def _scaling(settings: dict[str, Any]) -> dict[str, Any]:
    """The scaling part of rope settings: without theta, and the type under its newer name."""
    stated = {name: value for name, value in settings.items() if value is not None}
    scaling = {name: value for name, value in stated.items() if name not in ("rope_theta", "type")}
    return scaling | ({"rope_type": stated["type"]} if "type" in stated else {})


def rope_type(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type", "default")
