"""A checkpoint's text files: tokenizer.json, tokenizer_config.json and chat_template.jinja.

They are untrusted: a file of another kind is rejected in one line that names it.
"""

import codecs
import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from formats.mistaken import mistaken

TOKENIZER_BYTES, CONFIG_BYTES = 128 << 20, 16 << 20  # the official files have 11 MB and 10 kB


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes."""
    if not path.is_file():
        raise ValueError(f"{path}: not a file; use the published one")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a file of this name has at most {limit:,}")
    return path.read_bytes()


def read_text(path: Path, limit: int) -> str:
    """A file of at most `limit` bytes of UTF-8."""
    return decoded(path, read_bytes(path, limit))


def decoded(place: str | Path, content: bytes) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start:,}; use the published one") from None


# An affix's name with a value; a letter written as an escape, which could hide such a name. One regex would be slower.
AFFIX = re.compile(rb'"(?:continuing_subword_prefix|end_of_word_suffix)"\s*+:\s*+(?!null\b|"")')
ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")


def load_tokenizer(source: str, tokenizer_json: bytes | dict) -> Tokenizer:
    """The tokenizer of a tokenizer.json, which must be BPE over bytes: streams of text rely on it.

    Bytes, as decoding 11 MB and encoding them for the library would take a tenth of a second; or what such a file would
    hold, made by formats/gguf/tokenizer.py.
    """
    if isinstance(tokenizer_json, dict):
        return _from_content(source, tokenizer_json)
    tokenizer_json = tokenizer_json.removeprefix(codecs.BOM_UTF8)
    try:
        affixed = False
        if AFFIX.search(tokenizer_json) or ESCAPED_LETTER.search(tokenizer_json):  # rare, and parsing takes 0.15 s
            model = json.loads(tokenizer_json)["model"]
            affixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        # With affixes the library may abort the whole process, so they are rejected before it sees them.
        tokenizer = None if affixed else Tokenizer.from_buffer(tokenizer_json)
    except BaseException as error:
        reraise_unless_library(error)
        if found := mistaken(tokenizer_json[:64], is_json=True):
            raise ValueError(f"{source}: tokenizer.json is {found}") from None
        decoded(f"{source}: tokenizer.json", tokenizer_json)
        raise ValueError(f"{source}: tokenizer.json can't be read ({error}); use the published one") from None
    if not tokenizer or not isinstance(tokenizer.model, models.BPE):
        raise ValueError(f"{source}: tokenizer.json is not a byte-level BPE, the only kind that Qwen3 uses")
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(f"{source}: tokenizer.json has no ByteLevel decoder, which all of Qwen3's have")
    tokenizer.no_truncation()  # the file may hold settings of a training run
    tokenizer.no_padding()
    return tokenizer


def _from_content(source: str, content: dict) -> Tokenizer:
    """Tokens and merges go to the library as they are: to write them as JSON and parse that takes 0.2 s more."""
    model = content["model"]
    options = {name: value for name, value in model.items() if name not in ("type", "vocab", "merges")}
    empty = {**content, "added_tokens": [], "model": {**model, "vocab": {}, "merges": []}}
    added = [{name: value for name, value in token.items() if name != "id"} for token in content["added_tokens"]]
    try:
        tokenizer = Tokenizer.from_str(json.dumps(empty))
        tokenizer.model = models.BPE(model["vocab"], model["merges"], **options)
        tokenizer.add_tokens([AddedToken(**token) for token in added])
    except BaseException as error:
        reraise_unless_library(error)
        raise ValueError(f"{source}: its merges do not fit its tokens ({error}); convert it again") from None
    return tokenizer


def reraise_unless_library(error: BaseException) -> None:
    """A panic of the tokenizers library is a BaseException without a public class; Ctrl-C, exits and want of memory
    pass through."""
    if isinstance(error, MemoryError):
        raise error
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def chat_templates(source: str, tokenizer_config: dict) -> dict[str, str]:
    """Name to chat template; the field holds one string or a list of {"name", "template"}. A base model has none."""
    field = tokenizer_config.get("chat_template") or []
    listed = [{"name": "default", "template": field}] if isinstance(field, str) else field
    try:
        templates = {entry["name"]: entry["template"] for entry in listed}
    except (TypeError, KeyError):
        templates = {"default": None}
    if templates and not (
        isinstance(templates.get("default"), str) and all(isinstance(text, str) for text in templates.values())
    ):
        raise ValueError(
            f"{source}: tokenizer_config.json: chat_template must be a text, or a list of texts with one named default"
        )
    return templates


def special_tokens(tokenizer_config: dict) -> dict[str, str]:
    """bos_token, eos_token, ... as text, for the template; each is stored as text or as {"content": text}."""
    tokens = {name: value for name, value in tokenizer_config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
