"""What a run reports: metrics.jsonl, the progress line, Weights & Biases, the curve; and how fast it is."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import console
from formats.files import atomic_file
from model import Qwen3
from training import schema
from training.run import Run
from training.schema import Settings

# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name. No MFU for others.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


# --- speed ---


def flops_per_token(model: Qwen3) -> tuple[float, float]:
    """Of a forward and backward pass: that of the weights, and of attention for each position that a token looks at
    (PaLM, https://arxiv.org/abs/2204.02311, appendix B).

    A weight costs 2 operations in the forward pass and 2 for the gradient of its input; 2 more for its own gradient if
    it is trained. Of a mixture of experts only those count that a token is sent to.
    """
    config, weights = model.config, 0.0
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):  # Linear, and quantised ones
            trained = module.weight.requires_grad if hasattr(module, "weight") else False
            active = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
            weights += (6 if trained else 4) * module.in_features * module.out_features * active
    if config.tie_word_embeddings:
        embedding = model.model.embed_tokens.weight
        weights += (6 if embedding.requires_grad else 4) * embedding.numel()
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return weights, float(attention)


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


# --- the log ---


@contextmanager
def reports(run: Run, settings: Settings, is_first: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields log(record): a line of metrics.jsonl, the progress line, and Weights & Biases where that is wanted."""
    if not is_first:
        yield lambda record: None
        return
    steps = settings.train.steps
    with (
        console.task_progress("step", steps, run.step, closing=True) as update,
        weights_and_biases(run, settings) as send,
    ):
        validation_loss = None

        def log(record: dict[str, Any]) -> None:
            nonlocal validation_loss
            validation_loss = record.get("validation_loss", validation_loss)
            run.log(record)
            send(record)
            update(record["step"], headline(record, validation_loss))

        yield log


def headline(record: dict[str, Any], validation_loss: float | None) -> str:
    """The progress line of a step."""
    shown = [f"loss {record['loss']:.4f}"]
    shown += [f"validation {validation_loss:.4f}"] if validation_loss is not None else []
    shown += [f"{name} {record[name]:.3f}" for name in ("accuracy", "margin", "reward", "kl") if name in record]
    shown += [f"{record['tokens_per_second']:,.0f} tokens/s"]
    shown += [f"MFU {record['mfu']:.0%}"] if "mfu" in record else []
    return "  ".join(shown)


@contextmanager
def weights_and_biases(run: Run, settings: Settings) -> Iterator[Callable[[dict[str, Any]], None]]:
    mode = settings.train.wandb
    if mode == "off":
        yield lambda record: None
        return
    import wandb

    config, path = schema.resolved(settings), run.path
    with wandb.init(project="nanoqwen", name=path.name, dir=path, mode=mode, config=config) as remote:
        yield lambda record: remote.log(record, step=record["step"])


def plot(metrics: Path, picture: Path) -> None:
    """Draws the loss over the steps, and the validation loss if there is one; for grpo the reward."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curve = "reward" if "reward" in records[0] else "loss"
    axes.plot([r["step"] for r in records], [r[curve] for r in records], linewidth=0.8, label="training")
    validated = [r for r in records if "validation_loss" in r]
    axes.plot([r["step"] for r in validated], [r["validation_loss"] for r in validated], "o-", label="validation")
    axes.set(xlabel="step", ylabel=curve, yscale="log" if curve == "loss" else "linear")
    axes.legend()
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
