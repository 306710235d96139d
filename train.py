"""One training loop for every stage.

    python train.py configs/toy.yaml --set train.steps=200 train.out=runs/first
    python train.py configs/toy.yaml --resume
    python train.py --keys                     lists every key of a config

`stage` in the YAML is pretrain, sft, dpo or grpo. A step's data goes from data/sources.py (rows) through
training/stages.py and batches.py (micro-batches of tensors) and training/objectives.py (loss) to the loop below.

A run writes its folder `train.out`:
    config.yaml      the resolved settings; --resume accepts changes that leave the mathematics as it is
    metrics.jsonl    one object a step: step, loss (mean over the step's targets), tokens (so far, without padding), ...
    checkpoints/     the last `train.keep` checkpoints: the official layout, trainer.safetensors and trainer.json
                     (with lora the merged weights, and the adapters in adapter/)
    latest           a link to the last checkpoint
    loss.png         the loss curve
    reference.safetensors   dpo: log-probabilities under the starting weights
    rows-*.jsonl     the rows of a streamed data set

The data of a step is a pure function of its number (data/sources.py), so a checkpoint holds the weights, the
optimizers' state, the random state and the step. On a CPU, a run that was killed at any moment and resumed is
bit-identical to an uninterrupted one.
"""

import math
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import console
from training.arguments import parse_arguments

if __name__ == "__main__":
    console.answer_early(parse_arguments)  # --help and a wrong flag need no PyTorch

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from chat import Chat
from formats.source import resolve
from inference.decode import check_prompt, generate
from inference.params import SamplingParams
from ops.devices import use_kernels
from ops.memory import keep_freed_memory
from training import schema
from training.balance import Balance
from training.batches import real_lengths
from training.optimizers import Optimizers, full_tensor, learning_rate_factor
from training.processes import Processes, Stop, one_line_failures
from training.reporting import flops_per_token, peak_flops, plot, reports
from training.schema import Settings
from training.sources import build_source, decide_source
from training.stages import STAGES
from training.weights import begin, full_model, write_model

SLOW_SAVE = 15  # seconds; a step has to fit into torchrun's 30 as well


class Trainer:
    """A run that is ready to start: `train` is the loop, `step` one iteration of it."""

    def __init__(self, settings: Settings, resume: bool):
        self.settings, train = settings, settings.train
        if train.threads:
            torch.set_num_threads(train.threads)
        keep_freed_memory()
        self.processes = Processes(train.parallel, train.device)
        self.device = self.processes.device
        tells = self.processes.is_first
        decide_source(settings, tells)
        check_combinations(settings, self.processes.count)
        self.chat = Chat.from_pretrained(resolve(settings.model.tokenizer, "model.tokenizer", tokenizer_only=True))
        source, latest = build_source(settings, self.chat, tells), Path(train.out) / "latest"
        with one_line_failures(settings, self.processes, latest, loading=True):
            self.run, self.model, reference = begin(settings, self.chat, self.processes, resume)
        self.samples = self._sample_prompts()
        stage = STAGES[settings.stage]
        self.stage = stage(settings, self.chat, source, self.model, reference, self.processes, self.autocast)
        with one_line_failures(settings, self.processes, latest):
            self.stage.prepare(self.run)
        with one_line_failures(settings, self.processes, latest, loading=True):
            self._make_trainable()

    def _make_trainable(self) -> None:
        """Wraps the model for its processes and builds its optimizers, with their saved state in a resumed run."""
        settings, train = self.settings, self.settings.train
        self.balance = self._balance()
        fused = "torch" if train.kernels == "auto" and train.compile else train.kernels  # a compiler fuses by itself
        use_kernels(self.model, fused, "train.kernels")
        for block in self.model.model.layers if train.checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for block in self.model.model.layers if train.compile else ():
            block.compile()
        # A tied embedding's few rows are added to the head's gradient, not a whole matrix that is zero elsewhere.
        tied, on_cpu = self.model.config.tie_word_embeddings, self.device.type == "cpu"
        self.model.model.embed_tokens.sparse = tied and on_cpu and train.parallel == "none"
        self.flops = flops_per_token(self.model)
        self.objective = self.processes.wrap(self.stage.objective)
        self.optimizers = Optimizers(self.model, settings.optimizer, getattr(torch, train.dtype))
        self.tokens = 0
        if self.run.step:
            state, self.tokens = self.run.load_state()
            self.optimizers.load_state(state)

    def train(self) -> None:
        """The loop: step, validate, log, sample, save."""
        train, run, processes = self.settings.train, self.run, self.processes
        if processes.is_first:
            self._announce()
        with (
            one_line_failures(self.settings, processes, run.latest),
            reports(run, self.settings, processes.is_first) as log,
            Stop(processes) as stop,
        ):
            for step in range(run.step + 1, train.steps + 1):
                stop.step = step
                record = self.step(step)
                last = step == train.steps

                if last or is_due(step, train.validate_every):
                    record |= self.validation()
                log(record)
                if train.sample_every and (last or is_due(step, train.sample_every)):
                    self.print_samples()
                saves = last or stop.asked() or is_due(step, train.save_every)
                if saves:
                    self.save(step)
                if saves and not last and stop.asked():  # perhaps during the save, which may take minutes
                    if processes.is_first:
                        console.notice(f"saved {run.latest} at step {step}; continue with --resume")
                    processes.wait()  # torchrun ends the others once one has left
                    sys.exit(128 + (stop.signal or signal.SIGTERM))
        if processes.is_first:
            plot(run.metrics, run.path / "loss.png")

    def step(self, step: int) -> dict[str, Any]:
        """One step over the rows of all processes, with one or more optimizer updates; returns its metrics."""
        start, processes = time.perf_counter(), self.processes
        micro_batches = self.stage.batches(step - 1)
        lengths = torch.cat([real_lengths(batch) for batch in micro_batches])
        local = (sum(batch.count for batch in micro_batches), int(lengths.sum()), int(lengths.square().sum()))
        count, tokens, squares = processes.sums(*local)  # what the loss is divided by; tokens; squared lengths
        factor = learning_rate_factor(step, self.settings.train.steps, self.settings.schedule)
        totals: dict[str, float] = {"loss": 0.0, "grad_norm": 0.0}

        for _ in range(self.stage.updates):
            if self.balance:
                with self.autocast():
                    self.balance.begin(micro_batches, tokens)
            losses = []
            for number, batch in enumerate(micro_batches, 1):
                with processes.sync(self.objective, is_last=number == len(micro_batches)):
                    with self.autocast():
                        loss = self.objective(batch)
                    (loss * (processes.count / count)).backward()  # DDP and FSDP take the mean over the processes
                losses.append(loss.detach())
            loss = processes.sum(sum(map(float, losses))) / count  # read once: each reading waits for a GPU
            norm = self.clip_gradients(self.settings.train.clip or math.inf)
            if not math.isfinite(loss) or not math.isfinite(norm):
                good = f"; {self.run.latest} is the last good checkpoint" if self.run.latest.exists() else ""
                raise ValueError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}; lower optimizer.lr or "
                    f"train.clip{good}"
                )
            self.optimizers.step(factor)
            totals["loss"] += loss / self.stage.updates
            totals["grad_norm"] += norm / self.stage.updates

        self.tokens += int(tokens)
        seconds = time.perf_counter() - start
        record = {"step": step, "loss": totals["loss"], "tokens": self.tokens}
        record |= {"lr": self.settings.optimizer.lr * factor, "grad_norm": totals["grad_norm"], **self._measured()}
        if self.balance:
            record["router_aux_loss"] = self.balance.loss()
        record["tokens_per_second"] = tokens / seconds
        if peak := peak_flops(self.device):
            weights, attention = self.flops
            operations = (weights * tokens + attention * squares / 2) * self.stage.updates  # / 2: attention is causal
            record["mfu"] = operations / seconds / (peak * processes.count)
        return record

    @torch.no_grad()
    def validation(self) -> dict[str, float]:
        """The loss and the objective's other metrics over held-out rows, which the processes share."""
        total, count = 0.0, 0.0
        for index in range(self.settings.train.validate_batches):
            for batch in self.stage.validation_batches(index):
                with self.autocast():
                    total, count = total + float(self.objective(batch)), count + batch.count
        total, count = self.processes.sums(total, count)
        measured = {"loss": total / count} | self._measured() if count else {}
        return {f"validation_{name}": value for name, value in measured.items()}

    def clip_gradients(self, limit: float) -> float:
        """Scales the gradients down to a norm of `limit` if theirs is larger; returns their norm. (`clip_grad_norm_`
        multiplies always, so that it need not wait for a GPU; here the norm is read anyway.)"""
        trained = [p for p in self.model.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in trained])
        norm = float(full_tensor(total))
        if norm > limit:
            nn.utils.clip_grads_with_norm_(trained, limit, total)
        return norm

    def save(self, step: int) -> None:
        """Saves a checkpoint; every process must call this."""
        model, state = full_model(self.model, self.settings.train.parallel), self.optimizers.state()
        if self.processes.is_first:
            start, write = time.monotonic(), partial(write_model, model, self.settings)
            self.run.save(
                write,
                state,
                step,
                self.tokens,
                resolve(self.settings.model.tokenizer, "model.tokenizer", tokenizer_only=True),
            )
            if self.processes.count > 1 and (seconds := time.monotonic() - start) > SLOW_SAVE:
                console.notice(
                    f"saving took {seconds:.0f} s, but torchrun kills its processes 30 s after SIGTERM unless it is "
                    "started with --shutdown-timeout SECONDS"
                )

    def print_samples(self) -> None:
        """Prints greedy samples: answers (sft) or continuations (pretrain)."""
        model = full_model(self.model, self.settings.train.parallel)
        greedy = SamplingParams(temperature=0, max_new_tokens=160)
        for prompt, ids in self.samples.items() if self.processes.is_first else ():
            written = list(generate(model, ids, greedy))
            console.notice(f"> {prompt}\n{self.chat.decode(written, skip_special_tokens=True)}")

    def _sample_prompts(self) -> dict[str, list[int]]:
        """The ids of each prompt; ValueError for one that the model can't take."""
        is_chat = self.settings.stage != "pretrain"
        found = {}
        for prompt in self.settings.train.sample_prompts:
            ids = self.chat.render([{"role": "user", "content": prompt}]) if is_chat else self.chat.encode(prompt)
            try:
                found[prompt] = check_prompt(self.model, ids)
            except ValueError as error:
                raise ValueError(f"train.sample_prompts: {prompt[:40]!r}: {error}") from None
        return found

    def autocast(self):
        enabled = self.settings.train.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def _measured(self) -> dict[str, float]:
        """The objective's other metrics, averaged over all processes."""
        sums = {name: self.processes.sums(*held) for name, held in self.stage.objective.take_measured().items()}
        return {name: total / number for name, (total, number) in sums.items()}

    def _balance(self) -> Balance | None:
        stated, config = self.settings.train.router_aux_loss_coef, self.model.config
        coefficient = config.router_aux_loss_coef if stated is None else stated
        sparse = any(map(config.is_sparse, range(config.num_hidden_layers)))
        return Balance(self.stage.objective, coefficient, self.processes) if sparse and coefficient else None

    def _announce(self) -> None:
        train, at = self.settings.train, self.run.step + 1
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        console.notice(
            f"{trained:,} parameters to train on {self.device.type}, {train.batch} rows a step, "
            f"steps {at} to {train.steps}"
        )
        if "train.steps" in self.run.changed:
            before, now = self.run.changed["train.steps"]
            factor = partial(learning_rate_factor, settings=self.settings.schedule)
            instead = f" instead of {factor(at, before):.3f}" if at <= before else ""
            console.notice(
                f"train.steps {before} -> {now}: from here on the schedule is that of {now} steps; step {at} has "
                f"{factor(at, now):.3f} of the peak learning rate{instead}"
            )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_combinations(settings: Settings, processes: int = 1) -> None:
    """ValueError for settings that are valid by themselves but not together, or not in so many processes."""
    train, lora, stage = settings.train, settings.lora, settings.stage
    if lora.rank and not lora.alpha:
        raise ValueError("lora.alpha 0 multiplies what the adapters learn by 0; set it above 0")
    if train.parallel == "fsdp" and stage == "grpo":
        raise ValueError("train.parallel fsdp shards the model, but stage grpo samples replies from it; set ddp")
    if train.parallel == "fsdp" and lora.rank:
        raise ValueError("train.parallel fsdp shards what is trained, but lora's weights are frozen; set ddp")
    betas = settings.optimizer.betas
    if len(betas) != 2 or max(betas) == 1:
        raise ValueError(f"optimizer.betas is {betas}, but AdamW takes two numbers from 0 to below 1")
    if lora.rank and not lora.targets:
        raise ValueError("lora.targets is empty, so nothing would be trained; name layers, or leave it out")
    if lora.rank and settings.optimizer.name == "muon":
        raise ValueError("optimizer.name muon is for whole matrices, not for lora's factors; set adamw")
    if settings.schedule.name == "wsd" and settings.schedule.warmup + settings.schedule.decay > 1:
        raise ValueError(
            f"schedule.warmup {settings.schedule.warmup} and schedule.decay {settings.schedule.decay} are more than "
            "all steps; lower one of them"
        )
    needed = 1 if settings.data.pack else -(-train.accumulate // processes)
    each = settings.grpo.group if stage == "grpo" else 1
    least = processes * each * -(-needed // each)
    if processes > 1 and train.batch < least:
        questions = f", {train.batch // each} questions," if stage == "grpo" else ""
        raise ValueError(
            f"train.batch {train.batch}{questions} is too small for {processes} processes with {needed} micro-batches "
            f"each; raise it to {least}, or lower train.accumulate or the number of processes"
        )


def main() -> None:
    arguments = parse_arguments()
    trainer = Trainer(schema.load(arguments.config, arguments.set), arguments.resume)
    trainer.train()
    if trainer.processes.is_first:
        raw = " --raw TEXT" if trainer.settings.stage == "pretrain" else ""
        path = shlex.quote(str(trainer.run.path))
        console.notice(f"wrote {trainer.run.latest}; try it: python generate.py --model {path}{raw}")
    trainer.processes.close()


if __name__ == "__main__":
    console.run(main)
