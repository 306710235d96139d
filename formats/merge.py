"""A checkpoint with a PEFT adapter merged into its weights, one tensor at a time: W + scale · B·A, as PEFT merges."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from formats.adapter import WEIGHTS, AdapterConfig, parse_name
from formats.mistaken import PICKLE_SUFFIXES
from formats.official_names import EMBEDDING, HEAD, WRAPPERS
from formats.safetensors_read import SafetensorsFile
from formats.tensors import SAVED_EMPTY
from formats.view import View

MATRICES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
KNOWN = {part for pair in MATRICES for part in pair} | {"lora_magnitude_vector", "weight", "bias"}


class Merged(View):
    """`base` with the adapter of a directory: LoRA, rsLoRA, DoRA, and fully trained modules.

    Values are added in float32 and cast back to the base's dtype. ValueError for an adapter of another model.
    """

    def __init__(self, base: Any, directory: Path):
        super().__init__(base)
        self._adapter = AdapterConfig(directory)
        pickles = [file for file in directory.glob("adapter_model.*") if file.suffix in PICKLE_SUFFIXES]
        if pickles and not (directory / WEIGHTS).is_file():
            self._fail("only pickle weights, which can run code and are never opened; save the adapter as safetensors")
        self._file = SafetensorsFile(directory / WEIGHTS)
        self.files = [*base.files, directory / WEIGHTS, self._adapter.path]
        self.text_path = directory if (directory / "tokenizer.json").is_file() else base.text_path
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)  # official name → part → stored name
        adapters = set()
        for stored in self._file.tensors:
            module, part, adapter = parse_name(WRAPPERS.sub("", stored))
            adapters.add(adapter)
            if part not in KNOWN:
                self._fail(f"{stored} is not part of a LoRA adapter that can be merged here")
            self._parts[f"{module}.{'bias' if part == 'bias' else 'weight'}"][part] = stored
        if not self._parts:
            self._fail("no tensors in it")
        if len(named := sorted(adapters - {None})) > 1:
            self._fail(
                f"{len(named)} adapters in it ({', '.join(named[:8])}); save the one you want in a file of its own"
            )
        self.tensors = dict(base.tensors)
        for name, parts in self._parts.items():
            self._check(name, parts)
        self._settle_head()

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{self._adapter.directory / WEIGHTS}: {problem}")

    def _source(self, name: str) -> str:
        """The base's name of a tensor: a tied head is its embedding."""
        tied = name == HEAD and HEAD not in self.base.tensors and self.config.get("tie_word_embeddings")
        return EMBEDDING if tied else name

    def _check(self, name: str, parts: dict[str, str]) -> None:
        """Checks the parts against the base's tensor; describes the merged one."""
        shapes = {part: self._file.tensors[stored].shape for part, stored in parts.items()}
        info = self.base.tensors.get(self._source(name))
        if info is None:
            self._fail(f"adapts {name}, which {self.base.path} does not have")
        whole = shapes.pop("weight", shapes.pop("bias", info.shape))  # fully trained, or saved with the adapter
        if whole[1:] != info.shape[1:] or (name not in (EMBEDDING, HEAD) and whole != info.shape):
            self._fail(f"{name} of shape {list(whole)} does not fit the base's {list(info.shape)}")
        self.tensors[name] = info = info._replace(shape=whole)
        if not shapes:
            return
        pair = next((pair for pair in MATRICES if set(pair) <= set(shapes)), None)
        if pair is None:
            self._fail(f"{name} of its adapter has only {', '.join(shapes)}")
        if any(0 in shape for shape in shapes.values()):
            self._fail(f"the matrices of {name} were {SAVED_EMPTY}")
        (rank, across), (down, inner) = (shapes[part] if len(shapes[part]) == 2 else (0, 0) for part in pair)
        fits = (down, across) == (info.shape if pair == MATRICES[0] else info.shape[::-1])
        magnitude = shapes.get("lora_magnitude_vector")
        if not fits or rank != inner or rank == 0 or (magnitude and magnitude[0] != info.shape[0]):
            self._fail(f"{name} {list(info.shape)}: {', '.join(f'{part} {list(s)}' for part, s in shapes.items())}")
        if self._adapter.rank not in (None, rank):
            self._fail(
                f"{name} of rank {rank}, but {self._adapter.path} says r {self._adapter.rank}; one of them is wrong"
            )

    def _settle_head(self) -> None:
        """The config of the merged model: a larger vocabulary, a head that is no longer the embedding."""
        rows = self.tensors[EMBEDDING].shape[0]
        if rows != self.base.tensors[EMBEDDING].shape[0]:
            self.config = self.config | {"vocab_size": rows}
        if self.config.get("tie_word_embeddings") and EMBEDDING in self._parts and HEAD not in self._parts:
            self._fail(
                "adapts the embedding, to which the base ties its head, but not the head, so the head is ambiguous"
            )

    def read(self, name: str) -> torch.Tensor:
        parts = {part: self._file.read(stored) for part, stored in self._parts.get(name, {}).items()}
        if not parts:
            return self.base.read(name)
        whole = parts.pop("weight", parts.pop("bias", None))
        weight = self.base.read(self._source(name)) if whole is None else whole.to(self.tensors[name].dtype)
        if not parts:
            return weight
        if "lora_A" in parts:
            a, b = parts["lora_A"].float(), parts["lora_B"].float()
            added = b @ a
        else:
            a, b = parts["lora_embedding_A"].float(), parts["lora_embedding_B"].float()
            added = (b @ a).T
        added *= self._adapter.scale(name.removesuffix(".weight"), len(a))
        merged = added.add_(weight.float())
        if "lora_magnitude_vector" in parts:  # DoRA (https://arxiv.org/abs/2402.09353): each row has its own magnitude
            norms = torch.linalg.norm(merged, dim=1, keepdim=True)
            merged *= parts["lora_magnitude_vector"].float().reshape(-1, 1) / norms
        return merged.to(weight.dtype)

    def release(self, name: str) -> None:
        if name in self.base.tensors or name == HEAD:
            self.base.release(self._source(name))
        for stored in self._parts.get(name, {}).values():
            self._file.release(stored)
