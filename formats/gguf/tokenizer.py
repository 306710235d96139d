"""Qwen's byte-level BPE tokenizer, from Hugging Face's two JSON files into GGUF's `tokenizer.*` keys and back.

GGUF stores the tokens, their types and the merges; how text is normalised and split is only a name, "qwen2" (here
`PRE`), which means the regular expression `SPLIT` of the official tokenizer.json. Nothing says that
Qwen applies Unicode's NFC first; llama.cpp does not, Hugging Face does, and so does the tokenizer made here. Relatives
of Qwen (DeepSeek's distillations, …) go by other names that llama.cpp takes for the same expression.
"""

from typing import Any

MODEL, PRE = "gpt2", "qwen2"
SAME_SPLIT = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")  # llama.cpp's src/llama-vocab.cpp
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _list(metadata: dict, key: str, kind: type) -> list:
    values = metadata.get(key)
    if not isinstance(values, list) or not set(map(type, values)) <= {kind}:
        raise ValueError(f"the metadata key {key} is not a list of {kind.__name__} (give a GGUF with its tokenizer)")
    return values


def _byte_level(**extra: Any) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False, **extra}


def from_metadata(metadata: dict, rows: int, check_merges: bool = True) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json) from GGUF keys; ValueError where they are not Qwen's or do not agree.

    `rows`: of the embedding, the most tokens that there can be. `check_merges`: whether their tokens are looked up,
    0.1 s, which load_tokenizer does by itself.
    """
    for key, known in (("tokenizer.ggml.model", (MODEL,)), ("tokenizer.ggml.pre", SAME_SPLIT)):
        if metadata.get(key) not in known:
            found = str(metadata.get(key))[:40]
            raise ValueError(f"{key} is {found!r} (only Qwen's tokenizer is read: {', '.join(known)})")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(tokens) > rows:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, but the embedding {rows} rows")
    if len(types) != len(tokens) or not set(types) <= {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise ValueError(f"tokenizer.ggml.token_type does not fit the {len(tokens)} tokens (convert the file again)")
    others = {id: kind for id, kind in enumerate(types) if kind != NORMAL}
    vocabulary = {token: id for id, token in enumerate(tokens) if id not in others}
    if len(vocabulary) + len({tokens[id] for id in others} - vocabulary.keys()) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice (convert the file again)")

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": tokens[id], **flags, "special": kind == CONTROL}
        for id, kind in others.items()
        if kind != UNUSED
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
        "post_processor": _post_processor(metadata, tokens),
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
            "merges": _merges(_list(metadata, "tokenizer.ggml.merges", str), vocabulary, check_merges),
        },
    }
    return tokenizer, _tokenizer_config(metadata, tokens, added)


def _post_processor(metadata: dict, tokens: list[str]) -> dict:
    """What is added around every text: nothing, or the tokens that an embedding model needs there."""
    around = {
        name: _special(metadata, tokens, name) if metadata.get(f"tokenizer.ggml.add_{name}_token") is True else None
        for name in ("bos", "eos")
    }
    if not any(around.values()):
        return _byte_level()
    before, after = ([{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in around.values())
    ids = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in around.values() if token}
    template = {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [*before, *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"), *after],
        "special_tokens": ids,
    }
    return {"type": "Sequence", "processors": [_byte_level(), template]}


def _special(metadata: dict, tokens: list[str], name: str) -> str | None:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id is None:
        return None
    if type(id) is not int or not 0 <= id < len(tokens):
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {str(id)[:40]}, but there are {len(tokens)} tokens")
    return tokens[id]


def _merges(lines: list[str], vocabulary: dict[str, int], check: bool) -> list[tuple[str, ...]]:
    """The pairs of the merges, which GGUF stores as `Ġ t`."""
    pairs = [tuple(line.split(" ")) for line in lines]
    if check or not set(map(len, pairs)) <= {2}:
        for pair in pairs:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
                merge = " ".join(pair)
                raise ValueError(f"the merge {merge[:80]!r} is not of two tokens into one (convert it again)")
    return pairs


def _tokenizer_config(metadata: dict, tokens: list[str], added: list[dict]) -> dict:
    def special(name: str) -> str | None:
        return _special(metadata, tokens, name)

    add_bos = metadata.get("tokenizer.ggml.add_bos_token") is True
    config = {
        "add_bos_token": add_bos,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "bos_token": special("bos") if add_bos else None,  # Qwen has none, though its config.json names an id
        "clean_up_tokenization_spaces": False,
        "eos_token": special("eot") or special("eos"),  # "eot" is where llama.cpp keeps it when texts end otherwise
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

    `rows`: of the embedding; ids without a token are filled up to it. ValueError where the tokenizer is not
    Qwen's, as GGUF could not express how it splits text.
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
    before, after = _around(tokenizer.get("post_processor") or {})
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
        **_special_ids(tokenizer, tokenizer_config, config, before, after),
        "tokenizer.ggml.add_bos_token": before is not None,
        "tokenizer.ggml.add_eos_token": after is not None,
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


def _around(post_processor: dict) -> tuple[str | None, str | None]:
    """The tokens that are added before and after every text. ValueError for what GGUF can't express."""
    before = after = None
    for step in post_processor.get("processors", [post_processor] if post_processor else []):
        if step.get("type") == "ByteLevel":
            continue
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        names = [piece.get("SpecialToken", {}).get("id") for piece in single or []]
        place = names.index(None) if names.count(None) == 1 else -1  # of the text itself
        if place not in (0, 1) or len(names) > place + 2:
            raise ValueError("its post_processor does more than to put a token before or after every text")
        before, after = ([*names[:place], None][0], [*names[place + 1 :], None][0])
    return before, after


def _special_ids(
    tokenizer: dict, tokenizer_config: dict, config: dict, before: str | None, after: str | None
) -> dict[str, int]:
    """The ids of eos, padding and so on: those that the tokenizer names, then those that only config.json has.

    Where every text is followed by another token than eos (Qwen3-Embedding), llama.cpp calls that one eos and eos eot.
    """
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
    for name, token in (("bos", before), ("eos", after)):
        if token is not None and token not in ids:
            raise ValueError(f"its post_processor adds {token!r}, which is no added token")
        if token is not None and found.get(name) != ids[token]:
            found |= {"eot": found["eos"]} if name == "eos" and "eos" in found else {}
            found[name] = ids[token]
    return {f"tokenizer.ggml.{SPECIAL.get(name, name)}_token_id": id for name, id in found.items()}
