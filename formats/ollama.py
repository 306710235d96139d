"""Ollama's models on disk: `manifests/HOST/NAMESPACE/NAME/TAG` says which of `blobs/sha256-…` holds the GGUF.

https://github.com/ollama/ollama/blob/main/docs/import.md and its server/manifest.go. A blob has no suffix.
"""

import json
import re
from pathlib import Path

MODEL_LAYER = "application/vnd.ollama.image.model"
FROM = re.compile(r"(?:\s*(?:#.*)?\n)*\s*FROM\s+(?P<model>\S.*)", re.IGNORECASE)


def model_of_manifest(path: Path, start: bytes) -> Path | None:
    """The blob of a manifest's model; None where the file is no manifest. `start` is how the file begins."""
    if not start.lstrip().startswith(b"{") or b"application/vnd." not in start or path.stat().st_size > 1 << 20:
        return None
    try:
        layers = json.loads(path.read_bytes())["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == MODEL_LAYER)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return None
    if not re.fullmatch("sha256:[0-9a-f]{64}", str(digest)):
        return None
    blob = digest.replace(":", "-")
    return next((found for folder in path.parents if (found := folder / "blobs" / blob).is_file()), None)


def manifests(folder: Path) -> list[Path]:
    """The manifests below a folder of Ollama's (`~/.ollama`, its `models` or their `blobs`); else none."""
    roots = (folder / "manifests", folder / "models" / "manifests", folder.parent / "manifests")
    found = next((root for root in roots if root.is_dir() and (root.parent / "blobs").is_dir()), None)
    return sorted(file for file in found.glob("*/*/*/*") if file.is_file()) if found else []


def from_of_modelfile(start: bytes) -> str | None:
    """What the FROM of a Modelfile names; None where the text is no Modelfile."""
    match = FROM.match(start.decode("utf-8", "replace"))
    return match["model"].strip().strip("\"'") if match else None
