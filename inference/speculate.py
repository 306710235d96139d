"""Speculation: guess the next tokens cheaply, and let one pass of the model verify them all.

A pass of few tokens reads the weights once, as a pass of one token does. So where a guess is right, a token is saved
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). The loop of inference/decode.py draws each position's token
from the model's own distribution with the reply's own random numbers, and keeps the pass as far as the guesses agree. A
guessed token x is thus accepted with probability p(x), and otherwise the token comes from p without x, as in that paper
for a draft that is certain; moreover the text is that of the same seed without speculation, whatever was guessed
(Daliri, Musco and Suresh 2024, https://arxiv.org/abs/2408.07978, call this drafter-invariant).

    PromptLookup   what followed the last few tokens where they occurred before
    DraftModel     what a smaller model would say with the same random numbers
    Speculation    whether and how much to guess: so much that it pays on this machine and this text
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from inference.decode import check_model, end_tokens, forward, new_cache
from inference.params import MOST_GUESSES, SamplingParams, Uniforms, number
from inference.sampling import Said, is_penalized, sample
from model import KVCache, Qwen3

ALLOWANCE = 0.02  # of the time without guesses may be lost to guesses that were wrong
FIRST = 4  # passes without guesses, to know what one takes
SAVINGS = 4  # passes; what was gained before excuses no more than so much


class Draft(Protocol):
    """Where guesses come from."""

    def begin(self, prompt: Sequence[int]) -> None:
        """A new reply to this prompt begins."""

    def propose(self, reply: Sequence[int], most: int, params: SamplingParams, uniforms: Uniforms) -> list[int]:
        """At most `most` ids that may follow the prompt and the reply so far. The random numbers are only looked at."""


class PromptLookup:
    """What followed the last tokens where they occurred before, in the prompt or in the reply.

    From Apoorv Saxena's prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding): no model at
    all, yet right where a reply quotes, repeats or edits. The longest of the n-grams counts, at its latest place.
    """

    NGRAMS = (4, 3, 2)

    def begin(self, prompt: Sequence[int]) -> None:
        self.prompt_tokens, self.text, self.read = len(prompt), list(prompt), 0
        self.places: dict[tuple[int, ...], int] = {}  # n-gram: the position behind it

    def propose(self, reply: Sequence[int], most: int, params=None, uniforms=None) -> list[int]:
        self.text += reply[len(self.text) - self.prompt_tokens :]
        text, end = self.text, len(self.text)
        for behind in range(self.read + 1, end):  # the n-grams at the very end have nothing behind them yet
            for n in self.NGRAMS:
                if n <= behind:
                    self.places[tuple(text[behind - n : behind])] = behind
        self.read = max(self.read, end - 1)
        found = next((self.places[key] for n in self.NGRAMS if (key := tuple(text[-n:])) in self.places), None)
        if found is None:
            return []
        period = end - found  # a guess that reaches the end continues with its own beginning
        return [text[found + i % period] for i in range(most)]


class DraftModel:
    """A smaller model with the same tokenizer, which keeps its own cache.

    It draws with the reply's next random numbers, so that it mostly says what the larger model is about to say
    wherever their distributions are alike, at any temperature; a model as its own draft is always right.

    `vocabulary` is the number of ids of the larger model (None: the same). The rows that pad one embedding or the other
    belong to no token: the draft proposes no id that the larger model lacks, and nothing after one that it lacks.
    """

    def __init__(self, model: Qwen3, vocabulary: int | None = None):
        check_model(model)
        self.model, self.vocabulary, self.ends = model, vocabulary, end_tokens(model)
        self.cache: KVCache | None = None
        self.ids: list[int] = []  # what the cache holds, position by position

    def begin(self, prompt: Sequence[int]) -> None:
        self.prompt = list(prompt)

    def propose(self, reply: Sequence[int], most: int, params: SamplingParams, uniforms: Uniforms) -> list[int]:
        text, context = [*self.prompt, *reply], self.model.config.context_length
        most = min(most, context - len(text) + 1)
        if most < 1 or max(text) >= self.model.config.vocab_size:
            return []
        if self.cache is None:
            self.cache = new_cache(self.model, 2 * (len(text) + most))
        if len(text) + most > self.cache.max_len:
            self.cache.grow(min(2 * (len(text) + most), context))
        same = min(common_prefix(self.ids[: self.cache.lengths[0]], text), len(text) - 1)
        self.cache.truncate(same)
        self.ids, pending, guesses = text, text[same:], []
        twin = uniforms.copy()
        said = Said(self.prompt, reply) if is_penalized(params) else None
        while len(guesses) < most and not (guesses and guesses[-1] in self.ends):
            logits = forward(self.model, pending, self.cache)[0, : self.vocabulary]
            guesses.append(sample(logits, params, twin, said))
            if said is not None:
                said.add(guesses[-1])
            pending = guesses[-1:]
        self.ids = [*text, *guesses]
        return guesses


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many ids two sequences have in common from their beginning on."""
    most = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:most]) != np.asarray(b[:most]))
    return int(differ[0]) if len(differ) else most


class Speculation:
    """A draft, and the measure of whether it pays.

    Passes are timed. What a pass with guesses saves against its tokens one by one is paid into an account, what it
    costs is taken from it, and every second of decoding earns an allowance of 2 %. Guesses are made only while the
    account is not overdrawn, so speculation that does not help costs about that share of the time. The number of
    guesses doubles when all were right and falls to one more than were right otherwise. None of this changes the text.
    """

    def __init__(self, draft: Draft, most: int = MOST_GUESSES):
        if not hasattr(draft, "propose"):
            raise ValueError(f"draft is a {type(draft).__name__}; give PromptLookup() or DraftModel(model)")
        if not 1 <= number("most", most, whole=True) <= 64:
            raise ValueError(f"{most} tokens to guess at once: give a number from 1 to 64")
        self.draft, self.most, self.clock = draft, most, time.perf_counter
        self.length = min(2, most)  # how many tokens are guessed next
        self.plain: float | None = None  # seconds of a pass of one token
        self.first: list[float] = []  # of the passes before that is known
        self.account = 0.0  # seconds
        self.passes = self.drafted = self.accepted = 0

    def begin(self, prompt: Sequence[int]) -> None:
        """A new reply begins: the counts are its own, what was learnt of the machine stays."""
        self.passes = self.drafted = self.accepted = 0
        self.draft.begin(prompt)

    def propose(self, reply: Sequence[int], most: int, params: SamplingParams, uniforms: Uniforms) -> list[int]:
        """The ids to verify in the next pass, perhaps none."""
        self.started = self.clock()
        most = min(most, self.length)
        if most < 1 or self.plain is None or self.account < 0:
            return []
        return self.draft.propose(reply, most, params, uniforms)

    def learn(self, pending: int, drafted: int, accepted: int) -> None:
        """After a pass over `pending` known and `drafted` guessed tokens."""
        self.passes, self.drafted, self.accepted = self.passes + 1, self.drafted + drafted, self.accepted + accepted
        if self.passes == 1 or pending != 1:  # the prompt, or what a thinking budget put in
            return
        seconds = self.clock() - self.started
        if drafted == 0:
            self._time_plain(seconds)
        else:
            seconds = min(seconds, 2 * (1 + drafted) * self.plain)  # the machine was busy with something else
            self.plain = min(self.plain, seconds)
            self.account += (accepted + 1) * self.plain - seconds
            self.length = min(2 * drafted if accepted == drafted else accepted + 1, self.most)
        if self.plain is None:
            return
        self.account = min(self.account + ALLOWANCE * seconds, SAVINGS * self.plain)

    def _time_plain(self, seconds: float) -> None:
        """The least of the first passes, then their median, followed in small steps: one slow pass changes little."""
        if self.plain is not None:
            self.plain *= 1.02 if seconds > self.plain else 0.98
            return
        self.first.append(seconds)
        if len(self.first) == FIRST:
            self.plain = min(self.first)
