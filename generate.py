"""Ask a Qwen3: `python generate.py --thinking "Which is larger, 9.11 or 9.9?"`.

    text -> Chat.render -> ids -> model -> logits -> sample -> id -> ReplyStream -> text on the screen

This file is the command. In inference/: the loop from ids to ids (decode.py), a chat that keeps its cache between turns
(session.py), many prompts of a file (prompts.py); the names that other programs need can be imported from here.
Results go to standard output, everything else to standard error.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import console
from chat import Chat
from formats.checkpoint import open_checkpoint
from formats.source import resolve, resolve_default
from inference.decode import PromptTooLong, end_tokens, generate, generate_batch, new_cache, steps
from inference.params import SamplingParams, recommended
from inference.prompts import answer_prompts
from inference.session import Answer, Session, weight_bytes_per_token
from inference.speculate import MOST_GUESSES, DraftModel, PromptLookup, Speculation
from model import Qwen3, load
from ops.devices import pick_device, pick_kernels, use_kernels
from ops.limits import read_bandwidth
from ops.memory import release_freed_memory

__all__ = ["SamplingParams", "Session", "end_tokens", "generate", "generate_batch", "new_cache", "steps"]
__all__ += ["weight_bytes_per_token"]

BATCH_SIZE = 8  # for --prompts: a CPU reads the weights once for so many rows
LOOKUP_HELP = (
    "guess up to N next tokens from where the last ones stood before and verify them at once: the same text, sooner "
    f"where it quotes or repeats (default: {MOST_GUESSES}; 0: off)"
)


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
    add("--kernels", choices=("auto", "torch", "triton"), default="auto", help="fused operations on a GPU")
    add("--prompt-lookup", type=int, metavar="N", help=LOOKUP_HELP)
    add("--draft", metavar="SRC", help="a smaller model with the same tokenizer that guesses the next tokens")
    add("--prompts", metavar="FILE", help="answer each line of a file (JSON lines in and out), in batches")
    add("--batch-size", type=int, metavar="N", help=f"with --prompts: so many at once (default: {BATCH_SIZE})")
    add("--compile", action="store_true", help="torch.compile for the layers that PyTorch computes; try it on a GPU")
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
    if options.draft is not None and options.prompt_lookup:
        raise ValueError("--draft and --prompt-lookup both guess the next tokens; leave one of them out")
    check_file_options(options)
    options.sampling = sampling_options(options)
    return options


def check_file_options(options) -> None:
    """ValueError for options that make no sense with --prompts, or without it."""
    if options.prompts is None:
        if options.batch_size is not None:
            raise ValueError("--batch-size is for the prompts of a file; add --prompts FILE")
        return
    names = ("prompt", "multi_turn", "logprobs", "draft", "prompt_lookup")
    for name in (name for name in names if getattr(options, name) is not None):
        flag = "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"
        raise ValueError(f"--prompts answers each line of a file by itself, in batches, so leave {flag} out")
    if options.batch_size is not None and not 1 <= options.batch_size <= 4096:
        raise ValueError(f"--batch-size {options.batch_size}: give a number from 1 to 4096")
    if not Path(options.prompts).exists():
        raise ValueError(f"--prompts {options.prompts}: no such file")


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
    kernels = pick_kernels(options.kernels, device, "--kernels")
    bandwidth = read_bandwidth(device) if options.stats else None  # its 256 MB are gone before the weights come
    chat = Chat.from_pretrained(path)
    release_freed_memory()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load(open_checkpoint(path), device, dtype)
    if options.quantize:
        from ops.quant import quantize_

        quantize_(model, options.quantize)
    if options.compile:  # it fuses the layers by itself; a token under a CUDA graph has its kernels all the same
        from ops.compiled import compile_

        compile_(model, "--compile")
        model.kernels = kernels
    else:
        use_kernels(model, kernels, "--kernels")
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
        speculation=load_speculation(options, chat, model),
    )
    session.bandwidth = bandwidth
    return session


def load_speculation(options, chat: Chat, model: Qwen3) -> Speculation | None:
    """What guesses the next tokens: a draft model that speaks the same tokens, prompt lookup, or nothing."""
    if options.draft is None:
        try:
            most = MOST_GUESSES if options.prompt_lookup is None else options.prompt_lookup
            return Speculation(PromptLookup(), most) if most else None
        except ValueError as error:
            raise ValueError(f"--prompt-lookup {error}") from None
    path, weight = resolve(options.draft, "--draft"), model.model.embed_tokens.weight
    tokens = [one.tokenizer.get_vocab(with_added_tokens=True) for one in (chat, Chat.from_pretrained(path))]
    if tokens[0] != tokens[1]:
        raise ValueError(f"--draft {options.draft}: its tokenizer is another; a draft has to speak the same tokens")
    draft = load(open_checkpoint(path), weight.device, weight.dtype)
    return Speculation(DraftModel(draft, model.config.vocab_size))


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
        "context": f"The context of {session.model.config.context_length:,} tokens is full: stopped.",
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
    if s.get("drafted_tokens"):
        line += f"; {s['accepted_tokens']} of {s['drafted_tokens']} guessed tokens accepted ({s['acceptance']:.0%}),"
        line += f" {s['tokens_per_pass']:.2f} tokens a pass"
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


def answer_file(session: Session, options) -> None:
    """A JSON record on a line of its own for each prompt of the file."""
    start, count, tokens = time.perf_counter(), 0, 0
    for answer in answer_prompts(session, Path(options.prompts), options.batch_size or BATCH_SIZE):
        sys.stdout.write(answer.to_json() + "\n")
        sys.stdout.flush()
        count, tokens = count + 1, tokens + len(answer.token_ids)
    if count == 0:
        raise ValueError(f"--prompts {options.prompts}: no prompt in it; write one a line")
    if options.stats:
        seconds = time.perf_counter() - start
        console.notice(f"{count:,} prompts, {tokens:,} tokens in {seconds:.1f} s = {tokens / seconds:,.1f} tok/s")


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    session = load_session(options)
    if options.prompts is not None:
        answer_file(session, options)
        return
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
