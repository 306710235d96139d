"""Ask a Qwen3: `python generate.py --thinking "Which is larger, 9.11 or 9.9?"`.

    text -> Chat.render -> ids -> model -> logits -> sample -> id -> ReplyStream -> text on the screen

This file is the command: its arguments, and which of three things they ask for. In inference/: the loop from ids to ids
(decode.py), a chat that keeps its cache between turns (session.py), the chat of a terminal (terminal.py), many prompts
of a file (prompts.py). The names that other programs need can be imported from here.
Results go to standard output, everything else to standard error.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import console
from inference.flags import add_model_flags, add_sampling_flags
from inference.params import MOST_GUESSES, SamplingParams, sampling_flags

if TYPE_CHECKING:
    from inference.decode import end_tokens, generate, new_cache, steps
    from inference.engine import generate_batch
    from inference.session import Session, weight_bytes_per_token

__all__ = ["SamplingParams", "Session", "end_tokens", "generate", "generate_batch", "new_cache", "steps"]
__all__ += ["weight_bytes_per_token"]


def __getattr__(name: str) -> Any:
    """The names of `__all__`, imported at their first use: `--help` and a wrong flag need no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = {"Session": "session", "weight_bytes_per_token": "session", "generate_batch": "engine"}.get(name, "decode")
    return getattr(import_module(f"inference.{room}"), name)


BATCH_SIZE = 8  # for --prompts: a CPU reads the weights once for so many rows
EXAMPLES = """\
  python generate.py                                          a chat in the terminal
  python generate.py "Which is larger, 9.11 or 9.9?"          one answer
  python generate.py --thinking off --json < question.txt     one JSON record
  python generate.py --raw "Once upon a time"                 a base model continues a text
  python generate.py --prompts questions.jsonl > out.jsonl    many prompts in batches
"""


def parse_arguments(arguments: list[str]):
    parser = console.ArgumentParser(
        prog="generate.py",
        usage="generate.py [PROMPT] [--model SRC] [options]",
        description="Ask a Qwen3 model: one question, the prompts of a file, or a chat in the terminal.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the question; without one, standard input or a chat"
    )
    add_model_flags(parser)

    add = parser.add_argument_group("prompt").add_argument
    add("--thinking", choices=("on", "off"), help="think before answering (default: on); alone it means on")
    add("--thinking-budget", type=int, metavar="N", help="end the thinking after N tokens (default: no limit)")
    add("--system", metavar="TEXT", help="the system message (default: none)")
    add("--multi-turn", choices=("on", "off"), help="whether a chat remembers (default: on); alone it means on")
    add("--raw", action="store_true", help="continue the text as it is, without a chat template (base models)")

    add_sampling_flags(parser)

    add = parser.add_argument_group("end of a reply").add_argument
    add("--max-new-tokens", type=int, metavar="N", help="at most N tokens (default: 32768)")
    add("--stop", action="append", metavar="STR", help="end at this text (may be given several times)")
    add("--no-loop-stop", action="store_true", help="don't end a reply whose last 2,048 tokens repeat themselves")

    add = parser.add_argument_group("speculative decoding", "The same text, sooner.").add_argument
    lookup = f"most tokens to guess where the text quotes or repeats itself (default: {MOST_GUESSES}; 0: off)"
    add("--prompt-lookup", type=int, metavar="N", help=lookup)
    add("--draft", metavar="SRC", help="a smaller model with the same tokenizer that guesses the next tokens")

    add = parser.add_argument_group("input and output").add_argument
    add("--prompts", metavar="FILE", help="answer each line of a file (JSON lines in and out), in batches")
    add("--batch-size", type=int, metavar="N", help=f"with --prompts: prompts at a time (default: {BATCH_SIZE})")
    add("--json", action="store_true", help="print one JSON object per answer")
    add("--logprobs", type=int, metavar="N", help="with --json: log probabilities of each token and the N likeliest")
    add(
        "--stats", action="store_true", help="also print speeds, and the share of the memory bandwidth that was reached"
    )
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
    options.sampling = sampling_flags(options)
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


def expand_switches(arguments: list[str]) -> list[str]:
    """`--thinking PROMPT` as `--thinking on PROMPT`: the two switches may stand alone in front of anything."""
    result = []
    for index, argument in enumerate(arguments):
        result.append(argument)
        follows = arguments[index + 1] if index + 1 < len(arguments) else None
        if argument in ("--thinking", "--multi-turn") and follows not in ("on", "off"):
            result.append("on")
    return result


def main() -> None:
    options = parse_arguments(sys.argv[1:])

    from inference.load import load_session

    session = load_session(options)  # imports PyTorch, which takes a second: only now that the arguments are right

    from inference.answers import answer_file, answer_questions

    if options.prompts is not None:
        answer_file(session, Path(options.prompts), options.batch_size or BATCH_SIZE, options.stats)
    elif sys.stdin.isatty() and (options.prompt is None or options.multi_turn == "on"):
        from inference.terminal import chat

        remembers = options.multi_turn != "off"
        chat(session, options.prompt, as_json=options.json, stats=options.stats, remembers=remembers)
    else:
        answer_questions(session, options)


if __name__ == "__main__":
    console.run(main)
