"""The four stages of training: where each takes a step's batches from, and which objective it hands them to.

    pretrain, sft   rows of texts and conversations, several of them packed in a sequence where that is wanted
    dpo             pairs of answers, with their log-probabilities under the weights that the run began with
    grpo            questions, and the replies that the model itself writes to them, rewarded

A step's batches are a pure function of its number and, for grpo, of the weights; so is what is drawn at random.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import console
from chat import Chat
from data.shard_format import END_OF_TEXT
from data.sources import Item, Pair, Question, Row, fingerprint, row_of
from formats.files import atomic_file
from inference.decode import end_tokens, generate_batch
from inference.params import SamplingParams
from inference.replies import parse
from model import Qwen3
from training.batches import Batch, Pairs, Rollouts, batches, in_parts, packed_batches, padded_rows
from training.lora import without_adapters
from training.objectives import DPO, GRPO, Objective, advantages, answer_logprobs
from training.prefetch import Ahead
from training.rewards import reward
from training.run import Run
from training.schema import Settings


class Stage:
    """Pretraining and SFT. `model` is trained; `autocast()` is the context that its forward passes run in; `processes`
    are those of train.py, of which each gets its own share of a step's batches."""

    updates = 1
    """Optimizer updates on the batches of one step."""

    def __init__(
        self,
        settings: Settings,
        chat: Chat,
        source,
        model: Qwen3,
        reference: Qwen3 | None,
        processes,
        autocast: Callable[[], AbstractContextManager],
    ):
        """`reference`: a frozen copy of the starting weights; None: the model itself without its adapters."""
        self.settings, self.chat, self.source, self.model, self.reference = settings, chat, source, model, reference
        self.processes, self.device, self.autocast = processes, processes.device, autocast
        self.parts = settings.train.accumulate // processes.count
        self.ahead = Ahead(source, settings.train.steps, processes.share)
        self.objective = self.build_objective()

    def build_objective(self) -> Objective:
        return Objective(self.model)

    def prepare(self, run: Run) -> None:
        """What has to be known of the starting weights. At step 0 the model still has them."""

    def batches(self, step: int) -> list:
        """Those of this process's share of the rows of one step (0 is the first)."""
        return self.collate(self._rows(step), self.parts)

    def _rows(self, step: int) -> list[Item]:
        """Enough of them that every process has as many batches as the others, which FSDP takes together."""
        rows = self.ahead.rows(step)
        if len(rows) < (self.parts if self.processes.count > 1 else 1):
            raise ValueError(f"step {step + 1}: too few rows are within train.sequence; raise it or train.batch")
        return rows

    def validation_batches(self, index: int) -> list:
        """Those of one validation, the same in every process."""
        return self.collate(self.ahead.validation_rows(index), self.settings.train.accumulate)

    def collate(self, rows: list[Row], parts: int) -> list[Batch]:
        data = self.settings.data
        if data.pack:
            return packed_batches(rows, parts, self.device, self.settings.train.sequence)
        end_of_text = self.chat.tokenizer.token_to_id(END_OF_TEXT) if data.mask_documents else None
        return batches(rows, parts, self.device, end_of_text)


class PreferenceStage(Stage):
    """DPO. The reference is computed once, for every pair that the run will see, and saved with it: going on needs
    neither the starting weights nor a second model in memory."""

    def build_objective(self) -> DPO:
        return DPO(self.model, self.settings.dpo.beta, self.settings.dpo.nll)

    def prepare(self, run: Run) -> None:
        path = run.path / "reference.safetensors"
        if run.step:
            saved = load_file(path)
        else:
            saved = self._reference()
            if self.processes.rank == 0:
                with atomic_file(path) as temporary:
                    save_file(saved, temporary)
        keys = (bytes(key) for key in saved["pairs"].numpy())
        self.logprobs = dict(zip(keys, saved["logprobs"], strict=True))

    def _reference(self) -> dict[str, Tensor]:
        """pairs uint8 [U, 16], a hash of each; logprobs float32 [U, 2] of its chosen and its rejected answer."""
        train = self.settings.train
        steps = [self.source.rows(step) for step in range(train.steps)]
        steps += [self.source.validation_rows(index) for index in range(train.validate_batches)]
        found = {fingerprint(pair): pair for rows in steps for pair in rows}
        if not found:
            raise ValueError(f"no pair is within train.sequence {train.sequence}; raise it")
        if self.processes.rank == 0:
            console.notice(f"reference log-probabilities of {len(found):,} pairs")
        keys = sorted(found, key=lambda key: found[key].length)
        size, logprobs = max(1, train.batch // train.accumulate), torch.zeros(len(keys), 2, device=self.device)
        starts = range(0, len(keys), size)[self.processes.share]
        if self.processes.rank == 0:
            starts = console.counted(starts, f"reference: batches of {len(starts):,}")
        with torch.no_grad(), self.autocast():
            for start in starts:
                batch = self._pairs([found[key] for key in keys[start : start + size]])
                logprobs[start : start + size] = answer_logprobs(self.model, batch).view(-1, 2)
        pairs = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
        return {"pairs": pairs, "logprobs": self.processes.sum_tensor(logprobs).cpu()}

    def collate(self, rows: list[Pair], parts: int) -> list[Pairs]:
        return [self._pairs(chosen, self._look_up(chosen)) for chosen in in_parts(rows, parts)]

    def _pairs(self, pairs: list[Pair], reference: Tensor | None = None) -> Pairs:
        ids, targets = padded_rows([row for pair in pairs for row in pair], self.device)
        return Pairs(ids, targets, torch.zeros(len(ids)) if reference is None else reference)

    def _look_up(self, pairs: list[Pair]) -> Tensor:
        try:
            return torch.cat([self.logprobs[fingerprint(pair)] for pair in pairs]).to(self.device)
        except KeyError:
            raise ValueError("a pair has no saved reference: the data is not what this run began with") from None


class Sampled(NamedTuple):
    """A reply of the model behind its prompt."""

    row: Row
    advantage: float
    tokens: int

    @property
    def length(self) -> int:
        return self.row.length


class RewardStage(Stage):
    """GRPO: every question is answered `group` times, and each reply is held against the others to its question."""

    def build_objective(self) -> GRPO:
        grpo = self.settings.grpo
        self.updates = grpo.updates
        clip_high = grpo.clip if grpo.clip_high is None else grpo.clip_high
        return GRPO(self.model, grpo.clip, clip_high, grpo.kl, grpo.temperature)

    def batches(self, step: int) -> list[Rollouts]:
        grpo = self.settings.grpo
        asked = [question for question in self._rows(step) for _ in range(grpo.group)]  # a group in one process
        replies = self._replies([question.prompt for question in asked], step)
        weights = advantages(self._rewards(asked, replies), grpo.group, grpo.divide_by_std)
        written = [
            Sampled(row_of(question.prompt, reply), weight, len(reply))
            for question, reply, weight in zip(asked, replies, weights.tolist(), strict=True)
        ]
        return [self._rollouts(chosen) for chosen in in_parts(written, self.parts)]

    def validation_batches(self, index: int) -> list:
        return []  # a loss over replies of its own says nothing; evaluate.py asks for right answers

    def _replies(self, prompts: list[list[int]], step: int) -> list[list[int]]:
        """Each has a seed of its own, so that a run gone on with writes the same ones."""
        grpo, seed = self.settings.grpo, self.settings.train.seed
        names = (f"{seed} {step} {self.processes.rank} {row}".encode() for row in range(len(prompts)))
        digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
        limits = {"temperature": grpo.temperature, "max_new_tokens": grpo.max_new_tokens}
        params = [SamplingParams(**limits, seed=int.from_bytes(digest) >> 1) for digest in digests]
        chunks = [slice(start, start + grpo.rollout_batch) for start in range(0, len(prompts), grpo.rollout_batch)]
        return [reply for rows in chunks for reply in generate_batch(self.model, prompts[rows], params[rows])]

    def _rewards(self, asked: list[Question], written: list[list[int]]) -> Tensor:
        """float64 [replies]: in float32 the mean of equal rewards need not be one of them."""
        grpo, ends = self.settings.grpo, end_tokens(self.model)
        replies = [parse(self.chat, q.prompt, ids, q.thinking, ends) for q, ids in zip(asked, written, strict=True)]
        worth = [reward(r, q.is_right, grpo.format_reward) for r, q in zip(replies, asked, strict=True)]
        rewards = torch.tensor(worth, dtype=torch.float64)
        self.objective.measure(
            reward=rewards,
            correct=[q.is_right(r.answer) for r, q in zip(replies, asked, strict=True)],
            format_errors=[not r.well_formed for r in replies],
            length=[len(ids) for ids in written],
            idle_groups=[len(set(worth[i : i + grpo.group])) == 1 for i in range(0, len(worth), grpo.group)],
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
        batch = Rollouts(ids, targets, weights, torch.tensor(share, device=self.device), count)
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
