"""Questions to saved outputs: replies in batches, or the log likelihood of each choice. Needs the model and torch."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import console
from chat import Chat
from evaluation.folder import OUTPUT, Folder
from evaluation.tasks import Question
from inference.decode import PromptTooLong, ThinkingBudget, check_prompt
from inference.engine import Engine, generate_batch
from inference.likelihood import Scorer
from inference.sampling import SamplingParams
from inference.session import Listener
from model import Qwen3

WINDOW = 4  # batches that are sorted by length together


class Asker:
    """Puts questions to one model under one protocol. `thinking_budget` as in generate.py, 0 for none."""

    def __init__(
        self,
        model: Qwen3,
        chat: Chat,
        params: SamplingParams,
        *,
        thinking: bool = True,
        thinking_budget: int = 0,
        system: str | None = None,
        seed: int = 0,
        samples: int = 1,
        batch: int = 16,
    ):
        self.model, self.chat, self.params, self.batch = model, chat, params, batch
        self.engine = Engine(model, batch)
        self.thinking, self.thinking_budget, self.seed, self.samples = thinking, thinking_budget, seed, samples
        self.system = [{"role": "system", "content": system}] if system is not None else []
        self._likelihood: Scorer | None = None

    def ids(self, questions: Sequence[Question]) -> list[str]:
        """The outputs that these questions will have, in their order."""
        return [name for question in questions for name in self._names(question)]

    def _names(self, question: Question) -> list[str]:
        count = 1 if question.choices else self.samples
        return [question.id if count == 1 else f"{question.id}#{sample}" for sample in range(count)]

    def ask(
        self, questions: Sequence[Question], folder: Folder, done: set[str], progress: Callable[[int], None]
    ) -> None:
        """Appends the outputs that the folder has not yet; `progress` hears how many it has after each batch."""
        waiting = [(q, name) for q in questions for name in self._names(q) if name not in done]
        total = len(done)
        for start in range(0, len(waiting), WINDOW * self.batch):
            for outputs in self._window(waiting[start : start + WINDOW * self.batch]):
                folder.append(outputs)
                total += len(outputs)
                progress(total)

    def _window(self, waiting: list[tuple[Question, str]]) -> Iterator[list[dict[str, Any]]]:
        choices = [one for one in waiting if one[0].choices]
        if choices:
            yield [self._compare(*one) for one in choices]
        prompts = [(*one, self._prompt(one[0])) for one in waiting if not one[0].choices]
        prompts.sort(key=lambda one: len(one[2]))
        for start in range(0, len(prompts), self.batch):
            yield self._reply(prompts[start : start + self.batch])

    def _thinks(self, question: Question) -> bool:
        return self.thinking if question.thinking is None else question.thinking

    def _prompt(self, question: Question) -> list[int]:
        own = question.messages[0]["role"] == "system"
        messages = question.messages if own else [*self.system, *question.messages]
        ids = self.chat.render(messages, self._thinks(question))
        try:
            check_prompt(self.model, ids)
        except PromptTooLong as error:
            raise ValueError(f"question {question.id}: {error}, or leave it out of the data") from None
        return ids

    def _reply(self, asked: list[tuple[Question, str, list[int]]]) -> list[dict[str, Any]]:
        params = [self._params(name) for _, name, _ in asked]
        listeners = [Listener(self.chat, ids, self.params.stop) for _, _, ids in asked]
        start, firsts = time.perf_counter(), {}

        def until(row: int) -> Callable[[list[int]], bool]:
            def heard(tokens: list[int]) -> bool:
                firsts.setdefault(row, time.perf_counter() - start)
                return listeners[row].heard(tokens)

            return heard

        budgets = [
            ThinkingBudget(self.chat, ids, self.thinking_budget) if self.thinking_budget and self._thinks(q) else None
            for q, _, ids in asked
        ]
        prompts = [ids for _, _, ids in asked]
        generate_batch(
            self.model,
            prompts,
            [replace(one, stop=()) for one in params],
            intervene=budgets,
            until=[until(row) for row in range(len(asked))],
            engine=self.engine,
        )
        share = (time.perf_counter() - start) / len(asked)
        for listener, one in zip(listeners, params, strict=True):
            listener.complete(self.model, one)
            listener.finish()
        return [
            self._output(question, name, ids, listener, share, firsts.get(row))
            for row, ((question, name, ids), listener) in enumerate(zip(asked, listeners, strict=True))
        ]

    def _params(self, name: str) -> SamplingParams:
        """Each answer has a seed of its own, so that neither batch nor order changes it."""
        digest = blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        return replace(self.params, seed=int.from_bytes(digest) >> 1)

    def _output(
        self, question: Question, name: str, prompt: list[int], listener: Listener, seconds: float, first: float | None
    ) -> dict[str, Any]:
        answer, thinks = listener.answer, self._thinks(question)
        return {
            "schema": OUTPUT,
            "id": name,
            "question": question.id,
            "groups": list(question.groups),
            "prompt": self.chat.decode(prompt),
            "prompt_ids": prompt,
            "reference": question.reference,
            "thinking": answer.thinking,
            "answer": answer.answer,
            "finish_reason": answer.finish_reason,
            "token_ids": answer.token_ids,
            "tokens": len(answer.token_ids),
            "thinking_tokens": self._thinking_tokens(prompt, answer.token_ids),
            "malformed": answer.finish_reason != "stop" or (thinks and self.chat.think_end_id not in answer.token_ids),
            "logprobs": self._logprobs(prompt, answer.token_ids),
            "seconds": seconds,
            "first_token_seconds": first,
            "peak_bytes": console.peak_bytes(),
        }

    def _thinking_tokens(self, prompt: list[int], reply: list[int]) -> int:
        """The tokens up to `</think>`; all of them where thinking was begun and not ended."""
        begun = self.chat.opens_thinking(prompt) or self.chat.think_start_id in reply[:1]
        if not begun:
            return 0
        return reply.index(self.chat.think_end_id) if self.chat.think_end_id in reply else len(reply)

    def _logprobs(self, prompt: list[int], reply: list[int]) -> list[float]:
        """Natural log probability of each token of the reply under the model, before penalties and filters."""
        scorer = self._scorer()
        scorer.forget()  # the last bits may depend on how a text is cut into passes: here never on what came before
        return [round(value, 6) for value in scorer.logprobs(prompt, reply)]

    def _compare(self, question: Question, name: str) -> dict[str, Any]:
        text, start = question.messages[-1]["content"], time.perf_counter()
        context, found = self.chat.encode(text), []
        for choice in question.choices:
            continuation = self.chat.encode(text + choice)[len(context) :]  # as lm-evaluation-harness cuts it
            values = self._scorer().logprobs(context, continuation)
            found.append({"logprob": sum(values), "bytes": len(choice.strip().encode()), "tokens": len(continuation)})
        return {
            "schema": OUTPUT,
            "id": name,
            "question": question.id,
            "groups": list(question.groups),
            "prompt": text,
            "prompt_ids": context,
            "reference": question.reference,
            "choices": [{"text": text, **values} for text, values in zip(question.choices, found, strict=True)],
            "logprobs": [values["logprob"] for values in found],
            "seconds": time.perf_counter() - start,
            "peak_bytes": console.peak_bytes(),
        }

    def _scorer(self) -> Scorer:
        if self._likelihood is None:
            self._likelihood = Scorer(self.model)
        return self._likelihood
