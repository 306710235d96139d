"""A path as a checkpoint, whatever container it is: a directory in the official layout or a .gguf file."""

from pathlib import Path
from typing import Any

from formats.adapter import AdapterConfig, is_adapter
from formats.dequantize import dequantized, unpacked
from formats.files import as_path
from formats.fused_experts import SplitExperts
from formats.gguf.reader import GGUF
from formats.merge import Merged
from formats.official_names import HEAD, OfficialHead, OfficialNames
from formats.safetensors_read import Checkpoint


def open_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Any:
    """A directory or a .gguf file as a checkpoint object: path, config, tensors, files, read, release, iteration.

    Whatever tool stored it: its tensors have the official names and values to compute with (compressed-tensors' packed
    integers stay: the model computes with them). A directory that holds only an adapter is its base with the adapter
    merged; `adapter` is another such directory. ValueError says what a directory is that cannot be opened so.
    """
    path = as_path("path", path)
    if is_adapter(path):
        if adapter is not None:
            raise ValueError(f"{path}: an adapter itself; give its base as the model, or merge them in turn")
        path, adapter = AdapterConfig(path).base(), path
    checkpoint = GGUF(path) if path.is_file() else dequantized(SplitExperts(OfficialNames(Checkpoint(path))))
    if adapter is not None:
        checkpoint = Merged(unpacked(checkpoint), Path(adapter))
    if checkpoint.config.get("tie_word_embeddings") is True and HEAD in checkpoint.tensors:
        return OfficialHead(checkpoint)
    return checkpoint
