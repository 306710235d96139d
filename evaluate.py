"""How often a model's answers are right: questions that training never showed, family by family.

    python evaluate.py --model models/tiny --count 550
    python evaluate.py --model runs/tiny-sft/latest runs/tiny-dpo/latest runs/tiny-grpo/latest      a row for each
    python evaluate.py --model models/tiny --plot-budget budget.png

All greedy. For each family: thinking on and off over unseen questions in trained phrasings, and on over phrasings that
training never used; then what went wrong in form (no closed thinking, no end) and how long the thinking is. Of the
whole: the hard split, for which supervised training has no trace, and what is declined in a polite sentence, outside of
the families, where that is right, and inside, where it is wrong.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import console
from chat import Chat
from data.corpus.examples import FAMILIES, Example, check, hard_examples, outside_examples, unseen_examples
from data.corpus.talk import is_refusal
from formats.files import atomic_file
from inference.decode import ThinkingBudget, end_tokens, generate_batch
from inference.params import SamplingParams
from inference.replies import Reply, parse
from model import Qwen3

LONGEST = 400  # tokens of a reply
BUDGETS = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192)


def replies(
    model: Qwen3, chat: Chat, examples: list[Example], thinking: bool, budget: int | None = None, batch: int = 64
) -> list[Reply]:
    """Greedy replies to the examples' questions, in batches of prompts of similar length; `budget` limits the tokens of
    thinking as `--thinking-budget` does."""
    prompts = [chat.render(example.messages, thinking) for example in examples]
    greedy, ends = SamplingParams(temperature=0, max_new_tokens=LONGEST), end_tokens(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Reply] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        asked = [prompts[i] for i in chosen]
        limits = [ThinkingBudget(chat, ids, budget) for ids in asked] if budget else None
        for i, ids in zip(chosen, generate_batch(model, asked, greedy, intervene=limits), strict=True):
            found[i] = parse(chat, prompts[i], ids, thinking, ends)
    return [found[i] for i in range(len(prompts))]


class Evaluation:
    """One model's replies to `count` questions of each kind, and the failures among them."""

    def __init__(self, src: str, count: int, seed: int):
        self.model, self.chat = Qwen3.from_pretrained(src), Chat.from_pretrained(src)
        self.src, self.count, self.seed = src, count, seed
        self.wrong: list[tuple[str, str, Reply]] = []
        """(what was asked for, question, reply)"""

    def pieces(self, word: str) -> list[str]:
        return [self.chat.decode([index]) for index in self.chat.encode(word)]

    def right(self, kind: str, examples: list[Example], found: list[Reply]) -> list[bool]:
        verdicts = [check(example.problem, reply.answer) for example, reply in zip(examples, found, strict=True)]
        for example, reply, is_right in zip(examples, found, verdicts, strict=True):
            if not is_right:
                self.wrong.append((kind, example.messages[-1]["content"], reply))
        return verdicts

    def families(self) -> dict[str, dict[str, float]]:
        """Family -> its figures; "all" is over all questions."""
        columns = {"on": ("trained", True), "off": ("trained", False), "new phrasings": ("held-out", True)}
        values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for column, (phrasings, thinking) in columns.items():
            examples = list(unseen_examples(self.seed, self.count, self.pieces, phrasings))
            found = replies(self.model, self.chat, examples, thinking)
            for example, reply, is_right in zip(examples, found, self.right(column, examples, found), strict=True):
                for family in (example.problem.family, "all"):
                    values[family][column].append(is_right)
                    values[family]["form errors"].append(not reply.well_formed)
                    values[family]["declined inside"].append(is_refusal(reply.answer))
                    if thinking:
                        values[family]["thinking tokens"].append(reply.tokens)
        return {name: {key: statistics.mean(v) for key, v in values[name].items()} for name in (*FAMILIES, "all")}

    def whole(self, families: dict[str, dict[str, float]]) -> dict[str, float]:
        """The figures over all families, and those that no family has."""
        hard = list(hard_examples(self.seed, self.count, self.pieces))
        solved = self.right("hard", hard, replies(self.model, self.chat, hard, thinking=True))
        outside = list(outside_examples(self.seed, self.count))
        found = replies(self.model, self.chat, outside, thinking=True)
        declined = [is_refusal(reply.answer) for reply in found]
        for example, reply, is_declined in zip(outside, found, declined, strict=True):
            if not is_declined:
                self.wrong.append(("outside", example.messages[-1]["content"], reply))
        return families["all"] | {"hard": statistics.mean(solved), "declined outside": statistics.mean(declined)}

    def by_budget(self, budgets: Sequence[int]) -> dict[int, float]:
        """Thinking tokens allowed -> share of right answers; 0 is thinking turned off."""
        examples = list(unseen_examples(self.seed, self.count, self.pieces))
        found = {budget: replies(self.model, self.chat, examples, budget > 0, budget) for budget in budgets}
        return {budget: statistics.mean(self.right(f"budget {budget}", examples, found[budget])) for budget in budgets}


ORDER = ("on", "off", "new phrasings", "hard", "form errors", "thinking tokens", "declined outside", "declined inside")


def table(first: str, rows: dict[str, dict[str, float]]) -> str:
    """The figures as a Markdown table."""
    names = [name for name in ORDER if name in next(iter(rows.values()))]
    lines = [f"| {first} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for label, row in rows.items():
        cells = [f"{row[name]:.0f}" if name == "thinking tokens" else f"{row[name]:.1%}" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: dict[str, dict[int, float]], picture: Path) -> None:
    """Accuracy against the thinking budget, a curve for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(list(curve), [100 * share for share in curve.values()], "o-", label=label)
    axes.set(xlabel="thinking budget (tokens; 0: thinking off)", ylabel="right answers (%)", ylim=(0, 101))
    axes.legend()
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:] or "png", dpi=120)


def main() -> None:
    parser = console.ArgumentParser(description="Accuracy on unseen questions of the generated corpus.")
    add = parser.add_argument
    add("--model", nargs="+", default=["models/tiny"], metavar="SRC", help="directory, hub id or .gguf; each has a row")
    add("--count", type=int, default=550, help="questions of each kind; the families take turns")
    add("--seed", type=int, default=0, help="of the questions")
    add("--json", action="store_true", help="one object a model instead of the tables")
    add("--wrong", type=int, default=0, metavar="N", help="also show the first N wrong replies")
    add("--plot-budget", type=Path, metavar="FILE", help="instead: accuracy against the thinking budget, as a picture")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="N", help="its thinking tokens (0: off)")
    add("--threads", type=int, default=0, help="of the CPU (0: PyTorch's choice; 1 suits a tiny model)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.count < len(FAMILIES):
        raise ValueError(f"--count {arguments.count}: give at least {len(FAMILIES)}, one question a family")
    if min(arguments.budgets) < 0:
        raise ValueError(f"--budgets {min(arguments.budgets)}: give 0 (thinking off) or more tokens")
    if arguments.plot_budget and arguments.plot_budget.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot-budget {arguments.plot_budget}: give a name that ends in .png, .svg or .pdf")
    rows: dict[str, Any] = {}
    families: dict[str, dict[str, float]] = {}
    for src in arguments.model:
        evaluation = Evaluation(src, arguments.count, arguments.seed)
        if arguments.plot_budget:
            rows[src] = evaluation.by_budget(sorted(set(arguments.budgets)))
        else:
            families = evaluation.families()
            rows[src] = evaluation.whole(families)
        if arguments.json:
            print(json.dumps({"model": src, "all": rows[src], "families": families}))
        elif arguments.plot_budget:
            print(f"| budget | {src} |\n|---|---|")
            print("\n".join(f"| {budget} | {share:.1%} |" for budget, share in rows[src].items()))
        elif len(arguments.model) == 1:
            print(table("family", families) + "\n")
        for kind, question, reply in evaluation.wrong[: arguments.wrong]:
            console.notice(f"\n[{kind}] {question}\n{reply.thinking}\n=> {reply.answer}")
    if arguments.plot_budget:
        plot(rows, arguments.plot_budget)
    elif not arguments.json:
        print(table("model", rows))


if __name__ == "__main__":
    console.run(main)
