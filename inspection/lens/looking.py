"""One look from the prompt to the numbers, and the same look again from a page: lens.py is the command around it."""

import math
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import console
from chat import Chat
from formats.checkpoint import open_checkpoint
from formats.files import sha256
from formats.source import resolve, resolve_default
from inference.decode import generate
from inference.params import SamplingParams
from inspection.lens.architecture import architecture
from inspection.lens.numbers import numbers
from inspection.lens.pages import layout, lens_page
from inspection.lens.verify import differences, drawn_differences, read_page
from model import Qwen3, load

SHOWN = 20  # differences that are named
NOTICE = 5.0  # seconds between two lines of progress
SMALL = 1 << 24  # bytes of weights: with less to compute, threads only wait for each other


class Loaded:
    """A model for looking at: float32 unless told otherwise, so that bits are exact."""

    def __init__(self, path: Path, source: str, dtype: str):
        self.chat = Chat.from_pretrained(path)
        checkpoint = open_checkpoint(path)
        self.model: Qwen3 = load(checkpoint, "cpu", getattr(torch, dtype))
        self.facts = {"source": source, "files": {file.name: sha256(file) for file in checkpoint.files}}
        if sum(p.nbytes for p in self.model.parameters()) < SMALL:
            torch.set_num_threads(1)
        kinds: Counter[str] = Counter()
        for info in checkpoint.tensors.values():
            kinds[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape) * info.dtype.itemsize
        size = sum(file.stat().st_size for file in checkpoint.files)
        stored = {"bytes": size, "tensors": len(checkpoint.tensors), "types": dict(kinds)}
        self.architecture = architecture(self.model.config, stored=stored)


def look(options: Namespace) -> dict[str, Any]:
    """The numbers of a prompt and its reply."""
    path = resolve_default(options.model)
    loaded = Loaded(path, options.model or str(path), options.dtype)
    settings = {
        "prompt": options.prompt,
        "answer": options.answer,
        "system": options.system,
        "thinking": options.thinking == "on",
        "raw": options.raw,
        "spans": options.spans,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
        "sampling": options.sampling,
    }
    ids = prompt_ids(loaded.chat, settings)
    return numbers_of(loaded, settings, [*ids, *reply_ids(loaded, settings, ids)], len(ids))


def prompt_ids(chat: Chat, settings: dict[str, Any]) -> list[int]:
    if settings["raw"]:
        return chat.encode(settings["prompt"])
    system = [{"role": "system", "content": settings["system"]}] if settings["system"] is not None else []
    return chat.render([*system, {"role": "user", "content": settings["prompt"]}], settings["thinking"])


def reply_ids(loaded: Loaded, settings: dict[str, Any], prompt: list[int]) -> list[int]:
    """The text that was given as the reply, or what the model generates."""
    if settings["answer"] is not None:
        return loaded.chat.encode(settings["answer"])
    reply = generate(loaded.model, prompt, params_of(settings), chat=loaded.chat)
    return list(console.counted(reply, "tokens of the reply", NOTICE))


def params_of(settings: dict[str, Any]) -> SamplingParams:
    given = {**settings["sampling"], "seed": settings["seed"], "max_new_tokens": settings["max_new_tokens"]}
    return SamplingParams(**given)


def numbers_of(loaded: Loaded, settings: dict[str, Any], ids: list[int], begin: int) -> dict[str, Any]:
    contents = [text for text in (settings["system"], settings["prompt"]) if text is not None]
    start = last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > NOTICE:
            last = time.monotonic()
            console.notice(f"{what}: {done} of {total}, {last - start:.0f} s")

    single = settings["spans"] == "tokens"
    found = numbers(loaded.model, loaded.chat, ids, begin, contents, params_of(settings), single, progress)
    return {**found, "model": loaded.facts, "settings": settings, "architecture": loaded.architecture}


def verify(page: Path, source: str | None) -> bool:
    """Whether a page's numbers are what the model gives; what differs is printed."""
    stated, html = read_page(page)
    drawn_by = stated.pop("layout", None)
    try:
        settings, begin = stated["settings"], stated["reply"]
        ids = [token["id"] for token in stated["tokens"]]
        source = source or stated["model"]["source"]
        if not all(type(token) is int for token in [*ids, begin]) or not isinstance(settings, dict):
            raise TypeError
        loaded = Loaded(resolve(source), source, settings["dtype"])
        found = numbers_of(loaded, settings, ids, begin)
        found["model"]["source"] = stated["model"].get("source")
        apart = []
        prompt = prompt_ids(loaded.chat, settings)
        if prompt != ids[:begin]:
            apart.append((".tokens (prompt)", "ids", "those that the template gives", True))
        elif reply_ids(loaded, settings, prompt) != ids[begin:]:
            apart.append((".tokens (reply)", "ids", "another reply", True))
        apart += differences(stated, found)
        if html is not None and drawn_by == layout():
            apart += drawn_differences(html, lens_page(stated))
        elif html is not None:
            console.notice(f"{page}: drawn by another version of nanoqwen; only the numbers of its data are compared")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{page}: its data lacks what a verification needs ({error!r})") from None
    wrong = [one for one in apart if one[3]]
    for place, said, own, _ in (wrong or apart)[:SHOWN]:
        giver = "its data give" if place.startswith("page (") else "the model gives"
        print(f"{place.lstrip('.')}: the page says {said}, {giver} {own}")
    if len(wrong or apart) > SHOWN:
        print(f"and {len(wrong or apart) - SHOWN} more")
    if apart and not wrong:
        print(f"{len(apart)} numbers differ in digits that another processor may round otherwise; none beyond that.")
    elif not apart:
        print("every number of the page is what the model gives, to the digit")
    return not apart
