"""Where a model comes from: SRC is a directory, a .gguf file, or a hub id (`org/name`, `org/name@revision`).

A hub model is taken from the local Hugging Face cache when it is whole there, and downloaded otherwise: data files
only (JSON, safetensors, the template's text), never code, never pickles. An interrupted download goes on where it
stopped.
"""

import json
import os
import re
from pathlib import Path

from console import notice

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny"

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w][\w./-]*))?")
DATA_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "README.md",
]
REACH_SECONDS = 6.0  # to the first answer of the hub; DNS, connection and answer together stay under 10 s


class HubUnreachable(ValueError):
    """The hub did not answer, and the model is not whole in the local cache."""


def resolve(src: str | Path) -> Path:
    """The local path of SRC: a directory in the official layout or a .gguf file.

    Raises ValueError for a path that is neither, an unknown hub id or revision, and `HubUnreachable`.
    """
    path = Path(src).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"--model {src}: neither a directory nor a .gguf file; give the directory of config.json")
    match = HUB_ID.fullmatch(str(src))
    if match is None:
        raise ValueError(f"--model {src}: no such directory or .gguf file, and not a hub id like {DEFAULT_MODEL}")
    return _cached(match["repo"], match["revision"]) or _download(match["repo"], match["revision"])


def resolve_default(src: str | Path | None) -> Path:
    """`resolve`, where no SRC means Qwen3-0.6B or, where the hub can't be reached, the bundled model and a notice."""
    if src is not None:
        return resolve(src)
    try:
        return resolve(DEFAULT_MODEL)
    except HubUnreachable:
        notice(f"The hub can't be reached and {DEFAULT_MODEL} is not in the cache: the bundled tiny model answers.")
        return BUNDLED_MODEL


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache if each file that a run needs is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=DATA_FILES))
    except LocalEntryNotFoundError:
        return None
    return path if _whole(path) else None


def _whole(path: Path) -> bool:
    if not (path / "config.json").exists() or not (path / "tokenizer.json").exists():
        return False
    if (path / "model.safetensors").exists():
        return True
    try:
        shards = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values()
        return all((path / shard).exists() for shard in set(shards))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    unreachable = HubUnreachable(f"--model {name}: no such directory, not in the cache, and the hub can't be reached")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise unreachable
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=REACH_SECONDS)
    except GatedRepoError:
        raise ValueError(f"--model {name}: the hub asks for a login; run `hf auth login` first") from None
    except RevisionNotFoundError:
        raise ValueError(f"--model {name}: the hub has no revision {revision} of {repo}") from None
    except RepositoryNotFoundError:
        raise ValueError(f"--model {name}: no such directory here, and the hub has no such model") from None
    except Exception as error:  # the HTTP library's own classes (DNS, time-out, 5xx): all mean the same to a user
        raise unreachable from error
    files = {sibling.rfilename for sibling in info.siblings or []}
    if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
        raise ValueError(f"--model {name}: the hub holds no model.safetensors; pickle weights (.bin) can run code")
    try:
        # The commit that was just seen, so that a push in between cannot mix two versions.
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=DATA_FILES))
    except KeyboardInterrupt:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise HubUnreachable(f"--model {name}: the download stopped ({reason}); run again to go on") from error
