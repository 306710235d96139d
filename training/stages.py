"""The four stages of training: each makes the micro-batches of a step and has an objective for them.

    pretrain, sft   rows of texts and conversations, packed several to a sequence if asked for
    dpo             pairs of answers, with their log-probabilities under the starting weights
    grpo            replies that the model itself writes to questions, with their rewards

A step's micro-batches, and what is random in them, are a pure function of its number and, for grpo, of the weights.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import console
from chat import Chat
from data.packing import dealt, packed
from data.shard_format import END_OF_TEXT
from data.sources import ALL, Item, Pair, Question, Row, fingerprint, row_of
from formats.files import atomic_file
from inference.decode import end_tokens
from inference.engine import Engine, Pace, generate_batch
from inference.params import SamplingParams
from inference.replies import parse
from model import Qwen3
from training.batches import Batch, Pairs, Rollouts, batches, in_parts, lengths_of, packed_batch, padded_rows
from training.lora import without_adapters
from training.objectives import DPO, GRPO, Objective, advantages, answer_logprobs
from training.prefetch import Prefetcher
from training.processes import Processes
from training.rewards import reward
from training.run import Run
from training.schema import Settings
from training.weights import starting_model


class Stage:
    """Pretraining and SFT. `model` is trained; `autocast()` is the context of its forward passes. Each of the
    `processes` gets its own share of a step's rows."""

    updates = 1
    """Optimizer updates on the micro-batches of one step."""

    def __init__(
        self,
        settings: Settings,
        chat: Chat,
        source,
        model: Qwen3,
        reference: Qwen3 | None,
        processes: Processes,
        autocast: Callable[[], AbstractContextManager],
    ):
        """`reference`: a frozen copy of the starting weights; None: the model itself without its adapters."""
        self.settings, self.chat, self.source, self.model, self.reference = settings, chat, source, model, reference
        self.processes, self.device, self.autocast = processes, processes.device, autocast
        self.micro_batches = -(-settings.train.accumulate // processes.count)  # rounded up: as many in each process
        share = ALL if settings.data.pack else processes.share  # all rows of a step are packed together
        self.prefetcher = Prefetcher(source, settings.train.steps, share)
        self.objective = self.build_objective()

    def build_objective(self) -> Objective:
        return Objective(self.model)

    def prepare(self, run: Run) -> None:
        """Computes what needs the starting weights, which the model still has at step 0."""

    def batches(self, step: int) -> list:
        """The micro-batches of this process's share of one step (0 is the first)."""
        rows = self._rows(step)
        return self._packed(rows) if self.settings.data.pack else self.collate(rows, self.micro_batches)

    def _packed(self, rows: list[Row]) -> list[Batch]:
        """This process's share of all rows of a step."""
        sequences = packed(rows, self.settings.train.sequence, self.processes.count)
        chosen = dealt(sequences, self.micro_batches, self.processes.count, self.processes.rank)
        return [packed_batch(sequences, self.device) for sequences in chosen]

    def _rows(self, step: int, each: int = 1) -> list[Item]:
        """This process's rows, each of which becomes `each` sequences. ValueError for too few: each process needs as
        many micro-batches as the others, since FSDP computes them in lockstep."""
        rows = self.prefetcher.rows(step)
        needed = self.micro_batches if self.processes.count > 1 else 1
        if self.settings.data.pack:  # these are the rows of all processes, and of micro-batches there may be fewer
            needed = self.processes.count
        if len(rows) * each < needed:
            raise ValueError(
                f"step {step + 1}: {len(rows) * each} rows are within train.sequence, but process "
                f"{self.processes.rank} of {self.processes.count} needs {needed}, one for each micro-batch; raise "
                "train.sequence or train.batch, or lower train.accumulate"
            )
        return rows

    def validation_batches(self, index: int) -> list:
        """The micro-batches of this process's share of one validation. Each process has as many as the others; where
        there are fewer rows than processes, all of them take all rows, which leaves the mean as it is."""
        rows, count = self.prefetcher.validation_rows(index), self.processes.count
        if self.settings.data.pack and len(rows) >= count:
            return self._packed(rows)
        if len(rows) >= count:
            rows, micro_batches = rows[self.processes.share], min(self.micro_batches, len(rows) // count)
        else:
            micro_batches = 1
        return self.collate(rows, micro_batches)

    def collate(self, rows: list[Row], micro_batches: int) -> list[Batch]:
        data = self.settings.data
        end_of_text = self.chat.tokenizer.token_to_id(END_OF_TEXT) if data.mask_documents else None
        return batches(rows, micro_batches, self.device, end_of_text)


class PreferenceStage(Stage):
    """DPO. The reference log-probabilities are computed once, for every pair that the run will see, and saved with it,
    so that resuming needs neither the starting weights nor a second model in memory."""

    def build_objective(self) -> DPO:
        return DPO(self.model, self.settings.dpo.beta, self.settings.dpo.nll)

    def prepare(self, run: Run) -> None:
        path = run.path / "reference.safetensors"
        self.logprobs: dict[bytes, Tensor] = {}
        if run.step:
            try:
                saved = load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: can't be read ({error}); begin a new train.out") from None
            keys = (bytes(key) for key in saved["pairs"].numpy())
            self.logprobs = dict(zip(keys, saved["logprobs"], strict=True))
            if not run.changed.keys() & {"train.steps", "train.validate_batches", "data.validation"}:
                return
        missing = {key: pair for key, pair in self._pairs_of_the_run().items() if key not in self.logprobs}
        if not missing:
            return
        model = self.model  # at step 0, and without its adapters, it has the starting weights
        if run.step and not self.settings.lora.rank:
            model = starting_model(self.settings, self.chat, self.device)
        self.logprobs |= self._reference(missing, model)
        if self.processes.is_first:
            pairs = torch.tensor([list(key) for key in self.logprobs], dtype=torch.uint8)
            with atomic_file(path) as temporary:
                save_file({"pairs": pairs, "logprobs": torch.stack(list(self.logprobs.values()))}, temporary)

    def _pairs_of_the_run(self) -> dict[bytes, Pair]:
        """All of training and validation, by their fingerprints."""
        train = self.settings.train
        steps = [self.source.rows(step) for step in range(train.steps)]
        steps += [self.source.validation_rows(index) for index in range(train.validate_batches)]
        found = {fingerprint(pair): pair for rows in steps for pair in rows}
        if not found:
            raise ValueError(f"no pair is within train.sequence {train.sequence}; raise it")
        return found

    def _reference(self, pairs: dict[bytes, Pair], model: Qwen3) -> dict[bytes, Tensor]:
        """float32 [2] for each pair: the log-probabilities of its chosen and its rejected answer."""
        train = self.settings.train
        keys = sorted(pairs, key=lambda key: pairs[key].length)
        size, logprobs = max(1, train.batch // train.accumulate), torch.zeros(len(keys), 2, device=self.device)
        starts = range(0, len(keys), size)[self.processes.share]
        if self.processes.is_first:
            console.notice(f"reference log-probabilities of {len(keys):,} pairs")
            starts = console.counted(starts, f"reference: batches of {len(starts):,}")
        with torch.no_grad(), self.autocast(), without_adapters(model):
            for start in starts:
                batch = self._pairs([pairs[key] for key in keys[start : start + size]])
                logprobs[start : start + size] = answer_logprobs(model, batch).view(-1, 2)
        return dict(zip(keys, self.processes.sum_tensor(logprobs).cpu(), strict=True))

    def collate(self, rows: list[Pair], micro_batches: int) -> list[Pairs]:
        return [self._pairs(chosen, self._look_up(chosen)) for chosen in in_parts(rows, micro_batches)]

    def _pairs(self, pairs: list[Pair], reference: Tensor | None = None) -> Pairs:
        rows = [row for pair in pairs for row in pair]
        ids, targets = padded_rows(rows, self.device)
        reference = torch.zeros(len(ids)) if reference is None else reference
        return Pairs(ids, targets, reference, lengths_of(rows))

    def _look_up(self, pairs: list[Pair]) -> Tensor:
        try:
            return torch.cat([self.logprobs[fingerprint(pair)] for pair in pairs]).to(self.device)
        except KeyError:
            raise ValueError("a pair has no saved reference: the data has changed since this run began") from None


class Sampled(NamedTuple):
    """A prompt and the model's own reply to it."""

    row: Row
    advantage: float
    tokens: int

    @property
    def length(self) -> int:
        return self.row.length


class Steady(Pace):
    """Prompts in pieces of a constant length. By measured times the pieces, and so the last bits of logits and
    the replies, would depend on how busy the machine is, and a resumed run would not be bit-identical."""

    def measured(self, tokens: int, seconds: float) -> None:
        pass


class RewardStage(Stage):
    """GRPO: every question is answered `group` times, and each reply is compared with the others of its group."""

    def build_objective(self) -> GRPO:
        grpo = self.settings.grpo
        self.updates = grpo.updates
        clip_high = grpo.clip if grpo.clip_high is None else grpo.clip_high
        return GRPO(self.model, grpo.clip, clip_high, grpo.kl, grpo.temperature)

    def batches(self, step: int) -> list[Rollouts]:
        grpo = self.settings.grpo
        asked = [question for question in self._rows(step, grpo.group) for _ in range(grpo.group)]
        replies = self._replies([question.prompt for question in asked], step)
        weights = advantages(self._rewards(asked, replies), grpo.group, grpo.divide_by_std)
        written = [
            Sampled(row_of(question.prompt, reply), weight, len(reply))
            for question, reply, weight in zip(asked, replies, weights.tolist(), strict=True)
        ]
        return [self._rollouts(chosen) for chosen in in_parts(written, self.micro_batches)]

    def validation_batches(self, index: int) -> list:
        return []  # a loss over replies of its own says nothing; evaluate.py asks for right answers

    def _replies(self, prompts: list[list[int]], step: int) -> list[list[int]]:
        """Each reply has its own seed, so a resumed run, or one in more processes, writes the same replies."""
        grpo, seed = self.settings.grpo, self.settings.train.seed
        places = (divmod(row, grpo.group) for row in range(len(prompts)))
        questions = ((self.processes.rank + self.processes.count * question, reply) for question, reply in places)
        names = (f"{seed} {step} 0 {question * grpo.group + reply}".encode() for question, reply in questions)
        digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
        limits = {"temperature": grpo.temperature, "max_new_tokens": grpo.max_new_tokens}
        params = [SamplingParams(**limits, seed=int.from_bytes(digest) >> 1) for digest in digests]
        engine = Engine(self.model, grpo.rollout_batch)
        engine.pace = Steady()
        return generate_batch(self.model, prompts, params, engine=engine)

    def _rewards(self, asked: list[Question], written: list[list[int]]) -> Tensor:
        """float64 [replies]: in float32 the mean of equal rewards need not be one of them."""
        grpo, ends = self.settings.grpo, end_tokens(self.model)
        replies = [parse(self.chat, q.prompt, ids, q.thinking, ends) for q, ids in zip(asked, written, strict=True)]
        values = [reward(r, q.is_right, grpo.format_reward) for r, q in zip(replies, asked, strict=True)]
        rewards = torch.tensor(values, dtype=torch.float64)
        self.objective.measure(
            reward=rewards,
            correct=[q.is_right(r.answer) for r, q in zip(replies, asked, strict=True)],
            format_errors=[not r.well_formed for r in replies],
            length=[len(ids) for ids in written],
            idle_groups=[len(set(values[i : i + grpo.group])) == 1 for i in range(0, len(values), grpo.group)],
        )
        return rewards

    @torch.no_grad()
    def _rollouts(self, written: list[Sampled]) -> Rollouts:
        grpo, replies, tokens = self.settings.grpo, len(written), sum(reply.tokens for reply in written)
        share, count = {
            "reply": ([1 / reply.tokens for reply in written], replies),
            "token": ([1.0] * replies, tokens),
            "constant": ([1 / grpo.max_new_tokens] * replies, replies),
        }[grpo.average]
        ids, targets = padded_rows([reply.row for reply in written], self.device)
        weights = torch.tensor([reply.advantage for reply in written], device=self.device)
        shares, lengths = torch.tensor(share, device=self.device), lengths_of([reply.row for reply in written])
        batch = Rollouts(ids, targets, weights, shares, count, lengths=lengths)
        with self.autocast():
            if self.updates > 1:
                batch = batch._replace(old=self.objective.logprobs(batch))
            if grpo.kl:
                batch = batch._replace(reference=self._reference(batch))
        return batch

    def _reference(self, batch: Rollouts) -> Tensor:
        if self.reference is not None:
            return self.objective.logprobs(batch, self.reference)
        with without_adapters(self.model):
            return self.objective.logprobs(batch)


STAGES: dict[str, type[Stage]] = {"pretrain": Stage, "sft": Stage, "dpo": PreferenceStage, "grpo": RewardStage}
