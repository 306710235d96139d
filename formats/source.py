"""Where a model comes from: SRC is a directory, a .gguf file, or a hub id (`org/name`, `org/name@revision`).

The folder of a training run means its last checkpoint, RUN/latest, and one in which another folder holds the only
model (`checkpoint-500`, `snapshots/COMMIT`) means that. Of several .gguf files in a directory or
repository a tag selects one: `DIR:Q4_K_M`, `org/name:Q4_K_M`, or its whole name, `org/name/FILE.gguf`. A hub model is
taken from the local Hugging Face cache when complete there, and downloaded otherwise (formats/hub.py): data files
only (JSON, safetensors, GGUF, the template's text), never code, never pickles.
"""

import re
from pathlib import Path

from console import notice
from formats import hub
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
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/:@?#]+/[^/:@?#]+)"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/:@?#]+)(?P<file>/[^:@?#]+\.gguf)?)?(?P<tag>:[^/:@?#]+)?/?(?:[?#].*)?"
)


def resolve(src: str | Path, place: str = "--model", tokenizer_only: bool = False) -> Path:
    """The local path of SRC: a directory in the official layout or a .gguf file. `place` is where SRC came from; with
    `tokenizer_only` a hub model's weights need not be there, and are not downloaded.

    Raises ValueError for a path that is neither, an unknown hub id or revision, and `HubUnreachable`.
    """
    if not isinstance(src, str | Path):
        raise ValueError(f"{place} is a {type(src).__name__}; give a directory, a hub id or a .gguf file")
    name, path = f"{place} {src}", Path(src).expanduser()
    folder, _, tag = str(path).rpartition(":")
    if _kind(path) is None and folder and _kind(Path(folder)) == "directory":
        return _gguf_of(name, Path(folder), tag)
    if _kind(path) and str(src):
        if _kind(path) == "directory":
            path = _of_run(path)
            only_ggufs = not _has_safetensors(path) and any(hub.ggufs(path))
            return _gguf_of(name, path, None) if only_ggufs else _below(name, path)
        if path.suffix == ".gguf":
            return path
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{name}: a pickle by its name, which can run code and is never opened; get safetensors")
        raise ValueError(f"{name}: neither a directory nor a .gguf file; give the directory of config.json")
    match = HUB_ID.fullmatch(_without_address(str(src)))
    if match is None:
        raise ValueError(f"{name}: no such directory or .gguf file, and not a hub id like {DEFAULT_MODEL}")
    try:
        return _from_hub(match["repo"], match["revision"], match["file"] or match["tag"], tokenizer_only)
    except (ValueError, OSError) as error:
        kind = HubUnreachable if isinstance(error, HubUnreachable) else ValueError
        raise kind(f"{name} is not a directory here; as a hub model: {error}") from error


def _without_address(src: str) -> str:
    """The hub id in the address of a page, `https://huggingface.co/org/name/tree/main`, or in ollama's spelling,
    `hf.co/org/name:Q4_K_M`; anything else as it is."""
    match = HUB_ADDRESS.fullmatch(src)
    if match is None:
        return src
    file, revision, tag = (match[part] or "" for part in ("file", "revision", "tag"))
    return match["repo"] + file + (f"@{revision}" if revision else "") + tag


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
    return found[0] if found else path


def _kind(path: Path) -> str | None:
    """ "directory", "file" or None, also for a name that no file can have."""
    try:
        return "directory" if path.is_dir() else "file" if path.is_file() else None
    except OSError:
        return None
