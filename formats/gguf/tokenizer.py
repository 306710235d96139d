"""Qwen's byte-level BPE tokenizer, from Hugging Face's two JSON files into GGUF's `tokenizer.*` keys and back.

GGUF stores the tokens, their types and the merges; how text is normalised and split is only a name, "qwen2" (here
`PRE`), which stands for the regular expression `SPLIT` of the official tokenizer.json. Not even the name says that
Qwen applies Unicode's NFC first; llama.cpp does not, Hugging Face does, and so does the tokenizer made here.
"""

from typing import Any

MODEL, PRE = "gpt2", "qwen2"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _list(metadata: dict, key: str, kind: type) -> list:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"the metadata key {key} is not a list of {kind.__name__} (give a GGUF with its tokenizer)")
    return values


def _byte_level(**extra: Any) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False, **extra}


def from_metadata(metadata: dict, rows: int) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json) from GGUF keys; ValueError where they are not Qwen's or do not agree.

    `rows`: of the embedding, the most tokens that there can be.
    """
    for key, expected in (("tokenizer.ggml.model", MODEL), ("tokenizer.ggml.pre", PRE)):
        if metadata.get(key) != expected:
            raise ValueError(f"{key} is {str(metadata.get(key))[:40]!r} (only Qwen's tokenizer, {expected}, is read)")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(tokens) > rows:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, but the embedding {rows} rows")
    if len(types) != len(tokens) or not set(types) <= {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise ValueError(f"tokenizer.ggml.token_type does not fit the {len(tokens)} tokens (convert the file again)")
    if len(set(tokens)) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice (convert the file again)")

    vocabulary = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": token, **flags, "special": kind == CONTROL}
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                _byte_level(),
            ],
        },
        "post_processor": _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(_list(metadata, "tokenizer.ggml.merges", str), vocabulary),
        },
    }
    return tokenizer, _tokenizer_config(metadata, tokens, added)


def _merges(lines: list[str], vocabulary: dict[str, int]) -> list[list[str]]:
    merges = [line.split(" ") for line in lines]
    for merge in merges:
        if len(merge) != 2 or not all(part in vocabulary for part in (*merge, "".join(merge))):
            raise ValueError(f"the merge {' '.join(merge)[:80]!r} is not of two tokens into one (convert it again)")
    return merges


def _tokenizer_config(metadata: dict, tokens: list[str], added: list[dict]) -> dict:
    def special(name: str) -> str | None:
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is None:
            return None
        if type(id) is not int or not 0 <= id < len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id is {str(id)[:40]}, but there are {len(tokens)} tokens")
        return tokens[id]

    add_bos = metadata.get("tokenizer.ggml.add_bos_token") is True
    config = {
        "add_bos_token": add_bos,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "bos_token": special("bos") if add_bos else None,  # Qwen has none, though its config.json names an id
        "clean_up_tokenization_spaces": False,
        "eos_token": special("eos"),
        "pad_token": special("padding"),
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("tokenizer.chat_template is not a string (convert the file again)")
    return config | ({} if template is None else {"chat_template": template})


# ---- and back --------------------------------------------------------------------------------------------------------

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def to_metadata(tokenizer: dict, tokenizer_config: dict, config: dict, rows: int) -> dict[str, Any]:
    """GGUF's `tokenizer.*` keys from the contents of tokenizer.json, tokenizer_config.json and config.json.

    `rows`: of the embedding; ids without a token are filled up to it. ValueError where the tokenizer is another than
    Qwen's, whose way to split text GGUF could not say.
    """
    model = tokenizer["model"]
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (tokenizer.get("normalizer") or {}) != {"type": "NFC"}
    ):
        raise ValueError("it is not byte-level BPE after NFC")
    steps = tokenizer["pre_tokenizer"].get("pretokenizers", [])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"] or steps[0]["pattern"] != {"Regex": SPLIT}:
        raise ValueError("it splits text otherwise than Qwen's")
    if (tokenizer.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        raise ValueError("it adds tokens to every text (a post_processor), which no chat tokenizer of Qwen does")
    tokens, types = _tokens(tokenizer, tokenizer_config, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    template = tokenizer_config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError("its chat_template is not one string")
    return {
        "tokenizer.ggml.model": MODEL,
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **_special_ids(tokenizer, tokenizer_config, config),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        **({} if template is None else {"tokenizer.chat_template": template}),
    }


def _tokens(tokenizer: dict, tokenizer_config: dict, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every id. Added tokens are CONTROL where they are special or look like <|this|>."""
    by_id = {id: (token, NORMAL) for token, id in tokenizer["model"]["vocab"].items()}
    configured = {int(id): token for id, token in tokenizer_config.get("added_tokens_decoder", {}).items()}
    for token in tokenizer["added_tokens"]:
        text = token["content"]
        special = configured.get(token["id"], token).get("special") or (text.startswith("<|") and text.endswith("|>"))
        by_id[token["id"]] = text, CONTROL if special else USER_DEFINED
    if not by_id or min(by_id) < 0 or max(by_id) >= rows:
        raise ValueError(f"its ids do not fit the {rows} rows of the embedding")
    filled = [by_id.get(id, (f"[PAD{id}]", UNUSED)) for id in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _special_ids(tokenizer: dict, tokenizer_config: dict, config: dict) -> dict[str, int]:
    """The ids of eos, padding and so on: those that the tokenizer names, then those that only config.json has."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    found = {}
    for name in SPECIAL:
        token = tokenizer_config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[name] = ids[token]
    for name in SPECIAL:
        id = config.get(f"{name}_token_id")
        if type(id) is int and id >= 0:
            found.setdefault(name, id)
    return {f"tokenizer.ggml.{SPECIAL[name]}_token_id": id for name, id in found.items()}
