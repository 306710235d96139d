"""What a conversion starts from and where its result may go.

`Source` is an opened checkpoint with the files that belong to it, read a piece at a time; `check_place` and
`check_disk` reject a place where the result would destroy something or does not fit.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from formats import record
from formats.checkpoint import open_checkpoint
from formats.dequantize import unpacked
from formats.source import BUNDLED_MODEL, DEFAULT_MODEL, resolve, resolve_default
from formats.tensors import all_finite

PIECE = 1 << 19  # values processed at a time: few enough for the cache
SPARE_DISK = 64 << 20  # bytes that must stay free

# What belongs to a checkpoint besides its weights and config.json.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "README.md",
    "LICENSE",
)


class Source:
    """An opened checkpoint and the files beside it. `given` is what the user called it."""

    def __init__(self, given: str | None, adapter: str | None = None):
        self.path = resolve_default(given)
        self.adapter = adapter and resolve(adapter, "--adapter")
        self.given = given or (str(self.path) if self.path == BUNDLED_MODEL else DEFAULT_MODEL)
        self.checkpoint = unpacked(open_checkpoint(self.path, self.adapter))
        self.config, self.tensors = self.checkpoint.config, self.checkpoint.tensors

    @property
    def name(self) -> str:
        """The prefix of default output names."""
        given = Path(self.given.partition("@")[0])
        return given.stem if given.suffix == ".gguf" else given.resolve().name

    @property
    def is_directory(self) -> bool:
        return self.path.is_dir()

    @property
    def files(self) -> dict[str, Path]:
        """Every file that the result depends on."""
        beside = [self.checkpoint.path / name for name in ("config.json", *CARRIED)]
        beside += [self.checkpoint.text_path / name for name in CARRIED]  # with an adapter's own tokenizer
        return {file.name: file for file in (*self.checkpoint.files, *beside) if file.is_file()}

    def describe(self, hashes: record.HashThread) -> dict[str, Any]:
        """The source as the record keeps it. A snapshot in the hub's cache is named by its commit."""
        revision = self.path.name if self.path.parent.name == "snapshots" else None
        path = str(self.path.absolute())
        adapter = {} if self.adapter is None else {"adapter": str(self.adapter)}
        return {"model": self.given, "path": path, "revision": revision, **adapter, "files": hashes.result()}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows, at most PIECE values at a time, copied so that the file's pages can be released at once."""
        values = self.checkpoint.read(name)
        step = max(1, PIECE // math.prod(values.shape[1:]))
        for start in range(0, values.shape[0], step):
            piece = values[start : start + step].clone()
            self.checkpoint.release(name)
            if not all_finite(piece):  # damage must not spread
                raise ValueError(f"{self.path}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
            yield piece

    def carry(self, directory: Path) -> None:
        """Copies, or rebuilds from a GGUF's metadata, the tokenizer and what else belongs to a checkpoint.

        An adapter's own tokenizer takes precedence over its base's.
        """
        for folder in (self.checkpoint.path, self.checkpoint.text_path):
            for name in CARRIED if folder.is_dir() else ():
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, directory / name)
        if (directory / "tokenizer.json").exists() or not self.checkpoint.path.is_file():
            return
        tokenizer, tokenizer_config = self.checkpoint.tokenizer()
        write_json(directory / "tokenizer.json", tokenizer)
        write_json(directory / "tokenizer_config.json", tokenizer_config)
        if self.checkpoint.generation_config:
            write_json(directory / "generation_config.json", self.checkpoint.generation_config)


class Checked:
    """A source's checkpoint with tensors checked to be finite and copied: the file's pages are released once read."""

    def __init__(self, source: Source):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source.checkpoint, name)

    def read(self, name: str) -> torch.Tensor:
        info, row = self.tensors[name], 0
        values = torch.empty(info.shape, dtype=info.dtype)
        for piece in self._source.pieces(name):
            values[row : row + len(piece)] = piece
            row += len(piece)
        return values


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---- the place of the result -----------------------------------------------------------------------------------------


def check_place(out: Path, source: Source, is_directory: bool, force: bool) -> None:
    """Rejects a place where the result would destroy something, before any work is done."""
    real, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source.path))
    files = {Path(os.path.realpath(file)) for file in source.files.values()}
    if real == origin or real in files or (out.exists() and any(out.samefile(file) for file in files)):
        raise ValueError(f"--out {out}: that is the source itself; give another name")
    if source.is_directory and real.is_relative_to(origin):
        raise ValueError(f"--out {out}: is inside the source {source.path}; choose a place outside it")
    if any(file.is_relative_to(real) for file in files):
        raise ValueError(f"--out {out}: holds the source {source.path}; choose a place outside it")
    if not (parent := _existing_parent(out)).is_dir():
        raise ValueError(f"--out {out}: {parent} is a file, not a directory; choose another place")
    if not is_directory:
        record.results(out.parent / record.NAME)  # must be able to take an entry
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ValueError(f"--out {out}: exists already; give another name, or --force to replace it")
    if is_directory != out.is_dir():
        kind = "a directory" if out.is_dir() else "not a directory"
        raise ValueError(f"--out {out}: is {kind}, which --force does not replace here; give another name")
    if is_directory and any(out.iterdir()) and not record.is_result(out):
        raise ValueError(
            f"--out {out}: was not written by a conversion, so --force does not delete it; give another name"
        )


def _existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())


def check_disk(out: Path, size: int) -> None:
    folder = _existing_parent(out)
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_DISK:
        raise ValueError(f"--out {out}: needs {show_size(size)}, but only {show_size(free)} are free in {folder}")


def show_size(size: int) -> str:
    unit, letter = next(
        pair for pair in ((10**9, "G"), (10**6, "M"), (10**3, "k"), (1, "")) if size >= pair[0] or not pair[1]
    )
    return f"{size / unit:,.{2 if letter == 'G' else 0}f} {letter}B"
