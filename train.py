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
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import console
from chat import Chat
from configs import schema
from configs.schema import Settings
from data.sources import Conversations, Shards, matching
from formats.files import atomic_directory, atomic_file, fsync, write_text
from formats.source import resolve
from generate import generate
from model import Config, Qwen3
from objectives import IGNORED, Batch, next_token_loss
from sampling import SamplingParams

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name. Others: MFU n/a.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


# --- what is trained, and how its weights move ---


def device_of(name: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    elif not there[name]:
        raise ValueError(f"train.device is {name}, which this machine has not; use auto")
    return torch.device(name)


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
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`muon.model.layers.0.mlp.up_proj.weight.momentum_buffer` and the like."""
        return {
            f"{kind}.{self.names[id(p)]}.{key}": value.detach()
            for kind, optimizer in self.all.items()
            for p, slots in optimizer.state.items()
            for key, value in slots.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for kind, optimizer in self.all.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    prefix = f"{kind}.{self.names[id(p)]}."
                    slots = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
                    if slots:
                        optimizer.state[p] = {
                            key: t.clone() if key == "step" else t.to(p.device, copy=True) for key, t in slots.items()
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
        return Shards(data.train, data.validation, train.seed, train.batch, train.sequence, vocabulary)

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
            width = max(len(row.ids) for row in chosen)
            ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in chosen]).to(device)
            targets = torch.tensor([row.targets + [IGNORED] * (width - len(row.targets)) for row in chosen]).to(device)
            made.append(Batch(ids, targets, None if end_of_text is None else document_mask(ids, end_of_text)))
    return made


def document_mask(ids: Tensor, end_of_text: int) -> Tensor:
    """ids [B, T] -> bool [B, 1, T, T]: causal, and within one document (whose first token is the end of text)."""
    document = (ids == end_of_text).cumsum(1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


# --- checkpoints and metrics ---


class Run:
    """The folder of a run. Every checkpoint in it is whole; `latest` points to the last one."""

    def __init__(self, settings: Settings, resume: bool):
        self.path, self.keep = Path(settings.train.out), settings.train.keep
        self.latest, self.metrics = self.path / "latest", self.path / "metrics.jsonl"
        config = self.path / "config.yaml"
        resolved = schema.resolved(settings)
        if resume and config.exists():
            saved = yaml.safe_load(config.read_text(encoding="utf-8"))
            if changed := schema.differences(saved, resolved):
                raise ValueError(
                    f"--resume: the run of {config} had another config ({'; '.join(changed)}); use the same, or a new "
                    "train.out"
                )
        elif config.exists():
            raise ValueError(f"train.out {self.path} already holds a run; go on with --resume or take another folder")
        else:
            if resume:
                console.notice(f"{self.path} holds no run yet; it starts from the beginning")
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(config, yaml.safe_dump(resolved, sort_keys=False))
        self.step = self._step_of_latest()
        self._forget_after(self.step)
        self.log_file = self.metrics.open("a", encoding="utf-8")

    def _step_of_latest(self) -> int:
        return json.loads((self.latest / "trainer.json").read_text())["step"] if self.latest.exists() else 0

    def _forget_after(self, step: int) -> None:
        """Steps that were logged but not saved will be done again; a line cut by a kill goes with them."""
        kept = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:step]:
                if not line.endswith("\n") or json.loads(line)["step"] != len(kept) + 1:
                    break
                kept.append(line)
        if len(kept) < step:
            raise ValueError(f"{self.metrics}: lacks steps that {self.latest} has; the run can't be gone on with")
        write_text(self.metrics, "".join(kept))
        for leftover in self.path.glob("checkpoints/.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def log(self, record: dict[str, Any]) -> None:
        self.log_file.write(json.dumps(record) + "\n")
        self.log_file.flush()

    def save(self, model: Qwen3, optimizers: Optimizers, step: int, tokens: int, tokenizer: Path) -> None:
        os.fsync(self.log_file.fileno())  # a checkpoint never knows more steps than the metrics
        directory = self.path / "checkpoints" / f"step-{step:08d}"
        directory.parent.mkdir(exist_ok=True)
        with atomic_directory(directory) as temporary, disk_errors(directory):
            model.save_pretrained(temporary)
            copy_tokenizer(tokenizer, temporary)
            state = optimizers.state() | {"random.cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                state["random.cuda"] = torch.cuda.get_rng_state()
            save_file({name: t.contiguous() for name, t in state.items()}, temporary / "trainer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps({"step": step, "tokens": tokens}) + "\n")
        link = self.path / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(directory.relative_to(self.path))
        link.replace(self.latest)
        fsync(self.path)
        for old in sorted(directory.parent.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, model: Qwen3, optimizers: Optimizers) -> int:
        """Fills model, optimizers and random state from the last checkpoint; returns the tokens seen."""
        saved = Qwen3.from_pretrained(self.latest.resolve(), dtype=torch.float32)
        model.load_state_dict(saved.state_dict())
        state = load_file(self.latest / "trainer.safetensors")
        torch.set_rng_state(state.pop("random.cpu"))
        if (cuda := state.pop("random.cuda", None)) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
        optimizers.load_state(state)
        return json.loads((self.latest / "trainer.json").read_text())["tokens"]


@contextmanager
def disk_errors(path: Path):
    """safetensors reports a full disk by an error class of its own; here it is an OSError like any other."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); make room, then go on with --resume") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files that make weights a checkpoint that can chat."""
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.json")
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


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


def flops_per_token(model: Qwen3, length: float) -> float:
    """Of a forward and backward pass: 6 for every weight that multiplies, and attention's (PaLM, appendix B)."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * (weights + head) + attention


def peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@contextmanager
def progress_bar(steps: int, start: int):
    """Yields update(step, text): a bar in a terminal, else a line now and then."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    last = time.monotonic()
    with Progress(*columns, console=console.stderr, disable=not console.stderr.is_terminal) as progress:
        task = progress.add_task("", total=steps, completed=start)

        def update(step: int, text: str) -> None:
            nonlocal last
            progress.update(task, completed=step, description=text)
            if progress.disable and (time.monotonic() - last > 15 or step == steps):
                last = time.monotonic()
                console.notice(f"step {step}/{steps}  {text}")

        yield update


class Trainer:
    def __init__(self, settings: Settings, resume: bool):
        decide_source(settings)
        self.settings, train = settings, settings.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = device_of(train.device)
        self.tokenizer = resolve(settings.model.tokenizer)
        self.chat = Chat.from_pretrained(settings.model.tokenizer)
        self.model = build_model(settings, self.chat, self.device)
        self.optimizers = Optimizers(self.model, settings.optimizer)
        self.source = build_source(settings, self.chat)
        self.end_of_text = self.chat.tokenizer.token_to_id(END_OF_TEXT) if settings.data.mask_documents else None
        self.run = Run(settings, resume)
        self.tokens = self.run.load(self.model, self.optimizers) if self.run.step else 0

    def autocast(self):
        enabled = self.settings.train.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; the record of it."""
        train, start = self.settings.train, time.perf_counter()
        parts = batches(self.source.rows(step - 1), train.accumulate, self.device, self.end_of_text)
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in parts)
        if not targets:
            raise ValueError(f"step {step}: no row is within train.sequence {train.sequence}; raise it")
        total = torch.zeros((), dtype=torch.float64)
        for batch in parts:
            with self.autocast():
                loss, _ = next_token_loss(self.model, batch)
            (loss / targets).backward()
            total += loss.detach().double().cpu()
        loss = float(total) / targets
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip or math.inf)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(
                f"step {step}: the loss is {loss} and the gradient's norm {float(norm)}; lower optimizer.lr or "
                f"train.clip, and start from {self.run.latest}, the last good checkpoint"
            )
        factor = learning_rate_factor(step, train.steps, self.settings.schedule)
        self.optimizers.step(factor)
        tokens = sum(batch.ids.numel() for batch in parts)
        self.tokens += tokens
        seconds = time.perf_counter() - start
        record = {"step": step, "loss": loss, "tokens": self.tokens, "lr": self.settings.optimizer.lr * factor}
        record |= {"grad_norm": float(norm), "tokens_per_second": tokens / seconds}
        if peak := peak_flops(self.device):
            length = sum(batch.ids.shape[1] * batch.ids.numel() for batch in parts) / tokens
            record["mfu"] = flops_per_token(self.model, length / 2) * tokens / seconds / peak
        return record

    @torch.no_grad()
    def validation_loss(self) -> float | None:
        total, count = 0.0, 0
        for index in range(self.settings.train.validate_batches):
            rows = self.source.validation_rows(index)
            for batch in batches(rows, self.settings.train.accumulate, self.device, self.end_of_text):
                with self.autocast():
                    loss, targets = next_token_loss(self.model, batch)
                total, count = total + float(loss), count + targets
        return total / count if count else None

    def print_samples(self) -> None:
        """Greedy samples: what the model answers (sft), or how it goes on (pretrain)."""
        greedy = SamplingParams(temperature=0, max_new_tokens=160)
        for prompt in self.settings.train.sample_prompts:
            asked = self.settings.stage != "pretrain"
            ids = self.chat.render([{"role": "user", "content": prompt}]) if asked else self.chat.encode(prompt)
            written = list(generate(self.model, ids, greedy))
            console.notice(f"> {prompt}\n{self.chat.decode(written, skip_special_tokens=True)}")

    def train(self) -> None:
        train, stop = self.settings.train, Stop()
        console.notice(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters on {self.device.type}, "
            f"{train.batch} rows a step, steps {self.run.step + 1} to {train.steps}"
        )
        with progress_bar(train.steps, self.run.step) as update:
            for step in range(self.run.step + 1, train.steps + 1):
                record = self.step(step)
                last = step == train.steps
                if last or (train.validate_every and step % train.validate_every == 0):
                    record |= {"validation_loss": loss} if (loss := self.validation_loss()) is not None else {}
                self.run.log(record)
                mfu = f"{record['mfu']:.0%}" if "mfu" in record else "n/a"
                update(step, f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {mfu}")
                if train.sample_every and (last or step % train.sample_every == 0):
                    self.print_samples()
                if last or stop.signal or step % train.save_every == 0:
                    self.run.save(self.model, self.optimizers, step, self.tokens, self.tokenizer)
                if stop.signal:
                    console.notice(f"saved {self.run.latest} at step {step}; go on with --resume")
                    sys.exit(128 + stop.signal)
        plot(self.run.metrics, self.run.path / "loss.png")


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
