"""benchmarks/train.py's first peer: transformers' own Qwen3 in the usual loop, in a process of its own.

--measure JSON    speed of some steps (benchmarks/train.py: Job)
--learn JSON      a whole run on texts with a schedule, and its validation losses (benchmarks/tokens.py: Lesson)
"""

import json
import sys
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from benchmarks.tokens import Lesson
from benchmarks.train import Job, PeerRows, measure
from training.optimizers import learning_rate_factor


class Loop:
    """AdamW around a module (ids, targets) -> loss, as nanoGPT and the Trainer of transformers have it by default:
    fused, weight decay for matrices and embeddings alone, gradients clipped at norm 1, autocast for bfloat16. `muon`:
    the learning rate of PyTorch's Muon for the hidden matrices, which AdamW then leaves out."""

    def __init__(
        self, model: nn.Module, lr: float, betas: list[float], weight_decay: float, precision: str, muon: float = 0.0
    ):
        self.model, self.precision = model.train(), precision
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name] if muon else []
        taken = {id(p) for p in hidden}
        matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in taken]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=1e-8, fused=True)]
        if muon:
            scaled = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": weight_decay}
            self.optimizers.append(torch.optim.Muon(hidden, lr=muon, **scaled))
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            return self.model(ids, targets)

    def step(self, ids: Tensor, targets: Tensor, factor: float = 1.0) -> float:
        """One step at `factor` times the learning rates; the loss before it."""
        loss = self.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Qwen3(nn.Module):
    """transformers' model with its own loss, on targets that are shifted already."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss


class Measured:
    """One row of the speed table: `step(number)` is an optimizer step over the rows that train.py has for it."""

    def __init__(self, job: Job, model: nn.Module):
        self.rows = PeerRows(job.config)
        settings = self.rows.settings.optimizer
        if job.compile:
            model.compile()
        self.loop = Loop(model, settings.lr, settings.betas, settings.weight_decay, job.precision)

    def step(self, number: int) -> float:
        return self.loop.step(*self.rows.training(number))


def speed(job: Job) -> Measured:
    logging.disable_progress_bar()
    path = PeerRows(job.config).settings.model.init
    return Measured(job, Qwen3(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)))


def learn(lesson: Lesson) -> list[tuple[int, float]]:
    """(tokens, validation loss) now and then, by the schedule of train.py."""
    torch.set_num_threads(1)
    torch.manual_seed(lesson.seed)
    rows = PeerRows(lesson.config, lesson.seed)
    settings = rows.settings
    model = Qwen3(AutoModelForCausalLM.from_config(Qwen3Config(**settings.model.config)).float())
    loop = Loop(
        model,
        lesson.embedding_lr,
        lesson.betas,
        lesson.weight_decay,
        lesson.precision,
        muon=lesson.lr if lesson.optimizer == "muon" else 0.0,
    )
    tokens, found, steps = 0, [], settings.train.steps
    for number in range(1, steps + 1):
        ids, targets = rows.training(number)
        loop.step(ids, targets, learning_rate_factor(number, steps, settings.schedule))
        tokens += ids.numel()
        if number % settings.train.validate_every == 0 or number == steps:
            with torch.no_grad():
                losses = [loop.loss(*batch).item() for batch in rows.validation()]
            found.append((tokens, sum(losses) / len(losses)))
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    if sys.argv[1] == "--learn":
        print(json.dumps(learn(Lesson(**given))))
    else:
        print(json.dumps(measure(speed, Job(**given))))
