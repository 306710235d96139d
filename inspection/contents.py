"""What a file is, by its content: a tier (data, code, unknown), a format, and whether all that a loader acts on was
read.

The name only tells which disguises matter: a pickle under any name, a text where weights are promised. Formats that are
recognised by their first bytes alone hold no code for the programs that load models; what nobody here knows is unknown,
never safe.
"""

import codecs
import hashlib
import io
import json
import re
import zipfile
from typing import Any, BinaryIO

from formats.json_file import uncollected
from formats.mistaken import PICKLE_SUFFIXES, POINTERS
from formats.safetensors_read import parse_header
from inspection import code, containers, pickles, remote_gguf
from inspection.findings import File, Ledger, Unexamined
from inspection.tree import Entry

MAX_TEXT = 24 << 20  # bytes of a text that is read whole
MAX_JSON = 64 << 20  # of a JSON file: tokenizer.json has 33 MB in Gemma 3
OBJECT, ARRAY = 300, 100  # bytes of memory that small ones of JSON take in Python
MAX_MEMORY = 500 << 20  # bytes that a parsed file may take, its text included
MAX_HEADER = 32 << 20
MAX_HEADERS = 64 << 20  # bytes of all safetensors headers together; Qwen3-235B's have 5 MB
MAX_TENSORS = 300_000
HEAD = 4096

# first bytes -> (format, tier)
MAGIC = {
    b"\x7fELF": ("ELF", "code"),
    b"\xfe\xed\xfa\xce": ("Mach-O", "code"),
    b"\xfe\xed\xfa\xcf": ("Mach-O", "code"),
    b"\xce\xfa\xed\xfe": ("Mach-O", "code"),
    b"\xcf\xfa\xed\xfe": ("Mach-O", "code"),
    b"\xca\xfe\xba\xbe": ("Java class or Mach-O", "code"),
    b"\0asm": ("WebAssembly", "code"),
    b"dex\n": ("Android bytecode", "code"),
    b"!<arch>\n": ("static library", "code"),
    b"\x89PNG\r\n\x1a\n": ("PNG", "data"),
    b"\xff\xd8\xff": ("JPEG", "data"),
    b"GIF8": ("GIF", "data"),
    b"PAR1": ("Parquet", "data"),
    b"ARROW1": ("Arrow", "data"),
    b"OggS": ("Ogg", "data"),
    b"fLaC": ("FLAC", "data"),
    b"ID3": ("MP3", "data"),
    b"%PDF-": ("PDF", "data"),
    b"\x1f\x8b": ("gzip", ""),
    b"BZh": ("bzip2", ""),
    b"\xfd7zXZ\0": ("xz", ""),
}
UNKNOWN_PACKERS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
MODEL_NAMES = (".safetensors", ".gguf")


def examine(ledger: Ledger, entry: Entry) -> File:
    """Examines one file of the repository and puts it into the ledger."""
    file = File(entry.path, entry.size)
    ledger.files.append(file)
    if any(not character.isprintable() or character in "\u2028\u2029" for character in entry.path):
        ledger.find("name-deceptive", entry.path, "its name holds characters that do not show")
    try:
        if entry.problem:
            id, what = entry.problem
            if id == "symlink-inside":
                file.tier, file.format, file.examined, file.note = "data", "link", True, what
                return file
            if id == "symlink-outside":
                ledger.find(id, entry.path, what)
                file.format, file.examined, file.note = "link", True, "never followed"
                return file
            raise Unexamined(id, what)
        with entry.open() as stream:
            if entry.local:
                file.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                stream.seek(0)
            else:
                file.sha256 = entry.sha256
                _check_budget(entry, stream)
            file.format, file.tier = examine_stream(ledger, entry.path, stream, entry.size, 0)
            if what := ledger.facts.get("unread", {}).get(entry.path):
                raise Unexamined("not-read", what)
            file.examined = True
    except Unexamined as error:
        file.note = error.what
        ledger.find(error.id, entry.path, error.what)
    except OSError as error:
        file.note = str(error)
        ledger.find("unreadable", entry.path, str(error))
    except (MemoryError, RecursionError):
        file.note = "needs too much memory"
        ledger.find("too-large", entry.path, "needs too much memory to be examined")
    return file


def _check_budget(entry: Entry, stream: BinaryIO) -> None:
    """Of a large file on the hub only a header or a directory may be read: leaves all others before they cost much."""
    if entry.budget and entry.size > entry.budget.left:
        head = stream.read(9)
        stream.seek(0)
        if head[:2] != b"PK" and head[:4] != b"GGUF" and head[8:9] != b"{":
            entry.budget.spend(entry.size)


def examine_stream(ledger: Ledger, where: str, stream: BinaryIO, size: int, depth: int) -> tuple[str, str]:
    """(format, tier) of the bytes of a file or of an archive's member, after all checks of that format."""
    head = stream.read(HEAD)
    stream.seek(0)
    name = where.rpartition("/")[2].lower()
    if size == 0:
        if name.endswith((*MODEL_NAMES, *PICKLE_SUFFIXES)):
            raise Unexamined("truncated", "empty, where its name promises weights")
        if name.endswith((".json", ".ipynb")):
            ledger.find("json-invalid", where, "empty")
        return "empty", "data"
    if head.startswith(POINTERS):
        raise Unexamined("pointer-file", "a pointer (Git LFS, Xet or git-annex); the file itself was not downloaded")
    format, tier = _examine_known(ledger, where, name, stream, size, depth, head) or _examine_text(
        ledger, where, name, stream, size, head
    )
    if (
        tier == "code"
        and format.startswith(("pickle", "pytorch", "npy of objects"))
        and name.endswith((*MODEL_NAMES, *TEXT_NAMES))
    ):
        ledger.find("format-disguised", where, f"named {name[-60:]}, but a {format}")
    elif name.endswith(".safetensors") and format != "safetensors":
        raise Unexamined("unknown-format", f"named .safetensors, but a file of format {format}")
    elif name.endswith(".gguf") and format != "gguf":
        raise Unexamined("unknown-format", f"named .gguf, but a file of format {format}")
    return format, tier


TEXT_NAMES = (".json", ".txt", ".md", ".jinja", ".yaml", ".yml", ".csv", ".png", ".jpg", ".model")


def _examine_known(
    ledger: Ledger, where: str, name: str, stream: BinaryIO, size: int, depth: int, head: bytes
) -> tuple[str, str] | None:
    """The binary formats; None for what may be a text."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 40 and (size >= 8 + length or name.endswith(".safetensors")):
        return _examine_safetensors(ledger, where, stream, size, length)
    if head[:4] == b"GGUF":
        return _examine_gguf(ledger, where, stream, size)
    if head[:2] == b"PK":
        return containers.examine_zip(ledger, where, stream, size, depth, examine_stream)
    if head[257:262] == b"ustar":
        return containers.examine_tar(ledger, where, stream, size, depth, examine_stream)
    if head[:6] == b"\x93NUMPY":
        return containers.examine_npy(ledger, where, stream, size)
    if head[:1] == b"\x80" and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        pickles.examine(ledger, where, _peekable(stream), several=True)
        return "pickle", "code"
    if head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0 and not _is_text(head[:64]):
        return containers.examine_compressed(ledger, where, stream, size, depth, examine_stream, "zlib")
    for magic, (format, tier) in MAGIC.items():
        if head.startswith(magic):
            if not tier:
                return containers.examine_compressed(ledger, where, stream, size, depth, examine_stream, format)
            if tier == "code":
                ledger.find("native-code", where, format)
            elif zipfile.is_zipfile(stream):  # a picture by its beginning, an archive by its end
                stream.seek(0)
                ledger.find("format-disguised", where, f"begins as {format} and ends as a zip")
                containers.examine_zip(ledger, where, stream, size, depth, examine_stream)
            return format, tier
    if (
        head[:2] == b"MZ"
        and head[int.from_bytes(head[60:64], "little") :][:4] in (b"PE\0\0", b"")
        and not _is_text(head)
    ):
        ledger.find("native-code", where, "Windows executable")
        return "PE", "code"
    if head[2:4] == b"\r\n" and name.endswith((".pyc", ".pyo")):
        ledger.find("native-code", where, "compiled Python")
        return "Python bytecode", "code"
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        return head[8:12].decode().strip(), "data"
    if head[4:8] == b"ftyp":
        return "MP4", "data"
    for magic, format in UNKNOWN_PACKERS.items():
        if head.startswith(magic):
            ledger.find("archive", where, f"{format}, which cannot be unpacked here")
            raise Unexamined("unknown-format", f"{format}, which cannot be unpacked here")
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise Unexamined("unknown-format", "HDF5, which may hold Keras layers of code; not read here")
    return None


def _peekable(stream: BinaryIO) -> BinaryIO:
    """The stream as one that has `peek`."""
    if hasattr(stream, "peek"):
        return stream
    if isinstance(stream, io.BytesIO):
        return io.BufferedReader(stream)
    return stream


def _examine_safetensors(ledger: Ledger, where: str, stream: BinaryIO, size: int, length: int) -> tuple[str, str]:
    if 8 + length > size:
        raise Unexamined("truncated", f"a header of {length:,} bytes in a file of {size:,}")
    if length > MAX_HEADER:
        raise Unexamined("too-large", f"a header of {length:,} bytes")
    ledger.headers += length
    if ledger.headers > MAX_HEADERS:
        raise Unexamined("too-large", f"with it, more than {MAX_HEADERS:,} bytes of headers")
    stream.seek(8)
    header = stream.read(length)
    ledger.tensors += header.count(b'"data_offsets"')
    if ledger.tensors > MAX_TENSORS:
        raise Unexamined("too-large", f"with it, more than {MAX_TENSORS:,} tensors")
    try:
        tensors, offsets = parse_header(where, header, size - 8 - length)
    except ValueError as error:
        _malformed(ledger, where, str(error))
        return "safetensors", "data"
    metadata = json.loads(header).get("__metadata__")
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        ledger.find("weights-malformed", where, "__metadata__ is not an object of texts")
    ledger.facts.setdefault("safetensors", {})[where] = (tensors, offsets)
    return "safetensors", "data"


def _malformed(ledger: Ledger, where: str, message: str) -> None:
    """A reader's complaint under the name of its kind. A container that is cut short was not examined."""
    problem = message.removeprefix(f"{where}: ").split("; download")[0].split(" (download")[0]
    kinds = {
        "past the end of the file": "truncated",
        "but the file has": "truncated",
        "but the file ends at": "truncated",
        "cannot be in": "truncated",
        "occurs twice": "weights-duplicate-key",
        "overlaps": "weights-overlap",
        "leaves a hole": "weights-gap",
        "leaves a gap": "weights-gap",
        "belong to no tensor": "weights-trailing-bytes",
        "follow the last tensor": "weights-trailing-bytes",
        "is not one of": "unknown-format",
        "is not supported": "unknown-format",
    }
    id = next((id for text, id in kinds.items() if text in problem), "weights-malformed")
    if id in ("truncated", "unknown-format"):
        raise Unexamined(id, problem)
    ledger.find(id, where, problem)


def _examine_gguf(ledger: Ledger, where: str, stream: BinaryIO, size: int) -> tuple[str, str]:
    try:
        head = remote_gguf.parse_head(where, stream, size)
    except ValueError as error:
        _malformed(ledger, where, str(error))
        return "gguf", "data"
    ledger.facts.setdefault("gguf", {})[where] = head
    if size := remote_gguf.unread(head):
        ledger.facts.setdefault("unread", {})[where] = f"{size:,} bytes of its vocabulary; --deep reads all"
    return "gguf", "data"


# ---- texts -----------------------------------------------------------------------------------------------------------


def _is_text(data: bytes) -> bool:
    """UTF-8 (perhaps cut off at the end) without control characters that no text has."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return not re.search("[\x00-\x08\x0e-\x1a\x1c-\x1f]", text)


def _examine_text(ledger: Ledger, where: str, name: str, stream: BinaryIO, size: int, head: bytes) -> tuple[str, str]:
    is_json = name.endswith((".json", ".ipynb"))
    if size <= (MAX_JSON if is_json else MAX_TEXT):
        data = stream.read(size)
        if pickles.is_text_pickle(data):
            pickles.examine(ledger, where, io.BufferedReader(io.BytesIO(data)))
            return "pickle without a header", "code"
        if not _is_text(data):
            return _examine_other_binary(ledger, where, name, data)
    else:
        if not _is_long_text(stream):
            raise Unexamined("unknown-format", "no format that is known here")
        if is_json or name.endswith((".py", ".jinja", *code.SHELL_NAMES)):
            most = MAX_JSON if is_json else MAX_TEXT
            raise Unexamined("too-large", f"{size:,} bytes; of a file of this kind at most {most:,} are read")
        return "text", "data"
    if is_json or data[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return _examine_json(ledger, where, name, data)
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    first = text[:200].split("\n", 1)[0]
    if name.endswith(".py") or re.match(r"#!.*\bpython", first):
        code.examine_python(ledger, where, text)
        return "Python", "code"
    if name.endswith(code.SHELL_NAMES) or re.match(r"#!.*\b(ba|z|da|k|c|fi)?sh\b", first):
        code.examine_shell(ledger, where, text)
        return "shell script", "code"
    if name.endswith(code.OTHER_NAMES) or first.startswith("#!"):
        ledger.find("other-code", where, "code by its name or first line")
        return "other code", "code"
    if name.endswith((".yaml", ".yml")) and re.search(r"!!python/|tag:yaml\.org,2002:python/", text):
        ledger.find("yaml-tag", where, re.search(r"!!python/\S*|tag:yaml\.org,2002:python/\S*", text)[0][:100])
    if name.endswith((".svg", ".html", ".htm", ".xml")) or re.match(
        r"\s*(<\?xml|<!doctype html|<html|<svg)", text, re.IGNORECASE
    ):
        if code.SCRIPT.search(text):
            ledger.find("other-code", where, "a page or picture with a script")
            return "HTML or SVG with a script", "code"
        return "HTML or SVG", "data"
    if (
        not name.endswith((".md", ".jinja", ".csv", ".jsonl", ".tsv"))
        and ledger.code < code.MAX_TOTAL
        and code.is_python(text)
    ):
        code.examine_python(ledger, where, text)
        return "Python", "code"
    return "text", "data"


def _is_long_text(stream: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    stream.seek(0)
    try:
        while piece := stream.read(1 << 20):
            if re.search("[\x00-\x08\x0e-\x1a\x1c-\x1f]", decoder.decode(piece)):
                return False
    except UnicodeDecodeError:
        return False
    return True


def _examine_other_binary(ledger: Ledger, where: str, name: str, data: bytes) -> tuple[str, str]:
    if zipfile.is_zipfile(io.BytesIO(data)):
        ledger.find("format-disguised", where, "ends as a zip, begins as something else")
        containers.examine_zip(ledger, where, io.BytesIO(data), len(data), 1, examine_stream)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            data.decode("utf-16")
            return "UTF-16 text", "data"
        except UnicodeDecodeError:
            pass
    if _is_sentencepiece(data):
        return "sentencepiece", "data"
    if name.endswith((".safetensors", ".gguf")):
        raise Unexamined("truncated", "not the beginning that a file of this name has")
    raise Unexamined("unknown-format", "no format that is known here")


def _is_sentencepiece(data: bytes) -> bool:
    """A sentencepiece model: a protocol buffer of nothing but its five fields, the first of them pieces with a text."""
    at, fields, count = 0, set(), 0
    while at < len(data) and count < 2_000_000:
        key, length, at = data[at], 0, at + 1
        for shift in range(0, 35, 7):
            if at >= len(data):
                return False
            byte, at = data[at], at + 1
            length |= (byte & 127) << shift
            if byte < 128:
                break
        if key & 7 != 2 or key >> 3 not in (1, 2, 3, 4, 5) or at + length > len(data):
            return False
        if key >> 3 == 1 and (length < 2 or data[at] != 0x0A):
            return False
        fields.add(key >> 3)
        at, count = at + length, count + 1
    return {1, 2} <= fields


def _examine_json(ledger: Ledger, where: str, name: str, data: bytes) -> tuple[str, str]:
    twice: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(found)
        if len(result) < len(found) and len(twice) < 5:
            twice.extend(
                {key for key, _ in found if sum(other == key for other, _ in found) > 1} if len(found) < 5000 else ["?"]
            )
        return result

    wide = 4 if re.search(rb"[\xf0-\xff]|\\u", data) else 2 if re.search(rb"[\xc4-\xef]", data) else 1
    size = len(data) * (1 + 2 * wide) + data.count(b"{") * OBJECT + data.count(b"[") * ARRAY
    if size > MAX_MEMORY:  # bytes, their text, its parts: Python gives each character the width of the widest
        raise Unexamined("too-large", f"it would take up to {size:,} bytes of memory")
    try:
        with uncollected():
            value = json.loads(data, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        if not name.endswith((".json", ".ipynb")):
            if name.endswith(".jsonl") or data.lstrip()[:1] != b"{":
                return "text", "data"
            return "text", "data"
        ledger.find("json-invalid", where, str(error)[:100])
        return "JSON", "data"
    if twice:
        ledger.find("json-duplicate-key", where, "twice: " + ", ".join(sorted(set(twice)))[:100])
    if isinstance(value, dict) and (name.endswith(".ipynb") or ("cells" in value and "nbformat" in value)):
        code.examine_notebook(ledger, where, value)
        return "notebook", "code"
    if re.search(rb'auto_map|custom_pipelines|"type"|\\u', data):
        code.config_references(ledger, where, value)
    if b'"Lambda"' in data and _has_lambda(value):
        ledger.find("native-code", where, "a Keras Lambda layer, whose bytecode runs when it is loaded")
    return "JSON", "data"


def _has_lambda(value: Any) -> bool:
    """Whether a Keras model's JSON holds a layer of marshalled bytecode."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("class_name") == "Lambda" and "config" in value:
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False
