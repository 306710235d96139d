"""How often a model's answers are right: questions that training never showed, family by family.

    python evaluate.py --model models/tiny --count 550

Four columns, all greedy: thinking on and off over unseen questions in trained phrasings, and on over phrasings that
training never used; then what went wrong in form (no closed thinking, no end) and how long the thinking is.
"""

import json
import statistics
from collections import defaultdict

import torch

import console
from chat import Chat
from data.corpus import FAMILIES, Example, check, unseen_examples
from generate import end_tokens, generate_batch
from model import Qwen3
from rewards import Reply, parse
from sampling import SamplingParams


def replies(
    model: Qwen3, chat: Chat, examples: list[Example], thinking: bool, max_new_tokens: int = 320, batch: int = 64
) -> list[Reply]:
    """Greedy answers to the examples' questions, in batches of prompts of similar length."""
    prompts = [chat.render(example.messages, thinking) for example in examples]
    ends, greedy = end_tokens(model), SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Reply] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        written = generate_batch(model, [prompts[i] for i in chosen], greedy)
        for i, ids in zip(chosen, written, strict=True):
            found[i] = parse(chat, prompts[i], ids, thinking, ends)
    return [found[i] for i in range(len(prompts))]


def evaluate(model: Qwen3, chat: Chat, count: int, seed: int, wrong: list | None = None) -> dict[str, dict[str, float]]:
    """Family -> its figures; "all" is over all questions. `wrong` collects the failures: (column, question, reply)."""

    def pieces(word: str) -> list[str]:
        return [chat.decode([index]) for index in chat.encode(word)]

    columns = {"on": ("trained", True), "off": ("trained", False), "new phrasings": ("held-out", True)}
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    lengths, errors = defaultdict(list), defaultdict(list)
    for column, (phrasings, thinking) in columns.items():
        examples = list(unseen_examples(seed, count, pieces, phrasings))
        for example, reply in zip(examples, replies(model, chat, examples, thinking), strict=True):
            correct = check(example.problem, reply.answer)
            if not correct and wrong is not None:
                wrong.append((column, example.messages[-1]["content"], reply))
            for family in (example.problem.family, "all"):
                right[family][column].append(correct)
                errors[family].append(not reply.well_formed)
                if thinking:
                    lengths[family].append(reply.tokens)
    return {
        family: {column: statistics.mean(values) for column, values in by_column.items()}
        | {"form errors": statistics.mean(errors[family]), "thinking tokens": statistics.mean(lengths[family])}
        for family, by_column in ((name, right[name]) for name in (*FAMILIES, "all"))
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    names = list(figures["all"])
    lines = [f"| family | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for family, row in figures.items():
        cells = [f"{row[name]:.0f}" if name == "thinking tokens" else f"{row[name]:.1%}" for name in names]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = console.ArgumentParser(description="Accuracy on unseen questions of the generated corpus.")
    parser.add_argument("--model", default="models/tiny", metavar="SRC", help="directory, hub id or .gguf file")
    parser.add_argument("--count", type=int, default=550, help="questions a column; the families take turns")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="also show the first N wrong replies")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (0: PyTorch's choice; 1 suits a tiny model)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.count < len(FAMILIES):
        raise ValueError(f"--count {arguments.count}: give at least {len(FAMILIES)}, one question a family")
    model, chat = Qwen3.from_pretrained(arguments.model), Chat.from_pretrained(arguments.model)
    wrong: list = []
    figures = evaluate(model, chat, arguments.count, arguments.seed, wrong)
    print(json.dumps(figures) if arguments.json else table(figures))
    for column, question, reply in wrong[: arguments.wrong]:
        console.notice(f"\n[{column}] {question}\n{reply.thinking}\n=> {reply.answer}")


if __name__ == "__main__":
    console.run(main)
