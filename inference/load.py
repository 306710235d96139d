"""A session as the command line asks for it: the model, its chat, the settings, and what guesses the next tokens.

The text comes first and PyTorch after it: while PyTorch is imported, which takes a second, the process of the chat
template gets ready; and a wrong --model is named before it.
"""

import math
import os
from argparse import Namespace
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import console
from chat import Chat
from formats.adapter import text_path
from formats.source import resolve, resolve_default
from inference.params import MOST_GUESSES, recommended

if TYPE_CHECKING:
    from inference.session import Session
    from inference.speculate import Speculation
    from model import Qwen3


def load_model(path: Path, options: Namespace, watch: console.Stopwatch | None = None) -> "tuple[Qwen3, Chat]":
    """The model at `path` and its chat, as the flags of `add_model_flags` (inference/flags.py) ask for it.

    Raises ValueError that names the flag whose value is wrong. `watch` gets the phases.
    """
    watch = watch or console.Stopwatch("Python")
    adapter = None if options.adapter is None else resolve(options.adapter, "--adapter")
    text = text_path(path, adapter)
    if text.is_file():  # a .gguf, whose reader needs it
        import_module("torch")
        watch.lap("PyTorch")
    chat = Chat.from_pretrained(text)
    Thread(target=_use_template, args=[chat], daemon=True).start()
    watch.lap("tokenizer")

    import torch

    from formats.checkpoint import open_checkpoint
    from model import load
    from ops.devices import pick_device, pick_kernels, use_kernels
    from ops.memory import release_unused_memory

    watch.lap("PyTorch")
    release_unused_memory()  # before the weights are mapped, so that their memory does not come on top
    device = pick_device(options.device, "--device")
    kernels = pick_kernels(options.kernels, device, "--kernels")
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load(open_checkpoint(path, adapter), device, dtype, check_values=False)  # sampling refuses NaN
    if options.quantize:
        from ops.quant import quantize_

        quantize_(model, options.quantize)
    if options.kv == "int8":
        model.cache_dtype = torch.int8
    if options.compile:  # it fuses the layers by itself; a token under a CUDA graph has its kernels all the same
        from ops.compiled import compile_

        compile_(model, "--compile")
        model.kernels = kernels
    else:
        use_kernels(model, kernels, "--kernels")
    release_unused_memory()
    watch.lap("weights")
    return model, chat


def _use_template(chat: Chat) -> None:
    """Lets the template's process compile it, 20 ms, while PyTorch is imported; a session asks for this first."""
    with suppress(Exception):  # whoever asks again is told
        _ = chat.end_of_turn_id


def load_session(options: Namespace) -> "Session":
    """`options` are those of generate.py. Raises ValueError that names the flag whose value is wrong."""
    watch = console.Stopwatch("Python")
    path = resolve_default(options.model)
    model, chat = load_model(path, options, watch)

    from inference.session import Session
    from ops.limits import read_bandwidth

    thinking = options.thinking != "off"
    chosen = {"seed": int.from_bytes(os.urandom(4), "big"), **options.sampling}
    session = Session(
        model,
        chat,
        recommended(model.generation_config, thinking, **chosen),
        name=options.model or str(path),
        system=options.system,
        thinking=thinking,
        thinking_budget=options.thinking_budget,
        raw=options.raw,
        logprobs=options.logprobs or 0,
        speculation=load_speculation(options, chat, model),
        loop_stop=not options.no_loop_stop,
    )
    watch.lap("session")
    session.start_seconds = watch.seconds
    session.bandwidth = read_bandwidth(model.device) if options.stats else None
    return session


def load_speculation(options: Namespace, chat: Chat, model: "Qwen3") -> "Speculation | None":
    """What guesses the next tokens: a draft model that speaks the same tokens, prompt lookup, or nothing."""
    from formats.checkpoint import open_checkpoint
    from inference.speculate import DraftModel, PromptLookup, Speculation
    from model import load

    if options.draft is None:
        try:
            most = MOST_GUESSES if options.prompt_lookup is None else options.prompt_lookup
            return Speculation(PromptLookup(), most) if most else None
        except ValueError as error:
            raise ValueError(f"--prompt-lookup {error}") from None
    path = resolve(options.draft, "--draft")
    tokens = [one.tokenizer.get_vocab(with_added_tokens=True) for one in (chat, Chat.from_pretrained(path))]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"--draft {options.draft}: its tokenizer is another; a draft model must have the same tokenizer"
        )
    return Speculation(DraftModel(load(open_checkpoint(path), model.device, model.dtype), model.config.vocab_size))


def describe(model: "Qwen3") -> str:
    """`596,049,920 parameters, context 40,960 tokens, bfloat16 on cpu`: what the banner of a chat says of a model."""
    packed, precision = packed_as(model), str(model.dtype).removeprefix("torch.")
    precision = f"{packed} weights, {precision}" if packed else precision
    context = model.config.context_length
    return f"{parameters(model):,} parameters, context {context:,} tokens, {precision} on {model.device.type}"


def packed_as(model: "Qwen3") -> str | None:
    """`int8`, or the types of a GGUF's blocks, `Q4_K, Q6_K`; None where the weights are plain numbers."""
    types = {m.format.name for m in model.modules() if hasattr(m, "weight_blocks")}
    bits = {getattr(m, "bits", None) for m in model.modules()} - {None}
    return ", ".join(sorted(types)) or (f"int{min(bits)}" if bits else None)


def parameters(model: "Qwen3") -> int:
    """How many weights a model has, packed ones counted unpacked."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if getattr(m, "bits", None))
    packed += sum(math.prod(m.shape) for m in model.modules() if hasattr(m, "weight_blocks"))
    return packed + sum(parameter.numel() for parameter in model.parameters())
