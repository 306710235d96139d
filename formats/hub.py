"""A model's data files from the Hugging Face hub, kept in its usual local cache.

The cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache) is shared with every other tool: the files'
contents are in `blobs/` under their hashes, `snapshots/COMMIT/` links to them under their names, `refs/REVISION` names
the commit. huggingface_hub finds and lists them; the transfer (formats/download.py) is ours, so that a broken one
resumes where it stopped, in a later run too.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from console import byte_progress
from formats.download import HubUnreachable, reach, read_document, refusal, transfer
from formats.files import publish, sha256, write_text
from formats.gguf.files import choose
from formats.shards import INDEX, SINGLE, weight_files

TOKENIZER_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
MODULES, POOLING = "modules.json", "1_Pooling/config.json"  # sentence-transformers': how an embedding is made
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
DATA_FILES = [*TOKENIZER_FILES, MODULES, POOLING, SINGLE, "model-*.safetensors", INDEX]
ATTEMPTS = 5  # in a row that transfer nothing


class RemoteFile(NamedTuple):
    """`digest`: SHA-256 of a large file (Git LFS), SHA-1 of the Git blob of any other; the name in `blobs/`."""

    name: str
    size: int
    digest: str


def cached(repo: str, revision: str | None, tokenizer_only: bool = False, tag: str | None = None) -> Path | None:
    """The snapshot in the local cache, or its .gguf, if each file that a run needs is there. Makes no requests."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=DATA_FILES))
    except LocalEntryNotFoundError:
        return None
    if tag is None and (_whole(path, tokenizer_only) or all((path / name).exists() for name in ADAPTER_FILES)):
        return path
    try:
        parts = choose(ggufs(path), tag)
    except ValueError:
        return None
    return path / parts[0] if all((path / part).exists() for part in parts) else None


def ggufs(folder: Path) -> list[str]:
    """The .gguf files in a directory and up to four below it, as paths from there; hidden folders are left out."""
    found = []
    for place, folders, files in os.walk(folder):  # what can't be read is passed over
        below = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if len(below.parts) < 4 else []
        found += [(below / name).as_posix() for name in files if name.endswith(".gguf") and not name.startswith(".")]
    return found


def _whole(path: Path, tokenizer_only: bool) -> bool:
    if not (path / "config.json").exists() or not (path / "tokenizer.json").exists():
        return False
    if tokenizer_only:
        return True
    try:
        if (path / INDEX).exists() and not (path / SINGLE).exists():
            shards = json.loads((path / INDEX).read_text())["weight_map"].values()
        else:
            shards = weight_files(file.name for file in path.iterdir())
        return bool(shards) and all((path / shard).exists() for shard in set(shards))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download(repo: str, revision: str | None, tokenizer_only: bool = False, tag: str | None = None) -> Path:
    """The snapshot in the local cache, or its .gguf, after downloading what is missing.

    Of a repository without safetensors only one .gguf is downloaded (`tag`: which). ValueError says why that is not
    possible.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock, logging

    logging.set_verbosity_error()  # its warnings would appear between a command's lines
    commit, files = _ask(repo, revision, tokenizer_only, tag)
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    for path in (blobs, snapshot):
        path.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / "nanoqwen.lock"), byte_progress() as progress:
        task = progress.add_task(repo, total=sum(file.size for file in files))
        done = 0
        for file in files:
            url = hf_hub_url(repo, file.name, revision=commit)
            _fetch(url, blobs / file.digest, file, lambda have, done=done: progress.update(task, completed=done + have))
            done += file.size
            _link(snapshot / file.name, blobs / file.digest)
    reference = folder / "refs" / (revision or "main")
    if reference.name != commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, commit)
    models = [file.name for file in files if file.name.endswith(".gguf")]
    return snapshot / models[0] if models else snapshot


def _ask(repo: str, revision: str | None, tokenizer_only: bool, tag: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision and its data files, tokenizer.json and the weights last: then everything is there."""
    commit, found = listing(repo, revision)
    wanted = _wanted([file.name for file in found], tokenizer_only, tag)
    files = [file for file in found if file.name in wanted]
    if any(file.name.endswith(".gguf") for file in files):
        return commit, sorted(files)
    return commit, sorted(files, key=lambda file: (file.name.endswith(".safetensors"), file.name == "tokenizer.json"))


def _wanted(names: list[str], tokenizer_only: bool, tag: str | None) -> list[str]:
    """Which of a repository's files a run needs: those of the official layout, of an adapter, or of one .gguf."""
    patterns, last = (TOKENIZER_FILES, "tokenizer.json") if tokenizer_only else (DATA_FILES, ".safetensors")
    plain = [name for name in names if "/" not in name or name == POOLING]
    data = [name for name in plain if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if tag is None and any(name.endswith(last) for name in data):
        return data
    if tag is None and set(ADAPTER_FILES) <= set(plain):
        return data + ADAPTER_FILES
    # The folders of a path become folders of the cache, so none may lead out of it.
    models = [name for name in names if re.fullmatch(r"(?:\w[\w.-]*/){0,4}\w[\w.-]*\.gguf", name, re.ASCII)]
    if models:
        parts = choose(models, tag)
        if missing := [part for part in parts if part not in models]:
            raise ValueError(f"the hub lacks a part of this model: {missing[0]}")
        return parts
    if tag is not None:
        raise ValueError(f"no .gguf file on the hub, so {tag} matches nothing there; leave it out")
    if tokenizer_only:
        raise ValueError("no tokenizer.json on the hub; name the model that this one was made from")
    if "config.json" in plain and (weights := weight_files(plain)):
        return data + weights
    raise ValueError("no model.safetensors on the hub; pickle weights (.bin) can run code and are never loaded")


def listing(repo: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit of a revision and all of its files, whatever they are."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if is_offline_mode():
        raise HubUnreachable("not in the cache, and HF_HUB_OFFLINE forbids asking the hub")

    try:
        info = reach(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    except RevisionNotFoundError:
        raise ValueError(f"the hub has no revision {revision or 'main'} of this model") from None
    except RepositoryNotFoundError as error:
        if error.response.headers.get("X-Error-Code") == "GatedRepo":  # its class is derived from this one
            raise refusal("the hub", error.response) from None
        raise ValueError("the hub has no such model (or it is private)") from None
    except HfHubHTTPError as error:
        raise refusal("not in the cache, and the hub", error.response) from None
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
        raise ValueError(
            "the hub's answer is no description of a model; check HF_ENDPOINT, or a proxy's page"
        ) from None
    except Exception as error:  # the HTTP library's classes (DNS, time-out, 5xx): all the same to a user
        raise HubUnreachable("not in the cache, and the hub can't be reached") from error
    files = [
        RemoteFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in info.siblings or []
    ]
    for digest in (info.sha, *(file.digest for file in files)):  # they become names of files
        if not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", str(digest)):
            raise ValueError(f"the hub's answer has {str(digest)[:80]!r} where a hash is expected; check HF_ENDPOINT")
    if not all(type(file.size) is int and 0 <= file.size < 1 << 48 for file in files):
        raise ValueError("the hub's answer has a file of impossible size; check HF_ENDPOINT")
    return info.sha, files


def download_all(repo: str, revision: str | None, directory: Path) -> str:
    """Downloads every file of a repository into a directory, for those who look at it, and returns the commit."""
    from huggingface_hub.utils import build_hf_headers

    commit, files = listing(repo, revision)
    with byte_progress() as progress:
        task = progress.add_task(repo, total=sum(file.size for file in files))
        done = 0
        for file in files:
            parts = Path(file.name).parts
            if Path(file.name).is_absolute() or ".." in parts or not parts:
                raise ValueError(f"the hub's answer has the file name {file.name[:80]!r}; check HF_ENDPOINT")
            path = directory / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if file.size:
                transfer(url(repo, commit, file.name), build_hf_headers(), path, file.size, lambda have: None)
            done += file.size
            progress.update(task, completed=done)
    return commit


def get(path: str, limit: int) -> bytes:
    """A small document of the hub's API. ValueError where it has none or more than `limit` bytes."""
    from huggingface_hub import constants

    return read_document(constants.ENDPOINT + path, limit)


def url(repo: str, commit: str, name: str) -> str:
    """The address of one file."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, name, revision=commit)


def _fetch(url: str, blob: Path, file: RemoteFile, report: Callable[[int], object]) -> None:
    """Downloads one file; a partial transfer stays under a name of its own, and the next one resumes it."""
    from huggingface_hub.utils import build_hf_headers

    if blob.exists():
        return
    part = blob.with_name(f"{blob.name}.nanoqwen")
    part.touch()
    failures = 0
    while True:
        before = part.stat().st_size
        try:
            transfer(url, build_hf_headers(), part, file.size, report)
            break
        except HubUnreachable as error:
            failures = 1 if part.stat().st_size > before else failures + 1
            if failures == ATTEMPTS:
                raise HubUnreachable(f"the download stopped ({error})") from error
            time.sleep(failures)
    large = len(file.digest) == 64
    digest = sha256(part) if large else hashlib.sha1(b"blob %d\0" % file.size + part.read_bytes()).hexdigest()
    if digest != file.digest:
        part.unlink()
        raise ValueError(f"{file.name} arrived damaged from the hub (its hash does not match); run the command again")
    publish(part, blob)


def _link(name: Path, blob: Path) -> None:
    """The file's name in the snapshot; a relative link, so that the cache can be moved."""
    if not name.exists():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        name.symlink_to(os.path.relpath(blob, name.parent))
