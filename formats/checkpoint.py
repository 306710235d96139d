"""A path as a checkpoint, whatever container it is: a directory in the official layout or a .gguf file."""

from pathlib import Path

from formats.gguf.reader import GGUF
from formats.safetensors_read import Checkpoint


def open_checkpoint(path: str | Path):
    """A directory or a .gguf file as a checkpoint object: path, config, tensors, files, read, release, iteration."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUF(path)
    return Checkpoint(path)
