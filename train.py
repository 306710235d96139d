"""One training loop for every stage.

    python train.py configs/toy.yaml --set train.steps=200 train.out=runs/first
    python train.py configs/toy.yaml --resume
    python train.py --keys                     lists every key of a config

`stage` in the YAML is pretrain, sft, dpo or grpo: where a step's batches come from and which loss they have
(training/stages.py, training/objectives.py). All else is the same.

A run writes its folder `train.out`:
    config.yaml      the resolved settings; --resume refuses others
    metrics.jsonl    one object a step: step, loss (mean over the step's targets), tokens (rows' tokens up to here), ...
    checkpoints/     the last `train.keep` checkpoints: the official layout, trainer.safetensors and trainer.json beside
                     (with lora the merged weights, and the adapters in adapter/)
    latest           the last of them
    loss.png         the curve
    reference.safetensors   dpo: log-probabilities under the starting weights
    rows-*.jsonl     the rows of a streamed data set

The data of a step is a pure function of its number (data/sources.py), so what a checkpoint has to hold is the weights,
the optimizers' state, the random state and the step. A run that was killed at any moment and resumed gives losses
equal to the bit to one that never stopped, on a CPU and on a GPU in deterministic mode.
"""

import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import console
from chat import Chat
from formats.source import resolve
from inference.decode import generate
from inference.params import SamplingParams
from model import Qwen3
from ops.devices import use_kernels
from ops.memory import keep_freed_memory
from training import schema
from training.lora import add_lora, load_adapter, merged_weights, save_adapter, weights_hash
from training.optimizers import Optimizers, learning_rate_factor, whole
from training.processes import Processes, Stop
from training.reporting import flops_per_token, headline, peak_flops, plot, progress_bar
from training.run import Run
from training.schema import Settings
from training.sources import agreed, build_source, decide_source
from training.stages import STAGES
from training.weights import build_model, rebuilt


class Trainer:
    def __init__(self, settings: Settings, resume: bool):
        decide_source(settings)
        self.settings, train = settings, settings.train
        if train.threads:
            torch.set_num_threads(train.threads)
        keep_freed_memory()
        self.processes = Processes(train.parallel, train.device)
        self.device, self.is_first = self.processes.device, self.processes.rank == 0
        self._check_parallel()
        self.tokenizer = resolve(settings.model.tokenizer)
        self.chat = Chat.from_pretrained(settings.model.tokenizer)
        source = build_source(settings, self.chat)
        self.run, self.model, reference = self._run_and_model(resume)
        stage = STAGES[settings.stage]
        self.stage = stage(settings, self.chat, source, self.model, reference, self.processes, self.autocast)
        self.stage.prepare(self.run)
        fused = "torch" if train.kernels == "auto" and train.compile else train.kernels  # a compiler fuses by itself
        use_kernels(self.model, fused, "train.kernels")
        for block in self.model.model.layers if train.checkpoint_activations else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for block in self.model.model.layers if train.compile else ():
            block.compile()
        self.flops = flops_per_token(self.model)
        self.objective = self.processes.spread(self.stage.objective)
        self.optimizers = Optimizers(self.model, settings.optimizer, getattr(torch, train.dtype))
        self.tokens = 0
        if self.run.step:
            state, self.tokens = self.run.load_state()
            self.optimizers.load_state(state)

    def _check_parallel(self) -> None:
        settings, count = self.settings, self.processes.count
        if settings.train.accumulate % count:
            raise ValueError(
                f"train.accumulate {settings.train.accumulate} can't be shared out evenly to {count} processes"
            )
        if settings.train.parallel == "fsdp" and settings.stage == "grpo":
            raise ValueError("train.parallel fsdp cuts the model, but stage grpo writes replies with it; set ddp")
        if settings.train.parallel == "fsdp" and settings.lora.rank:
            raise ValueError("train.parallel fsdp cuts what is trained, but lora's weights are frozen; set ddp")
        if settings.lora.rank and settings.optimizer.name == "muon":
            raise ValueError("optimizer.name muon is for whole matrices, not for lora's factors; set adamw")

    def _run_and_model(self, resume: bool) -> tuple[Run, Qwen3, Qwen3 | None]:
        """The run, its model as it stands, and a copy of the starting weights where the stage compares with them."""
        settings, train, lora = self.settings, self.settings.train, self.settings.lora
        path, compares = Path(train.out), settings.stage == "grpo" and settings.grpo.kl > 0
        begins = not (path / "latest").exists()
        model = reference = None
        if begins or lora.rank or compares:
            model = build_model(settings, self.chat, self.device)
        if lora.rank or compares:
            found = weights_hash(model)
            settings.model.fingerprint = agreed("model.fingerprint", settings.model.fingerprint, found, "the weights")
        run = Run(path, train.keep, schema.resolved(settings), resume, writes=self.is_first)
        if lora.rank:
            add_lora(model, lora.rank, lora.alpha, lora.targets, train.seed)
            if not begins:
                load_adapter(model, run.latest / "adapter")
        else:
            reference = deepcopy(model).requires_grad_(False) if compares else None
            if not begins:
                model = Qwen3.from_pretrained(run.latest.resolve(), dtype=torch.float32).to(self.device).train()
        return run, model, reference

    def autocast(self):
        enabled = self.settings.train.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()

    def step(self, step: int) -> dict[str, Any]:
        """One step over the rows of all processes, an optimizer update of it or several; the record of it."""
        train, start = self.settings.train, time.perf_counter()
        parts = self.stage.batches(step - 1)
        with self.processes.together(self.run):
            count = self.processes.sum(sum(batch.count for batch in parts))
            tokens = int(self.processes.sum(sum(batch.ids.numel() for batch in parts)))
        factor = learning_rate_factor(step, train.steps, self.settings.schedule)
        updates = [self._update(step, parts, count, factor) for _ in range(self.stage.updates)]
        loss, norm = (sum(values) / len(updates) for values in zip(*updates, strict=True))
        self.tokens += tokens
        seconds = time.perf_counter() - start
        record = {"step": step, "loss": loss, "tokens": self.tokens, "lr": self.settings.optimizer.lr * factor}
        record |= {"grad_norm": norm, **self._measured(), "tokens_per_second": tokens / seconds}
        if peak := peak_flops(self.device):
            own = sum(batch.ids.numel() for batch in parts)
            length = sum(batch.ids.shape[1] * batch.ids.numel() for batch in parts) / own
            weights, attention = self.flops
            record["mfu"] = (weights + attention * length / 2) * tokens / seconds / (peak * self.processes.count)
        return record

    def _update(self, step: int, parts: list, count: float, factor: float) -> tuple[float, float]:
        """One update of the weights; the mean loss before it, and the gradient's norm. `parts` are this process's,
        `count` is that of all."""
        with self.processes.together(self.run):
            total = self._backward(parts, count)
            loss = self.processes.sum(total) / count
            norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.clip or math.inf)))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}; lower optimizer.lr or train.clip; "
                f"{self.run.latest} is the last good checkpoint"
            )
        self.optimizers.step(factor)
        return loss, norm

    def _backward(self, parts: list, count: float) -> float:
        """Gradients of the mean loss over all processes' batches; the sum of the losses of this one's."""
        losses = []
        for batch in parts:
            with self.processes.shared_at_once(self.objective, is_last=len(losses) == len(parts) - 1):
                with self.autocast():
                    loss = self.objective(batch)
                (loss * (self.processes.count / count)).backward()  # DDP and FSDP take the mean over the processes
            losses.append(loss.detach())
        return sum(map(float, losses))  # not before: a GPU would be waited for after each batch

    def _measured(self) -> dict[str, float]:
        """What the objective has measured besides, over all processes."""
        sums = {name: map(self.processes.sum, held) for name, held in self.stage.objective.take_measured().items()}
        return {name: total / number for name, (total, number) in sums.items()}

    def whole_model(self) -> Qwen3:
        """The model in one piece, also where it is trained in shares; every process has to ask."""
        if self.settings.train.parallel != "fsdp":
            return self.model
        return rebuilt(self.model, {name: whole(tensor).cpu() for name, tensor in self.model.state_dict().items()})

    def write_model(self, model: Qwen3, directory: Path) -> None:
        """A checkpoint in the official layout; adapters are merged into it and lie beside it in PEFT's."""
        lora = self.settings.lora
        if not lora.rank:
            return model.save_pretrained(directory)
        rebuilt(model, merged_weights(model)).save_pretrained(directory)
        save_adapter(model, directory / "adapter", self.settings.model.init, lora.rank, lora.alpha, lora.targets)

    @torch.no_grad()
    def validation(self) -> dict[str, float]:
        """The loss over unseen rows, and what the objective measures on them."""
        total, count = 0.0, 0
        for index in range(self.settings.train.validate_batches):
            for batch in self.stage.validation_batches(index):
                with self.autocast():
                    total, count = total + float(self.objective(batch)), count + batch.count
        measured = {"loss": total / count} | self._measured() if count else {}
        return {f"validation_{name}": value for name, value in measured.items()}

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
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            console.notice(
                f"{trained:,} parameters to train on {self.device.type}, {train.batch} rows a step, "
                f"steps {self.run.step + 1} to {train.steps}"
            )
        with progress_bar(train.steps, self.run.step, self.is_first) as update, self._log() as log:
            for step in range(self.run.step + 1, train.steps + 1):
                record = self.step(step)
                last, stopped = step == train.steps, self.processes.sum(stop.signal) > 0
                if last or (train.validate_every and step % train.validate_every == 0):
                    record |= self.validation()
                if self.is_first:
                    log(record)
                    update(step, headline(record))
                if train.sample_every and (last or step % train.sample_every == 0):
                    model = self.whole_model()
                    if self.is_first:
                        self.print_samples(model)
                if last or stopped or step % train.save_every == 0:
                    model, state = self.whole_model(), self.optimizers.state()
                    if self.is_first:
                        write = partial(self.write_model, model)
                        self.run.save(write, state, step, self.tokens, self.tokenizer)
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
