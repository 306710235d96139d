"""Which checkpoints are embedding models: sentence-transformers' files beside the weights, or a GGUF's metadata."""

from pathlib import Path

from formats.gguf.reader import GGUF
from formats.hub import MODULES, POOLING
from formats.json_file import read_json

KINDS = ("Transformer", "Pooling", "Normalize")
LAST = 3  # llama.cpp's LLAMA_POOLING_TYPE_LAST


def has_pooling(path: Path) -> bool:
    """Whether its vectors are made as Qwen3-Embedding's are: the last token's state, L2-normalised. This server
    knows no other recipe: it answers those with an error rather than with a wrong vector."""
    if path.is_file():
        metadata = GGUF(path).metadata
        return metadata.get(f"{metadata.get('general.architecture')}.pooling_type") == LAST
    modules, pooling = path / MODULES, path / POOLING
    if not modules.exists() or not pooling.exists():
        return False
    listed, mode = read_json(modules, list), read_json(pooling)
    names = [str(module.get("type")).rpartition(".")[2] for module in listed if isinstance(module, dict)]
    chosen = [name for name, value in mode.items() if name.startswith("pooling_mode_") and value is True]
    last = chosen == ["pooling_mode_lasttoken"] or mode.get("pooling_mode") == "lasttoken"
    return bool(names) and set(names) <= set(KINDS) and last and mode.get("include_prompt", True) is True
