"""Replies as a person or a program gets them: shown while they come, or as JSON; and the questions of a pipe or file.

Replies go to standard output, everything else to standard error. The chat of a terminal is in terminal.py.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import console
from inference.prompts import answer_prompts
from inference.session import Answer, Session

# Control characters would let a reply take over the terminal; line feed and tab are text.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Printer:
    """Shows a reply while it comes: thinking dim in a terminal, between its tags anywhere else."""

    def __init__(self):
        self.kind, self.terminal = None, sys.stdout.isatty()
        dim = self.terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.before, self.after = ("\x1b[2m", "\x1b[0m\n\n") if dim else ("<think>\n", "\n</think>\n\n")

    def __call__(self, kind: str, text: str) -> None:
        if kind != self.kind:
            print(self.before if kind == "thinking" else self.after if self.kind else "", end="")
            self.kind = kind
        print(text.translate(VISIBLE) if self.terminal else text, end="", flush=True)

    def end(self) -> None:
        if self.kind is not None:
            print(self.after if self.kind == "thinking" else "", flush=True)


def show(session: Session, ask: Callable[..., Answer], as_json: bool, stats: bool) -> Answer:
    """Shows the reply that `ask(printer)` gives, then on standard error what a person should know about it."""
    if as_json:
        answer = ask()
        print(answer.to_json(), flush=True)
    else:
        printer = Printer()
        try:
            answer = ask(printer)
        finally:
            printer.end()
    notices = {
        "loop": "Stopped: the model keeps repeating itself. Try --presence-penalty 1.5, or --no-loop-stop.",
        "length": f"Stopped at --max-new-tokens {session.params.max_new_tokens}.",
        "context": f"Stopped: the context of {session.model.config.context_length:,} tokens is full.",
        "interrupted": "Interrupted.",
    }
    if answer.finish_reason in notices:
        console.notice(notices[answer.finish_reason])
    if stats:
        console.notice(stats_lines(answer))
        if phases := answer.stats.get("start_seconds"):
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
            console.notice(f"start: {parts} = {sum(phases.values()):.2f} s")
    return answer


def stats_lines(answer: Answer) -> str:
    """The figures of a reply for a person: a line each for the prompt, the reply, and what guessing saved."""
    s = answer.stats
    speed, first = s["prefill_tokens_per_second"] or 0, s["first_token_seconds"]
    lines = [
        f"prompt: {s['prefill_tokens']:,} tokens at {speed:,.1f} tok/s, {s['cached_tokens']:,} more from the cache"
    ]
    lines.append(f"reply: {len(answer.token_ids):,} tokens, the first after {first:.2f} s")
    if s["decode_tokens_per_second"]:
        lines[-1] += f", then {s['decode_tokens_per_second']:,.1f} tok/s"
    if s["decode_tokens_per_second"] and "share_of_read_bandwidth" in s:
        read, most = s["weight_gigabytes_per_second"], s["read_bandwidth_gigabytes_per_second"]
        share = f"{s['share_of_read_bandwidth']:.0%} of the {most:.1f} GB/s that this machine reads"
        lines.append(f"weights: {read:.1f} GB/s, {share}")
    if s.get("drafted_tokens"):
        accepted = f"{s['accepted_tokens']:,} of {s['drafted_tokens']:,} accepted ({s['acceptance']:.0%})"
        lines.append(f"guessed tokens: {accepted}, {s['tokens_per_pass']:.2f} tokens a pass")
    if "computed_by_pytorch" in s:
        lines.append(f"computed by PyTorch, which is slower: {s['computed_by_pytorch']}")
    return "\n".join(lines)


def standard_input(by_line: bool) -> Iterator[str]:
    """Standard input as one text, or line by line as it arrives, without the line breaks."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="strict")  # in the C locale Python would let bytes through that are no text
    try:
        if by_line:
            yield from map(str.rstrip, sys.stdin)
        else:
            yield sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text (byte {error.start:,}); convert it") from None


def answer_questions(session: Session, options: Namespace) -> None:
    """The prompt of the command line, or standard input: whole, or with --multi-turn line by line.

    A line `/reset` forgets the turns before it; no other line means anything but itself.
    """
    by_line = options.prompt is None and options.multi_turn == "on"
    given = [options.prompt] if options.prompt is not None else filter(None, standard_input(by_line))
    asked = 0
    for text in given:
        if by_line and text == "/reset":
            session.reset()
            continue
        answer = show(session, partial(session.ask, text), options.json, options.stats)
        asked += 1
        if answer.finish_reason == "interrupted":
            raise KeyboardInterrupt
    if not asked:
        raise ValueError("standard input is empty; give a prompt as the argument or through the pipe")


def answer_file(session: Session, path: Path, batch_size: int, stats: bool) -> None:
    """A JSON record on a line of its own for each prompt of the file."""
    start, count, tokens = time.perf_counter(), 0, 0
    for answer in answer_prompts(session, path, batch_size):
        sys.stdout.write(answer.to_json() + "\n")
        sys.stdout.flush()
        count, tokens = count + 1, tokens + len(answer.token_ids)
    if count == 0:
        raise ValueError(f"--prompts {path}: no prompt in it; write one a line")
    if stats:
        seconds = time.perf_counter() - start
        console.notice(f"{count:,} prompts, {tokens:,} tokens in {seconds:.1f} s = {tokens / seconds:,.1f} tok/s")
