"""Ask a Qwen3: `python generate.py --thinking "Which is larger, 9.11 or 9.9?"`.

    text -> Chat.render -> ids -> model -> logits -> sample -> id -> ReplyStream -> text on the screen

First the decode loop (`generate`, `generate_batch`), which knows ids alone; then `Session`, a chat that keeps its cache
between turns; then the command. Results go to standard output, everything else to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import console
from chat import EARLY_STOP_TEXT, Chat, ReplyStream, assistant_message
from formats.checkpoint import open_checkpoint
from formats.source import resolve_default
from model import KVCache, Qwen3, load
from ops.machine import pick_device, read_bandwidth, release_freed_memory
from sampling import SamplingParams, recommended, sample

PREFILL_CHUNK = 2048  # prompt tokens that go through the model at once; bounds the memory of a long prompt


# ---- the decode loop: ids to ids ----


def generate(model: Qwen3, ids: Sequence[int], params: SamplingParams | None = None, **options) -> Iterator[int]:
    """Yields the reply's token ids one by one, the end token included. `options` are those of `steps`.

    Stops at an end token of the checkpoint, at `max_new_tokens`, or where the model's context is full. Stop strings are
    text: with `params.stop` the checkpoint's `chat` has to be given.
    """
    for token, _ in steps(model, ids, params, **options):
        yield token


def steps(
    model: Qwen3,
    ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    chat: Chat | None = None,
    cache: KVCache | None = None,
    intervene: Callable[[list[int]], list[int]] | None = None,
) -> Iterator[tuple[int, Tensor | None]]:
    """The loop of `generate`: yields (token id, the logits [V] that it was drawn from).

    `cache`: positions that it already holds must be the beginning of `ids`; only the rest is computed.
    `intervene`: is shown the reply after each token and may return ids that come next whatever the model thinks; they
    are yielded without logits.
    """
    params = params or recommended(model.generation_config, thinking=True)
    check_prompt(model, ids)
    if params.stop and chat is None:
        raise ValueError("stop strings are text: give generate the checkpoint's chat too")
    context = model.config.max_position_embeddings
    limit = min(params.max_new_tokens, context - len(ids) + 1)  # the last token itself need not be computed on
    cache = cache or new_cache(model, len(ids) + limit)
    text = ReplyStream(chat, ids, params.stop, raw=True) if params.stop else None
    generator, ends, reply = params.generator(), end_tokens(model), []
    pending = list(ids[cache.lengths[0] :])
    while True:
        logits = prefill(model, pending, cache)
        token = sample(logits, params, generator, ids, reply)
        reply.append(token)
        yield token, logits
        forced = intervene(reply) if intervene and token not in ends else []
        forced = forced[: limit - len(reply)]
        for token_id in forced:
            reply.append(token_id)
            yield token_id, None
        if token in ends or len(reply) >= limit:
            return
        if text is not None:
            for token_id in (token, *forced):
                text.push(token_id)
            if text.stopped:
                return
        pending = [token, *forced]


@torch.inference_mode()
def prefill(model: Qwen3, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Appends ids to a cache of one row, a chunk at a time, and returns the logits [V] after the last one."""
    device = model.model.embed_tokens.weight.device
    for start in range(0, len(ids), PREFILL_CHUNK):
        chunk = torch.tensor([ids[start : start + PREFILL_CHUNK]], device=device)
        logits = model(chunk, cache, last=True)
    return logits[0, -1]


@torch.inference_mode()
def generate_batch(
    model: Qwen3, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
) -> list[list[int]]:
    """Replies to many prompts at once, of any lengths; each reply is the one that `generate` gives alone.

    Each row has its own random state from its own seed. Finished rows leave the batch once they are half of it.
    """
    for ids in prompts:
        check_prompt(model, ids)
    params = params or recommended(model.generation_config, thinking=True)
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    if not prompts:
        return []
    device, context = model.model.embed_tokens.weight.device, model.config.max_position_embeddings
    limits = [min(p.max_new_tokens, context - len(ids) + 1) for p, ids in zip(params, prompts, strict=True)]
    generators, ends = [p.generator() for p in params], end_tokens(model)
    replies: list[list[int]] = [[] for _ in prompts]

    # Padding lies behind each prompt, where no real token looks; cutting the rows to length forgets it again.
    longest = max(map(len, prompts))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=device)
    cache = new_cache(model, max(map(sum, zip(map(len, prompts), limits, strict=True))), len(prompts))
    hidden = model.model(padded, cache)
    cache.truncate([len(ids) for ids in prompts])
    logits = model.head(hidden[torch.arange(len(prompts)), [len(ids) - 1 for ids in prompts]])

    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    active = set(rows)
    while True:
        for row, index in enumerate(rows):
            if index in active:
                token = sample(logits[row], params[index], generators[index], prompts[index], replies[index])
                replies[index].append(token)
                if token in ends or len(replies[index]) >= limits[index]:
                    active.discard(index)
        if not active:
            return replies
        if len(active) <= len(rows) // 2:
            kept = [row for row, index in enumerate(rows) if index in active]
            cache.keep(kept)
            rows = [rows[row] for row in kept]
        # A finished row that stays goes on at position 0, so that it never runs out of its cache.
        cache.truncate([n if i in active else 0 for n, i in zip(cache.lengths, rows, strict=True)])
        logits = model(torch.tensor([[replies[index][-1]] for index in rows], device=device), cache)[:, -1]


class PromptTooLong(ValueError):
    """A prompt that the model's context does not hold; in a chat it can begin anew."""


def check_prompt(model: Qwen3, ids: Sequence[int]) -> None:
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(ids) > context:
        raise PromptTooLong(f"the prompt has {len(ids):,} tokens, but this model's context is {context:,}; shorten it")
    if max(ids) >= vocabulary or min(ids) < 0:
        raise ValueError(
            f"token id {max(ids)} is outside of the vocabulary of {vocabulary:,}; the tokenizer is another's"
        )


def end_tokens(model: Qwen3) -> set[int]:
    """The ids that end a reply: the set in generation_config.json, or config.json's."""
    stated = model.generation_config.get("eos_token_id", model.config.eos_token_id)
    return set(stated if isinstance(stated, list) else [] if stated is None else [stated])


def new_cache(model: Qwen3, max_len: int, batch_size: int = 1) -> KVCache:
    weight = model.model.embed_tokens.weight
    max_len = min(max_len, model.config.max_position_embeddings)
    return KVCache(model.config, batch_size, max_len, device=weight.device, dtype=weight.dtype)


class ThinkingBudget:
    """Ends thinking that takes more than `tokens`: the official text is put in the model's mouth, then it answers."""

    def __init__(self, chat: Chat, prompt: Sequence[int], tokens: int):
        self.chat, self.tokens = chat, tokens
        self.text = chat.encode(EARLY_STOP_TEXT)
        self.opened = chat.opens_thinking(prompt)

    def __call__(self, reply: list[int]) -> list[int]:
        self.opened |= reply[-1] == self.chat.think_start_id
        if reply[-1] == self.chat.think_end_id:
            self.opened = False
        return self.text if self.opened and len(reply) == self.tokens else []


def repetition_period(reply: Sequence[int], longest: int = 256, least: int = 256, times: int = 8) -> int:
    """The period of an endless repetition at the end of a reply, 0 if there is none.

    It is one if the same up to `longest` tokens stand there at least `times` times over at least `least` tokens; short
    honest repetitions (a table's rule, a counted row) stay below.
    """
    for period in range(1, longest + 1):
        span = max(least, period * times)
        if span > len(reply):
            break
        tail = reply[-span:]
        if tail[period:] == tail[:-period]:
            return period
    return 0


# ---- a chat ----


@dataclass
class Answer:
    """One reply. `finish_reason`: stop, length, context, loop or interrupted."""

    prompt_tokens: int
    thinking: str = ""
    answer: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    logprobs: list[dict] | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        record = {
            "prompt_tokens": self.prompt_tokens,
            "thinking": self.thinking,
            "answer": self.answer,
            "tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
            "stats": self.stats,
            "token_ids": self.token_ids,
        }
        if self.logprobs is not None:
            record["logprobs"] = self.logprobs
        return json.dumps(record, ensure_ascii=False)


class Session:
    """A chat with a model: the messages so far and the cache of what it has already read of them."""

    def __init__(
        self,
        model: Qwen3,
        chat: Chat,
        params: SamplingParams,
        *,
        system: str | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
        raw: bool = False,
        logprobs: int = 0,
    ):
        self.model, self.chat, self.params = model, chat, params
        self.thinking, self.thinking_budget, self.raw, self.logprobs = thinking, thinking_budget, raw, logprobs
        self.system = [{"role": "system", "content": system}] if system is not None else []
        self.bandwidth: float | None = None  # bytes per second; where given, stats hold the share that was reached
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.system)
        self.ids: list[int] = []  # what the cache holds, position by position
        self.cache: KVCache | None = None

    def ask(self, text: str, show: Callable[[str, str], None] = lambda kind, text: None) -> Answer:
        """The reply to one more user message; `show` gets each piece of it as ("thinking" | "answer", text).

        Only the part of the prompt that changed since the last turn is computed. Ctrl-C ends the reply, and what was
        said until then stays in the chat.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.encode(text) if self.raw else self.chat.render(messages, self.thinking)
        check_prompt(self.model, prompt)
        cache, cached = self._reuse(prompt)
        stream = ReplyStream(self.chat, prompt, self.params.stop, self.raw)
        budget = ThinkingBudget(self.chat, prompt, self.thinking_budget) if self.thinking_budget else None
        answer = Answer(len(prompt), logprobs=[] if self.logprobs else None)
        clock = [time.perf_counter()]
        try:
            params = replace(self.params, stop=())  # the stream below looks for them itself
            for token, logits in steps(self.model, prompt, params, cache=cache, intervene=budget):
                if logits is not None:  # a forced token takes no step of its own
                    clock.append(time.perf_counter())
                answer.token_ids.append(token)
                if self.logprobs:
                    answer.logprobs.append(self._logprob(token, logits))
                for piece in stream.push(token):
                    show(*piece)
                if stream.stopped or (len(answer.token_ids) % 32 == 0 and repetition_period(answer.token_ids)):
                    answer.finish_reason = "stop" if stream.stopped else "loop"
                    break
            else:
                answer.finish_reason = self._reason(prompt, answer.token_ids)
        except KeyboardInterrupt:
            pass  # the reply so far is kept
        for piece in stream.finish():
            show(*piece)
        answer.thinking, answer.answer = stream.thinking, stream.answer
        self.ids = [*prompt, *answer.token_ids][: cache.lengths[0]]
        self.messages = [*messages, assistant_message(answer.thinking, answer.answer)]
        answer.stats = self._stats(len(prompt), cached, clock)
        return answer

    def _reuse(self, prompt: list[int]) -> tuple[KVCache, int]:
        """The cache, cut back to what it shares with the new prompt, and how many positions that is."""
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1  # the last token of the prompt is computed again in any case: its logits are needed
        context = self.model.config.max_position_embeddings
        room = min(len(prompt) + self.params.max_new_tokens, context)
        if self.cache is None:
            self.cache = new_cache(self.model, room)
        self.cache.truncate(same)
        if self.cache.max_len < room:
            self.cache.grow(min(2 * room, context))
        return self.cache, same

    def _reason(self, prompt: list[int], reply: list[int]) -> str:
        if reply[-1] in end_tokens(self.model):
            return "stop"
        return "length" if len(reply) >= self.params.max_new_tokens else "context"

    def _logprob(self, token: int, logits: Tensor | None) -> dict:
        """The token's natural log probability before penalties and filters, and the N likeliest ones."""
        name = self.chat.decode([token])
        if logits is None:  # forced by the thinking budget, not chosen
            return {"token_id": token, "text": name, "logprob": None, "top": []}
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.logprobs, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        likeliest = [{"token_id": i, "text": self.chat.decode([i]), "logprob": value} for i, value in pairs]
        return {"token_id": token, "text": name, "logprob": logprobs[token].item(), "top": likeliest}

    def _stats(self, prompt_tokens: int, cached: int, clock: list[float]) -> dict[str, Any]:
        first, last, decoded = clock[min(1, len(clock) - 1)], clock[-1], len(clock) - 2
        stats = {
            "cached_tokens": cached,
            "prefill_tokens": prompt_tokens - cached,
            "first_token_seconds": round(first - clock[0], 4),
            "prefill_tokens_per_second": rate(prompt_tokens - cached, first - clock[0]),
            "decode_tokens_per_second": rate(decoded, last - first),
            "seed": self.params.seed,
        }
        if self.bandwidth:
            read = weight_bytes_per_token(self.model) * decoded / max(last - first, 1e-9)
            stats["weight_gigabytes_per_second"] = round(read / 1e9, 2)
            stats["read_bandwidth_gigabytes_per_second"] = round(self.bandwidth / 1e9, 2)
            stats["share_of_read_bandwidth"] = round(read / self.bandwidth, 3)
        return stats


def rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count > 0 and seconds > 0 else None


def weight_bytes_per_token(model: Qwen3) -> int:
    """Bytes of weights that one decoded token reads: all but the unread rows of the embedding and the idle experts."""
    config, total = model.config, 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        share = 1.0
        if ".experts." in name:
            share = config.num_experts_per_tok / config.num_experts
        elif name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
            share = 1 / config.vocab_size
        total += tensor.nbytes * share
    return int(total)


# ---- the command ----


def parse_arguments(arguments: list[str]):
    parser = console.ArgumentParser(prog="generate.py", description="Ask a Qwen3 model.")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the question; without one, standard input or a chat")
    add("--model", metavar="SRC", help="directory, hub id or .gguf file (default: Qwen/Qwen3-0.6B)")
    add("--thinking", choices=("on", "off"), help="think before answering; alone it means on (default: on)")
    add("--thinking-budget", type=int, metavar="N", help="end the thinking after N tokens")
    add("--system", metavar="TEXT", help="the system message")
    add("--multi-turn", choices=("on", "off"), help="whether a chat remembers (default: on); alone it means on")
    add("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--min-p", type=float, metavar="P")
    add("--presence-penalty", type=float, metavar="X", help="against repetition, 0 to 2")
    add("--repetition-penalty", type=float, metavar="X")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--max-new-tokens", type=int, metavar="N", help="at most so many tokens (default: 32768)")
    add("--stop", action="append", metavar="STR", help="end at this text (may be given several times)")
    add("--raw", action="store_true", help="continue the text as it is, without a chat template (base models)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--quantize", choices=("int8", "int4"), help="quantise the weights while loading")
    add("--stats", action="store_true", help="print speeds and the share of the memory bandwidth")
    add("--json", action="store_true", help="print one JSON object per answer")
    add("--logprobs", type=int, metavar="N", help="with --json: log probabilities of each token and the N likeliest")
    options = parser.parse_args(expand_switches(arguments))
    if options.raw and (options.thinking or options.thinking_budget or options.system is not None):
        raise ValueError("--raw uses no chat template, so leave --thinking, --thinking-budget and --system out")
    if options.raw and options.multi_turn == "on":
        raise ValueError("--raw continues one text; it has no turns, so leave --multi-turn out")
    if options.thinking_budget is not None and options.thinking_budget < 1:
        raise ValueError(f"--thinking-budget {options.thinking_budget}: give at least 1 token, or --thinking off")
    if options.thinking_budget is not None and options.thinking == "off":
        raise ValueError("--thinking-budget limits the thinking that --thinking off turns off; leave one of them out")
    if options.logprobs is not None and not options.json:
        raise ValueError("--logprobs goes into the JSON record; add --json")
    if options.logprobs is not None and not 1 <= options.logprobs <= 1000:
        raise ValueError(f"--logprobs {options.logprobs}: give a number from 1 to 1000")
    options.sampling = sampling_options(options)
    return options


def sampling_options(options) -> dict[str, Any]:
    """The fields of SamplingParams that the command line gives; one out of its range is named by its flag."""
    names = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "repetition_penalty", "max_new_tokens")
    given = {name: getattr(options, name) for name in (*names, "seed")}
    given["stop"] = options.stop and tuple(options.stop)
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        try:
            SamplingParams(**{name: value})
        except ValueError as error:
            raise ValueError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from None
    return given


def expand_switches(arguments: list[str]) -> list[str]:
    """`--thinking PROMPT` as `--thinking on PROMPT`: the two switches may stand alone in front of anything."""
    result = []
    for index, argument in enumerate(arguments):
        result.append(argument)
        follows = arguments[index + 1] if index + 1 < len(arguments) else None
        if argument in ("--thinking", "--multi-turn") and follows not in ("on", "off"):
            result.append("on")
    return result


def load_session(options) -> Session:
    """The model, its chat and the settings that the options ask for."""
    path = resolve_default(options.model)
    device = pick_device(options.device, "--device")
    bandwidth = read_bandwidth(device) if options.stats else None  # its 256 MB are gone before the weights come
    chat = Chat.from_pretrained(path)
    release_freed_memory()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load(open_checkpoint(path), device, dtype)
    if options.quantize:
        from ops.quant import quantize_

        quantize_(model, options.quantize)
    thinking = options.thinking != "off"
    chosen = {"seed": int.from_bytes(os.urandom(4), "big"), **options.sampling}
    params = recommended(model.generation_config, thinking, **chosen)
    session = Session(
        model,
        chat,
        params,
        system=options.system,
        thinking=thinking,
        thinking_budget=options.thinking_budget,
        raw=options.raw,
        logprobs=options.logprobs or 0,
    )
    session.bandwidth = bandwidth
    return session


class Printer:
    """Shows a reply while it comes: thinking dim in a terminal, between its tags anywhere else."""

    def __init__(self):
        self.kind = None
        terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.before, self.after = ("\x1b[2m", "\x1b[0m\n\n") if terminal else ("<think>\n", "\n</think>\n\n")

    def __call__(self, kind: str, text: str) -> None:
        if kind != self.kind:
            print(self.before if kind == "thinking" else self.after if self.kind else "", end="")
            self.kind = kind
        print(text, end="", flush=True)

    def end(self) -> None:
        if self.kind is not None:
            print(self.after if self.kind == "thinking" else "", flush=True)


def answer_one(session: Session, text: str, options) -> Answer:
    """Asks, shows the reply as the options want it, and says on standard error what a person should know about it."""
    if options.json:
        answer = session.ask(text)
        print(answer.to_json(), flush=True)
    else:
        printer = Printer()
        try:
            answer = session.ask(text, printer)
        finally:
            printer.end()
    notices = {
        "loop": "The model repeats itself without end: stopped. --presence-penalty 1.5 may help.",
        "length": f"Stopped at --max-new-tokens {session.params.max_new_tokens}.",
        "context": f"The context of {session.model.config.max_position_embeddings:,} tokens is full: stopped.",
        "interrupted": "Interrupted.",
    }
    if answer.finish_reason in notices:
        console.notice(notices[answer.finish_reason])
    if options.stats:
        console.notice(stats_line(answer))
    return answer


def stats_line(answer: Answer) -> str:
    s = answer.stats
    line = f"prompt {s['prefill_tokens']} tokens ({s['cached_tokens']} more from the cache)"
    line += f" at {s['prefill_tokens_per_second'] or 0:,.1f} tok/s, first token after {s['first_token_seconds']:.2f} s"
    if s["decode_tokens_per_second"]:
        line += f"; reply {len(answer.token_ids)} tokens at {s['decode_tokens_per_second']:,.1f} tok/s"
        line += f" = {s['weight_gigabytes_per_second']:.1f} GB/s of weights, {s['share_of_read_bandwidth']:.0%} of the"
        line += f" {s['read_bandwidth_gigabytes_per_second']:.1f} GB/s that this machine reads"
    return line


def is_chat(options) -> bool:
    """Whether a person types the turns."""
    return sys.stdin.isatty() and (options.prompt is None or options.multi_turn == "on")


def questions(options) -> Iterator[str]:
    """The prompt of the command line, standard input (whole, or with --multi-turn on line by line), or a chat."""
    if options.prompt is not None:
        yield options.prompt
    elif not sys.stdin.isatty():
        yield from filter(None, standard_input(by_line=options.multi_turn == "on"))
    if not is_chat(options):
        return
    console.notice("Type a message; /reset forgets the chat, /exit or Ctrl-D leaves, Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line == "/exit":
            return
        if line:
            yield line


def standard_input(by_line: bool) -> Iterator[str]:
    """Standard input as one text, or line by line as it comes, without line breaks at the end."""
    sys.stdin.reconfigure(errors="strict")  # in the C locale Python would let bytes through that are no text
    try:
        if by_line:
            yield from map(str.rstrip, sys.stdin)
        else:
            yield sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text (byte {error.start:,}); convert it") from None


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    session = load_session(options)
    asked = 0
    for text in questions(options):
        if text == "/reset" or (asked and options.multi_turn == "off"):
            session.reset()
        if text == "/reset":
            continue
        try:
            answer = answer_one(session, text, options)
        except PromptTooLong as error:
            if not is_chat(options):
                raise
            console.notice(f"The chat is full: {error}, or begin anew with /reset.")
            continue
        asked += 1
        if answer.finish_reason == "interrupted" and not is_chat(options):
            raise KeyboardInterrupt
    if not asked and not is_chat(options):
        raise ValueError("standard input is empty; give a prompt as the argument or through the pipe")


if __name__ == "__main__":
    console.run(main)
