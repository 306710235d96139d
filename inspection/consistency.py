"""Whether the files of a model agree: config, generation config, tokenizer and template on tokens and ends of turns."""

import json
import re
from functools import lru_cache
from typing import Any

from formats.gguf.reader import Head
from formats.template import TemplateSandbox
from inspection import official, templates, weights
from inspection.contents import MAX_JSON
from inspection.findings import Ledger, Unexamined
from inspection.tokenizer_trial import problem_of
from inspection.tree import Tree
from model import Config, check_end_tokens

TURN_ENDS = re.compile(r"<\|(?:im_end|eot_id|end|endofturn|return|turn_end)\|>|<end_of_turn>|</s>")


class Files:
    """The parsed JSON files of a model; {} for one that is not there or was not read."""

    def __init__(self, tree: Tree, ledger: Ledger):
        self._tree, self._ledger = tree, ledger
        self._files = {file.path: file for file in ledger.files}
        self.config = self.json("config.json")
        self.generation = self.json("generation_config.json")
        self.tokenizer_config = self.json("tokenizer_config.json")
        self.tokenizer = self.json("tokenizer.json")
        self.gguf: Head | None = None
        heads = {where: head for where, head in ledger.facts.get("gguf", {}).items() if "/" not in where}
        if len(heads) == 1 and not self.config:
            self.gguf = next(iter(heads.values()))

    def json(self, name: str) -> dict[str, Any]:
        value = self.value(name)
        return value if isinstance(value, dict) else {}

    def value(self, name: str) -> Any:
        """What a JSON file holds; None where there is none or it cannot be read."""
        try:
            return json.loads(self.bytes(name, MAX_JSON) or "null")
        except (ValueError, RecursionError):
            return None

    def text(self, name: str, limit: int = 1 << 20) -> str | None:
        data = self.bytes(name, limit)
        return data.decode("utf-8", "replace") if data else None

    def bytes(self, name: str, limit: int) -> bytes:
        entry, file = self._tree.get(name), self._files.get(name)
        if entry is None or file is None or not file.examined:
            return b""
        try:
            return entry.read(limit)
        except (Unexamined, OSError):
            return b""

    def names(self) -> list[str]:
        return [entry.path for entry in self._tree.entries]


# ---- templates -------------------------------------------------------------------------------------------------------


def found_templates(files: Files) -> dict[str, str]:
    """Place -> text of every chat template in the repository."""
    found: dict[str, str] = {}
    for name in files.names():
        base = name.rpartition("/")[2]
        if base.endswith((".jinja", ".jinja2")) and (text := files.text(name)):
            found[name] = text
        elif base in (
            "tokenizer_config.json",
            "chat_template.json",
            "processor_config.json",
            "preprocessor_config.json",
        ):
            for label, text in _template_field(files.json(name).get("chat_template")).items():
                found[f"{name}{label}"] = text
    for where, head in files._ledger.facts.get("gguf", {}).items():
        for key, value in head.metadata.items():
            if key.startswith("tokenizer.chat_template") and isinstance(value, str):
                found[where + key.removeprefix("tokenizer.chat_template")] = value
    return found


def _template_field(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"": value}
    if isinstance(value, dict):
        return {f"#{name}": text for name, text in value.items() if isinstance(text, str)}
    if isinstance(value, list):
        return {
            f"#{entry.get('name')}": entry["template"]
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("template"), str)
        }
    return {}


def special_texts(files: Files) -> dict[str, str]:
    """bos_token, eos_token, ... as texts."""
    if files.gguf:
        tokens = files.gguf.metadata.get("tokenizer.ggml.tokens") or []
        ids = {name: files.gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in
               (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))}  # fmt: skip
        return {
            name: tokens[id]
            for name, id in ids.items()
            if type(id) is int and 0 <= id < len(tokens) and isinstance(tokens[id], str)
        }
    return _token_texts(files.tokenizer_config)


def _token_texts(fields: dict[str, Any]) -> dict[str, str]:
    found = {name: value for name, value in fields.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


@lru_cache
def _sandbox() -> TemplateSandbox:
    """One child process for all templates."""
    return TemplateSandbox()


def examine_templates(ledger: Ledger, files: Files) -> None:
    """Every template of the repository; and where two stand for the same thing, whether they are the same."""
    found, variables = found_templates(files), special_texts(files)
    sandbox, rendered = _sandbox(), {}
    for where, text in list(found.items())[:16]:
        rendered[where] = templates.examine(ledger, where, text, sandbox, variables)
        if name := official.name_of(text):
            ledger.find("template-official", where, f"the template of {name}")
        elif unlike := official.difference(text, rendered[where]):
            ledger.find("template-unofficial", where, official.sentence(unlike))
            ledger.facts.setdefault("template_lines", {})[where] = unlike.own
        elif files.config.get("model_type") in weights.FAMILY or (
            files.gguf and "qwen" in str(files.gguf.metadata.get("general.architecture"))
        ):
            ledger.find("template-unofficial", where, "unlike all official templates that are known here")
    main = {
        where: text
        for where, text in found.items()
        if where in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
    }
    if len({text.strip() for text in main.values()}) > 1:
        ledger.find("template-conflict", next(iter(main)), f"differs from that in {list(main)[1]}")
    ledger.facts["templates"], ledger.facts["rendered"] = found, rendered


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if type(one) is int]


def examine_tokens(ledger: Ledger, files: Files) -> None:
    """Ids and texts of tokens across the files."""
    if files.gguf:
        _examine_gguf_tokens(ledger, files.gguf)
        return
    config, generation = _text_part(files.config), files.generation
    for name, place in (("config.json", config), ("generation_config.json", generation)):
        try:
            check_end_tokens(name, place.get("eos_token_id"))
        except ValueError as error:
            ledger.find("config-invalid", name, str(error))
    vocabulary = _vocabulary(ledger, files)
    if files.tokenizer and (problem := problem_of(files.tokenizer, files.bytes("tokenizer.json", MAX_JSON))):
        ledger.find("tokenizer-blowup", "tokenizer.json", problem)
    rows = ledger.facts.get("embedding_rows") or config.get("vocab_size")
    if vocabulary and type(rows) is int:
        ledger.facts["tokens"] = len(vocabulary)
        text, top = max(((text, id) for text, id in vocabulary.items()), key=lambda one: one[1])
        if top >= rows:
            ledger.find(
                "vocabulary-too-large",
                "tokenizer.json",
                f"token {text[:40]!r} has the id {top:,}, but the embedding has {rows:,} rows",
            )
    for name, place in (("config.json", config), ("generation_config.json", generation)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for id in _ids(place.get(key)):
                if type(rows) is int and not 0 <= id < rows:
                    ledger.find("special-token-missing", name, f"{key} {id:,} is outside the {rows:,} rows")
                elif vocabulary and id not in vocabulary.values():
                    ledger.find("special-token-missing", name, f"{key} {id:,} is not a token of the tokenizer")
    texts = special_texts(files)
    if vocabulary:
        for key, text in texts.items():
            if text not in vocabulary:
                ledger.find(
                    "special-token-missing",
                    "tokenizer_config.json",
                    f"{key} {text[:40]!r} is not a token of the tokenizer",
                )
        for key, text in _token_texts(files.json("special_tokens_map.json")).items():
            if text not in vocabulary:
                what = f"{key} {text[:40]!r} is not a token of the tokenizer"
                ledger.find("special-token-missing", "special_tokens_map.json", what)
        for text, id in files.json("added_tokens.json").items():
            if vocabulary.get(text) != id:
                what = f"{text[:40]!r} is {str(id)[:12]} here, {vocabulary.get(text)} in tokenizer.json"
                ledger.find("special-token-missing", "added_tokens.json", what)
        decoder = files.tokenizer_config.get("added_tokens_decoder")
        for id, token in decoder.items() if isinstance(decoder, dict) else ():
            content = token.get("content") if isinstance(token, dict) else None
            if isinstance(content, str) and vocabulary.get(content) != (
                int(id) if id.isascii() and id.isdigit() and len(id) < 12 else None
            ):
                ledger.find(
                    "special-token-missing",
                    "tokenizer_config.json",
                    f"{content[:40]!r} is {id[:12]} here, {vocabulary.get(content)} in tokenizer.json",
                )
    _examine_ends(ledger, files, config, generation, vocabulary, texts)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _examine_ends(
    ledger: Ledger, files: Files, config: dict, generation: dict, vocabulary: dict[str, int], texts: dict[str, str]
) -> None:
    """What ends an answer: generation_config (else config) decides; the others must not contradict it."""
    deciding, name = (
        (generation, "generation_config.json")
        if generation.get("eos_token_id") is not None
        else (config, "config.json")
    )
    ends = _ids(deciding.get("eos_token_id"))
    if not ends:
        return
    stated = _ids(config.get("eos_token_id"))
    if stated and not set(stated) & set(ends):
        ledger.find("end-token-mismatch", name, f"ends at {ends}, config.json at {stated}")
    eos = vocabulary.get(texts.get("eos_token", ""))
    if eos is None:
        decoder = files.tokenizer_config.get("added_tokens_decoder")
        by_text = (
            {token.get("content"): id for id, token in decoder.items() if isinstance(token, dict)}
            if isinstance(decoder, dict)
            else {}
        )
        found = by_text.get(texts.get("eos_token"))
        eos = int(found) if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) < 12 else None
    if eos is not None and eos not in ends:
        ledger.find("end-token-mismatch", name, f"ends at {ends}, the tokenizer's eos_token is {eos}")
    ledger.facts["end_tokens"] = sorted(set(ends))
    text_of = {id: text for text, id in vocabulary.items()}
    closing = {text for id in ends if (text := text_of.get(id))} | (
        {texts["eos_token"]} if "eos_token" in texts else set()
    )
    for where, rendered in ledger.facts.get("rendered", {}).items():
        if where not in ("chat_template.jinja", "tokenizer_config.json") or "history" not in rendered or not vocabulary:
            continue
        used = {text for text in TURN_ENDS.findall(rendered["history"]) if text in vocabulary}
        if (
            used
            and not used & closing
            and generation.get("eos_token_id") is not None
            and eos not in (None, *[vocabulary.get("<|endoftext|>")])
        ):
            ledger.find(
                "end-token-mismatch", where, f"ends turns with {sorted(used)}, at which generation does not stop"
            )


def _vocabulary(ledger: Ledger, files: Files) -> dict[str, int]:
    """Text -> id of tokenizer.json, added tokens included; {} where it cannot be read."""
    tokenizer = files.tokenizer
    if not tokenizer:
        return {}
    inner = tokenizer.get("model")
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [text, score]
        vocabulary = {
            entry[0]: id
            for id, entry in enumerate(vocabulary)
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
        }
    added = tokenizer.get("added_tokens") or []
    if (
        not isinstance(vocabulary, dict)
        or not all(type(id) is int for id in vocabulary.values())
        or not isinstance(added, list)
    ):
        ledger.find("tokenizer-invalid", "tokenizer.json", "has no vocabulary of texts and ids")
        return {}
    result = dict(vocabulary)
    by_id = {id: text for text, id in vocabulary.items()}
    for token in added:
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            ledger.find("tokenizer-invalid", "tokenizer.json", "has an added token without id or text")
            continue
        if by_id.get(token["id"], token["content"]) != token["content"]:
            ledger.find(
                "tokenizer-invalid",
                "tokenizer.json",
                f"id {token['id']:,} is two tokens: {by_id[token['id']][:30]!r} and {token['content'][:30]!r}",
            )
        by_id[token["id"]] = token["content"]
        result[token["content"]] = token["id"]
    return result


def _examine_gguf_tokens(ledger: Ledger, head: Head) -> None:
    metadata = head.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    embedding = head.tensors.get("token_embd.weight")
    if not isinstance(tokens, list):
        return
    ledger.facts["tokens"] = len(tokens)
    rows = embedding.shape[0] if embedding else None
    if rows is not None and len(tokens) > rows:
        ledger.find("vocabulary-too-large", None, f"{len(tokens):,} tokens, but {rows:,} rows of the embedding")
    for key in ("bos", "eos", "padding"):
        id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id is not None and not (type(id) is int and 0 <= id < len(tokens)):
            ledger.find("special-token-missing", None, f"tokenizer.ggml.{key}_token_id {str(id)[:20]} is not a token")
    if type(metadata.get("tokenizer.ggml.eos_token_id")) is int:
        ledger.facts["end_tokens"] = [metadata["tokenizer.ggml.eos_token_id"]]


def examine_config(ledger: Ledger, files: Files) -> None:
    """config.json as the model's own code reads it, for the family that is implemented here."""
    config = files.config
    if config.get("model_type") in weights.FAMILY:
        try:
            parsed = Config.from_dict(config)
        except (ValueError, TypeError) as error:
            if "not implemented" not in str(error):
                ledger.find("config-invalid", "config.json", str(error))
            return
        ledger.facts.setdefault("parameters_of_config", weights.parameters_of_config(parsed)[0])
        ledger.facts["active_parameters"] = weights.parameters_of_config(parsed)[1]
        ledger.facts["config"] = parsed
    auto = json.dumps(config.get("auto_map")) if config.get("auto_map") else None
    ledger.facts["auto_map"] = auto
