"""Where a model comes from: SRC is a directory, a .gguf file, or a hub id (`org/name`, `org/name@revision`).

The folder of a training run means its last checkpoint, RUN/latest, and one in which another folder holds the only
model (`checkpoint-500`, `snapshots/COMMIT`) means that. Of several .gguf files in a directory or
repository a tag selects one: `DIR:Q4_K_M`, `org/name:Q4_K_M`, or its whole name, `org/name/FILE.gguf`. A hub model is
taken from the local Hugging Face cache when complete there, and downloaded otherwise (formats/hub.py): data files
only (JSON, safetensors, GGUF, the template's text), never code, never pickles.

A file is what its content says: a GGUF under any name, Ollama's manifest of one, or a part of the directory it is in.
"""

import os
import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from console import notice
from formats import hub, ollama
from formats.gguf.files import choose
from formats.hub import ADAPTER_FILES, TOKENIZER_FILES
from formats.hub import HubUnreachable as HubUnreachable
from formats.mistaken import PICKLE_SUFFIXES

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny"

PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}"
HUB_ID = re.compile(
    rf"(?P<repo>{PART}/{PART})(?:/(?P<file>(?!.*\.\.)\w[\w./-]*\.gguf))?"
    r"(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?(?::(?P<tag>(?!.*\.\.)\w[\w./-]*))?",
    re.ASCII,
)

HUB_ADDRESS = re.compile(
    r"(?:https?://|ssh://git@|git@)?(?:www\.)?(?:huggingface\.co|hf\.co)[/:](?:models/)?(?P<repo>[^/:@?#]+/[^/:@?#]+?)"
    r"(?:\.git)?(?:/(?:tree|blob|resolve|raw|commit)/(?P<revision>[^/:@?#]+)"
    r"(?:(?P<file>/[^:@?#]+\.gguf)|/[^:@?#]+)?)?(?P<tag>:[^/:@?#]+)?/?(?:[?#].*)?"
)
OTHER_ADDRESS = re.compile(r"[a-z0-9+]+://|(?:[\w-]+\.)+(?:com|cn|co|org|ai|net)/", re.IGNORECASE)
SHORT_NAME = re.compile(r"(?:.*/)?qwen(?P<version>\d[\d.]*)[:-](?P<size>\d[\w.-]*)", re.IGNORECASE)  # Ollama's too
LAYOUT = ("*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES, ADAPTER_FILES[0])  # files of a directory


def resolve(src: str | Path, place: str = "--model", tokenizer_only: bool = False) -> Path:
    """The local path of SRC: a directory in the official layout or a .gguf file. `place` is where SRC came from; with
    `tokenizer_only` a hub model's weights need not be there, and are not downloaded.

    Raises ValueError for a path that is neither, an unknown hub id or revision, and `HubUnreachable`.
    """
    if not isinstance(src, str | Path):
        raise ValueError(f"{place} is a {type(src).__name__}; give a directory, a hub id or a .gguf file")
    if not str(src).strip():
        raise ValueError(f"{place} is empty; give a directory, a hub id or a .gguf file")
    name, path = f"{place} {src}", _local(str(src))
    folder, _, tag = str(path).rpartition(":")
    if _kind(path) is None and folder and _kind(Path(folder)) == "directory":
        return _gguf_of(name, Path(folder), tag)
    if _kind(path):
        if _kind(path) == "directory":
            path = _of_run(path)
            only_ggufs = not _has_safetensors(path) and any(hub.ggufs(path))
            return _gguf_of(name, path, None) if only_ggufs else _below(name, path)
        return _of_file(name, path)
    match = HUB_ID.fullmatch(_without_address(str(src).strip().rstrip("/")))
    if match is None:
        _not_found(name, str(src).strip())
    try:
        return _from_hub(match["repo"], match["revision"], match["file"] or match["tag"], tokenizer_only)
    except (ValueError, OSError) as error:
        kind = HubUnreachable if isinstance(error, HubUnreachable) else ValueError
        raise kind(f"{name} is not a directory here; as a hub model: {error}") from error


def _local(src: str) -> Path:
    """SRC as a path: `~` is a home directory where there is one, `file://` an address of this machine."""
    path = Path(unquote(src.removeprefix("file://")) if src.startswith("file:///") else src)
    try:
        return path.expanduser()
    except RuntimeError:  # no home directory, or no such user
        return path


def _of_file(name: str, path: Path) -> Path:
    """What a file stands for; ValueError says what it is where that is no model."""
    with path.open("rb") as file:
        start = file.read(4096)
    if path.suffix == ".gguf" or start.startswith(b"GGUF"):
        return path
    if (model := ollama.model_of_manifest(path, start)) is not None:
        return model
    if any(path.match(pattern) for pattern in LAYOUT):
        if any((path.parent / config).is_file() for config in ("config.json", ADAPTER_FILES[0])):
            return path.parent
        raise ValueError(f"{name}: one file of a model, without the config.json that belongs beside it; add that")
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{name}: a pickle by its name, which can run code and is never opened; get safetensors")
    if start.startswith(b"MZqFpD"):
        raise ValueError(f"{name}: a llamafile, a program with a .gguf inside; unpack it (unzip FILE '*.gguf')")
    if (base := ollama.from_of_modelfile(start)) is not None:
        raise ValueError(f"{name}: a Modelfile of Ollama; give what its FROM names, {base}")
    raise ValueError(f"{name}: neither a directory nor a .gguf file; give the directory of config.json")


def _not_found(name: str, src: str) -> NoReturn:
    if OTHER_ADDRESS.match(src):
        fix = "not a hub id, and no address of a model's page there; download the files and give their directory"
        raise ValueError(f"{name}: {fix} (for a mirror of the hub set HF_ENDPOINT)")
    short = SHORT_NAME.fullmatch(src)
    hint = f"; did you mean Qwen/Qwen{short['version']}-{short['size'].replace('b', 'B')}?" if short else ""
    raise ValueError(f"{name}: no such directory or .gguf file, and not a hub id like {DEFAULT_MODEL}{hint}")


def _without_address(src: str) -> str:
    """The hub id in the address of a page, `https://huggingface.co/org/name/tree/main` (or of HF_ENDPOINT's mirror),
    in `hf://org/name`, or in Ollama's spelling, `hf.co/org/name:Q4_K_M`; anything else as it is."""
    if (mirror := os.environ.get("HF_ENDPOINT", "").rstrip("/")) and src.startswith(f"{mirror}/"):
        src = src.replace(mirror, "https://huggingface.co", 1)
    src = src.removeprefix("hf://models/").removeprefix("hf://")
    match = HUB_ADDRESS.fullmatch(src)
    if match is None or match["repo"].startswith(("datasets/", "spaces/")):
        return src
    file, revision, tag = (match[part] or "" for part in ("file", "revision", "tag"))
    return match["repo"] + file + (f"@{unquote(revision)}" if revision else "") + tag


def resolve_default(src: str | Path | None) -> Path:
    """`resolve`, where no SRC means Qwen3-0.6B or, where the hub can't give it, the bundled model and a notice."""
    if src is not None:
        return resolve(src)
    try:
        return _from_hub(DEFAULT_MODEL, None, None)
    except (ValueError, OSError) as error:
        notice(f"{DEFAULT_MODEL}: {' '.join(str(error).split())}. Using the bundled tiny model.")
        return BUNDLED_MODEL


def _from_hub(repo: str, revision: str | None, tag: str | None, tokenizer_only: bool = False) -> Path:
    return hub.cached(repo, revision, tokenizer_only, tag) or hub.download(repo, revision, tokenizer_only, tag)


def _has_safetensors(path: Path) -> bool:
    """Whether a directory holds weights, or what refers to them (an index, an adapter), in the official layout."""
    return any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))


def _gguf_of(name: str, folder: Path, tag: str | None) -> Path:
    try:
        return folder / choose(hub.ggufs(folder), tag)[0]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _of_run(path: Path) -> Path:
    """The last checkpoint of a training run's folder; any other directory itself."""
    is_run = not (path / "config.json").is_file() and (path / "config.yaml").is_file()
    return path / "latest" if is_run and (path / "latest" / "config.json").is_file() else path


def _below(name: str, path: Path) -> Path:
    """A directory with a model in it; of one that only holds such directories (a Trainer's `checkpoint-500`, the hub's
    cache with its `snapshots`) the one that there is. ValueError names them where there are several."""
    if any((path / file).exists() for file in (*TOKENIZER_FILES, *ADAPTER_FILES)) or _has_safetensors(path):
        return path
    files = (file for folder in ("*", "snapshots/*") for file in path.glob(f"{folder}/*config.json"))
    found = sorted({file.parent for file in files if _has_safetensors(file.parent)})
    if len(found) > 1:
        listed = ", ".join(str(folder.relative_to(path)) for folder in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise ValueError(f"{name}: no model itself, but there are {listed}{more} in it; give one of them")
    if not found and (models := ollama.manifests(path)):
        listed = ", ".join(map(str, models[:8])) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
        raise ValueError(f"{name}: Ollama's models; give the manifest of one: {listed}")
    return found[0] if found else path


def _kind(path: Path) -> str | None:
    """ "directory", "file" or None, also for a name that no file can have."""
    try:
        return "directory" if path.is_dir() else "file" if path.is_file() else None
    except OSError:
        return None
