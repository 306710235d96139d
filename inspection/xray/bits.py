"""How well a model knows a row already: bits per token of what the row teaches, -log2 p of each learnt token."""

import math
from collections.abc import Callable

import torch

from data.sources import IGNORED
from inspection.xray.masks import Mask
from model import Qwen3


def bits_under(model: Qwen3, sequence: int) -> Callable[[Mask], float | None]:
    """A mask's bits a learnt token, over those of its rows that fit; None where nothing is learnt."""
    device = next(model.parameters()).device
    vocabulary = model.config.vocab_size

    @torch.inference_mode()
    def measure(mask: Mask) -> float | None:
        total, count = 0.0, 0
        for row in mask.rows:
            targets = torch.as_tensor(list(map(int, row.targets)))
            learnt = targets != IGNORED
            if not 0 < row.length <= sequence or not learnt.any():
                continue
            ids = torch.as_tensor(list(map(int, row.ids)))
            if max(int(ids.max()), int(targets.max())) >= vocabulary:
                raise ValueError(
                    "--model: its vocabulary is smaller than the tokenizer's ids; give its own --tokenizer"
                )
            logits = model(ids[None].to(device))[0].float().log_softmax(-1)
            total -= float(logits[learnt].gather(1, targets[learnt][:, None].to(device)).sum())
            count += int(learnt.sum())
        return total / count / math.log(2) if count else None

    return measure
