"""The official names of tensors that a tool has stored under others: wrapped, prefixed, or without the prefix.

A checkpoint has one embedding, and whatever precedes `embed_tokens` was put there by a tool (`_orig_mod.model.` by
torch.compile, `module.model.` by DataParallel) or left out: Qwen3-Embedding's files hold the bare decoder. So the names
are unambiguous: that prefix is `model.`. A head is beside the decoder, under the outer part of the prefix.
"""

import re
from typing import Any

import torch

from console import notice
from formats.view import View

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What PyTorch's own wrappers insert into module names.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What PEFT inserts around a layer that has an adapter, and around one that is trained as a whole beside its original.
PEFT = re.compile(r"\.(?:base_layer|modules_to_save\.\w+)(?=\.)")
_EMBEDDING = re.compile(r"(?P<prefix>(?:.*\.)?)embed_tokens\.[^.]+")


def official_names(stored: list[str]) -> dict[str, str]:
    """Official name → stored name. Names that are already official, or unknown here, are unchanged.

    Left out are the rotary tables that older tools stored as buffers (config.json states them), and the original
    of a layer that PEFT trained as a whole. ValueError for an adapter that was saved unmerged beside its base.
    """
    adapter = next((name for name in stored if ".lora_" in name), None)
    if adapter is not None:
        raise ValueError(
            f"{adapter} is part of an adapter beside its base's weights, without the alpha that it is merged with; "
            "save the merged model (merge_and_unload in PEFT), or the adapter by itself"
        )
    tables = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
    left_out = (*(f"rotary_emb.{table}" for table in tables), ".original_module.weight", ".original_module.bias")
    bare = {name: PEFT.sub("", WRAPPERS.sub("", name)) for name in stored if not name.endswith(left_out)}
    prefixes = {match["prefix"] for name in bare.values() if (match := _EMBEDDING.fullmatch(name))}
    if len(prefixes) == 1:
        (prefix,) = prefixes
        bare = {name: _official(new, prefix) for name, new in bare.items()}
    result = {new: name for name, new in bare.items()}
    if len(result) < len(bare):
        twice = next(new for name, new in bare.items() if result[new] != name)
        raise ValueError(f"{twice} is stored under two names; save the model again without its wrapper")
    return result


def _official(name: str, prefix: str) -> str:
    outer, found, leaf = name.rpartition("lm_head.")
    if found and prefix.startswith(outer):
        return f"lm_head.{leaf}"
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


class OfficialNames(View):
    """A checkpoint under the official names."""

    def __init__(self, base: Any):
        super().__init__(base)
        try:
            self._stored = official_names(list(base.tensors))
        except ValueError as error:
            raise ValueError(f"{base.path}: {error}") from None
        self.tensors = {official: base.tensors[name] for official, name in self._stored.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.base.read(self._stored[name])

    def release(self, name: str) -> None:
        self.base.release(self._stored[name])


class OfficialHead(View):
    """A checkpoint whose config ties the head to the embedding, checked against what is stored.

    A stored head that is the embedding stays in `tensors`, for a writer that keeps the source's form. One that differs
    was trained separately: it is kept and untied, as in transformers 5. A lone head serves as the embedding too.
    """

    def __init__(self, base: Any):
        super().__init__(base)
        self._stored = EMBEDDING
        if EMBEDDING not in self.tensors:
            self._stored = HEAD
            self.tensors = {EMBEDDING if name == HEAD else name: info for name, info in self.tensors.items()}
        elif not _equal(base):
            self.config = self.config | {"tie_word_embeddings": False}
            if self.tensors[HEAD].shape == self.tensors[EMBEDDING].shape:  # otherwise a shape error follows
                notice(
                    f"{base.path}: {HEAD} differs from the embedding, so they are not tied, whatever config.json says"
                )

    def read(self, name: str) -> torch.Tensor:
        return self.base.read(self._stored if name == EMBEDDING else name)

    def release(self, name: str) -> None:
        self.base.release(self._stored if name == EMBEDDING else name)


def _equal(checkpoint: Any, rows: int = 2048) -> bool:
    """Whether head and embedding are the same, some rows at a time: the pages are released as they are read."""
    if checkpoint.tensors[HEAD] != checkpoint.tensors[EMBEDDING]:
        return False
    head, embedding = checkpoint.read(HEAD), checkpoint.read(EMBEDDING)
    for start in range(0, len(head), rows):
        if not torch.equal(head[start : start + rows], embedding[start : start + rows]):
            return False
        for name in (HEAD, EMBEDDING):
            checkpoint.release(name)
    return True
