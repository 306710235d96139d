"""What a run shows: the progress bar, speeds, the curve."""

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import console
from formats.files import atomic_file
from model import Qwen3

# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name. Others: MFU n/a.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def flops_per_token(model: Qwen3) -> tuple[float, float]:
    """Of a forward and backward pass: 6 for every weight that multiplies; attention's, to be multiplied by the mean
    number of positions that a token looks at (PaLM, https://arxiv.org/abs/2204.02311, appendix B)."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * (weights + head), float(attention)


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@contextmanager
def progress_bar(steps: int, start: int, shown: bool):
    """Yields update(step, text): a bar in a terminal, else a line now and then."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=console.stderr, disable=not (shown and console.stderr.is_terminal)) as progress:
        task = progress.add_task("", total=steps, completed=start)

        def update(step: int, text: str) -> None:
            nonlocal last
            progress.update(task, completed=step, description=text)
            if progress.disable and shown and (time.monotonic() - last > 15 or step == steps):
                last = time.monotonic()
                console.notice(f"step {step}/{steps}  {text}")

        yield update


def headline(record: dict[str, Any]) -> str:
    """What the progress bar shows of a step."""
    shown = [f"{name} {record[name]:.3f}" for name in ("accuracy", "margin", "reward", "kl") if name in record]
    mfu = f"MFU {record['mfu']:.0%}" if "mfu" in record else "MFU n/a"
    return "  ".join([f"loss {record['loss']:.4f}", *shown, f"{record['tokens_per_second']:,.0f} tokens/s", mfu])


def plot(metrics: Path, picture: Path) -> None:
    """The loss over the steps, and the validation loss where there is one; of replies, the reward."""
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
