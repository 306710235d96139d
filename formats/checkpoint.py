"""A path as a checkpoint, whatever container it is: a directory in the official layout or a .gguf file."""

from pathlib import Path
from typing import Any

from formats.dequantize import dequantized
from formats.gguf.reader import GGUF
from formats.official_names import HEAD, OfficialHead, OfficialNames
from formats.safetensors_read import Checkpoint


def open_checkpoint(path: str | Path) -> Any:
    """A directory or a .gguf file as a checkpoint object: path, config, tensors, files, read, release, iteration.

    Whatever tool stored it: its tensors have the official names and values to compute with (compressed-tensors' packed
    integers stay: the model computes with them). ValueError says what a directory is that can't be seen so.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUF(path)
    checkpoint = dequantized(OfficialNames(Checkpoint(path)))
    if checkpoint.config.get("tie_word_embeddings") is True and HEAD in checkpoint.tensors:
        return OfficialHead(checkpoint)
    return checkpoint
