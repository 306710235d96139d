"""The weights of a run: its starting model, the unsharded model, and what a checkpoint saves."""

import hashlib
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from chat import Chat
from data.shard_format import END_OF_TEXT
from formats.json_file import read_json
from formats.source import resolve
from inference.decode import add_end_token
from model import Config, Qwen3
from training.lora import add_lora, load_adapter, merged_weights, save_adapter
from training.optimizers import full_tensor
from training.processes import Processes
from training.run import Run
from training.schema import Settings
from training.sources import agreed


def begin(settings: Settings, chat: Chat, processes: Processes, resume: bool) -> tuple[Run, Qwen3, Qwen3 | None]:
    """The run, its model at the current step, and a frozen copy of the starting weights where GRPO's KL needs one."""
    lora, out = settings.lora, Path(settings.train.out)
    needs_reference = settings.stage == "grpo" and settings.grpo.kl > 0
    is_new, model, reference = not (out / "latest").exists(), None, None
    if is_new or lora.rank or needs_reference:
        model = starting_model(settings, chat, processes.device)
    run = Run(settings, resume)
    processes.wait()  # every process has read the folder that the first one now writes
    if processes.is_first:
        run.open(settings, resume)
    if lora.rank:
        add_lora(model, lora.rank, lora.alpha, lora.targets, settings.train.seed)
        if not is_new:
            load_adapter(model, run.latest / "adapter")
        return run, model, None
    if needs_reference:
        reference = deepcopy(model).requires_grad_(False)
    if not is_new:
        model = Qwen3.from_pretrained(run.latest.resolve(), dtype=torch.float32).to(processes.device).train()
    return run, model, reference


def starting_model(settings: Settings, chat: Chat, device: torch.device) -> Qwen3:
    """The model that a run starts from: a checkpoint, or random weights that depend on the seed alone.

    In float32; with adapters, which leave the weights unchanged, in train.dtype. If a resumed run will need these exact
    weights again, their hash becomes model.fingerprint.
    """
    if (settings.model.init is None) == (settings.model.config is None):
        raise ValueError("exactly one of model.init and model.config must be given")
    if settings.lora.rank and settings.model.init is None:
        raise ValueError("lora adapts a trained model; name it by model.init, or leave lora out")
    vocabulary = chat.tokenizer.get_vocab_size()
    tokens = {"eos_token_id": chat.eos_token_id, "pad_token_id": chat.tokenizer.token_to_id(END_OF_TEXT)}
    if settings.model.init is not None:
        dtype = getattr(torch, settings.train.dtype) if settings.lora.rank else torch.float32
        model = Qwen3.from_pretrained(resolve(settings.model.init, "model.init"), dtype=dtype)
        if model.config.quantization_config is not None and not settings.lora.rank:
            raise ValueError(
                f"model.init {settings.model.init} has quantised weights, which can't be trained themselves; train "
                "adapters over them (lora.rank=16), or start from the checkpoint that was quantised"
            )
    else:
        torch.manual_seed(settings.train.seed)
        try:
            model = Qwen3(Config(**{"vocab_size": vocabulary, **tokens, **settings.model.config}))
        except ValueError as error:
            raise ValueError(f"model.config: {str(error).removeprefix('config: ')}") from None
    if model.config.vocab_size < vocabulary:
        raise ValueError(
            f"vocab_size {model.config.vocab_size} in model.config is less than the {vocabulary} tokens of "
            f"{settings.model.tokenizer}; leave it out"
        )
    if settings.train.sequence > model.config.context_length:
        raise ValueError(
            f"train.sequence {settings.train.sequence:,} is longer than the model's context of "
            f"{model.config.context_length:,} tokens; lower it, or raise max_position_embeddings in model.config"
        )
    advice = resolve(settings.model.tokenizer, "model.tokenizer", tokenizer_only=True) / "generation_config.json"
    if advice.is_file():
        model.generation_config = read_json(advice)  # what the run's checkpoints will say
    if settings.stage != "pretrain":
        add_end_token(model, chat.end_of_turn_id)
    if settings.lora.rank or settings.stage == "dpo" or (settings.stage == "grpo" and settings.grpo.kl > 0):
        stated, found = settings.model.fingerprint, weights_hash(model)
        settings.model.fingerprint = agreed("model.fingerprint", stated, found, "the weights")
    return model.to(device).train()


def full_model(model: Qwen3, parallel: str) -> Qwen3:
    """The unsharded model, also under FSDP; every process must call this."""
    if parallel != "fsdp":
        return model
    return with_weights(model, {name: full_tensor(tensor).cpu() for name, tensor in model.state_dict().items()})


def with_weights(model: Qwen3, weights: dict[str, Tensor]) -> Qwen3:
    """An unquantised model of the same shape and other weights."""
    config = deepcopy(model.config)
    config.quantization_config = None
    with torch.device("meta"):
        copy = Qwen3(config)
    copy.load_state_dict(weights, assign=True)
    copy.generation_config = model.generation_config
    copy.model.rope_frequencies = model.model.rope_frequencies.to(next(iter(weights.values())).device)
    return copy


def write_model(model: Qwen3, settings: Settings, directory: Path) -> None:
    """A checkpoint in the official layout; adapters are merged into it and saved beside it in PEFT's layout."""
    lora = settings.lora
    if not lora.rank:
        return model.save_pretrained(directory)
    with_weights(model, merged_weights(model)).save_pretrained(directory)
    save_adapter(model, directory / "adapter", settings.model.init, lora.rank, lora.alpha, lora.targets)


def weights_hash(model: Qwen3) -> str:
    """A hash of all weights but the adapters'."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
