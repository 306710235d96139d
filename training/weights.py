"""The model of a run: what it begins with, and in one piece."""

import torch
from torch import Tensor

from chat import Chat
from data.shard_format import END_OF_TEXT
from formats.source import resolve
from formats.tensors import read_json
from model import Config, Qwen3
from training.schema import Settings


def build_model(settings: Settings, chat: Chat, device: torch.device) -> Qwen3:
    """The model that a run begins with: from a checkpoint, or with random weights that depend on the seed alone.

    In float32; under adapters, which leave the weights as they are, in train.dtype.
    """
    if (settings.model.init is None) == (settings.model.config is None):
        raise ValueError("exactly one of model.init and model.config must be given")
    if settings.lora.rank and settings.model.init is None:
        raise ValueError("lora adapts a trained model; name it by model.init, or leave lora out")
    vocabulary = chat.tokenizer.get_vocab_size()
    tokens = {"eos_token_id": chat.eos_token_id, "pad_token_id": chat.tokenizer.token_to_id(END_OF_TEXT)}
    if settings.model.init is not None:
        dtype = getattr(torch, settings.train.dtype) if settings.lora.rank else torch.float32
        model = Qwen3.from_pretrained(settings.model.init, dtype=dtype)
    else:
        torch.manual_seed(settings.train.seed)
        model = Qwen3(Config(**{"vocab_size": vocabulary, **tokens, **settings.model.config}))
    if model.config.vocab_size < vocabulary:
        raise ValueError(
            f"vocab_size {model.config.vocab_size} in model.config is less than the {vocabulary} tokens of "
            f"{settings.model.tokenizer}; leave it out"
        )
    advice = resolve(settings.model.tokenizer) / "generation_config.json"
    if advice.is_file():
        model.generation_config = read_json(advice)  # what the run's checkpoints will say
    return model.to(device).train()


def rebuilt(model: Qwen3, weights: dict[str, Tensor]) -> Qwen3:
    """A plain model of other weights."""
    with torch.device("meta"):
        copy = Qwen3(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.generation_config = model.generation_config
    copy.model.rope_frequencies = model.model.rope_frequencies.to(next(iter(weights.values())).device)
    return copy
