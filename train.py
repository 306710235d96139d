"""One training loop for every stage.

    python train.py configs/toy.yaml --set train.steps=200 train.out=runs/first
    python train.py configs/toy.yaml --resume
    python train.py --keys                     lists every key of a config

A run writes its folder `train.out`:
    config.yaml      the resolved settings; --resume refuses others
    metrics.jsonl    one object a step: step, loss (mean over the step's targets), tokens (rows' tokens up to here), ...
    checkpoints/     the last `train.keep` checkpoints: the official layout, trainer.safetensors and trainer.json beside
    latest           the last of them
    loss.png         the curve

The data of a step is a pure function of its number (data/sources.py), so what a checkpoint has to hold is the weights,
the optimizers' state, the random state and the step. A run that was killed at any moment and resumed gives losses
equal to the bit to one that never stopped, on a CPU and on a GPU in deterministic mode.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import console
from chat import Chat
from configs import schema
from configs.schema import Settings
from data.sources import Conversations, Shards, matching
from formats.files import atomic_file
from formats.run import Run
from formats.source import resolve
from generate import generate
from model import Config, Qwen3
from objectives import IGNORED, Batch, Objective
from ops.machine import pick_device
from sampling import SamplingParams

END_OF_TEXT = "<|endoftext|>"
# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name. Others: MFU n/a.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


# --- what is trained, and how its weights move ---


def build_model(settings: Settings, chat: Chat, device: torch.device) -> Qwen3:
    """A model in float32: from a checkpoint, or with random weights that depend on the seed alone."""
    if (settings.model.init is None) == (settings.model.config is None):
        raise ValueError("exactly one of model.init and model.config must be given")
    vocabulary = chat.tokenizer.get_vocab_size()
    tokens = {"eos_token_id": chat.eos_token_id, "pad_token_id": chat.tokenizer.token_to_id(END_OF_TEXT)}
    if settings.model.init is not None:
        model = Qwen3.from_pretrained(settings.model.init, dtype=torch.float32)
    else:
        torch.manual_seed(settings.train.seed)
        model = Qwen3(Config(**{"vocab_size": vocabulary, **tokens, **settings.model.config}))
    if model.config.vocab_size < vocabulary:
        raise ValueError(
            f"vocab_size {model.config.vocab_size} in model.config is less than the {vocabulary} tokens of "
            f"{settings.model.tokenizer}; leave it out"
        )
    return model.to(device).train()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie cut over processes; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everywhere(tensor: Tensor) -> Tensor:
    """A cut tensor as one that every process holds as a whole: Muon's bfloat16 products must not be summed in parts."""
    return tensor.redistribute(placements=[Replicate()]) if isinstance(tensor, DTensor) else tensor


def placed_like(model: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor laid over the processes as `model` is."""
    return distribute_tensor(tensor, model.device_mesh, model.placements) if isinstance(model, DTensor) else tensor


class Optimizers:
    """Muon for the hidden matrices and AdamW for embeddings, head and norms, or AdamW for all, stepped as one.

    Muon (https://kellerjordan.github.io/posts/muon/) with updates scaled to the size of AdamW's
    (https://arxiv.org/abs/2502.16982), so that one learning rate serves both.
    """

    def __init__(self, model: Qwen3, settings: schema.Optimizer):
        named = dict(model.named_parameters())
        hidden = {name: p for name, p in named.items() if p.ndim == 2 and ".layers." in name}
        matrices = {name: p for name, p in named.items() if p.ndim == 2 and name not in hidden}
        vectors = {name: p for name, p in named.items() if p.ndim < 2}
        decay, other_lr = settings.weight_decay, settings.lr if settings.embedding_lr is None else settings.embedding_lr
        groups = [(matrices, other_lr, decay), (vectors, other_lr, 0.0)]
        if settings.name == "adamw":
            groups.insert(0, (hidden, settings.lr, decay))
        self.names = {id(p): name for name, p in named.items()}
        groups = [{"params": list(p.values()), "lr": lr, "weight_decay": wd} for p, lr, wd in groups if p]
        self.all: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(groups, betas=tuple(settings.betas), eps=1e-8, fused=True)
        }
        if settings.name == "muon":
            self.all["muon"] = torch.optim.Muon(
                list(hidden.values()),
                lr=settings.lr,
                weight_decay=decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; the gradients are gone afterwards."""
        for kind, optimizer in self.all.items():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
                for p in group["params"] if kind == "muon" else ():
                    p.grad = everywhere(p.grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`muon.model.layers.0.mlp.up_proj.weight.momentum_buffer` and the like."""
        return {
            f"{kind}.{self.names[id(p)]}.{key}": whole(value.detach())
            for kind, optimizer in self.all.items()
            for p, slots in optimizer.state.items()
            for key, value in slots.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Whole tensors, each cut as its parameter is."""
        for kind, optimizer in self.all.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    prefix = f"{kind}.{self.names[id(p)]}."
                    slots = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
                    if slots:
                        placed = everywhere(p) if kind == "muon" else p
                        optimizer.state[p] = {
                            key: t.clone() if t.ndim == 0 else placed_like(placed, t.to(p.device, copy=True))
                            for key, t in slots.items()
                        }


def learning_rate_factor(step: int, steps: int, settings: schema.Schedule) -> float:
    """The share of the peak learning rate at a step from 1 to `steps`."""
    warmup = settings.warmup * steps
    if step < warmup:
        return step / warmup
    if settings.name == "wsd":
        decay = settings.decay * steps
        left = min(1.0, (steps - step + 1) / decay) if decay else 1.0
    else:
        left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
    return settings.final + (1 - settings.final) * left


# --- data ---


def build_source(settings: Settings, chat: Chat):
    """Rows for the stage; see data/sources.py."""
    train, data = settings.train, settings.data
    if data.source == "shards":
        if settings.stage != "pretrain":
            raise ValueError(f"data.source shards has no conversations for stage {settings.stage}; use corpus")
        if data.train is None:
            raise ValueError("data.train must name the shard files, as in runs/fineweb/fineweb_train_*.bin")
        vocabulary = chat.tokenizer.get_vocab_size()
        source = Shards(data.train, data.validation, train.seed, train.batch, train.sequence, vocabulary)
        if data.tokens not in (None, source.tokens):
            raise ValueError(f"data.tokens is {data.tokens:,}, but the files of {data.train} have {source.tokens:,}")
        data.tokens = source.tokens
        return source

    def pieces(word: str) -> list[str]:
        return [chat.decode([index]) for index in chat.encode(word)]

    learn_prompt = settings.stage == "pretrain"
    return Conversations(data.seed, train.batch, train.sequence, pieces, chat.render, chat.encode, learn_prompt)


def decide_source(settings: Settings) -> None:
    """`data.source: auto` becomes what there is."""
    data = settings.data
    if data.source == "auto":
        try:
            matching(data.train or "")
            data.source = "shards"
        except ValueError as error:
            data.source, settings.model.tokenizer = "corpus", data.corpus_tokenizer
            console.notice(f"{error}. Until then this run trains on the generated corpus.")


def batches(rows: list, parts: int, device: torch.device, end_of_text: int | None = None) -> list[Batch]:
    """Rows of similar length together, in `parts` padded batches; the padding lies behind and is never learnt.

    With `end_of_text` a token sees nothing before the last such token: documents packed in a row stay apart.
    """
    rows = sorted(rows, key=lambda row: len(row.ids))
    made = []
    for part in range(parts):
        chosen = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
        if chosen:
            ids = padded([row.ids for row in chosen], 0).to(device)
            targets = padded([row.targets for row in chosen], IGNORED).to(device)
            made.append(Batch(ids, targets, None if end_of_text is None else document_mask(ids, end_of_text)))
    return made


def padded(rows: list, filling: int) -> Tensor:
    """Rows of ids, as lists or numpy arrays -> LongTensor [rows, longest]"""
    filled = torch.full((len(rows), max(map(len, rows))), filling)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = torch.as_tensor(row)
    return filled


def document_mask(ids: Tensor, end_of_text: int) -> Tensor:
    """ids [B, T] -> bool [B, 1, T, T]: causal, and within one document (whose first token is the end of text)."""
    document = (ids == end_of_text).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


# --- many processes ---


class Processes:
    """This process among those that torchrun started, or alone. https://pytorch.org/docs/stable/elastic/run.html"""

    def __init__(self, parallel: str, device: str):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.parallel = parallel
        if self.count > 1 and parallel == "none":
            raise ValueError(f"torchrun started {self.count} processes, but train.parallel is none; set ddp or fsdp")
        if parallel != "none" and "RANK" not in os.environ:
            raise ValueError(f"train.parallel is {parallel}: start with torchrun --nproc-per-node N train.py …")
        self.device = torch.device(pick_device(device, "train.device"))
        if self.device.type == "cuda" and self.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if parallel != "none":
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def spread(self, objective: Objective) -> nn.Module:
        """The objective with its model whole in every process (gradients are averaged), or cut over all of them."""
        if self.parallel == "ddp":
            return DistributedDataParallel(objective)
        if self.parallel == "fsdp":
            for block in objective.model.model.layers:
                fully_shard(block)
            fully_shard(objective)
        return objective

    @contextmanager
    def together(self, run: Run):
        """What is done in step with the others: that one of them died is reported by the libraries in many ways."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1:
                raise
            raise ValueError(
                f"another process of this run ended ({error}); go on from {run.latest} with --resume"
            ) from None

    def mine(self, parts: list) -> list:
        return parts[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """Of one number over all processes."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)


# --- the loop ---


class Stop:
    """Ctrl-C and SIGTERM let the step under way finish, then the run is saved; a second Ctrl-C ends at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number


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


class Trainer:
    def __init__(self, settings: Settings, resume: bool):
        decide_source(settings)
        self.settings, train = settings, settings.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.processes = Processes(train.parallel, train.device)
        self.device, self.is_first = self.processes.device, self.processes.rank == 0
        if train.accumulate % self.processes.count:
            raise ValueError(
                f"train.accumulate {train.accumulate} can't be shared out evenly to {self.processes.count} processes"
            )
        self.tokenizer = resolve(settings.model.tokenizer)
        self.chat = Chat.from_pretrained(settings.model.tokenizer)
        self.model = build_model(settings, self.chat, self.device)
        self.source = build_source(settings, self.chat)
        self.end_of_text = self.chat.tokenizer.token_to_id(END_OF_TEXT) if settings.data.mask_documents else None
        self.run = Run(Path(train.out), train.keep, schema.resolved(settings), resume, writes=self.is_first)
        if self.run.step:
            saved = Qwen3.from_pretrained(self.run.latest.resolve(), dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())
        for block in self.model.model.layers if train.checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for block in self.model.model.layers if train.compile else ():
            block.compile()
        self.flops = flops_per_token(self.model)
        self.objective = self.processes.spread(Objective(self.model))
        self.optimizers = Optimizers(self.model, settings.optimizer)
        self.tokens = 0
        if self.run.step:
            state, self.tokens = self.run.load_state()
            self.optimizers.load_state(state)

    def autocast(self):
        enabled = self.settings.train.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step over the rows of all processes; the record of it."""
        train, start = self.settings.train, time.perf_counter()
        parts = batches(self.source.rows(step - 1), train.accumulate, self.device, self.end_of_text)
        targets = sum(batch.count for batch in parts)
        if not targets:
            raise ValueError(f"step {step}: no row is within train.sequence {train.sequence}; raise it")
        with self.processes.together(self.run):
            total = self._backward(self.processes.mine(parts), targets)
            loss = self.processes.sum(total) / targets
            norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), train.clip or math.inf)))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}; lower optimizer.lr or train.clip; "
                f"{self.run.latest} is the last good checkpoint"
            )
        factor = learning_rate_factor(step, train.steps, self.settings.schedule)
        self.optimizers.step(factor)
        tokens = sum(batch.ids.numel() for batch in parts)
        self.tokens += tokens
        seconds = time.perf_counter() - start
        record = {"step": step, "loss": loss, "tokens": self.tokens, "lr": self.settings.optimizer.lr * factor}
        record |= {"grad_norm": norm, "tokens_per_second": tokens / seconds}
        if peak := peak_flops(self.device):
            length = sum(batch.ids.shape[1] * batch.ids.numel() for batch in parts) / tokens
            weights, attention = self.flops
            record["mfu"] = (weights + attention * length / 2) * tokens / seconds / (peak * self.processes.count)
        return record

    def _backward(self, parts: list[Batch], targets: int) -> float:
        """Gradients of the mean loss over all processes' targets; returns the sum of this one's losses."""
        total = 0.0
        for batch in parts:
            with self.autocast():
                loss = self.objective(batch)
            (loss * (self.processes.count / targets)).backward()  # DDP and FSDP take the mean over the processes
            total += float(loss.detach())
        return total

    def whole_model(self) -> Qwen3:
        """The model in one piece, also where it is trained in shares; every process has to ask."""
        if self.settings.train.parallel != "fsdp":
            return self.model
        weights = {name: whole(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        with torch.device("meta"):
            copy = Qwen3(self.model.config)
        copy.load_state_dict(weights, assign=True)
        copy.model.rope_frequencies = self.model.model.rope_frequencies.cpu()
        return copy

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        total, count = 0.0, 0
        for index in range(self.settings.train.validate_batches):
            rows = self.source.validation_rows(index)
            for batch in batches(rows, self.settings.train.accumulate, self.device, self.end_of_text):
                with self.autocast():
                    total, count = total + float(self.objective(batch)), count + batch.count
        return total / count if count else None

    def print_samples(self, model: Qwen3) -> None:
        """Greedy samples: what the model answers (sft), or how it goes on (pretrain)."""
        greedy = SamplingParams(temperature=0, max_new_tokens=160)
        for prompt in self.settings.train.sample_prompts:
            asked = self.settings.stage != "pretrain"
            ids = self.chat.render([{"role": "user", "content": prompt}]) if asked else self.chat.encode(prompt)
            written = list(generate(model, ids, greedy))
            console.notice(f"> {prompt}\n{self.chat.decode(written, skip_special_tokens=True)}")

    def train(self) -> None:
        train, stop = self.settings.train, Stop()
        if self.is_first:
            console.notice(
                f"{sum(p.numel() for p in self.model.parameters()):,} parameters on {self.device.type}, "
                f"{train.batch} rows a step, steps {self.run.step + 1} to {train.steps}"
            )
        with progress_bar(train.steps, self.run.step, self.is_first) as update, self._log() as log:
            for step in range(self.run.step + 1, train.steps + 1):
                record = self.step(step)
                last, stopped = step == train.steps, self.processes.sum(stop.signal) > 0
                if last or (train.validate_every and step % train.validate_every == 0):
                    record |= {"validation_loss": loss} if (loss := self.validation_loss()) is not None else {}
                if self.is_first:
                    log(record)
                    mfu = f"{record['mfu']:.0%}" if "mfu" in record else "n/a"
                    update(step, f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {mfu}")
                if train.sample_every and (last or step % train.sample_every == 0):
                    model = self.whole_model()
                    if self.is_first:
                        self.print_samples(model)
                if last or stopped or step % train.save_every == 0:
                    model, state = self.whole_model(), self.optimizers.state()
                    if self.is_first:
                        self.run.save(model.save_pretrained, state, step, self.tokens, self.tokenizer)
                if stopped:
                    console.notice(f"saved {self.run.latest} at step {step}; go on with --resume")
                    sys.exit(128 + (stop.signal or signal.SIGTERM))
        if self.is_first:
            plot(self.run.metrics, self.run.path / "loss.png")

    @contextmanager
    def _log(self):
        """Yields log(record): a line of metrics.jsonl, and the same names to Weights & Biases where that is wanted."""
        mode = self.settings.train.wandb
        if mode == "off" or not self.is_first:
            yield self.run.log
            return
        import wandb

        config, path = schema.resolved(self.settings), self.run.path
        with wandb.init(project="nanoqwen", name=path.name, dir=path, mode=mode, config=config) as run:

            def log(record: dict[str, Any]) -> None:
                self.run.log(record)
                run.log(record, step=record["step"])

            yield log


def plot(metrics: Path, picture: Path) -> None:
    """The loss over the steps, and the validation loss where there is one."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=0.8, label="training")
    validated = [r for r in records if "validation_loss" in r]
    axes.plot([r["step"] for r in validated], [r["validation_loss"] for r in validated], "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.legend()
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    parser = console.ArgumentParser(description="Trains a Qwen3 by a YAML config.")
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides keys")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/latest")
    parser.add_argument("--keys", action="store_true", help="list every key of a config and end")
    arguments = parser.parse_args()
    if arguments.keys:
        print(schema.table())
        return
    if arguments.config is None:
        raise ValueError("no config given; python train.py configs/toy.yaml")
    Trainer(schema.load(arguments.config, arguments.set), arguments.resume).train()


if __name__ == "__main__":
    console.run(main)
